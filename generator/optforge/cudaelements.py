"""The passes over elements of a kernel in CUDA: one text for all dtypes, four elements at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .celements import Elements
from .dtypes import F64, DType
from .emit import POSTFIX, Printer
from .ir import Expr, Phase, Reduction, Type
from .names import Names

# Elements of whichever dtype a template is used with: constants are doubles that are rounded to it.
REAL = replace(F64, suffix="")

# A pass that only looks reads so many vectors before it uses one, so that few threads keep memory busy.
IN_FLIGHT = 4


class CudaPrinter(Printer):
    """Prints element expressions in terms of a type parameter."""

    def __init__(self, leaf: Callable[[Expr], str], helper: Callable[[str, DType], str], real: str):
        super().__init__(REAL, leaf, helper)
        self.real = real

    def constant(self, expr: Expr, dtype: DType) -> tuple[str, int]:  # type: ignore[override]
        """A number, of the type of elements where it stands among them."""
        text, binds = Printer.constant(expr, F64)
        return (f"{self.real}({text})", POSTFIX) if dtype is REAL else (text, binds)


class CudaElements(Elements):
    """The functions that run over four neighbouring elements, as templates over their type."""

    index = "k"
    mask = "bool"

    def real(self, scope: Names) -> str:
        """The type parameter."""
        return scope.own("real")

    def printer(self, leaf: Callable[[Expr], str], scope: Names) -> Printer:
        """What prints expressions."""
        return CudaPrinter(leaf, self.helper, self.real(scope))

    def taken(self, e: Expr, scope: Names) -> str:
        """The line that takes a scalar out of the struct, rounded to the elements' type."""
        field = f"{scope.own('s')}.{self.outside.fields.of[e]}"
        if e.type is Type.SCALAR:
            return f"const {self.real(scope)} {scope.of[e]}({field});"
        return f"const bool {scope.of[e]} = {field} != 0;"

    def signature(self, phase: Phase, scope: Names, array: dict[str, str]) -> dict[str, Any]:
        """Parameters of the function of a phase, and arguments of its call."""
        real, written = self.real(scope), dict(phase.stores)
        names = [name for name in array if name in phase.loads or name in written]
        parameters = [f"const {self.prefix}_scalars &{scope.own('s')}"]
        if phase.reductions:
            parameters.append(f"int {scope.own('live')}")
        parameters += [f"{'' if name in written else 'const '}{real} (&{array[name]})[4]" for name in names]
        parameters += [f"{self.prefix}_f64 (&{scope.of['lanes', r.id]})[4]" for r in phase.reductions]
        fields = {name: self.fields.of[name] for name in names}
        loaded = [fields[name] for name in names if name in phase.loads]
        at_once = 1 if written or phase.zeroes else max(1, IN_FLIGHT // len(loaded))
        row = "[r]" if at_once > 1 else ""
        passed = ["s", *([f"live{row}"] if phase.reductions else []), *(f"{field}_{row}" for field in fields.values())]
        passed += [f"lanes[{number}]" for number in range(len(phase.reductions))]
        return {
            "real": real,
            "observe": scope.own("observe"),
            "parameters": ", ".join(parameters),
            "arguments": ", ".join(passed),
            "arrays": list(fields.values()),
            "loaded": loaded,
            "at_once": at_once,
            "written": [fields[name] for name in names if name in written],
            "adds": any(not reduction.observed for reduction in phase.reductions),
            "cleared": " = ".join(f"lanes[{number}][k]" for number in range(len(phase.reductions))),
        }

    def added(self, reduction: Reduction, value: str, lane: str, observe: str, scope: Names) -> str:
        """The line that adds an element to its lane, if it exists."""
        wide = f"{self.prefix}_f64({value})"
        condition = f"{scope.own('k')} < {scope.own('live')}"
        condition = f"{observe} && {condition}" if reduction.observed else condition
        match reduction.kind:
            case "squares":
                line = f"{lane} += {self.helper('squared', REAL)}({value});"
            case "sum":
                line = f"{lane} += {wide};"
            case _:
                line = f"{lane} = {self.helper('maximum', F64)}({lane}, fabs({wide}));"
        return f"if ({condition}) {line}"
