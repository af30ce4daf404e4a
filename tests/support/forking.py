"""Processes that begin behind the imports of another, which have been done once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# Each line asks for a process, which goes on behind the loop, as the same program would that was started alone. Its
# variables are its own, and a signal ends it where it takes too long.
LOOP = """
import json as _json, os as _os, signal as _signal, sys as _sys, warnings as _warnings
for _line in _sys.stdin:
    with _warnings.catch_warnings():
        _warnings.simplefilter("ignore")
        _child = _os.fork()
    if _child == 0:
        break
    print(_os.waitstatus_to_exitcode(_os.waitpid(_child, 0)[1]), flush=True)
else:
    _sys.exit()
_asked = _json.loads(_line)
_signal.alarm(_asked["seconds"])
_os.environ.clear()
_os.environ.update(_asked["variables"])
for _number, _path in enumerate((_os.devnull, *_asked["said"])):
    _os.dup2(_os.open(_path, _os.O_RDWR | _os.O_CREAT), _number)
exec(compile(_asked["code"], "<code>", "exec"))
"""


class Forking:
    """A program, which has done its imports, and processes that go on from there.

    Parameters
    ----------
    begin : str
        What all of them begin with.
    variables : mapping of str to str
        The environment of the program, and of processes that ask for no other.
    scratch : Path
        A directory that exists.
    """

    def __init__(self, begin: str, variables: Mapping[str, str], scratch: Path, *options: str):
        self.variables, self.said = dict(variables), [str(scratch / name) for name in ("stdout", "stderr")]
        command = [sys.executable, *options, "-c", begin + LOOP]
        pipe = subprocess.PIPE
        self.program = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=self.variables, text=True)

    def __call__(
        self, code: str, variables: Mapping[str, str] | None = None, seconds: int = 120
    ) -> subprocess.CompletedProcess[str]:
        """What a process says and ends with."""
        for path in self.said:
            Path(path).unlink(missing_ok=True)
        asked = {
            "code": code,
            "variables": {**self.variables, **(variables or {})},
            "said": self.said,
            "seconds": seconds,
        }
        assert self.program.stdin is not None and self.program.stdout is not None
        self.program.stdin.write(json.dumps(asked) + "\n")
        self.program.stdin.flush()
        status = int(self.program.stdout.readline() or "1")
        said = [Path(path).read_text(encoding="utf-8") if os.path.exists(path) else "" for path in self.said]
        return subprocess.CompletedProcess(code, status, *said)

    def end(self) -> None:
        """End the program."""
        self.program.communicate()
