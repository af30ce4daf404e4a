"""Test data: sizes, values and placements that tell kernels apart, and comparison of bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES = (np.float32, np.float64)
SIZES = (*range(258), 1000, 1023, 1024, 1025, 4097)
GUARD = 16  # elements on either side of a buffer that nobody may touch


def bits(array: Any) -> bytes:
    """The bits of an array, all NaN alike."""
    own = np.ascontiguousarray(array)
    own = np.where(np.isnan(own), np.asarray(np.nan, own.dtype), own)
    return own.tobytes()


def same(a: Any, b: Any) -> bool:
    """Whether two arrays agree in dtype, shape and every bit, NaN equal to NaN."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def gradients(rng: np.random.Generator, size: int, dtype: Any) -> Array:
    """Gradients over many magnitudes, most of them where eps matters (near its root)."""
    scale = rng.choice([1e-6, 1e-4, 1e-3, 1e-2, 1.0, 30.0], size=size)
    return (rng.standard_normal(size) * scale).astype(dtype)


def special(dtype: Any) -> Array:
    """Values at the edges of a dtype."""
    info = np.finfo(dtype)
    tiny = float(info.smallest_subnormal)
    edges = [0.0, tiny, 3 * tiny, float(info.tiny), 1.0, 1e-20, 1e18, float(info.max) / 2, float(info.max), np.inf]
    return np.array([*edges, *(-x for x in edges), np.nan], dtype)


def special_pairs(dtype: Any) -> tuple[Array, Array]:
    """Every special parameter with every special gradient."""
    values = special(dtype)
    p, g = np.meshgrid(values, values)
    return p.ravel().copy(), g.ravel().copy()


class Guarded:
    """Arrays in one buffer at odd offsets, with guard elements between them."""

    def __init__(self, sizes: Iterable[int], dtype: Any, offset: int = 0):
        self.spans = []
        position = GUARD + offset
        for size in sizes:
            self.spans.append((position, position + size))
            position += size + GUARD + 1
        self.buffer = np.full(position + GUARD, -12345.678, dtype)
        self.arrays = [self.buffer[start:end] for start, end in self.spans]
        self.inside = np.zeros(self.buffer.shape, bool)
        for start, end in self.spans:
            self.inside[start:end] = True
        self.before = self.buffer[~self.inside].copy()

    def intact(self) -> bool:
        """Whether no element between the arrays was written."""
        return self.buffer[~self.inside].tobytes() == self.before.tobytes()
