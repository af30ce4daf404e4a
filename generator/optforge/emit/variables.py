"""Which C variable each binding of a pass has: names bound again share one where no earlier meaning is alive.

The invariant, which `check` proves of every pass before it is printed: wherever a line reads a binding, the binding's
variable was last assigned by that binding. `x = …` for a name bound again stays a plain assignment, as the rule has it,
where nobody reads the earlier meaning any more; where somebody does, in this pass, after a state was loaded again or in
another part of a composition, the new meaning gets a variable of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..core.ir import Expr, Let, Phase, Type

Meaning = int | str
"""The `id` of a binding, or the name of an array whose element has been loaded."""


@dataclass(frozen=True)
class Variable:
    """A C variable: the author's name that it wants, and a number that tells several of one name apart."""

    name: str
    mask: bool = False
    number: int = 0


class Variables:
    """The variables of one pass.

    Attributes
    ----------
    of : dict
        The variable of each meaning.
    """

    def __init__(self, phase: Phase):
        self.phase = phase
        self.of: dict[Meaning, Variable] = {name: Variable(name) for name in phase.loads}
        last = last_uses(phase)
        holds: dict[Variable, Meaning] = {variable: meaning for meaning, variable in self.of.items()}
        for place, item in enumerate(phase.body):
            if not isinstance(item, Let):
                continue
            mask = item.expr.type is Type.MASK
            variable, number = Variable(item.name, mask), 0
            # A copy of what the variable holds already, such as a state that is loaded again, is no new assignment.
            while variable in holds and copied(item.expr) != holds[variable] and last[holds[variable]] > place:
                number += 1
                variable = Variable(item.name, mask, number)
            if variable in holds and copied(item.expr) == holds[variable]:
                last[item.id] = max(last[item.id], last[holds[variable]])
            holds[variable] = item.id
            self.of[item.id] = variable
        check(phase, self.of)

    def rebound(self, variable: Variable) -> bool:
        """Whether the variable is assigned more than once."""
        assigned = sum(name == variable.name and not variable.number and not variable.mask for name in self.phase.loads)
        for let in self.phase.lets:
            same = self.of[let.id] == variable
            assigned += same and not self.copies(let)
        return assigned > 1

    def copies(self, let: Let) -> bool:
        """Whether a binding is what its variable holds already: x = x."""
        meaning = copied(let.expr)
        return meaning is not None and self.of.get(meaning) == self.of[let.id]


def copied(expr: Expr) -> Meaning | None:
    """The meaning that an expression is, and nothing else."""
    return expr.value if expr.op in ("load", "ref") and isinstance(expr.value, (int, str)) else None


def read(expr: Expr) -> Iterable[Meaning]:
    """The meanings among elements that an expression reads."""
    for e in expr.walk():
        if e.op in ("load", "ref") and not e.type.uniform and isinstance(e.value, (int, str)):
            yield e.value


def last_uses(phase: Phase) -> dict[Meaning, int]:
    """The place in the body where each meaning is read for the last time; what is stored is read behind the body."""
    last: dict[Meaning, int] = dict.fromkeys([*phase.loads, *(let.id for let in phase.lets)], -1)
    for place, item in enumerate(phase.body):
        last |= dict.fromkeys(read(item.expr if isinstance(item, Let) else item.value), place)
    for _, expr in phase.stores:
        last |= dict.fromkeys(read(expr), len(phase.body))
    return last


def check(phase: Phase, variable: Mapping[Meaning, Variable]) -> None:
    """Raise where a line would read another meaning than its expression has."""
    holds: dict[Variable, set[Meaning]] = {variable[name]: {name} for name in phase.loads}

    def right(expr: Expr) -> None:
        for meaning in read(expr):
            if meaning not in holds.get(variable[meaning], ()):
                raise AssertionError(f"{variable[meaning]} is read as {meaning!r} and holds {holds}")

    for item in phase.body:
        right(item.expr if isinstance(item, Let) else item.value)
        if isinstance(item, Let):
            meaning, own = copied(item.expr), variable[item.id]
            kept = holds[own] if meaning is not None and meaning in holds.get(own, ()) else set()
            holds[own] = {item.id, *kept}
    for _, expr in phase.stores:
        right(expr)
