"""Reference transforms of gradients and parameters, which run before the rule's step.

Each is `name(params, grads, **hyper) -> (params, grads)` over the tensors that take part, whose dtypes may differ from one
to the next; it returns new lists of new arrays. As in the rules' oracles, scalars are doubles, those that depend on a
norm or a mean included, and are rounded once, by `dtype(...)`, where they meet an array.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._tree import divide, global_norm, mean, minimum, norm

Array = NDArray[np.floating[Any]]
Tensors = list[Array]


def copies(tensors: Tensors) -> Tensors:
    return [x.copy() for x in tensors]


def scaled(x: Array, factor: float) -> Array:
    with np.errstate(all="ignore"):
        return np.multiply(x, x.dtype.type(factor))


def array_maximum(a: Array, b: Any) -> Array:
    """Return the larger ones, the second where they are equal (zeros of two signs), NaN where either is."""
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(math.nan), np.where(a > b, a, b))


def array_minimum(a: Array, b: Any) -> Array:
    """Return the smaller ones, the second where they are equal (zeros of two signs), NaN where either is."""
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(math.nan), np.where(a < b, a, b))


def clip_by_global_norm(
    params: Tensors, grads: Tensors, *, max_norm: float = 50.0, form: str = "seed"
) -> tuple[Tensors, Tensors]:
    """Scale all gradients by one factor, from the norm of all of them together.

    Form "seed" touches gradients only if the norm is `max_norm` or more; the other two always multiply.
    """
    n = global_norm(grads)
    if form == "seed":
        # A norm that is NaN is not above anything.
        if not n >= max_norm:
            return copies(params), copies(grads)
        factor = divide(max_norm, n)
    elif form == "pytorch":
        factor = minimum(1.0, divide(max_norm, n + 1e-6))
    elif form == "lasagne":
        factor = divide(minimum(n, max_norm), n + 1e-7)
    else:
        raise ValueError(f"no form is called {form!r}")
    return copies(params), [scaled(g, factor) for g in grads]


def clip_by_norm(params: Tensors, grads: Tensors, *, max_norm: float = 1.0) -> tuple[Tensors, Tensors]:
    """Scale each gradient whose own norm is `max_norm` or more to that norm."""
    clipped = []
    for g in grads:
        n = norm(g)
        clipped.append(scaled(g, divide(max_norm, n)) if n >= max_norm else g.copy())
    return copies(params), clipped


def clip_by_value(params: Tensors, grads: Tensors, *, max_value: float = 1.0) -> tuple[Tensors, Tensors]:
    """Clip each element to [-max_value, max_value]: first from below, then from above."""
    clipped = []
    with np.errstate(all="ignore"):
        for g in grads:
            dtype = g.dtype.type
            clipped.append(array_minimum(array_maximum(g, dtype(-max_value)), dtype(max_value)))
    return copies(params), clipped


def add_weight_decay(params: Tensors, grads: Tensors, *, weight_decay: float = 0.01) -> tuple[Tensors, Tensors]:
    """Add the decay to the gradients."""
    decayed = []
    with np.errstate(all="ignore"):
        for p, g in zip(params, grads, strict=True):
            decayed.append(np.add(g, np.multiply(g.dtype.type(weight_decay), p)))
    return copies(params), decayed


def decoupled_weight_decay(
    params: Tensors, grads: Tensors, *, lr: float, weight_decay: float = 0.01
) -> tuple[Tensors, Tensors]:
    """Shrink the parameters, not through the gradients."""
    return [scaled(p, 1.0 - lr * weight_decay) for p in params], copies(grads)


def centralize(params: Tensors, grads: Tensors) -> tuple[Tensors, Tensors]:
    """Take from each gradient its mean, that of the whole tensor."""
    with np.errstate(all="ignore"):
        return copies(params), [np.subtract(g, g.dtype.type(mean(g))) for g in grads]
