"""state_dict and load_state_dict: a resumed run has the bits of one that went on, and what does not fit is refused."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from optforge import Optimizer
from optimizing import SETTINGS, TARGETS, bits, brittle, everything, nadam, small

OPTIONS = {"nesterov": False, "average": "off"}
KEYS = ["a", "b", "c", "d", "e", 6]


def keyed(arrays: list[Any]) -> dict[Any, Any]:
    return dict(zip(KEYS, arrays, strict=True))


def gradients(seed: int) -> list[Any]:
    """The last tensor gets its first gradient at seed 6, the fourth one pauses."""
    grads: list[Any] = small(seed)
    if seed < 6:
        grads[5] = None
    if seed in (3, 5):
        grads[3] = None
    return grads


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["default", "other options"])
@pytest.mark.parametrize(("first", "second"), [("c", "c"), ("c", "numpy"), ("numpy", "c")])
@pytest.mark.parametrize("shape", [list, tuple, keyed])
def test_a_resumed_run_has_the_same_bits(
    first: str, second: str, shape: Callable[[list[Any]], Any], options: dict[str, Any]
) -> None:
    whole = Optimizer(shape(small(1)), nadam, target=first, **SETTINGS, **options)
    for seed in (2, 3, 4):
        whole.step(shape(gradients(seed)))
    whole.lr = 0.125
    saved = pickle.loads(pickle.dumps({"params": whole.params, "optimizer": whole.state_dict()}))
    whole.step(shape(gradients(5)))
    whole.step(shape(gradients(6)))

    resumed = Optimizer(saved["params"], nadam, target=second, **options)
    resumed.load_state_dict(saved["optimizer"])
    assert (resumed.t, resumed.lr, resumed.beta) == (3, 0.125, 0.7)
    resumed.step(shape(gradients(5)))
    resumed.step(shape(gradients(6)))
    assert everything(resumed) == everything(whole)


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_can_go_back(target: str) -> None:
    """Loading into an Optimizer that has trained, whose tensors have all started, before the same gradients again."""
    opt = Optimizer(small(1), nadam, target=target, **SETTINGS)
    for seed in (2, 3):
        opt.step(gradients(seed))
    params, saved = [p.copy() for p in opt.params], opt.state_dict()
    grads = gradients(6)
    opt.step(grads)
    then = everything(opt)
    opt.beta = 0.25
    opt.step(grads)
    for own, old in zip(opt.params, params, strict=True):
        own[...] = old
    opt.load_state_dict(saved)
    opt.step(grads)
    assert everything(opt) == then


@pytest.mark.parametrize("target", TARGETS)
def test_a_state_dict_is_a_copy(target: str) -> None:
    opt = Optimizer(small(1), nadam, target=target, **SETTINGS)
    opt.step(gradients(2))
    saved = opt.state_dict()
    before = bits(saved)
    opt.step(gradients(3))
    opt.lr = 0.5
    assert bits(saved) == before
    opt.load_state_dict(saved)
    opt.step(gradients(3))
    assert bits(saved) == before
    now = everything(opt)
    for m in saved["state"]["m"]:
        m[...] = 9
    saved["hyperparameters"]["lr"] = 9
    saved["started"][0] = saved["options"]["nesterov"] = False
    assert everything(opt) == now


def test_what_a_state_dict_has() -> None:
    opt = Optimizer({"w": np.ones(2), "b": np.ones(())}, nadam, target="numpy", nesterov=False, lr=0.5)
    opt.step({"w": np.ones(2), "b": None})
    saved = opt.state_dict()
    assert list(saved) == ["rule", "hash", "options", "hyperparameters", "t", "steps", "state", "started"]
    assert (saved["rule"], saved["hash"], saved["t"]) == ("nadam", nadam.hash, 1)
    assert saved["options"] == {"nesterov": False, "average": "slow"}
    assert saved["hyperparameters"] == {"lr": 0.5, "beta": 0.9, "psi": 0.004, "floor": 1e-3}
    assert saved["started"] == {"w": True, "b": False}
    assert saved["steps"] == {"w": 1, "b": 0}
    assert list(saved["state"]) == ["m", "slow", "first", "scale", "mu", "rate"]
    assert {key: value.shape for key, value in saved["state"]["m"].items()} == {"w": (2,), "b": ()}
    assert type(saved["state"]["mu"]["w"]) is float


def test_a_scalar_state_may_have_any_value() -> None:
    opt = Optimizer(small(1), nadam, target="numpy")
    saved = opt.state_dict()
    values = [math.nan, math.inf, -0.0, 3, np.float32(0.1), np.array(0.25)]
    saved["state"]["mu"] = values
    opt.load_state_dict(saved)
    assert bits(opt.state["mu"]) == bits([float(value) for value in values])


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


def replaced(*path: Any) -> Callable[[dict[str, Any]], Any]:
    """The state dict with the last of `path` where the others lead to."""

    def change(saved: Any) -> Any:
        *keys, last, value = path
        place = saved
        for key in keys:
            place = place[key]
        place[last] = value
        return saved

    return change


def without(*path: Any) -> Callable[[dict[str, Any]], Any]:
    """The state dict without what `path` leads to."""

    def change(saved: Any) -> Any:
        *keys, last = path
        place = saved
        for key in keys:
            place = place[key]
        del place[last]
        return saved

    return change


GARBAGE: list[tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = [
    (lambda saved: [saved], TypeError, "^a state dict is a dict, not a list$"),
    (lambda saved: None, TypeError, "^a state dict is a dict, not a NoneType$"),
    (lambda saved: "adam", TypeError, "^a state dict is a dict, not a str$"),
    (
        lambda saved: {},
        ValueError,
        "^the state dict lacks 'rule', 'hash', 'options', ",
    ),
    (without("t"), ValueError, "^the state dict lacks 't'$"),
    (replaced("rule", "adam"), ValueError, "^it is of rule 'adam', this optimizer of 'nadam'$"),
    (replaced("rule", None), ValueError, "^it is of rule None, this optimizer of 'nadam'$"),
    (replaced("hash", "0"), ValueError, r"^it is of another version of rule 'nadam' \(the hashes differ\)$"),
    (replaced("options", "average", "off"), ValueError, "^its options are {.*'off'}, here {.*'slow'}$"),
    (replaced("options", None), ValueError, "^its options are None, here {"),
    (replaced("options", {}), ValueError, "^its options are {}, here {"),
    (replaced("t", -1), ValueError, "^t counts steps, and cannot be -1$"),
    (replaced("t", None), ValueError, "^t is a whole number, not None$"),
    (replaced("hyperparameters", None), ValueError, "^its hyperparameters are None, here "),
    (
        without("hyperparameters", "psi"),
        ValueError,
        r"^its hyperparameters are \['beta', 'floor', 'lr'\], here ",
    ),
    (replaced("hyperparameters", "gamma", 1.0), ValueError, "^its hyperparameters are .*'gamma'.*, here "),
    (replaced("hyperparameters", "lr", None), ValueError, "^hyperparameter 'lr' is a number, not None$"),
    (replaced("hyperparameters", "lr", math.nan), ValueError, "^hyperparameter 'lr' is NaN$"),
    (replaced("hyperparameters", "beta", 1.0), ValueError, "^rule 'nadam' needs 0 <= beta < 1; given are beta=1.0$"),
    (replaced("state", None), ValueError, "^its state is None, here "),
    (replaced("state", []), ValueError, r"^its state is \[\], here "),
    (without("state", "mu"), ValueError, r"^its state is \['first', 'm', 'rate', 'scale', 'slow'\], here "),
    (
        replaced("state", "v", []),
        ValueError,
        r"^its state is \['first', .*, 'v'\], here ",
    ),
    (replaced("state", "m", None), ValueError, "^its 'm' does not have the structure of params$"),
    (without("state", "m", 5), ValueError, "^its 'm' does not have the structure of params$"),
    (replaced("state", "m", "sixsix"), ValueError, "^its 'm' does not have the structure of params$"),
    (replaced("state", "m", {"w": 1}), ValueError, "^its 'm' does not have the structure of params$"),
    (
        replaced("state", "m", 4, None),
        ValueError,
        r"^state\['m'\]\[4\] is object of shape \(\), here float64 ",
    ),
    (replaced("state", "m", 4, np.ones(34)), ValueError, r"^state\['m'\]\[4\] is float64 of shape \(34,\), here "),
    (
        replaced("state", "m", 4, np.ones(33, "f4")),
        ValueError,
        r"^state\['m'\]\[4\] is float32 of shape \(33,\)",
    ),
    (replaced("state", "m", 4, [[1], [1, 2]]), ValueError, r"^state\['m'\]\[4\] is no array: "),
    (replaced("state", "mu", 5, None), ValueError, r"^state\['mu'\]\[5\] is None, here a number$"),
    (replaced("state", "mu", 5, "1"), ValueError, r"^state\['mu'\]\[5\] is '1', here a number$"),
    (replaced("state", "mu", 5, 1j), ValueError, r"^state\['mu'\]\[5\] is 1j, here a number$"),
    (replaced("state", "mu", 5, [1.0]), ValueError, r"^state\['mu'\]\[5\] is float64 of shape \(1,\), here a number$"),
    (replaced("steps", None), ValueError, "^its 'steps' does not have the structure of params$"),
    (replaced("steps", 5, None), ValueError, r"^steps\[5\] is a whole number, not None$"),
    (replaced("steps", 5, -1), ValueError, r"^steps\[5\] counts steps, and cannot be -1$"),
    (replaced("steps", 5, 2), ValueError, r"^steps\[5\] is 2, more than t, which is 1$"),
    (replaced("started", None), ValueError, "^its 'started' does not have the structure of params$"),
    (replaced("started", [True]), ValueError, "^its 'started' does not have the structure of params$"),
    (replaced("started", 5, None), ValueError, r"^started\[5\] is None, not True or False$"),
    (replaced("started", 5, 2), ValueError, r"^started\[5\] is 2, not True or False$"),
]


@pytest.mark.parametrize(("change", "error", "message"), GARBAGE)
def test_what_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], Any], error: type[Exception], message: str
) -> None:
    opt = Optimizer(small(1), nadam, target="numpy", **SETTINGS)
    opt.step(gradients(2))
    saved = opt.state_dict()
    opt.step(gradients(3))
    opt.lr = 0.5
    before = everything(opt)
    with pytest.raises(error, match=message) as refusal:
        opt.load_state_dict(change(saved))
    assert type(refusal.value) is error
    assert everything(opt) == before


def test_everything_that_does_not_fit_is_listed() -> None:
    opt = Optimizer(small(1), nadam, target="numpy")
    saved = opt.state_dict()
    saved["t"] = -1
    saved["hyperparameters"]["lr"] = saved["hyperparameters"]["psi"] = "x"
    saved["state"]["m"][0] = saved["state"]["m"][0].T
    saved["state"]["mu"][1] = None
    saved["started"][2] = None
    before = everything(opt)
    with pytest.raises(ValueError, match=r"^t counts") as refusal:
        opt.load_state_dict(saved)
    assert str(refusal.value).split("; ") == [
        "t counts steps, and cannot be -1",
        "hyperparameter 'lr' is a number, not 'x'",
        "hyperparameter 'psi' is a number, not 'x'",
        "started[2] is None, not True or False",
        "state['m'][0] is float32 of shape (7, 5), here float32 of shape (5, 7)",
        "state['mu'][1] is None, here a number",
    ]
    assert everything(opt) == before
    with pytest.raises(ValueError, match=r"^it is of rule .*; its options are ") as refusal:
        opt.load_state_dict(Optimizer(small(1), brittle, target="numpy").state_dict())


def test_another_structure_is_refused() -> None:
    opt = Optimizer(keyed(small(1)), nadam, target="numpy")
    for other in (Optimizer(small(1), nadam, target="numpy"), Optimizer({"a": np.ones(1)}, nadam, target="numpy")):
        before = everything(opt)
        with pytest.raises(ValueError, match=r"^its 'started' does not have the structure of params; its 'm' does not"):
            opt.load_state_dict(other.state_dict())
        assert everything(opt) == before
