"""Check a saved state against an optimizer, noting all that does not fit."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .functions import Array
from .hyperparameters import Hyperparameters, Schedules
from .ir import Kernel
from .settings import real
from .structure import Structure
from .tensor import Tensor


def schedules_to_save(hyper: Hyperparameters) -> list[dict[str, Any]]:
    """The schedules of each group as a state dict has them; empty where there are none."""
    saved: list[dict[str, Any]] = [{} for _ in hyper.values]
    for (group, name), schedule in hyper.schedules.items():
        saved[group][name] = schedule.to_dict() if hasattr(schedule, "to_dict") else None
        if saved[group][name] is None:
            what = f"{hyper.where(group)}the schedule of hyperparameter {name!r} is {schedule!r}"
            warnings.warn(f"{what}, which cannot be saved; only its present value is", stacklevel=3)
    return saved if hyper.schedules else []


def saved_hyperparameters(
    hyper: Hyperparameters, saved: Any, schedules: Any, t: int, problems: list[str]
) -> tuple[tuple[Array, Schedules], list[tuple[str, float]]]:
    """The hyperparameters of a state dict as `Hyperparameters.replace` takes them; what does not fit is noted.

    Also gives those that were functions which could not be saved, and are numbers here.
    """
    nothing: tuple[tuple[Array, Schedules], list[tuple[str, float]]] = ((hyper.values, hyper.schedules), [])
    number = len(hyper.values)
    schedules = [{}] * number if schedules is None else schedules
    for what, given in (("groups", saved), ("schedules", schedules)):
        if not isinstance(given, (list, tuple)) or len(given) != number:
            shown = f"{len(given)} {what}" if isinstance(given, (list, tuple)) else f"{given!r} for its {what}"
            problems.append(f"it has {shown}, here are {number} groups")
            return nothing
    before = len(problems)
    found, lost = {}, []
    for group, (row, functions) in enumerate(zip(saved, schedules, strict=True)):
        where = hyper.where(group)
        if not isinstance(row, Mapping) or set(row) != set(hyper.names):
            problems.append(f"{where}its hyperparameters are {keys_of(row)}, here {sorted(hyper.names)}")
            continue
        if not isinstance(functions, Mapping) or not set(functions) <= set(hyper.names):
            problems.append(f"{where}its schedules are {keys_of(functions)}, here {sorted(hyper.names)}")
            continue
        values = {name: noting(problems, real, name, row[name], where) for name in hyper.names}
        for name, described in functions.items():
            if described is not None:
                found[group, name] = noting(problems, schedule_of, described)
            elif (group, name) in hyper.schedules:
                found[group, name] = hyper.schedules[group, name]
            else:
                lost.append((f"{where}hyperparameter {name!r}", values[name]))
    if len(problems) > before:
        return nothing
    changed = noting(problems, hyper.changed, saved, found, max(t, 1))
    return (changed, lost) if changed else nothing


def schedule_of(described: Any) -> Any:
    """The schedule that a dict describes."""
    return importlib.import_module(".schedules", __package__).from_dict(described)


def saved_state(
    kernel: Kernel, structure: Structure, tensors: Sequence[Tensor], saved: Any, problems: list[str]
) -> list[tuple[Array, Array]]:
    """Own state with what a state dict has for it; what does not fit is noted."""
    names = [state.name for state in kernel.state]
    if not isinstance(saved, Mapping) or set(saved) != set(names):
        problems.append(f"its state is {keys_of(saved)}, here {sorted(names)}")
        return []
    changes = []
    for state in kernel.state:
        values = matching(structure, saved[state.name], state.name, problems)
        for tensor, value in zip(tensors, values, strict=False):
            label = f"state[{state.name!r}]{tensor.path}"
            try:
                given = np.asarray(value)
            except (TypeError, ValueError) as problem:
                problems.append(f"{label} is no array: {problem}")
                continue
            if state.scalar:
                own = tensor.scalars[state.name]
                if given.shape != () or given.dtype.kind not in "fiu":
                    what = f"{given.dtype} of shape {given.shape}" if given.shape else repr(value)
                    problems.append(f"{label} is {what}, here a number")
            else:
                own = tensor.arrays[state.name]
                if given.shape != tensor.shape or given.dtype != own.dtype:
                    what = f"{label} is {given.dtype} of shape {given.shape}"
                    problems.append(f"{what}, here {own.dtype} of shape {tensor.shape}")
            changes.append((own, given))
    return changes


def matching(structure: Structure, tree: Any, name: str, problems: list[str]) -> list[Any]:
    """The values of a saved structure; empty, with a problem noted, where it is unlike `params`."""
    values = structure.saved(tree)
    if values is None:
        problems.append(f"its {name!r} does not have the structure of params")
    return values or []


def noting(problems: list[str], function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives; None, with its complaint noted, where it refuses."""
    try:
        return function(*arguments)
    except (TypeError, ValueError) as problem:
        problems.append(str(problem))
        return None


def keys_of(thing: Any) -> str:
    """The keys of a mapping, or whatever it is, for messages."""
    return str(sorted(map(str, thing))) if isinstance(thing, Mapping) else repr(thing)
