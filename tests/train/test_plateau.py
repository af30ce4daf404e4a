"""ReduceLROnPlateau: its counting against PyTorch itself and against judges written from the documentation alone."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import optforge as of
from conftest import require_torch
from optforge import ReduceLROnPlateau
from plateaus import SETTINGS, One, Rates, both_bounds, metrics

# ── judges ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class TorchJudge:
    """What PyTorch's documentation says, told from the history: nothing is counted down, all is looked up.

    "patience: the number of allowed epochs with no improvement after which the learning rate will be reduced … cooldown:
    number of epochs to wait before resuming normal operation after lr has been reduced … eps: minimal decay applied".
    """

    rates: list[float]
    mode: str = "min"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: str = "rel"
    cooldown: int = 0
    min_lr: Sequence[float] = (0.0,)
    eps: float = 1e-8
    history: list[bool] = field(default_factory=list)  # of each epoch: whether it was allowed (good, or in a cooldown)
    best: float | None = None
    waiting_until: int = 0

    def better(self, metric: float) -> bool:
        if self.best is None:
            return math.isfinite(metric)
        if self.mode == "min":
            return metric < (
                self.best * (1 - self.threshold) if self.threshold_mode == "rel" else self.best - self.threshold
            )
        return metric > (
            self.best * (1 + self.threshold) if self.threshold_mode == "rel" else self.best + self.threshold
        )

    def step(self, metric: float) -> None:
        good = self.better(metric)
        self.history.append(good or len(self.history) < self.waiting_until)
        if good:
            self.best = metric
        bad = len(list(itertools.takewhile(lambda allowed: not allowed, reversed(self.history))))
        if bad > self.patience:
            for k, least in enumerate(self.min_lr):
                new = max(self.rates[k] * self.factor, least)
                self.rates[k] = new if self.rates[k] - new > self.eps else self.rates[k]
            self.waiting_until = len(self.history) + self.cooldown
            self.history[-1] = True  # a reduction begins the count anew


@dataclass
class KerasJudge:
    """Keras' callback, in the words of its documentation and with the names of its attributes."""

    rate: float
    mode: str = "min"
    factor: float = 0.1
    patience: int = 10
    min_delta: float = 1e-4
    cooldown: int = 0
    min_lr: float = 0.0
    wait: int = 0
    cooldown_counter: int = 0

    def __post_init__(self) -> None:
        sign = 1 if self.mode == "max" else -1
        self.monitor_op = lambda a, b: sign * a > sign * (b + sign * self.min_delta)
        self.best = -sign * math.inf

    def on_epoch_end(self, current: float) -> None:
        if self.cooldown_counter:
            self.cooldown_counter -= 1
            self.wait = 0
        if self.monitor_op(current, self.best):
            self.best, self.wait = current, 0
        elif not self.cooldown_counter:
            self.wait += 1
            if self.wait >= self.patience and self.rate > self.min_lr:
                self.rate = max(self.rate * self.factor, self.min_lr)
                self.cooldown_counter, self.wait = self.cooldown, 0


@pytest.mark.parametrize("seed", range(len(SETTINGS)))
def test_pytorch_has_the_same_rates(seed: int) -> None:
    torch = require_torch()
    settings = SETTINGS[seed]
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.03)]
    theirs = torch.optim.SGD(groups, lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, **settings)
    ours = Rates(0.1, 0.03)
    plateau = ReduceLROnPlateau(ours, **settings)
    for metric in metrics(seed, 400, settings["mode"]):
        before = ours.rates
        scheduler.step(metric)
        reduced = plateau.step(metric)
        assert ours.rates == [group["lr"] for group in theirs.param_groups]
        assert reduced == (ours.rates != before)
        assert (plateau.best, plateau.num_bad_steps) == (scheduler.best, scheduler.num_bad_epochs)
        assert plateau.cooldown_left == scheduler.cooldown_counter
        if min(ours.rates) < 1e-6:  # begin anew, or nothing would happen any more
            for own, group in zip(ours.groups, theirs.param_groups, strict=True):
                own["lr"] = group["lr"] = 0.07
    if seed == 0:
        assert vars(theirs)["param_groups"][0]["lr"] < 0.1


def test_the_defaults_are_pytorchs() -> None:
    torch = require_torch()
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs)
    plateau = ReduceLROnPlateau(One(0.1))
    for name in ("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lrs", "eps"):
        assert getattr(plateau, name) == getattr(scheduler, name), name


