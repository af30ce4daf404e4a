"""State dicts of PyTorch's optimizers: runs that change over from one to the other and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import optforge as of
from conftest import require_torch
from optforge import Optimizer
from optforge.train import interop
from optforge.train.interop import PYTORCH
from optimizing import bits, everything

SIZES = [(40, 3), (7,), ()]
HYPER: dict[str, dict[str, float]] = {
    "adam": {"lr": 0.03, "beta1": 0.8, "beta2": 0.97, "eps": 1e-4, "lam": 1.0},
    "adamw": {"lr": 0.03, "beta1": 0.8, "beta2": 0.97, "eps": 1e-4, "weight_decay": 0.2},
    "adadelta": {"lr": 0.7, "rho": 0.8, "eps": 1e-5},
    "sgd": {"lr": 0.3},
}


def arrays(seed: int, dtype: Any = np.float32) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape) * 0.01, dtype) for shape in SIZES]


def torch_optimizer(name: str, params: list[Any]) -> tuple[Any, list[Any]]:
    """PyTorch's optimizer with the same hyperparameters, and its parameters."""
    torch = require_torch()
    own, settings = PYTORCH[name], {}
    for ours, key in own.hyperparameters.items():
        if isinstance(key, tuple):
            settings[key[0]] = (*settings.get(key[0], ()), HYPER[name][ours])
        else:
            settings[key] = HYPER[name][ours]
    tensors = [torch.nn.Parameter(torch.from_numpy(p.copy())) for p in params]
    return getattr(torch.optim, own.name)(tensors, foreach=False, **settings), tensors


def torch_step(optimizer: Any, tensors: list[Any], grads: list[Any]) -> None:
    import torch

    for tensor, g in zip(tensors, grads, strict=True):
        tensor.grad = None if g is None else torch.from_numpy(g.copy())
    optimizer.step()


