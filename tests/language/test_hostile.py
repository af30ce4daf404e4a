"""Hostile rule texts: refused with a diagnostic, or accepted and harmless."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from amount import some
from conftest import COMPILERS, require
from hostile_rules import ACCEPTED, REFUSED, Accepted, Refused
from native import STRICT
from optforge.cli import main
from optforge.core.diagnostics import RuleError, UsageError
from optforge.library.rule import Rule


def test_there_are_enough() -> None:
    assert len(REFUSED) >= 60


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
def test_refused(case: Refused, tmp_path: Path) -> None:
    path = tmp_path / "hostile.py"
    path.write_bytes(case.source)
    with pytest.raises((RuleError, UsageError)) as caught:
        Rule.from_file(path, case.name)
    message = str(caught.value)
    assert not case.words or any(word in message.lower() for word in case.words), message
    if isinstance(caught.value, RuleError):
        first = caught.value.diagnostics[0]
        assert message.startswith(f"{path}:{first.line}:{first.column}: error: ")
        assert case.line in (0, first.line), message
        assert len(message) < 2_000


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The C of every accepted text, a directory each."""
    directory = tmp_path_factory.mktemp("accepted")
    marker = directory / "marker"
    sources = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOSTILE_MARKER", str(marker))
        for k, case in enumerate(ACCEPTED):
            own = directory / str(k)
            own.mkdir()
            (own / "hostile.py").write_bytes(case.source)
            for name, text in Rule.from_file(own / "hostile.py", case.name).generate().items():
                (own / name).write_text(text, encoding="utf-8")
                if name.endswith(".c"):
                    sources[case.id] = own / name
    assert not marker.exists(), "a file was executed"
    return sources


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.id)
def test_accepted(case: Accepted, emitted: dict[str, Path]) -> None:
    assert emitted[case.id].stat().st_size > 0


@pytest.mark.parametrize("compiler", COMPILERS)
def test_accepted_texts_compile_without_warnings(compiler: str, emitted: dict[str, Path]) -> None:
    command = [require(compiler), *STRICT, "-fsyntax-only"]
    failures = []
    for name in some(emitted, 8):
        source = emitted[name]
        answer = subprocess.run([*command, source.name], cwd=source.parent, capture_output=True, text=True, check=False)
        if answer.returncode:
            failures.append(f"{name}: {answer.stderr[:500]}")
    assert not failures, "\n".join(failures)


def test_the_command_line_refuses_with_2_and_no_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rules.py"
    path.write_text(
        "from optforge import rule\n\n@rule\ndef bad(p, g, *, lr=0.1):\n"
        "    p -= lr * g\n    q = np.sqrt(g)\n    return p\n"
    )
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        main(["generate", f"{path}:bad", "--out", str(out)])
    assert end.value.code == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == (
        f"{path}:5:5: error: augmented assignment is not part of the language\n"
        "    p -= lr * g\n"
        "    ^^^^^^^^^^^\n"
        "hint: write p = p - …\n"
        f"{path}:6:9: error: an attribute is not part of the language\n"
        "    q = np.sqrt(g)\n"
        "        ^^^^^^^\n"
        "hint: write sqrt(…), imported from optforge\n"
    )
    assert not out.exists()
