"""The reference: interprets a kernel on NumPy, an array at a time, every operation rounded to the arrays' dtype."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.formats import FORMAT_OF, draw, parted, whole
from ..core.functions import FUNCTIONS, Array
from ..core.ir import Expr, Kernel, Let, Phase, Reduction
from ..core.scalars import Scalars
from ..core.summation import tensor_total, total
from ..emit.rule import Rule
from .inputs import Inputs
from .stats import fill

if TYPE_CHECKING:
    from .tensor import How, Tensor

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


class NumpyElements:
    """Evaluates element expressions over whole arrays."""

    def __init__(self, arrays: Mapping[str, Array], scalars: Scalars):
        self.arrays, self.scalars = arrays, scalars
        self.dtype = arrays["p"].dtype.type  # of what is computed, whatever arrays are stored as
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


class Walk:
    """One step over one tensor, computed without writing: `memory` has what the arrays hold from phase to phase.

    It holds what they were loaded as, and `stored` what they become, in the format that each has.
    """

    def __init__(self, tensor: Tensor, gradient: Array, scalars: Scalars, kernel: Kernel, how: How):
        self.tensor, self.gradient, self.scalars, self.kernel, self.how = tensor, gradient, scalars, kernel, how
        every = {"p": tensor.p, "g": gradient, **tensor.arrays}
        self.formats = {name: FORMAT_OF[array.dtype] for name, array in every.items()}
        scales = {name: [own] for name in every if (own := tensor.scales(name)) is not None}
        self.memory: dict[str, Array] = {
            name: self.formats[name].load(array, *scales.get(name, ())) for name, array in every.items()
        }
        if tensor.beside is not None:
            self.memory["p"] = whole(tensor.p, tensor.beside)
        self.stored: dict[str, Array] = {}
        self.encoded: dict[str, Any] = {}
        self.nan = self.inf = 0

    def run(self, phase: Phase) -> None:
        """One pass."""
        elements = NumpyElements(self.memory, self.scalars)
        with np.errstate(all="ignore"):
            for item in phase.body:
                if isinstance(item, Let):
                    elements.values[item.id] = elements(item.expr)
                else:
                    self.reduce(item, self.observed(item, phase, elements))
            for name, expr in phase.stores:
                value = elements(expr)
                # What was read may itself be what is stored elsewhere (the old parameter as state): keep its old value.
                self.stored[name] = value.copy() if any(value is own for own in self.memory.values()) else value
        self.memory |= self.stored

    def observed(self, reduction: Reduction, phase: Phase, elements: NumpyElements) -> Any:
        """What is added up: of a parameter that is rounded when it is stored the statistics are of what is stored."""
        statistics = dict(self.kernel.statistics)
        new = dict(phase.stores).get("p")
        which = [what for what in ("param", "update") if statistics.get(what) == reduction.id]
        if not which or new is None or "p" not in self.kernel.inexact or not self.rounds("p"):
            return elements(reduction.value)
        stored = self.formats["p"].load(self.encode("p", elements(new)))
        return stored if which == ["param"] else np.subtract(stored, self.memory["p"])

    def rounds(self, name: str) -> bool:
        """Whether an array does not hold what was computed."""
        return self.formats[name].narrow and not (name == "p" and self.tensor.beside is not None)

    def encode(self, name: str, values: Any) -> Any:
        """What is stored of an array's new values, with scales where it is in blocks."""
        if name not in self.encoded:
            tensor, how = self.tensor, self.how
            random = None
            if how.stochastic and self.rounds(name) and not self.formats[name].scales:
                array = ("p", "g", *(state.name for state in self.kernel.state)).index(name)
                random = draw(how.seed, self.scalars.t, tensor.stream, array, 0, tensor.p.size)
            every = np.broadcast_to(values, tensor.p.shape)
            self.encoded[name] = self.formats[name].store(every, random)
        return self.encoded[name]

    def reduce(self, reduction: Reduction, values: Any) -> None:
        """A total over the tensor's elements."""
        whole = np.broadcast_to(values, self.tensor.p.shape)
        self.scalars.sums[reduction.id] = tensor_total(whole, reduction.kind)
        if reduction.counts:
            self.nan, self.inf = int(np.isnan(whole).sum()), int(np.isinf(whole).sum())

    def writes(self) -> list[tuple[Array, Any]]:
        """What was computed, with the arrays that it belongs into."""
        tensor, made = self.tensor, []
        for name, values in self.stored.items():
            if name == "p" and tensor.beside is not None:
                every = np.broadcast_to(values, tensor.p.shape)
                p, beside = parted(every, tensor.beside.dtype, self.formats["p"])
                made += [(tensor.p, p), (tensor.beside, beside)]
            else:
                own = tensor.p if name == "p" else tensor.arrays[name]
                stored = self.encode(name, values) if self.rounds(name) else values
                if (scales := tensor.scales(name)) is not None:
                    stored, largest = stored
                    made.append((scales, largest))
                made.append((own, stored))
        return made


