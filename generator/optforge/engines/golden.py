"""What the self-test of an emitted kernel has to find: a short training on the reference, as one number.

`optforge_selftest` in `templates/runtime/optforge.c` does the same training; what is said there is not repeated here.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from ..core.dtypes import DType
from ..core.functions import FUNCTIONS
from ..core.ir import Kernel, Let
from ..core.scalars import Scalars, Value, check_hyperparameters
from ..core.summation import total
from .numpy import Walk
from .tensor import How

STEPS, SIZE, ARRAYS = 3, 164, 4096
HIGHEST = 64  # a power beyond it is not looked at


class Inexact(Exception):
    """A scalar has the bits of the platform's library."""


class ExactScalars(Scalars):
    """Scalars that are the same everywhere."""

    def compute(self, op: str, values: list[Value]) -> Value:
        """An operation.

        Raises
        ------
        Inexact
            Its value is a library's.
        """
        result = super().compute(op, values)
        if op == "pow" and not exact(values[0], values[1], result):
            raise Inexact
        return result


def exact(base: Value, power: Value, result: Value) -> bool:
    """Whether a power is a number that every library gives."""
    whole = math.isfinite(base) and math.isfinite(result) and float(power).is_integer() and abs(power) <= HIGHEST
    return whole and (base != 0 or power > 0) and Fraction(base) ** int(power) == Fraction(result)


def golden(kernel: Kernel, dtype: DType) -> int:
    """The number; 0 where the bits are not the same everywhere, or where the rule does not take its own defaults."""
    if any(op in FUNCTIONS and FUNCTIONS[op].folds for op in operations(kernel)):
        return 0
    defaults = dict(kernel.hyperparameters)
    taken = {name: leading(value) for name, value in defaults.items()}
    with np.errstate(all="ignore"):
        try:
            try:
                Training(kernel, dtype, taken).scalars(1)
            except ValueError:
                taken = defaults
            return Training(kernel, dtype, taken).run()
        except (Inexact, ValueError):
            return 0


def operations(kernel: Kernel) -> Iterator[str]:
    """The operations of a kernel."""
    roots = [let.expr for group in kernel.scalars for let in group.lets]
    roots += [item.expr if isinstance(item, Let) else item.value for phase in kernel.phases for item in phase.body]
    roots += [expr for phase in kernel.phases for _, expr in phase.stores]
    roots += [expr for _, expr in kernel.state_stores]
    return (expr.op for root in roots for expr in root.walk())


def leading(value: float) -> float:
    """The three leading bits of a number."""
    (bits,) = struct.unpack("<Q", struct.pack("<d", value))
    (cut,) = struct.unpack("<d", struct.pack("<Q", bits & 0xFFFC000000000000))
    return float(cut)


class Training:
    """The training of one tensor."""

    def __init__(self, kernel: Kernel, dtype: DType, hyperparameters: Mapping[str, float]):
        self.kernel, self.hyperparameters, self.beside = kernel, hyperparameters, None
        self.dtype = dtype.numpy
        self.size = min(SIZE, ARRAYS // (2 + len(kernel.state)))
        self.drawn = 0
        info: Any = np.finfo(self.dtype)
        self.tiny = float(info.smallest_subnormal)
        self.p, self.g = self.fill(), self.fill()
        begun = {**hyperparameters, "p": self.p, "g": self.g}
        initial: dict[str, Any] = {
            s.name: begun[s.initial] if isinstance(s.initial, str) else s.initial for s in kernel.state
        }
        self.state = {s.name: float(initial[s.name]) for s in kernel.scalar_state}
        self.arrays = {s.name: self.array(initial[s.name]) for s in kernel.array_state}

    def array(self, values: Any) -> Any:
        """A copy of values, of which there may be one for all elements."""
        return np.array(np.broadcast_to(np.asarray(values, self.dtype), self.size))

    def scales(self, name: str) -> None:
        """Nothing is in blocks."""

    def fill(self) -> Any:
        """Values of an array."""
        drawn = numbers()[self.drawn : self.drawn + self.size]
        self.drawn += self.size
        values = (drawn >> np.uint32(8)) / 8388608 - 1
        values[5::16] = (drawn[5::16] >> np.uint32(24)) * self.tiny
        return values.astype(self.dtype)

    def scalars(self, t: int) -> Scalars:
        """The scalars at the begin of a step.

        Raises
        ------
        ValueError
            One has no value, or the hyperparameters break an assert.
        Inexact
            One is not the same everywhere.
        """
        check_hyperparameters(self.kernel, self.hyperparameters)
        found = ExactScalars(self.hyperparameters, t, self.state, 1.0, self.size, t == 1)
        for group in self.kernel.scalars:
            if group.phase == 0:
                found.run(group)
        return found

    def step(self, t: int) -> list[float]:
        """One step; the norms of its statistics."""
        tensor: Any = self  # it has what a step reads
        walk = Walk(tensor, self.g, self.scalars(t), self.kernel, How())
        for k, phase in enumerate(self.kernel.phases):
            if not phase.optional:
                walk.run(phase)
            for reduction in phase.reductions:
                own = walk.scalars.sums.get(reduction.id, 0.0)
                walk.scalars.totals[reduction.id] = total([own], reduction.kind)
            for group in self.kernel.scalars:
                if group.phase == k + 1:
                    walk.scalars.run(group)
        sums = {what: walk.scalars.sums[id] for what, id in self.kernel.statistics}
        state = {name: float(walk.scalars(expr)) for name, expr in self.kernel.state_stores}
        self.p = self.array(walk.memory["p"])
        self.arrays = {name: self.array(walk.memory[name]) for name in self.arrays}
        self.state |= state
        return [math.sqrt(sums.get(what, 0.0)) for what in ("grad", "clipped", "param", "update")]

    def run(self) -> int:
        """All steps, and what their outcome hashes to."""
        found = 0
        for t in range(1, STEPS + 1):
            found = hashed(found, np.array(self.step(t)))
            self.g = self.fill()
        arrays = [self.p]
        arrays += [np.array([self.state[s.name]]) if s.scalar else self.arrays[s.name] for s in self.kernel.state]
        for array in arrays:
            found = hashed(found, array.astype(np.float64))
        return found


@functools.cache
def numbers() -> Any:
    """What arrays are filled with, one behind the other: p, and the gradients of all steps, one more at the end."""
    drawn, x = [], 1
    for _ in range((2 + STEPS) * SIZE):
        x = (x * 1664525 + 1013904223) % 2**32
        drawn.append(x)
    return np.array(drawn, np.uint32)


def hashed(found: int, values: Any) -> int:
    """The hash with more values, any NaN like any other."""
    for bits in np.where(np.isnan(values), np.float64(np.nan), values).view(np.uint64).tolist():
        found ^= bits
        found = (found << 29 | found >> 35) % 2**64 * 0x9E3779B97F4A7C15 % 2**64
    return found
