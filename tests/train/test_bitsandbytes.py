"""State dicts of the 8-bit Adam and AdamW of bitsandbytes, as that lays them out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import optforge as of
from optforge.core import blocks
from optforge.core.formats import FORMATS

STORE = {"m": "q8", "v": "uq8"}
SHAPES = ((30, 20), (7,))


def optimizer(rule: str = "adamw", store: Any = None, **more: Any) -> of.Optimizer:
    params = [np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape) for shape in SHAPES]
    settings = {"weight_decay": 0.0} if rule == "adamw" else {"lam": 1.0} if rule == "adam" else {}
    return of.Optimizer(params, rule, target="numpy", store=STORE if store is None else store, **settings, **more)


def theirs(wrapped: bool = True) -> dict[str, Any]:
    """As versions from 0.49 on give it, or those before; the second tensor is small, and so float32."""
    rng = np.random.default_rng(2)
    whole = {
        "state1": rng.integers(0, 256, SHAPES[0], np.uint8),
        "qmap1": blocks.table(True),
        "state2": rng.integers(0, 256, SHAPES[0], np.uint8),
        "qmap2": blocks.table(False),
        "absmax1": rng.random(3, np.float32),
        "absmax2": rng.random(3, np.float32),
    }
    small = {name: rng.random(7, np.float32) for name in ("state1", "state2")}
    group = {"lr": 0.25, "betas": (0.5, 0.75), "eps": 1e-4, "weight_decay": 0.0}
    group |= {"alpha": 0.0, "t_alpha": None, "t_beta3": None, "params": [0, 1]}
    own = [
        {"step": 3, "__bnb_optimizer_quant_state__": entry} if wrapped else {"step": 3, **entry}
        for entry in (whole, small)
    ]
    return {"state": dict(enumerate(own)), "param_groups": [group]}


@pytest.mark.parametrize("rule", ["adam", "adamw"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_theirs_is_taken_over(rule: str, wrapped: bool) -> None:
    opt, given = optimizer(rule), theirs(wrapped)
    of.from_torch(opt, given)
    assert (opt.t, opt.lr, opt.beta1, opt.beta2, opt.eps) == (3, 0.25, 0.5, 0.75, 1e-4)
    entry = theirs(False)["state"]
    for number, name in enumerate("mv", 1):
        assert np.array_equal(opt.state[name][0], entry[0][f"state{number}"])
        assert np.array_equal(opt.state[f"{name}_absmax"][0], entry[0][f"absmax{number}"])
        codes, scales = FORMATS[STORE[name]].store(entry[1][f"state{number}"])
        assert np.array_equal(opt.state[name][1], codes.view(np.uint8))
        assert np.array_equal(opt.state[f"{name}_absmax"][1], scales)


@pytest.mark.parametrize("rule", ["adam", "adamw"])
def test_ours_there_and_back(rule: str) -> None:
    opt = optimizer(rule, lr=0.01)
    opt.step([np.ones(SHAPES[0], np.float32), None])
    made = of.to_torch(opt)
    assert made["param_groups"][0]["betas"] == (opt.beta1, opt.beta2) and list(made["state"]) == [0]
    assert {name: np.asarray(value).shape for name, value in made["state"][0].items()} == {
        "step": (), "state1": (30, 20), "state2": (30, 20), "absmax1": (3,), "absmax2": (3,), "qmap1": (256,), "qmap2": (256,)
    }  # fmt: skip
    other = optimizer(rule, lr=1.0)
    of.from_torch(other, made)
    for own, p in zip(other.params, opt.params, strict=True):
        own[...] = p
    for both in (opt, other):
        both.step([np.full(shape, 0.5, np.float32) for shape in SHAPES])
    assert [p.tobytes() for p in other.params] == [p.tobytes() for p in opt.params]


def changed(**more: Any) -> dict[str, Any]:
    given = theirs(False)
    for key, value in more.items():
        (given["param_groups"][0] if key in given["param_groups"][0] else given["state"][0])[key] = value
    return given


REFUSED = {
    "weight_decay=0.1: on CUDA it decays after the step": lambda: (optimizer(), changed(weight_decay=0.1)),
    "it has another formula: alpha=5": lambda: (optimizer(), changed(alpha=5)),
    "has 1 scales of 600 elements, not 3, one for 256": lambda: (optimizer(), changed(absmax2=np.ones(1, np.float32))),
    "'qmap1'\\] is not its dynamic map, which q8 is": lambda: (optimizer(), changed(qmap1=blocks.table(False))),
    "'state2'\\] is uint8 of shape .600,., not uint8 or float32 of shape .30, 20.": lambda: (
        optimizer(),
        changed(state2=np.zeros(600, np.uint8)),
    ),
    "has no 'state1'": lambda: (optimizer(), changed(state1=None)),
    "has m=q8, v=uq8, and the store here is m=q8": lambda: (optimizer(store={"m": "q8"}), theirs()),
    "no 8-bit optimizer of bitsandbytes has the formula of rule 'rmsprop'.*eps outside of the root": lambda: (
        optimizer("rmsprop", {"acc": "q8"}),
        theirs(),
    ),
    "it is of an optimizer of bitsandbytes, which an Optimizer with m=q8, v=uq8": lambda: (
        optimizer(store={}),
        theirs(),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message: str) -> None:
    opt, given = REFUSED[message]()
    before = opt.state_dict()
    with pytest.raises(ValueError, match=message):
        of.from_torch(opt, given)
    assert opt.t == before["t"] == 0 and opt.lr == (before["hyperparameters"]["lr"])


def test_decay_is_not_written_for_theirs() -> None:
    opt = of.Optimizer([np.ones(9, np.float32)], "adamw", target="numpy", store=STORE, weight_decay=0.1)
    with pytest.raises(ValueError, match="on CUDA it decays after the step"):
        of.to_torch(opt)
