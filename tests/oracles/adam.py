"""Adam with a decaying first-moment rate, eps outside the root.

    beta1_t = beta1*lam^(t - 1)
    m <- beta1_t*m + (1 - beta1_t)*g
    v <- beta2*v + (1 - beta2)*g^2
    p <- p - (lr*m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015; the decay beta1*lam^(t - 1) is that of its
convergence theorem.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

STATE: dict[str, float] = {"m": 0.0, "v": 0.0}

HYPERPARAMETERS: dict[str, float] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-6, "lam": 1.0 - 1e-8}

# A lam well below 1 tells beta1_t from beta1, and t - 1 from t; an eps near the size of sqrt(v) shows where it goes.
# The last setting has a lam that float32 rounds to 1, and a beta1 near 1, so that the decay still shows within a few
# steps of float32, in 1 - beta1_t.
SETTINGS: list[dict[str, float]] = [
    {"lr": 0.3, "beta1": 0.7, "beta2": 0.6, "eps": 0.7, "lam": 0.55},
    {"lr": 1.7, "beta1": 0.35, "beta2": 0.85, "eps": 0.03, "lam": 0.9},
    {"lr": 0.2, "beta1": 0.95, "beta2": 0.97, "eps": 1e-3, "lam": 1.0 - 2e-8},
]


def step(
    p: Array,
    g: Array,
    state: dict[str, Array],
    t: int,
    *,
    lr: float = HYPERPARAMETERS["lr"],
    beta1: float = HYPERPARAMETERS["beta1"],
    beta2: float = HYPERPARAMETERS["beta2"],
    eps: float = HYPERPARAMETERS["eps"],
    lam: float = HYPERPARAMETERS["lam"],
) -> tuple[Array, dict[str, Array]]:
    """Return the parameter and the state after step `t`."""
    dtype = p.dtype.type
    with np.errstate(all="ignore"):
        # lam is 1 in float32, so the decay has to be worked out in double, and so have both complements of beta1_t.
        beta1_t = beta1 * math.pow(lam, t - 1)
        keep1 = dtype(beta1_t)
        take1 = dtype(1.0 - beta1_t)
        keep2 = dtype(beta2)
        take2 = dtype(1.0 - beta2)
        # The correction follows the undecayed beta1.
        correction1 = dtype(1.0 - math.pow(beta1, t))
        correction2 = dtype(1.0 - math.pow(beta2, t))
        rate = dtype(lr)
        floor = dtype(eps)

        m = np.add(np.multiply(keep1, state["m"]), np.multiply(take1, g))
        v = np.add(np.multiply(keep2, state["v"]), np.multiply(take2, np.multiply(g, g)))

        # lr meets the array before the correction does: lr/(1 - beta1^t) is not a scalar of this formula.
        numerator = np.divide(np.multiply(rate, m), correction1)
        denominator = np.add(np.sqrt(np.divide(v, correction2)), floor)
        new_p = np.subtract(p, np.divide(numerator, denominator))
    return new_p, {"m": m, "v": v}
