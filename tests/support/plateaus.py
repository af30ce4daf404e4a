"""What the tests of ReduceLROnPlateau in Python and in C share: metrics, settings, and stand-ins for optimizers."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any


class Rates:
    """What is used of an optimizer with groups."""

    def __init__(self, *rates: Any):
        self.groups = [{"lr": rate} for rate in rates]

    @property
    def rates(self) -> list[float]:
        return [group["lr"] for group in self.groups]


class One:
    """What is used of an optimizer without groups."""

    def __init__(self, lr: Any):
        self.lr = lr


def metrics(seed: int, count: int, mode: str) -> Iterator[float]:
    """A metric that falls, gets stuck, jumps back, repeats itself exactly and moves by just about a threshold."""
    generator = random.Random(seed)
    value, best = generator.choice((3.0, 0.02, -1.5)), math.inf
    for _ in range(count):
        best = min(best, value)
        following = (
            value,
            value,
            best,
            best * (1 - 1e-4),
            best * (1 - 0.05),
            best - 1e-4,
            best - 0.05,
            math.nextafter(best - 0.05, -math.inf),
            value + generator.gauss(0, 0.03),
            value - abs(generator.gauss(0, 0.02)),
            value + 1.0,
            math.inf,
        )
        value = generator.choice(following)
        yield value if mode == "min" else -value
        value = value if math.isfinite(value) else best


SETTINGS: list[dict[str, Any]] = [
    {
        "mode": generator.choice(("min", "max")),
        "factor": generator.choice((0.1, 0.5, 0.3, 0.97)),
        "patience": generator.choice((0, 0, 1, 2, 5, 10)),
        "threshold": generator.choice((0.0, 1e-4, 0.05)),
        "threshold_mode": generator.choice(("rel", "abs")),
        "cooldown": generator.choice((0, 0, 1, 2, 7)),
        "min_lr": generator.choice((0.0, [0.0, 1e-3], [1e-5, 0.05])),
        "eps": generator.choice((1e-8, 0.0, 1e-3)),
    }
    for generator in (random.Random(seed) for seed in range(60))
]


def both_bounds(settings: dict[str, Any]) -> list[float]:
    return settings["min_lr"] if isinstance(settings["min_lr"], list) else [settings["min_lr"]] * 2
