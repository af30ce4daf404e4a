"""`optforge.torch` beside torch.optim, as PyTorch tests its own optimizers: formulas, groups, schedulers, state."""

from __future__ import annotations

import copy
import io
import pickle
import re
import runpy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import optforge as of
from amount import FULL
from conftest import require_torch
from pages import PAGES, python_blocks

torch = require_torch()
nn = torch.nn

from optforge.torch import Optimizer  # noqa: E402
from optforge.torch.formulas import OF_TORCH, RUN  # noqa: E402

PAGE = PAGES / "pytorch.md"


TARGET = "c" if FULL else "numpy"
SHAPES = [(7, 5), (33,), (), (2, 3, 4), (0, 3)]

# As torch/testing/_internal/common_optimizers.py has them: settings of each optimizer beside its defaults.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("Adadelta", {}),
    ("Adadelta", {"lr": 0.3, "rho": 0.95, "weight_decay": 0.1}),
    ("Adadelta", {"weight_decay": 0.1, "maximize": True}),
    ("Adagrad", {}),
    ("Adagrad", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.1, "lr_decay": 0.5, "weight_decay": 0.1}),
    ("Adam", {}),
    ("Adam", {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1}),
    ("Adam", {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    ("AdamW", {}),
    ("AdamW", {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-4, "weight_decay": 0.9}),
    ("AdamW", {"weight_decay": 0.9, "amsgrad": True}),
    ("Adamax", {}),
    ("Adamax", {"weight_decay": 0.1, "maximize": True}),
    ("ASGD", {"lr": 0.02, "t0": 3}),
    ("ASGD", {"lr": 0.02, "t0": 100, "weight_decay": 0.1, "lambd": 0.1}),
    ("NAdam", {}),
    ("NAdam", {"weight_decay": 0.9, "momentum_decay": 6e-3, "decoupled_weight_decay": True}),
    ("RAdam", {}),
    ("RAdam", {"lr": 2e-3, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("RMSprop", {}),
    ("RMSprop", {"lr": 1e-3, "momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    ("RMSprop", {"momentum": 0.1, "maximize": True}),
    ("Rprop", {"lr": 2e-4}),
    ("Rprop", {"etas": (0.5, 1.5), "step_sizes": (2e-6, 100), "maximize": True}),
    ("SGD", {"lr": 1e-2}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.9}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.9, "maximize": True}),
]
BUILT_IN: list[tuple[str, str, dict[str, Any]]] = [
    ("adamw", "AdamW", {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.9}),
    ("adam", "Adam", {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-4}),
    ("adadelta", "Adadelta", {"lr": 0.3, "rho": 0.95}),
    ("sgd", "SGD", {"lr": 0.1}),
]
ULPS = 64  # of the largest number of an array, after ten steps


def parameters(dtype: Any = torch.float32, seed: int = 1) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def give(params: list[Any], seed: int, absent: int | None = None) -> None:
    """Gradients of a step, none for one of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    for k, p in enumerate(params):
        made = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = None if k == absent else made


def train(steps: range, *pairs: tuple[list[Any], Any], absent: int | None = None) -> None:
    for seed in steps:
        for params, opt in pairs:
            give(params, seed, absent)
            opt.step()


def apart(one: list[Any], other: list[Any]) -> float:
    """How many units in the last place of an array's largest number two lists are apart at most."""
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        mine, theirs = a.detach().numpy(), b.detach().numpy()
        if mine.size:
            worst = max(worst, float(np.max(np.abs(mine - theirs) / np.spacing(np.max(np.abs(theirs))))))
    return worst


def same(one: list[Any], other: list[Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def ours(params: Any, name: str, target: str = TARGET, **settings: Any) -> Any:
    more = {"lam": 1.0} if name == "adam" else {}
    return Optimizer(params, name, target=target, **settings, **more)


def label(value: Any) -> str | None:
    return "-".join(f"{k}={v}" for k, v in value.items()) or "defaults" if isinstance(value, dict) else None


# ── formulas ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize(("name", "settings"), CASES, ids=label)
def test_a_formula_of_torch_is_stepped_as_there(name: str, settings: dict[str, Any], dtype: Any) -> None:
    """Ten steps from the same start, a gradient missing in some; then state and groups change over, both ways."""
    mine, theirs = parameters(dtype), parameters(dtype)
    opt, other = ours(mine, name, **settings), getattr(torch.optim, name)(theirs, foreach=True, **settings)
    train(range(3), (mine, opt), (theirs, other))
    train(range(3, 5), (mine, opt), (theirs, other), absent=1)
    train(range(5, 10), (mine, opt), (theirs, other))
    # A scalar of PyTorch's state is float32 there, and a double here.
    allowed = ULPS * (2**29 if dtype == torch.float64 and name in ("ASGD", "NAdam") else 1)
    assert apart(mine, theirs) <= allowed
    assert apart(mine, parameters(dtype)) > 100 * allowed
    assert {k: v for k, v in other.param_groups[0].items() if k in opt.param_groups[0] and k != "params"} == {
        k: v for k, v in opt.param_groups[0].items() if k != "params"
    }

    saved = opt.state_dict()
    fresh = [p.detach().clone().requires_grad_() for p in mine]
    back = getattr(torch.optim, name)(fresh, foreach=False, lr=0.5)
    back.load_state_dict(copy.deepcopy(saved))
    again = [p.detach().clone().requires_grad_() for p in theirs]
    forth = ours(again, name, lr=0.5)
    forth.load_state_dict(other.state_dict())
    train(range(10, 13), (fresh, back), (again, forth), (mine, opt), (theirs, other))
    assert apart(fresh, theirs) <= 2 * allowed
    assert apart(again, theirs) <= 2 * allowed


@pytest.mark.parametrize(("name", "theirs", "settings"), BUILT_IN, ids=label)
def test_a_built_in_rule_has_the_keys_of_torch(name: str, theirs: str, settings: dict[str, Any]) -> None:
    mine, others = parameters(), parameters()
    opt, other = ours(mine, name, **settings), getattr(torch.optim, theirs)(others, **settings)
    train(range(4), (mine, opt), (others, other))
    saved, expected = opt.state_dict(), other.state_dict()
    assert {k: [*v] for k, v in saved["state"].items()} == {k: [*v] for k, v in expected["state"].items()}
    assert saved["param_groups"][0].keys() - {"lam"} <= expected["param_groups"][0].keys()
    assert expected["param_groups"][0].keys() - saved["param_groups"][0].keys() <= {*RUN, "decoupled_weight_decay"}
    opt.load_state_dict(expected)
    other.load_state_dict(saved)
    train(range(4, 8), (mine, opt), (others, other))
    assert apart(mine, others) <= ULPS


def test_settings_that_only_torch_has_choose_its_formula() -> None:
    mine, theirs = parameters(), parameters()
    opt = ours(mine, "sgd", lr=0.1, momentum=0.9, weight_decay=0.01)
    other = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=0.01)
    train(range(5), (mine, opt), (theirs, other))
    assert apart(mine, theirs) <= ULPS
    assert ours(parameters(), "sgd").param_groups[0]["lr"] == of.rules.sgd.hyperparameters["lr"]
    assert ours(parameters(), "sgd", momentum=0.9).param_groups[0]["lr"] == of.rules.sgd.hyperparameters["lr"]


def test_another_formula_is_not_loaded() -> None:
    params = parameters()
    for other, name in (
        (torch.optim.AdamW(params, amsgrad=True), "adamw"),
        (torch.optim.AdamW(params, maximize=True), "adamw"),
        (torch.optim.SGD(params, lr=0.1, momentum=0.9), "AdamW"),
        (torch.optim.RMSprop(params), "adamw"),
    ):
        train(range(1), (params, other))
        opt = ours(params, name)
        train(range(1), (params, opt))
        before = copy.deepcopy(opt.state_dict())
        with pytest.raises(ValueError, match=r"another formula|lacks|needs"):
            opt.load_state_dict(other.state_dict())
        after = opt.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert all(torch.equal(after["state"][0][key], value) for key, value in before["state"][0].items())


# ── parameters and groups ───────────────────────────────────────────────────────────────────────────────────────────


def test_groups_are_stepped_by_their_own_hyperparameters() -> None:
    mine, theirs = parameters(), parameters()
    made = []
    for params, make in ((mine, lambda groups: ours(groups, "adamw", lr=0.1)), (theirs, torch.optim.AdamW)):
        groups = [
            {"params": params[:1], "weight_decay": 0.5, "betas": (0.5, 0.9), "lr": 0.1},
            {"params": iter(params[1:3]), "lr": 0.01, "layer": "norm"},
            {"params": params[3], "lr": 0.02, "eps": 1e-3},
        ]
        opt = make(groups)
        opt.add_param_group({"params": params[4:], "lr": 1.0})
        made.append(opt)
    opt, other = made
    train(range(4), (mine, opt), (theirs, other))
    opt.param_groups[1]["lr"] = other.param_groups[1]["lr"] = 0.5
    opt.param_groups[0]["betas"] = other.param_groups[0]["betas"] = (0.6, 0.99)
    train(range(4, 6), (mine, opt), (theirs, other))
    assert apart(mine, theirs) <= ULPS
    assert opt.param_groups[1]["layer"] == "norm"


def test_beta1_and_beta2_may_be_given_by_name() -> None:
    opt = ours([{"params": parameters(), "beta2": 0.5}], "lamb", beta1=0.8)
    assert opt.param_groups[0]["betas"] == (0.8, 0.5)
    assert "beta2" not in opt.param_groups[0]


def test_a_group_that_is_added_goes_on_with_the_state_of_the_others() -> None:
    mine, theirs = parameters(), parameters()
    opt, other = ours(mine[:2], "adamw"), torch.optim.AdamW(theirs[:2])
    train(range(3), (mine, opt), (theirs, other))
    for params, each in ((mine, opt), (theirs, other)):
        each.add_param_group({"params": params[2:], "lr": 0.1})
    train(range(3, 6), (mine, opt), (theirs, other))
    assert apart(mine, theirs) <= ULPS
    assert opt.state[mine[0]]["step"] == 6
    assert opt.state[mine[3]]["step"] == 3


def test_parameters_that_are_taken_out_of_a_group_stay_as_they_are() -> None:
    params = parameters()
    opt = ours(params, "adamw", lr=0.1)
    train(range(2), (params, opt))
    opt.param_groups[0]["params"] = params[1:]
    before = params[0].detach().clone()
    train(range(2, 4), (params, opt))
    assert torch.equal(params[0], before)
    assert opt.state[params[1]]["step"] == 4


class Elsewhere(torch.Tensor):  # type: ignore[misc, name-defined]
    """A tensor that has its elements in others, as quantized and distributed ones have."""

    @staticmethod
    def __new__(cls) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, (2,))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls()


def stepped(gradient: Any) -> None:
    """A step with this gradient."""
    p = torch.ones(2)
    opt = ours([p], "sgd")
    p.grad = gradient
    opt.step()


REFUSED: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (TypeError, "iterable", lambda: ours(nn.Parameter(torch.ones(2)), "adamw")),
    (ValueError, "empty", lambda: ours([], "adamw")),
    (TypeError, "can only optimize Tensors", lambda: ours([1.0], "adamw")),
    (TypeError, "ordered", lambda: ours([{"params": {nn.Parameter(torch.ones(2))}}], "adamw")),
    (ValueError, "non-leaf", lambda: ours([nn.Parameter(torch.ones(2)) * 2], "adamw")),
    (ValueError, "more than one", lambda: ours([{"params": [P]}, {"params": [P]}], "adamw")),
    (ValueError, "with/without names", lambda: ours([("a", P), nn.Parameter(torch.ones(1))], "adamw")),
    (TypeError, "learning_rate.*write lr=", lambda: ours([P], "adamw", learning_rate=0.1)),
    (TypeError, "clip_by_global_norm:AdamW has it", lambda: ours([P], "AdamW", max_norm=0.1)),
    (TypeError, "the rule is a name: 'AdamW'", lambda: ours([P], torch.optim.AdamW)),
    (TypeError, "parameters come first", lambda: ours("AdamW", [P])),
    (ValueError, "did you mean 'AdamW'", lambda: ours([P], "ADAMW")),
    (ValueError, "there are adadelta.*RMSprop", lambda: ours([P], "LBFGS")),
    (ValueError, "parameters are on the CPU", lambda: ours([P], "AdamW", target="cuda")),
    (ValueError, "target is 'c' or 'cuda'", lambda: ours([P], "AdamW", target="gpu")),
    (TypeError, "did you mean 'weight_decay'", lambda: ours([P], "adamw", wieght_decay=0.1)),
    (TypeError, r"param_groups\[0\]: 'wieght_decay'", lambda: ours([{"params": [P], "wieght_decay": 0.1}], "adamw")),
    (ValueError, "betas is a tuple of beta1, beta2", lambda: ours([P], "adamw", betas=0.9)),
    (TypeError, "both given", lambda: ours([P], "adamw", betas=(0.9, 0.99), beta1=0.9)),
    (ValueError, "beta1", lambda: ours([P], "adamw", betas=(1.5, 0.99))),
    (ValueError, "lr", lambda: ours([P], "AdamW", lr=-0.1)),
    (ValueError, "NaN", lambda: ours([P], "adamw", lr=float("nan"))),
    (TypeError, "lr is a number", lambda: ours([P], "adamw", lr="0.1")),
    (ValueError, "3 elements", lambda: ours([P], "adamw", lr=torch.ones(3))),
    (TypeError, "LambdaLR", lambda: ours([P], "adamw", lr=lambda t: 0.1)),
    (ValueError, "differentiable", lambda: ours([P], "adamw", differentiable=True)),
    (ValueError, "there is no rule 'adamv'; did you mean", lambda: ours([P], "adamv")),
    (ValueError, "adamw has no amsgrad.*'AdamW'", lambda: ours([{"params": [P], "amsgrad": True}], "adamw")),
    (ValueError, "adam has no weight_decay.*'Adam'", lambda: ours([P], "adam", weight_decay=0.1)),
    (ValueError, "amsgrad", lambda: ours([{"params": [P], "amsgrad": True}, {"params": parameters()}], "AdamW")),
    (TypeError, "complex64.*view_as_real", lambda: ours([nn.Parameter(torch.ones(2, dtype=torch.complex64))], "sgd")),
    (TypeError, "sparse.*to_dense", lambda: ours([torch.eye(3).to_sparse().requires_grad_()], "sgd")),
    (TypeError, "int64", lambda: ours([torch.ones(3, dtype=torch.int64)], "sgd")),
    (ValueError, "contiguous", lambda: ours([torch.ones(6)[::2].requires_grad_()], "sgd")),
    (ValueError, "contiguous", lambda: ours([torch.ones(1).expand(4).clone().expand(2, 4).requires_grad_()], "sgd")),
    (ValueError, "meta", lambda: ours([nn.Parameter(torch.ones(2, device="meta"))], "sgd")),
    (ValueError, "no shape yet: run the model once", lambda: ours(nn.LazyLinear(2).parameters(), "sgd")),
    (TypeError, "an Elsewhere that does not share its memory", lambda: ours([Elsewhere()], "sgd")),
    (TypeError, r"grads\[0\]\[0\] is a Tensor that.*ZeroTensor", lambda: stepped(torch._efficientzerotensor(2))),
    (TypeError, r"grads\[0\]\[0\] is an Elsewhere that does not share", lambda: stepped(Elsewhere())),
]
P = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(("kind", "message", "make"), REFUSED, ids=[message for _, message, _ in REFUSED])
def test_mistakes_are_errors_that_say_what_is_wrong(kind: Any, message: str, make: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_a_group_that_is_refused_is_not_added() -> None:
    params = parameters()
    opt = ours(params[:2], "adamw")
    train(range(2), (params, opt))
    for group in (
        {"params": [torch.ones(2, dtype=torch.int64)]},
        {"params": params[2:], "lr": float("nan")},
        {"params": params[2:], "betas": (2.0, 0.9)},
    ):
        with pytest.raises((TypeError, ValueError)):
            opt.add_param_group(group)
        assert len(opt.param_groups) == 1
    train(range(2, 3), (params, opt))
    assert opt.state[params[0]]["step"] == 3


def test_a_bad_hyperparameter_is_found_at_the_step_before_anything_is_written() -> None:
    params = parameters()
    opt = ours(params, "adamw")
    train(range(1), (params, opt))
    before = [p.detach().clone() for p in params]
    for key, value in (("lr", float("nan")), ("betas", (0.9, 1.5)), ("eps", "no"), ("betas", 3)):
        good = opt.param_groups[0][key]
        opt.param_groups[0][key] = value
        give(params, 7)
        with pytest.raises((TypeError, ValueError), match=r"param_groups\[0\]|beta2|betas|lr"):
            opt.step()
        opt.param_groups[0][key] = good
        assert same(params, before)
        assert opt.state[params[0]]["step"] == 1
    del opt.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="'lr'"):
        opt.step()


def test_sparse_gradients_of_an_embedding_are_refused() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    opt = ours(model.parameters(), "sgd")
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match="sparse=False"):
        opt.step()


# ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("target", ["c", "numpy"])
def test_a_closure_is_evaluated_with_gradients_on(target: str) -> None:
    w = nn.Parameter(torch.tensor([3.0]))
    opt = ours([w], "sgd", target=target, lr=0.25)

    def closure() -> Any:
        opt.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
    assert loss == 9
    assert w == 1.5
    loss, stats = opt.step(closure, stats=True)
    assert loss == 2.25
    assert stats.grad_norm == 3
    assert opt.step() is None


def test_statistics_skip_and_zeroing() -> None:
    params = parameters()
    rule = of.clip_by_global_norm(max_norm=1.0) >> of.rules.adamw
    opt = ours(params, rule, target="c", skip_nonfinite=True, zero_grads=True)
    give(params, 3)
    norm = torch.cat([p.grad.double().flatten() for p in params]).norm()
    stats = opt.step(grad_scale=4.0, stats=True)
    assert stats.grad_norm == pytest.approx(float(norm) / 4, rel=1e-12)
    assert stats.clipped_grad_norm == pytest.approx(1.0, rel=1e-6)
    assert all(not p.grad.any() for p in params)
    before = [p.detach().clone() for p in params]
    give(params, 4)
    params[1].grad[2] = float("nan")
    assert opt.step(stats=True).skipped
    assert same(params, before)
    assert opt.state[params[0]]["step"] == 1


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_a_step_inside_of_what_is_compiled_runs_as_it_is() -> None:
    made = []
    for compiled in (False, True):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 7))
        opt = Optimizer([p], "adamw", lr=0.1)

        def training(p: Any = p, opt: Any = opt) -> None:
            opt.zero_grad()
            (p * p).sum().backward()
            opt.step()

        step = torch.compile(training, backend="eager") if compiled else training
        for _ in range(3):
            step()
        made.append(p.detach())
    assert torch.equal(*made)


