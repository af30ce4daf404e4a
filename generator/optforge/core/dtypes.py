"""The element types: one row each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DType:
    """An element type of arrays and how the targets spell it.

    `suffix` ends the names of emitted functions, `c` is the type, `math` ends the names of the functions of
    <math.h>, `literal` ends a constant and `huge` is an infinite one.
    """

    suffix: str
    numpy: type[np.floating]
    c: str
    math: str
    literal: str
    huge: str

    @property
    def bytes(self) -> int:
        """Size of one element."""
        return np.dtype(self.numpy).itemsize

    def constant(self, value: float) -> str:
        """The shortest literal that gives this value rounded to the type."""
        with np.errstate(over="ignore"):
            rounded = self.numpy(value)
        if np.isinf(rounded):
            return f"-{self.huge}" if rounded < 0 else self.huge
        mantissa, e, exponent = str(rounded).partition("e")
        if e:
            return f"{mantissa}e{int(exponent)}{self.literal}"
        return f"{mantissa}{'' if '.' in mantissa else '.0'}{self.literal}"


F32 = DType("f32", np.float32, "float", "f", "f", "HUGE_VALF")
F64 = DType("f64", np.float64, "double", "", "", "HUGE_VAL")

DTYPES: dict[str, DType] = {dtype.suffix: dtype for dtype in (F32, F64)}
BY_NUMPY: dict[np.dtype[np.floating], DType] = {np.dtype(dtype.numpy): dtype for dtype in DTYPES.values()}
