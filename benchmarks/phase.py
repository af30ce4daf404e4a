"""Times optimizer steps of optforge against PyTorch's, and against the traffic of memory that no step can avoid.

    python benchmarks/phase.py [--quick] [--threads N] [--repeat N] [--json FILE]

Each comparison first checks that both sides compute the same, and then times them in turns: README.md says how.
Exit codes: 0 measured, 1 the results differ, 2 a mistake in the arguments, 3 something is missing on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import torch

    import optforge as of
except ImportError as problem:
    print(f"phase.py needs PyTorch, NumPy and optforge in one environment: {problem}", file=sys.stderr)
    sys.exit(3)

from optforge.profile.models import Model, gpt2, lenet, many, perceptron, resnet20

LOSS_SCALE = 65536.0
MAX_NORM = 1.0
LR = 1e-3
EPS = 1e-8
NO_EPS = 1e-30  # RMSProp adds eps inside the root, PyTorch's outside: this little is nothing in both places

SETTLE_SECONDS = 0.02  # until the threads that the last contender left spinning have gone to sleep
WARM_SECONDS = 0.01
BLOCK_SECONDS = 0.05
MOST_STEPS = 500  # of a block
FEWEST_ROUNDS = 3  # of a comparison that has used up its time
SMALL_LIMIT, LARGE_LIMIT = 6.0, 40.0  # seconds of a comparison
OVERHEAD_CALLS = 2000

CHECKED_STEPS = (1.0, -0.5, 2.0)  # what the gradients are multiplied by in the steps that must agree
# How many units in the last place of a float32 parameter, and what share of the learning rate per step, may differ.
ULPS = 4
RATE_SHARE = 1e-4
NORM_TOLERANCE = 1e-5
TORCH_NORM_TOLERANCE = 1e-2  # it adds up squares in float32, which is off by 0.2 % at 30 million elements

# ── what is trained ─────────────────────────────────────────────────────────────────────────────────────────────────

SMALL = [
    Model("MLP 784-128-10", perceptron(784, 128, 10)),
    Model("LeNet", lenet()),
    Model("ResNet-20", resnet20()),
    Model("MLP 784-512-512-256-10", perceptron(784, 512, 512, 256, 10)),
]
LARGE = Model("GPT-2 small", gpt2())
MINIATURE = Model("GPT-2 miniature", gpt2(width=96, words=4096, positions=256))
MIDDLING = Model("30 x 10,000", [(10_000,)] * 30)


class Data:
    """Where training starts, and the gradients: one of each, which every contender copies.

    Parameters
    ----------
    model : Model
    scale : float
        The loss scale that the gradients carry.
    """

    def __init__(self, model: Model, scale: float):
        random = np.random.default_rng(20)
        self.scale = scale
        self.params = [0.02 * random.standard_normal(shape, np.float32) for shape in model.shapes]
        self.grads = [np.float32(scale) * random.standard_normal(shape, np.float32) for shape in model.shapes]

    def grad_norm(self) -> float:
        """The norm of the gradients without the loss scale, in double precision."""
        squares = (np.square(part, dtype=np.float64).sum() for g in self.grads for part in parts(g))
        return math.sqrt(sum(map(float, squares))) / self.scale


def parts(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array in pieces that fit into the cache."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, 1 << 20):
        yield flat[start : start + (1 << 20)]


# ── who competes ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Norms:
    """What a phase tells."""

    grad: float
    param: float
    update: float


class Contender:
    """One side of a comparison, with parameters and gradients of its own in memory from the same allocator.

    Parameters
    ----------
    name : str
    data : Data
    spends : bool
        Whether a step spends the gradients, so that the next one needs new ones.
    """

    def __init__(self, name: str, data: Data, spends: bool):
        self.name, self.data, self.spends = name, data, spends
        self.tensors = [torch.from_numpy(p).clone() for p in data.params]
        self.tensor_grads = [torch.from_numpy(g).clone() for g in data.grads]
        self.params = [p.numpy() for p in self.tensors]
        self.grads = [g.numpy() for g in self.tensor_grads]

    def refill(self, factor: float = 1.0) -> None:
        """New gradients, by one thread, as a backward pass would leave them."""
        for own, given in zip(self.grads, self.data.grads, strict=True):
            np.copyto(own, given) if factor == 1.0 else np.multiply(given, np.float32(factor), out=own)

    def step(self) -> Norms | None:
        """What is timed."""
        raise NotImplementedError


class Optforge(Contender):
    """optforge, on NumPy arrays: a bare step, or the whole phase in one call."""

    def __init__(self, data: Data, rule: of.Rule, threads: int, phase: bool, **settings: float):
        super().__init__("optforge", data, spends=phase)
        self.phase = phase
        self.optimizer = of.Optimizer(
            self.params, rule, threads=threads, lr=LR, skip_nonfinite=phase, zero_grads=phase, **settings
        )

    def step(self) -> Norms | None:
        """One step, or one phase."""
        if not self.phase:
            self.optimizer.step(self.grads)
            return None
        stats = self.optimizer.step(self.grads, grad_scale=LOSS_SCALE, stats=True)
        assert stats is not None
        return Norms(stats.grad_norm, stats.param_norm, stats.update_norm)


class Torch(Contender):
    """An optimizer of PyTorch's, alone."""

    def __init__(self, name: str, data: Data, make: Callable[..., torch.optim.Optimizer], spends: bool = False, **how):
        super().__init__(name, data, spends)
        for tensor, grad in zip(self.tensors, self.tensor_grads, strict=True):
            tensor.requires_grad_().grad = grad
        self.optimizer = make(self.tensors, lr=LR, **how)

    def step(self) -> Norms | None:
        """One step."""
        self.optimizer.step()
        return None


