"""The command line: what it prints and writes, its exit codes, and that an error changes nothing."""

from __future__ import annotations

import array
import difflib
import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import termios
import textwrap
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import amount
from native import defaults
from optforge import __version__, cli, rules, transforms
from optforge.cli import demo, demo_training
from optforge.core.diagnostics import RuleError
from optforge.core.formats import FORMATS
from optforge.library.rule import Rule

DONE, DIFFERENT, MISTAKE, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130
COMMANDS = ("list", "show", "generate", "profile", "demo")
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
MINE = '''
from optforge import rule


@rule
def mine(p, g, m=0.0, *, t, lr=1e-3, beta=0.9, nesterov=True, mode="plain"):
    """Momentum of mine."""
    assert 0 <= beta < 1 and lr > 0
    m = beta * m + g
    if nesterov:
        m = m * 0.5
    if mode == "signed":
        m = sign(m)
    p = p - lr * m
    return p, m
'''


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process, in a directory of its own that holds the file mine.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)

    def run(*arguments: str) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main(list(arguments))
        said = capsys.readouterr()
        if "--debug" not in arguments:
            assert "Traceback" not in said.err
        assert isinstance(end.value.code, int)
        return Result(end.value.code, said.out, said.err)

    return run


def start(*arguments: str, cwd: Path, environment: dict[str, str] | None = None, **options: object) -> subprocess.Popen:
    """Start the command line as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "optforge", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONUNBUFFERED": "", **(environment or {})},
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def contents(directory: Path) -> dict[str, tuple[bytes, int, int]]:
    """Everything below a directory: bytes, inode and time of change; directories as well."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        data = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(directory))] = (data, status.st_ino, status.st_mtime_ns if path.is_file() else 0)
    return found


# ── list and show ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_list_has_a_line_for_each_rule(run: Run) -> None:
    every = run("list").out.splitlines()
    heading, *lines = every[: every.index("")]
    _, *others = every[len(lines) + 2 : every.index("BESIDE THE RULES") - 1]
    assert [line.split()[0] for line in others] == list(transforms)
    assert [line.split()[0] for line in every[every.index("BESIDE THE RULES") + 1 :]] == ["plateau"]
    assert heading.split() == ["RULE", "STATE", "BYTES"]
    assert [line.split()[0] for line in lines] == list(rules)
    for line in lines:
        rule = rules[line.split()[0]]
        assert line.endswith(rule.doc.splitlines()[0])
    adam = next(line for line in lines if line.startswith("adam "))
    assert re.match(r"adam +m v +28 +Adam ", adam)  # p, g, m, v read and p, m, v written: 7 float32
    assert re.match(r"sgd +- +12 +Stoch", lines[-1])


@pytest.mark.parametrize("name", list(rules))
def test_show(run: Run, name: str) -> None:
    result = run("show", name)
    rule = rules[name]
    assert (result.code, result.err) == (DONE, "")
    assert result.out.startswith(f"{name}: {rule.doc}")
    assert rule.hash in result.out
    for hyperparameter, default in rule.hyperparameters.items():
        assert f"\n    {hyperparameter} = {default!r}\n" in result.out
    for state in rule.definition.state:
        kind = "one double per tensor" if state.scalar else "one value per element"
        assert f"\n    {state.name}: {kind}, starts as 0.0\n" in result.out
    assert textwrap.indent(rule.definition.formulas, "    ") in result.out
    assert not re.search(r" \n|\n\n\n", result.out)


def test_show_a_rule_of_a_file_with_settings(run: Run) -> None:
    out = run("show", "mine.py:mine", "--set", "mode=signed", "--set", "nesterov=off", "--set", "lr=0.5").out
    assert "    lr = 0.5\n    beta = 0.9\n" in out
    assert "    nesterov = False    (True or False)\n    mode = signed    (plain or signed)\n" in out
    assert "p, g, m" not in out
    assert "phase 1: reads p g m, writes p m: 20 bytes (float), 40 bytes (double)" in out


def test_show_the_scalars_of_a_step_and_of_a_tensor(run: Run, tmp_path: Path) -> None:
    text = """
        from optforge import rule, scalar

        @rule
        def decaying(p, g, mu: scalar = 1.0, *, t, lr=0.1, rate=0.5):
            late = t > 10
            slow = lr * 0.5 if late else lr
            step_size = slow * rate**t
            mu = mu * rate
            p = p - step_size * mu * g
            return p, mu
        """
    (tmp_path / "decaying.py").write_text(textwrap.dedent(text))
    out = run("show", "decaying.py:decaying").out
    assert "    mu: one double per tensor, starts as 1.0\n" in out
    step, tensor = out.partition("Computed once per step, in double:\n")[2].split(
        "Computed once per tensor, in double:\n"
    )
    assert "    step_size = slow * pow(rate, t)\n" in step
    assert re.search(r"^    mu\w* = mu \* rate$", tensor, re.MULTILINE)


