"""Schedules: values against formulas written anew, PyTorch's schedulers, arguments that do not do, dicts, pictures."""

from __future__ import annotations

import copy
import json
import math
import pickle
import sys
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from conftest import require_torch
from optforge.core.diagnostics import EnvironmentProblem
from optforge.train import schedules
from optforge.train.schedules import Schedule

Expected = dict[int, float]
V = 0.3  # no power of two, so that roundings would show


def half_cosine(x: Fraction | float) -> float:
    """From 1 at 0 to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * float(x)))


# What each schedule is worth at the steps where a mistake of one would show: the first, around every boundary, the last,
# and far beyond.
CASES: list[tuple[Schedule, Expected]] = [
    (schedules.constant(V), {1: V, 2: V, 10**9: V}),
    (schedules.constant(V, warmup=3), {1: V / 4, 2: V / 2, 3: 3 * V / 4, 4: V, 5: V, 10**12: V}),
    (
        schedules.step(V, every=10, factor=0.5),
        {1: V, 10: V, 11: V / 2, 20: V / 2, 21: V / 4, 101: V / 1024, 10**7: 0.0},
    ),
    (schedules.step(V, every=2, warmup=4), {1: V / 5, 4: 4 * V / 5, 5: V, 6: V, 7: V / 10, 8: V / 10, 9: V / 100}),
    (
        schedules.multi_step(V, after=[10, 30], factor=0.25),
        {1: V, 10: V, 11: V / 4, 30: V / 4, 31: V / 16, 10**9: V / 16},
    ),
    (schedules.multi_step(V, after=7), {7: V, 8: V / 10, 9: V / 10}),
    (schedules.multi_step(V, after=[10], warmup=8), {8: 8 * V / 9, 9: V, 10: V, 11: V / 10}),
    (schedules.exponential(V, factor=0.5), {1: V, 2: V / 2, 3: V / 4, 11: V / 1024}),
    (
        schedules.exponential(V, factor=0.5, every=4, warmup=2),
        {2: 2 * V / 3, 3: V, 5: V * math.sqrt(0.5), 7: V / 2, 11: V / 4},
    ),
    (schedules.exponential(1e-6, factor=10.0, every=100), {1: 1e-6, 101: 1e-5, 601: 1.0}),
    (schedules.inverse_time(V, rate=0.5), {1: V, 2: V / 1.5, 3: V / 2, 19: V / 10}),
    (
        schedules.inverse_time(V, rate=1 / 16, power=0.5, warmup=16),
        {16: 16 * V / 17, 17: V, 18: V * math.sqrt(16 / 17), 65: V / 2},
    ),
    (
        schedules.linear(V, steps=10, end=0.1),
        {1: V, 2: V - 0.02, 6: 0.2, 10: 0.12, 11: 0.1, 12: 0.1, 10**9: 0.1},
    ),
    (schedules.linear(0.0, steps=4, end=V), {1: 0.0, 2: V / 4, 4: 3 * V / 4, 5: V, 6: V}),
    (schedules.linear(V, steps=10, warmup=5), {5: 5 * V / 6, 6: V, 7: 4 * V / 5, 10: V / 5, 11: 0.0}),
    (
        schedules.polynomial(V, steps=10, power=3.0, end=0.1),
        {1: V, 2: 0.1 + 0.2 * 0.729, 10: 0.1 + 0.2 * 0.001, 11: 0.1, 12: 0.1},
    ),
    (schedules.polynomial(V, steps=12, power=0.5, warmup=2), {3: V, 8: V * math.sqrt(0.5), 13: 0.0}),
    (
        schedules.cosine(V, steps=10, end=0.1),
        {
            **{t: 0.1 + 0.2 * half_cosine(Fraction(t - 1, 10)) for t in range(1, 11)},
            11: 0.1,
            12: 0.1,
            21: 0.1,
        },
    ),
    (
        schedules.cosine(V, steps=25, warmup=5),
        {1: V / 6, 5: 5 * V / 6, 6: V, 16: V / 2, 25: V * half_cosine(Fraction(19, 20)), 26: 0.0, 27: 0.0},
    ),
    (
        schedules.cosine(V, steps=14, restarts=2, growth=2),
        {1: V, 2: V / 2, 3: V, 5: V / 2, 7: V, 11: V / 2, 14: V * half_cosine(Fraction(7, 8)), 15: 0.0, 99: 0.0},
    ),
    (
        schedules.cosine(V, steps=13, restarts=2, warmup=1, end=0.1),
        {1: V / 2, 2: V, 4: 0.2, 6: V, 8: 0.2, 10: V, 12: 0.2, 14: 0.1},
    ),
    (  # periods of 10/3 steps: the second begins between steps 4 and 5, as (t - 1) * 3 / 10 passes 1
        schedules.cosine(V, steps=10, restarts=2),
        {4: V * half_cosine(Fraction(9, 10)), 5: V * half_cosine(Fraction(2, 10)), 11: 0.0},
    ),
    (
        schedules.one_cycle(V, steps=100),
        {
            1: V / 25,
            2: V / 25 + (V - V / 25) * (1 - half_cosine(Fraction(1, 29))),
            30: V,
            31: V * half_cosine(Fraction(1, 70)) + V / 250000 * (1 - half_cosine(Fraction(1, 70))),
            65: V / 2 + V / 500000,
            100: V / 250000,
            101: V / 250000,
            10**9: V / 250000,
        },
    ),
    (
        schedules.one_cycle(V, steps=10, rising=0.25, initial_divisor=3, final_divisor=2, shape="linear"),
        {1: 0.1, 2: 0.1 + 0.2 / 1.5, 3: 0.3 - 0.25 * 0.5 / 7.5, 10: 0.05, 11: 0.05},
    ),
    (schedules.one_cycle(V, steps=4, rising=0.25), {1: V, 4: V / 250000}),
    (
        schedules.linear(0.0, steps=4, end=V).then(schedules.step(V, every=2), after=4),
        {1: 0.0, 4: 3 * V / 4, 5: V, 6: V, 7: V / 10},
    ),
    (
        schedules.constant(1.0).then(schedules.constant(2.0), after=5).then(schedules.cosine(V, steps=2), after=7),
        {1: 1.0, 5: 1.0, 6: 2.0, 7: 2.0, 8: V, 9: V / 2, 10: 0.0},
    ),
]
KINDS = {type(case).__name__ for case, _ in CASES}


def label(thing: Any) -> str | None:
    return repr(thing) if isinstance(thing, Schedule) else None


def test_every_kind_is_there() -> None:
    assert KINDS == set(schedules.KINDS)
    assert KINDS < set(schedules.__all__)
    for name in schedules.__all__:
        assert hasattr(schedules, name)


@pytest.mark.parametrize(("schedule", "expected"), CASES, ids=label)
def test_values(schedule: Schedule, expected: Expected) -> None:
    found = {t: schedule(t) for t in expected}
    for t, value in expected.items():
        assert type(found[t]) is float
        assert found[t] == pytest.approx(value, rel=4e-15, abs=0), (t, found[t], value)


@pytest.mark.parametrize(("schedule", "expected"), CASES, ids=label)
def test_the_ends_are_exact(schedule: Schedule, expected: Expected) -> None:
    """Not only nearly: what a user wrote is what is used."""
    if hasattr(schedule, "warmup"):
        assert schedule(schedule.warmup + 1) == schedule.value
    if hasattr(schedule, "end"):
        assert schedule(schedule.steps + 1) == schedule.end
        assert schedule(schedule.steps) != schedule.end
    assert schedule(np.int64(3)) == schedule(3)


@pytest.mark.parametrize(
    "schedule",
    [  # with these, value * 3 / 3 and end + (value - end) are other numbers than value
        schedules.constant(0.1, warmup=2),
        schedules.cosine(0.7, steps=10, warmup=5),
        schedules.linear(3e-4, steps=10, end=0.1),
        schedules.cosine(3e-4, steps=10, end=0.1, restarts=1),
        schedules.one_cycle(3e-4, steps=10, initial_divisor=3e-3),
    ],
    ids=label,
)
def test_roundings_do_not_move_a_value(schedule: Any) -> None:
    top = 3 if isinstance(schedule, schedules.one_cycle) else schedule.warmup + 1
    assert schedule(top) == schedule.value
    if isinstance(schedule, schedules.cosine) and schedule.restarts:
        assert schedule(6) == schedule.value


def test_a_divisor_beyond_the_range_of_a_double() -> None:
    assert schedules.inverse_time(1.0, rate=1, power=200)(100) == 0
    assert schedules.inverse_time(1e300, rate=1e300, power=1e9)(3) == 0
    assert schedules.inverse_time(1e300, rate=1, power=155)(100) == pytest.approx(1e-10)


@pytest.mark.parametrize("growth", [1, 2, 3, 10])
@pytest.mark.parametrize("restarts", [0, 1, 2, 5, 40])
def test_periods_are_as_if_counted_one_by_one(growth: int, restarts: int) -> None:
    for length in (41, 341, 511):
        schedule = schedules.cosine(1.0, steps=length, restarts=restarts, growth=growth)
        for e in range(length):
            parts, period = e * sum(growth**k for k in range(restarts + 1)), length
            while parts >= period:
                parts, period = parts - period, period * growth
            assert schedule(e + 1) == math.cos(math.pi / 2 * (parts / period)) ** 2


def test_many_restarts_cost_nothing() -> None:
    schedule = schedules.cosine(1.0, steps=10**9, restarts=10**9 - 2)
    assert 0 <= schedule(10**8) <= 1


@pytest.mark.parametrize("schedule", [case for case, _ in CASES if getattr(case, "warmup", 0)], ids=label)
def test_a_warm_up_moves_the_rest(schedule: Any) -> None:
    """Behind it all goes as without it, for fewer steps."""
    w = schedule.warmup
    data = schedule.to_dict() | {"warmup": 0}
    if "steps" in data:
        data["steps"] -= w
    if "after" in data:
        data["after"] = [own - w for own in data["after"]]
    without = schedules.from_dict(data)
    assert [schedule(t + w) for t in range(1, 60)] == [without(t) for t in range(1, 60)]
    rise = [schedule(t) for t in range(1, w + 2)]
    assert rise == sorted(rise) and rise[0] > 0 and len(set(rise)) == w + 1


def test_a_small_end_is_accurate() -> None:
    """1 + cos(x) loses its digits near pi; the last steps of a long run do not."""
    n = 10**7
    for short in (1, 2, 5):
        x = math.pi * short / n
        series = x**2 / 4 - x**4 / 48  # (1 - cos x) / 2
        assert schedules.cosine(1.0, steps=n)(n + 1 - short) == pytest.approx(series, rel=1e-9)
        exact = Fraction(short, n) ** 3
        assert schedules.polynomial(1.0, steps=n, power=3.0)(n + 1 - short) == pytest.approx(float(exact), rel=1e-14)


# ── PyTorch ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def torch_values(make: Callable[..., Any], steps: int) -> list[float]:
    """Learning rates of PyTorch's scheduler in `steps` steps, the scheduler stepped after each."""
    torch = require_torch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=V)
        scheduler = make(torch.optim.lr_scheduler, optimizer)
        values = []
        for t in range(steps):
            values.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if t < steps - 1:
                scheduler.step()
    return values


