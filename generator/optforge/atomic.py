"""Replace a file so that there is always a complete one: the old one, or the new one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

ENDING = ".saving"  # of the directories that new files are written in
LONGEST_NAME = 255  # bytes
TOKEN = 4  # bytes that tell the directories for one file apart, written as two digits each


def replace_file(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Have a new file written beside one, and put it in its place when it is complete and on the disk.

    A process that is killed on the way leaves what it wrote in a directory `.NAME.….saving` (with a checksum for a name
    that would be too long), which the next call for the same file removes.

    Parameters
    ----------
    path : path
        The file, which may be there or not; its permissions stay. Of a symbolic link, what it points to.
    write : callable
        Writes the file that it is given the path of.

    Raises
    ------
    OSError
        It cannot be written; the file is as it was.
    """
    target = Path(os.path.realpath(path))
    try:
        with room(target) as (directory, mode):
            new = directory / target.name
            write(new)
            os.chmod(new, stat.S_IMODE(target.stat().st_mode) if target.is_file() else mode)
            synchronise(new)
            os.replace(new, target)
        synchronise(target.parent)
    except OSError as problem:
        reason = f"{problem.strerror or problem}; what was there before is as it was"
        raise OSError(problem.errno, reason, str(path)) from None


@contextlib.contextmanager
def room(target: Path) -> Iterator[tuple[Path, int]]:
    """A directory beside a file to write in, which is removed behind it, and the permissions of new files.

    A lock on it tells others, as long as this process lives, that it is in use.
    """
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a directory")
    discard(target)
    while True:
        directory = target.parent / f"{beginning(target)}{secrets.token_hex(TOKEN)}{ENDING}"
        directory.mkdir()
        try:
            lock = os.open(directory, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for a stale one
            continue
        try:
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not directory.exists():  # likewise, before it was locked
                continue
            try:
                yield directory, directory.stat().st_mode & 0o666
            finally:
                shutil.rmtree(directory, ignore_errors=True)
            return
        finally:
            os.close(lock)


def beginning(target: Path) -> str:
    """What the names of the directories for a file begin with."""
    name = os.fsencode(target.name)
    fits = len(name) + len("..") + 2 * TOKEN + len(ENDING) <= LONGEST_NAME
    return f".{target.name if fits else hashlib.sha256(name).hexdigest()}."


def discard(target: Path) -> None:
    """Remove what killed processes left beside a file."""
    for directory in target.parent.glob(f"{glob.escape(beginning(target))}*{ENDING}"):
        with contextlib.suppress(OSError):  # it is in use, or not ours to remove
            lock = os.open(directory, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory)
            finally:
                os.close(lock)


def synchronise(path: Path) -> None:
    """Wait until a file, or what a directory lists, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
