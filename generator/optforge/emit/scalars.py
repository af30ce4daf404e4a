"""The scalars of a kernel in C: a struct of those that cross from one function to another, and what computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..core import bounds
from ..core.diagnostics import UsageError
from ..core.dtypes import F64, DType
from ..core.ir import Expr, Kernel, Let, ScalarGroup, Type
from ..core.names import CALLED, Names
from .printer import LEAVES, Printer

Key = tuple[int, bool]  # before which phase, and whether per tensor


def leaves(expressions: Iterable[Expr]) -> list[Expr]:
    """The scalars that expressions read, each once, in order."""
    found: dict[Expr, None] = {}
    for expr in expressions:
        for e in expr.walk():
            if e.type.uniform and e.op in LEAVES:
                found[e] = None
    return list(found)


COUNTED = ("nan", "inf")


def sum_names(kernel: Kernel) -> dict[Any, str]:
    """What the enumerator of each total ends with: by the reduction's id and "", or what is counted beside it."""
    names = Names()
    wanted = [((r.id, what), f"{r.name}{what and '_'}{what}") for r in kernel.reductions for what in ("", *COUNTED)]
    names.enter(wanted)
    return {key: names.of[key] for key, _ in wanted}


def c_type(scalar: Expr, real: str = "double") -> str:
    """The C type of a scalar."""
    return "int" if scalar.type is Type.CONDITION else real


