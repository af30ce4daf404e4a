"""NovoGrad: momentum over gradients that are normalised per tensor, with a second moment that is one number per tensor.

    v <- |g|^2  where v is 0, as before the first step, else  beta2*v + (1 - beta2)*|g|^2
    m <- beta1*m + (g / (sqrt(v) + eps) + weight_decay*p)
    p <- p - lr*m

Ginsburg, Castonguay, Hrinchuk, Kuchaiev, Lavrukhin, Leary, Li, Nguyen, Zhang and Cohen, "Stochastic Gradient Methods with
Layer-wise Adaptive Moments for Training of Deep Networks", arXiv:1905.11286, 2019.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._tree import norm, sqrt

Array = NDArray[np.floating[Any]]

STATE: dict[str, float] = {"m": 0.0, "v": 0.0}

# State that is one Python float per tensor, not an array, and so is a double whatever the dtype.
SCALAR_STATE: tuple[str, ...] = ("v",)

HYPERPARAMETERS: dict[str, float] = {"lr": 0.01, "beta1": 0.95, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.001}

# An eps near the norm of a small tensor's gradient shows that it is outside the root; a strong decay shows that it is
# inside the momentum, and not normalised. The last setting switches the decay off.
SETTINGS: list[dict[str, float]] = [
    {"lr": 0.3, "beta1": 0.7, "beta2": 0.6, "eps": 0.7, "weight_decay": 0.45},
    {"lr": 0.07, "beta1": 0.35, "beta2": 0.85, "eps": 0.03, "weight_decay": 3.1},
    {"lr": 1.7, "beta1": 0.95, "beta2": 0.97, "eps": 1e-3, "weight_decay": 0.0},
]


def step(
    p: Array,
    g: Array,
    state: dict[str, Any],
    t: int,
    *,
    lr: float = HYPERPARAMETERS["lr"],
    beta1: float = HYPERPARAMETERS["beta1"],
    beta2: float = HYPERPARAMETERS["beta2"],
    eps: float = HYPERPARAMETERS["eps"],
    weight_decay: float = HYPERPARAMETERS["weight_decay"],
) -> tuple[Array, dict[str, Any]]:
    """Return the parameter and the state after step `t`."""
    dtype = p.dtype.type
    with np.errstate(all="ignore"):
        g_norm = norm(g)
        # The square of the norm, not the sum under its root: rounding takes the two apart.
        squares = g_norm * g_norm
        v = float(state["v"])
        v = squares if v == 0.0 else beta2 * v + (1.0 - beta2) * squares

        scale = dtype(sqrt(v) + eps)
        keep = dtype(beta1)
        decay = dtype(weight_decay)
        rate = dtype(lr)

        fresh = np.add(np.divide(g, scale), np.multiply(decay, p))
        m = np.add(np.multiply(keep, state["m"]), fresh)

        new_p = np.subtract(p, np.multiply(rate, m))
    return new_p, {"m": m, "v": v}