@pytest.mark.parametrize("seed", range(len(SETTINGS)))
def test_the_documentation_of_pytorch_gives_the_same_rates(seed: int) -> None:
    settings = SETTINGS[seed]
    judge = TorchJudge([0.1, 0.03], **settings | {"min_lr": both_bounds(settings)})
    ours = Rates(0.1, 0.03)
    plateau = ReduceLROnPlateau(ours, **settings)
    reductions = 0
    for metric in metrics(seed, 400, settings["mode"]):
        judge.step(metric)
        reductions += plateau.step(metric)
        assert ours.rates == judge.rates
        if min(ours.rates) < 1e-6:
            ours.groups[0]["lr"] = ours.groups[1]["lr"] = 0.07
            judge.rates[:] = 0.07, 0.07
    assert reductions or settings["eps"] == 1e-3 or settings["min_lr"] == [1e-5, 0.05] or settings["patience"] > 4


KERAS: dict[str, Any] = {"counting": "keras", "threshold_mode": "abs", "eps": 0}  # its own class


@pytest.mark.parametrize("seed", range(len(SETTINGS)))
def test_keras_counting(seed: int) -> None:
    settings = SETTINGS[seed]
    least = both_bounds(settings)[1]
    shared = {name: settings[name] for name in ("mode", "factor", "patience", "cooldown")}
    judge = KerasJudge(0.1, **shared, min_delta=settings["threshold"], min_lr=least)
    ours = One(0.1)
    plateau = ReduceLROnPlateau(ours, **shared, threshold=settings["threshold"], min_lr=least, **KERAS)
    reductions = 0
    for metric in metrics(seed, 400, settings["mode"]):
        judge.on_epoch_end(metric)
        reductions += plateau.step(metric)
        assert ours.lr == judge.rate
        assert (plateau.best, plateau.cooldown_left) == (judge.best, judge.cooldown_counter)
        if ours.lr < 1e-6:
            ours.lr = judge.rate = 0.07
    assert reductions


# ── what a reader would count by hand ───────────────────────────────────────────────────────────────────────────────


def reductions(counts: Sequence[float], **settings: Any) -> list[int]:
    """The steps, from 1, that reduced the rate."""
    plateau = ReduceLROnPlateau(One(1.0), factor=0.5, **settings)
    return [k for k, metric in enumerate(counts, 1) if plateau.step(metric)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"patience": 0}, [2, 3, 4, 5, 6, 7, 8, 9]),  # at the first step without improvement
        ({"patience": 1}, [3, 5, 7, 9]),
        ({"patience": 3}, [5, 9]),
        ({"patience": 0, "cooldown": 2}, [2, 5, 8]),
        ({"patience": 1, "cooldown": 2}, [3, 7]),
        ({"patience": 0, "counting": "keras"}, [2, 3, 4, 5, 6, 7, 8, 9]),
        ({"patience": 1, "counting": "keras"}, [2, 3, 4, 5, 6, 7, 8, 9]),
        ({"patience": 3, "counting": "keras"}, [4, 7]),
        ({"patience": 1, "cooldown": 1, "counting": "keras"}, [2, 3, 4, 5, 6, 7, 8, 9]),
        ({"patience": 1, "cooldown": 2, "counting": "keras"}, [2, 4, 6, 8]),
        ({"patience": 2, "cooldown": 3, "counting": "keras"}, [3, 7]),
    ],
)
def test_a_metric_that_stands_still(settings: dict[str, Any], expected: list[int]) -> None:
    assert reductions([1.0] * 9, **settings) == expected


def test_thresholds_and_modes() -> None:
    assert reductions([1.0, 0.91, 0.9, 0.89], patience=0, threshold=0.1, threshold_mode="rel") == [2, 3]
    assert reductions([4.0, 3.9, 3.7], patience=0, threshold=0.25, threshold_mode="abs") == [2]
    assert reductions([4.0, 4.1, 4.3], patience=0, threshold=0.25, threshold_mode="abs", mode="max") == [2]
    assert reductions([4.0, 4.0, 3.0], patience=0, threshold=0.0) == [2]
    assert reductions([4.0, 3.7, 3.76], patience=1, threshold=0.25, **KERAS) == [3]
    assert reductions([-1.0, -1.0], patience=0) == []  # PyTorch's formula below 0, as the docstring says
    assert reductions([-1.0, -1.0], patience=0, threshold_mode="abs") == [2]
    assert reductions([-1.0, -1.0], patience=0, **KERAS) == [2]


def test_an_infinite_loss_is_a_bad_step() -> None:
    assert reductions([math.inf, math.inf, 3.0, math.inf], patience=0) == [1, 2, 4]
    assert reductions([-math.inf, 3.0, -math.inf], patience=0, mode="max", counting="keras") == [1, 3]
    assert reductions([10**400, 5, 5], patience=0) == [1, 3]