class TorchPhase(Torch):
    """The phase with the functions that PyTorch offers for it, each over all tensors at once."""

    def __init__(self, name: str, data: Data, **how: bool):
        super().__init__(name, data, torch.optim.AdamW, spends=True, eps=EPS, weight_decay=0.01, **how)
        self.before = [torch.empty_like(tensor, requires_grad=False) for tensor in self.tensors]

    @torch.no_grad()
    def step(self) -> Norms | None:
        """One phase."""
        torch._foreach_mul_(self.tensor_grads, 1 / LOSS_SCALE)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.tensors, MAX_NORM, foreach=True).item()
        if not math.isfinite(grad_norm):
            torch._foreach_zero_(self.tensor_grads)
            return Norms(grad_norm, math.nan, 0.0)
        torch._foreach_copy_(self.before, self.tensors)
        self.optimizer.step()
        return self.finish(grad_norm)

    def finish(self, grad_norm: float) -> Norms:
        """What is left when the parameters are new."""
        torch._foreach_sub_(self.before, self.tensors)
        param_norm = torch.nn.utils.get_total_norm(self.tensors, foreach=True).item()
        update_norm = torch.nn.utils.get_total_norm(self.before, foreach=True).item()
        torch._foreach_zero_(self.tensor_grads)
        return Norms(grad_norm, param_norm, update_norm)


class TorchFolded(TorchPhase):
    """The phase with unscaling and clipping left to the fused step, which divides gradients by a scale anyway.

    That saves two passes over the gradients. It is what `torch.amp.GradScaler` does inside, where nobody clips.
    """

    @torch.no_grad()
    def step(self) -> Norms | None:
        """One phase."""
        grad_norm = torch.nn.utils.get_total_norm(self.tensor_grads, foreach=True).item() / LOSS_SCALE
        if not math.isfinite(grad_norm):
            torch._foreach_zero_(self.tensor_grads)
            return Norms(grad_norm, math.nan, 0.0)
        torch._foreach_copy_(self.before, self.tensors)
        optimizer: Any = self.optimizer
        optimizer.grad_scale = torch.tensor(LOSS_SCALE / min(1.0, MAX_NORM / (grad_norm + 1e-6)))
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
        return self.finish(grad_norm)


