"""Program to Kernel: drop what is dead, take scalars out of the element loop, order the passes over memory."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .functions import RAISES
from .ir import Expr, Kernel, Let, Phase, Program, Type

LONGEST_NAME = 40


def lower(name: str, hyperparameters: tuple[tuple[str, float], ...], program: Program) -> Kernel:
    """The kernel of a program; operations keep the order and the form in which they were written."""
    lets = {let.id: let for let in program.lets}
    scalar_states = {state.name for state in program.state if state.scalar}
    present = {"p", *(state.name for state in program.state)}
    changed = [(n, expr) for n, expr in program.outputs if n in present and not unchanged(n, expr)]

    live = reachable(lets, [expr for _, expr in changed])
    lifter = Lifter(name, lets, {*present, *dict(hyperparameters), *(let.name for let in program.lets)})
    element_lets = []
    for let in program.lets:
        if let.id in live:
            if let.expr.type.uniform:
                lifter.scalars.append(let)
                lifter.known.setdefault(let.expr, let.ref)
            else:
                lifted = lifter.lift(let.expr, let.name)
                element_lets += [*lifter.take_branches(), Let(let.name, let.id, lifted)]
    stores = tuple((n, lifter.lift(expr, n)) for n, expr in changed if n not in scalar_states)
    state_stores = tuple((n, expr) for n, expr in changed if n in scalar_states)

    per_tensor = depending_on_state(lifter.scalars)
    expressions = [let.expr for let in element_lets] + [expr for _, expr in stores]
    read = {e.value for expr in expressions for e in expr.walk() if e.op == "load"}
    loads = tuple(n for n in ["p", "g", *(state.name for state in program.state)] if n in read)
    return Kernel(
        name,
        hyperparameters,
        program.state,
        program.asserts,
        tuple(let for let in lifter.scalars if let.id not in per_tensor),
        tuple(let for let in lifter.scalars if let.id in per_tensor),
        (Phase(loads, tuple(element_lets), stores),),
        state_stores,
    )


def unchanged(name: str, expr: Expr) -> bool:
    """Whether an output is what was read, so that nothing needs to be written."""
    return expr.op in ("load", "state") and expr.value == name


def reachable(lets: dict[int, Let], roots: Iterable[Expr]) -> set[int]:
    """The ids of the bindings that the roots need."""
    found: set[int] = set()
    pending = list(roots)
    while pending:
        for expr in pending.pop().walk():
            if expr.op == "ref" and expr.value not in found:
                assert isinstance(expr.value, int)
                found.add(expr.value)
                pending.append(lets[expr.value].expr)
    return found


def depending_on_state(scalars: list[Let]) -> set[int]:
    """The ids of the scalars that scalar state enters."""
    found: set[int] = set()
    for let in scalars:
        if any(e.op == "state" or (e.op == "ref" and e.value in found) for e in let.expr.walk()):
            assert isinstance(let.id, int)
            found.add(let.id)
    return found


class Lifter:
    """Takes scalar computations out of element expressions and gives them names, equal ones the same.

    `scalars` holds the scalar bindings in the order of the text. A scalar inside a branch that may not be taken is
    lifted together with its condition, so that it is evaluated only where the author's text evaluates it.

    The branches of a choice between elements get names as well, if they compute something: C compilers vectorise a
    choice between two values, but not always one between two computations.
    """

    def __init__(self, rule: str, lets: dict[int, Let], taken: set[str]):
        self.lets, self.taken = lets, taken | {rule}
        self.next_id = len(lets)
        self.scalars: list[Let] = []
        self.known: dict[Expr, Expr] = {}
        self.branches: list[Let] = []

    def lift(self, expr: Expr, name: str, guard: Expr | None = None) -> Expr:
        """The element expression, which `name` is bound to, with nothing but names and constants for scalars."""
        if expr.type.uniform:
            return self.named(expr, guard)
        if expr.op == "select":
            condition, a, b = expr.args
            chosen = self.named(condition, guard)
            otherwise = Expr("not", Type.CONDITION, (chosen,))
            a, b = self.lift(a, name, both(guard, chosen)), self.lift(b, name, both(guard, otherwise))
            return Expr("select", expr.type, (chosen, self.branch(a, f"{name}_then"), self.branch(b, f"{name}_else")))
        args = tuple(self.lift(arg, name, guard) for arg in expr.args)
        if expr.op == "where":
            args = (args[0], self.branch(args[1], f"{name}_then"), self.branch(args[2], f"{name}_else"))
        return Expr(expr.op, expr.type, args, expr.value)

    def branch(self, expr: Expr, name: str) -> Expr:
        """A branch as a name, unless it is one or a constant already."""
        if not expr.args or expr.op == "round":
            return expr
        let = self.bind(name, expr)
        self.branches.append(let)
        return let.ref

    def take_branches(self) -> list[Let]:
        """The bindings of branches since the last call."""
        taken, self.branches = self.branches, []
        return taken

    def bind(self, name: str, expr: Expr) -> Let:
        """A new binding, under a name of its own."""
        let = Let(self.unused(name), self.next_id, expr)
        self.next_id += 1
        self.lets[let.id] = let
        return let

    def named(self, expr: Expr, guard: Expr | None) -> Expr:
        """A scalar as a name, bound now where it has none."""
        if not expr.args:
            return expr
        telling = name_of(expr, self.lets)
        if guard is not None and may_raise(expr):
            expr = Expr("select", expr.type, (guard, expr, nothing(expr.type)))
        if expr not in self.known:
            let = self.bind(telling, expr)
            self.scalars.append(let)
            self.known[expr] = let.ref
        return self.known[expr]

    def unused(self, name: str) -> str:
        """The name, numbered if the rule has it already."""
        candidate, k = name, 2
        while candidate in self.taken:
            candidate, k = f"{name}_{k}", k + 1
        self.taken.add(candidate)
        return candidate


def both(guard: Expr | None, condition: Expr) -> Expr:
    """The conjunction of two conditions, the first of which may be absent."""
    return condition if guard is None else Expr("and", Type.CONDITION, (guard, condition))


def nothing(kind: Type) -> Expr:
    """The value, never used, of a scalar whose branch is not taken."""
    return Expr("const", kind, value=0.0 if kind is Type.SCALAR else False)


def may_raise(expr: Expr) -> bool:
    """Whether evaluating the scalar can end the step with an error."""
    return any(e.op in RAISES for e in expr.walk())


NUMBERS = {0.0: "zero", 0.5: "half", 1.0: "one", 2.0: "two", 3.0: "three", 4.0: "four", 10.0: "ten"}
INFIX = {"add": "plus", "sub": "minus", "mul": "times", "div": "over", "mod": "mod", "pow": "pow"}
INFIX |= {"lt": "below", "le": "at_most", "gt": "above", "ge": "at_least", "eq": "equals", "ne": "differs_from"}
INFIX |= {"and": "and", "or": "or"}


def name_of(expr: Expr, lets: dict[int, Let]) -> str:
    """A telling name: `1 - beta2**t` is `one_minus_beta2_pow_t`."""
    spoken = say(expr, lets)
    return spoken if spoken is not None and len(spoken) <= LONGEST_NAME and spoken.isidentifier() else "scalar"


def say(expr: Expr, lets: dict[int, Let]) -> str | None:
    """The expression in words; None where that would not be readable."""
    match expr:
        case Expr(op="hyper" | "state", value=str(name)):
            return name
        case Expr(op="time"):
            return "t"
        case Expr(op="ref", value=int(id)):
            return lets[id].name
        case Expr(op="const", value=float(value)):
            return NUMBERS.get(value) or (re.sub(r"[^0-9a-z]", "_", f"{value:g}") if value > 0 else None)
        case Expr(op="select"):
            return None
    words = [say(arg, lets) for arg in expr.args]
    if None in words:
        return None
    match words:
        case [str(a), str(b)] if expr.op in INFIX:
            return f"{a}_{INFIX[expr.op]}_{b}"
        case [str(a)] if expr.op == "square":
            return f"{a}_squared"
        case [str(a)] if expr.op == "neg":
            return f"minus_{a}"
        case _:
            return "_".join([expr.op, *map(str, words)])
