"""A parameter with its state, as the Optimizer and the engines hold it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import address
from .diagnostics import ScalarError
from .functions import Array
from .ir import Kernel
from .scalars import Scalars, check_hyperparameters
from .spaces import HOST


@dataclass
class Tensor:
    """One parameter with its state.

    `path` leads to it in `params`, as in "[1]['w']"; `group` is the number of its group, which is a row of the
    hyperparameters. `p` and `arrays` (state by name) are flat views in a `space`; `scalars` holds scalar state there as
    float64 arrays of one element. `addresses` tells where "p" and each state are, `home` where its owner has the
    parameter. `started` is False until the first step that is applied to it. `stream` is its number among all tensors;
    `beside` is the array from which p is rounded, if there is one: floats, or 16 bits that p leaves.
    """

    path: str
    group: int
    owner: Any
    shape: tuple[int, ...]
    p: Any
    arrays: dict[str, Any]
    scalars: dict[str, Any]
    addresses: dict[str, int]
    started: bool = False
    space: Any = HOST
    home: int = 0
    stream: int = 0
    beside: Any = None

    def place(self, p: Any) -> None:
        """Take the parameter's elements from here on."""
        self.p = p
        self.addresses["p"] = address(p)
        self.home = address(self.space.memory(p))

    def number(self, name: str) -> float:
        """The value of a scalar state."""
        return float(self.space.read(self.scalars[name])[0])

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"params{self.path}"

    @property
    def gradient_label(self) -> str:
        """What messages call its gradient."""
        return f"grads{self.path}"

    def scalars_at(self, kernel: Kernel, hyperparameters: Array, t: int, unscale: float = 1.0) -> Scalars:
        """The scalars of a kernel before the first phase of a step, from the hyperparameters of all groups.

        Raises
        ------
        ScalarError
            One has no value.
        """
        state = {name: self.number(name) for name in self.scalars}
        named = named_values(kernel, hyperparameters, self.group)
        scalars = Scalars(named, t, state, unscale, self.p.size, not self.started)
        for group in kernel.scalars:
            if group.phase == 0:
                try:
                    scalars.run(group)
                except ScalarError as problem:
                    several = f"groups[{self.group}]: " if len(hyperparameters) > 1 else ""
                    where = f"{self.label}: " if group.scope == "tensor" else several
                    raise ScalarError(f"{where}{problem}") from None
        return scalars


class Progress:
    """How far an optimizer is, which an engine tells as it does a step.

    Attributes
    ----------
    steps : array
        The number of steps that were applied, in memory that is written together with what a step changes.
    count : memoryview
        The same.
    undecided : bool
        Whether there are more steps, of which a device knows whether they were applied.
    unfinished : str
        What is under way, or was interrupted, where that leaves a part of it written.
    """

    def __init__(self) -> None:
        self.steps = np.zeros(1, np.uint64)
        self.count = memoryview(self.steps.data)
        self.undecided = False
        self.unfinished = ""


@dataclass
class How:
    """How a step is to be done, beside its hyperparameters.

    `grad_scale` is what gradients are divided by; `starting` says of each tensor whether this is its first step, None
    that it is of none. `stats` are records to fill in, one of all tensors and one of each, or None. `progress` is told
    that the step was applied, in the same moment. Where it is `stochastic`, arrays of 16 bits are rounded at random,
    by the `seed`.
    """

    threads: int = 0
    grad_scale: float = 1.0
    skip_nonfinite: bool = False
    zero_grads: bool = False
    starting: Array | None = None
    stats: Array | None = None
    progress: Progress | None = None
    stochastic: bool = False
    seed: int = 0


def named_values(kernel: Kernel, hyperparameters: Array, group: int) -> dict[str, float]:
    """The hyperparameters of a group by name, from those of all groups."""
    names = (name for name, _ in kernel.hyperparameters)
    return dict(zip(names, hyperparameters[group].tolist(), strict=False))


def explain(kernel: Kernel, tensors: Iterable[Tensor], hyperparameters: Array, t: int, how: How) -> None:
    """Raise what a step of these tensors fails of, if it is their hyperparameters or a scalar.

    Raises
    ------
    ValueError
        An assert of the rule does not hold.
    ScalarError
        A scalar has no value.
    """
    tensors = list(tensors)
    for group in sorted({tensor.group for tensor in tensors}):
        where = f"groups[{group}]: " if len(hyperparameters) > 1 else ""
        check_hyperparameters(kernel, named_values(kernel, hyperparameters, group), where)
    for tensor in tensors:
        tensor.scalars_at(kernel, hyperparameters, t, 1 / how.grad_scale)
