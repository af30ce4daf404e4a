"""Sums in one fixed order, and what is made of them: norms, means, global norms.

Element i of a tensor is in lane i mod 32.

* A leaf is 1,024 consecutive elements, 32 rows of 32. Its 32 lanes, doubles, start at +0.0 and add the rows in ascending
  order; then they fold: for h = 16, 8, 4, 2, 1, a[j] += a[j + h] for j < h. The leaf's sum is a[0].
* A chunk is 32 leaves, 32,768 elements. Its 32 leaf sums fold in the same way.
* The chunk sums of a tensor are summed as the elements of a tensor are, and so on until one value is left; and so are,
  for a reduction over several tensors, the tensors' sums, in the order of the tensors.

Elements are converted to double before they are added, or squared. An absent element counts +0.0. A sum of this kind is
never -0.0, so that adding a +0.0 that is not there changes nothing.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.floating[Any]]

LANES = 32
LEAF = 1024
CHUNK = 32768


def fold(a: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the folds of the 32 values along the last axis."""
    for h in (16, 8, 4, 2, 1):
        a = np.add(a[..., :h], a[..., h : 2 * h])
    return a[..., 0]


def chunk_sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sums of the chunks of `values`, of which there is at least one."""
    leaves, chunks = (max(1, -(-values.size // size)) for size in (LEAF, CHUNK))
    padded = np.zeros(leaves * LEAF, np.float64)
    padded[: values.size] = values
    rows = padded.reshape(leaves, LEAF // LANES, LANES)
    lanes = np.zeros((leaves, LANES), np.float64)
    for r in range(-(-min(values.size, LEAF) // LANES)):  # the rows behind are zeros in every leaf
        lanes = np.add(lanes, rows[:, r, :])
    sums = np.zeros(chunks * (CHUNK // LEAF), np.float64)
    sums[:leaves] = fold(lanes)
    return fold(sums.reshape(chunks, CHUNK // LEAF))


def tree_sum(x: ArrayLike) -> float:
    """Return the sum of the elements of `x`, in the order of the tree."""
    with np.errstate(all="ignore"):
        sums = chunk_sums(np.ravel(x).astype(np.float64))
        while sums.size > 1:
            sums = chunk_sums(sums)
    return float(sums[0])


def slow_tree_sum(x: ArrayLike) -> float:
    """Return what `tree_sum` returns, one addition at a time."""

    def slow_fold(a: list[float]) -> float:
        a = a + [0.0] * (32 - len(a))
        for h in (16, 8, 4, 2, 1):
            for j in range(h):
                a[j] += a[j + h]
        return a[0]

    def leaf_sum(elements: list[float]) -> float:
        lanes = [0.0] * 32
        for i, element in enumerate(elements):
            lanes[i % 32] += element
        return slow_fold(lanes)

    def chunk_sum(elements: list[float]) -> float:
        return slow_fold([leaf_sum(elements[i : i + 1024]) for i in range(0, len(elements), 1024)])

    with np.errstate(all="ignore"):
        values = [float(element) for element in np.ravel(x)]
    while len(values) != 1:
        if not values:
            return 0.0
        values = [chunk_sum(values[i : i + 32768]) for i in range(0, len(values), 32768)]
    return 0.0 + values[0]


def squares_sum(x: Array) -> float:
    """Return the sum of the squares, each taken in double."""
    with np.errstate(all="ignore"):
        values = np.ravel(x).astype(np.float64)
        return tree_sum(np.multiply(values, values))


def norm(x: Array) -> float:
    """Return the Euclidean norm."""
    return math.sqrt(squares_sum(x))


def sum_(x: Array) -> float:
    """Return the sum."""
    return tree_sum(x)


def mean(x: Array) -> float:
    """Return the mean, NaN of no elements."""
    return divide(tree_sum(x), float(x.size))


def max_abs(x: Array) -> float:
    """Return the largest magnitude: NaN if there is any NaN, 0.0 of no elements."""
    if np.isnan(x).any():
        return math.nan
    return float(np.max(np.abs(x), initial=0.0))


def global_norm(tensors: Iterable[Array]) -> float:
    """Return the norm of all elements of all tensors."""
    return math.sqrt(tree_sum([squares_sum(x) for x in tensors]))


def global_sum(tensors: Iterable[Array]) -> float:
    """Return the sum of all elements of all tensors."""
    return tree_sum([tree_sum(x) for x in tensors])


# Scalars that depend on a reduction have a value everywhere, so these do not raise where Python's would.


def divide(a: float, b: float) -> float:
    """Return a/b in double, infinite or NaN where b is 0."""
    with np.errstate(all="ignore"):
        return float(np.divide(np.float64(a), np.float64(b)))


def sqrt(a: float) -> float:
    """Return the square root in double, NaN below 0."""
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.float64(a)))


def minimum(a: float, b: float) -> float:
    """Return the smaller one, NaN if either is."""
    if math.isnan(a) or math.isnan(b):
        return math.nan
    return a if a < b else b