def test_control_characters_of_a_file_do_not_reach_the_terminal(run: Run, tmp_path: Path) -> None:
    text = MINE.replace("Momentum of", "Momentum\x1b[31m\u202e of").replace("m + g", "m + g  # \x1b]0;title\x07")
    (tmp_path / "mine.py").write_text(text)
    for arguments in (["show", "mine.py:mine"], ["generate", "mine.py:mine"]):
        result = run(*arguments)
        assert result.code == DONE
        assert not set("\x1b\x07\u202e") & set(result.out)
    assert r"\x1b[31m\u202e" in run("show", "mine.py:mine").out


def test_output_survives_an_encoding_that_lacks_its_characters(tmp_path: Path) -> None:
    process = start("show", "adam", cwd=tmp_path, environment={"PYTHONIOENCODING": "ascii"}, stdout=subprocess.PIPE)
    out, err = process.communicate()
    assert (process.returncode, err) == (DONE, "")
    assert r"beta1\xb7" in out


# ── generate ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_generate_writes_flat_and_says_what(run: Run, tmp_path: Path) -> None:
    result = run("generate", "adam", "mine.py:mine")
    names = ["adam.c", "adam.h", "mine.c", "mine.h", "optforge.c", "optforge.h"]
    assert (result.code, result.err) == (DONE, "")
    assert result.out == "".join(f"wrote build/{name}\n" for name in names)
    assert sorted(path.name for path in (tmp_path / "build").iterdir()) == names
    expected = rules.adam.generate() | Rule.from_file("mine.py", "mine").generate()
    assert {name: (tmp_path / "build" / name).read_text() for name in names} == expected


def test_generate_keeps_what_is_as_it_should_be(run: Run, tmp_path: Path) -> None:
    run("generate", "adam", "sgd", "--out", "out")
    (tmp_path / "out" / "sgd.c").write_text("changed")
    before = contents(tmp_path / "out")
    result = run("generate", "adam", "sgd", "--out", "out")
    after = contents(tmp_path / "out")
    assert result.out == (
        "kept  out/adam.c\nkept  out/adam.h\nkept  out/optforge.c\nkept  out/optforge.h\n"
        "wrote out/sgd.c\nkept  out/sgd.h\n"
    )
    assert {name for name in after if after[name] != before[name]} == {"sgd.c"}
    assert after["sgd.c"][0].decode() == rules.sgd.generate()["sgd.c"]


def test_generate_all(run: Run, tmp_path: Path) -> None:
    assert run("generate", "--all", "--out", "a/b").code == DONE
    files = {path.name for path in (tmp_path / "a" / "b").iterdir()}
    assert files == {f"{name}.{ending}" for name in [*rules, "optforge"] for ending in "hc"} | {"plateau.h"}


def test_generate_what_is_no_rule(run: Run, tmp_path: Path) -> None:
    assert run("generate", "plateau", "--dtype", "f32").out == "wrote build/plateau.h\n"
    assert run("generate", "plateau", "--check").out == "1 files in build are as they would be emitted\n"
    assert run("generate", "plateau", "--prefix", "calm", "sgd").code == MISTAKE
    assert run("generate", "plateau", "--prefix", "calm").out == "wrote build/calm.h\n"
    assert "plateau_" not in (tmp_path / "build" / "calm.h").read_text()
    (tmp_path / "build" / "plateau.h").write_text("Generated by optforge.")
    assert run("generate", "plateau", "sgd", "--check").code == DIFFERENT


def test_a_rule_of_the_name_of_what_is_no_rule(run: Run, tmp_path: Path) -> None:
    (tmp_path / "plateau.py").write_text(MINE.replace("def mine", "def plateau"))
    names = ("optforge.c", "optforge.h", "plateau.c", "plateau.h")
    assert run("generate", "plateau.py:plateau").out == "".join(f"wrote build/{name}\n" for name in names)
    assert "Momentum of mine." in (tmp_path / "build" / "plateau.h").read_text()
    assert run("show", "plateau.py:plateau").code == DONE
    for others in (["plateau"], ["--all"]):
        result = run("generate", "plateau.py:plateau", *others)
        assert (result.code, result.out) == (MISTAKE, "")
        assert "two different rules are called 'plateau'; emit them one at a time, with --prefix" in result.err


@pytest.mark.parametrize("suffix", ["f32", "f64"])
def test_generate_one_dtype(run: Run, tmp_path: Path, suffix: str) -> None:
    assert run("generate", "adam", "--dtype", suffix).code == DONE
    assert (tmp_path / "build" / "adam.h").read_text() == rules.adam.generate(dtypes=[suffix])["adam.h"]


def test_generate_with_a_prefix(run: Run, tmp_path: Path) -> None:
    assert run("generate", "adam", "--prefix", "my_adam", "--target", "c", "--target", "c").code == DONE
    assert {path.name for path in (tmp_path / "build").iterdir()} == {
        *("my_adam.c", "my_adam.h"),
        *("optforge.c", "optforge.h"),  # which have their names whatever the rule's is
    }
    assert "int my_adam_step_f32(" in (tmp_path / "build" / "my_adam.h").read_text()


