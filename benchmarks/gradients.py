"""A step from Python over small tensors, with the same gradients and with new ones, beside PyTorch's fused AdamW.

    python benchmarks/gradients.py [numbers of tensors]

The sides and their turns are those of `optforge profile`, on one thread. Microseconds a step: the median of the rounds,
and the fastest.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

import numpy as np
import torch

import optforge as of
from optforge.profile.measure import turns
from optforge.profile.models import Model
from optforge.profile.peers import loops, pytorch
from optforge.profile.peers.side import Problem, Turn

SHAPE = (8, 8)
SECONDS, BLOCK_SECONDS = 2.0, 0.03


def main(numbers: Sequence[int]) -> None:
    """Print a line for each number of tensors and kind of step."""
    torch.set_num_threads(1)
    rule = of.rules.adamw
    for number in numbers:
        arrays = [np.full(SHAPE, 0.02, np.float32) for _ in range(number)]
        problem = Problem(rule, *rule.settings({}), Model("small", [SHAPE] * number), arrays, arrays, 1)
        sides = [("NumPy", loops.Ours(problem)), ("PyTorch", pytorch.Ours(problem))]
        sides.append(("PyTorch", pytorch.Optimizer(problem, "fused")))
        for new in (False, True):
            found = turns([named(Turn(side, new), f"{side.name}, {of}") for of, side in sides], SECONDS, BLOCK_SECONDS)
            for name in found.names:
                median, fastest = 1e6 * statistics.median(found.median(name)), 1e6 * min(found.low(name))
                kind = "new" if new else "same"
                print(f"{number:6d} tensors, {name:24s} {kind:4s} {median:10.1f} µs ({fastest:.1f})", flush=True)


def named(turn: Turn, name: str) -> Turn:
    """A turn under another name, since two sides are optforge."""
    turn.name = name
    return turn


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [1, 6, 148, 10_000])
