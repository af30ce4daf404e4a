"""Colour: on a terminal alone, and never another text."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from optforge import cli
from optforge.cli import colour

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
WRONG = "from optforge import rule\n\n\n@rule\ndef wrong(p, g, *, lr=0.1):\n    p -= lr * g\n    return p\n"


def run(*arguments: str, cwd: Path) -> str:
    """What a command says on a terminal."""
    own = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "optforge", *arguments],
        cwd=cwd,
        env={**own, "TERM": "xterm"},
        stdin=follower,
        stdout=follower,
        stderr=follower,
    ):
        os.close(follower)
        said = b""
        with contextlib.suppress(OSError):  # which ends it: nobody has the terminal any more
            while piece := os.read(leader, 65536):
                said += piece
    os.close(leader)
    return said.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("name", ["adam", "wrong.py:wrong"])
def test_a_terminal_shows_the_same_text_in_colour(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with pytest.raises(SystemExit):
        cli.main(["show", name])
    plain = "".join(capsys.readouterr())
    assert "\x1b" not in plain
    shown = run("show", name, cwd=tmp_path)
    assert "\x1b[" in shown
    assert ESCAPE.sub("", shown) == plain


def test_what_a_terminal_and_the_environment_say(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = pty.openpty()
    with open(leader, "rb"), open(follower, "w") as terminal:
        assert colour.shown(terminal)
        monkeypatch.setenv("TERM", "dumb")
        assert not colour.shown(terminal)
        monkeypatch.setenv("FORCE_COLOR", "1")
        assert colour.shown(terminal)
        monkeypatch.setenv("NO_COLOR", "1")
        assert not colour.shown(terminal)


@pytest.mark.parametrize("arguments", [("list", "--json"), ("show", "sgd", "--json"), ("show", "sgd", "--c")])
def test_json_and_c_have_no_colour(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with pytest.raises(SystemExit):
        cli.main([*arguments])
    assert "\x1b" not in capsys.readouterr().out


def test_a_table_has_headings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with pytest.raises(SystemExit):
        cli.main(["list"])
    out = capsys.readouterr().out
    assert out.startswith("\x1b[1mRULE ")
    assert "\n\x1b[36madam\x1b[0m " in out


def test_a_diagnostic() -> None:
    text = "my.py:6:5: error: this error: is one\n    p -= g\n    ^^^^^^\nhint: write p = p - …"
    shown = colour.message(text)
    assert ESCAPE.sub("", shown) == text
    assert shown.count("\x1b[1;31merror:") == 1
    assert "\x1b[32m    ^^^^^^\x1b[0m" in shown
    assert "\x1b[36mhint:\x1b[0m write" in shown


def test_a_difference() -> None:
    text = "--- build/a.c\n+++ emitted\n@@ -1 +1 @@\n-old\n+new\n same"
    shown = colour.difference(text)
    assert ESCAPE.sub("", shown) == text
    assert "\x1b[31m-old\x1b[0m\n\x1b[32m+new\x1b[0m\n same" in shown
    assert shown.startswith("\x1b[1m--- build/a.c\x1b[0m")


def test_a_stream_that_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with (tmp_path / "file").open("w") as stream:
        assert not colour.shown(stream)
    assert not colour.shown(stream)
    assert not colour.shown(None)
