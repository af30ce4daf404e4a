"""RMSProp, not centered, eps inside the root.

    acc <- rho*acc + (1 - rho)*g^2
    p <- p - lr*(g / sqrt(acc + eps))

Tieleman and Hinton, "Lecture 6.5 - rmsprop: Divide the gradient by a running average of its recent magnitude",
COURSERA: Neural Networks for Machine Learning, 2012.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

STATE: dict[str, float] = {"acc": 0.0}

HYPERPARAMETERS: dict[str, float] = {"lr": 1e-3, "rho": 0.9, "eps": 1e-6}

# An eps near the size of the accumulator tells eps inside the root from eps outside it.
SETTINGS: list[dict[str, float]] = [
    {"lr": 0.3, "rho": 0.6, "eps": 0.7},
    {"lr": 1.7, "rho": 0.35, "eps": 0.03},
]


def step(
    p: Array,
    g: Array,
    state: dict[str, Array],
    t: int,
    *,
    lr: float = HYPERPARAMETERS["lr"],
    rho: float = HYPERPARAMETERS["rho"],
    eps: float = HYPERPARAMETERS["eps"],
) -> tuple[Array, dict[str, Array]]:
    """Return the parameter and the state after step `t`."""
    dtype = p.dtype.type
    with np.errstate(all="ignore"):
        rate = dtype(lr)
        keep = dtype(rho)
        # The complement is taken in double: 1 - dtype(rho) would round twice.
        take = dtype(1.0 - rho)
        floor = dtype(eps)

        acc = np.add(np.multiply(keep, state["acc"]), np.multiply(take, np.multiply(g, g)))

        # The gradient is divided first and the rate multiplied after: lr*g/sqrt(...) has other bits.
        root = np.sqrt(np.add(acc, floor))
        direction = np.divide(g, root)
        new_p = np.subtract(p, np.multiply(rate, direction))
    return new_p, {"acc": acc}
