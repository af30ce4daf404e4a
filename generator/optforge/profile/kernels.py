"""Kernels and their limits, compiled into one library, as things that can be timed in turns.

A kernel is measured as engines call it, through its emitted interface: no Python is in its time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..core.blocks import SCALES
from ..core.diagnostics import EnvironmentProblem
from ..core.formats import Storage, Wanted, parted
from ..core.functions import Array
from ..core.ir import Kernel
from ..core.names import file_of
from ..emit.text import TEMPLATES
from ..engines import memory
from ..engines.arrays import address
from ..engines.c.compile import library
from ..engines.c.engine import opened
from ..library.rule import Rule
from .limits import Needs, needs, source
from .models import Model

LONGEST = 10.0  # seconds of steps that are not waited for any longer
BATCH_SECONDS = 40e-6  # of steps that are timed together, so that the clock's own time is nothing
SETS = {"x86-64": 0, "x86-64-v3": 1, "x86-64-v4": 2, "neon": 0, "plain": 0}  # names of optforge_isa()
DIVIDED = 16 * 1024  # elements that a step of the divider does for each thread
LOSS_SCALE = 1024.0  # which the gradients of a phase carry
PATTERN = 1 << 18  # elements of random numbers, which are repeated

DECLARATIONS = """
const char *optforge_isa(void); int optforge_use(const char *name);
const void *profile_kernel(size_t kind);
void *profile_streams(size_t kind, size_t pass, size_t set);
void *profile_divider(size_t kind, size_t set);
size_t profile_time(void (*step)(void *), void *context, size_t batch, size_t count, double most, unsigned char *evict,
                    size_t bytes, double *times);
void *profile_open(const void *kernel, const double *hyper, const void *tensors, size_t count, int threads, int phase);
void profile_close(void *); void profile_kernel_step(void *); int profile_status(const void *);
int profile_phases(void *, size_t shares, double *times);
void *profile_open_streams(const void *tensors, size_t arrays, size_t count, size_t shares, size_t passes,
                           void *const *pass);
void profile_close_streams(void *); void profile_streams_step(void *);
void *profile_open_divider(void *divide, int single);
void profile_close_divider(void *); void profile_divider_step(void *);
void *profile_open_bandwidth(int kind, size_t shares, size_t n, size_t set, double *data);
void profile_close_bandwidth(void *); double profile_bandwidth_repeats(const void *);
void profile_bandwidth_step(void *);
const char *optforge_strerror(int status);
"""


@dataclass(frozen=True)
class Block:
    """What one turn of a contender took, in seconds per step: the median of its batches, and a low one."""

    median: float
    low: float


def summary(times: Sequence[float]) -> Block:
    """The median, and the lower tenth, which what else runs on the machine distorts least."""
    ordered = sorted(times)
    return Block(statistics.median(ordered), ordered[len(ordered) // 10])


class Contender(Protocol):
    """Something whose steps are timed in turns with others'."""

    name: str

    def block(self, seconds: float) -> Block:
        """Steps for so long, one at least."""


@dataclass(frozen=True)
class Compiled:
    """A rule's kernels with their limits, compiled and loaded."""

    rule: Rule
    kernel: Kernel
    needs: tuple[Needs, ...]
    hyperparameters: Mapping[str, float]
    path: Path
    ffi: Any
    calls: Any

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return str(self.ffi.string(self.calls.optforge_isa()).decode())

    def use(self, isa: str) -> bool:
        """Choose an instruction set; whether this machine and this build have it."""
        return bool(self.calls.optforge_use(isa.encode()) == 0)

    def sets(self) -> list[str]:
        """The instruction sets that can be chosen, the best last."""
        before = self.isa
        found = [name for name in SETS if self.use(name)]
        self.use(before)
        return found


def compiled(rule: Rule, wanted: Wanted, settings: Mapping[str, object]) -> Compiled:
    """Compile a rule with its limits, or take it from the cache.

    Raises
    ------
    EnvironmentProblem
        It cannot be compiled.
    RuleError, UsageError
        As of `Rule.emit`.
    """
    import cffi

    every = {**rule.definition.settings, **settings}
    kernel, storages = rule.stored(wanted, every)
    prefix = file_of(rule.name) if rule.name.isascii() else "rule"
    found = tuple(needs(kernel, storage) for storage in storages)
    files = rule.emit("c", wanted, None if rule.name.isascii() else prefix, every)
    timing = (TEMPLATES / "profile" / "timing.c").read_text(encoding="utf-8")
    path = library({**files, f"{prefix}_limits.c": source(prefix, found), "timing.c": timing})
    ffi = cffi.FFI()
    ffi.cdef(DECLARATIONS)
    try:
        calls = opened(ffi, path)
    except OSError as problem:
        raise EnvironmentProblem(f"the compiled kernel {path} cannot be loaded: {problem}") from None
    return Compiled(rule, kernel, found, rule.settings(every)[0], path, ffi, calls)


