"""LAMB: the update of Adam with weight decay, scaled per tensor to the norm of the parameter.

    m <- beta1*m + (1 - beta1)*g
    v <- beta2*v + (1 - beta2)*g^2
    u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay*p
    trust = |p| / |u|  where both norms are positive, else 1
    p <- p - (lr*trust)*u

You, Li, Reddi, Hseu, Kumar, Bhojanapalli, Song, Demmel, Keutzer and Hsieh, "Large Batch Optimization for Deep Learning:
Training BERT in 76 minutes", ICLR 2020, with the identity as its function phi of the norm.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._tree import divide, norm

Array = NDArray[np.floating[Any]]

STATE: dict[str, float] = {"m": 0.0, "v": 0.0}

HYPERPARAMETERS: dict[str, float] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.01}

# A strong decay shows that it is inside the update whose norm is taken; an eps near the size of sqrt(v) shows where it
# is added. The last setting switches the decay off: what then scales the whole update, as the first correction does,
# cancels in the ratio but for rounding, so that it takes the other settings to show it.
SETTINGS: list[dict[str, float]] = [
    {"lr": 0.3, "beta1": 0.7, "beta2": 0.6, "eps": 0.7, "weight_decay": 0.45},
    {"lr": 0.07, "beta1": 0.35, "beta2": 0.85, "eps": 0.03, "weight_decay": 3.1},
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
        keep1 = dtype(beta1)
        take1 = dtype(1.0 - beta1)
        keep2 = dtype(beta2)
        take2 = dtype(1.0 - beta2)
        correction1 = dtype(1.0 - math.pow(beta1, t))
        correction2 = dtype(1.0 - math.pow(beta2, t))
        floor = dtype(eps)
        decay = dtype(weight_decay)

        m = np.add(np.multiply(keep1, state["m"]), np.multiply(take1, g))
        v = np.add(np.multiply(keep2, state["v"]), np.multiply(take2, np.multiply(g, g)))

        numerator = np.divide(m, correction1)
        denominator = np.add(np.sqrt(np.divide(v, correction2)), floor)
        update = np.add(np.divide(numerator, denominator), np.multiply(decay, p))

        p_norm = norm(p)
        update_norm = norm(update)
        # No norm that is NaN is above 0.
        trust = divide(p_norm, update_norm) if p_norm > 0.0 and update_norm > 0.0 else 1.0
        rate = dtype(lr * trust)

        new_p = np.subtract(p, np.multiply(rate, update))
    return new_p, {"m": m, "v": v}
