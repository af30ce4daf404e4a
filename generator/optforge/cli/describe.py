"""What `optforge show` prints of a rule."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from ..core.blocks import BLOCK, SCALES
from ..core.diagnostics import printable
from ..core.dtypes import F64
from ..core.formats import Storage, Wanted
from ..core.formats import size as shown
from ..core.ir import Expr, Kernel, Reduction
from ..emit.printer import Printer
from ..library.rule import Rule

USUAL = Wanted()


def describe(rule: Rule, settings: Mapping[str, object], wanted: Wanted = USUAL) -> str:
    """A rule's documentation, declarations, compiled form and memory traffic, with arrays stored as is wanted."""
    kernel, storages = rule.stored(wanted, settings)
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
        *(
            block(f"Computed once per {scope}{f' behind phase {phase}' if phase else ''}, in double", lines)
            for scope, phase, lines in computed(kernel)
        ),
        *(block(f"Stored as {own.suffix}", stored(kernel, own)) for own in storages if own.comment()),
        block("Memory traffic per element", list(traffic(kernel, storages))),
        f"Hash: {rule.hash}",
    ]
    return "\n\n".join(section for section in sections if section)


def block(title: str, lines: Iterable[str]) -> str:
    """A titled, indented list; empty where there is nothing in it."""
    listed = [f"    {printable(line)}".rstrip() for line in lines]
    return "\n".join([f"{title}:", *listed]) if listed else ""


def computed(kernel: Kernel) -> Iterable[tuple[str, int, list[str]]]:
    """The groups of scalars, as formulas: once per "step" or "tensor", and behind which phase, or 0."""
    taken = {state.name for state in kernel.scalar_state}
    names: dict[int, str] = {}
    totals = {reduction.id: reduction for reduction in kernel.reductions}
    for let in (let for group in kernel.scalars for let in group.lets):  # a name that is bound again is numbered
        versions = itertools.chain([let.name], (f"{let.name}_{k}" for k in itertools.count(2)))
        names[let.id] = next(name for name in versions if name not in taken)
        taken.add(names[let.id])

    def leaf(expr: Expr) -> str:
        if expr.op in ("sum", "total"):
            over = "all tensors" if expr.op == "total" else "the tensor"
            what = {"squares": "sum of squares", "sum": "sum", "max": "largest |x|"}[totals[expr.value].kind]  # type: ignore[index]
            return f"[{what} of {reduced(kernel, totals[expr.value])} over {over}]"  # type: ignore[index]
        if expr.op in ("time", "size"):
            return {"time": "t", "size": "n"}[expr.op]
        return names[expr.value] if isinstance(expr.value, int) else str(expr.value or expr.op)

    printer = Printer(F64, leaf, lambda role, kind: role.rpartition(" ")[2])
    shift = 0 if kernel.phases[0].optional else 1
    for group in kernel.scalars:
        lines = [f"{names[let.id]} = {printer(let.expr)}" for let in group.lets]
        yield group.scope, group.phase - 1 + shift if group.phase else 0, lines


def reduced(kernel: Kernel, reduction: Reduction) -> str:
    """What a reduction runs over."""
    value = reduction.value
    if value.op == "ref":
        return next(let.name for phase in kernel.phases for let in phase.lets if let.id == value.value)
    return str(value.value)


def stored(kernel: Kernel, storage: Storage) -> list[str]:
    """What each array is stored as, and how many bytes all are."""
    names = [name for name in kernel.arrays if name != "g"]
    lines = [
        f"{name}: {storage[name].name}{f', with a float of {name}{SCALES} for {BLOCK}' if storage[name].scales else ''}"
        for name in kernel.arrays
    ]
    size = sum(storage[name].cost for name in names)
    if storage.beside is not None:
        lines.append(f"{storage.beside.name}: {storage.beside.format.bytes} bytes, from which p is rounded")
        size += storage.beside.format.bytes
    lines.append(
        f"rounding: {'at random, from seed, step, tensor and element' if storage.stochastic else 'to nearest'}"
    )
    return [*lines, f"p and state together: {shown(size)} bytes per element"]


def traffic(kernel: Kernel, storages: Iterable[Storage]) -> Iterable[str]:
    """What each pass reads, adds up and writes, and how many bytes that is."""

    def moved_bytes(passes: Iterable[tuple[Iterable[str], Iterable[str]]]) -> str:
        listed = [(own.title, sum(own.moved(*names) for names in passes)) for own in storages]
        return ", ".join(f"{shown(moved)} bytes ({title})" for title, moved in listed)

    usual = [phase for phase in kernel.phases if not phase.optional]
    passes = [(phase.loads, [name for name, _ in phase.stores]) for phase in usual]
    for k, phase in enumerate(usual, 1):
        written = passes[k - 1][1]
        moved = moved_bytes([passes[k - 1]])
        summed = [f"{WORDS[r.kind]} of {reduced(kernel, r)}" for r in phase.reductions if not r.observed]
        adds = f", adds up {' and '.join(summed)}" if summed else ""
        yield f"phase {k}: reads {' '.join(phase.loads) or '-'}, writes {' '.join(written) or '-'}{adds}: {moved}"
    if len(usual) > 1:
        yield f"together: {moved_bytes(passes)}"
    if kernel.phases[0].optional:
        yield f"with skip_nonfinite, before: reads g: {moved_bytes([(['g'], [])])}"
    yield f"with zero_grads, in passing: writes g: {moved_bytes([([], ['g'])])}"


WORDS = {"squares": "squares", "sum": "the elements", "max": "the largest"}
