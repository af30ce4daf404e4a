"""Gradient descent with Nesterov momentum, stated at the point where the gradient is taken.

    v = momentum*m - lr*g
    m <- v
    p <- p + momentum*v - lr*g

Nesterov, "A method of solving a convex programming problem with convergence rate O(1/k^2)", Soviet Mathematics
Doklady 27, 1983; in the form of Bengio, Boulanger-Lewandowski and Pascanu, "Advances in Optimizing Recurrent
Networks", ICASSP 2013.
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

        # The sum goes from left to right: the velocity joins p before the gradient leaves it.
        ahead = np.add(p, np.multiply(keep, velocity))
        new_p = np.subtract(ahead, pull)
    return new_p, {"m": velocity}