def test_a_rule_given_twice_counts_once(run: Run) -> None:
    assert run("generate", "adam", "adam", "--all", "mine.py:mine", "./mine.py:mine").code == DONE


def test_generate_does_not_need_a_compiler(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert run("generate", "adam").code == DONE


def test_files_get_the_usual_mode_and_keep_their_own(run: Run, tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        run("generate", "sgd")
        path = tmp_path / "build" / "sgd.c"
        assert path.stat().st_mode & 0o777 == 0o640
        path.write_text("changed")
        path.chmod(0o604)
        run("generate", "sgd")
        assert path.read_text() == rules.sgd.generate()["sgd.c"]
        assert path.stat().st_mode & 0o777 == 0o604
    finally:
        os.umask(mask)


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["lr=3e-4"], {"lr": 3e-4}),
        (["lr= 1 ", " beta =.5"], {"lr": 1.0, "beta": 0.5}),
        (["lr=1", "lr=2"], {"lr": 2.0}),
        (["lr=inf"], {"lr": float("inf")}),
        (["nesterov=False"], {"nesterov": False}),
        (["nesterov=0"], {"nesterov": False}),
        (["nesterov=NO"], {"nesterov": False}),
        (["nesterov=true"], {"nesterov": True}),
        (["mode=signed"], {"mode": "signed"}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_set(run: Run, tmp_path: Path, given: list[str], expected: dict[str, object]) -> None:
    arguments = [word for item in given for word in ("--set", item)]
    result = run("generate", "mine.py:mine", *arguments)
    assert (result.code, result.err) == (DONE, "")
    emitted = Rule.from_file("mine.py", "mine").generate(**expected)
    for name in ("mine.c", "mine.h"):
        assert (tmp_path / "build" / name).read_text() == emitted[name]


def test_set_reaches_the_emitted_defaults(run: Run, tmp_path: Path) -> None:
    run("generate", "adam", "--set", "lr=3e-4", "--set", "eps=1e-5")
    emitted = defaults((tmp_path / "build" / "adam.c").read_text())
    assert (emitted["lr"], emitted["eps"]) == (3e-4, 1e-5)
    assert "--set lr=0.0003 --set eps=1e-05" in (tmp_path / "build" / "adam.h").read_text()


def test_the_order_of_settings_does_not_matter(run: Run, tmp_path: Path) -> None:
    run("generate", "adam", "--set", "eps=1e-5", "--set", "lr=3e-4", "--out", "a")
    run("generate", "adam", "--set", "lr=3e-4", "--set", "eps=1e-5", "--out", "b")
    for name in ("adam.c", "adam.h"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_set_holds_for_the_rules_that_have_the_name(run: Run, tmp_path: Path) -> None:
    assert run("generate", "adam", "sgd", "--set", "beta1=0.25").code == DONE
    assert (tmp_path / "build" / "adam.c").read_text() == rules.adam.generate(beta1=0.25)["adam.c"]
    assert (tmp_path / "build" / "sgd.c").read_text() == rules.sgd.generate()["sgd.c"]


# ── mistakes ────────────────────────────────────────────────────────────────────────────────────────────────────────

MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    # arguments, and what the message has to say
    "unknown rule": (["adm"], ["'adm'", "did you mean 'adam'?"]),
    "unknown rule but for its case": (["adamW"], ["'adamW'", "did you mean 'adamw'?"]),
    "unknown rule, nothing near": (["zzz"], ["'zzz'", "optforge list"]),
    "one good, one unknown": (["adam", "adm"], ["'adm'"]),
    "no rule": ([], ["--all"]),
    "unknown rule in a file": (["mine.py:min"], ["mine.py", "'min'", "did you mean 'mine'?"]),
    "no such file": (["none.py:mine"], ["none.py", "no such file"]),
    "a directory": (["dir.py:mine"], ["dir.py", "directory"]),
    "a file without a rule": (["mine.py"], ["mine.py:NAME"]),
    "a file with an empty name": (["mine.py:"], ["mine.py:NAME"]),
    "a file with a wrong name": (["mine.py:a b"], ["'a b'"]),
    "another kind of file": (["rules/mine.txt:mine"], [".py"]),
    "a composition behind a rule": (["adam:clip_by_global_norm"], ["adam is a rule", "last in a composition"]),
    "a transform alone": (["clip_by_norm"], ["is a transform", "clip_by_norm:adam"]),
    "an unknown transform": (["clip_by_nrm:adam"], ["there is no transform 'clip_by_nrm'", "'clip_by_norm'"]),
    "a name that means two things": (["add_weight_decay:adamw"], ["both have 'weight_decay'"]),
    "two rules of one name": (["adam", "twin.py:adam"], ["'adam'", "--prefix"]),
    "unknown target": (["adam", "--target", "fortran"], ["'fortran'", " c"]),
    "a target without files": (["adam", "--target", "numpy"], ["'numpy'", "no files"]),
    "unknown dtype": (["adam", "--dtype", "f16"], ["'f16'", "f32", "f64"]),
    "set without value": (["adam", "--set", "lr"], ["--set lr", "NAME=VALUE"]),
    "set without name": (["adam", "--set", "=1"], ["--set =1", "NAME=VALUE"]),
    "set an unknown name": (["adam", "--set", "bta1=0.5"], ["bta1", "'adam'", "did you mean 'beta1'?"]),
    "set an unknown name, nothing near": (["sgd", "--set", "zzz=0.5"], ["zzz", "there are lr"]),
    "set an unknown name of several": (["adam", "sgd", "--set", "beta3=1"], ["beta3", "did you mean"]),
    "set no number": (["adam", "--set", "lr=fast"], ["--set lr=fast", "not a number"]),
    "set nothing": (["adam", "--set", "lr="], ["--set lr=", "not a number"]),
    "set NaN": (["adam", "--set", "lr=nan"], ["--set lr=nan", "NaN"]),
    "set beyond a double": (["adam", "--set", "lr=1e999"], ["--set lr=1e999", "range of a double"]),
    "break an assert": (["adam", "--set", "beta1=2"], ["--set", "0 <= beta1 < 1", "beta1=2.0"]),
    "break an assert by infinity": (["adam", "--set", "beta1=inf"], ["0 <= beta1 < 1", "beta1=inf"]),
    "break an assert of one of several": (["sgd", "adam", "--set", "eps=0"], ["'adam'", "eps > 0"]),
    "break an assert with a check": (["adam", "--set", "beta1=2", "--check"], ["0 <= beta1 < 1"]),
    "no truth value": (["mine.py:mine", "--set", "nesterov=2"], ["nesterov=2", "true or false"]),
    "no such choice": (["mine.py:mine", "--set", "mode=sign"], ["mode=sign", "plain or signed", "did you mean"]),
    "rounding of nothing": (["adam", "--rounding", "stochastic"], ["bf16 or f16", "store"]),
    "bundle of the runtime's name": (["adam", "--bundle", "optforge"], ["the bundle 'optforge'", "hides"]),
    "prefix of several": (["adam", "sgd", "--prefix", "x"], ["--prefix", "one rule"]),
    "prefix of all": (["--all", "--prefix", "x"], ["--prefix", "one rule"]),
    "prefix that is no identifier": (["adam", "--prefix", "my-adam"], ["'my-adam'", "identifier"]),
    "prefix that leaves the directory": (["adam", "--prefix", "../x"], ["'../x'", "identifier"]),
    "prefix that C claims": (["adam", "--prefix", "int"], ["'int'", "identifier"]),
    "empty prefix": (["adam", "--prefix", ""], ["''", "identifier"]),
    "unknown option": (["adam", "--dtpe", "f32"], ["--dtpe"]),
    "no value for an option": (["adam", "--out"], ["--out"]),
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_said_and_nothing_is_written(
    run: Run, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    (tmp_path / "dir.py").mkdir()
    (tmp_path / "twin.py").write_text(MINE.replace("def mine", "def adam"))
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "adam.c").write_text("of an earlier version")
    before = contents(tmp_path)
    result = run("generate", *arguments)
    assert (result.code, result.out) == (MISTAKE, "")
    for word in words:
        assert word in result.err
    if not result.err.startswith(("Usage:", "Error:")):  # these are of the library that reads the arguments
        assert result.err.startswith("optforge: error: ")
        assert result.err.count("\n") == 1
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generat"], ["'generat'"]),
        (["show"], ["RULE"]),
        (["show", "adam", "sgd"], ["sgd"]),
        (["show", "plateau"], ["'plateau' is no rule; `optforge generate plateau` writes plateau.h"]),
        (["show", "adam", "--set", "beta1=2"], ["0 <= beta1 < 1"]),
        (["demo", "--epochs", "0"], ["--epochs"]),
        (["demo", "--seed", "one"], ["--seed"]),
    ],
)
def test_mistakes_of_other_commands(run: Run, arguments: list[str], words: list[str]) -> None:
    result = run(*arguments)
    assert (result.code, result.out) == (MISTAKE, "")
    for word in words:
        assert word in result.err


def test_diagnostics_of_a_rule_are_plain(run: Run, tmp_path: Path) -> None:
    text = MINE.replace("beta * m + g", f"beta * m + [bold]red[/bold] + {' + '.join(['g'] * 60)}")
    text = text.replace("lr * m", "rate * m  # [bold]:smile: https://example.org")
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "two.py").write_text(text.replace("[bold]red[/bold]", "q"))
    before = contents(tmp_path)
    for file, line, words in (("mine.py", 9, "[bold]red[/bold]"), ("two.py", 14, "[bold]:smile: https://example.org")):
        with pytest.raises(RuleError) as refused:
            Rule.from_file(file, "mine")
        result = run("generate", "adam", f"{file}:mine")
        assert (result.code, result.out) == (MISTAKE, "")
        assert result.err == f"{refused.value}\n"
        assert re.search(rf"^{file}:{line}:\d+: error: ", result.err, re.MULTILINE)
        assert words in result.err
        assert len(result.err.splitlines()[1]) > 100
    assert contents(tmp_path) == before


