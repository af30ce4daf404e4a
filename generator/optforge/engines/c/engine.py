"""The C target: emits C, and runs it compiled, through cffi."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...core.blocks import SCALES
from ...core.diagnostics import EnvironmentProblem
from ...core.dtypes import DTYPES
from ...core.formats import FORMAT_OF, MASTERS, Wanted
from ...core.functions import Array
from ...core.ir import Kernel
from ...core.names import file_of
from ...emit import layout
from ...emit.rule import Rule
from ..arrays import address
from ..tensor import How, Tensor, explain
from .compile import cached, digest, generator, library, promised
from .inputs import KINDS, NativeInputs

forked = False  # OpenMP's threads do not survive a fork: a child runs its steps on one


def _after_fork() -> None:
    global forked
    forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


SKIPPED = -1


class Table:
    """What plans take of all tensors: rows as the runtime has them, without gradients, their groups and formats."""

    def __init__(self, kernel: Kernel, tensors: Sequence[Tensor]):
        names = ["p", *(state.name for state in kernel.state)]
        self.rows = np.array([[t.p.size, *map(t.addresses.__getitem__, names)] for t in tensors], np.uintp)
        self.rows = np.insert(self.rows, GRADIENT, 0, axis=1)
        self.groups = np.array([tensor.group for tensor in tensors], np.uintp)
        arrays = [state.name for state in kernel.array_state]
        scalar = {state.name for state in kernel.scalar_state}
        every = [(*(tensor.arrays[name].dtype for name in arrays), tensor.p.dtype) for tensor in tensors]
        self.kinds = list(dict.fromkeys(every))
        self.kind = np.array([self.kinds.index(own) for own in every], np.intp)
        self.fixed = ["SCALAR" if state.name in scalar else "" for state in kernel.state]  # whatever arrays are
        for k, state in enumerate(kernel.state):
            if any(tensor.is_scaled(state.name.removesuffix(SCALES)) for tensor in tensors[:1]):
                self.fixed[k] = "ABSMAX" if state.name.endswith(SCALES) else ""

    def formats(self, kind: int, gradient: int) -> tuple[str, ...]:
        """The formats of p, g and the state, as the runtime calls them, of a kind of tensors with such gradients."""
        *arrays, p = (FORMAT_OF[dtype].name.upper() for dtype in self.kinds[kind])
        state = iter(arrays)
        g = FORMAT_OF[KINDS[gradient - 1]].name.upper()
        stored = ["" if fixed == "SCALAR" else next(state) for fixed in self.fixed]
        return (p, g, *(fixed or own for fixed, own in zip(self.fixed, stored, strict=True)))


GRADIENT = 2  # the column of gradients: behind the number of elements and the parameter


class CPlan:
    """A prepared step: lists of tensors, one for each combination of formats, and options, as the runtime takes them.

    Parameters
    ----------
    library : Library
    kernel : Kernel
    inputs : NativeInputs
        With the gradients of the first step.
    behind : array
        How many of the optimizer's steps each tensor with a gradient has not taken.
    """

    def __init__(self, library: Library, kernel: Kernel, inputs: NativeInputs, behind: Array):
        self.library, self.kernel, self.inputs, self.behind = library, kernel, inputs, behind
        self.table, self.present = inputs.table, inputs.present
        ffi, table = library.ffi, self.table
        places = np.array(inputs.places, np.intp)
        # Groups without a gradient take no part: the runtime sees the others.
        used = np.unique(table.groups[places])
        self.rows = None if not len(used) or used[-1] == len(used) - 1 else used
        gradients = np.frombuffer(inputs.present, np.uint8)[places]
        kinds = table.kind[places] * 256 + gradients
        self.kinds = [divmod(int(kind), 256) for kind in np.unique(kinds)]
        self.places = [np.flatnonzero(kinds == kind).astype(np.uintp) for kind in np.unique(kinds)]
        self.tensors = [places[own] for own in self.places]  # by their numbers among all
        self.lists, self.number = ffi.new("optforge_list[]", max(len(self.places), 1)), len(self.places)
        self.own = [self.lists[k] for k in range(self.number)]
        self.parts: list[Array] = []
        self.kept: list[Any] = []
        # Where tensors count differently: their counts, and how far behind each is.
        self.steps: list[tuple[Array, Array]] = []
        alike = not len(behind) or bool((behind == behind[0]).all())
        self.late = int(behind[0]) if alike and len(behind) else 0  # how far behind all are
        for own, numbers, members in zip(self.own, self.places, self.tensors, strict=True):
            rows, groups = table.rows[members], np.searchsorted(used, table.groups[members]).astype(np.uintp)
            own.count = len(rows)
            own.tensors = ffi.cast("void *", address(rows))
            own.number = ffi.cast("size_t *", address(numbers))
            own.groups, own.group = len(used), ffi.cast("size_t *", address(groups))
            stream = members.astype(np.uint64)
            own.stream = ffi.cast("uint64_t *", address(stream))
            self.parts.append(rows)
            self.kept += [groups, stream]
            if not alike:
                steps = np.zeros(len(rows), np.uint64), behind[numbers].astype(np.uint64)
                own.steps = ffi.cast("uint64_t *", address(steps[0]))
                self.steps.append(steps)
        every = [len(members) == len(table.rows) for members in self.tensors]  # in order, as a slice finds them faster
        self.columns = [
            (rows[:, GRADIENT], slice(None) if whole else members)
            for rows, members, whole in zip(self.parts, self.tensors, every, strict=True)
        ]
        self.aim(inputs.addresses)
        self.options = ffi.new("optforge_options *")
        library.calls.options_init(self.options)
        self.workspace = np.zeros(0)
        self.last: How | None = None

    def aim(self, addresses: Array) -> None:
        """Take gradients at these addresses, of all tensors, which were checked as the runtime would check them."""
        for column, members in self.columns:
            column[...] = addresses[members]

    def step(self, hyperparameters: Any, t: int, how: How) -> bool:
        """One step in place, with the hyperparameters of each group; whether it was skipped.

        An exception that comes from outside, such as a KeyboardInterrupt, finds it done and counted, or not begun:
        it is one call, which counts it itself.

        Raises
        ------
        ScalarError
            A scalar of the rule has no value; nothing was written.
        """
        hyper = self.library.ffi.from_buffer(hyperparameters if self.rows is None else hyperparameters[self.rows])
        if how is not self.last or forked:
            self.set(how)
        for own in self.own:
            own.hyper, own.t = hyper, t - self.late
        for steps, behind in self.steps:
            np.subtract(t, behind, out=steps)
        status = self.library.calls.step_lists(self.lists, self.number, self.options)
        if status > 0:
            self.explain(status, hyperparameters, t, how)
        self.options.checked = 1
        return bool(status == SKIPPED)

    def set(self, how: How) -> None:
        """Prepare for steps that are done so."""
        self.last = None
        ffi, options = self.library.ffi, self.options
        self.flags: list[Array] = []  # kept alive with the plan
        options.threads = 1 if forked else how.threads
        options.grad_scale = how.grad_scale
        options.skip_nonfinite, options.zero_grads, options.seed = how.skip_nonfinite, how.zero_grads, how.seed
        for own, kind in zip(self.own, self.kinds, strict=True):
            if not own.kernel:  # whatever else changes, arrays are stored as they were
                own.kernel = self.library.kernel(self.table.formats(*kind), how.master, how.stochastic)
        options.stats = options.tensor_stats = ffi.NULL
        options.applied = ffi.NULL if how.progress is None else ffi.cast("uint64_t *", address(how.progress.steps))
        if how.stats is not None:
            records = ffi.cast("char *", ffi.from_buffer(how.stats))
            options.stats, options.tensor_stats = (
                ffi.cast("optforge_stats *", records + k) for k in (0, how.stats.itemsize)
            )
        for own, places in zip(self.own, self.places, strict=True):
            own.starting = ffi.NULL
            if how.starting is not None:
                starting = np.ascontiguousarray(how.starting[places], np.uint8)
                own.starting = ffi.cast("unsigned char *", address(starting))
                self.flags.append(starting)
        size = self.library.calls.workspace_size(self.lists, self.number, options)
        if size > self.workspace.nbytes:
            workspace = np.empty(size // 8)
            options.workspace, options.workspace_size = ffi.cast("void *", address(workspace)), size
            self.workspace = workspace  # last: an interruption before it finds the old one, and begins anew
        self.last = how

    def explain(self, status: int, hyperparameters: Array, t: int, how: How) -> None:
        """Raise what a status says."""
        explain(self.kernel, self.inputs.stepped, hyperparameters, t - self.behind, how)
        own = self.library.kernels["f32"]  # asserts are the same for all
        text = self.library.ffi.string(self.library.calls.kernel_strerror(own, status)).decode()
        raise RuntimeError(f"rule {self.kernel.name!r}: {text} (status {status})")


@dataclass(frozen=True)
class Calls:
    """What is called of the runtime."""

    options_init: Any
    step_lists: Any
    workspace_size: Any
    begin: Any
    share: Any
    partials: Any
    fold: Any
    kernel_strerror: Any


@dataclass(frozen=True)
class Library:
    """A loaded library: the calls of its runtime; its kernels by the suffix of their dtype."""

    ffi: Any
    calls: Calls
    kernels: dict[str, Any]
    others: dict[Any, tuple[Any, Any]] = field(default_factory=dict)

    def kernel(self, formats: tuple[str, ...], master: str, stochastic: bool) -> Any:
        """The kernel for arrays of these formats, the last of which but scales is beside p where there is a master.

        It computes as one of the library's own does; how arrays are stored is a matter of its table.
        """
        own = self.kernels["f64" if formats[0] == "F64" else "f32"]
        if set(formats) <= {formats[0], "SCALAR"} and formats[0] in ("F32", "F64"):
            return own
        key = (formats, master, stochastic)
        if key not in self.others:
            made = self.ffi.new("optforge_kernel *", own[0])
            if master:
                made.master = len(formats) - formats.count("ABSMAX") - 1
                formats = (*formats[: made.master], MASTERS[master].code, *formats[made.master + 1 :])
            codes = [layout.constant(f"OPTFORGE_{format}", "optforge.h") for format in formats]
            made.arrays, made.formats = len(codes), (table := self.ffi.new("unsigned char[]", codes))
            made.stochastic = stochastic
            self.others[key] = made, table
        return self.others[key][0]


def load(path: Path, prefix: str) -> Library:
    """A compiled library, whose rule's names begin with a prefix."""
    ffi = declared()
    try:
        loaded, names = opened(ffi, path), ctypes.CDLL(str(path))
        tables = {suffix: ctypes.c_char.in_dll(names, f"{prefix}_kernel_{suffix}") for suffix in DTYPES}
        return Library(
            ffi,
            Calls(**{own.name: getattr(loaded, f"optforge_{own.name}") for own in fields(Calls)}),
            {suffix: ffi.cast("optforge_kernel *", ctypes.addressof(table)) for suffix, table in tables.items()},
        )
    except (OSError, AttributeError, ValueError) as problem:
        raise EnvironmentProblem(f"the compiled kernel {path} cannot be loaded: {problem}") from None


