"""Groups that are added later, and optimizers that are copied or pickled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import optforge as of
from conftest import require_torch
from optimizing import TARGETS, everything, nadam, small

G = [small(1), small(2), small(3)]


def copied(opt: of.Optimizer) -> of.Optimizer:
    return copy.deepcopy(opt)


def pickled(opt: of.Optimizer) -> of.Optimizer:
    made: of.Optimizer = pickle.loads(pickle.dumps(opt))
    return made


WAYS = [copied, pickled]
RULES: dict[str, Any] = {
    "everything": nadam,
    "built in": "adam",
    "composition": of.clip_by_global_norm(max_norm=0.5, form="pytorch") >> nadam,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("target", TARGETS)
def test_a_copy_goes_on_with_the_same_bits(target: str, rule: str, way: Callable[..., of.Optimizer]) -> None:
    schedule = of.schedules.cosine(0.02, steps=9, warmup=3)
    opt = of.Optimizer(small(0), RULES[rule], target=target, lr=schedule, skip_nonfinite=True, threads=1)
    late: list[Any] = [*G[0]]
    late[1] = None
    opt.step(late)
    opt.step(late)
    other = way(opt)
    assert everything(other) == everything(opt)
    assert (other.target, other.threads, other.skip_nonfinite, other.rule.hash) == (target, 1, True, opt.rule.hash)
    assert not any(np.shares_memory(a, b) for a, b in zip(opt.params, other.params, strict=True))
    before = everything(opt)
    for grads in (G[1], G[2]):
        other.step(grads)
    assert everything(opt) == before
    for grads in (G[1], G[2]):
        opt.step(grads)
    assert everything(other) == everything(opt)
    assert other.t == 4


@pytest.mark.parametrize("way", WAYS)
def test_groups_options_and_schedules_of_a_copy(way: Callable[..., of.Optimizer]) -> None:
    params = [{"params": {"w": small(0)[0]}, "lr": of.schedules.constant(0.5)}, {"params": small(3)[:2]}]
    opt = of.Optimizer(params, nadam, lr=0.25, nesterov=False)
    opt.step([{"w": G[0][0]}, G[0][:2]])
    opt.groups[1]["beta"] = 0.5
    other = way(opt)
    assert everything(other) == everything(opt)
    assert other.nesterov is False
    for one in (opt, other):
        one.step([{"w": G[1][0]}, G[1][:2]])
        one.add_group({"params": [np.ones(3, np.float32)]})
        assert one.groups[2]["lr"] == 0.25
    assert everything(other) == everything(opt)


def test_a_copy_with_its_model_shares_the_copied_parameters() -> None:
    model = {"w": np.ones(3, np.float32)}
    opt = of.Optimizer(model, "sgd", lr=1.0)
    own, other = copy.deepcopy((model, opt))
    other.step({"w": np.ones(3, np.float32)})
    assert own["w"].tolist() == [0, 0, 0]
    assert model["w"].tolist() == [1, 1, 1]
    own, other = pickle.loads(pickle.dumps((model, opt)))
    other.step({"w": np.ones(3, np.float32)})
    assert own["w"].tolist() == [0, 0, 0]


def test_a_copy_with_a_model_of_pytorch() -> None:
    torch = require_torch()
    layer = torch.nn.Linear(3, 2)
    opt = of.Optimizer(layer.parameters(), "adam")
    own, other = copy.deepcopy((layer, opt))
    other.step([torch.ones(2, 3), torch.ones(2)])
    assert not torch.equal(own.weight, layer.weight)
    assert other.params[0] is own.weight


def test_what_cannot_be_copied_says_so() -> None:
    opt = of.Optimizer([np.ones(3)], "sgd", lr=lambda t: 1 / t)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(opt)
    with pytest.raises(TypeError, match=r"copy\.deepcopy"):
        copy.copy(opt)
    assert copy.deepcopy(opt).lr == 1.0


def test_a_rule_is_pickled_by_its_text() -> None:
    for rule in (nadam, of.rules.adam, of.clip_by_norm(max_norm=3.0) >> nadam):
        again = pickle.loads(pickle.dumps(rule))
        assert (again.name, again.hash, again.hyperparameters) == (rule.name, rule.hash, rule.hyperparameters)
        assert again.generate() == rule.generate()
        assert copy.deepcopy(rule) is rule
    transform = pickle.loads(pickle.dumps(of.clip_by_norm(max_norm=3.0)))
    assert (transform >> of.rules.sgd).hyperparameters["max_norm"] == 3.0


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_an_added_group_steps_as_if_its_gradients_had_come_late(target: str, grouped: bool) -> None:
    settings: dict[str, Any] = {"lr": of.schedules.cosine(0.02, steps=9), "target": target, "floor": 0.5}
    opt = of.Optimizer([{"params": small(0), "beta": 0.75}] if grouped else small(0), nadam, **settings)
    late: dict[str, Any] = {"params": {"w": small(4)[0]}, "psi": 0.125}
    whole = of.Optimizer(
        [{"params": small(0), **({"beta": 0.75} if grouped else {})}, {"params": {"w": small(4)[0]}, "psi": 0.125}],
        nadam,
        **settings,
    )
    opt.step([G[0]] if grouped else G[0])
    whole.step([G[0], {"w": None}])
    opt.add_group(late)
    assert len(opt.groups) == len(opt.params) == 2
    assert opt.params[1]["w"] is late["params"]["w"]
    assert opt.groups[1]["psi"] == 0.125
    assert opt.groups[1]["floor"] == 0.5
    for grads in ([G[1], {"w": G[1][0]}], [G[2], {"w": None}], [G[0], {"w": G[2][0]}]):
        opt.step(grads)
        whole.step(grads)
    assert everything(opt) == everything(whole)
    saved = opt.state_dict()
    whole.load_state_dict(saved)


def test_a_group_that_does_not_do_changes_nothing() -> None:
    p = [np.ones(3, np.float32)]
    opt = of.Optimizer(p, nadam)
    opt.step([np.ones(3, np.float32)])
    before = everything(opt)
    new = [np.ones(2, np.float32)]
    cases: list[tuple[Any, type[Exception], str]] = [
        ({"params": p}, ValueError, r"params\[0\]\[0\] and params\[1\]\[0\] overlap"),
        ({"params": new, "lrr": 1.0}, TypeError, r"groups\[1\]: .*no hyperparameter 'lrr'; did you mean 'lr'"),
        ({"params": new, "lr": "0.1"}, TypeError, r"groups\[1\]: hyperparameter 'lr' is a number"),
        ({"params": new, "beta": 2.0}, ValueError, r"beta"),
        ({"params": new, "nesterov": False}, ValueError, r"groups\[1\]: option 'nesterov'"),
        ({"params": [np.ones(2, int)]}, TypeError, r"params\[1\]\[0\] is int64"),
        ({"params": []}, ValueError, "empty"),
        ({"lr": 1.0}, TypeError, "a group is"),
        (new, TypeError, "a group is"),
    ]
    for group, error, message in cases:
        with pytest.raises(error, match=message):
            opt.add_group(group)
        assert everything(opt) == before
    opt.step([np.ones(3, np.float32)])