class Tensors:
    """The arrays of a model's tensors: parameters and gradients as NumPy allocates them, state as the Optimizer does.

    Parameters
    ----------
    model : Model
    own : Needs
        Of a kernel, with arrays stored in one way.
    kernel : Kernel
    scale : float
        What gradients are multiplied by.
    """

    def __init__(self, model: Model, own: Needs, kernel: Kernel, scale: float = 1.0):
        self.model, self.needs = model, own
        storage, sizes = own.storage, [int(np.prod(shape)) for shape in model.shapes]
        self.params = [np.empty(size, storage["p"].numpy) for size in sizes]
        self.grads = [np.empty(size, storage["g"].numpy) for size in sizes]
        names = [name for name in own.names[2:] if name not in {state.name for state in kernel.scalar_state}]
        beside = storage.beside.name if storage.beside else ""
        kinds = {name: format.numpy for name, format in storage.formats}
        kinds |= dict.fromkeys((name + SCALES for name in storage.scaled), memory.Scales)
        kinds |= {storage.beside.name: storage.beside.format.numpy} if storage.beside else {}
        dtypes = [kinds[name] for name in names]
        state = memory.allocate(self.params, [dtypes] * len(sizes))
        self.numbers = np.zeros((len(sizes), len(own.names)))  # scalar state, in the columns of the arrays
        self.state = [dict(zip(names, own_state, strict=True)) for own_state in state]
        self.table = np.zeros((len(sizes), 1 + len(own.names)), np.uintp)
        self.fill(storage, beside, scale)
        for k, size in enumerate(sizes):
            self.table[k, 0] = size
            arrays = {"p": self.params[k], "g": self.grads[k], **self.state[k]}
            for column, name in enumerate(own.names):
                at = arrays.get(name)
                self.table[k, 1 + column] = address(at if at is not None else self.numbers[k, column:])

    def fill(self, storage: Storage, beside: str, scale: float) -> None:
        """Let parameters and gradients begin as training leaves them: random, and the same each time."""
        random = np.random.default_rng(7)
        real = storage.real.numpy
        p = (0.02 * random.standard_normal(PATTERN + 4096)).astype(real)
        g = (1e-3 * scale * random.standard_normal(PATTERN + 4096)).astype(real)
        whole = storage["p"].store(p)
        both = parted(p, np.dtype(storage.beside.format.numpy), storage["p"]) if storage.beside else (whole, whole)
        grads = storage["g"].store(g)
        for k in range(len(self.params)):
            shift = 61 * k % 4096
            self.repeat(self.params[k], both[0], shift)
            self.repeat(self.grads[k], grads, shift)
            if beside:
                self.repeat(self.state[k][beside], both[1], shift)

    @staticmethod
    def repeat(into: Array, pattern: Array, shift: int) -> None:
        """Fill an array with a pattern."""
        for start in range(0, into.size, PATTERN):
            part = into[start : start + PATTERN]
            part[:] = pattern[shift : shift + part.size]


class Timed:
    """A contender that C times.

    Parameters
    ----------
    name : str
    own : Compiled
    step, close : C functions
    context : pointer
        What they are called with.
    kept : object
        What must live as long.
    evict : array of uint8, optional
        Written over before each step, so that the caches hold nothing of it.
    each : float
        Steps that one step of this counts as, such as its elements.
    """

    def __init__(
        self, name: str, own: Compiled, step: Any, close: Any, context: Any, kept: Any, evict: Array | None = None
    ):
        if context == own.ffi.NULL:
            raise MemoryError
        self.name, self.own, self.step, self.close, self.context, self.kept = name, own, step, close, context, kept
        self.evict = evict
        self.run(1, 1)
        self.check()
        self.took = self.run(1, 2)[-1]

    def run(self, batch: int, count: int, most: float = LONGEST) -> Array:
        """Seconds per step of some batches, as many as there are begun in so many seconds."""
        times = np.zeros(count)
        ffi = self.own.ffi
        evict, size = (
            (ffi.NULL, 0) if self.evict is None else (ffi.from_buffer("unsigned char[]", self.evict), self.evict.nbytes)
        )
        pointer = ffi.cast("double *", address(times))
        done = self.own.calls.profile_time(self.step, self.context, batch, count, most, evict, size, pointer)
        return times[:done]

    def check(self) -> None:
        """Raise where the kernel refuses a step."""
        if self.step == self.own.ffi.addressof(self.own.calls, "profile_kernel_step"):
            status = self.own.calls.profile_status(self.context)
            if status:
                text = self.own.ffi.string(self.own.calls.optforge_strerror(status)).decode()
                raise RuntimeError(f"rule {self.own.rule.name!r}: {text} (status {status})")

    def block(self, seconds: float) -> Block:
        """Steps for so long, one at least."""
        batch = 1 if self.evict is not None else max(1, int(BATCH_SECONDS / max(self.took, 1e-9)))
        whole = time.perf_counter()
        self.run(batch, 1)  # what was done in between is out of the caches
        whole = max(time.perf_counter() - whole, 1e-9)
        times = self.run(batch, int(min(max(seconds / whole, 1), 400)), seconds)
        self.took = float(np.median(times))
        return summary(times.tolist())

    def free(self) -> None:
        """Give the context back."""
        if self.context is not None:
            self.close(self.context)
            self.context = None


