"""A step from Python over many small tensors, with the same gradients and with new ones, beside PyTorch's fused AdamW.

    python benchmarks/gradients.py [numbers of tensors]

One thread, all kinds in turn; the medians of steps and, in brackets, the fastest. A step of PyTorch's tensors begins
with `[p.grad for p in parameters]`, in "listed" it does not.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import optforge as of

SHAPE = (8, 8)
KINDS = ("torch", "listed", "numpy", "fused")


def prepared(kind: str, sets: Sequence[Sequence[Any]]) -> Callable[[int], float]:
    """An optimizer, and what times its step with one of the sets of gradients."""
    number = len(sets[0])
    if kind == "numpy":
        params: list[Any] = [np.zeros(SHAPE, np.float32) for _ in range(number)]
    else:
        params = [torch.nn.Parameter(torch.zeros(SHAPE)) for _ in range(number)]
    opt: Any = torch.optim.AdamW(params, fused=True) if kind == "fused" else of.Optimizer(params, "adamw", threads=1)

    def step(turn: int) -> float:
        grads = sets[turn % len(sets)]
        if kind != "numpy":
            for p, g in zip(params, grads, strict=True):
                p.grad = g
        begin = time.perf_counter()
        if kind == "fused":
            opt.step()
        else:
            opt.step([p.grad for p in params] if kind == "torch" else grads)
        return time.perf_counter() - begin

    return step


def main(numbers: Sequence[int]) -> None:
    """Print a line for each number of tensors and kind of step."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    for number in numbers:
        few = number < 1000
        arrays = [
            [rng.standard_normal(SHAPE).astype(np.float32) for _ in range(number)] for _ in range(12 if few else 4)
        ]
        tensors = [[torch.tensor(g) for g in own] for own in arrays]
        steps = {
            (kind, new): prepared(kind, (arrays if kind == "numpy" else tensors)[: None if new else 1])
            for kind in KINDS
            for new in (False, True)
        }
        times: dict[tuple[str, bool], list[float]] = {key: [] for key in steps}
        gc.disable()
        for turn in range(12 if few else 6):
            for key, step in steps.items():
                times[key] += [step(turn + k) for k in range(60 if few else 8)][2:]  # the first find cold caches
        gc.enable()
        for (kind, new), own in times.items():
            median, fastest = statistics.median(own) * 1e6, min(own) * 1e6
            what = "new" if new else "same"
            print(f"{number:6d} tensors, {kind:6s} {what:4s} {median:10.1f} µs ({fastest:.1f})", flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [1, 6, 148, 10_000])