class CScalars:
    """Where each scalar is computed, and under which name it crosses to where it is read.

    `helper` serves what is computed before a step, `later` what is computed per tensor or behind sums, which another
    target does elsewhere, with doubles of the type `real`.
    """

    straight = False  # whether what no other line reads is computed straight into the struct

    def __init__(
        self,
        kernel: Kernel,
        prefix: str,
        hyper: Names,
        fields: Names,
        size: str,
        helper: Callable[[str, DType], str],
        later: Callable[[str, DType], str] | None = None,
        real: str = "double",
    ):
        self.kernel, self.prefix, self.hyper, self.tensor, self.size = kernel, prefix, hyper, fields, size
        self.helper, self.later, self.real = helper, later or helper, real
        self.lets: dict[int, Let] = {let.id: let for group in kernel.scalars for let in group.lets}
        self.reductions = {reduction.id: reduction for reduction in kernel.reductions}
        self.sums = sum_names(kernel)
        self.place: dict[Expr, Key] = {
            let.ref: (group.phase, group.scope == "tensor") for group in kernel.scalars for let in group.lets
        }
        crossing = dict.fromkeys([Expr("unscale", Type.SCALAR), *leaves(expr for _, expr in kernel.state_stores)])
        for phase in kernel.phases:
            values = [item.expr if isinstance(item, Let) else item.value for item in phase.body]
            crossing |= dict.fromkeys(leaves([*values, *(expr for _, expr in phase.stores)]))
        for group in kernel.scalars:
            own = (group.phase, group.scope == "tensor")
            read = leaves(let.expr for let in group.lets)
            crossing |= dict.fromkeys(e for e in read if self.made(e) != own)
        crossing = {e: None for e in crossing if e.op not in ("sum", "total")}
        if len(crossing) > bounds.SCALARS:
            what = f"{len(crossing):,} scalars, of at most {bounds.SCALARS}"
            raise UsageError(f"rule {kernel.name!r} is too large: what is done with its elements reads {what}")
        self.crossing = sorted(crossing, key=self.made)
        self.fields = Names()
        self.fields.enter((e, self.spelled(e)) for e in self.crossing)

    def made(self, leaf: Expr) -> Key:
        """Where a scalar is made: before which phase, and whether per tensor."""
        return self.place.get(leaf, (0, leaf.op in ("state", "starting", "size")))

    def spelled(self, leaf: Expr) -> str:
        """The author's name of a scalar, or the usual one."""
        if leaf.op in ("sum", "total"):
            return self.reductions[leaf.value].name  # type: ignore[index]
        if leaf.op in ("time", "unscale", "starting", "size"):
            return {"time": "t"}.get(leaf.op, leaf.op)
        return self.lets[leaf.value].name if isinstance(leaf.value, int) else str(leaf.value)

    def stored(self, expr: Expr) -> str:
        """The new value of a scalar state."""
        if expr.op == "const":
            return Printer.constant(expr, F64)[0]
        return f"own.{self.fields.of[expr]}"

    # ── the functions ───────────────────────────────────────────────────────────────────────────────────────────

    def begin_step(self, group: ScalarGroup, asserts: list[str], every: bool = True) -> dict[str, Any]:
        """The function that computes the scalars of a step that depend on no reduction.

        It reads `every` hyperparameter, or those alone that something is computed from.
        """
        scope = Names(CALLED | {"NULL"}, self.prefix)
        hypers = [Expr("hyper", Type.SCALAR, value=name) for name, _ in self.kernel.hyperparameters]
        time, unscale = Expr("time", Type.SCALAR), Expr("unscale", Type.SCALAR)
        scope.enter((e, str(e.value)) for e in hypers)
        scope.enter([(time, "t")])
        scope.enter((let.ref, let.name) for let in group.lets)
        scope.enter([(unscale, "unscale")])
        hyper, steps, out, failed = (scope.own(name) for name in ("h", "step", "s", "failed"))
        passed = tuple(scope.own(name) for name in ("scalars", "hyper"))
        printer = Printer(F64, lambda e: scope.of[e], self.helper, f"&{failed}")
        asserted = [
            {"condition": printer(assertion.condition), "status": name}
            for assertion, name in zip(self.kernel.asserts, asserts, strict=True)
        ]
        written = [e for e in self.crossing if self.made(e) == (0, False)]
        lines, writes = self.computed(group, written, out, scope, printer, "double")
        used = leaves([*written, *(let.expr for let in group.lets), *(a.condition for a in self.kernel.asserts)])
        read = [e for e in hypers if every or e in used]
        reads = [f"{scope.of[e]} = {hyper}->{self.hyper.of[e.value]}" for e in read]
        reads = [f"const double {own};" for own in ([", ".join(reads)] if self.straight and reads else reads)]
        if time in leaves(let.expr for let in group.lets) or time in written:
            reads.append(f"const double {scope.of[time]} = (double){steps};")
        if not read:
            reads.append(f"(void){hyper};")
        return {
            "hyper": hyper,
            "passed": passed,
            "steps": steps,
            "unscale": scope.of[unscale],
            "out": out,
            "failed": failed,
            "can_fail": any(f"&{failed}" in text for text in [*lines, *(a["condition"] for a in asserted)]),
            "reads": reads,
            "nan": " || ".join(f"{scope.of[e]} != {scope.of[e]}" for e in hypers),
            "asserts": asserted,
            "lines": lines,
            "writes": writes,
        }

    def function(self, group: ScalarGroup) -> dict[str, Any]:
        """A function that computes a group of scalars: of a tensor, or behind a phase."""
        key = (group.phase, group.scope == "tensor")
        read = leaves(let.expr for let in group.lets)
        written = [e for e in self.crossing if self.made(e) == key]
        given = [e for e in dict.fromkeys([*read, *written]) if e.op in ("sum", "total")]
        if key == (0, True):
            sources = [Expr("state", Type.SCALAR, value=state.name) for state in self.kernel.scalar_state]
            sources += [Expr("starting", Type.CONDITION), Expr("size", Type.SCALAR)]
            given = [e for e in sources if e in [*read, *written]]
        scope = Names(CALLED, self.prefix)
        scope.enter((e, self.spelled(e)) for e in [*given, *read])
        scope.enter((let.ref, let.name) for let in group.lets)
        out, failed = scope.own("s"), scope.own("failed")
        checked = "" if group.phase else f"&{failed}"
        printer = Printer(F64, lambda e: scope.of[e], self.later, checked)
        lines, writes = self.computed(group, written, out, scope, printer, self.real)
        inside = {*given, *(let.ref for let in group.lets)}
        return {
            "phase": group.phase,
            "parameters": ", ".join(
                [f"{self.prefix}_scalars *{out}", *(f"{c_type(e, self.real)} {scope.of[e]}" for e in given)]
            ),
            "arguments": "".join(f", {self.argument(e)}" for e in given),
            "failed": failed,
            "can_fail": bool(checked) and any(checked in line for line in lines),
            "reads": [
                f"const {c_type(e, self.real)} {scope.of[e]} = {out}->{self.fields.of[e]};"
                for e in read
                if e not in inside
            ],
            "lines": lines,
            "writes": writes,
        }

    def computed(
        self, group: ScalarGroup, written: list[Expr], out: str, scope: Names, printer: Printer, real: str
    ) -> tuple[list[str], list[str]]:
        """The lines that compute scalars, and those that write to the struct `out` what has names of its own."""
        read = set(leaves(let.expr for let in group.lets))
        straight = {e for e in written if self.straight and e in self.place and e not in read}
        lines = [
            f"{out}->{self.fields.of[let.ref]} = {printer(let.expr)};"
            if let.ref in straight
            else f"const {c_type(let.expr, real)} {scope.of[let.ref]} = {printer(let.expr)};"
            for let in group.lets
        ]
        return lines, [f"{out}->{self.fields.of[e]} = {scope.of[e]};" for e in written if e not in straight]

    def argument(self, source: Expr) -> str:
        """What is passed for a scalar that comes from outside."""
        raise NotImplementedError
