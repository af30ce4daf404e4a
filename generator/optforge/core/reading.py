"""Read a file that others may have put there: a regular one, without waiting, and no more than a bound."""

from __future__ import annotations

import errno
import os
import stat
from typing import IO

# Of a pipe or a terminal that took the file's place a moment ago: it neither waits for one nor becomes one's own.
CAREFULLY = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_CLOEXEC", 0)


class NotRegular(OSError):
    """There is something, and it is no regular file."""


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """A regular file, open to be read.

    Raises
    ------
    NotRegular
        It is a pipe, a device, a socket.
    OSError
        It is not there, is a directory, or cannot be read.
    """
    check_regular(os.stat(path), path)  # to open some devices does something
    file = open(path, "rb", opener=lambda name, _: os.open(name, CAREFULLY))  # noqa: SIM115 - it is given to the caller
    try:
        check_regular(os.fstat(file.fileno()), path)
    except BaseException:
        file.close()
        raise
    return file


def check_regular(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    """Raise where something is no regular file."""
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(status.st_mode):
        raise NotRegular(errno.EINVAL, "it is no regular file", os.fspath(path))


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """What a regular file holds.

    Raises
    ------
    OSError
        As of `open_regular`; or it has more than `most` bytes, with EFBIG.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", os.fspath(path))
    return data
