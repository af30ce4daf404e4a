"""The passes over elements of a kernel in CUDA: one text for all dtypes, four elements at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .celements import Elements, phase_title
from .cscalars import COUNTED, leaves, sum_names
from .dtypes import F64, DType
from .emit import POSTFIX, Printer
from .ir import Expr, Kernel, Let, Phase, Reduction, Type
from .names import CALLED, Names
from .variables import Variable, Variables

# Elements of whichever dtype a template is used with: constants are doubles that are rounded to it.
REAL = replace(F64, suffix="")

# A pass that only looks reads so many vectors before it uses one, so that few threads keep memory busy.
IN_FLIGHT = 4


@dataclass(frozen=True)
class Slot:
    """A total that a phase adds up, for each chunk, each tensor and all: of a reduction, or a count beside it."""

    name: str
    kind: str
    phase: int
    observed: bool


class Sums:
    """The totals of all phases, in order."""

    def __init__(self, kernel: Kernel, helper: Callable[[str, DType], str]):
        self.kernel, self.names = kernel, sum_names(kernel)
        self.slots: list[Slot] = []
        for k, phase in enumerate(kernel.phases):
            own = [(self.names[r.id, ""], r.kind, r.observed) for r in phase.reductions]
            own += [(self.names[r.id, what], "sum", True) for r in phase.reductions if r.counts for what in COUNTED]
            self.slots += [Slot(name, kind, k, observed) for name, kind, observed in own]
        self.largest = any(slot.kind == "max" for slot in self.slots)
        self.maximum = helper("maximum", F64) if self.largest else ""

    def of_phase(self, k: int) -> list[Slot]:
        """The totals of one phase."""
        return [slot for slot in self.slots if slot.phase == k]

    def context(self) -> dict[str, Any]:
        """What the templates show."""
        found = dict(self.kernel.statistics)
        deciding = next(r.id for r in self.kernel.phases[0].reductions if r.counts)
        kinds = [{"name": "sum", "join": ("", " + ", ""), "text": "the sum"}]
        if self.largest:
            kinds.append({"name": "max", "join": (f"{self.maximum}(", ", ", ")"), "text": "the largest"})
        firsts = [sum(slot.phase < k for slot in self.slots) for k in range(len(self.kernel.phases) + 1)]
        plain = [sum(not slot.observed for slot in self.of_phase(k)) for k in range(len(self.kernel.phases))]
        return {
            "firsts_observed": [first + own for first, own in zip(firsts, plain, strict=False)],
            "slots": [slot.name for slot in self.slots],
            "kinds": kinds,
            "firsts": firsts,
            "largest": [slot.name for slot in self.slots if slot.kind == "max"],
            "deciding": self.names[deciding, ""],
            "deciding_nan": self.names[deciding, "nan"],
            "deciding_inf": self.names[deciding, "inf"],
            "grad": self.names[found["grad"], ""],
            "nan": self.names[found["grad"], "nan"],
            "inf": self.names[found["grad"], "inf"],
            "clipped": self.names[found["clipped"], ""],
            "param": self.names[found["param"], ""],
            "changed": self.names[found["update"], ""] if "update" in found else "",
        }


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

    def context(self, k: int, sums: Sums) -> dict[str, Any]:
        """What the templates show of phase k."""
        phase = self.kernel.phases[k]
        written = dict(phase.stores)
        arrays = [
            name
            for name in ("p", "g", *(state.name for state in self.kernel.array_state))
            if name in phase.loads or name in written
        ]
        values = [item.expr if isinstance(item, Let) else item.value for item in phase.body]
        read = leaves([*values, *(expr for _, expr in phase.stores)])
        scope = Names(CALLED, self.prefix)
        variables = Variables(phase)
        scope.enter((Variable(name), name) for name in arrays)
        scope.enter((variable, variable.name) for variable in variables.of.values())
        scope.enter((e, self.outside.spelled(e)) for e in read)
        scope.enter((("lanes", reduction.id), reduction.name) for reduction in phase.reductions)
        array = {name: scope.own(f"{scope.of[Variable(name)]}_") for name in arrays}
        slots = sums.of_phase(k)
        return {
            "number": k,
            "title": phase_title(self.kernel, k),
            "comment": self.comment(k),
            "optional": phase.optional,
            **self.statements(phase, variables, scope, array),
            "scalars": [self.taken(e, scope) for e in read] or [f"(void){scope.own('s')};"],
            "touches": bool(arrays),
            "zeroes": phase.zeroes,
            "observed": any(slot.observed for slot in slots),
            "slots": [
                {
                    "number": number,
                    "kind": slot.kind if slot.kind == "max" else "sum",
                    "observed": slot.observed,
                    "lanes": number < len(phase.reductions),
                }
                for number, slot in enumerate(slots)
            ],
            "lanes": len(phase.reductions),
            "counting": next((number for number, own in enumerate(phase.reductions) if own.counts), None),
            "nan": len(phase.reductions),
            "inf": len(phase.reductions) + 1,
            "unscale": self.outside.fields.of[next(e for e in self.outside.crossing if e.op == "unscale")],
            **self.signature(phase, scope, array),
        }

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