def test_the_smallest_rate_and_the_smallest_change() -> None:
    ours = Rates(0.5, 0.4)
    plateau = ReduceLROnPlateau(ours, factor=0.5, patience=0, min_lr=[0.2, 0.0], eps=0.06)
    seen = []
    for _ in range(6):
        plateau.step(1.0)
        seen.append(ours.rates)
    assert seen == [[0.5, 0.4], [0.25, 0.2], [0.25, 0.1], [0.25, 0.1], [0.25, 0.1], [0.25, 0.1]]


# ── with an Optimizer ───────────────────────────────────────────────────────────────────────────────────────────────


def test_an_optimizer() -> None:
    p = np.ones(3, np.float32)
    opt = of.Optimizer([p], "sgd", lr=0.5, target="numpy")
    plateau = of.ReduceLROnPlateau(opt, factor=0.5, patience=1)
    rates = []
    for loss in (np.float32(3), np.array(2.0), 2, 2.0, 1.0):
        opt.step([np.ones(3, np.float32)])
        plateau.step(loss)
        rates.append(opt.lr)
    assert rates == [0.5, 0.5, 0.5, 0.25, 0.25]
    assert p[0] == 1 - 0.5 * 4 - 0.25
    assert repr(plateau) == (
        "<ReduceLROnPlateau mode=min factor=0.5 patience=1 counting=torch best=1.0 num_bad_steps=0>"
    )


def test_a_rate_that_the_rule_refuses_changes_nothing() -> None:
    class Picky(dict[str, Any]):
        def __setitem__(self, name: str, value: Any) -> None:
            if value < 0.01:
                raise ValueError("too small for me")
            super().__setitem__(name, value)

    ours = Rates(0.5, 0.05)
    ours.groups[1] = Picky(lr=0.05)
    plateau = ReduceLROnPlateau(ours, patience=0)
    plateau.step(1.0)
    before = plateau.state_dict()
    with pytest.raises(ValueError, match="too small for me"):
        plateau.step(2.0)
    assert ours.rates == [0.5, 0.05]
    assert plateau.state_dict() == before


# ── resuming ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("counting", ["torch", "keras"])
@pytest.mark.parametrize("cut", [0, 1, 37, 100])
def test_resuming_through_json(counting: str, cut: int) -> None:
    settings: dict[str, Any] = {"patience": 2, "cooldown": 3, "factor": 0.9, "counting": counting}
    every = list(metrics(5, 200, "min"))
    whole = One(0.1)
    straight = ReduceLROnPlateau(whole, **settings)
    expected = [(straight.step(metric), whole.lr) for metric in every]
    first = One(0.1)
    plateau = ReduceLROnPlateau(first, **settings)
    for metric in every[:cut]:
        plateau.step(metric)
    saved = json.loads(json.dumps(plateau.state_dict(), allow_nan=False))
    second = One(first.lr)
    plateau = ReduceLROnPlateau(second, **settings)
    plateau.load_state_dict(saved)
    assert [(plateau.step(metric), second.lr) for metric in every[cut:]] == expected[cut:]
    assert plateau.state_dict() == straight.state_dict()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "max"}, ValueError, "the state dict is of mode 'max', this is 'min'"),
        ({"best": math.nan}, ValueError, "best is a finite number, not nan"),
        ({"best": "low"}, TypeError, "best is a number, not 'low'"),
        ({"num_bad_steps": -1}, ValueError, "num_bad_steps is a whole number from 0, not -1"),
        ({"cooldown_left": 0.5}, TypeError, "cooldown_left is a whole number, not 0.5"),
    ],
)
def test_states_that_do_not_do(change: dict[str, Any], error: type[Exception], message: str) -> None:
    plateau = ReduceLROnPlateau(One(0.1))
    plateau.step(3.0)
    plateau.step(4.0)
    before = plateau.state_dict()
    assert before == {"mode": "min", "best": 3.0, "num_bad_steps": 1, "cooldown_left": 0}
    with pytest.raises(error) as caught:
        plateau.load_state_dict(before | {"best": 1.0} | change)
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="the state dict lacks 'best', 'cooldown_left'"):
        plateau.load_state_dict({"mode": "min", "num_bad_steps": 1})
    with pytest.raises(TypeError, match="a state dict is a dict"):
        plateau.load_state_dict([])  # type: ignore[arg-type]
    assert plateau.state_dict() == before