def test_a_file_is_read_and_not_executed(run: Run, tmp_path: Path) -> None:
    effects = 'import sys\nopen("executed", "w").close()\nsys.path.append("executed")\nraise SystemExit(7)\n'
    (tmp_path / "effects.py").write_text(effects + MINE)
    paths, modules = list(sys.path), set(sys.modules)
    for arguments in (["show", "effects.py:mine"], ["generate", "effects.py:mine"]):
        assert run(*arguments).code == DONE
    assert not (tmp_path / "executed").exists()
    assert sys.path == paths
    assert not {name for name in set(sys.modules) - modules if "effects" in name}
    assert not list(tmp_path.rglob("*.pyc"))


def test_debug_shows_a_traceback(run: Run) -> None:
    assert run("generate", "adm", "--debug").err == run("--debug", "generate", "adm").err
    result = run("--debug", "generate", "adm")
    assert result.code == MISTAKE
    assert result.err.startswith("Traceback")
    assert "there is no rule 'adm'" in result.err
    assert run("generate", "adm").err.startswith("optforge: error:")  # and not for longer than that


def test_a_mistake_in_the_program_itself_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("optforge.cli.generate.select", fail)
    result = run("generate", "adam")
    assert result.code == ENVIRONMENT
    assert "KeyError: 'lost'" in result.err
    assert "optforge --debug" in result.err