FLOOR_SOURCE = r"""
#include <stddef.h>
#include <stdint.h>

typedef struct { size_t n; uint32_t *p, *g, *m, *v; } tensor;

/* The traffic of a step without its mathematics. `none` is 0, which the compiler cannot know: all values stay. */
uint32_t floor_step(const tensor *list, size_t count, int phase, uint32_t none, int threads)
{
    uint32_t seen = 0;

    #pragma omp parallel num_threads(threads) reduction(^ : seen)
    {
        if (phase) {
            for (size_t k = 0; k < count; k++) {
                const uint32_t *g = list[k].g;
                #pragma omp for simd schedule(static) nowait
                for (size_t i = 0; i < list[k].n; i++)
                    seen ^= g[i];
            }
            #pragma omp barrier
        }
        for (size_t k = 0; k < count; k++) {
            uint32_t *restrict p = list[k].p, *restrict g = list[k].g, *restrict m = list[k].m, *restrict v = list[k].v;
            if (phase) {
                #pragma omp for simd schedule(static) nowait
                for (size_t i = 0; i < list[k].n; i++) {
                    p[i] ^= none;
                    m[i] ^= none;
                    v[i] ^= none;
                    g[i] ^= none;
                }
            } else {
                #pragma omp for simd schedule(static) nowait
                for (size_t i = 0; i < list[k].n; i++) {
                    p[i] ^= none & g[i];
                    m[i] ^= none;
                    v[i] ^= none;
                }
            }
        }
    }
    return seen;
}
"""


class Floor(Contender):
    """Plain loops that read and write what a step must, over optforge's own arrays, which keep their values."""

    def __init__(self, side: Optforge, threads: int):
        self.name, self.data, self.spends = "byte floor", side.data, side.spends
        self.params, self.grads = side.params, side.grads
        state = side.optimizer.state
        rows = [
            (p.size, p.ctypes.data, g.ctypes.data, m.ctypes.data, v.ctypes.data)
            for p, g, m, v in zip(side.params, side.grads, state["m"], state["v"], strict=True)
        ]
        self.table = np.array(rows, np.uintp)
        self.arguments = (
            ctypes.c_void_p(self.table.ctypes.data),
            ctypes.c_size_t(len(rows)),
            ctypes.c_int(side.phase),
            ctypes.c_uint32(0),
            ctypes.c_int(threads),
        )
        self.library = compiled_floor()

    def step(self) -> Norms | None:
        """The passes over memory."""
        self.library.floor_step(*self.arguments)
        return None


def compiled_floor() -> ctypes.CDLL:
    """The loops of the floor, compiled here, and for this machine."""
    with tempfile.TemporaryDirectory() as directory:
        source, built = Path(directory, "floor.c"), Path(directory, "floor.so")
        source.write_text(FLOOR_SOURCE)
        flags = ["-O2", "-march=native", "-fopenmp", "-fPIC", "-shared"]
        answer = subprocess.run(
            [os.environ.get("CC", "cc"), *flags, "-o", str(built), str(source)], capture_output=True, text=True
        )
        if answer.returncode:
            raise SystemExit(f"the loops of the byte floor do not compile:\n{answer.stderr}")
        return ctypes.CDLL(str(built))


# ── whether they agree ──────────────────────────────────────────────────────────────────────────────────────────────


class Disagreement(Exception):
    """Two contenders compute different things, so comparing their times means nothing."""


def first_steps(contender: Contender) -> list[Norms | None]:
    """Take the steps that must agree; gives what they tell."""
    told = []
    for factor in CHECKED_STEPS:
        contender.refill(factor)
        told.append(contender.step())
    return told


