"""Hostile sizes: every file ends in bounded time and memory, with a diagnostic or compiled, and never with a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import hostile_runner
from amount import FULL
from cli_runner import optforge_here
from hostile_rules import ACCEPTED, IMPORTS, REFUSED, function, usual
from hostile_sizes import CASES, LAST, TRANSFORM, Sized, body, declared, lines, listed
from optforge.cli import main
from optforge.core import bounds
from optforge.core.diagnostics import RuleError, UsageError
from optforge.emit import layout
from optforge.library.rule import Rule

EVERY = [*CASES, *(Sized(f"refused-{c.id}", c.source, c.name) for c in REFUSED)]
EVERY += [Sized(f"accepted-{c.id}", c.source, c.name) for c in ACCEPTED]
# All of them take minutes: they are of the long run, and a part of them is of each.
TAKEN = range(0, len(EVERY), 1 if FULL else 36)


def test_there_are_enough() -> None:
    assert len({case.id for case in EVERY}) == len(EVERY)
    assert len(CASES) >= 300


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What came of each case, by its number."""
    directory = tmp_path_factory.mktemp("hostile")
    files = []
    for k in TAKEN:
        case = EVERY[k]
        path = directory / f"{k}.py"
        path.write_bytes(case.source)
        every = ["show", "generate", "numpy"]
        files.append((str(path), case.name, every if k < len(CASES) else ["generate"]))
    (directory / "cases.json").write_text(json.dumps(files))
    command = [sys.executable, hostile_runner.__file__, str(directory / "cases.json")]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "HOSTILE_MARKER": str(directory / "marker")}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
    assert not (directory / "marker").exists(), "a file was executed"
    found = [json.loads(line[2:]) for line in done.stdout.decode().split("\n") if line.startswith("@ ")]
    return dict(zip(TAKEN, found, strict=True))


@pytest.mark.parametrize("number", TAKEN, ids=lambda k: EVERY[k].id)
def test_every_file_is_compiled_or_refused_within_bounds(number: int, results: dict[int, dict[str, Any]]) -> None:
    result = results[number]
    assert result["status"] == 0, f"ended by a signal or a limit: {result}"
    assert result["codes"], result["said"]
    assert set(result["codes"]) <= {0, 2}, result["said"]
    assert "Traceback" not in result["said"]
    assert "a mistake in optforge" not in result["said"]
    assert max(result["seconds"]) < hostile_runner.SECONDS
    assert result["mebibytes"] < hostile_runner.MEBIBYTES


# ── bounds, and what is said of them ────────────────────────────────────────────────────────────────────────────────

BEYOND: list[tuple[str, str, str]] = [
    ("file", "#" * (bounds.FILE_BYTES + 1), "it has more than 524,288 bytes"),
    ("states", declared(f"p, g, {listed('s{k}=0.0', 161)}", f"p = p - g\nreturn p, {listed('s{k}', 161)}"), "error: there are at most 160 states, and here are 161"),
    ("hyperparameters", declared(f"p, g, *, lr=0.1, {listed('h{k}=0.0', 200)}"), "there are at most 200 hyperparameters, and here are 201"),
    ("options", declared(f"p, g, *, lr=0.1, {listed('o{k}=True', 1000)}"), "a rule has at most 400 parameters, and this has 1,003"),
    ("a few options", declared(f"p, g, *, lr=0.1, {listed('o{k}=True', 41)}"), "there are at most 40 static options, and here are 41"),
    ("option strings", declared("p, g, *, lr=0.1, mode='x'", lines("if mode == 'm{k}':\n    p = p - lr * g", 101) + "\nreturn p"), "option 'mode' is compared with 102 strings"),
    ("asserts", body(lines("assert lr < {k} + 1", 101)), "105:5: error: a rule has at most 100 asserts, and this has 101"),
    ("and", body(f"c = {' and '.join(['lr > 0'] * 250)}"), "nested too deeply"),
    ("comparisons", body(f"assert {' <= '.join(['lr'] * 3000)}"), "error: nested too deeply"),
    ("aliases", IMPORTS + LAST + "b0 = last\n" + lines("b{k} = b{j}", 1000) + "\nhostile = b1000\n", "nested too deeply"),
    ("doubled", IMPORTS + TRANSFORM + LAST + lines("a{k} = a{j} >> a{j}", 16) + "\nhostile = a16 >> last\n", "error: the composition is too large: it has 64 parts, of at most 32"),
    ("name", IMPORTS + function("return p", signature="p, g", name="x" * 300), "4:1: error: the name xxxxxxxxxxxxxxxxxxxx… is too long: it has 300 characters"),
    ("nodes", body("m = m + g\n" * 3000), "the rule is too large: 18,049 nodes of syntax"),
    ("nodes and options", declared(f"p, g, *, lr=0.1, {listed('o{k}=True', 40)}", lines("p = p - lr * g * {k}", 700) + "\nreturn p"), "the rule is too large to be checked: it has 41 choices of its options and"),
    ("reductions", body(lines("p = p - g / norm(g + {k})", 33)), "37:17: error: there are at most 32 reductions, and here are 33"),
    ("errors", body(lines("p = p - nobody{k}", 51)), "\nthere may be more errors behind these 50"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), [case[1:] for case in BEYOND], ids=[case[0] for case in BEYOND])