# ── files of somebody else ──────────────────────────────────────────────────────────────────────────────────────────


LAYOUTS = {
    "project": (["adam", "--layout", "project"], ["CMakeLists.txt", "README.md", "bench.c", "optforge.pc.in"]),
    "python": (["adam", "--layout", "python"], ["README.md", "pyproject.toml", "setup.py", "src/adam/__init__.py"]),
}


@pytest.mark.parametrize(("arguments", "names"), LAYOUTS.values(), ids=LAYOUTS)
def test_what_was_not_emitted_is_not_replaced(run: Run, tmp_path: Path, arguments: list[str], names: list[str]) -> None:
    for name in names:
        (tmp_path / "build" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "build" / name).write_text("An engine's own, which uses optforge.\n")
    before = contents(tmp_path)
    result = run("generate", *arguments)
    assert (result.code, result.out) == (MISTAKE, "")
    assert all(f"build/{name}" in result.err for name in names)
    assert contents(tmp_path) == before
    for name in names:
        (tmp_path / "build" / name).write_text("")  # this is nobody's
    assert run("generate", *arguments).code == DONE
    # Whatever was emitted can be emitted again, also where somebody changed it.
    for path in (path for path in (tmp_path / "build").rglob("*") if path.is_file()):
        path.write_text(f"{path.read_text()}\n")
    assert "kept" not in run("generate", *arguments).out


