"""Schedules: hyperparameters that change as training goes, as plain functions of the step count.

A schedule is called with `t`, the number of the step from 1, and gives a float. Any hyperparameter takes one:

>>> import optforge as of
>>> lr = of.schedules.cosine(3e-4, steps=10_000, warmup=500)
>>> lr(501), lr(10_001)
(0.0003, 0.0)

In the formulas `e = t - 1` is the number of steps already taken: it is what PyTorch's schedulers call the epoch, where
they are stepped after every training step, and what optax calls the count. Two rules hold for all of them:

- **Warm-up.** The first `warmup` steps rise in equal parts, `value * t / (warmup + 1)`, and step warmup + 1 is the
  first with `value` itself. From there the schedule goes on as it would without a warm-up: the formulas then have
  `e = t - 1 - warmup`. (PyTorch: LinearLR(start_factor=1 / (warmup + 1), total_iters=warmup) before it in a
  SequentialLR.)
- **The end.** `steps` and `after` count all steps from the first, the warm-up included. A schedule with `steps` has its
  final value exactly from t = steps + 1 on, so that no step of a run of `steps` steps is lost to a final value of 0.
  (`one_cycle` has it at t = steps already, as PyTorch's.)

Schedules are frozen, equal where their arguments are, and go through JSON: `from_dict(schedule.to_dict())`.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..core.diagnostics import UsageError, nearest

__all__ = [
    "Schedule",
    "chain",
    "constant",
    "cosine",
    "exponential",
    "from_dict",
    "inverse_time",
    "linear",
    "multi_step",
    "one_cycle",
    "plot",
    "polynomial",
    "step",
]


class Schedule(ABC):
    """A value for every step: a function of t, which counts the steps from 1."""

    def __call__(self, t: int) -> float:
        """The value at step t.

        Raises
        ------
        TypeError
            t is no whole number.
        ValueError
            It is below 1.
        OverflowError
            The value is beyond the range of a double.
        """
        try:
            count = operator.index(t)
        except TypeError:
            raise TypeError(f"t is the number of a step, not {t!r}") from None
        if count < 1:
            raise ValueError(f"steps are counted from 1, so t cannot be {count}")
        try:
            value = self._after(count - 1)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise OverflowError(f"{self!r} is beyond the range of a double at t = {count}")
        return value

    @abstractmethod
    def _after(self, taken: int) -> float:
        """The value when so many steps have been taken."""

    def then(self, following: Schedule, *, after: int) -> chain:
        """This schedule for the first `after` steps, then another one, whose own t starts at 1.

        Parameters
        ----------
        following : Schedule
        after : int
            At least 1. In `a.then(b, after=100).then(c, after=300)` both numbers count from the first step of all.

        Returns
        -------
        chain
        """
        return chain(self, following, after=after)

    def plot(self, steps: int, path: str | Path) -> None:
        """Draw the values at t = 1 to `steps` as a PNG; as the function `plot`."""
        plot(self, steps, path)

    def to_dict(self) -> dict[str, Any]:
        """The schedule as plain data that JSON can hold: its name under "schedule", and its arguments by name."""
        return {"schedule": type(self).__name__} | {own.name: plain(getattr(self, own.name)) for own in arguments(self)}

    def __repr__(self) -> str:
        shown = []
        for own in arguments(self):
            value = getattr(self, own.name)
            if value != own.default:
                shown.append(f"{own.name}={value!r}" if own.kw_only else repr(value))
        return f"{type(self).__name__}({', '.join(shown)})"

    def _check(self, **checks: Callable[[str, Any], Any]) -> None:
        """Put each named argument through its check, which gives it back in its own type."""
        for name, check in checks.items():
            object.__setattr__(self, name, check(f"{type(self).__name__}: {name}", getattr(self, name)))

    def _refuse(self, problem: str) -> None:
        raise ValueError(f"{type(self).__name__}: {problem}")


def arguments(schedule: Schedule) -> list[Any]:
    """The fields of a schedule as a person would write them: those given by name last, the warm-up behind all."""
    return sorted(fields(schedule), key=lambda own: (own.kw_only, own.name == "warmup"))  # type: ignore[arg-type]


def plain(value: Any) -> Any:
    """An argument as JSON holds it."""
    return value.to_dict() if isinstance(value, Schedule) else list(value) if isinstance(value, tuple) else value


# ── checks of arguments ─────────────────────────────────────────────────────────────────────────────────────────────


def real(what: str, given: Any) -> float:
    """A finite number."""
    if isinstance(given, (bool, str, bytes)):
        raise TypeError(f"{what} is a number, not {given!r}")
    try:
        number = float(given)
    except (TypeError, ValueError):
        raise TypeError(f"{what} is a number, not {given!r}") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{what} is a finite number, not {given!r}")
    return number


def positive(what: str, given: Any) -> float:
    """A number above 0."""
    number = real(what, given)
    if number <= 0:
        raise ValueError(f"{what} is a number above 0, not {given!r}")
    return number


def not_negative(what: str, given: Any) -> float:
    """A number from 0."""
    number = real(what, given)
    if number < 0:
        raise ValueError(f"{what} is a number from 0, not {given!r}")
    return number


def whole(what: str, given: Any, least: int = 0) -> int:
    """A whole number from `least`."""
    try:
        number = operator.index(given)
    except TypeError:
        number = None
    if number is None or isinstance(given, bool):
        raise TypeError(f"{what} is a whole number, not {given!r}")
    if number < least:
        raise ValueError(f"{what} is a whole number from {least}, not {given!r}")
    return int(number)


def count(what: str, given: Any) -> int:
    """A whole number from 1."""
    return whole(what, given, least=1)


def increasing(what: str, given: Any) -> tuple[int, ...]:
    """One or several whole numbers from 1, each above the one before."""
    if isinstance(given, (str, bytes)) or not hasattr(given, "__iter__"):
        given = [given]
    numbers = tuple(count(what, number) for number in given)
    if not numbers or any(a >= b for a, b in itertools.pairwise(numbers)):
        raise ValueError(f"{what} is one or several numbers of steps in increasing order, not {list(numbers)}")
    return numbers


def is_schedule(what: str, given: Any) -> Schedule:
    """A schedule."""
    if not isinstance(given, Schedule):
        raise TypeError(f"{what} is a schedule, not {given!r}")
    return given


# ── the schedules ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, repr=False)
class _Warmed(Schedule):
    """What may follow a warm-up: a value, and what becomes of it."""

    value: float
    warmup: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        self._check(value=real, warmup=whole)

    def _after(self, taken: int) -> float:
        if taken < self.warmup:
            return self.value * (taken + 1) / (self.warmup + 1)
        return self._decayed(taken - self.warmup)

    @abstractmethod
    def _decayed(self, e: int) -> float:
        """The value when so many steps have been taken since the warm-up; exactly `value` for 0."""


@dataclass(frozen=True, repr=False)
class constant(_Warmed):
    """The same value at every step; with `warmup` what is called a linear warm-up.

    Parameters
    ----------
    value : float
        At every step after the warm-up.
    warmup : int
        Steps that rise to it.

    Examples
    --------
    >>> lr = constant(0.1, warmup=4)
    >>> [round(lr(t), 3) for t in range(1, 7)]
    [0.02, 0.04, 0.06, 0.08, 0.1, 0.1]
    """

    def _decayed(self, e: int) -> float:
        return self.value


@dataclass(frozen=True, repr=False)
class step(_Warmed):
    """A factor at every so many steps: value * factor ** (e // every).

    It is `value` from t = 1 to `every`, value * factor at t = every + 1, and goes on for ever. PyTorch:
    StepLR(step_size=every, gamma=factor).

    Parameters
    ----------
    value : float
        Before the first factor.
    every : int
        Steps between two factors, counted from the end of the warm-up; at least 1.
    factor : float
        Above 0.
    warmup : int
        Steps that rise to `value`.
    """

    every: int = field(kw_only=True)
    factor: float = field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(every=count, factor=positive)

    def _decayed(self, e: int) -> float:
        return self.value * self.factor ** (e // self.every)


@dataclass(frozen=True, repr=False)
class multi_step(_Warmed):
    """A factor after each of these numbers of steps: value * factor ** (how many of `after` are ≤ t - 1).

    Step t = after[0] is the last with `value`, the next one has value * factor; after the last of them the value
    stays. PyTorch: MultiStepLR(milestones=after, gamma=factor).

    Parameters
    ----------
    value : float
        Before the first factor.
    after : int or sequence of int
        Numbers of steps in increasing order, counted from the first step of all; above `warmup`.
    factor : float
        Above 0.
    warmup : int
        Steps that rise to `value`.
    """

    after: tuple[int, ...] = field(kw_only=True)
    factor: float = field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(after=increasing, factor=positive)
        if self.after[0] <= self.warmup:
            self._refuse(f"after={list(self.after)} begins within the {self.warmup} steps of the warm-up")

    def _decayed(self, e: int) -> float:
        return self.value * self.factor ** sum(number <= e + self.warmup for number in self.after)


@dataclass(frozen=True, repr=False)
class exponential(_Warmed):
    """A factor spread evenly over the steps: value * factor ** (e / every).

    It is `value` at t = 1, value * factor at t = every + 1, and goes on for ever. With a factor above 1 it grows, as
    for a test that looks for the largest usable rate. PyTorch: ExponentialLR(gamma=factor) for every=1; optax:
    exponential_decay(value, transition_steps=every, decay_rate=factor).

    Parameters
    ----------
    value : float
        At the first step after the warm-up.
    factor : float
        Above 0.
    every : int
        Steps over which it makes one factor; at least 1.
    warmup : int
        Steps that rise to `value`.
    """

    factor: float = field(kw_only=True)
    every: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(factor=positive, every=count)

    def _decayed(self, e: int) -> float:
        return float(self.value * self.factor ** (e / self.every))


@dataclass(frozen=True, repr=False)
class inverse_time(_Warmed):
    """A value that falls as the inverse of the time: value / (1 + rate * e) ** power.

    It is `value` at t = 1 and goes on falling for ever. With power=0.5 and rate=1/warmup it is the schedule of the
    Transformer, value * sqrt(warmup / (t - 1)) (Vaswani et al., "Attention Is All You Need", NeurIPS 2017). Keras:
    InverseTimeDecay(value, decay_steps=1, decay_rate=rate).

    Parameters
    ----------
    value : float
        At the first step after the warm-up.
    rate : float
        Per step; from 0.
    power : float
        Above 0.
    warmup : int
        Steps that rise to `value`.
    """

    rate: float = field(kw_only=True)
    power: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(rate=not_negative, power=positive)

    def _decayed(self, e: int) -> float:
        base = 1 + self.rate * e
        try:
            return float(self.value / base**self.power)
        except OverflowError:
            return float(self.value * base**-self.power)


@dataclass(frozen=True, repr=False)
class _Ending(_Warmed):
    """What goes from a value to a final one in a known number of steps."""

    steps: int = field(kw_only=True)
    end: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(steps=count, end=real)
        if self.warmup >= self.steps:
            self._refuse(f"warmup={self.warmup} leaves none of the {self.steps} steps; it must be smaller")

    def _decayed(self, e: int) -> float:
        length = self.steps - self.warmup
        if e >= length:
            return self.end
        left = self._left(e, length)
        return self.value if left == 1 else self.end + (self.value - self.end) * left

    @abstractmethod
    def _left(self, e: int, length: int) -> float:
        """The part of value - end that is left after e < length steps: exactly 1 for 0."""


@dataclass(frozen=True, repr=False)
class linear(_Ending):
    """A straight line: end + (value - end) * (1 - e / (steps - warmup)).

    It is `value` at t = 1, `end` at t = steps + 1, and stays there. It may rise: linear(0.0, end=0.1, steps=500).
    PyTorch: LinearLR(start_factor=1, end_factor=end / value, total_iters=steps); optax: linear_schedule(value, end,
    steps).

    Parameters
    ----------
    value : float
        At the first step after the warm-up.
    steps : int
        At least 1, the warm-up included.
    end : float
        From step steps + 1 on.
    warmup : int
        Steps that rise to `value`; below `steps`.
    """

    def _left(self, e: int, length: int) -> float:
        return (length - e) / length


@dataclass(frozen=True, repr=False)
class polynomial(_Ending):
    """A power of the time that is left: end + (value - end) * (1 - e / (steps - warmup)) ** power.

    It is `value` at t = 1, `end` at t = steps + 1, and stays there. PyTorch: PolynomialLR(total_iters=steps,
    power=power), whose end is 0; optax: polynomial_schedule(value, end, power, steps).

    Parameters
    ----------
    value : float
        At the first step after the warm-up.
    steps : int
        At least 1, the warm-up included.
    power : float
        Above 0; 1 is `linear`.
    end : float
        From step steps + 1 on.
    warmup : int
        Steps that rise to `value`; below `steps`.
    """

    power: float = field(default=2.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(power=positive)

    def _left(self, e: int, length: int) -> float:
        return float(((length - e) / length) ** self.power)


@dataclass(frozen=True, repr=False)
class cosine(_Ending):
    """Half a cosine: end + (value - end) * (1 + cos(pi * e / (steps - warmup))) / 2, with restarts if wanted.

    It is `value` at t = 1, half way at half of the steps, `end` at t = steps + 1, and stays there. With restarts the
    steps after the warm-up are divided into restarts + 1 periods, each `growth` times as long as the one before, and
    every period begins at `value` again and falls towards `end`. Where the periods are no whole numbers of steps, one
    begins between two steps, and none of them has quite `value`.

    Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017. PyTorch:
    CosineAnnealingLR(T_max=steps, eta_min=end), which rises again after the end; for periods of whole steps
    CosineAnnealingWarmRestarts(T_0=length of the first, T_mult=growth, eta_min=end), which has no end. optax:
    cosine_decay_schedule(value, steps, alpha=end / value).

    Parameters
    ----------
    value : float
        At the first step after the warm-up, and of each period.
    steps : int
        At least 1, the warm-up included.
    end : float
        From step steps + 1 on.
    restarts : int
        From 0; at most one for each step but the first.
    growth : int
        At least 1.
    warmup : int
        Steps that rise to `value`; below `steps`.

    Examples
    --------
    >>> lr = cosine(1.0, steps=12, restarts=1, growth=2)
    >>> [round(lr(t), 2) for t in (1, 3, 5, 9, 12, 13)]
    [1.0, 0.5, 1.0, 0.5, 0.04, 0.0]
    """

    restarts: int = field(default=0, kw_only=True)
    growth: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(restarts=whole, growth=count)
        if self.restarts >= self.steps - self.warmup:
            self._refuse(f"{self.restarts} restarts do not fit into {self.steps - self.warmup} steps")

    def _left(self, e: int, length: int) -> float:
        # In whole numbers, so that no rounding moves a restart: one part is the first period over the number of parts.
        growth, period = self.growth, length
        if growth == 1:
            e = e * (self.restarts + 1) % period
        else:
            e *= (growth ** (self.restarts + 1) - 1) // (growth - 1)
            # The periods before the k-th, from 0, are period * (growth**k - 1) / (growth - 1) together, at most e.
            most = e * (growth - 1) // period + 1
            k = int(math.log(most, growth))
            k += (growth ** (k + 1) <= most) - (growth**k > most)  # the logarithm is rounded
            e -= period * ((growth**k - 1) // (growth - 1))
            period *= growth**k
        return math.cos(math.pi / 2 * (e / period)) ** 2  # (1 + cos(2 x)) / 2, exact where it is small


@dataclass(frozen=True, repr=False)
class one_cycle(Schedule):
    """One rise and one longer fall, each half a cosine or straight.

    From value / initial_divisor at t = 1 up to `value` at t = rising * steps, then down to
    value / (initial_divisor * final_divisor) at t = steps, where it stays. `value` itself is met where rising * steps
    is whole. Each part is start + (end - start) * x, or with a cosine start + (end - start) * (1 - cos(pi * x)) / 2,
    for x from 0 to 1.

    Smith and Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates", 2018.
    PyTorch: OneCycleLR(max_lr=value, total_steps=steps, pct_start=rising, div_factor=initial_divisor,
    final_div_factor=final_divisor, anneal_strategy="cos" or "linear"), without its momentum.

    Parameters
    ----------
    value : float
        The largest.
    steps : int
        At least 2.
    rising : float
        Part of the steps that rises: from 0 to 1, and at least one step: rising * steps ≥ 1; below 1.
    initial_divisor, final_divisor : float
        Above 0.
    shape : str
        "cosine" or "linear".
    """

    value: float
    steps: int = field(kw_only=True)
    rising: float = field(default=0.3, kw_only=True)
    initial_divisor: float = field(default=25.0, kw_only=True)
    final_divisor: float = field(default=1e4, kw_only=True)
    shape: str = field(default="cosine", kw_only=True)

    def __post_init__(self) -> None:
        self._check(value=real, steps=count, rising=not_negative, initial_divisor=positive, final_divisor=positive)
        if self.steps < 2:
            self._refuse(f"steps is a whole number from 2, not {self.steps}")
        if not 1 <= self.rising * self.steps < self.steps:
            self._refuse(f"rising={self.rising!r} of {self.steps} steps must be at least one step, and not all")
        if self.shape not in ("cosine", "linear"):
            self._refuse(f"shape is 'cosine' or 'linear', not {self.shape!r}")

    def _after(self, taken: int) -> float:
        first = self.value / self.initial_divisor
        final = first / self.final_divisor
        top, last = self.rising * self.steps - 1, self.steps - 1
        if taken >= last:
            return final
        if taken <= top:
            # Where the rise is a single step, that step is the top.
            return self._between(first, self.value, taken / top if top > 0 else 1.0)
        return self._between(self.value, final, (taken - top) / (last - top))

    def _between(self, start: float, end: float, part: float) -> float:
        if part in (0, 1):
            return end if part else start
        left = 1 - part if self.shape == "linear" else math.cos(math.pi / 2 * part) ** 2
        return end + (start - end) * left


@dataclass(frozen=True, repr=False)
class chain(Schedule):
    """One schedule after another, made by `first.then(following, after=n)`.

    It is first(t) for t ≤ after, and following(t - after) from there on. PyTorch: SequentialLR(milestones=[after]);
    optax: join_schedules(boundaries=[after]).

    Parameters
    ----------
    first, following : Schedule
    after : int
        The steps that `first` has; at least 1.

    Examples
    --------
    >>> lr = linear(0.0, end=0.1, steps=100).then(constant(0.1), after=100).then(step(0.1, every=50), after=300)
    >>> lr(1), lr(101), lr(350), lr(351)
    (0.0, 0.1, 0.1, 0.010000000000000002)
    """

    first: Schedule
    following: Schedule
    after: int = field(kw_only=True)

    def __post_init__(self) -> None:
        self._check(first=is_schedule, following=is_schedule, after=count)

    def _after(self, taken: int) -> float:
        return self.first._after(taken) if taken < self.after else self.following._after(taken - self.after)

    def __repr__(self) -> str:
        return f"{self.first!r}.then({self.following!r}, after={self.after})"


KINDS: dict[str, type[Schedule]] = {
    kind.__name__: kind
    for kind in (constant, step, multi_step, exponential, inverse_time, linear, polynomial, cosine, one_cycle, chain)
}


def from_dict(data: Mapping[str, Any]) -> Schedule:
    """The schedule of which `to_dict` gave this.

    Raises
    ------
    TypeError, ValueError
        It is no such dict, names no schedule there is, or has arguments that do not do.
    """
    if not isinstance(data, Mapping) or "schedule" not in data:
        raise TypeError(f"a schedule as a dict has its name under 'schedule'; this is {data!r}")
    given = dict(data)
    name = given.pop("schedule")
    if not isinstance(name, str) or name not in KINDS:
        hint = nearest(str(name), KINDS) or f"; there are {', '.join(KINDS)}"
        raise UsageError(f"there is no schedule {name!r}{hint}")
    known = {own.name for own in fields(KINDS[name])}  # type: ignore[arg-type]
    for argument in given:
        if argument not in known:
            raise UsageError(f"schedule {name!r} has no argument {argument!r}{nearest(str(argument), known)}")
    for part in ("first", "following") if name == "chain" else ():
        if isinstance(given.get(part), Mapping):
            given[part] = from_dict(given[part])
    try:
        return KINDS[name](**given)
    except TypeError as problem:
        raise TypeError(f"schedule {name!r}: {problem}") from None


def plot(
    schedules: Callable[[int], float] | Mapping[str, Callable[[int], float]], steps: int, path: str | Path
) -> None:
    """Draw values over t = 1 to `steps` as a PNG.

    Parameters
    ----------
    schedules : callable or mapping
        A schedule, or any function of t; or several by the names that the legend shows.
    steps : int
        At least 1.
    path : str or Path
        Of the picture.

    Raises
    ------
    EnvironmentProblem
        matplotlib is not installed.
    OSError
        The picture cannot be written.
    """
    from .pictures import COLOURS, new_figure, save, tidy

    steps = count("steps", steps)
    named = schedules if isinstance(schedules, Mapping) else {"": schedules}
    if not named:
        raise ValueError("there is no schedule to draw")
    figure = new_figure(8, 4)
    axes = figure.add_subplot()
    every = sampled(steps)
    for index, (label, function) in enumerate(named.items()):
        values = [function(t) for t in every]
        axes.plot(every, values, color=COLOURS[index % len(COLOURS)], linewidth=2, label=label)
    if isinstance(schedules, Mapping):
        axes.legend(frameon=False)
    else:
        axes.set_title(repr(schedules) if isinstance(schedules, Schedule) else "", fontsize="medium", wrap=True)
    axes.set(xlabel="step t", ylabel="value")
    axes.margins(x=0.01)
    tidy(axes)
    save(figure, path)


def sampled(steps: int, most: int = 20_000) -> list[int]:
    """The numbers of steps from 1, at most so many of them, evenly, the first and the last included."""
    if steps <= most:
        return list(range(1, steps + 1))
    return [1 + k * (steps - 1) // (most - 1) for k in range(most)]


# ── how arguments are given ─────────────────────────────────────────────────────────────────────────────────────────


def by_name(kind: type[Schedule]) -> None:
    """Let a schedule say which arguments are given by name, where a dataclass would only count them."""
    made = kind.__init__
    own = fields(kind)  # type: ignore[arg-type]
    positional = [one.name for one in own if not one.kw_only]
    named = sorted((one.name for one in own if one.kw_only), key=lambda name: name == "warmup")

    @functools.wraps(made)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        more = len(args) - len(positional)
        if more > 0:
            shown = ", ".join([*positional, *(f"{name}=…" for name in named[:more])])
            name = kind.__name__
            raise TypeError(f"{name} takes {', '.join(positional)} by position, and all else by name: {name}({shown})")
        made(self, *args, **kwargs)

    kind.__init__ = init  # type: ignore[method-assign]


for _kind in KINDS.values():
    by_name(_kind)
