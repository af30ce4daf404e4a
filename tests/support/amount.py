"""How much is tested: everything in the long run, with OPTFORGE_TEST_FULL set, and a part of it otherwise."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable
from typing import TypeVar

FULL = bool(os.environ.get("OPTFORGE_TEST_FULL"))
LEVEL = "-O1" if FULL else "-O0"  # of what is compiled to be linked, and not for its bits or its warnings

Case = TypeVar("Case")


def some(cases: Iterable[Case], one_in: int, always: Callable[[Case], bool] = lambda _: False) -> list[Case]:
    """All cases in the long run, one in so many otherwise, and those that are always tested.

    What a case is told by chooses it, so that a new one leaves the choice of the others as it is.
    """
    return [case for case in cases if FULL or always(case) or zlib.crc32(repr(case).encode()) % one_in == 0]
