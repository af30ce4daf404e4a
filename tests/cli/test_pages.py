"""The pages that people read: every block of Python runs, every command does what it says, every link leads somewhere."""

from __future__ import annotations

import linecache
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

import optforge
import optforge.core.functions
from conftest import require_torch
from optforge import Rule, __version__, cli
from pages import PAGES, README, WRITTEN, blocks, commands, python_blocks
from places import ROOT

NUMPY = "import numpy as np\nimport optforge as of\n"
WEIGHTS = NUMPY + "weights = [np.ones((64, 10), np.float32), np.ones(10, np.float32)]\n"
BATCHES = "import torch\nbatches = [(torch.randn(8, 20), torch.randn(8, 3))] * 3\n"

# What the blocks of a page find when they begin: the number of the block, and the names that it takes for granted.
BEFORE: dict[str, dict[int, str]] = {
    "README.md": {2: BATCHES},
    "training.md": {
        0: NUMPY + "def gradients():\n    return [0.1 * w + 1 for w in weights]\n",
        1: "import torch\ndef batches():\n    return [(torch.randn(8, 20), torch.randn(8, 3))] * 3\n",
        2: "grads = [w + 1 for w in weights]\n",
        4: "scale, shift = np.ones(4, np.float32), np.zeros(4, np.float32)\nweight_grads, scale_grad = gradients(), scale / 2\n",
    },
    "monitoring.md": {
        0: WEIGHTS
        + "def loss_and_gradients():\n    return sum(float((w**2).sum()) for w in weights), [2 * w for w in weights]\n",
        1: "def train_one_epoch(opt):\n    opt.step(loss_and_gradients()[1])\n\ndef validation_loss():\n    return 1.0\n",
    },
    "checkpoints.md": {0: WEIGHTS + "opt = of.Optimizer(weights, 'adam')\nplateau = of.ReduceLROnPlateau(opt)\n"},
    "number-formats.md": {0: "import torch\nimport optforge as of\nparams = [torch.ones(8, dtype=torch.bfloat16)]\n"},
}
# Blocks that other tests run: the whole training, which is stopped and resumed; rules beside the libraries that they
# are from; what needs JAX, or a GPU.
ELSEWHERE = {("checkpoints.md", 1), ("equivalents.md", 0), *(("jax.md", k) for k in range(4)), ("cuda.md", 0)}


def run(page: Path, directory: Path) -> dict[str, Any]:
    """Run a page's blocks in order, as one program; what it has bound."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for k, text in enumerate(python_blocks(page)):
        if (page.name, k) in ELSEWHERE:
            continue
        exec(BEFORE.get(page.name, {}).get(k, ""), names)
        path = str(directory / f"{page.stem}-{k}.py")
        Path(path).write_text(text)
        linecache.checkcache(path)
        exec(compile(text, path, "exec"), names)
        names[f"block {k}"] = text
    return names


@pytest.mark.filterwarnings("ignore:run.safetensors also has the state of 'plateau'")  # which the page says
@pytest.mark.parametrize("page", [page for page in WRITTEN if python_blocks(page)], ids=lambda page: page.name)
def test_python(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if any("import torch" in text for text in (*python_blocks(page), *BEFORE.get(page.name, {}).values())):
        require_torch()
    if any("plot=" in text for text in python_blocks(page)):
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    names = run(page, tmp_path)
    found = {name: value for name, value in names.items() if isinstance(value, Rule)}
    for rule in found.values():
        assert rule.generate("c")  # is compiled, used or not


def test_what_is_run_elsewhere_is_there() -> None:
    for name, k in {*ELSEWHERE, *((name, k) for name, own in BEFORE.items() for k in own)}:
        page = README if name == README.name else PAGES / name
        assert k < len(python_blocks(page)), (name, k)


def test_no_block_is_of_a_language_that_no_test_reads() -> None:
    directives = ("{toctree}", "{include}", "{eval-rst}", "{optforge-help}")
    for page in WRITTEN:
        text = page.read_text("utf-8")
        for language in re.findall(r"^```([\w{][^\n]*)$", text, re.MULTILINE):
            assert language in ("python", "python no-run", "c", "cpp") or language.startswith(directives), page.name
        assert text.count("```") % 2 == 0, page.name
        for block in re.findall(r"^```python no-run\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            compile(block, page.name, "exec")  # which needs what no test has


# ── commands ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("page", [page for page in WRITTEN if commands(page)], ids=lambda page: page.name)
def test_commands(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rule = next(text for text in python_blocks(README) if "def rms_decay" in text)
    (tmp_path / "rms_decay.py").write_text(rule)
    (tmp_path / "my_rule.py").write_text(rule.replace("rms_decay", "my_rule"))
    makefile = (ROOT / "Makefile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in commands(page):
        program, *arguments = shlex.split(line)
        if program == "optforge":
            # What takes minutes says its help, if there are no other options than it knows.
            with pytest.raises(SystemExit) as end:
                cli.main([*arguments, "--help"] if arguments[0] in ("demo", "profile") else arguments)
            assert end.value.code == 0, line + capsys.readouterr().err
        elif program == "make":
            assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE), line
        elif program == "pip":
            assert set(re.findall(r"\[(\w+)\]", line)) <= set(extras), line


def test_extras_that_are_named_are_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in WRITTEN:
        named = re.findall(r"(?:optforge|\.)\[([a-z]+)\]'", page.read_text("utf-8"))
        assert set(named) <= set(extras), page.name


# ── what is quoted ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("page", [README, PAGES / "getting-started.md"], ids=lambda page: page.name)
def test_the_loop_that_is_shown_is_the_one_that_is_emitted(page: Path, tmp_path: Path) -> None:
    (rule,) = (text for text in python_blocks(page) if "def rms_decay" in text)
    loop = blocks(page, "c")[0]
    (tmp_path / "rms_decay.py").write_text(rule)
    emitted = Rule.from_file(tmp_path / "rms_decay.py", "rms_decay").generate("c")["rms_decay.c"]
    assert loop in emitted


def test_the_rule_that_is_shown_is_the_one_of_the_examples() -> None:
    def formulas(text: str) -> str:
        return text[text.index("@rule") :].strip()

    example = formulas((ROOT / "examples" / "rms_decay.py").read_text())
    for page in (README, PAGES / "getting-started.md"):
        (rule,) = (text for text in python_blocks(page) if "def rms_decay" in text)
        assert formulas(rule) == example


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    words = {*optforge.core.functions.IMPORTABLE, *optforge.transforms}
    page = (PAGES / "api.md").read_text("utf-8")
    missing = [name for name in optforge.__all__ if name not in words and not re.search(rf"\b{name}\b", page)]
    assert not missing


def test_the_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 150


# ── links and pictures ──────────────────────────────────────────────────────────────────────────────────────────────


def anchors(page: Path) -> set[str]:
    """The headings of a page, as links name them."""
    text = re.sub(r"```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    text = re.sub(r"```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "``", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), (page.name, target)
        assert there.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(there), (page.name, target)


def test_pictures_that_are_shown_are_there() -> None:
    shown = [
        (page, path) for page in WRITTEN for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text("utf-8"))
    ]
    assert len(shown) >= 3
    assert all((page.parent / path).read_bytes().startswith(b"\x89PNG") for page, path in shown)


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = re.findall(r"^([a-z-]+)$", (PAGES / "index.md").read_text("utf-8"), re.MULTILINE)
    assert {page.stem for page in PAGES.glob("*.md")} - {"index"} <= set(listed)
    assert len(listed) == len(set(listed))
