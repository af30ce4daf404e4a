"""Times optimizer steps on a GPU against the bandwidth of a copy, and against PyTorch's where it is installed.

    python benchmarks/gpu.py [--sizes full|brief|small|tiny] [--parts NAME,…] [--rounds N] [--no-sweep]
                             [--limit SECONDS] [--json FILE]

README.md says what is measured, and how. A part that fails is told, and the others go on. Exit codes: 0 measured, 1 a
part failed or PyTorch's results differ, 2 a mistake in the arguments, 3 no GPU, or something else that is missing, 4
nothing failed, but some parts were not begun in time.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

try:
    import numpy as np

    import optforge as of
    import optforge.engines.cuda.engine as cuda_target
    from optforge.core.diagnostics import EnvironmentProblem
    from optforge.core.formats import FORMAT_OF, storage
    from optforge.engines.cuda import nvcc
    from optforge.engines.cuda.device import device, driver
except ImportError as problem:
    print(f"gpu.py needs NumPy and optforge in one environment: {problem}", file=sys.stderr)
    sys.exit(3)

from optforge.profile.models import Model, gpt2, many, perceptron, resnet20, resnet50

torch: Any = None  # where it is installed, and has a device, and is not too slow to import

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"

LR = 1e-3
MAX_NORM = 1.0
LOSS_SCALE = 65536.0
EMULATED = "optforge emulation"  # the name of a device that is none
COPIED_BYTES = 1 << 30  # by a copy, at most
SHARE_OF_MEMORY = 0.85  # of what is free, that a comparison may take
WARM_STEPS = 3
MOST_STEPS = 1000  # of a block

# After a few steps from the same start parameters may differ by this many units in the last place, and by this share of
# the learning rate per step.
AGREEING_STEPS, ULPS, RATE_SHARE = 3, 4, 1e-4


@dataclass(frozen=True)
class Sizes:
    """How large a run is."""

    name: str
    elements: int  # of one large tensor, where they fit
    swept: int  # elements of the sweep
    models: tuple[Model, ...]
    rounds: int
    seconds: float  # of a block
    sweep: bool  # whole, or a few variants to see that it works
    enqueued: int = 200  # steps at once: fewer than a stream takes before it makes the host wait


MANY, GPT2, RESNET = many(10_000), Model("GPT-2 small", gpt2()), Model("ResNet-50", resnet50())
MILLION = Model("one tensor of 1 M", [(1_000_000,)])
MODELS = (GPT2, MANY, RESNET, MILLION)
SIZES = {
    "full": Sizes("full", 10**9, 1 << 28, MODELS, rounds=7, seconds=0.2, sweep=True),
    "brief": Sizes("brief", 10**9, 1 << 28, MODELS, rounds=3, seconds=0.1, sweep=True),
    "small": Sizes(
        "small",
        1 << 26,
        1 << 25,
        (many(1_000), Model("GPT-2 miniature", gpt2(width=96, words=4096, positions=256))),
        rounds=5,
        seconds=0.05,
        sweep=True,
    ),
    "tiny": Sizes(
        "tiny",
        4096,
        2048,
        (many(20), Model("MLP", perceptron(20, 10))),
        rounds=1,
        seconds=0.0,
        sweep=False,
        enqueued=6,
    ),
}

# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Gpu:
    """The first device, and arrays on it that hold noise."""

    def __init__(self) -> None:
        self.device = device(0)
        self.drv = self.device.drv
        self.space = cuda_target.CudaTarget().space()
        nvcc.find()

    def free(self) -> int:
        """The bytes that a comparison may take."""
        return int(SHARE_OF_MEMORY * self.drv.mem_get_info()[0])

    def noise(self, shapes: Sequence[tuple[int, ...]], dtype: Any, scale: float) -> list[Any]:
        """Arrays in one block, each beginning at a multiple of 256 bytes, as allocators place them."""
        itemsize = np.dtype(dtype).itemsize
        sizes = [-(-math.prod(shape) * itemsize // 256) * 256 for shape in shapes]
        total = sum(sizes)
        block = self.device.allocate(total)
        values = scale * np.random.default_rng(20).standard_normal(min(total // itemsize, 1 << 20))
        filled = FORMAT_OF[np.dtype(dtype)].store(values.astype(np.float32)) if itemsize == 2 else values.astype(dtype)
        self.drv.memcpy_htod(int(block), filled)
        done = filled.nbytes
        while done < total:  # what is there again and again
            self.drv.memcpy_dtod(int(block) + done, int(block), min(done, total - done))
            done += min(done, total - done)
        starts = np.cumsum([0, *sizes])[:-1].tolist()
        made = self.space.made
        return [made(shape, dtype, block, at) for shape, at in zip(shapes, starts, strict=True)]

    def name(self) -> str:
        """The device's name as a part of a file's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.name.lower()).strip("-")


