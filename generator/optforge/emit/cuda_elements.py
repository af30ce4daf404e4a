"""The passes over elements of a kernel in CUDA: one text for all dtypes, four elements at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..core.dtypes import F64, DType
from ..core.ir import Expr, Kernel, Let, Reduction, Type
from ..core.names import CALLED, Names
from .elements import CElements, phase_title
from .printer import POSTFIX, Printer
from .scalars import COUNTED, leaves, sum_names
from .variables import Variable, Variables

# Elements of whichever dtype a template is used with: constants are doubles that are rounded to it.
REAL = replace(F64, suffix="")

# Statistics of what is stored, as the runtime calls them.
STORED = {"param": "PARAMETER", "update": "CHANGE"}

# A pass that only looks reads so many vectors before it uses one, so that few threads keep memory busy.
IN_FLIGHT = 4

# Arrays of a pass that adds nothing up, which leave registers for more blocks on a multiprocessor.
FEW = 4


@dataclass(frozen=True)
class Slot:
    """A total that a phase adds up, for each leaf, each tensor and all: of a reduction, or a count beside it."""

    name: str
    kind: str
    phase: int
    observed: bool


class Sums:
    """The totals of all phases, in order: those of a phase that formulas need come first, counts last."""

    def __init__(self, kernel: Kernel):
        self.kernel, self.names = kernel, sum_names(kernel)
        self.slots: list[Slot] = []
        for k, phase in enumerate(kernel.phases):
            own = [(self.names[r.id, ""], r.kind, r.observed) for r in phase.reductions]
            own += [(self.names[r.id, what], "sum", True) for r in phase.reductions if r.counts for what in COUNTED]
            self.slots += [Slot(name, kind, k, observed) for name, kind, observed in own]

    def of_phase(self, k: int) -> list[Slot]:
        """The totals of one phase."""
        return [slot for slot in self.slots if slot.phase == k]

    def first(self, k: int) -> int:
        """The number of the first total of a phase."""
        return sum(slot.phase < k for slot in self.slots)


@dataclass(frozen=True)
class PassView:
    """A pass over memory, for four neighbouring elements: what the runtime asks of it, and its lines."""

    number: int
    title: str
    comment: str
    optional: bool
    watches: bool
    blocks: str
    real: str
    observe: str
    parameters: str
    constants: str
    loads_arrays: str
    stores_arrays: str
    kinds: str
    references: str
    index: str
    scalars: tuple[str, ...]
    loads: tuple[str, ...]
    lines: tuple[str, ...]
    stores: tuple[str, ...]


class CudaPrinter(Printer):
    """Prints element expressions in terms of a type parameter."""

    def __init__(self, leaf: Callable[[Expr], str], helper: Callable[[str, DType], str], real: str):
        super().__init__(REAL, leaf, helper)
        self.real = real

    def constant(self, expr: Expr, dtype: DType) -> tuple[str, int]:  # type: ignore[override]
        """A number, of the type of elements where it stands among them."""
        text, binds = Printer.constant(expr, F64)
        return (f"{self.real}({text})", POSTFIX) if dtype is REAL else (text, binds)


class CudaElements(CElements):
    """The functions that run over four neighbouring elements, as templates over their type."""

    index = "k"
    mask = "bool"

    def view(self, k: int, sums: Sums, rounded: bool = False) -> PassView:
        """What the template shows of phase k; `rounded` where p may be stored as another number than was computed."""
        phase = self.kernel.phases[k]
        written = dict(phase.stores)
        members = ["p", "g", *(state.name for state in self.kernel.state)]
        scalar = {state.name for state in self.kernel.scalar_state}
        arrays = [n for n in members if n not in scalar and (n in phase.loads or n in written)]
        values = [item.expr if isinstance(item, Let) else item.value for item in phase.body]
        read = leaves([*values, *(expr for _, expr in phase.stores)])
        scope = Names(CALLED, self.prefix)
        variables = Variables(phase)
        scope.enter((Variable(name), name) for name in arrays)
        scope.enter((variable, variable.name) for variable in variables.of.values())
        scope.enter((e, self.outside.spelled(e)) for e in read)
        array = {name: scope.own(f"{scope.of[Variable(name)]}_") for name in arrays}
        scope.enter((("lanes", r.id), self.adding(r, variables, scope)) for r in phase.reductions)
        shown = self.statements(phase, variables, scope, array)
        real, s, x, added = self.real(scope), *(scope.own(name) for name in ("s", "x", "added"))
        rows = [f"(&{own})[4] = {x}[{members.index(name)}]" for name, own in array.items()]
        rows += [f"(&{scope.of['lanes', r.id]})[4] = {added}[{j}]" for j, r in enumerate(phase.reductions)]
        plain = sum(not r.observed for r in phase.reductions)
        counted = next((j for j, r in enumerate(phase.reductions) if r.counts), None)
        at_once = 1 if written or phase.zeroes else max(1, IN_FLIGHT // max(1, len(phase.loads)))
        constants = {"NUMBER": k, "FIRST": sums.first(k), "OWN": plain, "ALL": len(phase.reductions)}
        constants |= {"COUNTED": counted} if counted is not None else {}
        constants |= {"ZEROES": 1} if phase.zeroes else {}
        constants |= {"AT_ONCE": at_once} if at_once > 1 else {}
        if rounded and "p" in written:
            told = {id: what for what, id in self.kernel.statistics if what in STORED}
            constants |= {STORED[told[r.id]]: j for j, r in enumerate(phase.reductions) if r.id in told}
        kinds = [f"OPTFORGE_{r.kind.upper()}" for r in phase.reductions]
        return PassView(
            k,
            phase_title(self.kernel, k),
            self.comment(k),
            phase.optional,
            len(phase.reductions) > plain or counted is not None,
            "MORE_BLOCKS" if len(arrays) <= FEW and not plain else "BLOCKS",
            real,
            scope.own("observe"),
            f"const {self.prefix}_scalars &{s}, {real} (&{x})[{len(members)}][4], {real} (&{added})[ALL + 1][4]",
            ", ".join(f"{name} = {value}" for name, value in constants.items()),
            among([members.index(n) for n in arrays if n in phase.loads], len(members), "a"),
            among([members.index(n) for n in arrays if n in written], len(members), "a"),
            "" if set(kinds) <= {"OPTFORGE_SQUARES"} else chosen(kinds, "k"),
            f"{real} {', '.join(rows)};" if rows else "",
            shown["index"],
            tuple(self.taken(e, scope) for e in read) or (f"(void){s};",),
            tuple(shown["loads"]),
            tuple(shown["lines"]),
            tuple(shown["stores"]),
        )

    def adding(self, reduction: Reduction, variables: Variables, scope: Names) -> str:
        """The name of the values of a total."""
        value = reduction.value
        told = scope.of[variables.of[value.value]] if value.op in ("ref", "load") else reduction.name  # type: ignore[index]
        return f"added_{told}"

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

    def added(self, reduction: Reduction, value: str, lane: str, observe: str, scope: Names) -> str:
        """The line that hands a value over to be added up."""
        line = f"{lane} = {value};"
        return f"if ({observe}) {line}" if reduction.observed else line


def among(numbers: Sequence[int], count: int, name: str) -> str:
    """A condition that holds for these of so many numbers."""
    others = [k for k in range(count) if k not in numbers]
    if not others:
        return "true"
    if not numbers:
        return "false"
    if len(others) < len(numbers):
        return " && ".join(f"{name} != {k}" for k in others)
    return " || ".join(f"{name} == {k}" for k in numbers)


def chosen(values: Sequence[str], name: str) -> str:
    """What a number has of these values."""
    usual = max(values, key=values.count)
    others = [f"{name} == {k} ? {value}" for k, value in enumerate(values) if value != usual]
    return " : ".join([*others, usual])
