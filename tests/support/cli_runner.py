"""The command line: in a process of its own, which begins with imports, or in this one."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

from optforge import cli
from places import GENERATOR


def optforge(*arguments: str, cwd: Path, code: int = 0) -> str:
    """What a command says, which must end with this exit code."""
    command = [sys.executable, "-P", "-m", "optforge", *arguments]
    every = {**os.environ, "PYTHONPATH": str(GENERATOR)}
    answer = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=every)
    assert answer.returncode == code, answer.stdout + answer.stderr
    return answer.stdout + answer.stderr


def optforge_here(*arguments: str, cwd: Path, code: int = 0) -> str:
    """`optforge` in this process, which is not to wait for ever."""

    def waited(*_: object) -> None:
        raise AssertionError("the command does not end")

    out, err = io.StringIO(), io.StringIO()
    ended: object = None
    before = signal.signal(signal.SIGALRM, waited) if hasattr(signal, "SIGALRM") else None
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if before is not None:
                signal.alarm(60)
            cli.main([*arguments])
        except SystemExit as end:
            ended = end.code
        finally:
            if before is not None:
                signal.alarm(0)
                signal.signal(signal.SIGALRM, before)
    assert ended == code, out.getvalue() + err.getvalue()
    return out.getvalue() + err.getvalue()