class Late(nn.Parameter):
    """A parameter that makes its gradient when it is asked for."""

    made: Any = None

    @property
    def grad(self) -> Any:
        if isinstance(self.made, Exception):
            raise self.made
        return self.made

    @grad.setter
    def grad(self, value: Any) -> None:
        self.made = value


def test_a_gradient_that_cannot_be_read_changes_nothing() -> None:
    params = [Late(torch.ones(3)), Late(torch.ones(2))]
    opt = ours(params, "sgd", "c", lr=0.5)  # whose compiled code reads gradients
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    params[1].made = RuntimeError("not there yet")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^not there yet$"):
            opt.step()
    assert [p.tolist() for p in params] == [[0.5] * 3, [0.5] * 2]
    params[1].grad = None
    opt.step()
    assert [p.tolist() for p in params] == [[0.0] * 3, [0.5] * 2]


def test_hooks_are_called_in_order_and_may_change_arguments() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    params, seen = parameters(), []
    opt = ours(params, "sgd")
    handles = [
        register_optimizer_step_pre_hook(lambda opt, args, kwargs: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda opt, args, kwargs: seen.append("global post")),
        opt.register_step_pre_hook(lambda own, args, kwargs: seen.append(("pre", own is opt, len(args), kwargs))),
        opt.register_step_post_hook(lambda own, args, kwargs: seen.append("post")),
    ]
    give(params, 1)
    opt.step()
    assert seen == ["global pre", ("pre", True, 1, {}), "post", "global post"]
    for handle in handles:
        handle.remove()
    opt.step()
    assert len(seen) == 4
    handle = opt.register_step_pre_hook(lambda own, args, kwargs: (args, {"stats": True}))
    assert opt.step().skipped is False
    handle.remove()

    opt.register_state_dict_pre_hook(lambda own: seen.append("save"))
    opt.register_state_dict_post_hook(lambda own, saved: {**saved, "more": 1})
    opt.register_load_state_dict_pre_hook(lambda own, saved: {k: v for k, v in saved.items() if k != "more"})
    opt.register_load_state_dict_post_hook(lambda own: seen.append("loaded"))
    saved = opt.state_dict()
    assert saved["more"] == 1
    opt.load_state_dict(saved)
    assert seen[-2:] == ["save", "loaded"]


