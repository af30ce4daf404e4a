"""Kernel to C: the `.h` and `.c` of a rule, which `optforge.h` and `optforge.c` run.

Every template has a frozen view: what it shows, prepared here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from ..core.blocks import SCALES
from ..core.dtypes import DTYPES, F64, DType
from ..core.formats import MASTERS, Storage, plain, size
from ..core.ir import Expr, Kernel, Let, Phase, Reduction, ScalarGroup, State
from ..core.names import CALLED, Names, check_prefix, file_of
from . import layout
from .elements import CElements, phase_title
from .rule import Rule
from .scalars import CScalars, c_type, leaves, sum_names
from .source import Source
from .text import c_string, comment, comment_text, fold, render_template, wrapped
from .variables import Variable, Variables

ENDINGS = (".h", ".c")
STATISTICS = ("grad", "clipped", "param", "update")
MOST_SUMS, MOST_PASSES = 32, 16
SLOTS = {what: f"OPTFORGE_{what.upper()}" for what in STATISTICS}


@dataclass(frozen=True)
class SumView:
    """A row of the table of what a pass adds up."""

    name: str
    slot: str
    kind: str
    observed: int
    source: str


@dataclass(frozen=True)
class PassView:
    """A pass over memory of one dtype; `loop` is False where it only adds up what is in memory."""

    number: int
    title: str
    comment: str
    loop: bool
    watches: bool
    writes: int
    zeroes: int
    sums: tuple[SumView, ...]
    uses: str
    index: str
    count: str
    parameters: str
    scalars: tuple[str, ...]
    loads: tuple[str, ...]
    lines: tuple[str, ...]
    stores: tuple[str, ...]
    arguments: str


@dataclass(frozen=True)
class StorageView:
    """All that there is once for each way to store arrays: its tensor and its kernel."""

    suffix: str
    comment: str
    fields: tuple[str, ...]
    formats: str
    master: int
    stochastic: int
    bytes: int
    golden: str


@dataclass(frozen=True)
class DTypeView:
    """All that there is once for each type that is computed with; its tensor is `hidden` where none is stored so."""

    suffix: str
    c: str
    hidden: bool
    fields: tuple[str, ...]
    passes: tuple[PassView, ...]
    storages: tuple[StorageView, ...]


@dataclass(frozen=True)
class FunctionView:
    """A function that computes scalars: declarations, computations, and what crosses to other functions."""

    name: str
    comment: str
    parameters: str
    reads: tuple[str, ...]
    failed: str
    asserts: tuple[str, ...]
    lines: tuple[str, ...]
    writes: tuple[str, ...]
    arguments: str = ""
    behind: int = 0
    unused: str = ""
    direct: tuple[str, ...] = ()


@dataclass(frozen=True)
class RuleView:
    """What both templates of a rule show."""

    prefix: str
    name: str
    hash: str
    summary: str
    comment: str
    brief: str
    size: str
    asserts: tuple[str, ...]
    assert_names: tuple[str, ...]
    assert_comments: tuple[str, ...]
    hyper_comment: str
    hyper_fields: tuple[str, ...]
    hyper_names: str
    hyper_defaults: str
    state_names: str
    initial: tuple[str, ...]
    scalar_state: bool
    init_comment: str
    init_hyper: bool
    reduces: bool
    helpers: tuple[str, ...]
    own_sums: str
    scalar_fields: tuple[str, ...]
    begin: FunctionView
    begin_tensor: FunctionView | None
    step_later: tuple[FunctionView, ...]
    tensor_later: tuple[FunctionView, ...]
    finish: tuple[str, ...]
    finish_reads: bool
    passes: int
    statistics: str
    first: str
    storages: tuple[StorageView, ...]
    dtypes: tuple[DTypeView, ...]


class RuleScalars(CScalars):
    """The scalars of a rule, which the runtime asks for and keeps."""

    straight = True

    def __init__(self, *given: Any, slots: Callable[[int], str]):
        super().__init__(*given)
        self.slot_of = slots

    def argument(self, source: Expr) -> str:
        """What is passed for a scalar that comes from outside."""
        if source.op == "state":
            place = 2 + [state.name for state in self.kernel.state].index(str(source.value))
            return f"*optforge_double(tensor, {place})"
        if source.op in ("sum", "total"):
            assert isinstance(source.value, int)
            return f"{source.op}s[{self.slot_of(source.value)}]"
        return source.op

    def view(self, group: ScalarGroup, behind: int) -> FunctionView:
        """A function of a tensor's scalars, or of those behind a pass."""
        shown = self.function(group)
        what = "a tensor" if group.scope == "tensor" else "all tensors"
        if behind < 0:
            name, text = "tensor_scalars", "What depends on the state or the size of a tensor."
        else:
            name = f"{group.scope}_behind_{behind + 1}"
            text = f"What depends on totals over {what}."
        failed = shown["failed"] if shown["can_fail"] else ""
        written = [e for e in self.crossing if self.made(e) == (group.phase, group.scope == "tensor")]
        direct = () if group.lets else tuple(f"s->{self.fields.of[e]} = {self.argument(e)};" for e in written)
        return FunctionView(
            name,
            text,
            shown["parameters"],
            tuple(shown["reads"]),
            failed,
            (),
            tuple(shown["lines"]),
            tuple(shown["writes"]),
            shown["arguments"],
            behind,
            direct=direct,
        )

    @staticmethod
    def unused(views: Sequence[FunctionView], parameters: Iterable[str]) -> str:
        """What says that an adapter's calls do not take some of its parameters."""
        passed = " ".join(view.arguments for view in views)
        return ", ".join(f"(void){name}" for name in parameters if not re.search(rf"\b{name}\b", passed))


