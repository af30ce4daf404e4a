"""The passes over elements of a kernel in C, and what they add up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .cscalars import COUNTED, Scalars, leaves, sum_names
from .dtypes import F64, DType
from .emit import Printer
from .ir import Expr, Kernel, Let, Phase, Reduction, Type
from .names import CALLED, Names
from .variables import Variable, Variables


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


def phase_title(kernel: Kernel, k: int) -> str:
    """What the functions of a phase are called."""
    usual = [number for number, phase in enumerate(kernel.phases) if not phase.optional]
    if kernel.phases[k].optional:
        return "scan"
    return "elements" if len(usual) == 1 else f"pass_{usual.index(k) + 1}"


class Elements:
    """The functions of one dtype that run over neighbouring elements."""

    def __init__(
        self,
        kernel: Kernel,
        prefix: str,
        fields: Names,
        dtype: DType,
        scalars: Scalars,
        helper: Callable[[str, DType], str],
    ):
        self.kernel, self.prefix, self.fields, self.dtype = kernel, prefix, fields, dtype
        self.outside, self.helper = scalars, helper

    def comment(self, k: int) -> str:
        """What a phase does."""
        phase = self.kernel.phases[k]
        if phase.optional:
            return "Looks at the gradients first"
        usual = [own for own in self.kernel.phases if not own.optional]
        if len(usual) == 1:
            return "The rule"
        return f"Pass {usual.index(phase) + 1} of {len(usual)}"

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

    def statements(self, phase: Phase, variables: Variables, scope: Names, array: dict[str, str]) -> dict[str, Any]:
        """What is done for one element, number `index`: loads, lines and stores."""
        real, index, observe = self.real(scope), scope.own(self.index), scope.own("observe")

        def leaf(e: Any) -> str:
            return scope.of[e if e.type.uniform else variables.of[e.value]]

        printer = self.printer(leaf, scope)
        loads = []
        for name in phase.loads:
            variable = variables.of[name]
            const = "" if variables.rebound(variable) else "const "
            loads.append(f"{const}{real} {scope.of[variable]} = {array[name]}[{index}];")
        declared = {variables.of[name] for name in phase.loads}
        lines = []
        for item in phase.body:
            if isinstance(item, Reduction):
                lane = f"{scope.of['lanes', item.id]}[{index}]"
                lines.append(self.added(item, printer(item.value), lane, observe, scope))
            elif not variables.copies(item):
                variable = variables.of[item.id]
                kind = ""
                if variable not in declared:
                    kind = f"{'' if variables.rebound(variable) else 'const '}{self.mask if variable.mask else real} "
                    declared.add(variable)
                lines.append(f"{kind}{scope.of[variable]} = {printer(item.expr)};")
        stores = [f"{array[name]}[{index}] = {printer(expr)};" for name, expr in phase.stores]
        return {"index": index, "loads": loads, "lines": lines, "stores": stores}

    # ── what another target of the family says otherwise ────────────────────────────────────────────────────────

    index = "i"
    mask = "int"

    def real(self, scope: Names) -> str:
        """The type of elements."""
        return self.dtype.c

    def printer(self, leaf: Callable[[Expr], str], scope: Names) -> Printer:
        """What prints expressions."""
        return Printer(self.dtype, leaf, self.helper)

    def taken(self, e: Expr, scope: Names) -> str:
        """The line that takes a scalar out of the struct, rounded to the elements' type."""
        cast = f"({self.dtype.c})" if e.type is Type.SCALAR and self.dtype is not F64 else ""
        kind = self.dtype.c if e.type is Type.SCALAR else "int"
        return f"const {kind} {scope.of[e]} = {cast}{scope.own('s')}->{self.outside.fields.of[e]};"

    def signature(self, phase: Phase, scope: Names, array: dict[str, str]) -> dict[str, Any]:
        """Parameters of the function of a phase, and arguments of its calls."""
        count, s, observe = (scope.own(name) for name in ("n", "s", "observe"))
        written = dict(phase.stores)
        asks = any(reduction.observed for reduction in phase.reductions)
        parameters = [f"const {self.prefix}_scalars *{s}", *([f"int {observe}"] if asks else []), f"size_t {count}"]
        parameters += [
            f"{'' if name in written else 'const '}{self.dtype.c} *{self.prefix}_RESTRICT {own}"
            for name, own in array.items()
        ]
        parameters += [
            f"double *{self.prefix}_RESTRICT {scope.of['lanes', reduction.id]}" for reduction in phase.reductions
        ]
        passed = [f"x->{self.fields.of[name]} + i" for name in array]
        passed += [f"lanes[{number}]" for number in range(len(phase.reductions))]
        first = ["s", *(["observe"] if asks else [])]
        return {
            "count": count,
            "parameters": ", ".join(parameters),
            "block_arguments": ", ".join([*first, f"{self.prefix}_LANES", *passed]),
            "rest_arguments": ", ".join([*first, "stop - i", *passed]),
        }

    def added(self, reduction: Reduction, value: str, lane: str, observe: str, scope: Names) -> str:
        """The line that adds an element to its lane."""
        wide = value if self.dtype is F64 else f"(double){value}"
        match reduction.kind:
            case "squares":
                line = f"{lane} += {wide} * {wide};"
            case "sum":
                line = f"{lane} += {wide};"
            case _:
                line = f"{lane} = {self.helper('maximum', F64)}({lane}, fabs({wide}));"
        return f"if ({observe}) {line}" if reduction.observed else line
