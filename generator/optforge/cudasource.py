"""Kernel to CUDA: the `.cuh` and `.cu` of a rule, kernels and the functions of the host that launch them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import helpers
from .celements import phase_title
from .cscalars import Scalars
from .csource import STATUSES, Source
from .cudaelements import REAL, CudaElements, Slot, Sums
from .diagnostics import UsageError
from .dtypes import F64, DType
from .formats import Storage
from .functions import FUNCTIONS, RAISES
from .ir import Kernel
from .names import check_prefix, file_of
from .render import fold, render_template

if TYPE_CHECKING:
    from .language import Rule

# Threads of a block; a chunk of the summation tree is a block's: 8 threads a leaf, four lanes each. Where nothing is
# added up a block takes a tile, so that small tensors keep many multiprocessors busy.
THREADS, TILE, ROWS = 256, 4096, 64

# What a launch passes: one struct. (C type, name, what it is.)
PLAN = (
    ("const void *", "list", "the tensors"),
    ("uint64_t ", "count", "how many"),
    ("uint64_t ", "tiles", "blocks of a pass that adds nothing up"),
    ("uint64_t ", "own_chunks", "blocks of a pass that adds up"),
    ("uint64_t *", "tile", "the first tile of each tensor among all, and the end of the last"),
    ("uint64_t *", "chunk", "likewise its first chunk"),
    ("uint64_t *", "part", "of each tensor: the number of its whole one, and the first chunk there"),
    ("uint64_t *", "group", "of each tensor: the number of its hyperparameters"),
    ("uint64_t ", "groups", "how many of them there are"),
    ("uint64_t ", "tensors", "whole tensors, of which the list may have parts"),
    ("uint64_t ", "chunks", "their chunks"),
    ("uint64_t *", "sizes", "their numbers of elements"),
    ("uint64_t *", "first", "the first chunk of each among all, and the end of the last"),
    ("double *", "sums", "of each chunk"),
    ("double *", "tensor_sums", "of each whole tensor"),
    ("double *", "totals", "of all"),
    ("{prefix}_control *", "control", "what the device knows of its steps"),
    ("{prefix}_scalars *", "rows", "the scalars of steps to come, of each group"),
    ("{prefix}_scalars *", "s", "the scalars of the step under way, of each group"),
    ("const unsigned char *", "starting", "of each tensor: whether this is its first step"),
    ("{prefix}_stats *", "stats", "filled in"),
    ("{prefix}_stats *", "tensor_stats", "likewise, for each whole tensor"),
    ("int32_t ", "type", "of the elements"),
    ("int32_t ", "phase", "the phase that is launched"),
    ("int32_t ", "observe", "whether statistics are wanted"),
    ("int32_t ", "skip_nonfinite", "whether a NaN or an infinity in any gradient skips the step"),
    ("int32_t ", "zero_grads", "whether gradients are set to 0"),
    ("int32_t ", "parted", "whether the list has parts of tensors"),
    ("int32_t ", "beside", "whether another plan begins the steps"),
)

# How steps are done: what is read when a plan is made, and what at every step.
PLANNED_OPTIONS = (
    ("void *", "workspace", "on the device, {prefix}_workspace_size bytes, kept as long as the plan"),
    ("size_t ", "workspace_size", "in bytes"),
    ("size_t ", "groups", "how many hyperparameters the tensors share out; 0 means 1"),
    ("const size_t *", "group", "of each tensor: which of them are its own; NULL: the first"),
    ("const {prefix}_whole *", "whole", "where the list has parts of tensors"),
    ("const {prefix}_plan *", "beside", "another plan over parts of the same tensors, which begins their steps"),
)
STEP_OPTIONS = (
    ("double ", "grad_scale", "gradients are multiplied by 1 / grad_scale before anything sees them; 1"),
    ("int ", "skip_nonfinite", "with a NaN or an infinity in any gradient nothing is changed"),
    ("int ", "zero_grads", "g, which must not be const then, is set to 0, also by a skipped step"),
    ("{prefix}_stats *", "stats", "filled in, over all tensors"),
    ("{prefix}_stats *", "tensor_stats", "filled in, one for each tensor, each whole tensor where there are parts"),
    ("const unsigned char *", "starting", "of each tensor: whether this is its first step; {starting}"),
)

# What the device knows of its steps. The second part is what the host writes, the rows behind it.
CONTROL = (
    ("uint64_t ", "t", "number of the last step"),
    ("uint32_t ", "skipped", "whether it was skipped: t - skipped steps have been applied"),
    ("int32_t ", "status", "what became of it"),
    ("uint32_t ", "idle", "whether it was not done at all"),
    ("uint32_t ", "done", "blocks that have added up"),
)
WINDOW = (
    ("uint64_t ", "set", "whether the count of steps is to be set"),
    ("uint64_t ", "base", "to this"),
    ("uint64_t ", "first_row", "number of the first step whose scalars are there"),
    ("uint64_t ", "rows", "how many steps have theirs"),
)

LIBRARY = ("exp", "log", "tanh", "pow", "fmod")
"""Functions of CUDA's own library, which may be off in the last bits: each has a function of its own in the file."""

