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

    def scalars_at(self, kernel: Kernel, hyperparameters: Mapping[str, float], t: int) -> Scalars:
        """The scalars of a kernel at one step.

        Raises
        ------
        ScalarError
            One has no value.
        """
        scalars = Scalars(hyperparameters, t, {name: float(value[0]) for name, value in self.scalars.items()})
        scalars.run(kernel.step_scalars)
        try:
            scalars.run(kernel.tensor_scalars)
        except ScalarError as problem:
            raise ScalarError(f"{self.label}: {problem}") from None
        return scalars