def test_what_is_beyond_a_bound_is_refused_with_the_bound(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.py"
    path.write_text(text)
    with pytest.raises((RuleError, UsageError)) as caught:
        Rule.from_file(path, "x" * 300 if "x" * 300 in text else "hostile")
    assert said in str(caught.value), str(caught.value)[:500]
    if isinstance(caught.value, RuleError):
        first = caught.value.diagnostics[0]
        assert str(caught.value).startswith(f"{path}:{first.line}:{first.column}: error: ")


def test_what_is_at_a_bound_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "hostile.py"
    for text in (
        declared(f"p, g, {listed('s{k}=0.0', 160)}", f"p = p - g\nreturn p, {listed('s{k}', 160)}"),
        declared(f"p, g, *, lr=0.1, {listed('h{k}=0.0', 199)}"),
        declared(f"p, g, *, lr=0.1, {listed('o{k}=True', 40)}"),
        body(lines("assert lr < {k} + 1", 100)),
        body(f"c = {' and '.join(['lr > 0'] * 90)}"),
        IMPORTS + function("return p", signature="p, g", name="hostile", mark="").replace("hostile", "x" * 100),
    ):
        path.write_text(text + "#" * (bounds.FILE_BYTES - len(text)))
        assert Rule.from_file(path, "x" * 100 if "x" * 100 in text else "hostile").generate()


def test_scalars_that_no_runtime_takes_are_refused_when_files_are_emitted(tmp_path: Path) -> None:
    """Not by the first step; for either target, for a rule is for both."""
    assert layout.constant("OPTFORGE_CUDA_NEWS") == bounds.SCALARS
    path = tmp_path / "hostile.py"
    for last, taken in ((143, True), (144, False)):  # of three each, beside lr, t, and the loss scale
        each = lines("p = p * h{j} + g * (h{j} * t) + h{j} * lr / t", last)
        path.write_text(
            declared(f"p, g, *, t, lr=0.1, {listed('h{k}=0.5', last)}", f"p = p - lr * g\n{each}\nreturn p")
        )
        own = Rule.from_file(path, "hostile")
        for target in ("c", "cuda"):
            if taken:
                assert own.generate(target, "f32")
                continue
            with pytest.raises(UsageError) as caught:
                own.generate(target, "f32")
            assert str(caught.value) == (
                "rule 'hostile' is too large: what is done with its elements reads 434 scalars, of at most 432"
            )


def test_names_of_files_do_not_reach_the_terminal_as_they_are(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "\x1b[2J\u202e.py"
    path.write_text(IMPORTS + function("p = p - nobody\nreturn p", signature="p, g"))
    for asked in (path, tmp_path / "\x1b[31m.py"):
        with pytest.raises(SystemExit) as end:
            main(["show", f"{asked}:hostile"])
        assert end.value.code == 2
        said = capfd.readouterr().err
        assert "\x1b" not in said
        assert "\\x1b" in said


# ── files that are no files ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=["fifo", "zero", "tty", "socket"])
def irregular(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Something that gives no end of bytes, or none at all."""
    path = tmp_path / "there"
    if request.param == "fifo":
        os.mkfifo(path)
    elif request.param == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    else:
        path.symlink_to("/dev/zero" if request.param == "zero" else "/dev/ptmx")
    return path


def test_a_rule_file_is_a_regular_file(irregular: Path, tmp_path: Path) -> None:
    path = tmp_path / "rule.py"
    irregular.rename(path)
    for command in ("show", "generate"):
        said = optforge_here(command, f"{path}:hostile", cwd=tmp_path, code=2)
        assert said == f"optforge: error: {path}: it is no regular file\n"


def test_an_emitted_file_is_a_regular_file(irregular: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    irregular.rename(out / "sgd.c")
    for arguments in (["sgd"], ["sgd", "--check"], ["--all", "--check"]):
        said = optforge_here("generate", *arguments, "--out", str(out), cwd=tmp_path, code=3)
        assert f"{out / 'sgd.c'}: it is no regular file" in said
    assert [path.name for path in out.iterdir()] == ["sgd.c"]


# ── what surrounds a command ────────────────────────────────────────────────────────────────────────────────────────


def test_what_stands_beside_a_rule_is_not_executed(tmp_path: Path) -> None:
    """Modules that have the names of ours, templates, and settings of projects in the current directory."""
    trap = 'import os\nopen(os.environ["TRAP"], "a").write(__name__)\n'
    for name in ("numpy", "jinja2", "typer", "cffi", "filelock", "platformdirs", "templates", "rules", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(trap)
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "rule.c.j2").write_text("{{ cycler.__init__.__globals__.os.system('touch trapped') }}")
    (tmp_path / "pyproject.toml").write_text("[tool.optforge]\ntemplates = 'templates'\n")
    (tmp_path / "rule.py").write_text(trap + usual("a = g"))
    environment = {**os.environ, "TRAP": str(tmp_path / "trapped")}
    environment.pop("PYTHONSAFEPATH", None)
    for command in ([sys.executable, "-m", "optforge"], [sys.executable, "-P", "-m", "optforge"]):
        done = subprocess.run(
            [*command, "generate", "rule.py:hostile"], cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "trapped").exists()
    assert "static" in (tmp_path / "build" / "hostile.c").read_text()


def test_links_in_the_output_directory_are_replaced_and_not_followed(tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    out.mkdir()
    other.write_text("precious")
    (out / "sgd.c").symlink_to(other)
    (out / "sgd.h").symlink_to(tmp_path / "nowhere")
    optforge_here("generate", "sgd", "--out", str(out), cwd=tmp_path)
    assert other.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()
    assert not any(path.is_symlink() for path in out.iterdir())


KILLED = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    from optforge import cli
    replace = os.replace
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    cli.main(["generate", "sgd", "--out", sys.argv[1]])
""")


def test_a_killed_command_leaves_nothing_for_ever(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False).returncode == -9
    (left,) = out.iterdir()
    assert left.name.startswith(".optforge-")
    old = out / ".optforge-ab_12345"  # as tempfile names them
    old.mkdir()
    (old / "0").touch()
    kept = [out / ".optforge-notes", out / ".optforge-abcdefgh"]
    kept[0].mkdir()
    (kept[0] / "mine").touch()
    kept[1].symlink_to(tmp_path)
    os.mkfifo(out / ".optforge-12345678")
    optforge_here("generate", "sgd", "--out", str(out), cwd=tmp_path)
    assert sorted(path.name for path in out.iterdir()) == [
        ".optforge-12345678", ".optforge-abcdefgh", ".optforge-notes", "optforge.c", "optforge.h", "sgd.c", "sgd.h"
    ]  # fmt: skip
    assert (tmp_path / "out").is_dir()


def test_commands_at_work_leave_each_other_alone(tmp_path: Path) -> None:
    from optforge.cli import write
    from optforge.core.atomic import workplace

    with workplace(tmp_path, write.HIDDEN) as (work, _):
        (work / "0").touch()
        write.write_all(tmp_path, {"a.c": "text"})
        assert (work / "0").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.c"]
