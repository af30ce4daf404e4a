"""Memory for state: one block, on huge pages where the system offers them, its arrays apart from the parameters'."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.blocks import blocks
from ..core.functions import Array
from .arrays import address

PAGE, LINE = 4096, 64
SMALL = 1 << 16  # bytes of an array up to which all of a step's arrays fit into a cache, where they lie close together
HUGE = 1 << 22  # bytes of all arrays from which huge pages are asked for


class Scales(np.float32):
    """What stands for the dtype of an array with one float for each block of elements."""


def size_of(parameter: Any, dtype: Any) -> int:
    """The elements of an array beside a parameter."""
    return blocks(parameter.size) if dtype is Scales else int(parameter.size)


def allocate(parameters: Sequence[Array], dtypes: Sequence[Sequence[Any]]) -> list[list[Array]]:
    """Zeroed arrays of as many elements as the parameters, of these dtypes for each, or of these Scales.

    Arrays at the same offset of a 4 KiB page get into each other's way, so those of one parameter are staggered from
    it: by an even share of the page, one share being left for the gradient, which mostly lies as the parameter does.
    """
    position, places = 0, []
    for parameter, wanted in zip(parameters, dtypes, strict=True):
        share = PAGE // (len(wanted) + 2) // LINE * LINE
        for k, dtype in enumerate(wanted):
            position += -position % LINE
            if parameter.nbytes > SMALL:
                position += (address(parameter) // LINE * LINE + (k + 2) * share - position) % PAGE
            places.append(position)
            position += size_of(parameter, dtype) * np.dtype(dtype).itemsize
    block, begins = memory(position), iter(places)
    return [
        [np.frombuffer(block, dtype, size_of(parameter, dtype), next(begins)) for dtype in wanted]
        for parameter, wanted in zip(parameters, dtypes, strict=True)
    ]


def memory(size: int) -> Any:
    """So many zeroed bytes, which begin at a page."""
    if size < SMALL or not hasattr(mmap, "MAP_PRIVATE"):
        return np.zeros(size + LINE, np.uint8)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
    return block
