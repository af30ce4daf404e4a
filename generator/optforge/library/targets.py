"""The targets by name: what emits the files of each, and what runs its steps.

What emits is a module with `render(rule, kernel, storages, prefix, settings, single)` and the `ENDINGS` of its files.
What runs is one with `engine(rule, kernel)`, which gives an engine:

    inputs                   the class that looks at the arrays of each step, `Inputs` where there is none
    plan(inputs, behind)     a plan of steps with the arrays that were found there; `behind` has, for each tensor with a
                             gradient, how many of the optimizer's steps it has not taken, as long as the plan is in use
    applied()                where a device counts: the steps that were applied, once it has done all

and a plan has `step(hyperparameters, t, how)`, the optimizer's step t, which is step `t - behind` of each tensor: it
writes t into `how.progress.steps` together with the rest, and says whether the step was skipped, or None.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..core.diagnostics import UsageError, nearest


@dataclass(frozen=True)
class Target:
    """A target: its modules, which are imported when they are first needed.

    Attributes
    ----------
    emits, runs : str
        The module that emits, and the one that runs; empty where the target does not.
    """

    emits: str
    runs: str


TARGETS = {
    "c": Target("emit.c", "engines.c.engine"),
    "cuda": Target("emit.cuda", "engines.cuda.engine"),
    "numpy": Target("", "engines.numpy"),
}


def target(name: str) -> Target:
    """The target of this name."""
    if name not in TARGETS:
        listed = f"; there are {', '.join(TARGETS)}"
        raise UsageError(f"there is no target {name!r}{nearest(name, TARGETS) or listed}")
    return TARGETS[name]


def module(name: str) -> Any:
    """A module of the package."""
    return importlib.import_module(f"{__package__.rpartition('.')[0]}.{name}")


def renderer(name: str) -> Callable[..., dict[str, str]]:
    """The function of a target that gives its files."""
    if not target(name).emits:
        raise UsageError(f"target {name!r} runs rules and emits no files")
    return module(TARGETS[name].emits).render  # type: ignore[no-any-return]


def endings(name: str) -> tuple[str, ...]:
    """The endings of a target's files."""
    return module(target(name).emits).ENDINGS  # type: ignore[no-any-return]


def engine(name: str) -> Callable[..., Any]:
    """The function of a target that runs a rule in this process."""
    return module(target(name).runs).engine  # type: ignore[no-any-return]
