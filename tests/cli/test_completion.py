"""Completion: what is offered, and that bash puts it where it belongs."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optforge import rules, transforms
from optforge.cli import completion
from places import GENERATOR

FILE = """
from optforge import rule, transform


@rule
def first(p, g, *, lr=0.1):
    p = p - lr * g
    return p


@transform
def second(g):
    g = -g
    return g


def helper():
    open("executed", "w")


helper()
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a rule file, another directory and something else, which is the current one."""
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "broken.py").write_text("def")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(completion.BEFORE, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("begun", "offered"),
    [
        ("", [*rules, *(f"{name}:" for name in transforms), "mine.py:", "more/"]),
        ("adam", ["adam", "adamw"]),
        ("clip_by_", ["clip_by_global_norm:", "clip_by_norm:", "clip_by_value:"]),
        ("mi", ["mine.py:first", "mine.py:second"]),  # what is offered alone would get a space behind it
        ("mor", ["more/broken.py:"]),
        ("clip_by_norm:n", ["clip_by_norm:nesterov", "clip_by_norm:novograd"]),
        ("mine.py:", ["mine.py:first", "mine.py:second"]),
        ("clip_by_norm:mine.py:f", ["clip_by_norm:mine.py:first"]),
        ("./m", ["./mine.py:", "./more/"]),
        ("more/", ["more/broken.py:"]),
        ("more/broken.py:", []),
        ("nowhere.py:", []),
        ("nowhere/x", []),
        (".h", [".hidden/"]),
    ],
)
def test_what_is_offered(begun: str, offered: list[str], directory: Path) -> None:
    assert completion.names(begun) == offered
    assert not (directory / "executed").exists()


@pytest.mark.parametrize(
    ("words", "at", "joined", "before"),
    [
        (["optforge", "show", "ad"], 2, ["optforge", "show", "ad"], ""),
        (["optforge", "show", "clip_by_norm", ":", "ad"], 4, ["optforge", "show", "ad"], "clip_by_norm:"),
        (["optforge", "show", "clip_by_norm", ":"], 3, ["optforge", "show", ""], "clip_by_norm:"),
        (["optforge", "generate", "a", ":", "b", "--out", "x"], 6, ["optforge", "generate", "a:b", "--out", "x"], ""),
        (
            ["optforge", "show", "adam", "--set", "lr", "=", "1", ""],
            7,
            ["optforge", "show", "adam", "--set", "lr=1", ""],
            "",
        ),
        (["optforge", "show"], 2, ["optforge", "show", ""], ""),
    ],
)
def test_words_of_bash(words: list[str], at: int, joined: list[str], before: str) -> None:
    environment = {completion.ASKED: "complete_bash", "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(at)}
    completion.prepare(environment)
    assert environment["COMP_WORDS"].split("\n") == joined
    assert environment["COMP_CWORD"] == str(len(joined) - 1)
    assert environment[completion.BEFORE] == before


def test_other_shells_are_left_alone() -> None:
    for shell in ("complete_zsh", "complete_fish", ""):
        environment = {completion.ASKED: shell, "COMP_WORDS": "a\n:\nb", "COMP_CWORD": "2"}
        before = dict(environment)
        completion.prepare(environment)
        assert environment == before


@pytest.fixture
def command(directory: Path) -> dict[str, str]:
    """An environment in which `optforge` is a command."""
    (directory / "bin").mkdir()
    (directory / "bin" / "optforge").write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m optforge "$@"\n')
    (directory / "bin" / "optforge").chmod(0o755)
    own = {**os.environ, "PYTHONPATH": str(GENERATOR), "HOME": str(directory / "home")}
    return own | {"PATH": f"{directory / 'bin'}:{os.environ['PATH']}", "TERM": "dumb"}


def complete(leader: int, typed: str, wanted: str) -> str:
    """Type, press TAB, and give what then stands on the line."""
    os.write(leader, f"{typed}\t".encode())
    said, end = "", time.monotonic() + 30
    while wanted not in said and time.monotonic() < end:
        if select.select([leader], [], [], 0.2)[0]:
            said += os.read(leader, 4096).decode()
    os.write(leader, b"\x15")  # forget the line
    return said


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_install_and_complete_in_bash(directory: Path, command: dict[str, str]) -> None:
    home = directory / "home"
    home.mkdir()
    (home / ".bashrc").write_text("PS1='$ '\n")
    install = ["bash", "--norc", "-c", "optforge --install-completion; true"]
    told = subprocess.run(install, env=command, capture_output=True, text=True, check=False)
    assert "bash completion installed" in told.stdout, told.stdout + told.stderr
    leader, follower = pty.openpty()
    with subprocess.Popen(
        ["bash", "-i"], env=command, stdin=follower, stdout=follower, stderr=follower, start_new_session=True
    ) as shell:
        os.close(follower)
        try:
            for typed, wanted in (
                ("optforge gen", "optforge generate "),
                ("optforge show clip_by_norm:rms", "clip_by_norm:rmsprop "),
                ("optforge generate sgd mine.py:fi", "mine.py:first "),
                ("optforge generate sgd --layout py", "--layout python "),
            ):
                assert wanted in complete(leader, typed, wanted)
        finally:
            shell.kill()
    os.close(leader)


def test_the_script_of_another_shell(command: dict[str, str]) -> None:
    own = {**command, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = subprocess.run(
        ["optforge", "--show-completion", "zsh"], env=own, capture_output=True, text=True, check=True
    )
    assert "compdef" in shown.stdout
    assert re.search(r"_OPTFORGE_COMPLETE=complete_zsh", shown.stdout)
