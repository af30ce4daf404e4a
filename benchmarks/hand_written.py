"""Times the emitted AdamW against one written by hand with intrinsics: one tensor of float32, one thread.

    python benchmarks/hand_written.py [--quick] [--rounds N]

`adamw_intrinsics.c` has the same operations in the same order, for AVX2 and AVX-512. Before anything is timed, all
contenders must have the bits of optforge's own steps. Then they take turns, every other round backwards. The numbers
are medians over the rounds of the medians of a turn, in nanoseconds per element; each step is timed by itself, behind a
copy of new gradients, which a phase spends.

Exit codes: 0 measured, 1 the results differ, 2 a mistake in the arguments, 3 something is missing on the machine.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import optforge as of

HERE = Path(__file__).parent
PHASE = of.clip_by_global_norm >> of.rules.adamw
HYPER = {"lr": 3e-4, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01, "max_norm": 1.0}
GRAD_SCALE = 1024.0

CHECKED = (0, 1, 7, 31, 32, 33, 1023, 1024, 1025, 32_767, 32_768, 32_769, 100_001, 1_200_000)
SIZES = {"1k": 1 << 10, "4k": 1 << 12, "32k": 1 << 15, "256k": 1 << 18, "16M": 1 << 24}
BLOCK_ELEMENTS = 1 << 23  # of a contender's turn, one step at least

# ── how emitted C is called: all that knows its interface ───────────────────────────────────────────────────────────

CALLS = r"""
#include "adamw.h"
#include "clip_by_global_norm_adamw.h"

typedef struct { double lr, beta1, beta2, eps, weight_decay, max_norm; } settings;
typedef struct {
    double grad_norm, clipped_grad_norm, param_norm, update_norm;
    uint64_t nan, inf, skipped;
} told;
typedef struct { size_t n; float *p, *g, *m, *v; } arrays;

size_t room(size_t n)
{
    return clip_by_global_norm_adamw_workspace_size(n, 1);
}

void plain(const arrays *a, const settings *h, uint64_t t)
{
    const adamw_hyper hyper = {h->lr, h->beta1, h->beta2, h->eps, h->weight_decay};
    const adamw_tensor_f32 tensor = {a->n, a->p, a->g, a->m, a->v};

    adamw_step_f32(&hyper, t, &tensor, 1);
}

void phase(const arrays *a, const settings *h, uint64_t t, double grad_scale, double *space, told *found)
{
    const clip_by_global_norm_adamw_tensor_f32 tensor = {a->n, a->p, a->g, a->m, a->v};
    clip_by_global_norm_adamw_hyper hyper;
    clip_by_global_norm_adamw_stats stats;
    clip_by_global_norm_adamw_options options;

    hyper.lr = h->lr;
    hyper.beta1 = h->beta1;
    hyper.beta2 = h->beta2;
    hyper.eps = h->eps;
    hyper.weight_decay = h->weight_decay;
    hyper.max_norm = h->max_norm;
    clip_by_global_norm_adamw_options_init(&options);
    options.grad_scale = grad_scale;
    options.skip_nonfinite = options.zero_grads = options.threads = 1;
    options.stats = &stats;
    options.workspace = space;
    options.workspace_size = room(a->n);
    clip_by_global_norm_adamw_step_with_f32(&hyper, t, &tensor, 1, &options);
    found->grad_norm = stats.grad_norm;
    found->clipped_grad_norm = stats.clipped_grad_norm;
    found->param_norm = stats.param_norm;
    found->update_norm = stats.update_norm;
    found->nan = stats.nan;
    found->inf = stats.inf;
    found->skipped = stats.skipped;
}
"""


def emitted() -> dict[str, str]:
    """The emitted files and those that call them."""
    return {**of.rules.adamw.generate("c", dtypes="f32"), **PHASE.generate("c", dtypes="f32"), "calls.c": CALLS}


# ── the rest ────────────────────────────────────────────────────────────────────────────────────────────────────────

TIMER = r"""
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct { size_t n; float *p, *g, *m, *v; } arrays;

static double seconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static double median(double *times, size_t n)
{
    qsort(times, n, sizeof *times, compare);
    return times[n / 2];
}

double time_plain(void (*step)(const arrays *, const void *, uint64_t), const arrays *a, const void *settings,
                  const float *gradients, size_t steps, double *times)
{
    for (size_t k = 0; k < steps; k++) {
        memcpy(a->g, gradients, a->n * sizeof(float));
        times[k] = -seconds();
        step(a, settings, k + 1);
        times[k] += seconds();
    }
    return median(times, steps);
}

