"""Kernel to CUDA: the `.cuh` and `.cu` of a rule, which `optforge.cuh` and `optforge.cu` run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.dtypes import F64, DType
from ..core.formats import Storage
from ..core.functions import FUNCTIONS, RAISES
from ..core.ir import Expr, Kernel, ScalarGroup
from ..core.names import check_prefix, file_of
from . import helpers, layout
from .c import FunctionView, RuleScalars, RuleSource, declared
from .cuda_elements import REAL, CudaElements, PassView, Sums, among
from .elements import phase_title
from .rule import Rule
from .scalars import c_type
from .text import c_string, comment, fold, render_template, wrapped

ENDINGS = (".cuh", ".cu")

FLUSHES = "not with -ftz=true or --use_fast_math, which make subnormal floats 0: steps are errors then"


@dataclass(frozen=True)
class StorageView:
    """All that there is once for each way to store arrays; `own` says how, where they are not all as `real` is.

    There is `much` to compute where p has a master, or rounding is at random.
    """

    suffix: str
    title: str
    comment: str
    real: str
    fields: tuple[str, ...]
    formats: str
    master: int
    much: bool
    own: tuple[str, ...]


@dataclass(frozen=True)
class PhaseView:
    """A row of the table of phases: kernels, by the ends of their names, and what they add up."""

    plain: str
    observed: str
    first: int
    own: int
    all: int
    counted: int
    scans: int


@dataclass(frozen=True)
class RuleView:
    """What both templates of a rule show."""

    prefix: str
    size: str
    asserts: tuple[str, ...]
    assert_names: tuple[str, ...]
    hyper_comment: str
    hyper_fields: tuple[str, ...]
    hyper_names: bool
    hyper_defaults: str
    initial: tuple[str, ...]
    scalar_state: bool
    init_comment: str
    init_hyper: bool
    helpers: tuple[str, ...]
    device_helpers: tuple[str, ...]
    scalar_fields: tuple[str, ...]
    begin: FunctionView
    functions: tuple[FunctionView, ...]
    constants: tuple[str, ...]
    unscale: str
    largest: str
    own: tuple[str, ...]
    attempt: str
    behind: tuple[str, ...]
    finish: tuple[str, ...]
    finish_reads: bool
    stores: int
    sums: tuple[str, ...]
    passes: tuple[PassView, ...]
    phases: tuple[PhaseView, ...]
    storages: tuple[StorageView, ...]


class CudaScalars(RuleScalars):
    """The scalars of a rule, of which the device computes those that depend on tensors and sums."""

    def argument(self, source: Expr) -> str:
        """What is passed for a scalar that comes from outside, of tensor `x`."""
        match source.op:
            case "state":
                place = 2 + [state.name for state in self.kernel.state].index(str(source.value))
                return f"*x.state({place})"
            case "sum":
                assert isinstance(source.value, int)
                return f"x.sum({self.slot_of(source.value)})"
            case "total":
                assert isinstance(source.value, int)
                return f"{self.of_totals}({self.slot_of(source.value)})"
        return f"x.{source.op}()"

    of_totals = "x.total"


class CudaSource(RuleSource):
    """The `.cuh` and `.cu` of one rule."""

    target, header = "cuda", "cuh"
    build: tuple[str, ...] = (
        "nvcc -O3 -arch=sm_75 -c {file}.cu optforge.cu    (or the device's own; sm_70 is the lowest)",
        FLUSHES,
    )

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.device_helpers: dict[str, str] = {}
        self.sums = Sums(self.kernel)

    @staticmethod
    def begin(file: str) -> str:
        """What all names begin with: a rule's C and its CUDA can be in one program."""
        return f"{file}_cuda"

    def inlined(self) -> str:
        """What begins the declaration of a small function of the host."""
        return "static inline"

    def slot(self, id: int) -> str:
        """What indexes the sums that a reduction gives."""
        return f"{self.prefix}_SUM_{self.sums.names[id, '']}"

    def device(self, role: str, kind: DType) -> str:
        """The name of an emitted function of the device, which is emitted because it was asked for."""
        sort, _, word = role.rpartition(" ")
        if sort:
            name = f"{self.prefix}_device_{'' if sort == 'scalar' else 'ieee_'}{helpers.WORDS.get(word, word)}"
            text = helpers.definition(role, kind, f"{self.prefix}_device", "static inline")
            self.device_helpers.setdefault(name, on_device(text))
            return name
        name = f"{self.prefix}_{word}"
        self.device_helpers.setdefault(name, template(word, name))
        return f"{name}<optforge_f64>" if kind is F64 else name  # which takes plain doubles as well

    # ── what the templates read ─────────────────────────────────────────────────────────────────────────────────

    def rule_view(self) -> RuleView:
        """What the templates show."""
        kernel, prefix = self.kernel, self.prefix
        asserts = self.assert_statuses()
        given = (kernel, prefix, self.hyper, self.fields, self.size, self.helper, self.device, "optforge_f64")
        scalars = CudaScalars(*given, slots=self.slot)
        elements = CudaElements(kernel, prefix, self.fields, REAL, scalars, self.device)
        rounded = any("p" in own.inexact for own in self.storages)
        passes = tuple(elements.view(k, self.sums, rounded) for k in range(len(kernel.phases)))
        groups = {(group.phase, group.scope == "tensor"): group for group in kernel.scalars}
        if any(scalars.made(e) == (0, True) for e in scalars.crossing):
            groups.setdefault((0, True), ScalarGroup("tensor", 0, ()))
        begin = self.begin_view(scalars, groups.pop((0, False), ScalarGroup("step", 0, ())), asserts)
        per_tensor = [group for (_, tensor), group in sorted(groups.items()) if tensor]
        tensors = [scalars.view(group, group.phase - 1) for group in per_tensor]
        scalars.of_totals = "total"
        later = [scalars.view(group, key[0] - 1) for key, group in sorted(groups.items()) if not key[1]]
        finish = tuple(f"*x.state({self.place(name)}) = {stored(scalars, expr)};" for name, expr in kernel.state_stores)
        reads = any("s." in line.partition(" = ")[2] for line in finish)
        names = [slot.name for slot in self.sums.slots]
        return RuleView(
            prefix,
            self.size,
            tuple(c_string(text) for _, text in asserts),
            tuple(name for name, _ in asserts),
            self.hyper_comment(),
            tuple(declared(("double", field["name"], field["comment"]) for field in self.hyper_fields())),
            bool(kernel.hyperparameters),
            ", ".join(field["default"] for field in self.hyper_fields()),
            tuple(self.initial_row(state) for state in kernel.state),
            bool(kernel.scalar_state),
            self.init_comment(),
            self.init_needs_hyper(),
            tuple(self.helpers.values()),
            tuple(self.device_helpers.values()),
            tuple(declared((c_type(e, "optforge_f64"), scalars.fields.of[e], "") for e in scalars.crossing)),
            begin,
            (*tensors, *later),
            self.constants(bool(tensors)),
            scalars.fields.of[next(e for e in scalars.crossing if e.op == "unscale")],
            among([k for k, slot in enumerate(self.sums.slots) if slot.kind == "max"], len(names), "slot"),
            tuple(own_lines(prefix, tensors)),
            f"{prefix}_{tensors[0].name}(&s{tensors[0].arguments})" if scalars_can_fail(kernel) else "",
            tuple(f"if (phase == {f.behind})\n            {prefix}_{f.name}(s{f.arguments});" for f in later),
            finish,
            reads,
            int(bool(finish)),
            tuple(f"{prefix}_SUM_{name}" for name in names),
            passes,
            tuple(self.phase_view(own) for own in passes_of(kernel)),
            tuple(map(self.cuda_storage, self.storages)),
        )

    def constants(self, own: bool) -> tuple[str, ...]:
        """What the runtime asks of the rule: numbers of sums, for statistics and to skip a step."""
        kernel, found = self.kernel, dict(self.kernel.statistics)
        names, prefix = self.sums.names, self.prefix
        first = next(r.id for r in kernel.phases[0].reductions if r.counts)
        numbers = [f"ARRAYS = {2 + len(kernel.state)}"]
        numbers += ["OWN = 1"] if own else []
        if kernel.state_stores:
            places = [self.place(state.name) for state in kernel.scalar_state]
            numbers += ["STORES = 1", f"FIRST_SCALAR = {places[0]}"]
        slots = [
            ("FIRST_GRAD", first, ""),
            ("FIRST_NAN", first, "nan"),
            ("GRAD", found["grad"], ""),
            ("GRAD_NAN", found["grad"], "nan"),
            ("CLIPPED", found["clipped"], ""),
            ("PARAM", found["param"], ""),
        ]
        slots += [("UPDATE", found["update"], "")] if "update" in found else []
        return (", ".join(numbers), *(f"{name} = {prefix}_SUM_{names[id, what]}" for name, id, what in slots))

    def phase_view(self, own: Pass) -> PhaseView:
        """A row of the table of phases."""
        phase = self.kernel.phases[own.number]
        counted = next((j for j, r in enumerate(phase.reductions) if r.counts), -1)
        first = self.sums.first(own.number)
        return PhaseView(own.plain, own.observed, first, own.sums, own.all_sums, counted, int(own.optional))

    def cuda_storage(self, storage: Storage) -> StorageView:
        """What there is of one way to store arrays."""
        seen = super().storage_view(storage)
        real = f"optforge_{storage.real.suffix}"
        formats = seen.formats.split(", ")
        own = []
        if storage.master:
            assert storage.beside is not None
            own.append(f"MASTER = OPTFORGE_{storage.beside.code}")
        own += ["STOCHASTIC = 1"] if storage.stochastic else []
        lines = [f"enum {{ {', '.join(own)} }};"] if own else []
        narrow = [form.replace("OPTFORGE_SCALAR", f"OPTFORGE_{storage.real.suffix.upper()}") for form in formats]
        if any(form != f"OPTFORGE_{storage.real.suffix.upper()}" for form in narrow):
            several = gathered(narrow[: 2 + len(self.kernel.state)], "a")
            name = " a" if "a " in several else ""
            lines.append(f"static __device__ constexpr int format(int{name}) {{ return {several}; }}")
        comment_ = comment(wrapped(f"How arrays are stored: {storage.comment()}.")) if lines else ""
        return StorageView(
            storage.suffix,
            storage.title,
            comment_,
            real,
            seen.fields,
            seen.formats,
            seen.master,
            bool(storage.master) or storage.stochastic,
            tuple(lines),
        )