@functools.cache
def declared() -> Any:
    """The runtime's declarations for cffi, which are the same for all libraries.

    cffi takes longer to parse them than a library takes to load. So what it makes of them is in the cache.
    """
    import _cffi_backend  # type: ignore[import-untyped]

    lists = "const optforge_list *lists, size_t number, const optforge_options *options"
    sizes = [f"{name} = {layout.constant(name, 'optforge.h')}" for name in SIZES]
    text = "\n".join(
        [
            "typedef struct optforge_stats optforge_stats; typedef struct optforge_pass optforge_pass;",
            "typedef struct optforge_initial optforge_initial;",
            f"enum {{ {', '.join(sizes)} }};",
            layout.structs(
                "optforge_parallel", "optforge_options", "optforge_kernel", "optforge_list", "optforge_work"
            ),
            "void optforge_options_init(optforge_options *o);",
            f"int optforge_step_lists({lists});",
            f"size_t optforge_workspace_size({lists});",
            f"int optforge_begin(optforge_work *work, {lists});",
            "void optforge_share(optforge_work *work, int phase, size_t ith, size_t nth);",
            "double *optforge_partials(const optforge_work *work, int phase, size_t *number);",
            "int optforge_fold(optforge_work *work, int phase);",
            "const char *optforge_kernel_strerror(const optforge_kernel *kernel, int status);",
            "int fegetenv(void *); int fesetenv(const void *);",
        ]
    )

    def parse(work: Path) -> Path:
        import cffi

        parsed = cffi.FFI()
        parsed.cdef(text)
        parsed.set_source("declarations", None, compiler_verbose=0)
        parsed.emit_python_code(str(work / "declarations.py"))
        return work / "declarations.py"

    path = cached("declarations", ".py", digest([_cffi_backend.__version__.encode(), text.encode()]), parse)
    made: dict[str, Any] = {}
    exec(path.read_text(encoding="utf-8"), made)
    ffi = made["ffi"]
    # cffi completes types and functions when they are first used, under a lock, and what is interrupted then is
    # broken for good, or waits for ever.
    for kind in (*POINTERS, "optforge_options *", "optforge_list[]", "optforge_stats *", "optforge_kernel *"):
        ffi.typeof(kind)
    ffi.new("optforge_options *"), ffi.new("optforge_list[]", 1), ffi.new("optforge_kernel *")
    ffi.new("unsigned char[]", 1)
    return ffi


