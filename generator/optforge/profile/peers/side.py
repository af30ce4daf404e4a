"""One side of a comparison: parameters and gradients of its own, a step that is timed, and whether two sides agree."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...core.functions import Array
from ...library.rule import Rule
from ..kernels import Block, summary
from ..models import Model

WARM_SECONDS, MOST_STEPS = 0.005, 400  # of a block
CHECKED_STEPS = (1.0, -0.5, 2.0)  # what gradients are multiplied by in the steps that must agree
ULPS, SHARE = 4, 1e-4  # units in the last place of a parameter, and share of how far the farthest has moved
PIECE = 1 << 20


@dataclass(frozen=True)
class Problem:
    """What all sides compute: the same rule with the same settings, from the same start with the same gradients."""

    rule: Rule
    hyperparameters: Mapping[str, float]
    options: Mapping[str, bool | str]
    model: Model
    params: Sequence[Array]
    grads: Sequence[Array]
    threads: int


class NoPeer(Exception):
    """A library has no form of a rule, for the reason that this gives."""


class Disagreement(Exception):
    """Two sides compute different things, so comparing their times means nothing."""


class Side:
    """One side; `name` is shown.

    `renews` says whether gradients can be other arrays at each step; `allocator` gives copies of arrays.
    """

    name = ""
    renews = False

    def load(self, factor: float) -> None:
        """Set the gradients to those of the problem times a factor."""
        raise NotImplementedError

    def renew(self) -> None:
        """Let the next step have gradients in other arrays, as backward passes make them. Not timed."""

    def step(self) -> None:
        """What is timed."""
        raise NotImplementedError

    def params(self) -> Sequence[Array]:
        """The parameters as they are."""
        raise NotImplementedError


def prepared(problem: Problem) -> tuple[list[Array], list[Array]]:
    """Copies of a problem's parameters and gradients."""
    return [p.copy() for p in problem.params], [g.copy() for g in problem.grads]


class Turn:
    """A side that takes turns with others, with new gradient arrays at each step or the same ones."""

    def __init__(self, side: Side, new: bool):
        self.side, self.new, self.name = side, new, side.name

    def run(self, seconds: float) -> list[float]:
        """The times of one step or more."""
        times: list[float] = []
        spent = 0.0
        while not times or (spent < seconds and len(times) < MOST_STEPS):
            if self.new:
                self.side.renew()
            start = time.perf_counter()
            self.side.step()
            times.append(time.perf_counter() - start)
            spent += times[-1]
        return times

    def block(self, seconds: float) -> Block:
        """Steps for so long, one at least, behind a warm-up."""
        self.run(WARM_SECONDS)
        return summary(self.run(seconds))


def first_steps(side: Side) -> None:
    """Take the steps that must agree."""
    for factor in CHECKED_STEPS:
        side.load(factor)
        side.step()
    side.load(1.0)


def difference(problem: Problem, own: Sequence[Array], others: Sequence[Array]) -> float:
    """How far two sides are apart, at worst, in shares of what rounding explains; NaN and infinity are the worst."""
    moved = max((largest(a, b) for a, b in zip(problem.params, own, strict=True)), default=0.0)
    worst = 0.0
    for ours, theirs in zip(own, others, strict=True):
        for start in range(0, ours.size, PIECE):
            here, there = (x.reshape(-1)[start : start + PIECE] for x in (ours, theirs))
            allowed = ULPS * np.finfo(np.float32).eps * np.abs(there) + SHARE * moved + np.finfo(np.float32).tiny
            with np.errstate(all="ignore"):
                off = float(np.max(np.abs(here - there) / allowed, initial=0.0))
            if not off <= worst:
                worst = off if off == off else np.inf
    return worst


def largest(a: Array, b: Array) -> float:
    """The largest difference of elements."""
    parts = range(0, a.size, PIECE)
    return max(
        (float(np.max(np.abs(b.reshape(-1)[k : k + PIECE] - a.reshape(-1)[k : k + PIECE]))) for k in parts), default=0.0
    )


def agree(problem: Problem, ours: Side, theirs: Side) -> float:
    """Let `theirs` take the first steps, which `ours` has taken; gives how far they are apart.

    Raises
    ------
    Disagreement
        By more than rounding explains.
    """
    first_steps(theirs)
    off = difference(problem, ours.params(), theirs.params())
    if not off <= 1:
        raise Disagreement(
            f"{theirs.name} computes something else than {problem.rule.name}: after {len(CHECKED_STEPS)} steps over "
            f"{problem.model.label} a parameter differs by {off:.3g} times of what rounding explains; it was not timed"
        )
    return off


Maker = Callable[[Problem], list[Side]]