OWN_STATUSES = (
    ("ERROR_CUDA", "a CUDA call failed; cudaGetLastError tells which"),
    ("ERROR_ROWS", "the device came to a step whose scalars it was not given"),
)


def render(
    rule: Rule,
    kernel: Kernel,
    storages: Sequence[Storage],
    prefix: str | None = None,
    settings: Mapping[str, object] | None = None,
    single: bool = True,
) -> dict[str, str]:
    """The files of a kernel, which need no others: name to text."""
    check_prefix(prefix)
    dtypes = [own.real for own in storages if own.suffix == own.real.suffix]
    if len(dtypes) < len(storages):
        raise UsageError("the target cuda has arrays of f32 and f64 alone; emit bf16 and f16 with the target c")
    own = file_of(rule.name) if prefix is None else prefix
    context = CudaSource(rule, kernel, dtypes, own, prefix, dict(settings or {})).context()
    return {f"{own}.{ending}": fold(render_template(f"kernel.{ending}.j2", context)) for ending in ("cuh", "cu")}


class CudaSource(Source):
    """What the templates show of one kernel."""

    target = "cuda"
    statuses = (*STATUSES, *OWN_STATUSES)
    build = (
        "nvcc -O3 -c {file}.cu    (CUDA 11.7 or later; for the device of this machine alone: -arch=native)",
        "not with -ftz=true, which --use_fast_math implies: subnormal floats become 0",
    )

    @staticmethod
    def begin(file: str) -> str:
        """What all names begin with: a rule's C and its CUDA can be in one program."""
        return f"{file}_cuda"

    def inlined(self) -> str:
        """What begins the declaration of a small function of the host."""
        return "static inline"

    def device(self, role: str, kind: DType) -> str:
        """The name of an emitted function of the device, which is emitted because it was asked for."""
        sort, _, word = role.rpartition(" ")
        if sort:
            name = f"{self.prefix}_device_{'' if sort == 'scalar' else 'ieee_'}{helpers.WORDS.get(word, word)}"
            text = helpers.definition(role, kind, f"{self.prefix}_device", "static inline")
            self.device_helpers.setdefault(name, self.on_device(text))
            return name
        name = f"{self.prefix}_{word}"
        self.device_helpers.setdefault(name, self.template(word, name))
        return f"{name}<{self.prefix}_f64>" if kind is F64 else name  # which takes plain doubles as well

    def on_device(self, text: str) -> str:
        """A function of doubles as one of the device's doubles: nothing there folds a call in advance."""
        text = re.sub(r", (which no compiler may fold or rewrite|by the library's own function[^;.]*)", "", text)
        text = text.replace("volatile ", "").replace("double ", f"{self.prefix}_f64 ")
        return text.replace("static ", "static __device__ ")

    def template(self, word: str, name: str) -> str:
        """A function of elements of any type."""
        body: tuple[str, ...]
        if word == "squared":
            head = f"static __device__ __forceinline__ {self.prefix}_f64 {name}(real x)"
            body = (f"const {self.prefix}_f64 wide(x);", "", "return wide * wide;")
            comment = "The square, in double."
        elif word == "square":
            head, body, comment = f"static __device__ __forceinline__ real {name}(real x)", ("return x * x;",), ""
        else:
            row = FUNCTIONS[word]
            parameters = ", ".join(f"real {parameter}" for parameter in row.parameters)
            head = f"static __device__ __forceinline__ real {name}({parameters})"
            body = tuple(row.c.format(real="real", zero="real(0.0)", one="real(1.0)").split("\n"))
            comment = f"{row.doc}."
        text = helpers.function(f"template <typename real>\n{head}", comment, body)
        return text

    # ── what the templates read ─────────────────────────────────────────────────────────────────────────────────

    def context(self) -> dict[str, Any]:
        """The variables of both templates."""
        self.device_helpers: dict[str, str] = {}
        asserts = self.assert_statuses()
        real = f"{self.prefix}_f64"
        scalars = Scalars(self.kernel, self.prefix, self.hyper, self.fields, self.size, self.helper, self.device, real)
        sums = Sums(self.kernel, self.device)
        elements = CudaElements(self.kernel, self.prefix, self.fields, REAL, scalars, self.device)
        phases = [elements.context(k, sums) for k in range(len(self.kernel.phases))]
        shown = scalars.context([name for name, _ in asserts])
        context = {
            **self.shared_context(asserts),
            "file": self.file,
            "tensors": [d.suffix for d in self.dtypes],
            "g": self.fields.of["g"],
            "combine": f"largest ? {sums.maximum}(value, other) : value + other" if sums.largest else "value + other",
            "types": [("f64", "double", "d"), *((d.suffix, d.c, d.cuda) for d in self.dtypes if d is not F64)],
            "threads": THREADS,
            "tile": TILE,
            "rows": ROWS,
            "plan": [self.field(*entry) for entry in PLAN],
            "control": [self.field(*entry) for entry in CONTROL],
            "planned_options": [self.field(*entry) for entry in PLANNED_OPTIONS],
            "step_options": [self.field(*entry) for entry in STEP_OPTIONS],
            "window": [self.field(*entry) for entry in WINDOW],
            "launched": passes(self.kernel),
            "try_scalars": scalars_can_fail(self.kernel),
            "sums": sums.context(),
            "slots_of": [self.slots(sums.of_phase(k)) for k in range(len(self.kernel.phases))],
            "passes": phases,
            "scalars": shown,
            "helpers": list(self.helpers.values()),
            "device_helpers": list(self.device_helpers.values()),
            "library": self.library(),
            "dtypes": [self.per_type(number, dtype, scalars) for number, dtype in enumerate(self.dtypes)],
            "state_stores": [self.stored(scalars, name) for name, _ in self.kernel.state_stores],
            "inits": [self.first_value(state) for state in self.kernel.state],
        }
        return context

    def field(self, kind: str, name: str, text: str) -> str:
        """A member of a struct with its comment."""
        starting = "begins its state" if self.starting() else "this rule does not ask"
        kind, text = (part.format(prefix=self.prefix, starting=starting) for part in (kind, text))
        return f"{f'{kind}{name};':<{28 + len(self.prefix)}} /* {text} */"

    @staticmethod
    def slots(slots: list[Slot]) -> dict[str, Any]:
        """What a phase adds up: how many without statistics, how many with them, and which are largest values."""
        return {
            "plain": sum(not slot.observed for slot in slots),
            "all": len(slots),
            "largest": [number for number, slot in enumerate(slots) if slot.kind == "max"],
        }

    def library(self) -> list[str]:
        """The functions of CUDA's library that the device calls."""
        exprs = [let.expr for phase in self.kernel.phases for let in phase.lets]
        exprs += [item.value for phase in self.kernel.phases for item in phase.reductions]
        exprs += [value for phase in self.kernel.phases for _, value in phase.stores]
        exprs += [let.expr for g in self.kernel.scalars if (g.scope, g.phase) != ("step", 0) for let in g.lets]
        used = {{"mod": "fmod"}.get(e.op, e.op) for expr in exprs for e in expr.walk()}
        return [name for name in LIBRARY if name in used]

    def per_type(self, number: int, dtype: DType, scalars: Scalars) -> dict[str, Any]:
        """What the templates show once per dtype."""
        fields = self.fields.of
        return {
            "number": number,
            "c": dtype.c,
            "suffix": dtype.suffix,
            "cuda": dtype.cuda,
            "vector": dtype.vector,
            "components": [dtype.components[k % len(dtype.components)] for k in range(4)],
            "vectors": dtype.vectors,
            "round": "__double2float_rn(value)" if dtype is not F64 else "value",
            "fields": self.tensor_fields(dtype),
            "arrays": ", ".join(f"x->{fields[name]}" for name in self.arrays()),
            "scalars_of_state": ", ".join(f"x->{fields[s.name]}" for s in self.kernel.scalar_state),
        }

    def stored(self, scalars: Scalars, name: str) -> str:
        """The line that stores a scalar state."""
        expr = dict(self.kernel.state_stores)[name]
        value = scalars.stored(expr)
        return f"*x->{self.fields.of[name]} = {value if expr.op == 'const' else f'{value}.x'};"

    def first_value(self, state: Any) -> dict[str, Any]:
        """The initial value of a state."""
        kind = F64 if state.scalar else REAL
        if state.initial in ("p", "g"):
            value = f"x->{self.fields.of[state.initial]}[i]"
        elif isinstance(state.initial, str):
            value = f"h.{self.hyper.of[state.initial]}"
        else:
            value = F64.constant(state.initial)
        if kind is REAL and state.initial not in ("p", "g"):
            value = f"real({value}).x"
        return {"name": self.fields.of[state.name], "scalar": state.scalar, "value": value}


