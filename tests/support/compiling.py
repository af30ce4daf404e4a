"""Objects of C and C++, each compiled once for all tests of a run: the same text, flags and compiler give the same file.

Most of what tests compile is the runtime and the same few rules. Processes that have the same OPTFORGE_TEST_STORE share
them, as those of `make test` do; a process that has none makes one, for itself and for those that it starts.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from filelock import FileLock

if not os.environ.get("OPTFORGE_TEST_STORE"):
    OWN = tempfile.TemporaryDirectory(prefix="optforge-tests-")  # removed when this process ends
    os.environ["OPTFORGE_TEST_STORE"] = OWN.name
STORE = Path(os.environ["OPTFORGE_TEST_STORE"])
STORE.mkdir(parents=True, exist_ok=True)


def objects(command: Sequence[str | Path], sources: Iterable[str | Path], directory: Path) -> list[str]:
    """Object files of sources in a directory, by a compiler and its flags.

    What makes an object another is the preprocessed text, in which headers and definitions are, and the rest of the
    command.
    """
    return [str(compiled([*map(str, command)], str(source), directory)) for source in sources]


def compiled(command: Sequence[str], source: str, directory: Path) -> Path:
    """The object file of one source, which must compile."""
    # Lines that say of which file the next ones are differ from one directory to the other.
    text = re.sub(r"(?m)^# \d+ .*\n", "", run([*command, "-E", source], directory))
    rest = [word for word in command[1:] if not word.startswith("-I")]
    if not re.search(r"\bomp(_|\b)", text):  # so that OpenMP makes nothing another
        rest = [word for word in rest if word != "-fopenmp"]
    return stored(
        [shutil.which(command[0]) or command[0], *rest, text],
        lambda made: run([*command, "-c", source, "-o", str(made)], directory),
    )


def stored(identity: Sequence[str], make: Callable[[Path], object]) -> Path:
    """A file of this identity, which `make` is given a path for if there is none yet."""
    path = STORE / f"{hashlib.sha256(repr(identity).encode()).hexdigest()}.o"
    if not path.exists():
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                made = path.with_suffix(".part")
                make(made)
                made.replace(path)  # whole, or not at all
    return path


def run(command: Sequence[str], directory: Path) -> str:
    """What a command prints that must succeed."""
    answer = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, f"{shlex.join(command)}\n{answer.stderr}"
    return answer.stdout
