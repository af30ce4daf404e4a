"""The targets: one module each, found by name.

A target that emits source has `render(rule, kernel, dtypes, prefix, settings, single)` and the `ENDINGS` of its files;
one that runs steps has `engine(rule, kernel)`, which gives an engine:

    inputs                   the class that looks at the arrays of each step, `Inputs` where there is none
    plan(inputs, behind)     a plan of steps with the arrays that were found there; `behind` has, for each tensor with a
                             gradient, how many of the optimizer's steps it has not taken, as long as the plan is in use
    applied()                where a device counts: the steps that were applied, once it has done all

and a plan has `step(hyperparameters, t, how)`, the optimizer's step t, which is step `t - behind` of each tensor: it
writes t into `how.progress.steps` together with the rest, and says whether the step was skipped, or None.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..diagnostics import UsageError, nearest


def names() -> list[str]:
    """The targets there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def target(name: str) -> ModuleType:
    """The module of a target."""
    if name not in names():
        listed = f"; there are {', '.join(names())}"
        raise UsageError(f"there is no target {name!r}{nearest(name, names()) or listed}")
    return importlib.import_module(f"{__name__}.{name}")


def renderer(name: str) -> Callable[..., dict[str, str]]:
    """The function of a target that gives its files."""
    render: Any = getattr(target(name), "render", None)
    if render is None:
        raise UsageError(f"target {name!r} runs rules and emits no files")
    return render  # type: ignore[no-any-return]


def engine(name: str) -> Callable[..., Any]:
    """The function of a target that runs a rule in this process."""
    run: Any = getattr(target(name), "engine", None)
    if run is None:
        raise UsageError(f"target {name!r} emits files and runs nothing")
    return run  # type: ignore[no-any-return]