@pytest.mark.parametrize(
    ("schedule", "make", "steps"),
    [
        (schedules.constant(V), lambda s, o: s.ConstantLR(o, factor=1.0), 20),
        (schedules.step(V, every=7, factor=0.3), lambda s, o: s.StepLR(o, step_size=7, gamma=0.3), 60),
        (
            schedules.multi_step(V, after=[7, 20], factor=0.3),
            lambda s, o: s.MultiStepLR(o, milestones=[7, 20], gamma=0.3),
            40,
        ),
        (schedules.exponential(V, factor=0.9), lambda s, o: s.ExponentialLR(o, gamma=0.9), 60),
        (
            schedules.inverse_time(V, rate=0.2),
            lambda s, o: s.LambdaLR(o, lambda epoch: 1 / (1 + 0.2 * epoch)),
            60,
        ),
        (
            schedules.linear(V, steps=30, end=0.4 * V),
            lambda s, o: s.LinearLR(o, start_factor=1.0, end_factor=0.4, total_iters=30),
            40,
        ),
        (
            schedules.polynomial(V, steps=30, power=1.7),
            lambda s, o: s.PolynomialLR(o, total_iters=30, power=1.7),
            40,
        ),
        (schedules.cosine(V, steps=30, end=0.01), lambda s, o: s.CosineAnnealingLR(o, T_max=30, eta_min=0.01), 31),
        (
            schedules.cosine(V, steps=35, restarts=2, growth=2, end=0.01),
            lambda s, o: s.CosineAnnealingWarmRestarts(o, T_0=5, T_mult=2, eta_min=0.01),
            35,
        ),
        (
            schedules.cosine(V, steps=40, restarts=3),
            lambda s, o: s.CosineAnnealingWarmRestarts(o, T_0=10),
            40,
        ),
        (
            schedules.one_cycle(V, steps=37, rising=0.4, initial_divisor=20, final_divisor=100),
            lambda s, o: s.OneCycleLR(
                o, max_lr=V, total_steps=37, pct_start=0.4, div_factor=20, final_div_factor=100, cycle_momentum=False
            ),
            37,
        ),
        (
            schedules.one_cycle(V, steps=37, shape="linear"),
            lambda s, o: s.OneCycleLR(o, max_lr=V, total_steps=37, anneal_strategy="linear", cycle_momentum=False),
            37,
        ),
        (
            schedules.cosine(V, steps=40, warmup=9),
            lambda s, o: s.SequentialLR(
                o,
                [s.LinearLR(o, start_factor=1 / 10, total_iters=9), s.CosineAnnealingLR(o, T_max=31)],
                milestones=[9],
            ),
            41,
        ),
        (
            schedules.constant(V).then(schedules.exponential(V, factor=0.8), after=10),
            lambda s, o: s.SequentialLR(
                o, [s.ConstantLR(o, factor=1.0), s.ExponentialLR(o, gamma=0.8)], milestones=[10]
            ),
            25,
        ),
    ],
    ids=label,
)
def test_pytorch_has_the_same_values(schedule: Schedule, make: Callable[..., Any], steps: int) -> None:
    # Most of PyTorch's go from value to value, and gather roundings on the way, so these are not the same bits.
    expected = torch_values(make, steps)
    assert [schedule(t) for t in range(1, steps + 1)] == pytest.approx(expected, rel=1e-12, abs=V * 1e-14)