# ── directories that cannot be written ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("out", ["file", "file/below", "file/below/that", "/proc/optforge", "full/of/adam.c"])
def test_a_directory_that_cannot_be_written(run: Run, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("mine")
    if out == "full/of/adam.c":  # a directory where a file should be
        (tmp_path / out).mkdir(parents=True)
        out = "full/of"
    elif out.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("there is no /proc here")
    before = contents(tmp_path)
    result = run("generate", "sgd", "adam", "--out", out)
    assert (result.code, result.out) == (ENVIRONMENT, "")
    assert result.err.startswith(f"optforge: error: {out} cannot be written: ")
    assert "--out" in result.err
    assert result.err.count("\n") == 1
    if out != "full/of":
        assert result.err.partition(" (")[0].count(out) == 1
    assert contents(tmp_path) == before


@pytest.mark.skipif(ROOT, reason="root may write everywhere")
def test_a_directory_without_permission(run: Run, tmp_path: Path) -> None:
    directory = tmp_path / "closed"
    directory.mkdir(mode=0o500)
    for out in ("closed", "closed/below"):
        result = run("generate", "sgd", "--out", out)
        assert result.code == ENVIRONMENT
        assert f"{out} cannot be written: " in result.err
    assert not list(directory.iterdir())


def test_what_is_up_to_date_needs_no_permission(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "build/.optforge-1234")

    run("generate", "sgd")
    monkeypatch.setattr("optforge.cli.write.workplace", refuse)
    assert run("generate", "sgd").code == DONE
    result = run("generate", "adam")
    assert result.code == ENVIRONMENT
    assert result.err.startswith("optforge: error: build cannot be written: Read-only file system (")


def failing(real: Callable[..., object], after: int, problem: BaseException) -> Callable[..., object]:
    """A function that fails once, after so many calls."""
    calls = 0

    def call(*arguments: object, **keywords: object) -> object:
        nonlocal calls
        calls += 1
        if calls == after + 1:
            raise problem
        return real(*arguments, **keywords)

    return call


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAILURES = [
    (problem, code, function, after, links)
    for x, (problem, code) in enumerate([(FULL, ENVIRONMENT), (KeyboardInterrupt(), INTERRUPTED)])
    for y, function in enumerate(["fsync", "replace"])
    for z, after in enumerate([0, 1, 3])
    for links in (True, False)
    if amount.FULL or (x + y + z) % 2 == links  # any two of them have every pair of values
]


@pytest.mark.parametrize(("problem", "code", "function", "after", "links"), FAILURES)
def test_a_failure_in_the_middle_changes_nothing(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    problem: BaseException,
    code: int,
    function: str,
    after: int,
    links: bool,
) -> None:
    (tmp_path / "build").mkdir()
    for name in ("adam.c", "sgd.h"):  # these are there in another version, adam.h and sgd.c are not
        (tmp_path / "build" / name).write_text(f"earlier {name}")
    run("generate", "rmsprop")
    before = contents(tmp_path)
    monkeypatch.setattr(os, function, failing(getattr(os, function), after, problem))
    if not links:
        monkeypatch.setattr(os, "link", failing(os.link, 0, OSError(errno.EPERM, "no links here")))
    result = run("generate", "adam", "rmsprop", "sgd")
    assert (result.code, result.out) == (code, "")
    if code == ENVIRONMENT:
        assert result.err.startswith("optforge: error: build cannot be written: No space left on device")
    # Files that were put back by a second name of them are the same; a copy is another inode with the same time.
    assert {name: (data, time) for name, (data, _, time) in contents(tmp_path).items()} == {
        name: (data, time) for name, (data, _, time) in before.items()
    }
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run("generate", "adam", "rmsprop", "sgd").out.count("wrote") == 4


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failure_leaves_no_directory_behind(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    monkeypatch.setattr(os, function, failing(getattr(os, function), 1, FULL))
    assert run("generate", "adam", "--out", "new/and/deep").code == ENVIRONMENT
    assert not (tmp_path / "new").exists()


def test_a_file_that_outgrows_its_limit(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "adam.h").write_text("earlier")
    before = contents(tmp_path)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))  # adam.h fits, adam.c does not

    process = start("generate", "adam", cwd=tmp_path, stdout=subprocess.PIPE, preexec_fn=limit)
    out, err = process.communicate()
    assert (process.returncode, out) == (ENVIRONMENT, "")
    assert err.startswith("optforge: error: build cannot be written: ")
    assert contents(tmp_path) == before


# ── check ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def emitted(run: Run, tmp_path: Path) -> Path:
    """A directory with the files of all built-in rules."""
    run("generate", "--all")
    return tmp_path / "build"


def check(run: Run, tmp_path: Path, *arguments: str) -> Result:
    """Run a check, which writes nothing."""
    before = contents(tmp_path)
    result = run("generate", *arguments, "--check")
    assert contents(tmp_path) == before
    assert result.err == ""
    return result


def test_check_finds_nothing(run: Run, tmp_path: Path, emitted: Path) -> None:
    for arguments in (["--all"], ["adam"], ["adam", "--all", "--target", "c"]):
        assert check(run, tmp_path, *arguments).code == DONE
    assert check(run, tmp_path, "adam").out == "4 files in build are as they would be emitted\n"


def test_check_shows_a_unified_diff(run: Run, tmp_path: Path, emitted: Path) -> None:
    path = emitted / "adam.c"
    text = path.read_text()
    changed = text.replace("v / one_minus", "v * one_minus", 1).replace('#include "adam.h"', '#include "adams.h"')
    assert changed != text
    path.write_text(changed)
    for arguments in (["--all"], ["adam"]):
        result = check(run, tmp_path, *arguments)
        assert result.code == DIFFERENT
        expected = difflib.unified_diff(
            changed.splitlines(), text.splitlines(), "build/adam.c", "build/adam.c as it would be emitted", lineterm=""
        )
        assert result.out == "\n".join(expected) + "\n"
    assert '\n-#include "adams.h"\n+#include "adam.h"\n' in result.out
    assert check(run, tmp_path, "sgd").code == DONE
    # What a check has found, the same command without it mends.
    run("generate", "--all")
    assert check(run, tmp_path, "--all").code == DONE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.replace(b"\n", b"\r\n"), [r"\x0d", "r"]),
        (lambda data: data[:-1], ["\\ No newline at end of file"]),
        (lambda data: data + b"\n", ["\n-\n"]),
        (lambda data: b"", ["+#ifndef adam_H"]),
        (lambda data: data.replace(b"adam", b"\xffdam", 1), ["ffdam"]),
        (lambda data: data.replace(b"adam", b"\x1b[1mdam", 1), [r"\x1b[1mdam"]),
        (lambda data: data.replace(b" ", b"\x0b", 1), [r"\x0b"]),
    ],
    ids=["carriage returns", "no last newline", "one more line", "empty", "no text", "escape", "vertical tab"],
)
def test_check_shows_differences_that_are_hard_to_see(
    run: Run, tmp_path: Path, emitted: Path, change: Callable[[bytes], bytes], words: list[str]
) -> None:
    path = emitted / "adam.h"
    path.write_bytes(change(path.read_bytes()))
    result = check(run, tmp_path, "adam")
    assert result.code == DIFFERENT
    assert result.out.startswith("--- build/adam.h\n+++ build/adam.h as it would be emitted\n@@ ")
    assert any(word in result.out for word in words)
    assert "\r" not in result.out
    assert "\x1b" not in result.out


