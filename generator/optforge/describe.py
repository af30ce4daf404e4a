"""What `optforge show` prints of a rule."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from .diagnostics import printable
from .dtypes import DTYPES, F64
from .emit import Printer
from .ir import Expr, Kernel, Let
from .language import Rule


def describe(rule: Rule, settings: Mapping[str, object]) -> str:
    """A rule's documentation, declarations, compiled form and memory traffic."""
    kernel = rule.kernel(**settings)
    hyperparameters, options = rule.settings(settings)
    accepted = {name: " or ".join(map(str, rule.accepts(name))) for name in options}
    sections = [
        "\n".join(map(printable, f"{rule.name}: {rule.doc.strip()}".split("\n"))) if rule.doc else rule.name,
        block("Rule", rule.definition.formulas.splitlines()),
        block("Hyperparameters", [f"{name} = {value!r}" for name, value in hyperparameters.items()]),
        block("Static options", [f"{name} = {value}    ({accepted[name]})" for name, value in options.items()]),
        block(
            "State",
            [
                f"{s.name}: {'one double per tensor' if s.scalar else 'one value per element'}, starts as {s.initial}"
                for s in kernel.state
            ]
            or ["none"],
        ),
        block("Computed once per step, in double", scalars(kernel, kernel.step_scalars)),
        block("Computed once per tensor, in double", scalars(kernel, kernel.tensor_scalars)),
        block("Memory traffic per element", list(traffic(kernel))),
        f"Hash: {rule.hash}",
    ]
    return "\n\n".join(section for section in sections if section)


def block(title: str, lines: Iterable[str]) -> str:
    """A titled, indented list; empty where there is nothing in it."""
    listed = [f"    {printable(line)}".rstrip() for line in lines]
    return "\n".join([f"{title}:", *listed]) if listed else ""


def scalars(kernel: Kernel, lets: Iterable[Let]) -> list[str]:
    """Scalar bindings as formulas."""
    taken = {state.name for state in kernel.scalar_state}
    names: dict[int, str] = {}
    for let in (*kernel.step_scalars, *kernel.tensor_scalars):  # a name that is bound again is numbered
        versions = itertools.chain([let.name], (f"{let.name}_{k}" for k in itertools.count(2)))
        names[let.id] = next(name for name in versions if name not in taken)
        taken.add(names[let.id])

    def leaf(expr: Expr) -> str:
        return "t" if expr.op == "time" else names[expr.value] if isinstance(expr.value, int) else str(expr.value)

    printer = Printer(F64, leaf, lambda role, kind: role.removeprefix("scalar "))
    return [f"{names[let.id]} = {printer(let.expr)}" for let in lets]


def traffic(kernel: Kernel) -> Iterable[str]:
    """What each phase reads and writes, and how many bytes that is."""
    for k, phase in enumerate(kernel.phases, 1):
        written = [name for name, _ in phase.stores]
        moved = len(phase.loads) + len(written)
        bytes_moved = ", ".join(f"{dtype.bytes * moved} bytes ({dtype.c})" for dtype in DTYPES.values())
        yield f"phase {k}: reads {' '.join(phase.loads) or '-'}, writes {' '.join(written) or '-'}: {bytes_moved}"