# ── mistakes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"mode": "low"}, ValueError, "mode is 'min' or 'max', not 'low'"),
        ({"mode": None}, ValueError, "mode is 'min' or 'max', not None"),
        ({"factor": 1}, ValueError, "factor is a number between 0 and 1, not 1"),
        ({"factor": 0.0}, ValueError, "factor is a number between 0 and 1, not 0.0"),
        ({"factor": "half"}, TypeError, "factor is a number, not 'half'"),
        ({"factor": math.nan}, ValueError, "factor is a finite number, not nan"),
        ({"patience": -1}, ValueError, "patience is a whole number from 0, not -1"),
        ({"patience": 2.0}, TypeError, "patience is a whole number, not 2.0"),
        ({"threshold": -1e-4}, ValueError, "threshold is a number from 0, not -0.0001"),
        ({"threshold": 1.0}, ValueError, "a relative threshold is below 1, not 1.0"),
        ({"threshold_mode": "relative"}, ValueError, "threshold_mode is 'rel' or 'abs', not 'relative'"),
        ({"cooldown": -3}, ValueError, "cooldown is a whole number from 0, not -3"),
        ({"min_lr": -0.1}, ValueError, "min_lr is a number from 0, not -0.1"),
        ({"min_lr": [0.1, 0.1]}, ValueError, "min_lr has 2 numbers, and the optimizer 1 group(s)"),
        ({"min_lr": [-1]}, ValueError, "min_lr[0] is a number from 0, not -1"),
        ({"eps": -1}, ValueError, "eps is a number from 0, not -1"),
        ({"counting": "Keras"}, ValueError, "counting is 'torch' or 'keras', not 'Keras'"),
    ],
)
def test_arguments_that_do_not_do(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        ReduceLROnPlateau(One(0.1), **settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        (None, TypeError, "the metric is a number, not None"),
        ("0.5", TypeError, "the metric is a number, not '0.5'"),
        ([1.0], TypeError, "the metric is a number, not [1.0]"),
        (1j, TypeError, "the metric is a number, not 1j"),
        (math.nan, ValueError, "the metric is NaN"),
        (np.float32("nan"), ValueError, "the metric is NaN"),
        (-math.inf, ValueError, "the metric is -inf, which nothing could improve"),
    ],
)
def test_metrics_that_do_not_do(metric: Any, error: type[Exception], message: str) -> None:
    ours = One(0.1)
    plateau = ReduceLROnPlateau(ours, patience=0)
    plateau.step(1.0)
    before = plateau.state_dict()
    with pytest.raises(error) as caught:
        plateau.step(metric)
    assert message in str(caught.value)
    assert (plateau.state_dict(), ours.lr) == (before, 0.1)


def test_a_schedule_is_refused() -> None:
    schedule = of.schedules.cosine(0.1, steps=10)
    with pytest.raises(TypeError, match=r"the learning rate is a schedule, cosine\(0.1, steps=10\)"):
        ReduceLROnPlateau(One(schedule))
    ours = Rates(0.1, 0.1)
    plateau = ReduceLROnPlateau(ours, patience=0)
    plateau.step(1.0)
    ours.groups[1]["lr"] = schedule
    with pytest.raises(TypeError, match="the learning rate of group 1 is a schedule"):
        plateau.step(1.0)
    assert ours.rates == [0.1, schedule]


def test_groups_and_schedules_of_an_optimizer() -> None:
    params = [{"params": [np.ones(3, np.float32)], "lr": 0.5}, {"params": [np.ones(2, np.float32)]}]
    opt = of.Optimizer(params, "sgd", lr=0.25, target="numpy")
    plateau = ReduceLROnPlateau(opt, factor=0.5, patience=0, min_lr=[0.0, 0.2])
    assert [plateau.step(1.0) for _ in range(3)] == [False, True, True]
    assert [group["lr"] for group in opt.groups] == [0.125, 0.2]
    opt.groups[1]["lr"] = of.schedules.constant(0.1)
    with pytest.raises(TypeError, match=r"the learning rate of group 1 is a schedule, constant\(0.1\)"):
        plateau.step(1.0)
    assert opt.groups[0]["lr"] == 0.125
    opt = of.Optimizer([np.ones(3)], "sgd", lr=of.schedules.constant(0.1), target="numpy")
    with pytest.raises(TypeError, match=r"the learning rate is a schedule, constant\(0.1\)"):
        ReduceLROnPlateau(opt)


def test_what_is_no_optimizer() -> None:
    with pytest.raises(TypeError, match="has no learning rate 'lr' to reduce"):
        ReduceLROnPlateau(object())
    ours = Rates(0.1)
    plateau = ReduceLROnPlateau(ours)
    ours.groups.append({"lr": 0.2})
    with pytest.raises(ValueError, match=r"the optimizer has 2 group\(s\) now, and had 1"):
        plateau.step(1.0)
