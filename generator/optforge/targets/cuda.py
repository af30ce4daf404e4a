"""The CUDA target: emits CUDA, and runs it on a device through PyCUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cudasource import PLAN, THREADS, TILE, passes, render, scalars_can_fail
from ..device import ALIGNMENT, Device, DeviceSpace
from ..devicesteps import DeviceSteps, struct
from ..dtypes import BY_NUMPY, DTYPES
from ..formats import Wanted
from ..functions import Array
from ..inputs import SameInputs
from ..ir import Kernel
from ..nvcc import cubin
from ..rowsource import Rows
from ..stats import RECORD
from ..tensor import How, Progress, Tensor, explain
from ..tree import CHUNK

if TYPE_CHECKING:
    from ..language import Rule

__all__ = ["CudaEngine", "CudaTarget", "engine", "render"]

ENDINGS = (".cuh", ".cu")  # of the files that it emits

PREFIX = "k"
PLAN_STRUCT = struct(PLAN)
BLOCK = (THREADS, 1, 1)
OWN = ("starting", "stats", "tensor_stats", "control", "rows", "s")  # addresses that each way of doing a step has anew


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and its argument."""

    function: Any
    grid: tuple[int, int, int]
    argument: bytes


class Plan:
    """A prepared step: the tables of its tensors on the device, and what is launched.

    Parameters
    ----------
    engine : CudaEngine
    tensors : sequence of Tensor
    gradients : sequence of View
        Kept alive with the plan.
    """

    def __init__(self, engine: CudaEngine, tensors: Sequence[Tensor], gradients: Sequence[Any]):
        self.engine, self.tensors, self.gradients = engine, tensors, gradients
        self.drv, self.kernel = engine.device.drv, engine.kernel
        self.moved = [
            (array.ptr, tensor.space.hosts[array.ptr], writes)
            for tensor, g in zip(tensors, gradients, strict=True)
            for array, writes in ((tensor.p, True), (g, False))
            if array.size and array.ptr in tensor.space.hosts
        ]
        self.brought: list[Any] = []
        self.used = tuple(sorted({tensor.group for tensor in tensors}))
        with engine.device:
            self.lay_out()
        self.kind: tuple[bool, bool, bool, int] | None = None  # of the steps that it is set for
        self.starting: Any = None

    def lay_out(self) -> None:
        """Bring the tables of the lists, one for each dtype, which are parts of one whole."""
        tensors = self.tensors
        lists: dict[str, list[int]] = {}
        for place, tensor in enumerate(tensors):
            lists.setdefault(BY_NUMPY[tensor.p.dtype].suffix, []).append(place)
        sizes = np.array([tensor.p.size for tensor in tensors], np.uint64)
        chunks = int(sum(-(-tensor.p.size // CHUNK) for tensor in tensors))
        slots = self.engine.slots
        need = Places()
        shared = {}
        shared["sizes"] = need.take(sizes.nbytes)
        shared["first"] = need.take(sizes.nbytes + 8)
        shared["totals"] = need.take(8 * slots)
        shared["tensor_sums"] = need.take(8 * slots * len(tensors))
        shared["sums"] = need.take(8 * slots * chunks)
        self.stats_at = need.take((1 + len(tensors)) * RECORD.itemsize)
        uploads = [(shared["sizes"], sizes)]
        self.lists: list[tuple[str, np.ndarray[Any, Any], int, int]] = []
        for suffix, places in lists.items() or [("f32", [])]:
            plan = np.zeros((), PLAN_STRUCT)
            rows = [self.row(tensors[place], self.gradients[place]) for place in places]
            own = [sizes[place] for place in places]
            table = np.array(rows, np.uint64)
            plan["count"], plan["tensors"], plan["chunks"] = len(places), len(tensors), chunks
            plan["tiles"] = sum(-(-int(n) // TILE) for n in own)
            plan["own_chunks"] = sum(-(-int(n) // CHUNK) for n in own)
            plan["parted"], plan["type"] = 1, list(DTYPES).index(suffix)
            tables = {
                "list": table,
                "part": np.array([[place, 0] for place in places], np.uint64).reshape(-1),
                "group": np.array([tensors[place].group for place in places], np.uint64),
            }
            for name, array in tables.items():
                plan[name] = need.take(array.nbytes)
                uploads.append((int(plan[name]), array))
            plan["tile"], plan["chunk"] = (need.take(8 * (len(places) + 1)) for _ in range(2))
            starting = need.take(len(places))
            for name, place in shared.items():
                plan[name] = place
            self.lists.append((suffix, plan, starting, len(places)))
        base = self.engine.workspace(need.size)
        for place, array in uploads:
            if array.nbytes:
                self.bring(base + place, np.ascontiguousarray(array))
        addresses = [
            name for kind, name, _ in PLAN if kind.endswith("*") and name not in ("starting", "stats", "tensor_stats")
        ]
        for _, plan, _, _ in self.lists:
            for name in addresses:
                plan[name] += base
        self.base = base
        self.places = {suffix: np.array(places, np.intp) for suffix, places in lists.items()}
        for suffix, plan, _, _ in self.lists:
            self.run(Launch(self.engine.function(f"lay_out_{suffix}"), (1, 1, 1), plan.tobytes()))

    def row(self, tensor: Tensor, gradient: Any) -> list[int]:
        """A tensor as kernels take it."""
        states = [tensor.addresses[state.name] for state in self.kernel.state]
        return [tensor.p.size, tensor.addresses["p"], int(gradient.ptr), *states]

    def bring(self, address: int, array: Any) -> None:
        """Copy a table to the device, behind all that was enqueued before."""
        self.drv.memcpy_htod_async(address, array, self.engine.stream)
        self.brought.append(array)  # kept until the copy is done

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
            explain(self.kernel, self.tensors, hyperparameters, t, how)

        kind = (how.stats is not None, how.skip_nonfinite, how.zero_grads, len(hyperparameters))
        if kind != self.kind or how.starting is not self.starting:
            self.set(how, len(hyperparameters))
            self.kind, self.starting = kind, how.starting
        steps.bring(hyperparameters, self.used, t, how.grad_scale, explaining)
        progress = how.progress or Progress(0)
        for address, host, _ in self.moved:
            self.drv.memcpy_htod_async(address, host, self.engine.stream)
        progress.unfinished = "a step"  # until all of it is enqueued
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

    def set(self, how: How, groups: int) -> None:
        """Prepare for steps that are done so: what is launched."""
        engine, observe = self.engine, how.stats is not None
        counted = engine.steps.room(groups)
        for suffix, plan, starting, count in self.lists:
            plan["observe"], plan["skip_nonfinite"], plan["zero_grads"] = observe, how.skip_nonfinite, how.zero_grads
            plan["stats"] = self.base + self.stats_at if observe else 0
            plan["tensor_stats"] = plan["stats"] + RECORD.itemsize if observe else 0
            plan["groups"], plan["starting"] = groups, 0
            for name, place in counted.items():
                plan[name] = place
            if how.starting is not None and count:
                flags = np.ascontiguousarray(how.starting[self.places[suffix]], np.uint8)
                self.bring(self.base + starting, flags)
                plan["starting"] = self.base + starting
        first = self.lists[0][1]
        launches = [Launch(engine.function("begin"), (1, 1, 1), first.tobytes())]
        if engine.tries:
            launches += [self.launch("try_scalars", own, 1) for own in self.lists]
        for number, own in enumerate(engine.passes):
            if own.optional and not how.skip_nonfinite:
                continue
            looks = observe or (number == 0 and how.skip_nonfinite)
            name = own.observed if looks else own.plain
            for entry in self.lists:
                blocks = entry[1]["own_chunks" if own.adds or looks else "tiles"]
                launches.append(self.launch(name, entry, int(blocks), number))
            sums = own.all_sums if looks else own.sums
            if sums:
                first["phase"] = number
                grid = (max(len(self.tensors), 1), sums, 1)
                launches.append(Launch(engine.function("add_up"), grid, first.tobytes()))
        if observe or self.kernel.state_stores:
            launches += [self.launch("finish", own, 1) for own in self.lists]
        self.launches = [launch for launch in launches if launch.grid[0] > 0]
        self.waits = observe or engine.tries or (how.skip_nonfinite and how.starting is not None)

    def launch(self, name: str, entry: tuple[str, Any, int, int], blocks: int, phase: int = 0) -> Launch:
        """A kernel for one list."""
        suffix, plan, _, _ = entry
        plan["phase"] = phase
        return Launch(self.engine.function(f"{name}_{suffix}"), (blocks, 1, 1), plan.tobytes())


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
        self.kernel, self.device, self.stream = kernel, device, stream
        self.passes, self.tries = passes(kernel), scalars_can_fail(kernel)
        self.steps = DeviceSteps(device, Rows(kernel), stream)
        self.slots = sum(own.all_sums for own in self.passes)
        self.module = device.module(cubin(render(rule, kernel, Wanted().storages(kernel), PREFIX), device.capability))
        self.functions: dict[str, Any] = {}
        self.block: Any = None
        self.size = 0

    def function(self, name: str) -> Any:
        """A kernel."""
        if name not in self.functions:
            self.functions[name] = self.module.get_function(f"{PREFIX}_cuda_{name}")
        return self.functions[name]

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

    def plan(self, inputs: SameInputs, behind: Array) -> Plan:
        """Prepare steps over these arrays.

        Raises
        ------
        ValueError
            A tensor has not taken all of the optimizer's steps: the device has one count for all.
        """
        for tensor, steps in zip(inputs.stepped, behind.tolist(), strict=True):
            if steps:
                raise ValueError(
                    f"{tensor.label} had no gradient in {steps} of the steps before, and so has another t than the "
                    'optimizer, which target "cuda" cannot do yet: give it a gradient at each step (of zeros), or '
                    'use target="c"'
                )
        return Plan(self, inputs.stepped, inputs.gradients)


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