double time_phase(void (*step)(const arrays *, const void *, uint64_t, double, double *, void *), const arrays *a,
                  const void *settings, const float *gradients, size_t steps, double *times, double grad_scale,
                  double *room, void *told)
{
    for (size_t k = 0; k < steps; k++) {
        memcpy(a->g, gradients, a->n * sizeof(float));
        times[k] = -seconds();
        step(a, settings, k + 1, grad_scale, room, told);
        times[k] += seconds();
    }
    return median(times, steps);
}
"""

NORMS = ("grad_norm", "clipped_grad_norm", "param_norm", "update_norm")
COUNTS = ("nan", "inf", "skipped")


class Settings(ctypes.Structure):
    """Hyperparameters."""

    _fields_ = [(name, ctypes.c_double) for name in HYPER]


class Told(ctypes.Structure):
    """Statistics."""

    _fields_ = [(name, ctypes.c_double) for name in NORMS] + [(name, ctypes.c_uint64) for name in COUNTS]


class Arrays(ctypes.Structure):
    """A tensor."""

    _fields_ = [("n", ctypes.c_size_t), *((name, ctypes.c_void_p) for name in "pgmv")]


class Disagreement(Exception):
    """Two contenders compute different bits."""


class Data:
    """A tensor with its gradients, and room for sums."""

    def __init__(self, size: int):
        rng = np.random.default_rng(size)
        self.start = rng.standard_normal(size, np.float32)
        self.gradients = rng.standard_normal(size, np.float32) * np.float32(0.01)
        self.arrays = {name: np.zeros(size, np.float32) for name in "pgmv"}
        self.room, self.told = np.zeros(size // 32 + 1024), Told()  # more room than any of them needs
        self.table = Arrays(size, *(self.arrays[name].ctypes.data for name in "pgmv"))

    def reset(self) -> None:
        """Begin anew."""
        self.arrays["p"][:] = self.start
        for name in "gmv":
            self.arrays[name][:] = 0


class Contender:
    """A plain step and a phase in a library."""

    def __init__(self, name: str, plain: Any, phase: Any):
        self.name, self.plain, self.phase = name, plain, phase
        self.settings = Settings(**HYPER)

    def step(self, data: Data, t: int, phase: bool) -> None:
        """One step."""
        arguments = [ctypes.byref(data.table), ctypes.byref(self.settings), ctypes.c_uint64(t)]
        if phase:
            room = ctypes.c_void_p(data.room.ctypes.data)
            self.phase(*arguments, ctypes.c_double(GRAD_SCALE), room, ctypes.byref(data.told))
        else:
            self.plain(*arguments)

    def time(self, timer: Any, data: Data, phase: bool, steps: int) -> float:
        """Nanoseconds per element."""
        gradients = ctypes.c_void_p(data.gradients.ctypes.data)
        times = (ctypes.c_double * steps)()
        arguments = [ctypes.byref(data.table), ctypes.byref(self.settings), gradients, ctypes.c_size_t(steps), times]
        if phase:
            arguments += [ctypes.c_double(GRAD_SCALE), ctypes.c_void_p(data.room.ctypes.data), ctypes.byref(data.told)]
        function, step = (timer.time_phase, self.phase) if phase else (timer.time_plain, self.plain)
        function.restype = ctypes.c_double
        took: float = function(step, *arguments)
        return took * 1e9 / data.table.n


def build(directory: Path, files: dict[str, str], flags: Sequence[str]) -> Any:
    """Compile and load."""
    directory.mkdir()
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    sources = [name for name in files if name.endswith(".c")]
    command = [*compiler(), *flags, "-fPIC", "-shared", "-o", "library.so", *sources, "-lm"]
    subprocess.run(command, cwd=directory, check=True)
    return ctypes.CDLL(str(directory / "library.so"))


def compiler() -> list[str]:
    """The C compiler."""
    return shlex.split(os.environ.get("CC", "cc"))


def contenders(directory: Path) -> list[Contender]:
    """All that can run here."""
    found = []
    for name, flags in (("-O2", ["-O2"]), ("-O3 -march=native", ["-O3", "-march=native"])):
        library = build(directory / f"emitted{len(found)}", emitted(), flags)
        library.room.restype = ctypes.c_size_t
        for size in CHECKED:
            assert library.room(ctypes.c_size_t(size)) <= Data(size).room.nbytes
        found.append(Contender(f"emitted, {name}", library.plain, library.phase))
    written = {"adamw_intrinsics.c": (HERE / "adamw_intrinsics.c").read_text(encoding="utf-8")}
    library = build(directory / "intrinsics", written, ["-O2"])
    if library.has_avx2():
        found.append(Contender("by hand, AVX2", library.plain_avx2, library.phase_avx2))
    if library.has_avx512():
        found.append(Contender("by hand, AVX-512", library.plain_avx512, library.phase_avx512))
    return found


# ── the same bits ───────────────────────────────────────────────────────────────────────────────────────────────────


def agree(contender: Contender, size: int, phase: bool) -> None:
    """Compare steps with optforge's; in a phase, one of them is skipped, and two are clipped or not."""
    data = Data(size)
    data.reset()
    params = [data.start.copy()]
    hyper = {name: value for name, value in HYPER.items() if phase or name != "max_norm"}
    how = {"skip_nonfinite": True, "zero_grads": True} if phase else {}
    optimizer = of.Optimizer(params, PHASE if phase else of.rules.adamw, threads=1, **how, **hyper)
    for scale, wrong in ((1.0, None), (30.0 if phase else -0.5, None), (1.0, np.nan), (1.0, -np.inf), (1e6, None)):
        if wrong is not None and not (phase and size):
            continue
        gradients = data.gradients * np.float32(scale)
        if wrong is not None:
            gradients[size // 2] = wrong
        data.arrays["g"][:] = gradients
        contender.step(data, optimizer.t + 1, phase)
        told = optimizer.step([gradients], **({"grad_scale": GRAD_SCALE, "stats": True} if phase else {}))
        expected = {"p": params[0], "g": gradients, **{name: optimizer.state[name][0] for name in "mv"}}
        different = [name for name, own in expected.items() if own.tobytes() != data.arrays[name].tobytes()]
        if phase:
            for name in (*NORMS, *COUNTS):
                if not np.array_equal(getattr(told, name), getattr(data.told, name), equal_nan=True):
                    different.append(name)
        if different:
            what = "phase" if phase else "plain step"
            raise Disagreement(f"{contender.name}, {what} of {size} elements: {', '.join(different)} differ")


# ── times ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(found: Sequence[Contender], timer: Any, size: int, phase: bool, rounds: int) -> list[float]:
    """The median time per element of each contender."""
    data = Data(size)
    data.gradients *= np.float32(GRAD_SCALE if phase else 1.0)
    steps = max(1, BLOCK_ELEMENTS // size)
    times: list[list[float]] = [[] for _ in found]
    for number in range(rounds):
        order = list(enumerate(found))
        for place, contender in order[:: -1 if number % 2 else 1]:
            data.reset()
            contender.time(timer, data, phase, max(1, steps // 20))
            times[place].append(contender.time(timer, data, phase, steps))
    return [statistics.median(own) for own in times]


def processor() -> str:
    """What it was measured on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Time the emitted AdamW against one written with intrinsics.")
    parser.add_argument("--quick", action="store_true", help="three rounds, and no large tensor")
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="turns of each contender (default 11)")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds is a number from 1")
    if platform.machine() not in ("x86_64", "AMD64"):
        print("hand_written.py needs an x86-64 processor", file=sys.stderr)
        return 3
    sizes = dict(list(SIZES.items())[:-1]) if arguments.quick else SIZES
    with tempfile.TemporaryDirectory() as name:
        try:
            found = contenders(Path(name))
            timer = build(Path(name) / "timer", {"timer.c": TIMER}, ["-O2"])
        except (OSError, subprocess.CalledProcessError) as problem:
            print(f"hand_written.py: {problem}", file=sys.stderr)
            return 3
        try:
            for contender in found:
                for size in CHECKED:
                    for phase in (False, True):
                        agree(contender, size, phase)
        except Disagreement as problem:
            print(f"hand_written.py: {problem}", file=sys.stderr)
            return 1
        version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
        print(f"{processor()}; {version}; load {os.getloadavg()[0]:.1f}; nanoseconds per element, one thread")
        for phase in (False, True):
            title = "phase: unscale, clip, skip, AdamW, norms, zeroing" if phase else "plain step"
            rows = {
                label: measure(found, timer, size, phase, 3 if arguments.quick else arguments.rounds)
                for label, size in sizes.items()
            }
            print(f"\n{title:50}" + "".join(f"{label:>8}" for label in rows))
            for place, contender in enumerate(found):
                print(f"  {contender.name:48}" + "".join(f"{times[place]:8.3f}" for times in rows.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
