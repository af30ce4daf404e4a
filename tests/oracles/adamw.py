"""AdamW: Adam with decoupled weight decay, the decay scaled by lr and applied before the step, as in PyTorch.

    p <- p*(1 - lr*weight_decay)
    m <- beta1*m + (1 - beta1)*g
    v <- beta2*v + (1 - beta2)*g^2
    p <- p - (lr / (1 - beta1^t))*m / (sqrt(v / (1 - beta2^t)) + eps)

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019. PyTorch's formula, not its order of
operations: its kernels take sqrt(v)/sqrt(1 - beta2^t).
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

STATE: dict[str, float] = {"m": 0.0, "v": 0.0}

HYPERPARAMETERS: dict[str, float] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}

# A decay this strong tells decay before the step from decay after it or inside it; an eps near the size of sqrt(v)
# shows where it is added. The first setting has lr*weight_decay near 1, where a factor that is not worked out in double
# rounds to other bits; the last one switches the decay off.
SETTINGS: list[dict[str, float]] = [
    {"lr": 0.3, "beta1": 0.7, "beta2": 0.6, "eps": 0.7, "weight_decay": 3.1},
    {"lr": 0.07, "beta1": 0.35, "beta2": 0.85, "eps": 0.03, "weight_decay": 0.45},
    {"lr": 1.7, "beta1": 0.95, "beta2": 0.97, "eps": 1e-3, "weight_decay": 0.0},
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
    weight_decay: float = HYPERPARAMETERS["weight_decay"],
) -> tuple[Array, dict[str, Array]]:
    """Return the parameter and the state after step `t`."""
    dtype = p.dtype.type
    with np.errstate(all="ignore"):
        shrink = dtype(1.0 - lr * weight_decay)
        keep1 = dtype(beta1)
        take1 = dtype(1.0 - beta1)
        keep2 = dtype(beta2)
        take2 = dtype(1.0 - beta2)
        # The corrected rate is one scalar of this formula, divided in double.
        rate = dtype(lr / (1.0 - math.pow(beta1, t)))
        correction2 = dtype(1.0 - math.pow(beta2, t))
        floor = dtype(eps)

        decayed = np.multiply(p, shrink)

        m = np.add(np.multiply(keep1, state["m"]), np.multiply(take1, g))
        v = np.add(np.multiply(keep2, state["v"]), np.multiply(take2, np.multiply(g, g)))

        numerator = np.multiply(rate, m)
        denominator = np.add(np.sqrt(np.divide(v, correction2)), floor)
        new_p = np.subtract(decayed, np.divide(numerator, denominator))
    return new_p, {"m": m, "v": v}
