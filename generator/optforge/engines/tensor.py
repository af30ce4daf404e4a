"""A parameter with its state, as the Optimizer and the engines hold it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.blocks import SCALES
from ..core.diagnostics import ScalarError
from ..core.formats import FORMAT_OF, shown
from ..core.functions import Array
from ..core.ir import Kernel
from ..core.scalars import Scalars, check_hyperparameters
from .arrays import address
from .host import HOST


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

    def scales(self, name: str) -> Any:
        """The scales of a state that is stored in blocks, else None."""
        return self.arrays.get(name + SCALES) if self.is_scaled(name) else None

    def is_scaled(self, name: str) -> bool:
        """Whether a state is stored in blocks."""
        return name in self.arrays and FORMAT_OF[self.arrays[name].dtype].scales

    def has_scales(self, name: str) -> bool:
        """Whether a state is the scales of another."""
        return name.endswith(SCALES) and self.is_scaled(name.removesuffix(SCALES))

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a state: the parameter's, but of scales, of which there is one for each block."""
        return (self.arrays[name].size,) if self.has_scales(name) else self.shape

    def shown(self, name: str) -> Any:
        """A state as users see it: live, in its shape."""
        return shown(self.arrays[name].reshape(self.shape_of(name)))

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
        """The scalars of a kernel before the first phase of the tensor's step t; the hyperparameters are of all groups.

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


@dataclass(frozen=True)
class Since:
    """Who takes part in steps, and how far everybody was when that began.

    Attributes
    ----------
    t : int
        The optimizer's count of steps then.
    counts : array of int64
        The tensors' own.
    taking_part : array of bool
        The tensors that have had a gradient in each step since.
    """

    t: int
    counts: Array
    taking_part: Array


class Progress:
    """How far an optimizer and its tensors are, which an engine tells as it does a step.

    One number is written together with what a step changes: the optimizer's count. From it follow the tensors' own,
    each of which goes along as long as the tensor has a gradient, and stays where it is as long as it has none. So a
    tensor that takes part is always as many steps `behind` as it was, and its t at a step is the optimizer's less that.

    Parameters
    ----------
    tensors : int
        How many there are.

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

    def __init__(self, tensors: int):
        self.steps = np.zeros(1, np.uint64)
        self.count = memoryview(self.steps.data)
        self.undecided = False
        self.unfinished = ""
        self.since = Since(0, np.zeros(tensors, np.int64), np.zeros(tensors, np.bool_))

    @property
    def counts(self) -> Array:
        """The applied steps of each tensor."""
        since = self.since
        counts: Array = since.counts + since.taking_part * (int(self.count[0]) - since.t)
        return counts

    def begin(self, t: int, counts: Any) -> None:
        """Go on from these counts of steps: the optimizer's and those of the tensors, one for all or one for each."""
        idle = np.zeros_like(self.since.taking_part)
        self.since = Since(t, np.zeros(len(idle), np.int64) + counts, idle)
        self.count[0] = t

    def are_taking_part(self, places: Sequence[int]) -> bool:
        """Whether these tensors alone have taken part since the last change."""
        return np.flatnonzero(self.since.taking_part).tolist() == places

    def take_part(self, places: Sequence[int]) -> None:
        """Let these tensors alone take part from here on."""
        taking_part = np.zeros_like(self.since.taking_part)
        taking_part[places] = True
        self.since = Since(int(self.count[0]), self.counts, taking_part)

    def behind(self, places: Sequence[int]) -> Array:
        """How many of the optimizer's steps tensors that take part have not taken."""
        behind: Array = (self.since.t - self.since.counts)[places]
        return behind

    def with_more(self, tensors: int) -> Progress:
        """The same of an optimizer with so many new tensors, whose steps are decided."""
        more = Progress(len(self.since.counts) + tensors)
        more.steps, more.count = self.steps, self.count
        more.begin(int(self.count[0]), np.append(self.counts, np.zeros(tensors, np.int64)))
        return more


@dataclass
class How:
    """How a step is to be done, beside its hyperparameters.

    `grad_scale` is what gradients are divided by; `starting` says of each tensor whether this is its first step, None
    that it is of none. `stats` are records to fill in, one of all tensors and one of each, or None. `progress` is told
    that the step was applied, in the same moment. Where it is `stochastic`, arrays of 16 bits are rounded at random,
    by the `seed`; `master` says what is beside p, the last of the state.
    """

    threads: int = 0
    grad_scale: float = 1.0
    skip_nonfinite: bool = False
    zero_grads: bool = False
    starting: Array | None = None
    stats: Array | None = None
    progress: Progress | None = None
    master: str = ""
    stochastic: bool = False
    seed: int = 0


def named_values(kernel: Kernel, hyperparameters: Array, group: int) -> dict[str, float]:
    """The hyperparameters of a group by name, from those of all groups."""
    names = (name for name, _ in kernel.hyperparameters)
    return dict(zip(names, hyperparameters[group].tolist(), strict=False))


def explain(kernel: Kernel, tensors: Iterable[Tensor], hyperparameters: Array, steps: Any, how: How) -> None:
    """Raise what a step of these tensors fails of, if it is their hyperparameters or a scalar.

    `steps` are the tensors' own counts of it, or one for all.

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
    for tensor, t in zip(tensors, np.broadcast_to(steps, len(tensors)).tolist(), strict=True):
        tensor.scalars_at(kernel, hyperparameters, t, 1 / how.grad_scale)