def test_the_profiler_sees_steps() -> None:
    params = parameters()
    opt = ours(params, "sgd")
    give(params, 1)
    with torch.profiler.profile() as profile:
        opt.step()
        opt.zero_grad()
    names = [event.key for event in profile.key_averages()]
    assert "Optimizer.step#Optimizer.step" in names


def test_zero_grad_is_torchs() -> None:
    params = parameters()
    opt = ours(params, "sgd")
    give(params, 1)
    opt.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in params)
    opt.zero_grad()
    assert all(p.grad is None for p in params)
    before = [p.detach().clone() for p in params]
    opt.step()
    assert same(params, before)


SCHEDULERS: dict[str, Callable[[Any, Any], Any]] = {
    "LambdaLR": lambda s, opt: s.LambdaLR(opt, lambda k: 0.9**k),
    "MultiplicativeLR": lambda s, opt: s.MultiplicativeLR(opt, lambda k: 0.9),
    "StepLR": lambda s, opt: s.StepLR(opt, 2, 0.5),
    "MultiStepLR": lambda s, opt: s.MultiStepLR(opt, [2, 5], 0.5),
    "ConstantLR": lambda s, opt: s.ConstantLR(opt, 0.4, 3),
    "LinearLR": lambda s, opt: s.LinearLR(opt, 0.4, total_iters=4),
    "ExponentialLR": lambda s, opt: s.ExponentialLR(opt, 0.8),
    "PolynomialLR": lambda s, opt: s.PolynomialLR(opt, 7, 2.0),
    "CosineAnnealingLR": lambda s, opt: s.CosineAnnealingLR(opt, 6),
    "CosineAnnealingWarmRestarts": lambda s, opt: s.CosineAnnealingWarmRestarts(opt, 3),
    "CyclicLR": lambda s, opt: s.CyclicLR(opt, 0.01, 0.1, 3),
    "OneCycleLR": lambda s, opt: s.OneCycleLR(opt, 0.1, 9),
    "ReduceLROnPlateau": lambda s, opt: s.ReduceLROnPlateau(opt, patience=1),
    "SequentialLR": lambda s, opt: s.SequentialLR(
        opt, [s.ConstantLR(opt, 0.1, 2), s.ExponentialLR(opt, 0.9)], milestones=[3]
    ),
    "ChainedScheduler": lambda s, opt: s.ChainedScheduler([s.ConstantLR(opt, 0.1, 2), s.ExponentialLR(opt, 0.9)]),
    "SWALR": lambda s, opt: torch.optim.swa_utils.SWALR(opt, 0.05, anneal_epochs=4),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, tensor: bool) -> None:
    """The same rates and momenta as torch.optim has, and steps that go by them."""
    mine, theirs, made = parameters(), parameters(), []
    for params, make in ((mine, lambda p, **s: ours(p, "adamw", **s)), (theirs, torch.optim.AdamW)):
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": torch.tensor(0.02) if tensor else 0.02}]
        opt = make(groups, lr=torch.tensor(0.05) if tensor else 0.05, betas=(0.85, 0.9))
        made.append((params, opt, SCHEDULERS[name](torch.optim.lr_scheduler, opt)))
    for step in range(8):
        rates = []
        for params, opt, scheduler in made:
            give(params, step)
            opt.step()
            scheduler.step(*((1.0,) if name == "ReduceLROnPlateau" else ()))
            rates.append([(float(group["lr"]), group["betas"]) for group in opt.param_groups])
        assert rates[0] == rates[1]
    assert rates[0] != [(0.05, (0.85, 0.9)), (0.02, (0.85, 0.9))]
    assert apart(mine, theirs) <= ULPS


