"""The passes over elements of a kernel, line by line, for all targets of the C family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.dtypes import F64, DType
from ..core.ir import Expr, Kernel, Phase, Reduction, Type
from ..core.names import Names
from .printer import Printer
from .scalars import CScalars
from .variables import Variables


def phase_title(kernel: Kernel, k: int) -> str:
    """What the functions of a phase are called."""
    usual = [number for number, phase in enumerate(kernel.phases) if not phase.optional]
    if kernel.phases[k].optional:
        return "scan"
    return "elements" if len(usual) == 1 else f"pass_{usual.index(k) + 1}"


class CElements:
    """The functions of one dtype that run over neighbouring elements."""

    def __init__(
        self,
        kernel: Kernel,
        prefix: str,
        fields: Names,
        dtype: DType,
        scalars: CScalars,
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

    def added(self, reduction: Reduction, value: str, lane: str, observe: str, scope: Names) -> str:
        """The line that adds an element up."""
        raise NotImplementedError