def close(mine: list[Any], theirs: list[Any], ulps: int) -> bool:
    """Whether all elements agree within some units in the last place of the larger numbers of their array."""
    return all(
        np.all(np.abs(a - b.detach().numpy()) <= ulps * np.spacing(np.max(np.abs(a), initial=0)))
        for a, b in zip(mine, theirs, strict=True)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", PYTORCH)
def test_a_run_goes_on_from_pytorch_and_back(name: str, dtype: Any) -> None:
    """Five steps there, three in both, the second tensor's first gradient missing; then three in both from here."""
    theirs, tensors = torch_optimizer(name, arrays(1, dtype))
    for seed in range(5):
        torch_step(theirs, tensors, arrays(seed + 2, dtype))
    params = [tensor.detach().numpy().copy() for tensor in tensors]
    opt = Optimizer(params, name, target="numpy", **{"lam": 1.0} if name == "adam" else {})
    of.from_torch(opt, theirs.state_dict())
    assert opt.t == (0 if name == "sgd" else 5)
    assert opt.groups[0]["lr"] == HYPER[name]["lr"]
    for ours, key in PYTORCH[name].state.items():
        assert bits(opt.state[ours]) == bits([theirs.state[tensor][key].numpy() for tensor in tensors])
    for seed in range(3):
        torch_step(theirs, tensors, arrays(seed + 20, dtype))
        opt.step(arrays(seed + 20, dtype))
    assert close(params, tensors, 8)
    assert not close(arrays(1, dtype), tensors, 1000)

    back, others = torch_optimizer(name, params)
    for group in back.param_groups:
        group["lr"] = 99.0
    back.load_state_dict(of.to_torch(opt))
    for seed in range(3):
        torch_step(back, others, arrays(seed + 30, dtype))
        opt.step(arrays(seed + 30, dtype))
    assert close(params, others, 8)


def test_tensors_without_a_step_and_groups() -> None:
    torch = require_torch()
    tensors = [torch.nn.Parameter(torch.from_numpy(p)) for p in arrays(1)]
    groups = [{"params": tensors[:1], "lr": 0.1}, {"params": tensors[1:], "weight_decay": 0.5}]
    theirs = torch.optim.AdamW(groups, lr=0.02)
    torch_step(theirs, tensors, [*arrays(2)[:2], None])
    own = [p.detach().numpy().copy() for p in tensors]
    opt = Optimizer([{"params": own[:1]}, {"params": own[1:]}], "adamw", target="numpy")
    of.from_torch(opt, theirs.state_dict())
    assert [(group["lr"], group["weight_decay"]) for group in opt.groups] == [(0.1, 0.01), (0.02, 0.5)]
    assert opt.state_dict()["started"] == [[True], [True, False]]
    exported = of.to_torch(opt)
    assert set(exported["state"]) == {0, 1}
    assert exported["state"][0]["step"].dtype == torch.float32
    assert [group["params"] for group in exported["param_groups"]] == [[0], [1, 2]]
    theirs.load_state_dict(exported)
    torch_step(theirs, tensors, [*arrays(3)[:2], None])
    opt.step([arrays(3)[:1], [arrays(3)[1], None]])
    assert close(own, tensors, 8)


OTHERS = ["Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "ASGD", "Rprop", "Adafactor"]


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("name", PYTORCH)
def test_other_optimizers_are_refused(name: str, steps: int) -> None:
    """All others of PyTorch, and those of our other rules, with state or without."""
    torch = require_torch()
    for other in {*OTHERS, *(own.name for own in PYTORCH.values())} - {PYTORCH[name].name}:
        if {PYTORCH[name].name, other} == {"Adam", "AdamW"}:
            continue  # they have the same formula where there is no weight decay
        tensors = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(3)]
        theirs = getattr(torch.optim, other)(tensors, lr=0.1)
        for _ in range(steps):
            torch_step(theirs, tensors, [np.ones((3, 2), np.float32)] * 3)
        opt = Optimizer([p.detach().numpy().copy() for p in tensors], name, target="numpy")
        before = everything(opt)
        with pytest.raises(ValueError, match=f"it has (no|what {PYTORCH[name].name} does not)"):
            of.from_torch(opt, theirs.state_dict())
        assert everything(opt) == before


@pytest.mark.parametrize("name", PYTORCH)
def test_what_schedulers_note_in_groups_is_no_formula(name: str) -> None:
    torch = require_torch()
    theirs, _ = torch_optimizer(name, arrays(1))
    torch.optim.lr_scheduler.OneCycleLR(theirs, max_lr=1.0, total_steps=10, cycle_momentum=name.startswith("adam"))
    opt = Optimizer(arrays(1), name, target="numpy", **{"lam": 1.0} if name == "adam" else {})
    of.from_torch(opt, theirs.state_dict())
    assert opt.lr == theirs.param_groups[0]["lr"]


# ── without PyTorch ─────────────────────────────────────────────────────────────────────────────────────────────────


def run(name: str = "adamw") -> Optimizer:
    opt = Optimizer(arrays(1), name, target="numpy", **HYPER[name])
    opt.step(arrays(2))
    opt.step([*arrays(3)[:2], None])
    return opt


@pytest.mark.parametrize("name", PYTORCH)
def test_exported_state_is_taken_back_without_pytorch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interop, "converter", lambda: lambda values: values)
    opt = run(name)
    exported = of.to_torch(opt)
    before = bits(exported["state"])
    twin = Optimizer([p.copy() for p in opt.params], name, target="numpy", **{"lam": 1.0} if name == "adam" else {})
    twin.t = opt.t
    of.from_torch(twin, exported)
    for each in (opt, twin):
        each.step(arrays(4))
    if name == "sgd":  # which has no counts of its tensors there
        twin.t = opt.t = opt.t
    assert everything(opt) == everything(twin)
    assert bits(exported["state"]) == before


@pytest.mark.parametrize("name", PYTORCH)
def test_tensors_without_state_there_are_as_new(name: str) -> None:
    """Whatever they were: an optimizer that was in use has the bits of a new one, the next step's too."""
    exported = of.to_torch(run(name))
    exported["state"].pop(1, None)
    used, new = run(name), Optimizer(arrays(1), name, target="numpy", **HYPER[name])
    assert all(state.initial == 0.0 for state in used._kernel.state)
    for own, value in zip(used.params, arrays(1), strict=True):
        own[...] = value
    new.t = used.t
    for opt in (used, new):
        of.from_torch(opt, exported)
    assert everything(used) == everything(new)
    for opt in (used, new):
        opt.step(arrays(5))
    assert everything(used) == everything(new)


def changed(change: Any) -> Any:
    """An exported state dict that was changed."""
    exported = of.to_torch(run())
    return change(exported) or exported