# ── who competes ────────────────────────────────────────────────────────────────────────────────────────────────────


class Contender:
    """One side of a comparison: what is timed, and the bytes that it cannot but move."""

    def __init__(self, name: str, moved: int, step: Callable[[], Any]):
        self.name, self.moved, self.step = name, moved, step


def copy(gpu: Gpu, most: int) -> Contender:
    """A copy from the device to itself, which reads and writes."""
    size = min(COPIED_BYTES, max(most // 8, 1024))
    source, target = gpu.noise([(size // 4,), (size // 4,)], np.float32, 1.0)
    return Contender("copy", 2 * size, lambda: gpu.drv.memcpy_dtod_async(target.ptr, source.ptr, size, None))


def moved(rule: of.Rule, params: Sequence[Any], **how: bool) -> int:
    """Bytes of parameters, gradients and state that one step moves."""
    streams = sum(rule.kernel().moved) + how.get("zero_grads", False)
    return sum(streams * p.nbytes for p in params)


def step(name: str, rule: of.Rule, params: Sequence[Any], grads: Sequence[Any], **settings: Any) -> Contender:
    """A step alone, enqueued without waiting for it."""
    optimizer = of.Optimizer(params, rule, target="cuda", **settings)
    return Contender(name, moved(rule, params), lambda: optimizer.step(grads))


def phase_rule() -> of.Rule:
    """AdamW behind a clipping by the global norm, as PyTorch clips."""
    return of.clip_by_global_norm(form="pytorch", max_norm=MAX_NORM) >> of.rules.adamw


def phase(name: str, params: Sequence[Any], grads: Sequence[Any], stats: bool, zero_grads: bool = False) -> Contender:
    """The whole phase: unscale, clip, skip, AdamW; the host learns the outcome of each step before the next."""
    rule = phase_rule()
    how = {"skip_nonfinite": True, "zero_grads": zero_grads}
    optimizer = of.Optimizer(params, rule, target="cuda", lr=LR, **how)
    return Contender(
        name, moved(rule, params, **how), lambda: optimizer.step(grads, grad_scale=LOSS_SCALE, stats=stats)
    )


class TorchSide:
    """Parameters and gradients for PyTorch's optimizers."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]):
        self.params = [torch.randn(shape, device="cuda").requires_grad_() for shape in shapes]
        for p in self.params:
            p.grad = torch.randn_like(p, requires_grad=False)
        self.grads = [p.grad for p in self.params]
        self.bytes = sum(p.numel() * p.element_size() for p in self.params)

    def given(self) -> Contender:
        """AdamW of optforge over PyTorch's tensors, whose addresses it asks for at each step."""
        return step("optforge, PyTorch's tensors", of.rules.adamw, self.params, self.grads, lr=LR)

    def step(self, how: str) -> Contender:
        """AdamW alone."""
        optimizer = torch.optim.AdamW(self.params, lr=LR, weight_decay=0.01, **{how: True})
        return Contender(f"PyTorch {how}", 7 * self.bytes, optimizer.step)

    def phase(self, how: str) -> Contender:
        """Unscale and look for what is not finite as GradScaler does, clip, and step unless the host is told not to."""
        optimizer = torch.optim.AdamW(self.params, lr=LR, weight_decay=0.01, **{how: True})
        scale = torch.full((), 1 / LOSS_SCALE, device="cuda")

        def steps() -> None:
            found = torch.zeros((), device="cuda")
            torch._amp_foreach_non_finite_check_and_unscale_(self.grads, found, scale)
            torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM, foreach=True)
            if not found.item():
                optimizer.step()

        return Contender(f"PyTorch {how}", 8 * self.bytes, steps)

    def replayed(self, whole: bool) -> Contender:
        """AdamW `fused` from a captured graph, alone or as a whole phase in which the device decides."""
        optimizer = torch.optim.AdamW(self.params, lr=LR, weight_decay=0.01, fused=True, capturable=True)
        scale, found = (torch.full((), value, device="cuda") for value in (1 / LOSS_SCALE, 0.0))

        def steps() -> None:
            if whole:
                found.zero_()
                torch._amp_foreach_non_finite_check_and_unscale_(self.grads, found, scale)
                torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM, foreach=True)
                optimizer.grad_scale, optimizer.found_inf = None, found  # as GradScaler sets them
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_STEPS):
                steps()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            steps()
        return Contender("PyTorch fused", (8 if whole else 7) * self.bytes, graph.replay)


class Disagreement(Exception):
    """Two contenders compute different things, so comparing their times means nothing."""


def check_agreement() -> None:
    """Take a few steps of AdamW here and with PyTorch.

    Raises
    ------
    Disagreement
        A parameter differs by more than rounding explains.
    """
    side = TorchSide(resnet20())
    own = [p.detach().clone() for p in side.params]
    ours = of.Optimizer(own, "adamw", target="cuda", lr=LR, weight_decay=0.01)
    theirs = side.step("fused")
    for _ in range(AGREEING_STEPS):
        ours.step(side.grads)
        theirs.step()
    torch.cuda.synchronize()
    for k, (p, q) in enumerate(zip(own, side.params, strict=True)):
        p, q = p.cpu().numpy(), q.detach().cpu().numpy()
        allowed = ULPS * np.finfo(np.float32).eps * np.abs(q) + AGREEING_STEPS * LR * RATE_SHARE
        worst = float(np.max(np.abs(p - q) / allowed))
        if not worst <= 1:
            raise Disagreement(f"params[{k}] of optforge and of PyTorch differ by {worst:.3g} times of what is allowed")


# ── timing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Result:
    """One contender of a comparison: seconds of a step, one for each round."""

    section: str
    work: str
    model: str
    elements: int
    tensors: int
    contender: str
    moved: int
    times: list[float]
    copied: float = math.nan  # bytes per second of a copy in the same comparison
    first: float = math.nan  # seconds of the comparison's first contender

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self.times)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("section", "work", "model", "elements", "tensors", "contender")
        return {name: getattr(self, name) for name in names} | {
            "bytes": self.moved,
            "microseconds": 1e6 * self.seconds,
            "fastest_microseconds": 1e6 * min(self.times),
            "slowest_microseconds": 1e6 * max(self.times),
            "gigabytes_per_second": self.moved / self.seconds / 1e9,
            "share_of_copy": None if math.isnan(self.copied) else self.moved / self.seconds / self.copied,
            "times_the_first": self.seconds / self.first,
            "rounds": len(self.times),
        }


class Bench:
    """The comparisons of one run."""

    def __init__(self, gpu: Gpu, sizes: Sizes, rounds: int):
        self.gpu, self.sizes, self.rounds = gpu, sizes, rounds
        self.results: list[Result] = []
        self.overhead: dict[str, float] = {}
        self.failed: list[dict[str, str]] = []
        self.not_begun: list[str] = []
        self.start, self.end = gpu.drv.Event(), gpu.drv.Event()

    def timed(self, contender: Contender, steps: int) -> float:
        """Seconds of a step, by events on the default stream before the first and behind the last."""
        self.start.record()
        for _ in range(steps):
            contender.step()
        self.end.record()
        self.end.synchronize()
        return max(self.start.time_till(self.end) / 1e3, 1e-9) / steps

    def block(self, contender: Contender) -> float:
        """Seconds of a step: a block of them, behind a warm-up that also tells how many it takes."""
        once = self.timed(contender, WARM_STEPS if self.sizes.seconds else 1)
        return self.timed(contender, min(max(int(self.sizes.seconds / once), 1), MOST_STEPS))

    def compare(self, section: str, work: str, model: Model, contenders: Sequence[Contender]) -> list[Result]:
        """Time contenders in turns, the copy among them."""
        note(f"{section}: {work}, {model.label}")
        for contender in contenders:  # plans are made, and kernels loaded, at the first step
            self.timed(contender, 1)
        times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        for number in range(self.rounds):
            # Every other round goes backwards, so that nobody always comes behind the same neighbour.
            for contender in contenders if number % 2 == 0 else contenders[::-1]:
                times[contender.name].append(self.block(contender))
        found = [
            Result(section, work, model.label, model.elements, len(model.shapes), c.name, c.moved, times[c.name])
            for c in contenders
        ]
        for result in found:
            result.first = found[0].seconds
            result.copied = next((r.moved / r.seconds for r in found if r.contender == "copy"), math.nan)
        self.results += found
        return found

    def fitting(self, per_element: int, elements: int) -> Model:
        """One tensor of so many elements, or of as many as fit."""
        release()
        fits = self.gpu.free() // per_element
        return Model("one tensor", [(min(elements, fits // 1024 * 1024),)])

    # ── the sections ────────────────────────────────────────────────────────────────────────────────────────────

    def large(self) -> None:
        """One large tensor: every rule against the copy."""
        for name, dtype in (
            ("adam", np.float32),
            ("adam", np.float64),
            ("rmsprop", np.float32),
            ("adadelta", np.float32),
            ("lamb", np.float32),
        ):
            self.large_of(of.rules[name], np.dtype(dtype))

    def large_of(self, rule: of.Rule, dtype: np.dtype[Any]) -> None:
        """One large tensor, which is gone when the next is made."""
        size = dtype.itemsize
        model = self.fitting((2 + len(rule.state)) * size + 1, self.sizes.elements * 4 // size)
        params, grads = (self.gpu.noise(model.shapes, dtype, scale) for scale in (0.02, 1.0))
        contenders = [step("step", rule, params, grads), copy(self.gpu, params[0].nbytes)]
        self.compare("large", f"{rule.name} {dtype.name}", model, contenders)

    def formats(self) -> None:
        """One large tensor: AdamW over arrays of bfloat16, against the bytes that are left to move."""
        kernel = of.rules.adamw.kernel()
        every = dict.fromkeys(kernel.arrays, "bf16")
        ways: dict[str, dict[str, Any]] = {
            "p, g bf16": {"store": {"p": "bf16"}},
            "p, g bf16, split": {"store": {"p": "bf16"}, "master": "split"},
            "all bf16, stochastic": {
                "store": {name: "bf16" for name in every if name != "g"},
                "rounding": "stochastic",
            },
        }
        for name, how in ways.items():
            stored = storage(kernel.arrays, {**how["store"], "g": "bf16"}, how.get("master"))
            passes = (phase for phase in kernel.phases if not phase.optional)
            streams = sum(stored.moved(own.loads, (array for array, _ in own.stores)) for own in passes)
            model = self.fitting(2 * sum(own.bytes for _, own in stored.formats), self.sizes.elements)
            params, grads = (self.gpu.noise(model.shapes, np.uint16, scale) for scale in (0.02, 1.0))
            optimizer = of.Optimizer(params, "adamw", target="cuda", lr=LR, **how)
            moved = streams * model.elements
            step = Contender("step", moved, functools.partial(optimizer.step, grads))
            self.compare("large", f"adamw {name}", model, [step, copy(self.gpu, params[0].nbytes)])
            del optimizer, step, params, grads

    def large_phase(self) -> None:
        """One large tensor: the phase against the bare step."""
        model = self.fitting(4 * (2 + 3 * 2) + 1, self.sizes.elements)
        params, grads = (self.gpu.noise(model.shapes, np.float32, scale) for scale in (0.02, LOSS_SCALE))
        contenders = [
            step("step alone", of.rules.adamw, params, grads, lr=LR),
            phase("clip, skip", params, grads, stats=False),
            phase("clip, skip, statistics", params, grads, stats=True),
            copy(self.gpu, params[0].nbytes),
        ]
        self.compare("phase", "adamw float32", model, contenders)

    def large_against_torch(self) -> None:
        """One large tensor, of which there are three copies for PyTorch's tensors, with state, and room to work in."""
        if torch is not None:
            self.against_torch(self.fitting(4 * 22 + 1, self.sizes.elements))

    def against_torch(self, model: Model) -> None:
        """AdamW alone, and the phase, on one model; without PyTorch optforge alone."""
        params, grads = (self.gpu.noise(model.shapes, np.float32, scale) for scale in (0.02, 1.0))
        ours = [step("optforge", of.rules.adamw, params, grads, lr=LR)]
        theirs = []
        if torch is not None:
            ours.append(TorchSide(model.shapes).given())
            theirs = [TorchSide(model.shapes).step(how) for how in ("fused", "foreach")]
        self.compare("step", "adamw float32", model, [*ours, *theirs])
        del ours, theirs
        release()
        phases = [phase("optforge", params, grads, stats=False), phase("with statistics", params, grads, stats=True)]
        theirs = [] if torch is None else [TorchSide(model.shapes).phase(how) for how in ("fused", "foreach")]
        self.compare("phase", "unscale, clip, skip, adamw", model, [*phases, *theirs])

    def overheads(self) -> None:
        """Microseconds of the host to enqueue a step, without waiting for the device, by what is done."""
        cases: dict[str, tuple[int, dict[str, Any]]] = {
            "1 tensor": (1, {}),
            "148 tensors": (148, {}),
            "1 tensor, scheduled rate": (1, {"lr": lambda t: LR / t}),
        }
        for name, (count, settings) in cases.items():
            params, grads = (self.gpu.noise([(64,)] * count, np.float32, scale) for scale in (0.02, 1.0))
            self.overhead[name] = self.enqueued(params, [grads], **settings)
        params, *sets = (self.gpu.noise([(64,)] * 148, np.float32, 1.0) for _ in range(4))
        self.overhead["148 tensors, new gradients"] = self.enqueued(params, sets)
        if torch is not None:
            params, *sets = ([torch.randn(64, device="cuda") for _ in range(148)] for _ in range(4))
            self.overhead["148 tensors of PyTorch"] = self.enqueued(params, sets[:1])
            self.overhead["148 tensors of PyTorch, new gradients"] = self.enqueued(params, sets)

    def enqueued(self, params: Sequence[Any], sets: Sequence[Sequence[Any]], **settings: Any) -> float:
        """Microseconds to enqueue a step, with these gradients in turns."""
        optimizer = of.Optimizer(params, "adamw", target="cuda", **settings)
        times = []
        for _ in range(self.rounds + 1):
            self.gpu.device.context.synchronize()
            start = time.perf_counter()
            for k in range(self.sizes.enqueued):
                optimizer.step(sets[k % len(sets)])
            times.append((time.perf_counter() - start) / self.sizes.enqueued * 1e6)
        return statistics.median(times[1:])

    def replays(self) -> None:
        """Graphs of a step, of the phase, and of the phase with statistics; behind them PyTorch's."""
        with tempfile.TemporaryDirectory() as scratch:
            program = replay_program(Path(scratch), self.gpu)
            for model in self.sizes.models:
                note(f"replay: {model.label}")
                self.replayed(model, program(model, self.rounds))
                release()

    def replayed(self, model: Model, told: dict[str, list[float]]) -> None:
        """What the program said of one model, and the same with PyTorch."""
        streams = sum(of.rules.adamw.kernel().moved)
        for work, times in told.items():
            whole = work != "step"
            moved = (streams + whole) * 4 * model.elements
            self.replay_result(model, work, "optforge", moved, times)
            if torch is not None and work != "phase, statistics":
                theirs = TorchSide(model.shapes).replayed(whole)
                own = [self.block(theirs) for _ in range(self.rounds)]
                self.replay_result(model, work, theirs.name, theirs.moved, own)

    def replay_result(self, model: Model, work: str, who: str, moved: int, times: list[float]) -> None:
        """Keep the times of replays."""
        shape = model.label, model.elements, len(model.shapes)
        result = Result("replay", work, *shape, who, moved, [max(own, 1e-9) for own in times])
        first = next((r for r in self.results if (r.section, r.work, r.model) == ("replay", work, model.label)), result)
        result.first = first.seconds
        self.results.append(result)

    def part(self, name: str, do: Callable[[], Any]) -> bool:
        """Do a part, and keep what became of it; whether it was done."""
        try:
            do()
        except Exception as problem:  # of this package, PyCUDA or PyTorch: too little memory, mostly
            note(f"{name} was not measured: {problem}")
            self.failed.append({"part": name, "problem": f"{type(problem).__name__}: {problem}"})
            return False
        return True

    def sweep(self) -> None:
        """Design choices that macros set when the emitted file is compiled, for the step alone and with statistics."""
        variants = list(sweep_variants(self.sizes.sweep))
        model = self.fitting(4 * (2 + 2 * len(variants)) + 1, self.sizes.swept)
        params, grads = (self.gpu.noise(model.shapes, np.float32, scale) for scale in (0.02, LOSS_SCALE))
        for work in ("adamw", "clip, skip, statistics"):
            contenders = []
            for variant in variants:
                with variant.compiled():
                    if work == "adamw":
                        contenders.append(step(variant.label, of.rules.adamw, params, grads, lr=LR))
                    else:
                        contenders.append(phase(variant.label, params, grads, stats=True))
                    contenders[-1].step()  # its plan is made now, of this variant
            self.compare("sweep", work, model, [*contenders, copy(self.gpu, params[0].nbytes)])


# ── the sweep ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Variant:
    """Macros of the emitted file; what is None stays as it is there."""

    min_blocks: int | None = None
    read: str | None = None
    write: str | None = None

    @property
    def label(self) -> str:
        """What differs."""
        values = {"min blocks": self.min_blocks, "read": self.read, "write": self.write}
        return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None) or "as emitted"

    @contextlib.contextmanager
    def compiled(self) -> Iterator[None]:
        """Engines that are made meanwhile, and their plans, are of this variant."""
        with mock.patch.dict(os.environ, NVCC=self.command()):
            yield

    def command(self) -> str:
        """The compiler with its options, which the loader takes from $NVCC."""
        macros = {"MIN_BLOCKS": self.min_blocks, "READ": self.read, "WRITE": self.write}
        flags = [f"-DOPTFORGE_CUDA_{name}={value}" for name, value in macros.items() if value is not None]
        return shlex.join([*nvcc.find().command, *flags])


def sweep_variants(whole: bool) -> Iterator[Variant]:
    """One choice at a time, then some together."""
    yield Variant()
    if not whole:
        yield Variant(4, "__ldcs", "__stcs")
        return
    for blocks in (2, 4):
        yield Variant(min_blocks=blocks)
    for read in ("__ldcs", "__ldcg"):
        yield Variant(read=read)
    for write in ("__stcs", "__stcg"):
        yield Variant(write=write)
    yield Variant(4, "__ldcs", "__stcs")


# ── compiling, before anything is timed ─────────────────────────────────────────────────────────────────────────────

COMPILED = ("adamw", "phase", "adam", "rmsprop", "adadelta", "lamb")


def compile_all(sweep: bool, whole: bool) -> None:
    """Have nvcc compile what will be timed into the cache: a process for each variant, several kernels at a time."""
    variants = list(sweep_variants(whole))[1:] if sweep else []
    jobs = [(Variant(), COMPILED), *((variant, COMPILED[:2]) for variant in variants)]

    def build(job: tuple[Variant, Sequence[str]]) -> None:
        variant, names = job
        command = [sys.executable, str(HERE / "gpu.py"), "--compile", ",".join(names)]
        env = {**os.environ, "NVCC": variant.command()}
        answer = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        if answer.returncode:
            raise EnvironmentProblem(f"{variant.label} does not compile: {answer.stderr[-2000:]}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build, jobs))


def compile_named(names: Sequence[str]) -> None:
    """Compile rules by name, with the nvcc of the environment."""
    capability = driver().Device(0).compute_capability()  # without a context, for there are several processes

    def build(name: str) -> None:
        rule = phase_rule() if name == "phase" else of.rules[name]
        cuda_target.compiled(rule, rule.kernel(), capability)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build, names))


# How a library is called where there is no program.
CALL = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).times(sys.argv[3].encode(), int(sys.argv[2])))"


def replay_program(place: Path, gpu: Gpu) -> Callable[[Model, int], dict[str, list[float]]]:
    """The program that times replays, compiled: from a model and a number of rounds to seconds by what is replayed."""
    rules = {"step": of.rules.adamw, "phase": phase_rule()}
    files = {"replay.cu": (HERE / "replay.cu").read_text(encoding="utf-8")}
    for prefix, rule in rules.items():
        files |= rule.generate("cuda", prefix=prefix, dtypes=["f32"])
    for name, text in files.items():
        (place / name).write_text(text, encoding="utf-8")
    emulated = gpu.device.name == EMULATED
    built = place / ("replay.so" if emulated else "replay")
    sources = [str(place / name) for name in files if name.endswith(".cu")]
    command = [*nvcc.find().command, "-std=c++17", "-O3", f"-arch=sm_{''.join(map(str, gpu.device.capability))}"]
    objects = [f"{source}.o" for source in sources]
    if emulated:  # which has no graphs, and makes libraries
        subprocess.run([*command, "-DOPTFORGE_NO_GRAPHS", "-o", str(built), *sources], check=True)
    else:
        jobs = [[*command, "-c", "-o", *own] for own in zip(objects, sources, strict=True)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(functools.partial(subprocess.run, check=True), jobs))
        subprocess.run([*command, "-o", str(built), *objects], check=True)

    def times(model: Model, rounds: int) -> dict[str, list[float]]:
        sizes = place / "sizes"
        sizes.write_text(" ".join(str(math.prod(shape)) for shape in model.shapes), encoding="utf-8")
        program = [sys.executable, "-c", CALL, str(built)] if emulated else [str(built)]
        words = [*program, str(rounds), str(sizes)]
        answer = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
        if answer.returncode:
            raise RuntimeError(answer.stderr[-2000:])
        told = {}
        for line in answer.stdout.splitlines():
            work, *own = re.split(r" (?=\d)", line)
            told[work] = [float(value) / 1e6 for value in own]
        return told

    return times


# ── telling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def release() -> None:
    """Give back memory of the device that nothing uses."""
    gc.collect()
    if torch is not None:
        with contextlib.suppress(RuntimeError):  # a device that is in a wrong state will say so at the next step
            torch.cuda.empty_cache()


def note(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def circumstances(gpu: Gpu) -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {"optforge": of.__version__, "python": platform.python_version()}
    for name in ("numpy", "pycuda", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    driver = gpu.drv.get_driver_version()
    cache = gpu.drv.Device(0).get_attribute(gpu.drv.device_attribute.L2_CACHE_SIZE)
    return {
        "device": gpu.device.name,
        "capability": ".".join(map(str, gpu.device.capability)),
        "memory_gib": round(gpu.drv.mem_get_info()[1] / 2**30, 1),
        "l2_mib": round(cache / 2**20, 1),
        "cuda_of_driver": f"{driver // 1000}.{driver % 1000 // 10}",
        "driver": driver_version(),
        "nvcc": nvcc.find().version.strip().splitlines()[-1],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "versions": versions,
    }


def driver_version() -> str:
    """The version of NVIDIA's kernel module; empty where nothing tells."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else ""


TITLES = {
    "large": "One tensor: share of the copy's bandwidth",
    "replay": "Replays of CUDA graphs: kernels alone, and nothing of the host",
    "phase": "The phase: unscale, clip by global norm, skip what is not finite, AdamW",
    "step": "AdamW alone",
    "sweep": "Sweep of what macros set: share of the copy's bandwidth",
}


def targets(bench: Bench) -> list[dict[str, Any]]:
    """What is aimed at, with what was found; what was not measured is not there."""
    time_of = {(r.section, r.work, r.model, r.contender): r for r in bench.results}
    rows: list[dict[str, Any]] = []

    def aim(what: str, found: float, least: float | None = None, most: float | None = None) -> None:
        met = found >= least if least is not None else most is not None and found <= most
        wanted = f"≥ {least}" if least is not None else f"≤ {most}"
        rows.append({"what": what, "found": found, "aim": wanted, "met": "yes" if met else "no"})

    def ratio(what: str, slow: tuple[str, ...], fast: tuple[str, ...], **wanted: float) -> None:
        if slow in time_of and fast in time_of:
            aim(what, time_of[slow].seconds / time_of[fast].seconds, **wanted)

    for result in bench.results:
        if (result.section, result.work, result.contender) == ("large", "adam float32", "step"):
            aim(f"Adam, {result.model}: share of a copy", result.moved / result.seconds / result.copied, least=0.95)
        if result.section == "large" and "bf16" in result.work and result.contender == "step":
            aim(f"{result.work}: share of a copy", result.moved / result.seconds / result.copied, least=0.9)
        if (result.section, result.contender) == ("step", "PyTorch fused") and result.model.startswith("one tensor ("):
            ours = ("step", result.work, result.model, "optforge")
            ratio(f"AdamW, {result.model}: PyTorch fused by ours", (*ours[:3], "PyTorch fused"), ours, least=1.1)
    for model, most in ((GPT2, 1.2), (MILLION, 2.0)):
        shown = ("replay", "phase, statistics", model.label, "optforge"), ("replay", "step", model.label, "optforge")
        ratio(f"{model.label}: phase with statistics by the bare step, replayed", *shown, most=most)
    for model, least in ((GPT2, 1.3), (MANY, 5.0)):
        for section, work in (("phase", "unscale, clip, skip, adamw"), ("replay", "phase")):
            shown = (section, work, model.label, "PyTorch fused"), (section, work, model.label, "optforge")
            ratio(f"{model.label}: PyTorch's {section} by ours", *shown, least=least)
    for name, most in (("1 tensor", 15.0), ("148 tensors", 25.0)):
        if name in bench.overhead:
            aim(f"µs of the host to enqueue a step, {name}", bench.overhead[name], most=most)
    for name in ("148 tensors", "148 tensors of PyTorch"):
        if name in bench.overhead and f"{name}, new gradients" in bench.overhead:
            more = (bench.overhead[f"{name}, new gradients"] - bench.overhead[name]) / 148
            aim(f"µs more for each new gradient, {name}", more, most=0.6)
    return rows


def report(about: dict[str, Any], bench: Bench) -> str:
    """The tables, in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"# {about['device']}",
        "",
        f"Driver {about['driver'] or 'unknown'} (CUDA {about['cuda_of_driver']}), {about['nvcc']}, {versions}; "
        f"{about['date']}.",
        "",
        f"What moves less than {about['l2_mib']} MiB in a step can stay in the level 2 cache, on all sides: there GB/s "
        "say nothing of the memory, and may be above the copy's.",
    ]
    for section, title in TITLES.items():
        rows = [result for result in bench.results if result.section == section]
        if rows:
            lines += ["", f"## {title}", ""]
            lines += ["| model (tensors, elements) | work | | µs | GB/s | of copy | times the first |"]
            lines += ["|---|---|---|--:|--:|--:|--:|"]
        for row in rows:
            share = "" if math.isnan(row.copied) else f"{row.moved / row.seconds / row.copied:.3f}"
            micro = f"{1e6 * row.seconds:,.1f}"
            speed = f"{row.moved / row.seconds / 1e9:,.1f}"
            ratio = f"{row.seconds / row.first:.2f}"
            lines.append(f"| {row.model} | {row.work} | {row.contender} | {micro} | {speed} | {share} | {ratio} |")
    if bench.overhead:
        lines += ["", "## Host time of a step, not waiting for the device", "", "| | µs |", "|---|--:|"]
        lines += [f"| {name} | {value:.1f} |" for name, value in bench.overhead.items()]
    aimed = targets(bench)
    if aimed:
        lines += ["", "## Aims", "", "| | found | aim | |", "|---|--:|--:|---|"]
        lines += [f"| {row['what']} | {row['found']:.3g} | {row['aim']} | {row['met']} |" for row in aimed]
    if bench.failed or bench.not_begun:
        lines += ["", "## Not measured", ""]
        lines += [f"- {entry['part']}: {' '.join(entry['problem'].split())}" for entry in bench.failed]
        lines += [f"- {name}: not begun in time" for name in bench.not_begun]
    return "\n".join(lines)


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────


def parts(bench: Bench, sweep: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is done, one after the other; a comparison's arrays are freed as soon as it is done."""
    yield "kernels", functools.partial(compile_all, sweep, bench.sizes.sweep)
    if torch is not None:
        yield "agreement with PyTorch", check_agreement
    yield "overhead", bench.overheads
    yield "large", bench.large
    yield "PyTorch", bench.large_against_torch
    yield "replays", bench.replays
    for model in bench.sizes.models:
        yield model.name, functools.partial(bench.against_torch, model)
    yield "formats", bench.formats
    yield "phase", bench.large_phase
    if sweep:
        yield "sweep", bench.sweep


def positive(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Time optforge's steps on a GPU.")
    parser.add_argument("--sizes", choices=SIZES, default="full", help="tiny only shows that everything runs")
    parser.add_argument("--rounds", type=positive, metavar="N", help="of each comparison")
    parser.add_argument("--no-sweep", dest="sweep", action="store_false", help="leave out the sweep of macros")
    parser.add_argument("--parts", metavar="NAME,…", help="do these alone, of those that progress and the report name")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="after which no other part is begun")
    parser.add_argument("--compile", metavar="RULE,…", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="instead of benchmarks/results/gpu-DEVICE.json")
    arguments = parser.parse_args()
    until = time.monotonic() + (arguments.limit or math.inf)
    if arguments.compile:
        compile_named(arguments.compile.split(","))
        return 0
    try:
        gpu = Gpu()
    except EnvironmentProblem as problem:
        print(f"gpu.py: no GPU here that can be used: {problem}", file=sys.stderr)
        return 3
    sizes = SIZES[arguments.sizes]
    file = arguments.json or RESULTS / f"gpu-{gpu.name()}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with gpu.device:
        chosen = arguments.parts and arguments.parts.split(",")
        return measure(gpu, sizes, arguments.rounds or sizes.rounds, arguments.sweep, chosen, file, until)


def measure(
    gpu: Gpu, sizes: Sizes, rounds: int, sweep: bool, chosen: Sequence[str] | None, file: Path, until: float
) -> int:
    """Everything, where the device's context is current; the exit code."""
    global torch
    about = circumstances(gpu)
    bench = Bench(gpu, sizes, rounds)
    if torch is None:
        with contextlib.suppress(ImportError):
            torch = importlib.import_module("torch")
    if torch is not None and not torch.cuda.is_available():
        torch = None
    every = list(parts(bench, sweep))
    unknown = set(chosen or ()) - {name for name, _ in every}
    if unknown:
        print(f"gpu.py: there are no parts {sorted(unknown)}: {[name for name, _ in every]}", file=sys.stderr)
        return 2
    for name, part in every:
        if chosen and name not in chosen:
            continue
        if time.monotonic() > until:
            bench.not_begun.append(name)
        elif not bench.part(name, part) and part is check_agreement:
            torch = None  # there is nothing to compare with then
        release()
        results = [result.as_dict() for result in bench.results]
        told = {"results": results, "overhead_us": bench.overhead, "failed": bench.failed}
        told |= {"aims": targets(bench), "not_begun": bench.not_begun}
        everything = {**about, "sizes": sizes.name, **told}
        file.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")  # a run may be cut short
    print(report(about, bench))
    note(f"written: {file}")
    return 1 if bench.failed else 4 if bench.not_begun else 0


if __name__ == "__main__":
    sys.exit(main())
