"""The intermediate form: typed expressions and single-assignment bindings, all immutable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class Type(Enum):
    """What an expression denotes."""

    SCALAR = "scalar"  # an IEEE double, the same for every element
    CONDITION = "condition"  # a truth value, the same for every element
    ELEMENT = "element"  # the dtype of the arrays, one per element
    MASK = "mask"  # a truth value per element
    POISON = "poison"  # an expression in error; takes part in everything silently

    @property
    def uniform(self) -> bool:
        """Whether all elements share the value."""
        return self in (Type.SCALAR, Type.CONDITION)


@dataclass(frozen=True, slots=True)
class Expr:
    """An operation on operands.

    Leaves: `const` (value: float or bool), `hyper` (value: name), `time`, `unscale` (1 / grad_scale), `state` (a scalar
    state, value: name), `starting` (whether this is the tensor's first step), `size` (its number of elements), `sum`
    and `total` (what a Reduction gives for one tensor and for all, value: its `id`), `load` (an array's element,
    value: name), `ref` (value: the `id` of a Let).
    Operations: `round` (scalar to element, the only way there), `reduce` (elements to a scalar, value: its function;
    lowering makes a Reduction of it), `neg add sub mul div mod square pow`, `lt le gt ge eq ne`, `and or not`,
    `where` (a mask chooses, element by element), `select` (a condition chooses for all elements; only the branch taken
    is evaluated), and the names of the function table.
    """

    op: str
    type: Type
    args: tuple[Expr, ...] = ()
    value: float | str | int | None = None

    def walk(self) -> Iterator[Expr]:
        """The expression and everything below it."""
        pending = [self]
        while pending:
            expr = pending.pop()
            yield expr
            pending += expr.args[::-1]


@dataclass(frozen=True, slots=True)
class Let:
    """`name` bound to the value of `expr`, once; `id` tells the bindings of a rebound name apart."""

    name: str
    id: int
    expr: Expr

    @property
    def ref(self) -> Expr:
        """The expression that reads this binding."""
        return Expr("ref", self.expr.type, value=self.id)


@dataclass(frozen=True)
class State:
    """A state of a rule: `initial` is a number, or the name of a parameter, gradient or hyperparameter.

    A scalar state is one double per tensor, any other an array like the parameter.
    """

    name: str
    initial: float | str
    scalar: bool = False


@dataclass(frozen=True)
class Assert:
    """A condition on the hyperparameters, its text, and the author's message."""

    condition: Expr
    text: str
    message: str = ""


@dataclass(frozen=True)
class Program:
    """A rule with its transforms and its options chosen: bindings in order, and what each output ends as.

    `unscaled` is the gradient as it comes in, `seen` the one that the rule sees behind its transforms.
    """

    lets: tuple[Let, ...]
    outputs: tuple[tuple[str, Expr], ...]
    asserts: tuple[Assert, ...]
    state: tuple[State, ...]
    unscaled: Expr
    seen: Expr


@dataclass(frozen=True, slots=True)
class Reduction:
    """A total of `value` over elements, added up by the summation tree.

    `kind` is "squares" (squared in double), "sum" or "max" (of absolute values). One that is `observed` is asked for by
    the statistics, or by the decision to skip a step, and by no formula. The one with `counts` counts NaN and infinity.
    """

    id: int
    name: str
    kind: str
    value: Expr
    observed: bool = False
    counts: bool = False


@dataclass(frozen=True)
class Phase:
    """One pass over memory: arrays read, what is computed for every element, in order, and arrays written.

    An `optional` phase only looks at the gradients, where a step may be skipped and no other phase comes before the
    first write.
    """

    loads: tuple[str, ...]
    body: tuple[Let | Reduction, ...]
    stores: tuple[tuple[str, Expr], ...]
    optional: bool = False
    zeroes: bool = False

    @property
    def lets(self) -> tuple[Let, ...]:
        """The bindings of the body."""
        return tuple(item for item in self.body if isinstance(item, Let))

    @property
    def reductions(self) -> tuple[Reduction, ...]:
        """The totals that the phase adds up: first those that formulas need."""
        found = [item for item in self.body if isinstance(item, Reduction)]
        return tuple(sorted(found, key=lambda reduction: reduction.observed))


@dataclass(frozen=True)
class ScalarGroup:
    """Scalar bindings that are computed together, before phase number `phase` (counted from 0).

    Those of scope "step" are the same for all tensors; those of scope "tensor" depend on a tensor's own state or sums.
    """

    scope: str
    phase: int
    lets: tuple[Let, ...]


@dataclass(frozen=True)
class Kernel:
    """A rule ready for emission: scalars and passes over memory, in turn.

    `scalars` come in the order of their computation. `state_stores` are the new values of the scalar state, known
    behind the last phase. `statistics` gives the reductions (by id) of "grad", "clipped", "param" and "update". Arrays
    that are `inexact` do not hold what was computed: it is rounded when it is stored, and no phase reads it back.
    """

    name: str
    hyperparameters: tuple[tuple[str, float], ...]
    state: tuple[State, ...]
    asserts: tuple[Assert, ...]
    scalars: tuple[ScalarGroup, ...]
    phases: tuple[Phase, ...]
    state_stores: tuple[tuple[str, Expr], ...]
    statistics: tuple[tuple[str, int], ...]
    inexact: frozenset[str] = frozenset()

    @property
    def arrays(self) -> tuple[str, ...]:
        """All that has one value per element, in the order of the signature."""
        return ("p", "g", *(state.name for state in self.array_state))

    @property
    def array_state(self) -> tuple[State, ...]:
        """The state that has one value per element."""
        return tuple(state for state in self.state if not state.scalar)

    @property
    def scalar_state(self) -> tuple[State, ...]:
        """The state that has one double per tensor."""
        return tuple(state for state in self.state if state.scalar)

    @property
    def reductions(self) -> tuple[Reduction, ...]:
        """All totals, in the order of the phases."""
        return tuple(reduction for phase in self.phases for reduction in phase.reductions)

    @property
    def reduces(self) -> bool:
        """Whether a plain step needs a reduction."""
        return any(not reduction.observed for reduction in self.reductions)

    @property
    def moved(self) -> tuple[int, int]:
        """Elements read and elements written per element of the parameter, in all phases of a plain step."""
        usual = [phase for phase in self.phases if not phase.optional]
        return sum(len(phase.loads) for phase in usual), sum(len(phase.stores) for phase in usual)