SIZES = ("OPTFORGE_MOST_SUMS", "OPTFORGE_MOST_PASSES")  # of arrays in structs
POINTERS = ("char *", "void *", "unsigned char *", "size_t *", "uint64_t *")  # of pointers that plans have
FLUSHING: set[Path] = set()  # libraries that were refused; opened again they do no harm, and would seem harmless


def opened(ffi: Any, path: Path) -> Any:
    """A library opened, unless that makes subnormal numbers zero in this process; these are back then.

    Such start-up code comes with flags of the linking compiler, which may be in a script that is called as one. It
    works on the thread that opens the library.

    Raises
    ------
    EnvironmentProblem
        It does.
    OSError
        It cannot be opened.
    """
    environment, system = ffi.new("double[64]"), declared().dlopen(None)
    before = not flushes()
    with contextlib.suppress(AttributeError):  # where the process has no libm with them, nothing can be put back
        system.fegetenv(environment)
    # Never unloaded, not even when the interpreter ends: OpenMP would go with it, from under its waiting threads.
    loaded = ffi.dlopen(str(path), os.RTLD_NOW | os.RTLD_NODELETE)
    if before and flushes():
        FLUSHING.add(path)
        with contextlib.suppress(AttributeError):
            system.fesetenv(environment)
    if path in FLUSHING:
        raise EnvironmentProblem(
            "the C compiler links code into the kernel that makes subnormal numbers zero in the whole process, those "
            "of NumPy too: leave -funsafe-math-optimizations, -ffast-math and -Ofast out of the variable CC, or out of "
            "the script that is the compiler (kernels are as fast without)"
        )
    return loaded


