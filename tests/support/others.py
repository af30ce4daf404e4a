"""What the tests of the rules of others share: gradients, a judge of bits and of ulp, and how much is tested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from amount import FULL
from data import same

SIZES = (1, 33, 1025, *([2000] if FULL else []))  # a part of a lane, of a leaf, and of two leaves
STEPS = 6

# Rules with exp or log of elements, which may be off by 4 ulp, so that two targets are 8 ulp apart. What becomes of it
# in an update is, as a multiple of the dtype's eps and of the largest of what the update was made from:
ULP: dict[str, float] = {
    # 1 / (1 + e) takes at most half of e's relative error, and rounds twice; then m · dfc · rate / denom.
    "diffgrad": 12,
    # e^(±1) itself, then rounds twice.
    "powersign": 12,
    # exp(x + δ) is off by δ, the 8 ulp of a log of 1e-8 at least, which is 19, times at most 1; and by 8 of its own.
    "padam": 8 * 19 + 12,
    # Likewise by a third of the 8 ulp of a log of 1e-40 at least, which is 92.
    "madgrad": 8 * 92 / 3 + 12,
    # Likewise; and 1 − β1, by which its average is multiplied and 1 − Πβ1 divided, is 1e-3 at least, while β1 is rounded.
    "adai": 2 / 1e-3 + 8 * 92 / 3 + 12,
}


def spread(rng: np.random.Generator, size: int, dtype: Any) -> Any:
    """Gradients over a few magnitudes, some of them 0, that point one way more often than not."""
    scale = rng.choice([0.0, 1e-3, 0.1, 1.0, 2.0], size=size, p=[0.05, 0.2, 0.35, 0.3, 0.1])
    return ((rng.standard_normal(size) + 0.7) * scale).astype(dtype)


def start(rng: np.random.Generator, dtype: Any, sizes: Sequence[int] = SIZES) -> list[Any]:
    """Parameters."""
    return [rng.standard_normal(size).astype(dtype) for size in sizes]


def agree(name: str, own: Any, expected: Any, before: Any) -> bool:
    """Whether an array is what the contract promises: the same bits, or for the rules of `ULP` so many of them.

    `before` is what the array was when the step began.
    """
    if name not in ULP or np.ndim(own) == 0:
        return same(own, expected)
    if not np.array_equal(np.isnan(own), np.isnan(expected)):
        return False
    wide = [np.nan_to_num(np.asarray(array, np.float64)) for array in (own, expected, before)]
    allowed = ULP[name] * np.finfo(expected.dtype).eps * (np.abs(wide[1]) + np.abs(wide[2]))
    return bool((np.abs(wide[0] - wide[1]) <= allowed + np.finfo(expected.dtype).tiny).all())
