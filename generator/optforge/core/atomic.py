"""Replace a file so that there is always a complete one: the old one, or the new one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

ENDING = ".saving"  # of the directories that new files are written in
LONGEST_NAME = 255  # bytes
HELD = "/proc/self/fd/"  # where the system shows open directories
MOST_LINKS = 40  # symbolic links on the way to a file
HOLDING = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a directory, nothing else
TOKEN = 16  # bytes that tell the directories for one file apart, written as two digits each


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
    try:
        target = followed(path)
        with room(target) as (directory, _):
            new = directory / target.name
            # It is ours before anything is written to it, with the permissions of new files.
            handle = os.open(new, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY, 0o666)
            mode = os.fstat(handle).st_mode
            os.close(handle)
            write(new)
            os.chmod(new, stat.S_IMODE(target.stat().st_mode if target.is_file() else mode))
            synchronise(new)
            os.replace(new, target)
        synchronise(target.parent)
    except OSError as problem:
        reason = f"{problem.strerror or problem}; what was there before is as it was"
        raise OSError(problem.errno, reason, str(path)) from None


@contextlib.contextmanager
def room(target: Path) -> Iterator[tuple[Path, int]]:
    """A directory beside a file to write in, which is removed behind it, and the handle that holds it."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a directory")
    with workplace(target.parent, beginning(target), ENDING) as held:
        yield held


@contextlib.contextmanager
def workplace(parent: Path, first: str, last: str = "") -> Iterator[tuple[Path, int]]:
    """A directory of one's own in another one, which is removed behind it, and the handle that holds it.

    Its name begins with `first` and ends with `last`; what killed processes left under such names is removed. A lock on
    it tells others, as long as this process lives, that it is in use. Nobody else can write to it; where the system
    shows open directories in /proc, its path stays right if another user moves it away.
    """
    discard(parent, first, last)
    while True:
        directory = parent / f"{first}{secrets.token_hex(TOKEN)}{last}"
        try:
            directory.mkdir(mode=0o700)
            lock = os.open(directory, HOLDING)
        except (FileExistsError, FileNotFoundError):  # another process took it for a stale one
            if not parent.is_dir():
                raise
            continue
        try:
            status = os.fstat(lock)
            if status.st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "another user has put a directory into its place", str(directory))
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not directory.exists():  # likewise, before it was locked
                continue
            shown = Path(f"{HELD}{lock}")
            try:
                yield shown if shown.exists() and os.path.samestat(shown.stat(), status) else directory, lock
            finally:
                shutil.rmtree(directory, ignore_errors=True)
            return
        finally:
            os.close(lock)


def followed(path: str | os.PathLike[str]) -> Path:
    """Where a file is in the end.

    Raises
    ------
    OSError
        On the way there is a symbolic link that another user has put into a directory that all can write to.
    """
    place, links = Path(os.getcwd()), 0
    left = list(reversed(Path(path).parts))
    while left:
        part = left.pop()
        here = place / part  # a part that is the root begins anew
        try:
            status = here.lstat()
        except FileNotFoundError:
            status = None
        if status is None or not stat.S_ISLNK(status.st_mode):
            place = place.parent if part == ".." else here
            continue
        around = place.stat()
        if around.st_mode & stat.S_IWOTH and status.st_uid not in (os.geteuid(), around.st_uid):
            message = "it is a symbolic link that another user has put into a directory that all can write to"
            raise PermissionError(errno.EPERM, message, str(here))
        links += 1
        if links > MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        left += reversed(Path(os.readlink(here)).parts)
    return place


def beginning(target: Path) -> str:
    """What the names of the directories for a file begin with."""
    name = os.fsencode(target.name)
    fits = len(name) + len("..") + 2 * TOKEN + len(ENDING) <= LONGEST_NAME
    return f".{target.name if fits else hashlib.sha256(name).hexdigest()}."


def discard(parent: Path, first: str, last: str = "") -> None:
    """Remove the directories of one's own that killed processes left in another one."""
    ours = re.compile(f"{re.escape(first)}[0-9a-z_]{{8,32}}{re.escape(last)}")
    for directory in parent.glob(f"{glob.escape(first)}*{glob.escape(last)}"):
        if not ours.fullmatch(directory.name):
            continue
        with contextlib.suppress(OSError):  # it is in use, or not ours to remove
            lock = os.open(directory, HOLDING)
            try:
                if os.fstat(lock).st_uid == os.geteuid():
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
