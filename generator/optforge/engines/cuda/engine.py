"""The CUDA target: emits CUDA, and runs it on a device through PyCUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...core.dtypes import DTYPES
from ...core.formats import FORMAT_OF, FORMATS, Storage, Wanted, without_beside
from ...core.functions import Array
from ...core.ir import Kernel
from ...core.summation import CHUNK, LEAF
from ...emit import layout
from ...emit.cuda import Pass, passes_of, render, scalars_can_fail
from ...emit.rule import Rule
from ..inputs import Inputs, SameInputs
from ..stats import RECORD
from ..tensor import How, Progress, explain
from .device import ALIGNMENT, Device, DeviceSpace
from .nvcc import cubin
from .rows import Rows
from .steps import DeviceSteps, Row, struct

PREFIX, SUFFIX = "k", "own"
OWN, RUNTIME = f"{PREFIX}_cuda", "optforge_cuda"  # what the names of kernels begin with
PLAN_STRUCT = struct("optforge_cuda_plan")
UNIT = struct("optforge_cuda_unit")
THREADS = layout.constant("OPTFORGE_CUDA_THREADS")
WARPS = THREADS // 32
BLOCK = (THREADS, 1, 1)


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and its argument."""

    function: Any
    grid: tuple[int, int, int]
    argument: bytes


@dataclass
class Listed:
    """The tensors of one kind: how they are stored, their plan, their places among all, where flags of a start are."""

    formats: tuple[str, ...]
    plan: Any
    places: Any
    starting: int


