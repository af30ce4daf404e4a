"""Gradient descent with classical momentum, the rate inside the velocity.

    v = momentum*m - lr*g
    m <- v
    p <- p + v

Polyak, "Some methods of speeding up the convergence of iteration methods", USSR Computational Mathematics and
Mathematical Physics 4(5), 1964; in the notation of Sutskever, Martens, Dahl and Hinton, "On the importance of
initialization and momentum in deep learning", ICML 2013.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

STATE: dict[str, float] = {"m": 0.0}

HYPERPARAMETERS: dict[str, float] = {"lr": 0.01, "momentum": 0.9}

# Momentum 0 is valid, and 0*m is still NaN where m is infinite: the product must not be dropped.
SETTINGS: list[dict[str, float]] = [
    {"lr": 0.3, "momentum": 0.6},
    {"lr": 1.7, "momentum": 0.35},
    {"lr": 0.2, "momentum": 0.0},
]


def step(
    p: Array,
    g: Array,
    state: dict[str, Array],
    t: int,
    *,
    lr: float = HYPERPARAMETERS["lr"],
    momentum: float = HYPERPARAMETERS["momentum"],
) -> tuple[Array, dict[str, Array]]:
    """Return the parameter and the state after step `t`."""
    dtype = p.dtype.type
    with np.errstate(all="ignore"):
        rate = dtype(lr)
        keep = dtype(momentum)

        kept = np.multiply(keep, state["m"])
        pull = np.multiply(rate, g)
        velocity = np.subtract(kept, pull)

        new_p = np.add(p, velocity)
    return new_p, {"m": velocity}