def test_check_finds_a_missing_file(run: Run, tmp_path: Path, emitted: Path) -> None:
    (emitted / "adam.h").unlink()
    for arguments in (["--all"], ["adam"]):
        result = check(run, tmp_path, *arguments)
        assert (result.code, result.out) == (DIFFERENT, "build/adam.h is missing\n")


def test_check_of_a_directory_that_is_not_there(run: Run, tmp_path: Path) -> None:
    result = check(run, tmp_path, "--all", "--out", "nowhere")
    assert result.code == DIFFERENT
    assert result.out.count(" is missing\n") == 2 * len(rules) + 3  # plateau.h, and the runtime's two


def test_check_of_all_finds_files_of_rules_that_are_gone(run: Run, tmp_path: Path, emitted: Path) -> None:
    run("generate", "mine.py:mine")
    (emitted / "own.c").write_text("int of_the_user;\n")
    (emitted / "notes.txt").write_text("Generated by optforge.\n")
    (emitted / "directory.c").mkdir()
    result = check(run, tmp_path, "--all")
    assert result.code == DIFFERENT
    assert [line.split()[0] for line in result.out.splitlines()] == ["build/mine.c", "build/mine.h"]
    assert "remove it" in result.out
    assert check(run, tmp_path, "--all", "mine.py:mine").code == DONE
    assert check(run, tmp_path, "adam").code == DONE


def test_check_of_a_place_that_cannot_be_read(run: Run, tmp_path: Path, emitted: Path) -> None:
    (emitted / "adam.c").unlink()
    (emitted / "adam.c").mkdir()
    result = run("generate", "adam", "--check")
    assert (result.code, result.out) == (ENVIRONMENT, "")
    assert result.err == "optforge: error: build cannot be read: build/adam.c: Is a directory\n"


# ── determinism ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_run_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    arguments = ["generate", "--all", "mine.py:mine", "--set", "lr=3e-4"]
    seeds = ("0", "4294967295")
    started = [
        start(*arguments, "--out", f"out{seed}", cwd=tmp_path, environment={"PYTHONHASHSEED": seed}, stdout=-3)
        for seed in seeds
    ]
    for process in started:
        assert (process.communicate()[1], process.returncode) == ("", DONE)
    first, *others = ({p.name: p.read_bytes() for p in (tmp_path / f"out{seed}").iterdir()} for seed in seeds)
    assert len(first) == 2 * (len(rules) + 2) + 1  # of mine and the runtime as well, and plateau.h
    assert all(other == first for other in others)


# ── help ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_help_lists_the_commands(run: Run) -> None:
    result = run("--help")
    assert (result.code, result.err) == (DONE, "")
    commands = result.out.partition("Commands:")[2]
    for command in COMMANDS:
        line = next(line for line in commands.splitlines() if line.split()[:1] == [command])
        assert line.endswith(".")
        assert not line.endswith("..")
    assert all(f"{code} " in result.out for code in (DONE, DIFFERENT, MISTAKE, ENVIRONMENT, INTERRUPTED))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("list", []),
        ("show", ["RULE", "FILE.py:NAME", "--set", "NAME=VALUE"]),
        (
            "generate",
            ["RULE", "--all", "--target", "--dtype", "f32|f64", "--set", "--prefix", "--out", "build", "--check"],
        ),
        ("demo", ["--out", "--epochs", "--seed", "--kernels"]),
    ],
)
def test_help_of_a_command(run: Run, command: str, words: list[str]) -> None:
    for option in ("--help", "-h"):
        result = run(command, option)
        assert (result.code, result.err) == (DONE, "")
        assert result.out.startswith(f"Usage: optforge {command}")
        for word in words:
            assert word in result.out
        assert "\b" not in result.out


def test_help_names_every_format(run: Run) -> None:
    for command in ("show", "generate", "profile"):
        line = re.search(r"--store ARRAY=FORMAT,….*?--master", run(command, "--help").out, re.DOTALL)
        assert line is not None
        assert {*FORMATS} <= {*re.findall(r"\w+", line[0])}


def test_the_examples_of_the_help_stand_on_lines_of_their_own(run: Run) -> None:
    for command in ("show", "generate"):
        examples = run(command, "--help").out.partition("Examples:\n")[2].partition("\n\n")[0]
        assert len(examples.splitlines()) >= 2
        assert all(line.startswith("    optforge ") for line in examples.splitlines())


def test_version(run: Run) -> None:
    assert run("--version") == Result(DONE, f"optforge {__version__}\n", "")


def test_the_module_is_the_command(tmp_path: Path) -> None:
    process = start("generate", "--foo", cwd=tmp_path)
    assert process.communicate()[1].startswith("Usage: optforge generate ")
    assert process.returncode == MISTAKE