class CudaPlan:
    """A prepared step: the tables of its tensors on the device, and what is launched.

    Parameters
    ----------
    engine : CudaEngine
    inputs : Inputs
        Of the gradients only the addresses are kept.
    behind : array
        How many of the optimizer's steps each tensor has not taken: its t is so much less.
    """

    def __init__(self, engine: CudaEngine, inputs: Inputs, behind: Array):
        self.engine, self.tensors, self.behind = engine, inputs.stepped, behind
        self.ranges, self.places, gradients = inputs.ranges, inputs.places, inputs.gradients
        self.drv, self.kernel = engine.device.drv, engine.kernel
        self.brought: dict[int, Any] = {}
        # Tensors of one group that have had as many steps have the same scalars.
        self.row: list[Row] = [(own.group, late) for own, late in zip(self.tensors, behind.tolist(), strict=True)]
        self.rows: tuple[Row, ...] = tuple(sorted(set(self.row))) or ((0, 0),)
        self.fixed = self.addresses()
        self.dtypes = [g.dtype for g in gradients]
        with engine.device:
            self.lay_out()
            self.take(gradients)
        self.kind: tuple[Any, ...] | None = None  # of the steps that it is set for
        self.starting: Any = None

    def addresses(self) -> Any:
        """What a plan is made for: of each tensor its size and group, and where its parameter and state are."""
        names = ["p", *(state.name for state in self.kernel.state)]
        rows = [[own.p.size, own.group, *(own.addresses[name] for name in names)] for own in self.tensors]
        return np.array(rows, np.uint64).reshape(len(rows), 2 + len(names))

    def serves(self, inputs: Inputs, behind: Array) -> bool:
        """Whether it is for these tensors, where they are now, and gradients of these dtypes.

        Inputs have other `ranges` where a parameter is elsewhere since, and state stays where it is.
        """
        same = inputs.ranges is self.ranges and inputs.places == self.places
        return same and [g.dtype for g in inputs.gradients] == self.dtypes and np.array_equal(behind, self.behind)

    def take(self, gradients: Sequence[Any]) -> None:
        """Other gradients, of the same sizes: one copy of their addresses for each list."""
        addresses = np.fromiter((g.ptr for g in gradients), np.uint64, len(gradients))
        for own in self.lists:
            if len(own.places):
                self.bring(int(own.plan["gradients"]), addresses[own.places])
        hosts = self.tensors[0].space.hosts if self.tensors else {}
        self.moved = [
            (array.ptr, hosts[array.ptr], writes)
            for tensor, g in (zip(self.tensors, gradients, strict=True) if hosts else ())
            for array, writes in ((tensor.p, True), (g, False))
            if array.size and array.ptr in hosts
        ]

    def lay_out(self) -> None:
        """Bring the tables of the lists, one for each way to store arrays, which are parts of one whole."""
        tensors, slots, need = self.tensors, self.engine.slots, Places()
        lists: dict[tuple[str, ...], list[int]] = {}
        for place, (tensor, dtype) in enumerate(zip(tensors, self.dtypes, strict=True)):
            dtypes = (tensor.p.dtype, dtype, *(array.dtype for array in tensor.arrays.values()))
            lists.setdefault(tuple(FORMAT_OF[own].name for own in dtypes), []).append(place)
        late = np.array([behind for _, behind in self.rows], np.uint64)
        sizes = self.fixed[:, 0].astype(np.int64)
        leaves, chunks = -(-sizes // LEAF), np.maximum(-(-sizes // CHUNK), 1)
        whole = {"tensors": len(tensors), "leaves": int(leaves.sum()), "chunks": int(chunks.sum())}
        shared = {
            "sizes": need.take(sizes.nbytes),
            "first": need.take(sizes.nbytes + 8),
            "before_chunk": need.take(sizes.nbytes + 8),
            "chunk": need.take(UNIT.itemsize * whole["chunks"]),
            "totals": need.take(8 * slots),
            "tensor_sums": need.take(8 * slots * len(tensors)),
            "chunk_sums": need.take(8 * slots * whole["chunks"]),
            "sums": need.take(8 * slots * whole["leaves"]),
            "arrived": need.take(4 * slots * (len(tensors) + 1)),
            "behind": need.take(late.nbytes),
        }
        self.stats_at = need.take((1 + len(tensors)) * RECORD.itemsize)
        uploads = [(shared["sizes"], sizes), (shared["behind"], late)]
        self.lists: list[Listed] = []
        for formats, places in lists.items() or [((), [])]:
            plan, count = np.zeros((), PLAN_STRUCT), len(places)
            table = np.insert(self.fixed[places][:, [0, *range(2, self.fixed.shape[1])]], 2, 0, axis=1)
            units = int(leaves[places].sum())
            values = {**whole, "count": count, "stride": 8 * table.shape[1], "units": units, "parted": 1}
            for name, value in values.items():
                plan[name] = value
            tables = {
                "list": table,
                "number": np.array(places, np.uint64),
                "part": np.zeros(count, np.uint64),
                "group": np.array([self.rows.index(self.row[place]) for place in places], np.uint64),
                "stream": np.array([tensors[place].stream for place in places], np.uint64),
            }
            for name, array in tables.items():
                plan[name] = need.take(array.nbytes)
                uploads.append((int(plan[name]), array))
            for name, size in (("gradients", 8 * count), ("before", 8 * (count + 1))):
                plan[name] = need.take(size)
            plan["unit"] = need.take(UNIT.itemsize * units)
            for name, place in shared.items():
                plan[name] = place
            self.lists.append(Listed(formats, plan, np.array(places, np.intp), need.take(count)))
        self.base = base = self.engine.workspace(need.size)
        for place, array in uploads:
            if array.nbytes:
                self.bring(base + place, np.ascontiguousarray(array))
        self.drv.memset_d8_async(base + shared["arrived"], 0, 4 * slots * (len(tensors) + 1), self.engine.stream)
        own = ("list", "number", "part", "stream", "gradients", "group", "before", "unit")
        for listed in self.lists:
            for name in (*own, *shared):
                listed.plan[name] += base
            listed.starting += base
            argument, most = listed.plan.tobytes(), max(len(listed.places), len(tensors))
            self.run(Launch(self.engine.runtime("lay_tensors"), (1, 1, 1), argument))
            if most:
                self.run(Launch(self.engine.runtime("lay_units"), (-(-most // WARPS), 1, 1), argument))

    def bring(self, address: int, array: Any) -> None:
        """Copy a table to the device, behind all that was enqueued before."""
        self.drv.memcpy_htod_async(address, array, self.engine.stream)
        self.brought[address] = array  # kept until the copy is done, as far as anybody can tell

    def run(self, launch: Launch) -> None:
        """Launch a kernel, as PyCUDA's prepared_async_call does behind a deprecated call of the driver."""
        launch.function._launch_kernel(launch.grid, BLOCK, launch.argument, 0, self.engine.stream)

    # ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────

    def step(self, hyperparameters: Any, t: int, how: How) -> bool | None:
        """One step in place, with the hyperparameters of each group; whether it was skipped, None if nobody knows yet.

        It only enqueues work, unless statistics are wanted, or scalars of a tensor may have no value.

        Raises
        ------
        ScalarError
            A scalar of the rule has no value; nothing was written.
        """
        with self.engine.device:
            return self.enqueue(hyperparameters, t, how)

    def enqueue(self, hyperparameters: Any, t: int, how: How) -> bool | None:
        """`step`, where the device's context is current."""
        steps = self.engine.steps

        def explaining() -> None:
            explain(self.kernel, self.tensors, hyperparameters, t - self.behind, how)

        stored = how.master, how.stochastic, how.seed
        kind = (how.stats is not None, how.skip_nonfinite, how.zero_grads, *stored)
        if kind != self.kind or how.starting is not self.starting:
            self.set(how)
            self.kind, self.starting = kind, how.starting
        begin = steps.bring(hyperparameters, self.rows, t, how.grad_scale, explaining, self.store)
        progress = how.progress or Progress(0)
        for address, host, _ in self.moved:
            self.drv.memcpy_htod_async(address, host, self.engine.stream)
        progress.unfinished = "a step"  # until all of it is enqueued
        self.run(Launch(self.engine.function("begin"), (1, 1, 1), self.first + begin))
        for launch in self.launches:
            self.run(launch)
        if self.moved:
            steps.wait()
        for address, host, writes in self.moved:
            if writes or how.zero_grads:
                self.drv.memcpy_dtoh(host, address)
        skipped: bool | None = False
        if self.waits:
            skipped = self.outcome(explaining, how, progress)
        elif how.skip_nonfinite:
            steps.defer(t)
            skipped, progress.undecided = None, True
        else:
            steps.done(t, False)
            progress.count[0] = t
        progress.unfinished = ""
        return skipped

    def outcome(self, explaining: Callable[[], None], how: How, progress: Progress) -> bool:
        """What the device has decided: whether the step was skipped."""
        steps = self.engine.steps
        control = steps.read()
        if control["idle"]:
            steps.applied()
            progress.unfinished = ""
            explaining()
            status = int(control["status"])
            raise RuntimeError(f"rule {self.kernel.name!r}: the device did not do a step (status {status})")
        steps.done(int(control["t"]), bool(control["skipped"]))
        progress.count[0], progress.undecided = int(control["t"]) - int(control["skipped"]), False
        if how.stats is not None:
            self.drv.memcpy_dtoh(how.stats, self.base + self.stats_at)
        return bool(control["skipped"])

    def set(self, how: How) -> None:
        """Prepare for steps that are done so: what is launched."""
        engine, observe = self.engine, how.stats is not None
        counted = engine.steps.room(len(self.rows))
        for own in self.lists:
            plan, count = own.plan, len(own.places)
            plan["observe"], plan["skip_nonfinite"], plan["zero_grads"] = observe, how.skip_nonfinite, how.zero_grads
            plan["seed"] = how.seed
            plan["stats"] = self.base + self.stats_at if observe else 0
            plan["tensor_stats"] = plan["stats"] + RECORD.itemsize if observe else 0
            plan["groups"], plan["width"], plan["starting"] = len(self.rows), engine.steps.rows.size // 8, 0
            for name, place in counted.items():
                plan[name] = place
            if how.starting is not None and count:
                flags = np.ascontiguousarray(how.starting[own.places], np.uint8)
                self.bring(own.starting, flags)
                plan["starting"] = own.starting
        first = self.lists[0].plan
        self.first = first.tobytes()
        launches = []
        if engine.tries:
            launches += [self.launch(own, "attempt", -(-len(own.places) // THREADS)) for own in self.lists]
        for own_pass in engine.passes:
            if own_pass.optional and not how.skip_nonfinite:
                continue
            launches += self.passed(own_pass, how, observe)
        if observe or self.kernel.state_stores:
            blocks = max(-(-len(self.tensors) // THREADS), 1)
            launches += [self.launch(own, "finish", blocks) for own in self.lists]
        self.launches = [launch for launch in launches if launch.grid[0] > 0]
        self.waits = observe or engine.tries or (how.skip_nonfinite and how.starting is not None)

    def passed(self, own: Pass, how: How, observe: bool) -> list[Launch]:
        """A pass over each list, and what adds up behind it."""
        engine = self.engine
        scans = own.optional and not observe
        looks = observe or (own.number == 0 and how.skip_nonfinite and not own.optional)
        name = own.observed if looks else own.plain
        launches = []
        for listed in self.lists:
            if len(listed.places):
                module, suffix = engine.stored(listed.formats, how.master, how.stochastic)
                function, blocks = engine.function(f"{name}_{suffix}", module), -(-int(listed.plan["units"]) // WARPS)
                launches.append(Launch(function, (blocks, 1, 1), listed.plan.tobytes()))
        sums = own.all_sums if looks or scans else own.sums
        if sums:
            first = self.lists[0].plan
            first["phase"], first["slot"] = own.number, engine.first[own.number] + scans
            grid = (max(-(-int(first["chunks"]) // WARPS), 1), sums - scans, 1)
            launches.append(Launch(engine.function("fold"), grid, first.tobytes()))
        return launches

    def launch(self, own: Listed, name: str, blocks: int) -> Launch:
        """A kernel for one list."""
        return Launch(self.engine.function(name), (blocks, 1, 1), own.plan.tobytes())

    def store(self, news: bytes) -> None:
        """Hand over scalars that are too many for the begin of a step."""
        self.run(Launch(self.engine.function("begin"), (1, 1, 1), self.first + news))


def compiled(
    rule: Rule, kernel: Kernel, capability: tuple[int, int], storages: Sequence[Storage] = ()
) -> dict[str, Path]:
    """The cubins of a rule and of the runtime, by what the names of their kernels begin with.

    Arrays are stored as they are computed with, unless there are `storages`.

    Raises
    ------
    EnvironmentProblem
        They cannot be compiled.
    """
    files = render(rule, kernel, storages or Wanted().storages(kernel), PREFIX)
    own = {name: text for name, text in files.items() if name != "optforge.cu"}
    shared = {name: files[name] for name in layout.CUDA_FILES}
    return {OWN: cubin(own, capability), RUNTIME: cubin(shared, capability)}


class Places:
    """Gives out places in a block of memory."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, size: int) -> int:
        """Room for so many bytes."""
        place = self.size
        self.size += -(-size // 16) * 16
        return place


class CudaEngine:
    """A kernel compiled for a device and loaded there.

    Raises
    ------
    EnvironmentProblem
        It cannot be compiled or loaded.
    """

    def __init__(self, rule: Rule, kernel: Kernel, device: Device, stream: Any = None):
        self.rule, self.kernel, self.device, self.stream = rule, kernel, device, stream
        self.passes, self.tries = passes_of(kernel), scalars_can_fail(kernel)
        self.steps = DeviceSteps(device, Rows(kernel), stream)
        self.slots = sum(own.all_sums for own in self.passes)
        self.first = [sum(own.all_sums for own in self.passes[:k]) for k in range(len(self.passes))]
        self.modules = {name: device.module(path) for name, path in compiled(rule, kernel, device.capability).items()}
        self.functions: dict[tuple[str, str], Any] = {}
        self.storages: dict[tuple[tuple[str, ...], str, bool], str] = {}
        self.last: CudaPlan | None = None
        self.block: Any = None
        self.size = 0

    def function(self, name: str, of: str = OWN) -> Any:
        """A kernel of the rule."""
        if (of, name) not in self.functions:
            begin = of if of in (OWN, RUNTIME) else OWN
            self.functions[of, name] = self.modules[of].get_function(f"{begin}_{name}")
        return self.functions[of, name]

    def runtime(self, name: str) -> Any:
        """A kernel of the runtime."""
        return self.function(name, RUNTIME)

    def stored(self, formats: tuple[str, ...], master: str, stochastic: bool) -> tuple[str, str]:
        """The module of the passes over arrays of these formats, p, g and the state, and what ends their names.

        Where they are others than what is computed with they are compiled when they are first met.

        Raises
        ------
        EnvironmentProblem
            They cannot be compiled.
        """
        if len(set(formats)) == 1 and formats[0] in DTYPES:
            return OWN, formats[0]
        key = (formats, master, stochastic)
        if key not in self.storages:
            scaled = [format for format in formats if FORMATS[format].scales]
            kernel = without_beside(self.kernel, master, scaled)
            own = tuple((name, FORMATS[format]) for name, format in zip(kernel.arrays, formats, strict=False))
            storage = Storage(SUFFIX, own, master, stochastic)
            name = f"{OWN} {len(self.storages)}"
            path = compiled(self.rule, kernel, self.device.capability, [storage])[OWN]
            self.modules[name] = self.device.module(path)
            self.storages[key] = name
        return self.storages[key], SUFFIX

    def workspace(self, size: int) -> int:
        """The address of so many bytes, kept for the next plan."""
        if self.block is None or self.size < size:
            self.block = None
            self.block, self.size = self.device.allocate(size + ALIGNMENT), size
        return int(self.block)

    def applied(self) -> int:
        """The number of steps that were applied; waits for the device."""
        return self.steps.applied()

    inputs = SameInputs

    def plan(self, inputs: Inputs, behind: Array) -> CudaPlan:
        """Prepare steps over these arrays; of other gradients the device is only told the addresses."""
        last = self.last
        if last is None or not last.serves(inputs, behind):
            self.last = CudaPlan(self, inputs, behind)
            return self.last
        with self.device:
            last.take(inputs.gradients)
        return last


@dataclass(frozen=True)
class CudaTarget:
    """The CUDA target on a chosen device or stream: pass it as `target` to `Optimizer`.

    Parameters
    ----------
    device : int
        Number of the device, from 0.
    stream : pycuda.driver.Stream, optional
        The stream on which steps are enqueued; the default stream if left out, which other libraries wait for unless
        they use streams of their own. They can wrap its handle: torch.cuda.ExternalStream(stream.handle).
    """

    device: int = 0
    stream: Any = None

    def space(self) -> DeviceSpace:
        """Where arrays are."""
        return DeviceSpace(self.device)

    def __call__(self, rule: Rule, kernel: Kernel) -> CudaEngine:
        """The engine of a rule."""
        return CudaEngine(rule, kernel, self.space().device, self.stream)


engine = CudaTarget()
