"""Program to Kernel: drop what is dead, take scalars and reductions out of the element expressions, plan the phases."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from ..core.functions import RAISES, REDUCTIONS
from ..core.ir import Expr, Kernel, Let, Program, Reduction, Type
from .phases import Element, Planner

LONGEST_NAME = 40


def lower(
    name: str,
    hyperparameters: tuple[tuple[str, float], ...],
    program: Program,
    inexact: frozenset[str] = frozenset(),
    cost: Callable[[Iterable[str], Iterable[str]], float] = lambda loads, stores: len([*loads, *stores]),
) -> Kernel:
    """The kernel of a program; operations keep the order and the form in which they were written.

    Arrays that are `inexact` are rounded when they are stored; `cost` is that of a pass by what it loads and stores.
    """
    lets = {let.id: let for let in program.lets}
    scalar_states = {state.name for state in program.state if state.scalar}
    present = {"p", *(state.name for state in program.state)}
    changed = [(n, expr) for n, expr in program.outputs if n in present and not unchanged(n, expr)]

    live = reachable(lets, [expr for _, expr in changed] + [program.unscaled, program.seen])
    lifter = Lifter(name, lets, {*present, *dict(hyperparameters), *(let.name for let in program.lets)})
    for let in program.lets:
        if let.id in live:
            lifter.take(let)
    stores = tuple((n, lifter.lift(expr, n)) for n, expr in changed if n not in scalar_states)
    state_stores = tuple((n, expr) for n, expr in changed if n in scalar_states)
    statistics = observe(lifter, program, dict(stores))
    arrays = ("p", "g", *(state.name for state in program.state if not state.scalar))
    planner = Planner(arrays, lifter.elements, lifter.scalars, lifter.order, stores, inexact, cost)
    planned = planner.plan(statistics)
    return Kernel(
        name,
        hyperparameters,
        program.state,
        program.asserts,
        planned.scalars,
        planned.phases,
        state_stores,
        tuple((what, planned.shared.get(id, id)) for what, id in statistics.items()),
        inexact,
    )


def observe(lifter: Lifter, program: Program, stores: dict[str, Expr]) -> dict[str, int]:
    """Add what the statistics ask for to the elements; gives the reduction of each statistic.

    The norms are of the gradient as it comes in and as the rule sees it, of the parameter behind the step, and of what
    the step adds to it.
    """
    load = Expr("load", Type.ELEMENT, value="p")
    seen = lifter.lift(program.seen, "g")
    found = {"grad": lifter.observed("grad", lifter.lift(program.unscaled, "g"), counts=True)}
    found["clipped"] = found["grad"] if seen == program.unscaled else lifter.observed("clipped", seen)
    found["param"] = lifter.observed("param", stores.get("p", load))
    if "p" in stores:
        old = lifter.add_element(lifter.bind("old_p", load), 0)
        change = lifter.add_element(lifter.bind("change", Expr("sub", Type.ELEMENT, (stores["p"], old.ref))))
        found["update"] = lifter.observed("update", change.ref)
    return found


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


class Lifter:
    """Takes scalar computations and reductions out of element expressions and gives them names, equal ones the same.

    `elements` holds the element bindings and the reductions, `scalars` the scalar bindings, each in the order of the
    text. A scalar inside a branch that may not be taken is lifted together with its condition, so that it is evaluated
    only where the author's text evaluates it. What does not depend on a reduction is taken out of what does: it is
    computed, and may end the step with an error, before anything is written.

    The branches of a choice between elements get names as well, if they compute something: C compilers vectorise a
    choice between two values, but not always one between two computations.
    """

    def __init__(self, rule: str, lets: dict[int, Let], taken: set[str]):
        self.lets, self.taken = lets, taken | {rule}
        self.numbered: dict[str, int] = {}
        self.next_id = len(lets)
        self.elements: list[Element] = []
        self.scalars: list[Let] = []
        self.order: list[Let] = []
        self.known: dict[Expr, Expr] = {}
        self.dependent: set[int] = set()
        self.reductions: dict[tuple[str, Expr], int] = {}
        self.next_reduction = 0

    def take(self, let: Let) -> None:
        """A binding of the program."""
        if let.expr.type.uniform:
            self.add_scalar(Let(let.name, let.id, self.scalar(let.expr, let.name)))
        else:
            self.add_element(Let(let.name, let.id, self.lift(let.expr, let.name)))

    def add_element(self, let: Let, place: int | None = None) -> Let:
        """An element binding whose expression is done."""
        self.elements.insert(len(self.elements) if place is None else place, let)
        self.order.append(let)
        return let

    def add_scalar(self, let: Let) -> None:
        """A scalar binding whose expression is done."""
        self.scalars.append(let)
        self.order.append(let)
        self.known.setdefault(let.expr, let.ref)
        if self.depends(let.expr):
            self.dependent.add(let.id)

    def depends(self, expr: Expr) -> bool:
        """Whether a reduction enters a scalar."""
        return any(
            e.op in ("sum", "total", "reduce") or (e.op == "ref" and e.value in self.dependent) for e in expr.walk()
        )

    # ── elements ────────────────────────────────────────────────────────────────────────────────────────────────

    def lift(self, expr: Expr, name: str, guard: Expr | None = None) -> Expr:
        """The element expression, which `name` is bound to, with nothing but names and constants for scalars."""
        if expr.type.uniform:
            return self.named(expr, name, guard)
        if expr.op == "select":
            condition, a, b = expr.args
            chosen = self.named(condition, name, guard)
            a, b = self.lift(a, name, both(guard, chosen)), self.lift(b, name, both(guard, negated(chosen)))
            return Expr("select", expr.type, (chosen, self.branch(a, f"{name}_then"), self.branch(b, f"{name}_else")))
        args = tuple(self.lift(arg, name, guard) for arg in expr.args)
        if expr.op == "where":
            args = (args[0], self.branch(args[1], f"{name}_then"), self.branch(args[2], f"{name}_else"))
        return Expr(expr.op, expr.type, args, expr.value)

    def branch(self, expr: Expr, name: str) -> Expr:
        """An element expression as a name, unless it is one or a constant already."""
        if not expr.args or expr.op == "round":
            return expr
        return self.add_element(self.bind(name, expr)).ref

    def bind(self, name: str, expr: Expr) -> Let:
        """A new binding, under a name of its own."""
        let = Let(self.unused(name), self.next_id, expr)
        self.next_id += 1
        self.lets[let.id] = let
        return let

    def unused(self, name: str) -> str:
        """The name, numbered if the rule has it already."""
        candidate, k = name, self.numbered.get(name, 2)
        while candidate in self.taken:
            candidate, k = f"{name}_{k}", k + 1
        self.numbered[name] = k
        self.taken.add(candidate)
        return candidate

    # ── scalars ─────────────────────────────────────────────────────────────────────────────────────────────────

    def named(self, expr: Expr, name: str, guard: Expr | None) -> Expr:
        """A scalar as a name, bound now where it has none."""
        if not expr.args and not self.depends(expr):
            return expr
        telling = name_of(expr, self.lets)
        expr = self.scalar(expr, name, guard)
        if guard is not None and self.may_raise(expr):
            expr = Expr("select", expr.type, (guard, expr, nothing(expr.type)))
        if expr.op != "ref" and expr not in self.known:
            self.add_scalar(self.bind(telling, expr))
        return self.known.get(expr, expr)

    def scalar(self, expr: Expr, name: str, guard: Expr | None = None) -> Expr:
        """The scalar, which `name` is bound to, with its reductions done and what does not depend on them taken out."""
        return self.untangled(expr, name, guard, False) if self.depends(expr) else expr

    def untangled(self, expr: Expr, name: str, guard: Expr | None, waits: bool) -> Expr:
        """A part of such a scalar; `waits` says that a reduction decides whether it is evaluated at all."""
        if not self.depends(expr):
            # Where a reduction decides, nobody can know before the first write: the part stays, and never raises.
            return expr if waits or not self.may_raise(expr) else self.named(expr, name, guard)
        if expr.op == "reduce":
            return self.reduce(expr, name)
        args: list[Expr] = []
        for k, arg in enumerate(expr.args):
            inner, late = guard, waits
            if k and expr.op in ("select", "and", "or"):
                taken = args[0] if (expr.op, k) in (("and", 1), ("select", 1)) else negated(args[0])
                inner, late = both(guard, taken), waits or self.depends(args[0])
            args.append(self.untangled(arg, name, inner, late))
        return Expr(expr.op, expr.type, tuple(args), expr.value)

    def may_raise(self, expr: Expr) -> bool:
        """Whether evaluating the scalar can end the step with an error."""
        return any(e.op in RAISES for e in expr.walk()) and not self.depends(expr)

    # ── reductions ──────────────────────────────────────────────────────────────────────────────────────────────

    def reduce(self, expr: Expr, name: str) -> Expr:
        """The scalar that a reduction gives, from its total."""
        function = REDUCTIONS[str(expr.value)]
        value = self.branch(self.lift(expr.args[0], f"{name}_of"), f"{name}_of")
        key = (function.kind, value)
        if key not in self.reductions:
            spoken = say(value, self.lets) or f"{name}_of"
            self.reductions[key] = self.add_reduction(self.unused(f"{spoken}_{function.kind}"), function.kind, value)
        total = Expr("total" if function.every else "sum", Type.SCALAR, value=self.reductions[key])
        match function.finish:
            case "sqrt":
                return Expr("sqrt", Type.SCALAR, (total,))
            case "mean":
                return Expr("div", Type.SCALAR, (total, Expr("size", Type.SCALAR)))
        return total

    def add_reduction(self, name: str, kind: str, value: Expr, observed: bool = False, counts: bool = False) -> int:
        """A new reduction, behind what has been bound so far."""
        made = Reduction(self.next_reduction, name, kind, value, observed, counts)
        self.next_reduction += 1
        # It stands behind its value, which a later binding of the same name replaces.
        places = [k for k, item in enumerate(self.elements, 1) if isinstance(item, Let) and item.ref == value]
        self.elements.insert(places[0] if places and observed else len(self.elements), made)
        return made.id

    def observed(self, what: str, value: Expr, counts: bool = False) -> int:
        """A reduction for the statistics: a sum of squares."""
        value = self.branch(value, f"{what}_of")
        return self.add_reduction(self.unused(f"{what}_squares"), "squares", value, True, counts)


def both(guard: Expr | None, condition: Expr) -> Expr:
    """The conjunction of two conditions, the first of which may be absent."""
    return condition if guard is None else Expr("and", Type.CONDITION, (guard, condition))


def negated(condition: Expr) -> Expr:
    """The opposite of a condition."""
    return Expr("not", Type.CONDITION, (condition,))


def nothing(kind: Type) -> Expr:
    """The value, never used, of a scalar whose branch is not taken."""
    return Expr("const", kind, value=0.0 if kind is Type.SCALAR else False)


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
        case Expr(op="load", value=str(name)):
            return name
        case Expr(op="reduce", value=str(function)):
            inner = say(expr.args[0], lets)
            return inner and f"{function}_of_{inner}"
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
