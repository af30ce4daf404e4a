"""Stochastic gradient descent.

    p <- p - lr*g

Robbins and Monro, "A Stochastic Approximation Method", Annals of Mathematical Statistics 22(3), 1951.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

STATE: dict[str, float] = {}

HYPERPARAMETERS: dict[str, float] = {"lr": 0.01}

SETTINGS: list[dict[str, float]] = [
    {"lr": 0.3},
    {"lr": 1.7},
]


def step(
    p: Array,
    g: Array,
    state: dict[str, Array],
    t: int,
    *,
    lr: float = HYPERPARAMETERS["lr"],
) -> tuple[Array, dict[str, Array]]:
    """Return the parameter and the state after step `t`."""
    dtype = p.dtype.type
    with np.errstate(all="ignore"):
        rate = dtype(lr)
        new_p = np.subtract(p, np.multiply(rate, g))
    return new_p, {}