def gathered(values: Sequence[str], name: str) -> str:
    """What a number has of these values: the most frequent one is said last."""
    usual = max(values, key=values.count)
    others = [value for value in dict.fromkeys(values) if value != usual]
    places = {value: [k for k, own in enumerate(values) if own == value] for value in others}
    return " : ".join([*(f"{among(places[v], len(values), name)} ? {v}" for v in others), usual])


def own_lines(prefix: str, functions: Iterable[FunctionView]) -> Iterable[str]:
    """The calls that compute the scalars of a tensor."""
    for function in functions:
        call = f"{prefix}_{function.name}(&s{function.arguments});"
        if function.behind < 0:
            yield f"(void){call}"
        else:
            yield f"if (phase > {function.behind})\n            {call}"


def stored(scalars: CudaScalars, expr: Expr) -> str:
    """The new value of a scalar state."""
    value = scalars.stored(expr)
    return value if expr.op == "const" else f"{value.replace('own.', 's.', 1)}.x"


def on_device(text: str) -> str:
    """A function of doubles as one of the device's doubles: nothing there folds a call in advance."""
    text = re.sub(r", (which no compiler may fold or rewrite|by the library's own function[^;.]*)", "", text)
    text = text.replace("volatile ", "").replace("double ", "optforge_f64 ")
    return text.replace("static ", "static __device__ ")


