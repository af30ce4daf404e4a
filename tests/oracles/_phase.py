"""A whole optimizer step, composed by hand: unscale, look for NaN and Inf, transforms, the rule, statistics.

The tensors that have a gradient take part. The others are left alone, decay included, and are out of every norm and
total: the list of those that take part is closed up before anything is summed over it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._tree import divide, global_norm, norm

Array = NDArray[np.floating[Any]]
State = dict[str, Any]  # an array, or a Python float, by name
Transform = Callable[..., tuple[list[Array], list[Array]]]

NORMS = ("grad_norm", "clipped_grad_norm", "param_norm", "update_norm", "max_update_ratio")
COUNTS = ("nan", "inf", "skipped")


@dataclass(frozen=True)
class Stats:
    """Statistics of one step, by name.

    grad_norm: of the unscaled gradients, before the transforms. clipped_grad_norm: of the gradients that the rule sees.
    param_norm: of the parameters after the step. update_norm: of the parameters after less those before the step, the
    transforms' changes included. max_update_ratio: update_norm/param_norm of a tensor, 0.0 where update_norm is 0; in
    total, the largest. nan, inf: numbers of such elements in the unscaled gradients. skipped: 1 or 0.

    On a skipped step update_norm and max_update_ratio are 0.0, and clipped_grad_norm and param_norm NaN, both in total
    and for each tensor that takes part. Tensors that do not take part have NaN, and 0 in `nan`, `inf` and `skipped`.
    """

    totals: dict[str, float]
    tensors: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Phase:
    """What a step leaves: new arrays throughout, those of untouched tensors included."""

    params: list[Array]
    states: list[State]
    skipped: bool
    stats: Stats


def update_ratio(update_norm: float, param_norm: float) -> float:
    return 0.0 if update_norm == 0.0 else divide(update_norm, param_norm)


def largest(values: list[float]) -> float:
    """Return the largest value, NaN if any is, 0.0 of none."""
    return math.nan if any(math.isnan(x) for x in values) else max(values, default=0.0)


def phase(
    params: Sequence[Array],
    grads: Sequence[Array | None],
    states: Sequence[State],
    t: int | Sequence[int],
    oracle_module: ModuleType,
    transforms: Sequence[tuple[Transform, dict[str, Any]]],
    hyper: dict[str, float],
    *,
    grad_scale: float | None = None,
    skip_nonfinite: bool = False,
) -> Phase:
    """Return the outcome of a step over all tensors, with `transforms` run in order before the rule's steps.

    For a tensor that takes part it is step number `t`, which is its own, or the same for all.
    With `skip_nonfinite` a step that finds a NaN or an Inf in any unscaled gradient changes neither parameters nor
    state.
    """
    new_params = [p.copy() for p in params]
    new_states = [{name: x.copy() if isinstance(x, np.ndarray) else x for name, x in s.items()} for s in states]
    taking_part = [i for i, g in enumerate(grads) if g is not None]

    before = [params[i] for i in taking_part]
    unscaled: list[Array] = []
    with np.errstate(all="ignore"):
        for g in grads:
            if g is None:
                continue
            unscaled.append(g.copy() if grad_scale is None else np.multiply(g, g.dtype.type(1.0 / grad_scale)))

    nans = [int(np.count_nonzero(np.isnan(g))) for g in unscaled]
    infs = [int(np.count_nonzero(np.isinf(g))) for g in unscaled]
    skipped = skip_nonfinite and sum(nans) + sum(infs) > 0

    totals: dict[str, float] = {"grad_norm": global_norm(unscaled)}
    each: dict[str, list[float]] = {"grad_norm": [norm(g) for g in unscaled]}
    if skipped:
        for name, value in [
            ("clipped_grad_norm", math.nan),
            ("param_norm", math.nan),
            ("update_norm", 0.0),
            ("max_update_ratio", 0.0),
        ]:
            totals[name] = value
            each[name] = [value for _ in taking_part]
    else:
        transformed, seen = before, unscaled
        for transform, keywords in transforms:
            transformed, seen = transform(transformed, seen, **keywords)

        after = []
        for i, p, g in zip(taking_part, transformed, seen, strict=True):
            new_params[i], new_states[i] = oracle_module.step(
                p, g, states[i], t if isinstance(t, int) else t[i], **hyper
            )
            after.append(new_params[i])

        with np.errstate(all="ignore"):
            updates = [np.subtract(a, b) for a, b in zip(after, before, strict=True)]
        for name, tensors in [("clipped_grad_norm", seen), ("param_norm", after), ("update_norm", updates)]:
            totals[name] = global_norm(tensors)
            each[name] = [norm(x) for x in tensors]
        pairs = zip(each["update_norm"], each["param_norm"], strict=True)
        each["max_update_ratio"] = [update_ratio(u, n) for u, n in pairs]
        totals["max_update_ratio"] = largest(each["max_update_ratio"])

    totals.update(nan=sum(nans), inf=sum(infs), skipped=int(skipped))
    each.update(nan=[*nans], inf=[*infs], skipped=[int(skipped) for _ in taking_part])

    per_tensor: dict[str, NDArray[Any]] = {name: np.full(len(params), np.nan) for name in NORMS}
    per_tensor.update({name: np.zeros(len(params), np.int64) for name in COUNTS})
    for name, values in each.items():
        per_tensor[name][taking_part] = values
    return Phase(new_params, new_states, skipped, Stats(totals, per_tensor))