def test_a_momentum_that_a_scheduler_turns_on_begins_its_buffer() -> None:
    mine, theirs, made = parameters(), parameters(), []
    for params, make in ((mine, lambda p, **s: ours(p, "SGD", **s)), (theirs, torch.optim.SGD)):
        opt = make(params, lr=0.1)
        made.append((params, opt))
        train(range(2), (params, opt))
        opt.param_groups[0]["momentum"] = 0.9
        train(range(2, 5), (params, opt))
    assert apart(mine, theirs) <= ULPS
    assert "momentum_buffer" in made[0][1].state[mine[0]]


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(unscale: bool) -> None:
    """A scaled training with a step that overflows goes as torch.optim's does."""
    mine, theirs, made = parameters(), parameters(), []
    for params, make in ((mine, lambda p: ours(p, "adamw", target="c")), (theirs, torch.optim.AdamW)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        made.append((params, make(params), scaler))
    for step in range(8):
        scales = []
        for params, opt, scaler in made:
            opt.zero_grad()
            generator = torch.Generator().manual_seed(step)
            loss = sum((p * torch.randn(p.shape, generator=generator)).sum() for p in params)
            scaler.scale(loss * (float("inf") if step == 4 else 1)).backward()
            if unscale:
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(opt)
            scaler.update()
            scales.append(scaler.get_scale())
        assert scales[0] == scales[1]
    assert apart(mine, theirs) <= ULPS
    opt = made[0][1]
    assert opt.state[mine[0]]["step"] == 7
    assert not hasattr(opt, "found_inf")


def test_a_step_that_grad_scaler_skips_has_statistics() -> None:
    params = parameters()
    opt, scaler = ours(params, "adamw"), torch.amp.GradScaler("cpu")
    scaler.scale(sum(p.sum() for p in params) * float("inf")).backward()
    assert scaler.step(opt, stats=True).skipped


def test_a_step_that_grad_scaler_skips_zeroes_the_gradients_all_the_same() -> None:
    params = parameters()
    opt, scaler = ours(params, "adamw", zero_grads=True), torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in params]
    for factor in (float("inf"), 1.0):
        scaler.scale(sum(p.sum() for p in params) * factor).backward()
        scaler.step(opt)
        scaler.update()
        assert all(p.grad is not None and not p.grad.any() for p in params)
        assert same(params, before) == (factor != 1.0)


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("target", ["c", "numpy"])
def test_memory_formats_are_stepped_as_they_lie(target: str) -> None:
    """Channels-last and transposed parameters train like contiguous ones, bit for bit, and gradients may lie otherwise."""
    generator = torch.Generator().manual_seed(2)
    image, matrix = torch.randn(4, 3, 5, 5, generator=generator), torch.randn(6, 9, generator=generator)
    odd = [
        nn.Parameter(image.clone(memory_format=torch.channels_last)),
        nn.Parameter(matrix.T.contiguous().T),
        nn.Parameter(torch.randn(2, 3, 4, generator=generator).permute(1, 2, 0)),
    ]
    plain = [nn.Parameter(p.detach().contiguous().clone()) for p in odd]
    places = [p.data_ptr() for p in odd]
    one, two = (ours(params, "adamw", target=target, lr=0.1, zero_grads=True) for params in (odd, plain))
    for seed in range(4):
        give(plain, seed)
        for p, q in zip(odd, plain, strict=True):
            p.grad = torch.empty_like(p).copy_(q.grad) if seed != 2 else q.grad.clone()
        one.step()
        two.step()
        assert not any(p.grad.any() for p in odd)
    assert same(odd, plain)
    assert [p.data_ptr() for p in odd] == places
    assert odd[0].is_contiguous(memory_format=torch.channels_last)
    state = one.state[odd[0]]["exp_avg"]
    assert state.stride() == odd[0].stride()
    assert torch.equal(state, two.state[plain[0]]["exp_avg"])
    two.load_state_dict(one.state_dict())
    one.load_state_dict(copy.deepcopy(two.state_dict()))
    train(range(5, 7), (odd, one), (plain, two))
    assert same(odd, plain)


