"""Adagrad, eps inside the root.

    acc <- acc + g^2
    p <- p - (lr / sqrt(acc + eps))*g

Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", Journal of
Machine Learning Research 12, 2011.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

STATE: dict[str, float] = {"acc": 0.0}

HYPERPARAMETERS: dict[str, float] = {"lr": 0.01, "eps": 1e-6}

# An eps near the size of g^2 tells eps inside the root from eps outside it.
SETTINGS: list[dict[str, float]] = [
    {"lr": 0.3, "eps": 0.7},
    {"lr": 1.7, "eps": 0.03},
]


def step(
    p: Array,
    g: Array,
    state: dict[str, Array],
    t: int,
    *,
    lr: float = HYPERPARAMETERS["lr"],
    eps: float = HYPERPARAMETERS["eps"],
) -> tuple[Array, dict[str, Array]]:
    """Return the parameter and the state after step `t`."""
    dtype = p.dtype.type
    with np.errstate(all="ignore"):
        rate = dtype(lr)
        floor = dtype(eps)

        acc = np.add(state["acc"], np.multiply(g, g))

        # The rate is divided first and the gradient multiplied after: lr*g/sqrt(...) has other bits.
        root = np.sqrt(np.add(acc, floor))
        scale = np.divide(rate, root)
        new_p = np.subtract(p, np.multiply(scale, g))
    return new_p, {"acc": acc}