class RuleElements(CElements):
    """The element loops of a rule, which put what the runtime adds up into scratch memory where it is nowhere else."""

    def __init__(self, *given: Any, slots: Callable[[int], str]):
        super().__init__(*given)
        self.slot_of = slots

    def source(self, phase: Phase, reduction: Reduction) -> str:
        """Where the runtime finds the values of a total; empty where the pass has to put them into scratch memory."""
        statistics = dict(self.kernel.statistics)
        inexact = self.kernel.inexact
        if reduction.id == statistics.get("param") and "p" in inexact & {name for name, _ in phase.stores}:
            return "0"  # as it is stored
        if reduction.id == statistics.get("update") and "p" in dict(phase.stores):
            return "OPTFORGE_CHANGE"
        gradients = [r.value for p in self.kernel.phases for r in p.reductions if r.counts]
        if reduction.value in gradients:
            return "OPTFORGE_UNSCALED"
        arrays = ["p", "g", *(state.name for state in self.kernel.state)]
        lets = {let.id: let.expr for let in phase.lets}
        value = reduction.value
        for name, stored in phase.stores:
            if value.op == "ref" and stored == value and name not in inexact:
                return str(arrays.index(name))
        if value.op == "ref" and isinstance(value.value, int):
            value = lets.get(value.value, value)
        if value.op == "load" and value.value not in dict(phase.stores):
            return str(arrays.index(str(value.value)))
        return ""

    def view(self, k: int, number: int) -> PassView:
        """Pass `number`, which is phase k."""
        phase = self.kernel.phases[k]
        sources = {r.id: self.source(phase, r) for r in phase.reductions}
        # Totals of one value share its place in scratch memory, which is filled always if one of them is needed always.
        values = [r.value for r in phase.reductions if not sources[r.id]]
        places = {value: k for k, value in enumerate(dict.fromkeys(values))}
        scratch: dict[int, Reduction] = {}
        for r in phase.reductions:  # those that formulas need come first
            if not sources[r.id]:
                scratch.setdefault(places[r.value], r)
        rows = tuple(
            SumView(
                c_string(r.name),
                self.slot_of(r.id),
                f"OPTFORGE_{r.kind.upper()}",
                int(r.observed),
                sources[r.id] or f"OPTFORGE_SCRATCH - {places[r.value]}",
            )
            for r in phase.reductions
        )
        small = self.needed(phase, [r.id for r in scratch.values()])
        written = dict(small.stores)
        arrays = [n for n in ("p", "g", *(s.name for s in self.kernel.array_state)) if n in small.loads or n in written]
        computed = [item.expr if isinstance(item, Let) else item.value for item in small.body]
        read = leaves([*computed, *(expr for _, expr in small.stores)])
        scope = Names(CALLED, self.prefix)
        variables = Variables(small)
        scope.enter((Variable(name), name) for name in arrays)
        scope.enter((variable, variable.name) for variable in variables.of.values())
        scope.enter((e, self.outside.spelled(e)) for e in read)
        array = {name: scope.own(f"{scope.of[Variable(name)]}_") for name in arrays}
        scope.enter((("lanes", r.id), self.adding(r, variables, scope)) for r in scratch.values())
        adding = [scope.of["lanes", r.id] for r in scratch.values()]
        shown = self.statements(small, variables, scope, array)
        s, count, observe = (scope.own(name) for name in ("s", "n", "observe"))
        watches = any(r.observed for r in small.reductions)
        parameters = [f"const {self.prefix}_scalars *{s}", *([f"int {observe}"] if watches else []), f"size_t {count}"]
        parameters += [
            f"{'' if n in written else 'const '}{self.dtype.c} *OPTFORGE_RESTRICT {own}" for n, own in array.items()
        ]
        parameters += [f"{self.dtype.c} *OPTFORGE_RESTRICT {own}" for own in adding]
        uses = {(True, False): "r", (False, True): "w", (True, True): "b", (False, False): "."}
        every = ["p", "g", *(state.name for state in self.kernel.state)]
        passed = [f"t->{self.fields.of[name]} + i" for name in array]
        passed += [f"scratch + {place} * OPTFORGE_PIECE" if place else "scratch" for place in range(len(adding))]
        return PassView(
            number,
            phase_title(self.kernel, k),
            self.comment(k),
            bool(small.stores or scratch),
            watches,
            int(bool(phase.stores)),
            int(phase.zeroes),
            rows,
            "".join(uses[n in small.loads, n in written] for n in every),
            shown["index"],
            count,
            ", ".join(parameters),
            tuple([self.taken(e, scope) for e in read] or [f"(void){s};"]),
            tuple(shown["loads"]),
            tuple(shown["lines"]),
            tuple(shown["stores"]),
            ", ".join(passed),
        )

    def adding(self, reduction: Reduction, variables: Variables, scope: Names) -> str:
        """The name of the scratch memory for the values of a total."""
        value = reduction.value
        told = scope.of[variables.of[value.value]] if value.op in ("ref", "load") else reduction.name  # type: ignore[index]
        return f"added_{told}"

    @staticmethod
    def needed(phase: Phase, scratch: Iterable[int]) -> Phase:
        """The part of a phase that computes what is stored, and what goes into scratch memory."""
        kept = [r for r in phase.body if isinstance(r, Reduction) and r.id in set(scratch)]
        lets = {let.id: let for let in phase.lets}
        ids: set[int] = set()
        loads: set[str] = set()
        pending = [*(r.value for r in kept), *(expr for _, expr in phase.stores)]
        while pending:
            for e in pending.pop().walk():
                if e.op == "load":
                    loads.add(str(e.value))
                elif e.op == "ref" and e.value in lets and e.value not in ids:
                    ids.add(e.value)  # type: ignore[arg-type]
                    pending.append(lets[e.value].expr)  # type: ignore[index]
        body = tuple(i for i in phase.body if (i.id in ids if isinstance(i, Let) else i in kept))
        return Phase(tuple(n for n in phase.loads if n in loads), body, phase.stores, phase.optional, phase.zeroes)

    def added(self, reduction: Reduction, value: str, lane: str, observe: str, scope: Names) -> str:
        """The line that puts a value where the runtime adds it up."""
        line = f"{lane} = {value};"
        return f"if ({observe}) {line}" if reduction.observed else line


