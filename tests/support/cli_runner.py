"""The command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from places import GENERATOR


def optforge(*arguments: str, cwd: Path, code: int = 0) -> str:
    """What a command says, which must end with this exit code."""
    command = [sys.executable, "-P", "-m", "optforge", *arguments]
    every = {**os.environ, "PYTHONPATH": str(GENERATOR)}
    answer = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=every)
    assert answer.returncode == code, answer.stdout + answer.stderr
    return answer.stdout + answer.stderr