@dataclass(frozen=True)
class NumpyPlan:
    """A prepared step over the tensors that have a gradient."""

    kernel: Kernel
    inputs: Inputs
    behind: Array

    def step(self, hyperparameters: Array, t: int, how: How) -> bool:
        """One step in place, with the hyperparameters of each group; whether it was skipped.

        Raises
        ------
        ScalarError
            A scalar has no value; nothing was written.
        """
        kernel, gradients = self.kernel, self.inputs.gradients
        walks = [
            Walk(tensor, gradient, tensor.scalars_at(kernel, hyperparameters, own, 1 / how.grad_scale), kernel, how)
            for tensor, gradient, own in zip(self.inputs.stepped, gradients, (t - self.behind).tolist(), strict=True)
        ]
        skipped = False
        for k, phase in enumerate(kernel.phases):
            if not (phase.optional and not how.skip_nonfinite):
                for walk in walks:
                    walk.run(phase)
            for reduction in phase.reductions:
                totals = [walk.scalars.sums.get(reduction.id, 0.0) for walk in walks]
                for walk in walks:
                    walk.scalars.totals[reduction.id] = total(totals, reduction.kind)
            if k == 0 and how.skip_nonfinite and any(walk.nan or walk.inf for walk in walks):
                skipped = True
                break
            for walk in walks:
                for group in kernel.scalars:
                    if group.phase == k + 1:
                        walk.scalars.run(group)
        if how.stats is not None:
            self.tell(walks, how.stats, skipped)
        writes: list[tuple[Array, Any]] = []
        if not skipped:
            for walk in walks:
                writes += walk.writes()
                writes += [(walk.tensor.scalars[name], walk.scalars(expr)) for name, expr in kernel.state_stores]
            if how.progress is not None:
                writes.append((how.progress.steps, t))
        if how.zero_grads:
            writes += [(gradient, 0) for gradient in gradients]
        # No bytecode comes between them, and so no exception from outside, such as a KeyboardInterrupt.
        set_all: Callable[..., Any] = operator.setitem
        list(map(set_all, [own for own, _ in writes], repeat(...), [values for _, values in writes]))
        return skipped

    def tell(self, walks: Sequence[Walk], records: Array, skipped: bool) -> None:
        """Fill in the statistics."""
        wanted = dict(self.kernel.statistics)
        if skipped:  # only the first phase has run
            wanted = {"grad": next(r.id for r in self.kernel.phases[0].reductions if r.counts)}
        sums = [{what: walk.scalars.sums[id] for what, id in wanted.items()} for walk in walks]
        together = {what: total([own[what] for own in sums], "squares") for what in wanted}
        counts = [(walk.nan, walk.inf) for walk in walks]
        both = (sum(nan for nan, _ in counts), sum(inf for _, inf in counts))
        fill(records, [together, *sums], [both, *counts], skipped)


class NumpyEngine:
    """Runs a kernel on NumPy."""

    def __init__(self, rule: Rule, kernel: Kernel):
        self.kernel = kernel

    inputs = Inputs

    def plan(self, inputs: Inputs, behind: Array) -> NumpyPlan:
        """Prepare a step over these arrays."""
        return NumpyPlan(self.kernel, inputs, behind)


engine = NumpyEngine
