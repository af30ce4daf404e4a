"""The conversions of the runtime, which are inside it, as compilers make them."""

from __future__ import annotations

import ctypes
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from compiling import objects, run
from conftest import require
from embedding import SOURCES
from native import STRICT, instruction_sets
from optforge.emit import layout

LOAD, NEAREST, STOCHASTIC = range(3)
BF16, F16, SPLIT = range(3)
COLUMNS = {"bf16": BF16, "f16": F16}
BLOCKS = ("q8", "uq8")
SETS = [k for k, available in enumerate(instruction_sets().values()) if available]
KEY = (2**64 - 3, 11, 2**40 + 5, 3, 0)  # the seed, t, the stream, the array, and the first element
BUILT = tempfile.TemporaryDirectory(prefix="optforge-convert-")


class Conversions:
    """The table of conversions of a compiled runtime."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.split_faults.restype = self.library.block_faults.restype = ctypes.c_uint64

    def convert(self, row: int, column: int, set: int, stored: Any, wide: Any, low: Any = None, key: Any = KEY) -> None:
        """Convert in place: `wide` from `stored` by row 0, the other way by the other rows."""
        own = (ctypes.c_uint64 * 5)(*key)
        arrays = [None if a is None else ctypes.c_void_p(a.ctypes.data) for a in (stored, low, wide)]
        self.library.convert(row, column, set, *arrays, ctypes.c_size_t(wide.size), own)

    def load(self, name: str, set: int, stored: Any) -> Any:
        """What 16-bit numbers are."""
        wide = np.empty(stored.size, np.float32)
        self.convert(LOAD, COLUMNS[name], set, stored, wide)
        return wide

    def store(self, name: str, set: int, wide: Any, row: int = NEAREST, key: Any = KEY) -> Any:
        """Floats as 16-bit numbers."""
        stored = np.empty(wide.size, np.uint16)
        self.convert(row, COLUMNS[name], set, stored, wide, key=key)
        return stored

    def load_blocks(self, name: str, set: int, codes: Any, scales: Any) -> Any:
        """What codes of 8 bits are."""
        wide = np.full(-(-codes.size // 256) * 256, np.nan, np.float32)  # the runtime has room for all of a block
        self.blocks(LOAD, name, set, codes, scales, wide, codes.size)
        return wide[: codes.size]

    def store_blocks(self, name: str, set: int, values: Any) -> tuple[Any, Any]:
        """Floats as codes, and their scales."""
        count = -(-values.size // 256)
        wide, codes, scales = (
            np.full(256 * count, np.nan, np.float32),
            np.empty_like(values, np.uint8),
            np.empty(count, "f"),
        )
        wide[: values.size] = values
        self.blocks(NEAREST, name, set, codes, scales, wide, values.size)
        return codes, scales

    def blocks(self, row: int, name: str, set: int, codes: Any, scales: Any, wide: Any, n: int) -> None:
        """Convert in place, as `convert`."""
        arrays = [ctypes.c_void_p(a.ctypes.data) for a in (codes, scales, wide)]
        self.library.convert_blocks(row, BLOCKS.index(name), set, *arrays, ctypes.c_size_t(n))

    def block_faults(self, name: str, set: int, first: int, stride: int) -> int:
        """How many of every stride-th float have not the code that is nearest."""
        own = (ctypes.c_int(BLOCKS.index(name)), set, ctypes.c_uint32(first), ctypes.c_uint32(stride))
        return int(self.library.block_faults(*own))

    def split_faults(self, set: int, first: int, stride: int) -> int:
        """How many of every stride-th float are not what they were."""
        return int(self.library.split_faults(set, ctypes.c_uint64(first), ctypes.c_uint64(stride)))

    def draws(self, key: Any, n: int) -> Any:
        """The random bits of n elements."""
        drawn = np.empty(n, np.uint32)
        own = (ctypes.c_uint64 * 5)(*key)
        self.library.draws(ctypes.c_void_p(drawn.ctypes.data), ctypes.c_size_t(n), own)
        return drawn


@cache
def build(compiler: str, flags: str) -> Conversions:
    """The runtime as a compiler makes it, any warning an error."""
    require(compiler)
    directory = Path(tempfile.mkdtemp(dir=BUILT.name))
    for name, text in layout.runtime().items():
        (directory / name).write_text(text, encoding="utf-8")
    (directory / "convert.c").write_text((SOURCES / "convert.c").read_text(encoding="utf-8"), encoding="utf-8")
    made = objects([compiler, *STRICT, *flags.split(), "-fPIC"], ["convert.c"], directory)
    run([compiler, "-shared", *made, "-o", "convert.so", "-lm"], directory)
    return Conversions(directory / "convert.so")
