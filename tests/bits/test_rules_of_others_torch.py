"""Rules of others beside the optimizers of PyTorch: their own, and those that become one of them at some setting.

Both take the same gradients for a few steps, each from its own parameters and state. They differ by rounding alone: what
is allowed is a multiple of the dtype's eps, of the parameter and of the largest update of its tensor in any step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

import optforge as of
from conftest import require_torch
from data import DTYPES
from others import SIZES, spread, start
from rules_of_others import CASES, RULES, label, settings

STEPS = 10
ALLOWED = 24  # of eps, after STEPS steps; the farthest are 13 apart

Settings = Mapping[str, float]
Options = Mapping[str, Any]


def adam(h: Settings, **more: Any) -> dict[str, Any]:
    """What PyTorch calls the hyperparameters of a rule like Adam."""
    rest = {key: h[key] for key in ("lr", "eps", "weight_decay") if key in h}
    return {**rest, "betas": (h["beta1"], h["beta2"]), **more}


OWN: dict[str, Callable[[Settings, Options], tuple[str, dict[str, Any]]]] = {
    "torch_adam": lambda h, o: ("Adam", adam(h, **o)),
    "torch_adamw": lambda h, o: ("AdamW", adam(h, **o)),
    "torch_nadam": lambda h, o: ("NAdam", adam(h, momentum_decay=h["momentum_decay"], **o)),
    "torch_radam": lambda h, o: ("RAdam", adam(h, **o)),
    "torch_adamax": lambda h, o: ("Adamax", adam(h, **o)),
    "torch_asgd": lambda h, o: ("ASGD", {**h, **o}),
    "torch_adagrad": lambda h, o: ("Adagrad", {**h, **o}),
    "torch_adadelta": lambda h, o: ("Adadelta", {**h, **o}),
    "torch_rmsprop": lambda h, o: (
        "RMSprop",
        {
            **h,
            "momentum": h["momentum"] if o["with_momentum"] else 0.0,
            "centered": o["centered"],
            "maximize": o["maximize"],
        },
    ),
    "torch_rprop": lambda h, o: (
        "Rprop",
        {
            "lr": h["lr"],
            "etas": (h["etaminus"], h["etaplus"]),
            "step_sizes": (h["step_size_min"], h["step_size_max"]),
            **o,
        },
    ),
    "torch_sgd": lambda h, o: (
        "SGD",
        {
            **h,
            "momentum": 0.0 if o["plain"] else h["momentum"],
            "nesterov": o["nesterov"] and not o["plain"],
            "maximize": o["maximize"],
        },
    ),
    "torch_adafactor": lambda h, o: (
        "Adafactor",
        {
            "lr": h["lr"],
            "beta2_decay": h["beta2_decay"],
            "eps": (h["eps1"], h["eps2"]),
            "d": h["d"],
            "weight_decay": h["weight_decay"],
            **o,
        },
    ),
}

# A rule, its options and settings, and what it is then in PyTorch.
ADAM = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-6}
ROOTS = {"lr": 0.02, "eps": 1e-6}
BETAS = {"beta1": 0.8, "beta2": 0.9}
GREEK = {"lr": 0.02, "β1": 0.8, "β2": 0.9}
BECOMES: dict[str, tuple[Options, Settings, str, dict[str, Any]]] = {
    "ademamix": (
        {"scheduled": False},
        {**GREEK, "eps": 1e-6, "α": 0.0, "weight_decay": 0.1},
        "AdamW",
        {**ADAM, "weight_decay": 0.1},
    ),
    "qhadam": (
        {"decouple": False},
        {**ROOTS, **BETAS, "nu1": 1.0, "nu2": 1.0, "weight_decay": 0.1},
        "Adam",
        {**ADAM, "weight_decay": 0.1},
    ),
    "kahan_adamw": ({}, {**ROOTS, **BETAS, "weight_decay": 0.1}, "AdamW", {**ADAM, "weight_decay": 0.1}),
    "lookahead_adam": ({}, {**GREEK, "ε": 1e-6, "k": 2.0, "α": 1.0}, "Adam", ADAM),
    "adam_mini": ({}, {**ROOTS, **BETAS, "weight_decay": 0.1}, "AdamW", {**ADAM, "weight_decay": 0.1}),
    "qhm": ({}, {"lr": 0.5, "beta": 0.8, "nu": 1.0}, "SGD", {"lr": 0.1, "momentum": 0.8}),
    "aggmo": ({}, {"lr": 0.1, "beta_1": 0.8, "beta_2": 0.8, "beta_3": 0.8}, "SGD", {"lr": 0.1, "momentum": 0.8}),
    "nag": ({}, {"lr": 0.1, "μ": 0.8}, "SGD", {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    "heavy_ball": ({}, {"lr": 0.1, "momentum": 0.8}, "SGD", {"lr": 0.1, "momentum": 0.8}),
    "sm3": ({}, {"lr": 0.1, "eps": 1e-30}, "Adagrad", {"lr": 0.1, "eps": 1e-30}),
    "polyak_sgd": ({}, {"lr": 0.1, "start": 3.0}, "ASGD", {"lr": 0.1, "lambd": 0.0, "alpha": 0.0, "t0": 2.0}),
    "adafactor": ({}, {}, "Adafactor", {"lr": 0.01, "eps": (1e-15, 1e-3)}),
}


class Beside:
    """An Optimizer and one of PyTorch, from the same parameters."""

    def __init__(self, rule: of.Rule, how: Mapping[str, Any], torch: Any, kind: str, given: Any, first: list[Any]):
        self.torch = torch
        self.own = of.Optimizer([p.copy() for p in first], rule, target="numpy", **how)
        self.theirs = [torch.from_numpy(p.copy()).requires_grad_() for p in first]
        self.optimizer = getattr(torch.optim, kind)(self.theirs, foreach=False, **given)
        self.longest = [0.0] * len(first)

    def step(self, rng: np.random.Generator, where: str) -> float:
        """A step of both; how far they are apart, in what is allowed for one."""
        grads = [spread(rng, p.size, p.dtype) for p in self.own.params]
        before = [p.copy() for p in self.own.params]
        self.own.step([g.copy() for g in grads])
        for p, g in zip(self.theirs, grads, strict=True):
            p.grad = self.torch.from_numpy(g.copy())
        self.optimizer.step()
        worst = 0.0
        for k, (own, theirs) in enumerate(zip(self.own.params, self.theirs, strict=True)):
            self.longest[k] = max(self.longest[k], float(np.abs(own - before[k]).max()))
            apart = np.abs(own.astype(np.float64) - theirs.detach().numpy())
            assert np.isfinite(apart).all(), where
            unit = np.finfo(own.dtype).eps * (np.maximum(np.abs(own), np.abs(before[k])) + self.longest[k])
            worst = max(worst, float((apart / unit).max()))
        assert self.longest[-1] > 1e-5, where
        return worst


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> Any:
    """The dtype of parameters; PyTorch keeps some scalars in its default one, which is then the wider."""
    torch = require_torch()
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield request.param
    torch.set_default_dtype(usual)


OWN_CASES = [(name, options) for name, options in CASES if name in OWN]


def test_all_that_pytorch_has_are_compared() -> None:
    assert {name for name in RULES if name.startswith("torch_")} == set(OWN)


@pytest.mark.parametrize(("name", "options"), OWN_CASES, ids=[label(*case) for case in OWN_CASES])
def test_rules_of_pytorch(name: str, options: Options, dtype: Any) -> None:
    hyper = settings(name)
    if options.get("nesterov") and not options["plain"]:
        hyper["dampening"] = 0.0  # as PyTorch demands
    beside, rng = own(name, options, hyper, hyper, dtype)
    for t in range(1, STEPS + 1):
        assert beside.step(rng, f"step {t}") <= ALLOWED


def own(name: str, options: Options, hyper: Settings, theirs: Settings, dtype: Any) -> tuple[Beside, Any]:
    """A rule and PyTorch's, with settings for each; what gives their gradients."""
    rng = np.random.default_rng(7)
    kind, given = OWN[name](theirs, options)
    return Beside(RULES[name], {**hyper, **options}, require_torch(), kind, given, start(rng, dtype)), rng


