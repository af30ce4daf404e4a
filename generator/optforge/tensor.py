"""A parameter with its state, as the Optimizer and the engines hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .arrays import address
from .diagnostics import ScalarError
from .functions import Array
from .ir import Kernel
from .scalars import Scalars


@dataclass
class Tensor:
    """One parameter with its state.

    `p` and `arrays` (state by name) are flat views; `scalars` holds scalar state as float64 arrays of one element.
    `addresses` tells where "p" and each state are. `started` is False until the first step that is applied to it.
    """

    key: Any
    owner: Any
    shape: tuple[int, ...]
    p: Array
    arrays: dict[str, Array]
    scalars: dict[str, Array]
    addresses: dict[str, int]
    started: bool = False

    def place(self, p: Array) -> None:
        """Take the parameter's elements from here on."""
        self.p = p
        self.addresses["p"] = address(p)

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"params[{self.key!r}]"

    def scalars_at(self, kernel: Kernel, hyperparameters: Mapping[str, float], t: int, unscale: float = 1.0) -> Scalars:
        """The scalars of a kernel before the first phase of a step.

        Raises
        ------
        ScalarError
            One has no value.
        """
        state = {name: float(value[0]) for name, value in self.scalars.items()}
        scalars = Scalars(hyperparameters, t, state, unscale, self.p.size, not self.started)
        for group in kernel.scalars:
            if group.phase == 0:
                try:
                    scalars.run(group)
                except ScalarError as problem:
                    where = f"{self.label}: " if group.scope == "tensor" else ""
                    raise ScalarError(f"{where}{problem}") from None
        return scalars


@dataclass
class How:
    """How a step is to be done, beside its hyperparameters.

    `grad_scale` is what gradients are divided by; `starting` says of each tensor whether this is its first step, None
    that it is of none. `stats` are records to fill in, one of all tensors and one of each, or None.
    """

    threads: int = 0
    grad_scale: float = 1.0
    skip_nonfinite: bool = False
    zero_grads: bool = False
    starting: Array | None = None
    stats: Array | None = None