def kernel_steps(
    own: Compiled, kind: int, tensors: Tensors, threads: int, phase: bool, evict: Array | None = None
) -> Timed:
    """The kernel itself."""
    calls, ffi = own.calls, own.ffi
    names = [name for name, _ in own.kernel.hyperparameters]
    hyper = np.array([own.hyperparameters[name] for name in names] or [0.0])
    context = calls.profile_open(
        table(own, kind, tensors), ffi.cast("double *", address(hyper)), ffi.cast("void *", address(tensors.table)),
        len(tensors.table), threads, phase,
    )  # fmt: skip
    step = ffi.addressof(calls, "profile_kernel_step")
    return Timed("kernel", own, step, calls.profile_close, context, (tensors, hyper), evict)


def table(own: Compiled, kind: int, tensors: Tensors) -> Any:
    """The kernel's table."""
    return own.calls.profile_kernel(kind)


def streams(
    own: Compiled,
    kind: int,
    tensors: Tensors,
    threads: int,
    work: str,
    evict: Array | None = None,
    only: int | None = None,
) -> Timed:
    """The traffic of a step or a phase, or of one pass alone, without mathematics."""
    calls, ffi = own.calls, own.ffi
    needed = own.needs[kind]
    numbers = [k for k, part in enumerate(needed.passes) if work == "phase" or not part.optional]
    numbers = numbers if only is None else [numbers[only]]
    passes = ffi.new("void *[]", [calls.profile_streams(kind, k, SETS[own.isa]) for k in numbers])
    rows = ffi.cast("void *", address(tensors.table))
    context = calls.profile_open_streams(
        rows, tensors.table.shape[1] - 1, len(tensors.table), threads, len(numbers), passes
    )
    step = ffi.addressof(calls, "profile_streams_step")
    return Timed("traffic", own, step, calls.profile_close_streams, context, tensors, evict)


def divider(own: Compiled, kind: int) -> Timed | None:
    """The rule's divisions and roots alone, for `DIVIDED` elements on one thread; None where it has none."""
    needed = own.needs[kind]
    if not needed.divisions + needed.roots:
        return None
    calls = own.calls
    function = calls.profile_divider(kind, SETS[own.isa])
    context = calls.profile_open_divider(function, needed.storage.real.bytes == 4)
    step = own.ffi.addressof(calls, "profile_divider_step")
    return Timed("divider", own, step, calls.profile_close_divider, context, None)


BANDWIDTHS = {"read": (0, 1), "copy": (1, 2), "triad": (2, 3)}  # number in C, arrays moved


def bandwidth(own: Compiled, kind: str, threads: int, n: int, data: Array) -> Timed:
    """Reading, copying or a triad of n doubles by each thread."""
    calls = own.calls
    context = calls.profile_open_bandwidth(
        BANDWIDTHS[kind][0], threads, n, SETS[own.isa], own.ffi.cast("double *", address(data))
    )
    step = own.ffi.addressof(calls, "profile_bandwidth_step")
    return Timed(kind, own, step, calls.profile_close_bandwidth, context, data)


def phase_times(own: Compiled, steps: Timed, threads: int) -> list[float]:
    """Seconds of each phase of one more step."""
    times = np.zeros(64)
    number = own.calls.profile_phases(steps.context, threads, own.ffi.cast("double *", address(times)))
    return [float(x) for x in times[: max(number, 0)]]