def test_a_model_that_is_moved_is_followed() -> None:
    """Other memory, another layout and another dtype, set by a module in place of what there was."""
    params = [nn.Parameter(p.detach().clone()) for p in parameters()]
    opt, judge = ours(params, "adamw", target="c", lr=0.1), parameters()
    other = torch.optim.AdamW(judge, lr=0.1)
    train(range(2), (params, opt), (judge, other))
    params[0].data = params[0].data.clone()
    train(range(2, 4), (params, opt), (judge, other))
    params[0].data = params[0].data.T.contiguous().T
    train(range(4, 6), (params, opt), (judge, other))
    assert apart(params, judge) <= ULPS
    assert opt.state[params[0]]["exp_avg"].stride() == params[0].stride()
    for p in (*params, *judge):
        p.grad, p.data = None, p.data.double()
    other.load_state_dict(other.state_dict())
    train(range(6, 8), (params, opt))
    assert params[0].dtype == opt.state[params[0]]["exp_avg"].dtype == torch.float64
    assert opt.state[params[0]]["step"] == 8


@pytest.mark.parametrize("format", [torch.bfloat16, *([torch.float16] if FULL else [])])
@pytest.mark.parametrize(
    "how", [{"master": "f32"}, {"rounding": "stochastic", "seed": 3}, {"store": {"m": "bf16"}}, {}]
)
def test_parameters_of_16_bits(format: Any, how: dict[str, Any]) -> None:
    """The bits of `optforge.Optimizer`, and through a state dict, with masters that state dicts of PyTorch lack."""
    generator = torch.Generator().manual_seed(5)
    values = [torch.randn(shape, generator=generator).to(format) for shape in ((40, 3), (7,))]
    params, judge = [nn.Parameter(v.clone()) for v in values], [v.clone() for v in values]
    opt = ours(params, "adamw", target="c", lr=0.01, **how)
    reference = of.Optimizer(judge, "adamw", lr=0.01, **how)
    for seed in range(6):
        if seed == 3:
            file = io.BytesIO()
            torch.save(opt.state_dict(), file)
            file.seek(0)
            opt = ours(params, "adamw", target="c", lr=1.0, **how)
            opt.load_state_dict(torch.load(file, weights_only=True))
        give(params, seed)
        grads = [p.grad.clone() for p in params]
        opt.step()
        reference.step(grads)
    assert same(params, judge)
    state = opt.state[params[0]]
    assert state["exp_avg"].dtype == (torch.bfloat16 if "store" in how else torch.float32)
    assert ("p_master" in state) == ("master" in how)


