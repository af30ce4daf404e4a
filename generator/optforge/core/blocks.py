"""Numbers of 8 bits, in blocks of 256 that share a scale, as bitsandbytes has them.

A code is the place of a number in a table of 256, which ascend; what is stored is that number times the largest
magnitude of the block. Dettmers, Lewis, Shleifer and Zettlemoyer, "8-bit Optimizers via Block-wise Quantization",
ICLR 2022.
"""

from __future__ import annotations

import functools

import numpy as np

from .functions import Array

BLOCK = 256  # elements that share a scale
SCALES = "_absmax"  # ends the name of the array of the scales of an array


def blocks(n: int) -> int:
    """How many scales n elements have."""
    return -(-n // BLOCK)


@functools.cache
def table(signed: bool) -> Array:
    """The 256 numbers: 0, 1, and the middles of equal parts of each decade from 1e-7 to 1, twice as many in each next.

    Signed, the lowest decade has one part, else two; and all but 1 have a sign. The edges of the parts are rounded
    once, as `torch.linspace` rounds them.
    """
    found = [0.0, 1.0]
    for decade in range(7):
        parts = 2 ** (decade + (not signed))
        k, low = np.arange(parts + 1), float(np.float32(0.1))
        step = float((np.float32(1) - np.float32(0.1)) / np.float32(parts))
        edges = np.where(k < (parts + 1) // 2, low + step * k, 1 - step * (parts - k)).astype(np.float32)
        middles = np.float32(10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        found += [*middles.tolist(), *((-middles).tolist() if signed else [])]
    return np.array(sorted(found), np.float32)


@functools.cache
def bounds(signed: bool) -> Array:
    """Of each code but the last, the largest float that is no nearer to the next number."""
    numbers = table(signed).astype(np.float64)
    middles = (numbers[:-1] + numbers[1:]) / 2
    rounded = middles.astype(np.float32)
    below: Array = np.nextafter(rounded, np.float32(-2))
    return np.where(rounded > middles, below, rounded)


def load(codes: Array, scales: Array, signed: bool) -> Array:
    """The floats that are stored as codes and the scales of their blocks."""
    with np.errstate(all="ignore"):
        loaded: Array = table(signed)[codes.view(np.uint8)] * np.repeat(scales, BLOCK)[: codes.size]
    return loaded


def store(values: Array, signed: bool) -> tuple[Array, Array]:
    """Floats as codes and the scales of their blocks: to the nearest number, from a middle to the lower one.

    Where all of a block are 0 so is its scale. A NaN or an infinity makes all of its block NaN. Without a sign what is
    below 0 is stored as 0.
    """
    values = np.ascontiguousarray(values, np.float32).reshape(-1)
    padded = np.zeros((blocks(values.size), BLOCK), np.float32)
    padded.reshape(-1)[: values.size] = values
    broken = ~np.isfinite(padded).all(axis=1, keepdims=True)
    padded = np.where(broken | (not signed) & (padded < 0), np.float32(0), padded)
    scales = np.abs(padded).max(axis=1, keepdims=True)
    codes = np.searchsorted(bounds(signed), padded / np.where(scales == 0, np.float32(1), scales))
    kind = np.int8 if signed else np.uint8
    return (
        codes.astype(np.uint8).view(kind).reshape(-1)[: values.size].copy(),
        np.where(broken, np.float32(np.nan), scales).reshape(-1),
    )