# ── demo ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def result_of(difference: int | None) -> demo.Result:
    """A result of the demo."""
    return demo.Result("adam", (1.0, 0.5), 0.9, 1e-6, difference)


def outcome_of(*differences: str) -> demo_training.Outcome:
    """An outcome of the training that is resumed."""
    return demo_training.Outcome((), (1.0,), 0.9, {"c": (), "numpy": differences})


@pytest.mark.parametrize(
    ("difference", "outcome", "code"),
    [(None, outcome_of(), DONE), (3, outcome_of(), DIFFERENT), (None, outcome_of("state m"), DIFFERENT)],
)
def test_demo(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    difference: int | None,
    outcome: demo_training.Outcome,
    code: int,
) -> None:
    given = []

    def fake(**arguments: object) -> list[demo.Result]:
        given.append(arguments)
        return [result_of(None), result_of(difference)]

    def fake_training(**arguments: object) -> demo_training.Outcome:
        given.append(arguments)
        return outcome

    monkeypatch.setattr(demo, "run", fake)
    monkeypatch.setattr(demo_training, "run", fake_training)
    assert run("demo", "--epochs", "2", "--seed", "7", "--out", "x/a.png", "--kernels", "build").code == code
    assert given == [
        {"epochs": 2, "seed": 7, "picture": Path("x/a.png"), "kernels": Path("build")},
        {"epochs": 2, "seed": 7, "picture": Path("x/a-training.png")},
    ]


@pytest.mark.parametrize("out", [".", "there", "there/..", "/", "there/x.png"])
def test_demo_into_a_directory(out: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before anything is trained."""
    (tmp_path / "there" / "x-training.png").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "run", lambda **_: pytest.fail("it trains"))
    result = run("demo", "--out", out)
    assert result.code == MISTAKE
    assert result.err.startswith("optforge: error: ")
    assert (
        f"{out} is a directory; for one in it give" in result.err or "x-training.png, the picture beside" in result.err
    )
    assert result.err.count("\n") == 1


def test_demo_without_its_packages(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("demo")
    assert (result.code, result.out) == (ENVIRONMENT, "")
    assert "pip install 'optforge[demo]'" in result.err


def test_a_warning_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(**_: object) -> list[demo.Result]:
        warnings.simplefilter("always")
        warnings.warn("the cache is full", RuntimeWarning, stacklevel=1)
        return []

    monkeypatch.setattr(demo, "run", fake)
    monkeypatch.setattr(demo_training, "run", lambda **_: outcome_of())
    shown = warnings.showwarning
    assert run("demo") == Result(DONE, "", "optforge: warning: the cache is full\n")
    assert warnings.showwarning is shown


# ── streams and signals ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["list"], DONE),
        (["show", "adam"], DONE),
        (["generate", "adam"], DONE),
        (["generate", "--all", "--check", "--out", "nowhere"], DIFFERENT),
        (["--help"], DONE),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_nobody_reads_standard_output(tmp_path: Path, arguments: list[str], code: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = start(*arguments, cwd=tmp_path, stdout=writing)
    os.close(writing)
    assert process.communicate()[1] == ""
    assert process.returncode == code
    if arguments == ["generate", "adam"]:
        assert {path.name for path in (tmp_path / "build").iterdir()} == {
            *("adam.c", "adam.h"),
            *("optforge.c", "optforge.h"),
        }


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_standard_output_is_full(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        process = start("list", cwd=tmp_path, stdout=full)
    assert process.communicate()[1] == "optforge: error: standard output cannot be written: No space left on device\n"
    assert process.returncode == ENVIRONMENT


def test_standard_output_is_closed(tmp_path: Path) -> None:
    process = start("generate", "sgd", cwd=tmp_path, preexec_fn=lambda: os.close(1))
    assert process.communicate()[1] == ""
    assert process.returncode == DONE
    assert (tmp_path / "build" / "sgd.c").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_an_interrupt_is_no_traceback(tmp_path: Path) -> None:
    """The command is at work: it waits for somebody to read the differences that it tells."""
    build = tmp_path / "build"
    writer = start("generate", "--all", cwd=tmp_path, stdout=subprocess.DEVNULL)
    assert writer.communicate() == (None, "")
    assert writer.returncode == 0
    for path in build.iterdir():
        path.write_text("")
    process = start("generate", "--all", "--check", cwd=tmp_path, stdout=subprocess.PIPE)
    waiting, before = array.array("i", [0]), -1
    while waiting[0] == 0 or waiting[0] != before:  # until the pipe is full
        assert process.poll() is None
        before = waiting[0]
        time.sleep(0.3)
        fcntl.ioctl(process.stdout, termios.FIONREAD, waiting)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, err) == (INTERRUPTED, "")
    assert "Traceback" not in out
    assert all(path.read_text() == "" for path in build.iterdir())


def test_an_interrupt_between_commands(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert cli.guarded(interrupt) == INTERRUPTED
    assert capsys.readouterr().err == ""
