"""Adadelta, with a learning rate.

    acc <- rho*acc + (1 - rho)*g^2
    u = g*sqrt(acc_delta + eps) / sqrt(acc + eps)          with the new acc and the old acc_delta
    p <- p - lr*u
    acc_delta <- rho*acc_delta + (1 - rho)*u^2

Zeiler, "ADADELTA: An Adaptive Learning Rate Method", arXiv:1212.5701, 2012. The paper has no rate: lr = 1 is its rule.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

STATE: dict[str, float] = {"acc": 0.0, "acc_delta": 0.0}

HYPERPARAMETERS: dict[str, float] = {"lr": 1.0, "rho": 0.95, "eps": 1e-6}

# An lr other than 1 shows whether acc_delta gathers u, as it must, or lr*u; an eps near the size of the accumulators
# shows where it is added.
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
        old_acc_delta = state["acc_delta"]

        acc = np.add(np.multiply(keep, state["acc"]), np.multiply(take, np.multiply(g, g)))

        root_delta = np.sqrt(np.add(old_acc_delta, floor))
        root = np.sqrt(np.add(acc, floor))
        update = np.divide(np.multiply(g, root_delta), root)

        new_p = np.subtract(p, np.multiply(rate, update))

        acc_delta = np.add(np.multiply(keep, old_acc_delta), np.multiply(take, np.multiply(update, update)))
    return new_p, {"acc": acc, "acc_delta": acc_delta}
