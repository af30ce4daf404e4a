"""Hyperparameters that are functions of t: their values at each step, and what happens when they fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from optforge import Optimizer
from optimizing import SETTINGS, TARGETS, bits, brittle, everything, nadam, small


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def falling(t: int) -> float:
    return 0.3 / t


def rising(t: int) -> float:
    return 1 - 0.5**t


def single(target: str = "numpy", **settings: Any) -> Optimizer:
    return Optimizer([np.ones(3)], nadam, target=target, **settings)


G = [np.ones(3)]


@pytest.mark.parametrize("how", [{}, {"stats": True, "grad_scale": 3.0}], ids=["plain", "told"])
def test_a_schedule_is_like_setting_the_value_before_each_step(target: str, how: dict[str, Any]) -> None:
    """Tensors that start late start with the values of their step."""
    opt = Optimizer(small(1), nadam, target=target, **{**SETTINGS, "lr": falling, "floor": falling})
    by_hand = Optimizer(small(1), nadam, target=target, **SETTINGS)
    for t in range(1, 6):
        grads: list[Any] = small(t)
        if t == 1:
            grads[0] = grads[4] = None
        by_hand.lr = by_hand.floor = falling(t)
        opt.step(grads, **how)
        by_hand.step(grads, **how)
        assert bits(opt.params) == bits(by_hand.params)
        assert t == 1 or bits(opt.state) == bits(by_hand.state)  # what late tensors have before they start is free
        assert opt.lr == opt.floor == falling(t)
        assert opt.psi == SETTINGS["psi"]


def test_groups_have_schedules_of_their_own(target: str) -> None:
    params = [np.ones(3) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:2], "lr": rising}, {"params": params[2:], "lr": 0.5}]
    opt = Optimizer(groups, nadam, target=target, lr=falling)
    settings: list[Any] = [falling, rising, 0.5]
    alone = [Optimizer([np.ones(3)], nadam, target=target, lr=lr) for lr in settings]
    for t in (1, 2, 3):
        opt.step([G, G, G])
        for one in alone:
            one.step(G)
        assert [group["lr"] for group in opt.groups] == [falling(t), rising(t), 0.5]
    assert bits(params) == bits([one.params[0] for one in alone])


def test_a_schedule_is_given_ints_once_per_step_and_group() -> None:
    seen: list[Any] = []

    def schedule(t: int) -> float:
        seen.append(t)
        return 0.1

    groups = [{"params": [np.ones(3)]}, {"params": [np.ones(3)]}]
    opt = Optimizer(groups, nadam, target="numpy", lr=schedule)
    seen.clear()
    for _ in range(3):
        opt.step([G, G])
        assert opt.lr == opt.groups[0]["lr"] == 0.1
    assert seen == [1, 1, 2, 2, 3, 3]
    assert {type(t) for t in seen} == {int}


def test_reading_gives_the_value_in_use(target: str) -> None:
    opt = single(target, lr=falling)
    assert opt.lr == falling(1)
    for t in (1, 2, 3):
        opt.step(G)
        assert opt.lr == falling(t)
    opt.t = 9
    assert opt.lr == falling(9)
    opt.step(G)
    assert opt.lr == falling(10)
    opt.t = 0
    assert opt.lr == falling(1)


def test_schedules_are_assigned_and_ended(target: str) -> None:
    opt, by_hand = single(target, lr=0.5), single(target, lr=0.5)
    for schedule, value in [(None, 0.5), (rising, rising(2)), (None, rising(3)), (0.25, 0.25), (None, 0.25)]:
        if schedule is not None:
            opt.lr = schedule
        by_hand.lr = value
        opt.step(G)
        by_hand.step(G)
        assert opt.lr == value
    assert everything(opt) == everything(by_hand)
    opt.lr = rising
    assert opt.lr == rising(5)
    opt.lr = 0.75
    opt.step(G)
    assert opt.lr == 0.75


def test_numbers_of_other_kinds_are_values() -> None:
    opt = single(lr=lambda t: np.float32(0.5) if t == 1 else np.array(3))
    assert type(opt.lr) is float
    opt.step(G)
    assert opt.lr == 0.5
    opt.step(G)
    assert opt.lr == 3.0


def test_a_skipped_step_asks_for_the_same_step_again(target: str) -> None:
    seen: list[int] = []

    def schedule(t: int) -> float:
        seen.append(t)
        return falling(t)

    opt = single(target, lr=schedule, skip_nonfinite=True)
    opt.step(G)
    before = everything_quietly(opt)
    seen.clear()
    told = opt.step([np.array([1.0, np.nan, 1.0])], stats=True)
    assert told is not None and told.skipped
    assert everything_quietly(opt) == before
    assert opt.lr == falling(1)
    opt.step(G)
    assert seen == [2, 2]
    assert opt.lr == falling(2)


def everything_quietly(opt: Optimizer) -> Any:
    """All that a step may change, without a state dict, which would warn of a function."""
    return bits({"params": opt.params, "state": opt.state, "t": opt.t, "groups": [dict(g) for g in opt.groups]})


def at_third(result: Callable[[], Any]) -> Callable[[int], Any]:
    """A schedule that does something else at t=3."""
    return lambda t: result() if t == 3 else 0.25


def stop() -> Any:
    raise RuntimeError("the table ends here")


FAILING: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("lr", stop, ValueError, "^the schedule of hyperparameter 'lr' raised RuntimeError at t=3: the table ends here$"),
    ("lr", lambda: 1 / 0, ValueError, "^the schedule of hyperparameter 'lr' raised ZeroDivisionError at t=3: "),
    ("lr", lambda: math.nan, ValueError, "^the schedule of hyperparameter 'lr' gives nan at t=3, which is no number$"),
    ("lr", lambda: None, TypeError, "^the schedule of hyperparameter 'lr' gives None at t=3, which is no number$"),
    ("lr", lambda: "x", TypeError, "^the schedule of hyperparameter 'lr' gives 'x' at t=3, which is no number$"),
    ("beta", lambda: 1.5, ValueError, r"^at t=3 rule 'nadam' needs 0 <= beta < 1; given are beta=1\.5$"),
    ("floor", lambda: 0, ValueError, r"^at t=3 rule 'nadam' needs floor > 0; given are floor=0\.0$"),
]


@pytest.mark.parametrize(("name", "result", "error", "message"), FAILING)
def test_a_schedule_that_fails_changes_nothing(
    name: str, result: Callable[[], Any], error: type[Exception], message: str, target: str
) -> None:
    opt = single(target, **{name: at_third(result)})
    opt.step(G)
    opt.step(G)
    before = everything_quietly(opt)
    for _ in range(2):
        with pytest.raises(error, match=message) as refusal:
            opt.step(G)
        assert isinstance(refusal.value, error)
        assert everything_quietly(opt) == before
    with pytest.raises(error, match=message):
        opt.t = 3
    assert everything_quietly(opt) == before
    setattr(opt, name, 0.5)
    opt.step(G)
    assert opt.t == 3


def test_errors_name_the_group() -> None:
    groups = [{"params": [np.ones(3)]}, {"params": [np.ones(3)], "beta": at_third(lambda: 2.0)}]
    opt = Optimizer(groups, nadam, target="numpy")
    opt.t = 2
    with pytest.raises(ValueError, match=r"^groups\[1\]: at t=3 rule 'nadam' needs 0 <= beta < 1; given are beta=2\.0"):
        opt.step([G, G])
    opt.groups[1]["beta"] = 0.5
    opt.groups[0]["lr"] = at_third(stop)
    with pytest.raises(
        ValueError, match=r"^groups\[0\]: the schedule of hyperparameter 'lr' raised RuntimeError at t=3"
    ):
        opt.step([G, G])


def test_a_scalar_without_a_value_is_undone(target: str) -> None:
    opt = Optimizer([np.ones(3)], brittle, target=target, divisor=lambda t: 2.0 - t, nothing=2.0)
    opt.step(G)
    before = everything_quietly(opt)
    with pytest.raises(ArithmeticError, match=r"the scalar 'one' has no value at t=2: division by zero .*divisor=0\.0"):
        opt.step(G)
    assert everything_quietly(opt) == before
    assert opt.divisor == 1.0


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda t: None, TypeError, "^the schedule of hyperparameter 'beta' gives None at t=1, which is no number$"),
    (lambda t: t, ValueError, r"^at t=1 rule 'nadam' needs 0 <= beta < 1; given are beta=1\.0$"),
    (lambda: 0.5, ValueError, "^the schedule of hyperparameter 'beta' raised TypeError at t=1: "),
]


@pytest.mark.parametrize(("schedule", "error", "message"), REFUSED)
def test_a_schedule_that_fails_at_once(schedule: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        single(beta=schedule)
    opt = single()
    before = everything(opt)
    with pytest.raises(error, match=message):
        opt.beta = schedule
    assert everything(opt) == before


def test_other_names_take_no_schedule() -> None:
    with pytest.raises(ValueError, match="option 'nesterov'"):
        single(nesterov=lambda t: True)
    with pytest.raises(TypeError, match="no hyperparameter 'lrr'; did you mean 'lr'"):
        single(lrr=lambda t: 0.1)
    with pytest.raises(TypeError, match="hyperparameter 'lr' is a number, not <function"):
        nadam.kernel(lr=lambda t: 0.1)


# ── state dicts ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_function_keeps_its_value_in_a_state_dict_and_its_place_where_it_is_loaded() -> None:
    whole, resumed = (Optimizer(small(1), nadam, target="numpy", lr=falling) for _ in range(2))
    for seed in (2, 3):
        whole.step(small(seed))
    with pytest.warns(
        UserWarning, match=r"^the schedule of hyperparameter 'lr' is <function falling .* cannot be saved"
    ):
        saved = whole.state_dict()
    assert saved["hyperparameters"]["lr"] == falling(2)
    assert saved["schedules"] == [{"lr": None}]
    for own, other in zip(resumed.params, whole.params, strict=True):
        own[...] = other
    resumed.load_state_dict(saved)
    assert resumed.lr == falling(2)
    for opt in (whole, resumed):
        opt.step(small(4))
    assert everything_quietly(whole) == everything_quietly(resumed)
    other = Optimizer(small(1), nadam, target="numpy")
    with pytest.warns(
        UserWarning, match=r"^hyperparameter 'lr' was a function that could not be saved; it is 0\.15 from"
    ):
        other.load_state_dict(saved)
    other.step(small(4))
    assert other.lr == falling(2)


def test_a_number_in_a_state_dict_ends_a_schedule() -> None:
    opt = single(lr=falling)
    opt.load_state_dict(single(lr=0.125).state_dict())
    opt.step(G)
    assert opt.lr == 0.125
    assert "schedules" not in opt.state_dict()


@pytest.mark.parametrize("schedules", [3, [], [3], [{"lrr": None}], [{}, {}]])
def test_schedules_that_do_not_fit_are_refused(schedules: Any) -> None:
    opt = single()
    before = everything(opt)
    with pytest.raises(ValueError, match=r"schedules|groups"):
        opt.load_state_dict({**opt.state_dict(), "schedules": schedules})
    assert everything(opt) == before
