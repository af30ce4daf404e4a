"""The C target: emits C, and runs it compiled, through cffi."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import address
from ..compiler import library
from ..csource import render
from ..diagnostics import EnvironmentProblem
from ..dtypes import BY_NUMPY, DTYPES
from ..functions import Array
from ..ir import Kernel
from ..names import file_of
from ..tensor import How, Tensor, explain

if TYPE_CHECKING:
    from ..language import Rule

__all__ = ["CEngine", "CTarget", "engine", "render"]

ENDINGS = (".h", ".c")  # of the files that it emits

forked = False  # OpenMP's threads do not survive a fork: a child runs its steps on one


def _after_fork() -> None:
    global forked
    forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


OPTIONS = """
typedef struct { size_t tensor, begin; } part;
typedef struct { size_t count; const size_t *sizes; const part *parts; } whole;
typedef struct {
    double grad_scale;
    int skip_nonfinite, zero_grads, threads, checked;
    void *workspace; size_t workspace_size;
    void *stats, *tensor_stats;
    const unsigned char *starting;
    const whole *whole;
    const size_t *group; size_t groups;
} options;
"""
SKIPPED = -1


@dataclass(frozen=True)
class Call:
    """One call of the emitted functions: all tensors of a dtype; `places` are their numbers among all."""

    run: Any
    tensors: Any
    count: int
    rows: Array
    places: Array
    options: Any


class Plan:
    """A prepared step: pointers and sizes as the emitted functions take them.

    Parameters
    ----------
    library : Library
    kernel : Kernel
    tensors : sequence of Tensor
    gradients : sequence of arrays
        Kept alive with the plan.
    """

    def __init__(self, library: Library, kernel: Kernel, tensors: Sequence[Tensor], gradients: Sequence[Array]):
        self.library, self.kernel, self.tensors, self.gradients = library, kernel, tensors, gradients
        ffi = library.ffi
        grouped: dict[str, tuple[list[list[int]], list[int]]] = {}
        for place, (tensor, gradient) in enumerate(zip(tensors, gradients, strict=True)):
            row = [tensor.p.size, tensor.addresses["p"], address(gradient)]
            row += [tensor.addresses[state.name] for state in kernel.state]
            rows, places = grouped.setdefault(BY_NUMPY[tensor.p.dtype].suffix, ([], []))
            rows.append(row)
            places.append(place)
        # Groups without a gradient take no part: the emitted functions see the others, and no groups where one is left.
        used = sorted({tensor.group for tensor in tensors})
        self.rows = None if used == list(range(len(used))) else used
        elements = sum(tensor.p.size for tensor in tensors)
        size = library.workspace_size(elements, len(tensors)) if tensors else 8
        self.workspace = np.zeros(size // 8 + 1)
        # Lists of several dtypes are parts of one whole: their phases take turns, and share the sums.
        self.sizes = np.array([tensor.p.size for tensor in tensors] or [0], np.uintp)
        self.kept: list[Any] = []
        self.calls = []
        for suffix, (rows, places) in grouped.items():
            table = np.array(rows, dtype=np.uintp)
            options = ffi.new("options *")
            options.grad_scale = 1.0
            options.workspace = ffi.cast("void *", address(self.workspace))
            options.workspace_size = self.workspace.nbytes
            if len(grouped) > 1:
                parts = np.array([[place, 0] for place in places], np.uintp)
                whole = ffi.new("whole *")
                whole.count = len(tensors)
                whole.sizes = ffi.cast("size_t *", address(self.sizes))
                whole.parts = ffi.cast("part *", address(parts))
                options.whole = whole
                self.kept += [parts, whole]
            if len(used) > 1:
                group = np.array([used.index(tensors[place].group) for place in places], np.uintp)
                options.group, options.groups = ffi.cast("size_t *", address(group)), len(used)
                self.kept.append(group)
            pointer = ffi.cast("const void *", address(table))
            self.calls.append(Call(library.phases[suffix], pointer, len(rows), table, np.array(places), options))
        self.last = How()

    def step(self, hyperparameters: Any, t: int, how: How) -> bool:
        """One step in place, with the hyperparameters of each group; whether it was skipped.

        Raises
        ------
        ScalarError
            A scalar of the rule has no value; nothing was written.
        """
        hyper = self.library.ffi.from_buffer(hyperparameters if self.rows is None else hyperparameters[self.rows])
        if how is not self.last or forked:
            self.set(how)
        passes = self.library.passes
        if len(self.calls) == 1:
            (call,) = self.calls
            status = call.run(hyper, t, call.tensors, call.count, call.options, 0, passes)
            if status > 0:
                self.explain(status, hyperparameters, t, how)
            call.options.checked = 1
            return bool(status == SKIPPED)
        status = 0
        self.workspace[...] = 0
        for phase in range(passes):
            for call in self.calls:
                status = call.run(hyper, t, call.tensors, call.count, call.options, phase, phase + 1)
                if status > 0:
                    self.explain(status, hyperparameters, t, how)
        return bool(status == SKIPPED)

    def set(self, how: How) -> None:
        """Prepare for steps that are done so."""
        ffi = self.library.ffi
        self.flags: list[Array] = []  # kept alive with the plan
        for call in self.calls:
            own = call.options
            own.threads = 1 if forked else how.threads
            own.grad_scale = how.grad_scale
            own.skip_nonfinite, own.zero_grads = how.skip_nonfinite, how.zero_grads
            own.starting = own.stats = own.tensor_stats = ffi.NULL
            if how.starting is not None:
                starting = np.ascontiguousarray(how.starting[call.places], np.uint8)
                own.starting = ffi.cast("unsigned char *", address(starting))
                self.flags.append(starting)
            if how.stats is not None:
                records = ffi.cast("char *", ffi.from_buffer(how.stats))
                own.stats, own.tensor_stats = records, records + how.stats.itemsize
        self.last = how

    def explain(self, status: int, hyperparameters: Array, t: int, how: How) -> None:
        """Raise what a status says."""
        explain(self.kernel, self.tensors, hyperparameters, t, how)
        text = self.library.ffi.string(self.library.strerror(status)).decode()
        raise RuntimeError(f"rule {self.kernel.name!r}: {text} (status {status})")


@dataclass(frozen=True)
class Library:
    """The emitted functions of a loaded library; `phases` by the suffix of their dtype, `passes` their number."""

    ffi: Any
    strerror: Any
    hyper_init: Any
    workspace_size: Any
    phases: dict[str, Any]
    passes: int


def load(path: Path, prefix: str, passes: int) -> Library:
    """A compiled library, whose functions begin with a prefix."""
    import cffi

    ffi = cffi.FFI()
    arguments = "const void *hyper, uint64_t t, const void *tensors, size_t count, const options *options"
    declarations = [
        OPTIONS,
        f"const char *{prefix}_strerror(int status);",
        f"void {prefix}_hyper_init(void *hyper);",
        f"size_t {prefix}_workspace_size(uint64_t elements, size_t count);",
        *(f"int {prefix}_phases_{suffix}({arguments}, int first, int last);" for suffix in DTYPES),
    ]
    ffi.cdef("\n".join(declarations))
    try:
        # Never unloaded, not even when the interpreter ends: OpenMP would go with it, from under its waiting threads.
        loaded = ffi.dlopen(str(path), os.RTLD_NOW | os.RTLD_NODELETE)
        return Library(
            ffi,
            getattr(loaded, f"{prefix}_strerror"),
            getattr(loaded, f"{prefix}_hyper_init"),
            getattr(loaded, f"{prefix}_workspace_size"),
            {suffix: getattr(loaded, f"{prefix}_phases_{suffix}") for suffix in DTYPES},
            passes,
        )
    except (OSError, AttributeError) as problem:
        raise EnvironmentProblem(f"the compiled kernel {path} cannot be loaded: {problem}") from None


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
        if kernels is not None:
            files = committed(kernels, prefix, rule, kernel)
        else:
            files = render(rule, kernel, prefix=None if rule.name.isascii() else prefix)
        self.library = load(library(files), prefix, len(kernel.phases) + 1)

    def defaults(self) -> dict[str, float]:
        """The defaults of the hyperparameters as the compiled files have them."""
        names = [name for name, _ in self.kernel.hyperparameters]
        values = np.zeros(max(len(names), 1))
        self.library.hyper_init(self.library.ffi.from_buffer(values))
        return dict(zip(names, values.tolist(), strict=False))

    def plan(self, tensors: Sequence[Tensor], gradients: Sequence[Array]) -> Plan:
        """Prepare steps over these arrays."""
        return Plan(self.library, self.kernel, tensors, gradients)


def committed(directory: Path, prefix: str, rule: Rule, kernel: Kernel) -> dict[str, str]:
    """The emitted files of a kernel in a directory.

    Their comment must name the rule's hash and give this kernel's options: others may lay out memory in other ways.
    """
    advice = f"make it with: optforge generate {rule.origin} --out {directory}"
    if prefix != file_of(rule.name):
        advice += f" --prefix {prefix}"
    try:
        files = {file: (directory / file).read_text(encoding="utf-8") for file in (f"{prefix}.h", f"{prefix}.c")}
    except OSError as problem:
        raise EnvironmentProblem(f"{problem.filename}: {problem.strerror}; {advice}") from None
    for file, text in files.items():
        if f"\n * Rule hash: {rule.hash}\n" not in text:
            raise EnvironmentProblem(f"{directory / file} is of another version of rule {rule.name!r}; {advice}")
        if rule.options and not has_options(text, rule, kernel):
            raise EnvironmentProblem(f"{directory / file} is of other options than are asked for; {advice}")
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