def check_agreement(ours: Optforge, own: Sequence[Norms | None], theirs: Torch) -> None:
    """Take the first steps with `theirs`, and compare with `ours`, which has taken them and told `own`.

    Raises
    ------
    Disagreement
        A parameter or a norm differs by more than rounding explains.
    """
    true_norm = ours.data.grad_norm()
    for number, (factor, mine, other) in enumerate(zip(CHECKED_STEPS, own, first_steps(theirs), strict=True), 1):
        if mine and other:
            check_norms(f"step {number} of {theirs.name}", mine, other, abs(factor) * true_norm)
    worst, place = 0.0, 0
    absolute = len(CHECKED_STEPS) * LR * RATE_SHARE
    for k, (p, q) in enumerate(zip(ours.params, theirs.params, strict=True)):
        for here, there in zip(parts(p), parts(q), strict=True):
            allowed = ULPS * np.finfo(np.float32).eps * np.abs(there) + absolute
            off = float(np.max(np.abs(here - there) / allowed))
            if not off <= worst:  # NaN is the worst of all
                worst, place = off, k
    if not worst <= 1:
        raise Disagreement(
            f"after {len(CHECKED_STEPS)} steps params[{place}] of optforge and of {theirs.name} differ by {worst:.3g} "
            f"times of what is allowed ({ULPS} ulp, and {RATE_SHARE:g} of the learning rate per step)"
        )
    note(f"  agrees with {theirs.name}: parameters to {worst:.2g} of what is allowed")


def check_norms(where: str, own: Norms, norms: Norms, true_grad_norm: float) -> None:
    """Compare what two phases tell."""
    pairs = [
        ("gradient norm of optforge and that in double precision", own.grad, true_grad_norm, NORM_TOLERANCE),
        ("gradient norms", own.grad, norms.grad, TORCH_NORM_TOLERANCE),
        ("parameter norms", own.param, norms.param, TORCH_NORM_TOLERANCE),
        ("update norms", own.update, norms.update, TORCH_NORM_TOLERANCE),
    ]
    for what, a, b, tolerance in pairs:
        if not math.isclose(a, b, rel_tol=tolerance):
            raise Disagreement(f"{where}: the {what} differ by more than {tolerance:g}: {a!r} and {b!r}")


# ── timing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def block(contender: Contender) -> float:
    """Seconds of a step: the median of a block of steps, behind a warm-up."""
    time.sleep(SETTLE_SECONDS)
    run(contender, WARM_SECONDS)
    return statistics.median(run(contender, BLOCK_SECONDS))


def run(contender: Contender, seconds: float) -> list[float]:
    """The times of one step or more, until they have taken so long together."""
    times: list[float] = []
    while not times or (sum(times) < seconds and len(times) < MOST_STEPS):
        if contender.spends:
            contender.refill()
        start = time.perf_counter()
        contender.step()
        times.append(time.perf_counter() - start)
    return times


@dataclass
class Result:
    """One contender's times next to optforge's: all in seconds, a time for each round."""

    section: str
    work: str
    model: str
    elements: int
    tensors: int
    opponent: str
    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """The median of their times by the median of ours."""
        return statistics.median(self.theirs) / statistics.median(self.ours)

    @property
    def best(self) -> float:
        """Their fastest block by our fastest, which a machine busy with other things distorts least."""
        return min(self.theirs) / min(self.ours)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Those of the rounds' own ratios."""
        ratios = [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]
        first, _, third = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return first, third

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("section", "work", "model", "elements", "tensors", "opponent")
        return {name: getattr(self, name) for name in names} | {
            "ours_ms": 1e3 * statistics.median(self.ours),
            "theirs_ms": 1e3 * statistics.median(self.theirs),
            "ratio": self.ratio,
            "ratio_quartiles": self.quartiles,
            "ratio_of_best": self.best,
            "rounds": len(self.ours),
        }


