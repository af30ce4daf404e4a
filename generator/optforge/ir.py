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

    Leaves: `const` (value: float or bool), `hyper` (value: name), `time`, `state` (a scalar state, value: name),
    `load` (an array's element, value: name), `ref` (value: the `id` of a Let).
    Operations: `round` (scalar to element, the only way from one to the other), `neg add sub mul div mod square
    pow`, `lt le gt ge eq ne`, `and or not`, `where` (a mask chooses, element by element), `select` (a condition
    chooses for all elements; only the branch taken is evaluated), and the names of the function table.
    """

    op: str
    type: Type
    args: tuple[Expr, ...] = ()
    value: float | str | int | None = None

    def walk(self) -> Iterator[Expr]:
        """The expression and everything below it."""
        yield self
        for arg in self.args:
            yield from arg.walk()


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
    """A rule with its options chosen: bindings in the order of the text, and what each output ends as."""

    lets: tuple[Let, ...]
    outputs: tuple[tuple[str, Expr], ...]
    asserts: tuple[Assert, ...]
    state: tuple[State, ...]


@dataclass(frozen=True)
class Phase:
    """One pass over memory: the arrays read, the bindings computed for every element, the arrays written."""

    loads: tuple[str, ...]
    lets: tuple[Let, ...]
    stores: tuple[tuple[str, Expr], ...]


@dataclass(frozen=True)
class Kernel:
    """A rule ready for emission: what is computed per step, per tensor and per element.

    `step_scalars` depend on hyperparameters and time alone, `tensor_scalars` on scalar state as well; both are
    doubles (or conditions). `state_stores` are the new values of the scalar state.
    """

    name: str
    hyperparameters: tuple[tuple[str, float], ...]
    state: tuple[State, ...]
    asserts: tuple[Assert, ...]
    step_scalars: tuple[Let, ...]
    tensor_scalars: tuple[Let, ...]
    phases: tuple[Phase, ...]
    state_stores: tuple[tuple[str, Expr], ...]

    @property
    def array_state(self) -> tuple[State, ...]:
        """The state that has one value per element."""
        return tuple(state for state in self.state if not state.scalar)

    @property
    def scalar_state(self) -> tuple[State, ...]:
        """The state that has one double per tensor."""
        return tuple(state for state in self.state if state.scalar)

    @property
    def moved(self) -> tuple[int, int]:
        """Elements read and elements written per element of the parameter, all phases together."""
        return sum(len(phase.loads) for phase in self.phases), sum(len(phase.stores) for phase in self.phases)
