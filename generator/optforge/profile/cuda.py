"""Kernels on a GPU, against a copy on the device and against the same traffic without mathematics.

Times are those of CUDA events before and behind a block of steps. No GPU has run this yet: what is tested is that it
runs, on an emulation of the device, whose times mean nothing.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.diagnostics import UsageError
from ..emit.text import render_template
from ..library.rule import Rule
from .kernels import LOSS_SCALE, Block, summary
from .limits import WORKS, Needs, needs
from .measure import Rounds, turns
from .models import Model
from .statistics import estimate

BLOCK_SECONDS = 0.05
PARTS = 5  # of a block, each timed by itself
MOST_STEPS = 1000
THREADS, BLOCKS = 256, 4096  # of a block, and blocks at most, of the streams
COPIED = 1 << 30  # bytes of a copy at most
ROOM = 0.8  # of the device's free memory
SHAPES = {4: ("uint4", "unsigned", 4), 8: ("ulonglong2", "unsigned long long", 2)}  # by bytes of an element
NAMES = "xyzw"


class Gpu:
    """The first device."""

    def __init__(self) -> None:
        from ..engines.cuda import engine, nvcc
        from ..engines.cuda.device import device

        self.device = device(0)
        self.drv = self.device.drv
        self.space = engine.CudaTarget().space()
        self.nvcc = nvcc
        nvcc.find()
        with self.device:
            self.start, self.end = self.drv.Event(), self.drv.Event()

    @property
    def isa(self) -> str:
        """The architecture, as nvcc calls it."""
        return "sm_{}{}".format(*self.device.capability)

    def about(self) -> dict[str, Any]:
        """The device, for the document."""
        with self.device:
            free, total = self.drv.mem_get_info()
        found: dict[str, Any] = {"name": self.device.name, "memory": total, "free": free}
        with contextlib.suppress(Exception):  # an older driver or PyCUDA may not tell
            own = self.drv.Device(0)
            kinds = self.drv.device_attribute
            found["multiprocessors"] = own.get_attribute(kinds.MULTIPROCESSOR_COUNT)
            found["l2"] = own.get_attribute(kinds.L2_CACHE_SIZE)
            found["driver"] = self.drv.get_driver_version()
        return found

    def arrays(self, sizes: Sequence[int], dtype: Any, scale: float) -> list[Any]:
        """Arrays in one block that hold noise, each beginning at a multiple of 256 bytes, as allocators place them."""
        item = np.dtype(dtype).itemsize
        rooms = [-(-size * item // 256) * 256 for size in sizes]
        block = self.device.allocate(sum(rooms))
        noise = (scale * np.random.default_rng(20).standard_normal(min(sum(rooms) // item, 1 << 20))).astype(dtype)
        with self.device:
            for begin in range(0, sum(rooms), max(noise.nbytes, 1)):
                part = noise[: (min(noise.nbytes, sum(rooms) - begin)) // item]
                self.drv.memcpy_htod(int(block) + begin, part)
        starts = np.cumsum([0, *rooms])[:-1].tolist()
        return [self.space.made((size,), dtype, block, at) for size, at in zip(sizes, starts, strict=True)]


class Enqueued:
    """A contender whose steps are enqueued, and timed by events around some of them."""

    def __init__(self, name: str, gpu: Gpu, step: Callable[[], Any]):
        self.name, self.gpu, self.step = name, gpu, step
        self.took = self.timed(1)
        self.took = self.timed(2)

    def timed(self, steps: int) -> float:
        """Seconds of a step."""
        gpu = self.gpu
        with gpu.device:
            gpu.start.record()
        for _ in range(steps):
            self.step()
        with gpu.device:
            gpu.end.record()
            gpu.end.synchronize()
            return max(float(gpu.start.time_till(gpu.end)) / 1e3, 1e-9) / steps

    def block(self, seconds: float) -> Block:
        """Steps for so long, in parts."""
        steps = min(max(int(seconds / PARTS / self.took), 1), MOST_STEPS)
        times = [self.timed(steps) for _ in range(PARTS)]
        self.took = statistics.median(times)
        return summary(times)


@dataclass(frozen=True)
class Plan:
    """A rule over a model's tensors on the device."""

    rule: Rule
    settings: dict[str, Any]
    own: Needs
    model: Model
    work: str


def plans(
    rules: Sequence[tuple[Rule, Sequence[Needs], dict[str, Any]]],
    models: Callable[[int], Sequence[Model]],
    free: int,
    note: Callable[[str], None],
) -> list[Plan]:
    """All rows, in the order in which they are shown."""
    found = []
    for rule, every, settings in rules:
        for own in every:
            if own.storage.real.bytes not in SHAPES or own.storage.inexact or own.storage.master:
                raise UsageError("on a GPU arrays are stored as float32 or float64: leave --store and --master out")
            for model in models(own.resident):
                if own.resident * model.elements > ROOM * free:
                    note(f"{model.label} was left out: its arrays need more memory than the device has left")
                    continue
                found += [Plan(rule, settings, own, model, work) for work in WORKS]
    return found