@pytest.mark.parametrize("name", OWN)
def test_a_setting_that_is_off_is_seen(name: str) -> None:
    """Every hyperparameter of a rule a thousandth away from PyTorch's, under options that read it."""
    options = {**RULES[name].options, **({"with_momentum": True} if name == "torch_rmsprop" else {})}
    for key, value in settings(name).items():
        beside, rng = own(name, options, {**settings(name), key: value * 1.001}, settings(name), np.float64)
        assert max(beside.step(rng, f"step {t}") for t in range(1, STEPS + 1)) > 100 * ALLOWED, key


@pytest.mark.parametrize("name", BECOMES)
def test_rules_that_become_one_of_pytorch(name: str, dtype: Any) -> None:
    options, hyper, kind, given = BECOMES[name]
    rng = np.random.default_rng(8)
    # One second moment for a tensor is Adam's for tensors of one element.
    first = start(rng, dtype, [1] * 40 if name == "adam_mini" else SIZES)
    beside = Beside(RULES[name], {**hyper, **options}, require_torch(), kind, given, first)
    for t in range(1, STEPS + 1):
        assert beside.step(rng, f"step {t}") <= ALLOWED


def test_a_rate_within_the_rule_is_a_schedule_of_pytorch(dtype: Any) -> None:
    torch, rng = require_torch(), np.random.default_rng(9)
    hyper = {"factor": 2.0, "model_size": 64.0, "warmup": 4.0, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6}
    beside = Beside(RULES["noam_adam"], hyper, torch, "Adam", {**ADAM, "lr": 2.0}, start(rng, dtype))
    rate = torch.optim.lr_scheduler.LambdaLR(
        beside.optimizer, lambda epoch: 64**-0.5 * min((epoch + 1) ** -0.5, (epoch + 1) * 4**-1.5)
    )
    for t in range(1, STEPS + 1):
        assert beside.step(rng, f"step {t}") <= ALLOWED
        rate.step()
