"""The summation tree: totals in one fixed order, so that they have the same bits however the work is split.

Element i of a tensor is in lane i mod 32. A leaf is 1,024 elements: 32 doubles start at +0.0 and each adds the
elements of its lane in ascending order; then the upper half of the lanes is added to the lower half until one is left.
A chunk is 32 leaves, whose sums fold alike. The sums of the chunks go through the same tree, and so do those of the
tensors.

A value passes through at most 31 additions in its lane and 5 folds in each leaf, and 5 folds in each chunk: for up to
2^45 elements that is 41 + 41 + 41 roundings, so that a sum of squares is off by at most 124 half units in the last
place (1.4e-14), and usually by less than one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

LANES, LEAF, CHUNK = 32, 1024, 32768
SLAB = 64 * CHUNK  # elements that are widened to doubles at a time


def tensor_total(x: Array, kind: str) -> float:
    """The total of one tensor.

    Parameters
    ----------
    x : array
        Of any dtype; its elements are converted to double first.
    kind : str
        "squares" (of the doubles), "sum", or "max" (of the absolute values, NaN if one is).
    """
    flat = x.reshape(-1)
    sums = np.empty(-(-flat.size // CHUNK))
    with np.errstate(all="ignore"):
        for start in range(0, flat.size, SLAB):
            values = flat[start : start + SLAB].astype(np.float64)
            if kind == "squares":
                values *= values
            elif kind == "max":
                np.abs(values, out=values)
            part = chunk_sums(values, kind)
            sums[start // CHUNK : start // CHUNK + part.size] = part
        return total(sums, kind)


def total(sums: Iterable[float] | Array, kind: str) -> float:
    """The total of sums, which are of the chunks of a tensor or of tensors."""
    left = np.asarray(sums, np.float64)
    with np.errstate(all="ignore"):
        while left.size > 1:
            left = chunk_sums(left, kind)
    return float(left[0]) if left.size else 0.0


def chunk_sums(values: Array, kind: str) -> Array:
    """The sums of the chunks of doubles."""
    combine = np.maximum if kind == "max" else np.add
    chunks = -(-values.size // CHUNK)
    leaves = -(-values.size // LEAF)
    padded = np.zeros(leaves * LEAF)
    padded[: values.size] = values
    rows = padded.reshape(leaves, LEAF // LANES, LANES)
    lanes = np.zeros((leaves, LANES))
    for row in range(-(-min(values.size, LEAF) // LANES)):  # behind the last value there are zeros, which add nothing
        combine(lanes, rows[:, row], out=lanes)
    leaf_sums = np.zeros((chunks, LANES))
    leaf_sums.reshape(-1)[:leaves] = fold(lanes, combine)
    return fold(leaf_sums, combine)


def fold(lanes: Array, combine: Any) -> Array:
    """The lanes of each row as one, the upper half on the lower half again and again."""
    half = LANES // 2
    while half:
        lanes = combine(lanes[:, :half], lanes[:, half : 2 * half])
        half //= 2
    return lanes[:, 0]