# ── arguments ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda s: s.constant("fast"), TypeError, "constant: value is a number, not 'fast'"),
        (lambda s: s.constant(True), TypeError, "constant: value is a number, not True"),
        (lambda s: s.constant(math.nan), ValueError, "constant: value is a finite number, not nan"),
        (lambda s: s.constant(10**400), ValueError, "constant: value is a finite number, not 1000"),
        (lambda s: s.constant(1.0, warmup=-1), ValueError, "constant: warmup is a whole number from 0, not -1"),
        (lambda s: s.constant(1.0, warmup=2.5), TypeError, "constant: warmup is a whole number, not 2.5"),
        (lambda s: s.constant(1.0, warmup=True), TypeError, "constant: warmup is a whole number, not True"),
        (lambda s: s.step(1.0, every=0), ValueError, "step: every is a whole number from 1, not 0"),
        (lambda s: s.step(1.0, every=5, factor=0), ValueError, "step: factor is a number above 0, not 0"),
        (lambda s: s.multi_step(1.0, after=[]), ValueError, "in increasing order, not []"),
        (lambda s: s.multi_step(1.0, after=[3, 3]), ValueError, "in increasing order, not [3, 3]"),
        (lambda s: s.multi_step(1.0, after=[0, 3]), ValueError, "multi_step: after is a whole number from 1, not 0"),
        (lambda s: s.multi_step(1.0, after="3"), TypeError, "multi_step: after is a whole number, not '3'"),
        (lambda s: s.multi_step(1.0, after=[4, 9], warmup=4), ValueError, "begins within the 4 steps of the warm-up"),
        (lambda s: s.exponential(1.0, factor=-0.5), ValueError, "exponential: factor is a number above 0, not -0.5"),
        (lambda s: s.exponential(1.0, factor=0.5, every=0), ValueError, "every is a whole number from 1"),
        (lambda s: s.inverse_time(1.0, rate=-1), ValueError, "inverse_time: rate is a number from 0, not -1"),
        (lambda s: s.inverse_time(1.0, rate=1, power=0), ValueError, "inverse_time: power is a number above 0"),
        (lambda s: s.linear(1.0, steps=0), ValueError, "linear: steps is a whole number from 1, not 0"),
        (lambda s: s.linear(1.0, steps=5, end=math.inf), ValueError, "linear: end is a finite number, not inf"),
        (lambda s: s.polynomial(1.0, steps=5, power=-1), ValueError, "polynomial: power is a number above 0, not -1"),
        (lambda s: s.cosine(1.0, steps=5, warmup=5), ValueError, "warmup=5 leaves none of the 5 steps"),
        (lambda s: s.cosine(1.0, steps=5, restarts=5), ValueError, "cosine: 5 restarts do not fit into 5 steps"),
        (lambda s: s.cosine(1.0, steps=5, restarts=1, growth=0), ValueError, "growth is a whole number from 1, not 0"),
        (lambda s: s.one_cycle(1.0, steps=1), ValueError, "one_cycle: steps is a whole number from 2, not 1"),
        (lambda s: s.one_cycle(1.0, steps=10, rising=0.05), ValueError, "must be at least one step, and not all"),
        (lambda s: s.one_cycle(1.0, steps=10, rising=1), ValueError, "must be at least one step, and not all"),
        (lambda s: s.one_cycle(1.0, steps=10, shape="round"), ValueError, "shape is 'cosine' or 'linear', not 'round'"),
        (lambda s: s.constant(1.0).then(0.5, after=3), TypeError, "chain: following is a schedule, not 0.5"),
        (lambda s: s.constant(1.0).then(s.constant(2.0), after=0), ValueError, "after is a whole number from 1, not 0"),
        (lambda s: s.constant(1.0)(0), ValueError, "steps are counted from 1, so t cannot be 0"),
        (lambda s: s.constant(1.0)(1.5), TypeError, "t is the number of a step, not 1.5"),
        (lambda s: s.exponential(1.0, factor=2.0)(5000), OverflowError, "beyond the range of a double at t = 5000"),
        (lambda s: s.from_dict({"value": 1.0}), TypeError, "has its name under 'schedule'"),
        (lambda s: s.from_dict([]), TypeError, "has its name under 'schedule'"),
        (lambda s: s.from_dict({"schedule": "cosin"}), ValueError, "no schedule 'cosin'; did you mean 'cosine'?"),
        (lambda s: s.from_dict({"schedule": "Schedule"}), ValueError, "there is no schedule 'Schedule'"),
        (
            lambda s: s.from_dict({"schedule": "step", "value": 1.0, "evry": 3}),
            ValueError,
            "schedule 'step' has no argument 'evry'; did you mean 'every'?",
        ),
        (lambda s: s.from_dict({"schedule": "step", "value": 1.0}), TypeError, "schedule 'step': "),
        (
            lambda s: s.from_dict({"schedule": "chain", "first": {"schedule": "x"}, "following": None, "after": 1}),
            ValueError,
            "there is no schedule 'x'",
        ),
    ],
)
def test_what_is_refused(make: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make(schedules)
    assert message in str(caught.value)


# ── as values ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("schedule", "expected"), CASES, ids=label)
def test_through_json_repr_and_copies(schedule: Schedule, expected: Expected) -> None:
    again = schedules.from_dict(json.loads(json.dumps(schedule.to_dict(), allow_nan=False)))
    written = eval(repr(schedule), {name: getattr(schedules, name) for name in schedules.KINDS})
    for other in (again, written, copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert other == schedule and hash(other) == hash(schedule) and repr(other) == repr(schedule)
        assert [other(t) for t in expected] == [schedule(t) for t in expected]
    others = [case for case, _ in CASES if case is not schedule]
    assert schedule not in others


def test_repr_shows_what_was_asked_for() -> None:
    assert repr(schedules.cosine(3e-4, steps=10_000, warmup=500)) == "cosine(0.0003, steps=10000, warmup=500)"
    assert repr(schedules.multi_step(1, after=[3, 5])) == "multi_step(1.0, after=(3, 5))"
    assert (
        repr(schedules.constant(1).then(schedules.constant(2), after=3)) == "constant(1.0).then(constant(2.0), after=3)"
    )


def test_frozen() -> None:
    schedule: Any = schedules.constant(0.1)
    with pytest.raises(AttributeError):
        schedule.value = 0.2
    assert of.schedules.constant is schedules.constant


# ── pictures ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one = tmp_path / "one.png"
    schedules.cosine(3e-4, steps=1000, warmup=50).plot(1000, one)
    assert one.read_bytes().startswith(b"\x89PNG")
    several = tmp_path / "several.png"
    schedules.plot({"a": schedules.constant(1.0), "b": lambda t: 1 / t}, 10**9, several)
    assert several.stat().st_size > 1000
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["one.png", "several.png"]
    with pytest.raises(ValueError, match="steps is a whole number from 1, not 0"):
        schedules.plot(schedules.constant(1.0), 0, one)
    with pytest.raises(ValueError, match="there is no schedule to draw"):
        schedules.plot({}, 10, one)
    with pytest.raises(FileNotFoundError):
        schedules.plot(schedules.constant(1.0), 5, tmp_path / "missing" / "x.png")


def test_the_steps_that_are_drawn() -> None:
    assert schedules.sampled(5) == [1, 2, 3, 4, 5]
    many = schedules.sampled(10**9)
    assert len(many) == 20_000 and many[0] == 1 and many[-1] == 10**9 and many == sorted(set(many))


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EnvironmentProblem, match="drawing needs matplotlib: pip install matplotlib"):
        schedules.constant(1.0).plot(10, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