def template(word: str, name: str) -> str:
    """A function of elements of any type."""
    if word == "square":
        parameters, comment_ = "real x", ""
        body: tuple[str, ...] = ("return x * x;",)
    else:
        row = FUNCTIONS[word]
        parameters = ", ".join(f"real {parameter}" for parameter in row.parameters)
        body = tuple(row.c.format(real="real", zero="real(0.0)", one="real(1.0)").split("\n"))
        comment_ = f"{row.doc}."
    return helpers.function(f"template <typename real>\nOPTFORGE_DEVICE real {name}({parameters})", comment_, body)


@dataclass(frozen=True)
class Pass:
    """What is launched for a phase: kernels by the end of their names, with statistics (`observed`) and without.

    An `optional` one only looks at gradients, where a step may be skipped. `sums` says how many sums of a plain pass go
    on to the tensors and to all, `all_sums` how many with statistics.
    """

    number: int
    plain: str
    observed: str
    optional: bool
    sums: int
    all_sums: int


def passes_of(kernel: Kernel) -> list[Pass]:
    """What is launched for each phase."""
    found = []
    for k, phase in enumerate(kernel.phases):
        title = phase_title(kernel, k)
        plain, observed = ("look", title) if phase.optional else (title, f"{title}_observed")
        if all(not r.observed and not r.counts for r in phase.reductions):
            observed = plain
        own = sum(not r.observed for r in phase.reductions)
        every = len(phase.reductions) + 2 * sum(r.counts for r in phase.reductions)
        found.append(Pass(k, plain, observed, phase.optional, own, every))
    return found


def scalars_can_fail(kernel: Kernel) -> bool:
    """Whether a scalar of a tensor may have no value before the first write."""
    lets = [let for group in kernel.scalars if (group.scope, group.phase) == ("tensor", 0) for let in group.lets]
    return any(e.op in RAISES for let in lets for e in let.expr.walk())


def render(
    rule: Rule,
    kernel: Kernel,
    storages: Sequence[Storage],
    prefix: str | None = None,
    settings: Mapping[str, object] | None = None,
    single: bool = False,
) -> dict[str, str]:
    """The files of a rule: name to text. A `single` pair needs nothing else; otherwise the runtime's are among them."""
    check_prefix(prefix)
    own = file_of(rule.name) if prefix is None else prefix
    source = CudaSource(rule, kernel, storages, own, prefix, dict(settings or {}))
    if single:
        source.flags = ("--single",)
    view = source.rule_view()
    declared_, defined = (
        fold(render_template(f"rule.{kind}.j2", {"r": view}).strip("\n"), everywhere=True) for kind in ("cuh", "cu")
    )
    text = layout.RuleText(own, source.header_comment(), source.brief(), declared_, defined)
    return layout.cuda_single(text) if single else {**layout.cuda_split(text), **layout.cuda_runtime()}
