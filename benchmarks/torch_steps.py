"""What an optimizer takes of a training loop in PyTorch, with the gradients that `zero_grad` makes new at each step.

    python benchmarks/torch_steps.py

For 6, 148 and 10,000 tensors: AdamW of PyTorch (fused, foreach) and of optforge.torch, in turn; medians of `step`
alone. The last columns are what our `step` takes beside the call of the kernel in it: in all, and for each gradient,
and in all where neither another optimizer nor data have taken its place in the caches: without a kernel, and with as
many tensors of 64 elements.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from optforge.torch import Optimizer

# As in a small network, in GPT-2 with an eighth of its width, and in a model of very many small parts.
ROWS: dict[str, list[tuple[int, ...]]] = {
    "6": [(64, 20), (64,), (64, 64), (64,), (3, 64), (3,)],
    "148": [(96, 384), (384,), (384, 96), (96,)] * 37,
    "10,000": [(64,)] * 10_000,
}
MAKE: dict[str, Callable[[list[Any]], Any]] = {
    "fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "foreach": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True),
    "ours": lambda params: Optimizer(params, "adamw", lr=1e-3),
}


def microseconds(do: Callable[[], Any]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    do()
    return 1e6 * (time.perf_counter() - begin)


def measure(shapes: list[tuple[int, ...]], rounds: int) -> dict[str, float]:
    """The medians of a row."""
    values = [torch.randn(shape) for shape in shapes]
    made = {name: [torch.nn.Parameter(v.clone()) for v in values] for name in MAKE}
    optimizers = {name: make(made[name]) for name, make in MAKE.items()}
    times: dict[str, list[float]] = {name: [] for name in (*MAKE, "around")}
    timed: Any = None
    for turn in range(rounds + 3):
        for name, opt in optimizers.items():
            for p, v in zip(made[name], values, strict=True):
                p.grad = v.clone()
            took = microseconds(opt.step)
            if turn >= 3:
                times[name].append(took)
                if name == "ours":
                    times["around"].append(took - timed.took)
            elif name == "ours" and turn == 2:  # the plan stays from the second step on
                inner = opt._stepper.opt
                timed = Timed(inner._plan)
                inner._set(_plan=timed)
            opt.zero_grad()
    return {name: statistics.median(own) for name, own in times.items()}


def alone(count: int, rounds: int) -> float:
    """The median of steps over so many small tensors that call no kernel."""
    params = [torch.nn.Parameter(torch.zeros(64)) for _ in range(count)]
    opt, times = MAKE["ours"](params), []
    for turn in range(rounds + 3):
        for p in params:
            p.grad = torch.ones(64)
        took = microseconds(opt.step)
        if turn >= 3:
            times.append(took)
        elif turn == 2:
            inner = opt._stepper.opt
            inner._set(_plan=Idle(inner._plan))
        opt.zero_grad()
    return statistics.median(times)


class Timed:
    """A plan whose steps are timed, in microseconds."""

    def __init__(self, plan: Any):
        self.plan, self.took = plan, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plan, name)

    def step(self, *given: Any) -> Any:
        """A step of the plan."""
        begin = time.perf_counter()
        told = self.plan.step(*given)
        self.took = 1e6 * (time.perf_counter() - begin)
        return told


class Idle(Timed):
    """A plan whose steps do nothing."""

    def step(self, *given: Any) -> Any:
        """A step that is said to be applied."""
        return False


def main() -> None:
    """Print a line for each row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    heads = [*(f"{name} µs" for name in MAKE), "fused/ours", "around µs", "each", "alone µs"]
    print(f"{'tensors':>8}" + "".join(f"{head:>12}" for head in heads))
    for name, shapes in ROWS.items():
        rounds = max(given.rounds // (10 if len(shapes) > 1000 else 1), 5)
        own, quiet = measure(shapes, rounds), alone(len(shapes), 2 * rounds)
        around = own["around"]
        figures = [own[kind] for kind in MAKE] + [own["fused"] / own["ours"], around, around / len(shapes), quiet]
        print(f"{name:>8}" + "".join(f"{figure:>12.2f}" for figure in figures))


if __name__ == "__main__":
    main()
