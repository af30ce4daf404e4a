"""Check a saved state against an optimizer, noting all that does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .functions import Array
from .ir import Kernel
from .scalars import check_hyperparameters
from .settings import real
from .tensor import Tensor


def saved_hyperparameters(kernel: Kernel, saved: Any, problems: list[str]) -> list[float]:
    """The hyperparameters of a state dict, in order; what does not fit is noted."""
    names = [name for name, _ in kernel.hyperparameters]
    if not isinstance(saved, Mapping) or set(saved) != set(names):
        problems.append(f"its hyperparameters are {keys_of(saved)}, here {sorted(names)}")
        return []
    before = len(problems)
    values = {name: noting(problems, real, name, saved[name]) for name in names}
    if len(problems) == before:
        noting(problems, check_hyperparameters, kernel, values)
    return list(values.values())


def saved_state(
    kernel: Kernel, tensors: Sequence[Tensor], saved: Any, problems: list[str]
) -> list[tuple[Array, Array]]:
    """Own state with what a state dict has for it; what does not fit is noted."""
    names = [state.name for state in kernel.state]
    if not isinstance(saved, Mapping) or set(saved) != set(names):
        problems.append(f"its state is {keys_of(saved)}, here {sorted(names)}")
        return []
    changes = []
    for state in kernel.state:
        values = matching(tensors, saved[state.name], state.name, problems)
        for tensor, value in zip(tensors, values, strict=False):
            label = f"state[{state.name!r}][{tensor.key!r}]"
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


def matching(tensors: Sequence[Tensor], tree: Any, name: str, problems: list[str]) -> list[Any]:
    """The values of a saved structure; empty, with a problem noted, where it is unlike `params`."""
    keys = [tensor.key for tensor in tensors]
    if isinstance(tree, Mapping):
        fits = set(tree) == set(keys)
    else:
        fits = isinstance(tree, (list, tuple)) and list(range(len(tree))) == keys
    if not fits:
        problems.append(f"its {name!r} does not have the structure of params")
        return []
    return [tree[key] for key in keys]


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