@dataclass
class Bench:
    """The comparisons of one run."""

    threads: int
    repeat: int
    results: list[Result] = field(default_factory=list)

    def compare(
        self, section: str, work: str, model: Model, ours: Optforge, others: Sequence[Torch], floor: bool
    ) -> None:
        """Check one piece of work on one model, then time it: ours and each of the others, in turns."""
        note(f"{section}: {work}, {model.label}")
        own = first_steps(ours)
        for other in others:
            check_agreement(ours, own, other)
        contenders: list[Contender] = [ours, *others]
        if floor:
            contenders.append(Floor(ours, self.threads))
        for contender in contenders:
            contender.refill()
        times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        start, limit = time.perf_counter(), LARGE_LIMIT if model is LARGE else SMALL_LIMIT
        for number in range(self.repeat):
            spent = time.perf_counter() - start
            if number >= FEWEST_ROUNDS and spent * (number + 1) / number > limit:
                break
            # Every other round goes backwards, so that nobody always comes behind the same neighbour.
            for contender in contenders if number % 2 == 0 else contenders[::-1]:
                times[contender.name].append(block(contender))
        for contender in contenders[1:]:
            own_section = "floor" if isinstance(contender, Floor) else section
            sizes = (model.label, model.elements, len(model.shapes))
            compared = (times[ours.name], times[contender.name])
            self.results.append(Result(own_section, work, *sizes, contender.name, *compared))

    def phase(self, model: Model, floor: bool = False) -> None:
        """Everything between the backward pass and the next forward pass."""
        data = Data(model, LOSS_SCALE)
        rule = of.clip_by_global_norm(form="pytorch", max_norm=MAX_NORM) >> of.rules.adamw
        ours = Optforge(data, rule, self.threads, phase=True, max_norm=MAX_NORM)
        others = [
            TorchPhase("PyTorch fused", data, fused=True),
            TorchFolded("PyTorch fused, folded", data, fused=True),
            TorchPhase("PyTorch foreach", data, foreach=True),
        ]
        self.compare("phase", "clip + AdamW", model, ours, others, floor)

    def step(self, model: Model, floor: bool = False) -> None:
        """AdamW's step alone."""
        data = Data(model, 1.0)
        ours = Optforge(data, of.rules.adamw, self.threads, phase=False)
        others = [
            Torch(f"PyTorch {how}", data, torch.optim.AdamW, eps=EPS, weight_decay=0.01, **{how: True})
            for how in ("fused", "foreach")
        ]
        self.compare("step", "AdamW", model, ours, others, floor)

    def other_rules(self, model: Model) -> None:
        """Rules that PyTorch has not fused for the CPU."""
        data = Data(model, 1.0)
        ours = Optforge(data, of.rules.rmsprop, self.threads, phase=False, rho=0.9, eps=NO_EPS)
        theirs = Torch("PyTorch foreach", data, torch.optim.RMSprop, alpha=0.9, eps=NO_EPS, foreach=True)
        self.compare("others", "RMSProp", model, ours, [theirs], False)
        del ours, theirs
        ours = Optforge(data, of.rules.adadelta, self.threads, phase=False, rho=0.9, eps=1e-6)
        theirs = Torch("PyTorch foreach", data, torch.optim.Adadelta, rho=0.9, eps=1e-6, foreach=True)
        self.compare("others", "AdaDelta", model, ours, [theirs], False)

    def overheads(self) -> dict[str, float]:
        """Microseconds of a bare step with next to nothing to compute, by its number of tensors."""
        found = {}
        for count in (1, 148):
            arrays = [np.ones(1, np.float32) for _ in range(count)]
            grads = [np.ones(1, np.float32) for _ in range(count)]
            optimizer = of.Optimizer(arrays, of.rules.adamw, threads=self.threads, lr=LR)
            optimizer.step(grads)
            times = []
            for _ in range(max(self.repeat, 5)):
                start = time.perf_counter()
                for _ in range(OVERHEAD_CALLS):
                    optimizer.step(grads)
                times.append((time.perf_counter() - start) / OVERHEAD_CALLS * 1e6)
            found[str(count)] = statistics.median(times)
        return found