REFUSED: list[tuple[Any, str]] = [
    (lambda d: d["param_groups"][0].update(amsgrad=True), r"^it has another formula: amsgrad=True$"),
    (lambda d: d["param_groups"][0].update(decoupled_weight_decay=False), "^it has another formula: decoupled_weight"),
    (lambda d: d["param_groups"][0].pop("eps") and None, r"^it has no 'eps'$"),
    (lambda d: d["param_groups"][0].update(betas=(0.5,)), r"^it has no \('betas', 1\)$"),
    (lambda d: d["param_groups"][0].update(lr=float("nan")), "^hyperparameter 'lr' is NaN$"),
    (lambda d: d["param_groups"][0].update(params=[0, 1]), r"^it is of groups of \[2\] tensors, here are \[3\]$"),
    (
        lambda d: d["param_groups"].append(d["param_groups"][0]),
        r"^it is of groups of \[3, 3\] tensors, here are \[3\]$",
    ),
    (lambda d: d["state"][1].update(exp_avg=np.zeros(3, "f4")), r"^state\['m'\]\[1\] is float32 of shape \(3,\), here"),
    (lambda d: d["param_groups"][0].pop("amsgrad") or None, "^it has no 'amsgrad'$"),
    (lambda d: d["param_groups"][0].update(alpha=0.9, centered=False), "^it has what AdamW does not: alpha=0.9, cent"),
    (lambda d: d["state"][1].update(exp_inf=np.zeros(7)), r"^its state\[1\] has what AdamW does not: 'exp_inf'$"),
    (lambda d: d["state"][1].update(exp_avg_sq=None), r"^its state\[1\] has no 'exp_avg_sq'$"),
    (lambda d: d["state"][1].pop("step") and None, r"^its state\[1\] has no 'step'$"),
    *[
        (
            lambda d, step=step: d["state"][1].update(step=step),
            r"^its state\[1\]\['step'\] is a whole number from 0, not",
        )
        for step in (1.5, float("nan"), float("inf"), -1.0, "x", "2", [2])
    ],
    (lambda d: d["state"].update({7: {"step": 2.0}}), "^it has the state of 7, which no group has$"),
    (lambda d: {"state": {}, "param_groups": [{}]}, r"^its param_groups\[0\] has no 'params', a list of the numbers"),
    (lambda d: d["param_groups"][0].update(params=arrays(1)), r"^its param_groups\[0\] has no 'params', a list of the"),
    (lambda d: d.update(param_groups=[None]), r"^its param_groups\[0\] is a dict, not a NoneType$"),
    (lambda d: d.update(param_groups=None), "^its 'param_groups' is a list of dicts, not a NoneType$"),
    (lambda d: d.update(state=None), "^its 'state' is a dict, not a NoneType$"),
    (lambda d: d["state"].update({1: None}), r"^its state\[1\] is a dict, not a NoneType$"),
    (lambda d: {"state": {}}, "^the state dict of an optimizer of PyTorch has 'state' and 'param_groups', not a dict$"),
    (lambda d: [d], "^the state dict of an optimizer of PyTorch has 'state' and 'param_groups', not a list$"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_does_not_fit_is_refused(change: Any, message: str) -> None:
    opt = run()
    before = everything(opt)
    with pytest.raises((TypeError, ValueError), match=message):
        of.from_torch(opt, changed(change))
    assert everything(opt) == before


def test_rules_of_other_formulas_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^no optimizer of PyTorch is known .* rule 'momentum' \(adam is Adam, adamw"):
        of.to_torch(Optimizer([np.ones(3)], "momentum", target="numpy"))
    with pytest.raises(ValueError, match=r"^Adam of PyTorch is another formula for lam=0\.99999999, not 1\.0$"):
        of.to_torch(Optimizer([np.ones(3)], "adam", target="numpy"))

    @of.rule
    def adamw(p, g, m=0.0, v=0.0, *, lr=0.1, beta1=0.9, beta2=0.9, eps=0.1, weight_decay=0.1):
        """Another rule of the same name."""
        p = p - lr * g
        return p, m, v

    with pytest.raises(
        ValueError, match=r"^no optimizer of PyTorch is known to have the formula and the state of rule"
    ):
        of.to_torch(Optimizer([np.ones(3)], adamw, target="numpy"))