def flushes() -> bool:
    """Whether subnormal numbers are zero on this thread, as results or as operands."""
    least = np.array([np.finfo(np.float64).tiny, 5e-324])
    return not (least * np.array([0.5, 1.0])).all()


class CEngine:
    """A kernel compiled and loaded.

    Parameters
    ----------
    kernels : Path, optional
        A directory with the emitted `.h` and `.c` to compile instead of freshly emitted ones.

    Raises
    ------
    EnvironmentProblem
        It cannot be compiled or loaded, or the directory lacks the files or has them of another rule.
    """

    def __init__(self, rule: Rule, kernel: Kernel, kernels: Path | None = None):
        self.kernel = kernel
        prefix = file_of(rule.name) if rule.name.isascii() else "rule"  # cffi reads ASCII alone
        if kernels is not None and kernel.inexact:
            raise EnvironmentProblem(
                f"{kernels}: emitted files are taken for arrays of float32 and float64; leave them out for others"
            )
        if kernels is not None:
            path = library(committed(kernels, prefix, rule, kernel))
        else:
            # The text is made of these alone, and making it takes longer than all else where it is compiled already.
            identity = [generator(), prefix.encode(), rule.hash.encode(), pickle.dumps(kernel)]
            path = promised(prefix, identity, lambda: rendered(rule, kernel, prefix))
        self.library = load(path, prefix)

    def defaults(self) -> dict[str, float]:
        """The defaults of the hyperparameters as the compiled files have them."""
        values = self.library.kernels["f32"].hyper_defaults
        return {name: values[k] for k, (name, _) in enumerate(self.kernel.hyperparameters)}

    inputs = NativeInputs

    def plan(self, inputs: NativeInputs, behind: Array) -> CPlan:
        """Prepare steps over these arrays, and others of the same tensors."""
        if inputs.table is None:
            inputs.table = Table(self.kernel, inputs.tensors)
        return CPlan(self.library, self.kernel, inputs, behind)


