"""The reference: interprets a kernel on NumPy, an array at a time, every operation rounded to the arrays' dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..functions import FUNCTIONS, Array
from ..ir import Expr, Kernel
from ..scalars import Scalars

if TYPE_CHECKING:
    from ..language import Rule
    from ..tensor import Tensor

OPERATIONS: dict[str, Callable[..., Any]] = {
    "neg": np.negative,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "where": np.where,
    **{function.name: function.element for function in FUNCTIONS.values()},
}


class Elements:
    """Evaluates element expressions over whole arrays."""

    def __init__(self, arrays: Mapping[str, Array], scalars: Scalars):
        self.arrays, self.scalars = arrays, scalars
        self.dtype = arrays["p"].dtype.type
        self.values: dict[int, Any] = {}

    def __call__(self, expr: Expr) -> Any:
        """The value of an expression."""
        args = expr.args
        if expr.type.uniform:
            return self.scalars(expr)
        match expr.op:
            case "load":
                return self.arrays[str(expr.value)]
            case "ref":
                assert isinstance(expr.value, int)
                return self.values[expr.value]
            case "round":
                return self.dtype(self.scalars(args[0]))
            case "square":
                base = self(args[0])
                return np.multiply(base, base)
            case "select":
                return self(args[1] if self.scalars(args[0]) else args[2])
        return OPERATIONS[expr.op](*map(self, args))


def new_values(kernel: Kernel, arrays: Mapping[str, Array], scalars: Scalars) -> dict[str, Array]:
    """What a step stores into the arrays of one tensor, computed without writing."""
    elements = Elements(arrays, scalars)
    stored: dict[str, Array] = {}
    with np.errstate(all="ignore"):
        for phase in kernel.phases:
            for let in phase.lets:
                elements.values[let.id] = elements(let.expr)
            for name, expr in phase.stores:
                value = elements(expr)
                # What was read may itself be what is stored elsewhere (the old parameter as state): keep its old value.
                stored[name] = value.copy() if any(value is array for array in arrays.values()) else value
    return stored


@dataclass(frozen=True)
class Plan:
    """A prepared step over tensors with their gradients."""

    kernel: Kernel
    tensors: Sequence[Tensor]
    gradients: Sequence[Array]

    def step(self, hyperparameters: Array, t: int, threads: int) -> None:
        """One step in place; `threads` is not used.

        Raises
        ------
        ScalarError
            A scalar has no value; nothing was written.
        """
        named = dict(zip((name for name, _ in self.kernel.hyperparameters), hyperparameters.tolist(), strict=False))
        every = [tensor.scalars_at(self.kernel, named, t) for tensor in self.tensors]
        for tensor, gradient, scalars in zip(self.tensors, self.gradients, every, strict=True):
            stored = new_values(self.kernel, {"p": tensor.p, "g": gradient, **tensor.arrays}, scalars)
            for name, values in stored.items():
                np.copyto(tensor.p if name == "p" else tensor.arrays[name], values)
            for name, expr in self.kernel.state_stores:
                tensor.scalars[name][0] = scalars(expr)


class NumpyEngine:
    """Runs a kernel on NumPy."""

    def __init__(self, rule: Rule, kernel: Kernel):
        self.kernel = kernel

    def plan(self, tensors: Sequence[Tensor], gradients: Sequence[Array]) -> Plan:
        """Prepare steps over these arrays."""
        return Plan(self.kernel, tensors, gradients)


engine = NumpyEngine
