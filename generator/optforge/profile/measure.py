"""Contenders take turns: rounds of blocks, until their ratio is known well enough or the time is up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .kernels import Block, Contender
from .machine import Moment
from .statistics import estimate, supported

FEWEST, MOST = 5, 40  # rounds
LEAST = 3  # where even so few take much longer than there is time
NARROW = 0.005  # half an interval of the ratio at which it is known well enough
BLOCK_SECONDS = 0.02
EXTRA = 2.0  # times as long is measured where nothing was undisturbed
SETTLE_SECONDS = 0.005  # until the threads that the last contender left spinning sleep


@dataclass
class Rounds:
    """The blocks of all contenders, round by round, and how many cores others kept busy in each round."""

    names: list[str]
    blocks: list[dict[str, Block]] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)

    def low(self, name: str) -> list[float]:
        """The low times of a contender."""
        return [round[name].low for round in self.blocks]

    def median(self, name: str) -> list[float]:
        """The median times of a contender."""
        return [round[name].median for round in self.blocks]

    def ratios(self, name: str, other: str) -> list[float]:
        """A contender's times by another's, of the same rounds."""
        return [a / b for a, b in zip(self.low(name), self.low(other), strict=True)]

    def add(self, more: Rounds) -> None:
        """Take in the rounds of another lap."""
        self.blocks += more.blocks
        self.busy += more.busy

    def as_dict(self) -> dict[str, Any]:
        """For JSON: seconds per step."""
        return {
            "median": {name: self.median(name) for name in self.names},
            "low": {name: self.low(name) for name in self.names},
            "busy": self.busy,
        }


def turns(
    contenders: Sequence[Contender],
    seconds: float,
    block: float = BLOCK_SECONDS,
    settle: float = 0.0,
    fewest: int = FEWEST,
) -> Rounds:
    """Let contenders take turns for so many seconds, `fewest` rounds at least; every other round goes backwards.

    It ends early where the ratios of all to the first are known well enough.
    """
    found = Rounds([own.name for own in contenders])
    start = time.perf_counter()
    for number in range(MOST):
        spent = time.perf_counter() - start
        over = spent * (number + 1) / number if number else 0.0
        if number >= LEAST and spent > EXTRA * seconds:
            break
        if number >= fewest and (known(found) or over > (1 if steady(found) else EXTRA) * seconds):
            break
        before, round = Moment.now(), {}
        for own in contenders if number % 2 == 0 else contenders[::-1]:
            if settle:
                time.sleep(settle)
            round[own.name] = own.block(block)
        found.blocks.append(round)
        found.busy.append(Moment.now().busy(before))
    return found


def known(rounds: Rounds) -> bool:
    """Whether further rounds would tell nothing."""
    if not steady(rounds):
        return False
    first = rounds.names[0]
    others = rounds.names[1:]
    if not others:
        return estimate(rounds.low(first)).width < NARROW
    return all(estimate(rounds.ratios(other, first)).width < NARROW for other in others)


def steady(rounds: Rounds) -> bool:
    """Whether some rounds of each contender were undisturbed."""
    return all(supported(rounds.low(name)) for name in rounds.names)
