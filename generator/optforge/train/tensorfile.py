"""Files of arrays with a header, in the safetensors format, with a checksum over every byte."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ..core.atomic import replace_file
from ..core.bounds import HEADER_BYTES
from ..core.diagnostics import EnvironmentProblem, UsageError
from ..core.functions import Array
from ..core.reading import open_regular

BLANK = "0" * 64  # stands for the checksum while it is computed
CHECKSUM = re.compile(rb'"sha256":"([0-9a-f]{64})"')
HEADER = "optforge"  # the entry of the metadata that has our header, as JSON
PIECE = 1 << 20


def write(path: str | os.PathLike[str], header: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Write a file, or leave what was there before.

    Raises
    ------
    OSError
        It cannot be written.
    UsageError
        The header is too large.
    """
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    if len(text) > HEADER_BYTES // 2:
        most = f"beside its arrays it may have {HEADER_BYTES // 2:,} bytes"
        raise UsageError(f"a checkpoint of this cannot be read again: {most}, and these are {len(text):,}")
    library()  # first of all, lest anything is written without it

    def fill(new: Path) -> None:
        safetensors = library()
        try:
            safetensors.numpy.save_file(dict(arrays), new, metadata={HEADER: text, "sha256": BLANK})
        except safetensors.SafetensorError as problem:
            code = re.search(r"os error (\d+)", str(problem))
            raise OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(str(problem)) from None
        with open(new, "r+b") as file:
            place, digest = checksum(file)
            file.seek(place)
            file.write(digest.encode())

    replace_file(path, fill)


def read(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Array]]:
    """Header and arrays of a file, whose every byte was checked.

    Raises
    ------
    OSError
        It cannot be read.
    UsageError
        It is no such file, or is damaged.
    """
    safetensors = library()
    with open_regular(path) as file:
        place, digest = checksum(file)
        file.seek(place)
        if file.read(64) != digest.encode():
            raise UsageError(f"{path} is damaged or not complete: its checksum is another")
        try:
            with safetensors.safe_open(path, "numpy") as opened:
                metadata = opened.metadata()
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
        except OSError:
            raise
        except Exception as problem:  # whatever comes of what somebody has made up
            raise UsageError(f"{path} is no checkpoint: {problem}") from None
        if identity(os.fstat(file.fileno())) != identity(os.stat(path)):
            raise UsageError(f"{path} was replaced while it was read; read it again")
    try:
        header = json.loads(metadata[HEADER])
    except (KeyError, TypeError, ValueError, RecursionError) as problem:
        raise UsageError(f"{path} is no checkpoint of optforge: its header is none ({problem})") from None
    return header, arrays


def checksum(file: IO[bytes]) -> tuple[int, str]:
    """Where a file has its checksum, and what it should be: SHA-256 over all bytes, its own digits taken as 0."""
    size = int.from_bytes(file.read(8), "little")
    if size > HEADER_BYTES and size <= os.fstat(file.fileno()).st_size:
        raise UsageError(f"{file.name} has a header of {size:,} bytes; a checkpoint has at most {HEADER_BYTES:,}")
    header = file.read(min(size, HEADER_BYTES))
    found = CHECKSUM.search(header)
    if found is None:
        raise UsageError(f"{file.name} is no checkpoint of optforge, or is damaged: it has no checksum")
    first, last = found.span(1)
    digest = hashlib.sha256(size.to_bytes(8, "little") + header[:first] + BLANK.encode() + header[last:])
    while piece := file.read(PIECE):
        digest.update(piece)
    return 8 + first, digest.hexdigest()


def identity(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file becomes another one."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def library() -> Any:
    """The package safetensors, which is imported when it is first needed."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as problem:
        raise EnvironmentProblem(f"checkpoints need the package safetensors: {problem}") from None
    return safetensors