class RuleSource(Source):
    """The `.h` and `.c` of one rule."""

    header = "h"
    build: tuple[str, ...] = (
        "cc -std=c99 -O2 -c {file}.c optforge.c    (with -fopenmp a step runs on several threads)",
    )

    def __init__(
        self,
        rule: Rule,
        kernel: Kernel,
        storages: Sequence[Storage],
        prefix: str,
        given_prefix: str | None,
        settings: dict[str, object],
    ):
        self.storages = storages
        dtypes = [dtype for dtype in DTYPES.values() if any(own.real is dtype for own in storages)]
        super().__init__(rule, kernel, dtypes, prefix, given_prefix, settings)
        kernel = self.kernel
        scales = dict.fromkeys(name + SCALES for own in storages for name in own.scaled)
        self.beside = {name: self.fields.own(name) for name in (*(own.name for own in MASTERS.values()), *scales)}
        self.first = int(kernel.phases[0].optional)  # the runtime itself looks at the gradients first
        self.sum_names = sum_names(kernel)
        statistics = {id: what for what, id in reversed(kernel.statistics)}
        own = [r.id for k in range(self.first, len(kernel.phases)) for r in kernel.phases[k].reductions]
        self.own = [id for id in own if id not in statistics]
        self.slots = {id: SLOTS[what] for id, what in statistics.items()}
        self.slots |= {id: f"{self.prefix}_SUM_{self.sum_names[id, '']}" for id in self.own}

    def inlined(self) -> str:
        """What begins the declaration of a small function."""
        return "OPTFORGE_INLINE"

    def slot(self, id: int) -> str:
        """What indexes the sums that a reduction gives."""
        return self.slots[id]

    def view(self) -> RuleView:
        """What the templates show."""
        kernel, prefix = self.kernel, self.prefix
        asserts = self.assert_statuses()
        scalars = RuleScalars(kernel, prefix, self.hyper, self.fields, self.size, self.helper, slots=self.slot)
        dtypes = tuple(self.dtype_view(dtype, scalars) for dtype in self.dtypes)
        groups = {(group.phase, group.scope == "tensor"): group for group in kernel.scalars}
        tensor_zero = (0, True)
        if any(scalars.made(e) == tensor_zero for e in scalars.crossing):
            groups.setdefault(tensor_zero, ScalarGroup("tensor", 0, ()))
        later = [(group, group.phase - 1 - self.first) for key, group in sorted(groups.items()) if key[0] > 0]
        finish = tuple(
            f"*optforge_double(tensor, {self.place(name)}) = {scalars.stored(expr).replace('own.', 's->')};"
            for name, expr in kernel.state_stores
        )
        statistics = dict(kernel.statistics)
        begin = self.begin_view(scalars, groups.get((0, False), ScalarGroup("step", 0, ())), asserts)
        tensor = scalars.view(groups[tensor_zero], -1) if tensor_zero in groups else None
        step_later = tuple(scalars.view(group, behind) for group, behind in later if group.scope == "step")
        tensor_later = tuple(scalars.view(group, behind) for group, behind in later if group.scope == "tensor")
        if tensor is not None:
            tensor = replace(tensor, unused=scalars.unused([tensor], ("tensor", "size", "starting")))
        if tensor_later:
            unused = scalars.unused(tensor_later, ("sums", "totals"))
            tensor_later = (replace(tensor_later[0], unused=unused), *tensor_later[1:])
        init_hyper = self.init_needs_hyper()
        return RuleView(
            prefix,
            c_string(self.rule.name),
            self.rule.hash,
            self.summary(),
            self.header_comment(),
            self.brief(),
            self.size,
            tuple(c_string(text) for _, text in asserts),
            tuple(name for name, _ in asserts),
            tuple(comment_text(a.text) for a in kernel.asserts),
            self.hyper_comment(),
            tuple(declared(("double", field["name"], field["comment"]) for field in self.hyper_fields())),
            strings(name for name, _ in kernel.hyperparameters),
            ", ".join(field["default"] for field in self.hyper_fields()),
            strings(state.name for state in kernel.state),
            tuple(self.initial_row(state) for state in kernel.state),
            bool(kernel.scalar_state),
            self.init_comment(),
            init_hyper,
            kernel.reduces,
            tuple(self.helpers.values()),
            ", ".join(f"{self.slots[id]}{'' if k else ' = OPTFORGE_OWN'}" for k, id in enumerate(self.own)),
            tuple(declared((c_type(e), scalars.fields.of[e], "") for e in scalars.crossing)),
            begin,
            tensor,
            step_later,
            tensor_later,
            finish,
            any("s->" in line for line in finish),
            len(kernel.phases) - self.first,
            ", ".join(self.slots[statistics[what]] if what in statistics else "OPTFORGE_NONE" for what in STATISTICS),
            self.storages[0].suffix,
            tuple(map(self.storage_view, self.storages)),
            dtypes,
        )

    def summary(self) -> str:
        """What the rule is, in a line."""
        return self.rule.doc.strip().partition("\n")[0] or "an update rule."

    def brief(self) -> str:
        """The comment at the head of the `.c`."""
        lines = [
            *wrapped(f"{self.rule.name}: {self.summary()}"),
            f"What is computed, and where it is from: {self.file}.{self.header}.",
        ]
        lines += ["Generated by optforge. This file may be used, changed and distributed without restriction."]
        return comment(lines)

    def place(self, name: str) -> int:
        """The number of a state among the arrays of a tensor."""
        return 2 + [state.name for state in self.kernel.state].index(name)

    def dtype_view(self, dtype: DType, scalars: CScalars) -> DTypeView:
        """What there is of one dtype."""
        elements = RuleElements(self.kernel, self.prefix, self.fields, dtype, scalars, self.helper, slots=self.slot)
        passes = tuple(elements.view(k, k - self.first) for k in range(self.first, len(self.kernel.phases)))
        usual = plain(dtype, self.arrays())
        stored = tuple(self.storage_view(own) for own in self.storages if own.real is dtype)
        hidden = all(own.suffix != dtype.suffix for own in stored)
        return DTypeView(dtype.suffix, dtype.c, hidden, tuple(self.stored_fields(usual)), passes, stored)

    def stored_fields(self, storage: Storage) -> Iterator[str]:
        """Declarations of the arrays in the struct of a tensor."""
        scalar = {state.name for state in self.kernel.scalar_state}
        for name in ("p", "g", *(state.name for state in self.kernel.state)):
            kind = "double" if name in scalar else storage[name].c
            yield f"{'const ' if name == 'g' else ''}{kind} *{self.fields.of[name]}"
        if storage.beside is not None:
            yield f"{storage.beside.format.c} *{self.beside[storage.beside.name]}"
        for name in storage.scaled:
            yield f"float *{self.beside[name + SCALES]}"

    def storage_view(self, storage: Storage) -> StorageView:
        """What there is of one way to store arrays."""
        scalar = {state.name for state in self.kernel.scalar_state}
        names = ["p", "g", *(state.name for state in self.kernel.state)]
        formats = ["OPTFORGE_SCALAR" if n in scalar else f"OPTFORGE_{storage[n].name.upper()}" for n in names]
        formats += [f"OPTFORGE_{storage.beside.code}"] if storage.beside is not None else []
        formats += ["OPTFORGE_ABSMAX" for _ in storage.scaled]
        usual = all(own.name == storage.real.suffix for _, own in storage.formats)
        found = self.rule.golden(self.kernel, storage.real) if usual else 0
        return StorageView(
            storage.suffix,
            storage.comment(),
            tuple(self.stored_fields(storage)),
            ", ".join(formats),
            len(names) if storage.master else 0,
            int(storage.stochastic),
            round(self.moved(storage)),
            f"{found:#018x}u" if found else "0",
        )

    def traffic(self) -> str:
        """Bytes that a step moves per element, for each way to store arrays."""
        return ", ".join(f"{own.title} {size(self.moved(own))}" for own in self.storages)

    def moved(self, storage: Storage) -> float:
        """Bytes that a plain step moves per element."""
        phases = [phase for phase in self.kernel.phases if not phase.optional]
        return sum(storage.moved(phase.loads, (name for name, _ in phase.stores)) for phase in phases)

    def emitted_flags(self) -> list[str]:
        """The options of the command line that say how arrays are stored."""
        usual = [own.suffix for own in self.storages if own.suffix in DTYPES]
        return [*(f"--dtype {own}" for own in usual), *(flag for own in self.storages for flag in own.flags())]

    def begin_view(self, scalars: CScalars, group: ScalarGroup, asserts: list[tuple[str, str]]) -> FunctionView:
        """The function that computes what depends on hyperparameters and t alone."""
        shown = scalars.begin_step(group, [name for name, _ in asserts], every=False)
        scalars_, hyper = shown["passed"]
        parameters = [
            f"void *{scalars_}",
            f"const void *{hyper}",
            f"uint64_t {shown['steps']}",
            f"double {shown['unscale']}",
        ]
        checks = tuple(
            f"if (!({own['condition']}))\n        return OPTFORGE_ERROR_ASSERT{f' + {k}' if k else ''};"
            for k, own in enumerate(shown["asserts"])
        )
        own, given = f"{self.prefix}_scalars", f"{self.prefix}_hyper"
        reads = [
            f"{own} *{shown['out']} = ({own} *){scalars_};",
            f"const {given} *{shown['hyper']} = (const {given} *){hyper};",
            *shown["reads"],
        ]
        if not any(re.search(rf"\b{shown['steps']}\b", line) for line in reads):
            reads.append(f"(void){shown['steps']};")
        return FunctionView(
            "begin",
            "What depends on hyperparameters and t alone.",
            ", ".join(parameters),
            tuple(reads),
            shown["failed"] if shown["can_fail"] else "",
            checks,
            tuple(shown["lines"]),
            tuple(shown["writes"]),
        )

    def initial_row(self, state: State) -> str:
        """How a state begins, as the runtime's table has it."""
        if state.initial in ("p", "g"):
            return f"{{OPTFORGE_FROM_{str(state.initial).upper()}, 0.0}}"
        if isinstance(state.initial, str):
            names = [name for name, _ in self.kernel.hyperparameters]
            return f"{{{names.index(state.initial)}, 0.0}}"
        return f"{{OPTFORGE_FROM_VALUE, {F64.constant(state.initial)}}}"