def traffic(gpu: Gpu, plan: Plan, arrays: dict[str, Sequence[Any]]) -> Callable[[], None]:
    """What moves a plan's streams without mathematics."""
    vector, word, lanes = SHAPES[plan.own.storage.real.bytes]
    passes = [
        [{"name": f"a{s.place}", "place": s.place, "reads": s.reads, "writes": s.writes} for s in part.streams]
        for part in plan.own.of(plan.work)
    ]
    shown = {"passes": passes, "vector": vector, "word": word, "lanes": lanes, "parts": NAMES[:lanes]}
    text = render_template("profile/streams.cu.j2", shown)
    module = gpu.device.module(gpu.nvcc.cubin({"streams.cu": text}, gpu.device.capability))
    columns = [arrays.get(name) for name in plan.own.names]
    rows = [
        [array.size, *(int(column[k].ptr) if column else 0 for column in columns)]
        for k, array in enumerate(arrays["p"])
    ]
    table = np.array(rows, np.uint64)
    block = gpu.device.allocate(table.nbytes)
    most = max(-(-int(row[0]) // lanes // THREADS) for row in rows)
    grid = (min(max(most, 1), BLOCKS), len(rows), 1)
    with gpu.device:
        gpu.drv.memcpy_htod(int(block), table)
        functions = [module.get_function(f"profile_streams_{k}") for k in range(len(passes))]

    def step() -> None:
        with gpu.device:
            for function in functions:
                function(
                    np.uint64(int(block)), np.uint32(table.shape[1]), np.uint64(0), block=(THREADS, 1, 1), grid=grid
                )

    return step


def registers(optimizer: Any) -> list[dict[str, Any]]:
    """Registers and spilled bytes of each kernel that was launched, as the driver tells them."""
    found = []
    for (_, name), function in getattr(optimizer._engine, "functions", {}).items():
        with contextlib.suppress(Exception):  # not all drivers tell
            found.append({"kernel": name, "registers": function.num_regs, "spilled": function.local_size_bytes})
    return found


def copy(gpu: Gpu) -> tuple[Callable[[], None], int]:
    """A copy from the device to itself, and the bytes that it reads and writes."""
    with gpu.device:
        size = min(COPIED, max(int(gpu.drv.mem_get_info()[0]) // 8, 1024)) // 256 * 256
    source, target = gpu.arrays([size // 4, size // 4], np.float32, 1.0)

    def step() -> None:
        with gpu.device:
            gpu.drv.memcpy_dtod_async(int(target.ptr), int(source.ptr), size, None)

    return step, 2 * size


def measure(
    gpu: Gpu, every: Sequence[Plan], seconds: float, progress: Callable[[str, float], None]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the document, and the bandwidth of the device."""
    run, size = copy(gpu)
    copied = Enqueued("copy", gpu, run)
    best = size / min(turns([copied], 1.0, BLOCK_SECONDS).low("copy"))
    rows = []
    for plan in every:
        progress(f"{plan.rule.name} {plan.own.storage.suffix} {plan.work} {plan.model.name}, {gpu.isa}", 1 / len(every))
        rows.append(row(gpu, plan, best, *rounds(gpu, plan, copied, seconds / len(every))))
    # Reads and triads are of the CPU's profile; on a device the copy is what people know.
    return rows, [{"level": "memory", "threads": 1, "bytes": size, "read": 0.0, "copy": best, "triad": best}]


def rounds(gpu: Gpu, plan: Plan, copied: Enqueued, seconds: float) -> tuple[Rounds, list[dict[str, Any]]]:
    """A step, its traffic and the copy, in turns."""
    from ..train.optimizer import Optimizer

    sizes = [int(np.prod(shape)) for shape in plan.model.shapes]
    dtype, phase = plan.own.storage.real.numpy, plan.work == "phase"
    params = gpu.arrays(sizes, dtype, 0.02)
    grads = gpu.arrays(sizes, dtype, 1e-3 * (LOSS_SCALE if phase else 1))
    how: dict[str, Any] = {"grad_scale": LOSS_SCALE, "stats": True} if phase else {}
    opt = Optimizer(params, plan.rule, target="cuda", skip_nonfinite=phase, **plan.settings)
    steps = Enqueued("kernel", gpu, lambda: opt.step(grads, **how))
    scalar = {state.name for state in opt._kernel.scalar_state}
    arrays = {"p": params, "g": grads, **{n: opt.state[n] for n in plan.own.names[2:] if n not in scalar}}
    alone = Enqueued("traffic", gpu, traffic(gpu, plan, arrays))
    return turns([steps, alone, copied], seconds, BLOCK_SECONDS), registers(opt)


def row(gpu: Gpu, plan: Plan, best: float, found: Rounds, code: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the document: the limit is the faster of a copy of as many bytes and of the same streams."""
    n, moved = plan.model.elements, plan.own.bytes(plan.work)
    step, alone = found.low("kernel"), found.low("traffic")
    limit = [min(a, moved * n / best) for a in alone]
    taken = estimate([1e9 * t / n for t in step])
    cache = gpu.about().get("l2") or 0
    return {
        "rule": plan.rule.name,
        "hash": plan.rule.hash,
        "store": plan.own.storage.suffix,
        "work": plan.work,
        "size": {"name": plan.model.name, "tensors": len(plan.model.shapes), "elements": n},
        "threads": 1,
        "isa": gpu.isa,
        "cache": "warm",
        "level": "L2" if plan.own.resident * n <= cache else "memory",
        "bytes": moved,
        "sums": plan.own.sums(plan.work),
        "operations": dict(plan.own.operations(plan.work)),
        "ns": vars(taken),
        "traffic_ns": 1e9 * statistics.median(limit) / n,
        "divider_ns": 0.0,
        "share": vars(estimate([b / a for a, b in zip(step, limit, strict=True)])),
        "gbs": moved / taken.value,
        "contended": False,
        "phases": [],
        "code": [],
        "counters": {},
        "registers": code,
        "rounds": found.as_dict(),
    }


def needed(rule: Rule, stored: Any, settings: dict[str, Any]) -> list[Needs]:
    """What a rule needs in each way to store its arrays."""
    kernel, storages = rule.stored(stored, {**rule.definition.settings, **settings})
    return [needs(kernel, storage) for storage in storages]