@dataclass(frozen=True)
class Pass:
    """What is launched for a phase: kernels by the end of their names, with statistics (`observed`) and without.

    A pass that `adds` up takes a block a chunk, another one a tile; one with statistics always adds up. `sums`
    says how many sums of a plain pass go on to the tensors and to all, `all_sums` how many with statistics.
    """

    plain: str
    observed: str
    adds: bool
    optional: bool
    sums: int
    all_sums: int

    @property
    def two(self) -> bool:
        """Whether statistics have a kernel of their own."""
        return self.observed != self.plain


def passes(kernel: Kernel) -> list[Pass]:
    """What is launched for each phase."""
    found = []
    for k, phase in enumerate(kernel.phases):
        title = phase_title(kernel, k)
        observes = any(r.observed or r.counts for r in phase.reductions) and not phase.optional
        own = sum(not r.observed for r in phase.reductions)
        every = len(phase.reductions) + 2 * sum(r.counts for r in phase.reductions)
        observed = f"{title}_observed" if observes else title
        found.append(Pass(title, observed, own > 0 or phase.optional, phase.optional, own, every))
    return found


def scalars_can_fail(kernel: Kernel) -> bool:
    """Whether a scalar of a tensor may have no value before the first write."""
    lets = [let for group in kernel.scalars if (group.scope, group.phase) == ("tensor", 0) for let in group.lets]
    return any(e.op in RAISES for let in lets for e in let.expr.walk())
