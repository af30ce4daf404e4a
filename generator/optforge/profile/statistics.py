"""Medians with intervals, and whether two runs differ: what noise does to times is to make them longer, in bursts.

A time by itself says little of a shared machine. What is estimated here is how many times as long as its limit a
kernel takes, both timed in the same turns: a clock that falls or memory that others use slows both. Of each turn the
lower tenth of the times counts, because what interrupts a step only ever adds to it.

Two runs are compared by their floors: the least that kernel and limit took in any turn. Others that use the machine
raise the median by a tenth or a half, and leave the floor where it is, as long as some turns are undisturbed. Whether
some were shows in how many come near the floor, which is the error that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 1000
# What the floors of two runs differ by although nothing has changed, as a standard deviation: where arrays lie in
# memory, which pages the system has for them. It does not show within a run.
BETWEEN_RUNS = 0.01
ONE_PLACE = 0.04  # the same where a run has had its arrays in one place alone
SIGNIFICANCE = 0.001  # chance of an alarm by noise, of all rows together
THRESHOLD = 0.03
SUPPORT = 4  # turns that must come near the floor
NEAR = 0.01


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


@dataclass(frozen=True)
class Floor:
    """The least of some times, and by how much it may be too large, as a share."""

    value: float
    error: float


def floor(times: Sequence[float]) -> Floor:
    """What the two fastest turns took; the error is how far the fourth, or of many the eighth part, is from that."""
    ordered = np.sort(np.asarray(times, float))
    if ordered.size < SUPPORT or not ordered[0] > 0 or not np.isfinite(ordered[SUPPORT - 1]):
        return Floor(float(ordered[0]) if ordered.size else math.nan, math.inf)
    last = ordered[max(SUPPORT - 1, ordered.size // 8)]
    return Floor(float(ordered[:2].mean()), math.log(last / ordered[0]))


def supported(times: Sequence[float]) -> bool:
    """Whether enough turns came so near to the fastest that it was no accident."""
    return floor(times).error < NEAR


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
    shift: float = 0.0  # how far the limits of both runs are from each other, as a share


def change(
    old: Sequence[Sequence[float]],
    new: Sequence[Sequence[float]],
    threshold: float = THRESHOLD,
    places: int = 2,
    same_machine: bool = True,
) -> Change:
    """Compare what a kernel takes of its limit in two runs.

    Parameters
    ----------
    old, new : pairs of sequences of float
        The times of the kernel and those of its limit, of all turns of a run.
    threshold : float
    places : int
        In how many places each run has had its arrays, at least.
    same_machine : bool
        Whether the limit should be the same in both: by how much it is not, the machine was in another state, and
        kernels need not follow their limit there.
    """
    floors = [[floor(times) for times in run] for run in (old, new)]
    before, after = (kernel.value / limit.value for kernel, limit in floors)
    away = shift(floors) if same_machine else 0.0
    between = math.sqrt(2) * (BETWEEN_RUNS if places > 1 else ONE_PLACE)
    error = math.hypot(*(own.error for run in floors for own in run), between, away)
    moved = math.log(after / before) if before > 0 and after > 0 else math.nan
    if not math.isfinite(error) or not math.isfinite(moved):
        return Change(math.exp(moved) if math.isfinite(moved) else math.nan, math.inf, 1.0, 1.0, away)
    least = math.log1p(threshold)
    return Change(math.exp(moved), error, tail((moved - least) / error), tail((-moved - least) / error), away)


def shift(floors: Sequence[Sequence[Floor]]) -> float:
    """How far the limits of two runs are from each other, as a share."""
    before, after = (run[1].value for run in floors)
    return abs(math.log(after / before)) if before > 0 and after > 0 else math.inf


def significant(ps: Sequence[float], level: float = SIGNIFICANCE) -> list[bool]:
    """Which of several tests say something, by Holm's correction for their number."""
    found = [False] * len(ps)
    for rank, k in enumerate(sorted(range(len(ps)), key=lambda k: ps[k])):
        if not ps[k] <= level / (len(ps) - rank):
            break
        found[k] = True
    return found