# ── telling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def note(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def milliseconds(times: Sequence[float]) -> str:
    """The median with three digits."""
    value = 1e3 * statistics.median(times)
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def report(bench: Bench, overheads: dict[str, float]) -> str:
    """The tables."""
    titles = {
        "phase": "Phase: unscale, clip, AdamW, norms of p, g and update, finite check, zeroing of gradients",
        "step": "Step: AdamW alone",
        "others": "Rules that PyTorch has not fused: the step alone",
        "floor": "Byte floor: the same reads and writes without mathematics; ratio 1 is the limit of the memory",
    }
    lines = []
    for section, title in titles.items():
        lines += ["", title, ""]
        head = f"  {'model (tensors, elements)':39} {'work':13} {'against':22} {'theirs ms':>9} {'ours ms':>8}"
        lines.append(f"{head} {'ratio':>6} {'best':>6}  quartiles")
        for result in bench.results:
            if result.section == section:
                first, third = result.quartiles
                digits = 3 if section == "floor" else 1 if result.ratio >= 10 else 2
                ratios = f"{result.ratio:6.{digits}f} {result.best:6.{digits}f}"
                spread = f"{first:.{digits}f} to {third:.{digits}f}"
                lines.append(
                    f"  {result.model:39} {result.work:13} {result.opponent:22} {milliseconds(result.theirs):>9} "
                    f"{milliseconds(result.ours):>8} {ratios}  {spread}"
                )
    lines += ["", "Python overhead: AdamW over tensors of one element, the same gradient arrays again", ""]
    lines += [f"  {count:>3} tensor(s)  {value:5.1f} µs a step" for count, value in overheads.items()]
    return "\n".join(lines[1:])


def circumstances(threads: int) -> dict[str, Any]:
    """What the numbers depend on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), model)
    compiler = subprocess.run([os.environ.get("CC", "cc"), "--version"], capture_output=True, text=True).stdout
    return {
        "machine": {
            "processor": model,
            "cores": cores(),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
            "system": platform.platform(),
            "load": os.getloadavg()[0],
        },
        "versions": {
            "optforge": of.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "compiler": compiler.partition("\n")[0],
        },
        "threads": threads,
        "environment": {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_"))},
    }


def busy_seconds() -> float:
    """Processor seconds of the whole machine but this process, from any start; NaN where nothing tells."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system = map(int, file.readline().split()[1:4])
    except (OSError, ValueError):
        return math.nan
    own = os.times()
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(threads: int, repeat: int, quick: bool) -> tuple[Bench, dict[str, float]]:
    """Everything; models are freed as soon as they are done."""
    bench = Bench(threads, repeat)
    overheads = bench.overheads()
    large = MINIATURE if quick else LARGE
    small = SMALL[:1] if quick else SMALL
    tiny = many(1_000 if quick else 10_000)
    for model in (*small, tiny):
        bench.phase(model)
    bench.phase(large, floor=True)
    for model in (*small, MIDDLING, tiny):
        bench.step(model)
    bench.step(large, floor=True)
    for model in (SMALL[0], large):
        bench.other_rules(model)
    return bench, overheads


def positive(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Time optforge against PyTorch and against the memory's limit.")
    parser.add_argument("--quick", action="store_true", help="small models and 3 rounds, in less than half a minute")
    parser.add_argument("--threads", type=positive, default=cores(), metavar="N", help="of both sides; default: all")
    parser.add_argument("--repeat", type=positive, metavar="N", help="rounds of each comparison (default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and all medians there")
    arguments = parser.parse_args()
    repeat = arguments.repeat or (3 if arguments.quick else 7)

    torch.set_num_threads(arguments.threads)
    about = circumstances(arguments.threads)
    start, busy = time.perf_counter(), busy_seconds()
    try:
        bench, overheads = measure(arguments.threads, repeat, arguments.quick)
    except Disagreement as problem:
        print(f"phase.py: the results differ: {problem}", file=sys.stderr)
        return 1
    took = time.perf_counter() - start
    about["machine"]["cores_busy_elsewhere"] = elsewhere = (busy_seconds() - busy) / took

    machine, versions = about["machine"], about["versions"]
    print(f"{machine['processor']}, {machine['cores']} cores, {arguments.threads} threads on both sides; ", end="")
    print(f"optforge {versions['optforge']}, PyTorch {versions['torch']}; {repeat} rounds in {took:.0f} s")
    print(f"Other processes kept {elsewhere:.2f} cores busy", end="")
    print(": too much for figures to trust; see the column `best`\n" if elsewhere > 0.1 else "\n")
    print(report(bench, overheads))
    if arguments.json:
        results = [result.as_dict() for result in bench.results]
        everything = {**about, "repeat": repeat, "results": results, "overhead_us": overheads}
        arguments.json.write_text(json.dumps(everything, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