def test_a_split_master_survives_a_state_dict() -> None:
    params = [nn.Parameter(torch.randn(50).bfloat16())]
    judge = [p.detach().clone().requires_grad_() for p in params]
    opt, other = (ours(each, "adamw", target="c", lr=1e-3, master="split") for each in (params, judge))
    train(range(3), (params, opt), (judge, other))
    saved = copy.deepcopy(opt.state_dict())
    opt = ours(params, "adamw", target="c", lr=1e-3, master="split")
    opt.load_state_dict(saved)
    train(range(3, 9), (params, opt), (judge, other))
    assert same(params, judge)


def test_autograd_is_told_of_writes() -> None:
    w = nn.Parameter(torch.ones(3))
    opt = ours([w], "sgd", target="c")
    loss = (w**2).sum()
    w.grad = torch.ones(3)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ── resuming ────────────────────────────────────────────────────────────────────────────────────────────────────────


def model() -> Any:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def fit(net: Any, opt: Any, steps: range) -> None:
    for seed in steps:
        opt.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        (net(torch.randn(4, 5, generator=generator)) ** 2).mean().backward()
        opt.step()


@pytest.mark.parametrize("rule", ["adamw", "novograd", "NAdam", "clip_by_global_norm:adamw"])
def test_a_state_dict_goes_through_a_file(rule: str) -> None:
    net, judge = model(), model()
    opt, other = ours(net.parameters(), rule), ours(judge.parameters(), rule)
    fit(net, opt, range(3))
    fit(judge, other, range(6))
    file = io.BytesIO()
    torch.save({"opt": opt.state_dict(), "net": net.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert all(isinstance(v, torch.Tensor) for entry in saved["opt"]["state"].values() for v in entry.values())
    fresh = model()
    opt = ours(fresh.parameters(), rule, lr=123.0)
    fresh.load_state_dict(saved["net"])
    opt.load_state_dict(saved["opt"])
    fit(fresh, opt, range(3, 6))
    assert same([*fresh.parameters()], [*judge.parameters()])


def test_what_is_loaded_is_copied() -> None:
    net = model()
    opt = ours(net.parameters(), "adamw")
    fit(net, opt, range(2))
    saved = opt.state_dict()
    other = ours(model().parameters(), "adamw")
    other.load_state_dict(saved)
    other.param_groups[0]["lr"] = 5.0
    next(iter(other.state.values()))["exp_avg"].zero_()
    assert opt.param_groups[0]["lr"] != 5.0
    assert next(iter(opt.state.values()))["exp_avg"].any()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_go_on_with_the_same_bits(how: str) -> None:
    net = model()
    opt = ours(net.parameters(), of.clip_by_global_norm(max_norm=0.5) >> of.rules.adamw, lr=0.01)
    fit(net, opt, range(3))
    if how == "deepcopy":
        twin, its = copy.deepcopy((net, opt))
    elif how == "pickle":
        twin, its = pickle.loads(pickle.dumps((net, opt)))
    else:
        file = io.BytesIO()
        torch.save((net, opt), file)
        file.seek(0)
        twin, its = torch.load(file, weights_only=False)
    assert next(iter(its.param_groups[0]["params"])) is next(twin.parameters())
    fit(net, opt, range(3, 6))
    fit(twin, its, range(3, 6))
    assert same([*net.parameters()], [*twin.parameters()])
    assert its.state[next(twin.parameters())]["step"] == 6


@pytest.mark.parametrize("name", [*OF_TORCH, "adam", "sgd", "lamb"])
def test_every_optimizer_can_be_copied(name: str) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    opt = Optimizer([p], name, lr=0.5, target="numpy")
    p.grad = torch.ones(3)
    opt.step()
    for (twin,), its in (copy.deepcopy(([p], opt)), pickle.loads(pickle.dumps(([p], opt)))):
        twin.grad = torch.full((3,), 2.0)
        its.step()
        assert not same([twin], [p])
    p.grad = torch.full((3,), 2.0)
    opt.step()
    assert same([twin], [p])


@pytest.mark.parametrize("name", [*RUN, "param_names", "betas"])
def test_a_name_that_parameter_groups_have_themselves(name: str, tmp_path: Any) -> None:
    file = tmp_path / "mine.py"
    text = (
        f"def mine(p, g, *, lr=0.1, beta1=0.5, beta2=0.5, {name}=1.0):\n    p = p - lr * {name} * beta1 * beta2 * g\n"
    )
    file.write_text(f"from optforge import rule\n\n@rule\n{text}    return p\n")
    with pytest.raises(of.UsageError, match=f"^parameter groups of PyTorch use the name '{name}' of rule 'mine'"):
        Optimizer([torch.nn.Parameter(torch.ones(2))], f"{file}:mine")


def test_a_group_without_a_place_in_its_betas_is_told_which() -> None:
    opt, other = (Optimizer([torch.nn.Parameter(torch.ones(2))], name, target="numpy") for name in ("AdamW", "sgd"))
    with pytest.raises(ValueError, match=r"^param_groups\[0\]: it has no 'betas' with beta1 at place 0, which AdamW"):
        opt.load_state_dict({"state": {}, "param_groups": other.state_dict()["param_groups"]})


def by_layer(net: Any, **settings: Any) -> list[dict[str, Any]]:
    named = list(net.named_parameters())
    return [{"params": named[2:], **settings}, {"params": named[:2], **settings}]


def test_other_groups_are_found_by_name() -> None:
    net, judge = model(), model()
    opt, other = ours(net.named_parameters(), "adamw", lr=0.01), ours(judge.named_parameters(), "adamw", lr=0.01)
    fit(net, opt, range(2))
    fit(judge, other, range(4))
    split = ours(by_layer(net), "adamw", lr=0.5)
    split.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert [group["lr"] for group in split.param_groups] == [0.01, 0.01]
    assert split.param_groups[1]["param_names"] == ["0.weight", "0.bias"]
    fit(net, split, range(2, 4))
    assert same([*net.parameters()], [*judge.parameters()])
    again = ours(net.named_parameters(), "adamw")
    again.load_state_dict(split.state_dict())
    split.param_groups[0]["lr"] = 0.02
    with pytest.raises(ValueError, match="hyperparameters differ"):
        again.load_state_dict(split.state_dict())
    with pytest.raises(ValueError, match=r"other parameters.*lacks .*'2\.weight'"):
        again.load_state_dict(ours(nn.Linear(2, 2).named_parameters(), "adamw").state_dict() | {"state": {}})
    with pytest.raises(ValueError, match=r"groups of \[2, 2\] parameters, here are \[4\].*named_parameters"):
        ours(net.parameters(), "adamw").load_state_dict(split.state_dict())


def test_state_that_is_edited_is_what_steps_go_on_from() -> None:
    params, judge = parameters(), parameters()
    opt, other = ours(params, "adamw"), torch.optim.AdamW(judge)
    train(range(3), (params, opt), (judge, other))
    for own, each in ((params, opt), (judge, other)):
        each.state[own[0]]["exp_avg"].mul_(0.5)  # in place
        each.state[own[1]]["exp_avg"] = torch.ones(33)  # another tensor
        each.state[own[2]]["step"] += 4
        each.state.pop(own[3])
    train(range(3, 5), (params, opt), (judge, other))
    assert apart(params, judge) <= ULPS
    for each in (opt, other):
        each.state.clear()
    train(range(5, 7), (params, opt), (judge, other))
    assert apart(params, judge) <= ULPS
    assert opt.state[params[0]]["step"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["state"][0].pop("exp_avg"), "lacks 'exp_avg'"),
        (lambda saved: saved["state"][0].pop("step"), "lacks 'step'"),
        (lambda saved: saved["state"][0].update(exp_avg=torch.ones(2)), "shape"),
        (lambda saved: saved["state"][0].update(step=-1), "whole number"),
        (lambda saved: saved["state"][0].update(exp_avg=3.0), "not a tensor"),
        (lambda saved: saved["param_groups"][0].pop("lr"), "'lr'"),
        (lambda saved: saved["param_groups"][0].update(lr=float("nan")), "NaN"),
        (lambda saved: saved["param_groups"].append({"params": []}), "groups"),
        (lambda saved: saved["state"].update({9: {"step": 1}}), "state of 9"),
        (lambda saved: saved.pop("state"), "has 'state'"),
    ],
    ids=["state", "step", "shape", "count", "number", "lr", "nan", "groups", "homeless", "whole"],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(change: Callable[[Any], Any], message: str) -> None:
    params = parameters()
    opt = ours(params, "adamw")
    train(range(2), (params, opt))
    saved = copy.deepcopy(opt.state_dict())
    before = copy.deepcopy(saved)
    change(saved)
    with pytest.raises((TypeError, ValueError), match=message):
        opt.load_state_dict(saved)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for k, entry in before["state"].items():
        assert all(torch.equal(after["state"][k][key], value) for key, value in entry.items())


def test_rules_of_files_and_of_users(tmp_path: Any) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from optforge import rule, sign\n\n\n@rule\ndef lion(p, g, m=0.0, *, lr=1e-2, beta1=0.9, beta2=0.99):\n"
        "    update = sign(beta1 * m + (1 - beta1) * g)\n    m = beta2 * m + (1 - beta2) * g\n"
        "    p = p - lr * update\n    return p, m\n"
    )
    net, twin = model(), model()
    opt = ours(net.parameters(), f"{file}:lion", betas=(0.8, 0.9))
    other = ours(twin.parameters(), of.Rule.from_file(file, "lion"), beta1=0.8, beta2=0.9)
    fit(net, opt, range(3))
    fit(twin, other, range(3))
    assert same([*net.parameters()], [*twin.parameters()])
    assert [*opt.state[next(net.parameters())]] == ["step", "m"]
    assert repr(opt).startswith("lion Optimizer (")
    assert isinstance(opt, torch.optim.Optimizer)