def declared(fields: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    """Declarations of fields, each a type, a name and a comment: neighbours of one type without a comment in one."""
    for (kind, said), run in groupby(fields, key=lambda field: (field[0], field[2])):
        names = [name for _, name, _ in run]
        yield from [f"{kind} {name};{said}" for name in names] if said else [f"{kind} {', '.join(names)};"]


def strings(names: Iterable[str]) -> str:
    """The members of an array of strings, NULL behind them."""
    return ", ".join([*map(c_string, names), "NULL"])


def render(
    rule: Rule,
    kernel: Kernel,
    storages: Sequence[Storage],
    prefix: str | None = None,
    settings: Mapping[str, object] | None = None,
    single: bool = False,
) -> dict[str, str]:
    """The files of a rule: name to text. A `single` pair needs nothing else; otherwise the runtime's are among them."""
    text = rule_text(rule, kernel, storages, prefix, settings, ("--single",) if single else ())
    return layout.single(text) if single else {**layout.split(text), **layout.runtime()}


def rule_text(
    rule: Rule,
    kernel: Kernel,
    storages: Sequence[Storage],
    prefix: str | None = None,
    settings: Mapping[str, object] | None = None,
    flags: tuple[str, ...] = (),
) -> layout.RuleText:
    """What a rule's files say, whatever files that become; `flags` are of the command that emits them."""
    return view_text(rule_view(rule, kernel, storages, prefix, settings, flags))


def rule_view(
    rule: Rule,
    kernel: Kernel,
    storages: Sequence[Storage],
    prefix: str | None = None,
    settings: Mapping[str, object] | None = None,
    flags: tuple[str, ...] = (),
) -> RuleView:
    """What the templates of a rule show; `flags` are of the command that emits its files."""
    check_prefix(prefix)
    own = file_of(rule.name) if prefix is None else prefix
    source = RuleSource(rule, kernel, storages, own, prefix, dict(settings or {}))
    source.flags = flags
    return source.view()


def loops(rule: Rule, kernel: Kernel, storages: Sequence[Storage], settings: Mapping[str, object]) -> str:
    """The loops over elements of a rule's first dtype, as they stand in its `.c`."""
    view = rule_view(rule, kernel, storages, None, settings)
    first = replace(view, dtypes=view.dtypes[:1])
    return fold(render_template("loops.c.j2", {"r": first}).strip("\n"), everywhere=True)


def view_text(view: RuleView) -> layout.RuleText:
    """A rule's text."""
    declared, defined = (
        fold(render_template(f"rule.{kind}.j2", {"r": view}).strip("\n"), everywhere=True) for kind in "hc"
    )
    return layout.RuleText(view.prefix, view.comment, view.brief, declared, defined)
