"""Medians with intervals, and whether two runs differ: what noise does to times is to make them longer, in bursts.

A time by itself says little of a shared machine. What is estimated here is how many times as long as its limit a
kernel takes, both timed in the same turns: a clock that falls or memory that others use slows both. Of each turn the
lower tenth of the times counts, because what interrupts a step only ever adds to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 1000
# What two runs differ by although nothing has changed, as a standard deviation: where arrays lie in memory, which
# pages the system has for them. It does not show within a run.
BETWEEN_RUNS = 0.01
SIGNIFICANCE = 0.001  # chance of an alarm by noise, of all rows together
THRESHOLD = 0.03
NORMAL_MAD = 1.4826  # a standard deviation by the median of absolute deviations
MEDIAN_ERROR = 1.2533  # the standard error of a median by that of a mean


@dataclass(frozen=True)
class Estimate:
    """A median and an interval that holds the true one with a probability of `CONFIDENCE`."""

    value: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """Half of the interval, as a share of the value."""
        return (self.high - self.low) / 2 / abs(self.value) if self.value else math.inf


def estimate(values: Sequence[float]) -> Estimate:
    """The median with a bootstrap interval, always the same for the same values; of fewer than three, their range."""
    data = np.asarray(values, float)
    if data.size < 3:
        return Estimate(float(np.median(data)), float(data.min()), float(data.max()))
    chosen = np.random.default_rng(1).integers(0, data.size, (RESAMPLES, data.size))
    medians = np.median(data[chosen], axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(medians, (tail, 100 - tail))
    return Estimate(float(np.median(data)), float(low), float(high))


def standard_error(logs: Sequence[float]) -> float:
    """Of the median, robustly: outliers do not count."""
    data = np.asarray(logs, float)
    if data.size < 2:
        return math.inf
    spread = NORMAL_MAD * float(np.median(np.abs(data - np.median(data))))
    return MEDIAN_ERROR * spread / math.sqrt(data.size)


def tail(z: float) -> float:
    """The probability that a standard normal number is larger."""
    return 0.5 * math.erfc(z / math.sqrt(2))


@dataclass(frozen=True)
class Change:
    """How a row of one run stands to the same row of another: `ratio` above 1 is slower than before.

    `p` is the probability to see so much or more if it had become slower by the threshold at most.
    """

    ratio: float
    error: float
    p: float
    p_faster: float


def change(old: Sequence[float], new: Sequence[float], threshold: float = THRESHOLD) -> Change:
    """Compare what a kernel took of its limit, round by round, in two runs."""
    before, after = np.log(np.asarray(old, float)), np.log(np.asarray(new, float))
    moved = float(np.median(after) - np.median(before))
    error = math.sqrt(standard_error(before.tolist()) ** 2 + standard_error(after.tolist()) ** 2 + 2 * BETWEEN_RUNS**2)
    if not math.isfinite(error) or not math.isfinite(moved):
        return Change(math.exp(moved) if math.isfinite(moved) else math.nan, math.inf, 1.0, 1.0)
    least = math.log1p(threshold)
    return Change(math.exp(moved), error, tail((moved - least) / error), tail((-moved - least) / error))


def significant(ps: Sequence[float], level: float = SIGNIFICANCE) -> list[bool]:
    """Which of several tests say something, by Holm's correction for their number."""
    found = [False] * len(ps)
    for rank, k in enumerate(sorted(range(len(ps)), key=lambda k: ps[k])):
        if not ps[k] <= level / (len(ps) - rank):
            break
        found[k] = True
    return found