def test_the_docs_run(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of docs/pytorch.md in one script, but for what wants several processes."""
    text, blocks = PAGE.read_text(encoding="utf-8"), python_blocks(PAGE)
    script = tmp_path / "script.py"
    script.write_text("\n".join(blocks).replace("range(100)", "range(5)"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("optforge.torch.stepper.USUAL", TARGET)
    names = runpy.run_path(str(script))
    assert names["stats"].grad_norm > 0
    assert names["low"].weight.dtype == torch.bfloat16
    listed = set(re.findall(r"`([A-Z][A-Za-z ]+)`", text.split("| `foreach=True`")[0]))
    assert set(OF_TORCH) <= {word for words in listed for word in words.split()} | {"AdamW", "Adam", "SGD"}


# ── masters in state dicts, and what is given instead of parameters ─────────────────────────────────────────────────


@pytest.mark.parametrize(("wrote", "reads"), [("f32", None), ("f32", "split"), ("split", "f32"), ("split", None)])
def test_a_master_goes_to_the_same_master_alone(wrote: str, reads: str | None) -> None:
    """It would be left where it is otherwise, and be taken for the truth later."""
    params = [[torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))] for _ in range(2)]
    first, other = (
        Optimizer(own, "AdamW", lr=0.1, master=how, target="numpy")
        for own, how in zip(params, (wrote, reads), strict=True)
    )
    params[0][0].grad = torch.ones_like(params[0][0])
    first.step()
    before = params[1][0].clone()
    with pytest.raises(
        ValueError, match=r"has 'p_\w+', and this Optimizer (no master|master='\w+'): give it the master"
    ):
        other.load_state_dict(first.state_dict())
    assert not other.state and torch.equal(params[1][0], before)


def test_a_model_is_no_collection_of_parameters() -> None:
    for model in (torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.Linear(2, 3))):
        with pytest.raises(TypeError, match=r"write Optimizer\(model\.parameters\(\), …\)"):
            Optimizer(model, "AdamW", lr=0.1)
