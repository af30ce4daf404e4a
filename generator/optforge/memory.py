"""Memory for state: one block, on huge pages where the system offers them, its arrays apart from the parameters'."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from .arrays import address
from .functions import Array

PAGE, LINE = 4096, 64
SMALL = 1 << 16  # bytes of an array up to which all of a step's arrays fit into a cache, where they lie close together
HUGE = 1 << 22  # bytes of all arrays from which huge pages are asked for


def allocate(parameters: Sequence[Array], count: int) -> list[list[Array]]:
    """Zeroed arrays like the parameters, `count` for each.

    Arrays at the same offset of a 4 KiB page get into each other's way, so those of one parameter are staggered from
    it: by an even share of the page, one share being left for the gradient, which mostly lies as the parameter does.
    """
    share = PAGE // (count + 2) // LINE * LINE
    position, places = 0, []
    for parameter in parameters:
        own = []
        for k in range(count):
            position += -position % LINE
            if parameter.nbytes > SMALL:
                position += (address(parameter) // LINE * LINE + (k + 2) * share - position) % PAGE
            own.append(position)
            position += parameter.nbytes
        places.append(own)
    block = memory(position)
    return [
        [np.frombuffer(block, parameter.dtype, parameter.size, place) for place in own]
        for parameter, own in zip(parameters, places, strict=True)
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
