"""LARS: momentum with weight decay, the rate scaled per tensor to the norms of parameter and gradient.

    local = trust_coefficient*|p| / (|g| + weight_decay*|p|)  where both norms are positive, else 1
    m <- momentum*m + (lr*local)*(g + weight_decay*p)
    p <- p - m

You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks", arXiv:1708.03888, 2017. The paper leaves open
what a norm of 0 does.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._tree import divide, norm

Array = NDArray[np.floating[Any]]

STATE: dict[str, float] = {"m": 0.0}

HYPERPARAMETERS: dict[str, float] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "trust_coefficient": 1e-3}

# A decay of about |g|/|p| shows in both places where it acts. Without momentum 0*m is still NaN where m is infinite;
# without decay the local rate is |p|/|g| alone.
SETTINGS: list[dict[str, float]] = [
    {"lr": 0.3, "momentum": 0.6, "weight_decay": 3.1, "trust_coefficient": 0.7},
    {"lr": 1.7, "momentum": 0.35, "weight_decay": 0.45, "trust_coefficient": 0.02},
    {"lr": 0.2, "momentum": 0.0, "weight_decay": 0.0, "trust_coefficient": 1.3},
]


def step(
    p: Array,
    g: Array,
    state: dict[str, Array],
    t: int,
    *,
    lr: float = HYPERPARAMETERS["lr"],
    momentum: float = HYPERPARAMETERS["momentum"],
    weight_decay: float = HYPERPARAMETERS["weight_decay"],
    trust_coefficient: float = HYPERPARAMETERS["trust_coefficient"],
) -> tuple[Array, dict[str, Array]]:
    """Return the parameter and the state after step `t`."""
    dtype = p.dtype.type
    with np.errstate(all="ignore"):
        p_norm = norm(p)
        g_norm = norm(g)
        # No norm that is NaN is above 0.
        if p_norm > 0.0 and g_norm > 0.0:
            local = divide(trust_coefficient * p_norm, g_norm + weight_decay * p_norm)
        else:
            local = 1.0

        rate = dtype(lr * local)
        keep = dtype(momentum)
        decay = dtype(weight_decay)

        decayed = np.add(g, np.multiply(decay, p))
        m = np.add(np.multiply(keep, state["m"]), np.multiply(rate, decayed))

        new_p = np.subtract(p, m)
    return new_p, {"m": m}