def rendered(rule: Rule, kernel: Kernel, prefix: str) -> dict[str, str]:
    """The emitted files of a kernel."""
    from ...emit.c import render

    return render(rule, kernel, Wanted().storages(kernel), None if rule.name.isascii() else prefix)


def committed(directory: Path, prefix: str, rule: Rule, kernel: Kernel) -> dict[str, str]:
    """The emitted files of a kernel in a directory.

    Their comment must name the rule's hash and give this kernel's options: others may lay out memory in other ways.
    """
    advice = f"make it with: optforge generate {rule.origin} --out {directory}"
    if prefix != file_of(rule.name):
        advice += f" --prefix {prefix}"
    names = (f"{prefix}.h", f"{prefix}.c", *layout.FILES)
    try:
        files = {file: (directory / file).read_text(encoding="utf-8") for file in names}
    except OSError as problem:
        raise EnvironmentProblem(f"{problem.filename}: {problem.strerror}; {advice}") from None
    if files["optforge.h"] != layout.runtime()["optforge.h"]:
        raise EnvironmentProblem(f"{directory / 'optforge.h'} is of another version of optforge; {advice}")
    for file, mark in ((names[0], f"\n * Rule hash: {rule.hash}\n"), (names[1], f'"{rule.hash}"')):
        if mark not in files[file]:
            raise EnvironmentProblem(f"{directory / file} is of another version of rule {rule.name!r}; {advice}")
    if rule.options and not has_options(files[names[0]], rule, kernel):
        raise EnvironmentProblem(f"{directory / names[0]} is of other options than are asked for; {advice}")
    return files


def has_options(text: str, rule: Rule, kernel: Kernel) -> bool:
    """Whether the options in the comment of an emitted file give this kernel."""
    line = re.search(r"^ \* Options: (.*)\.$", text, re.MULTILINE)
    pairs = [pair.partition("=")[::2] for pair in line[1].split(", ")] if line else []
    words: dict[str, bool | str] = {"True": True, "False": False}
    try:
        emitted = rule.kernel(**{name: words.get(value, value) for name, value in pairs})
    except (TypeError, ValueError):
        return False
    return replace(emitted, hyperparameters=()) == replace(kernel, hyperparameters=())


@dataclass(frozen=True)
class CTarget:
    """The C target over emitted files that are already there: pass it as `target` to `Optimizer`."""

    kernels: Path

    def __call__(self, rule: Rule, kernel: Kernel) -> CEngine:
        """The engine of a rule."""
        return CEngine(rule, kernel, self.kernels)


engine = CEngine
