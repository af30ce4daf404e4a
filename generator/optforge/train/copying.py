"""Copies of an optimizer: over copies of its parameters, or through pickle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from . import resume
from .optimizer_like import OptimizerLike

HOW = ("target", "threads", "skip_nonfinite", "zero_grads", "store", "master", "rounding", "seed")


Own = TypeVar("Own", bound=OptimizerLike)


def recipe(opt: OptimizerLike) -> dict[str, Any]:
    """What `made` needs to make an optimizer like this one: its own parameters, and copies of all else."""
    hyper, grouped = opt._hyper, opt._structure.grouped
    saved = resume.state_dict(opt, lambda _: [])
    rows = [
        {**hyper.of(k), **{name: schedule for (group, name), schedule in hyper.schedules.items() if group == k}}
        for k in range(len(hyper.values))
    ]
    # They are given to the new one as they are; None says that it keeps them.
    saved["schedules"] = [{name: None for name, value in row.items() if callable(value)} for row in rows]
    pairs = zip(opt.params if grouped else [opt.params], rows, strict=True)
    return {
        "params": [{"params": params, **row} for params, row in pairs] if grouped else opt.params,
        "rule": opt.rule,
        "how": {name: getattr(opt, name) for name in HOW},
        "settings": {**opt._common, **({} if grouped else rows[0])},
        "common": dict(opt._common),
        "saved": saved,
    }


def made(kind: Callable[..., Own], recipe: Mapping[str, Any]) -> Own:
    """An optimizer that goes on with the same bits."""
    opt = kind(recipe["params"], recipe["rule"], **recipe["how"], **recipe["settings"])
    opt._set(_common=dict(recipe["common"]))
    opt.load_state_dict(recipe["saved"])
    return opt


def deep(opt: Own, memo: dict[int, Any]) -> Own:
    """A copy over copies of the parameters; those that are copied already, with a model, are the same there."""
    own = recipe(opt)
    target = own["how"].pop("target")  # it may hold a stream
    copied = copy.deepcopy(own, memo)
    copied["how"]["target"] = target
    return made(type(opt), copied)
