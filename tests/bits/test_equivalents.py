"""The page of equivalents: each row runs beside the library that it names, and the two move parameters alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import optforge as of
from conftest import require_jax, require_torch
from optforge.library.rule import Rule
from pages import PAGES, python_blocks

PAGE = PAGES / "equivalents.md"
STEPS = 6
RNG = np.random.default_rng(5)
SHAPE = (3, 60)
START = RNG.standard_normal(SHAPE)
# Of many sizes, so that it shows where an eps stands, and of another size in each step.
GRADS = [RNG.standard_normal(SHAPE) * 10.0 ** RNG.uniform(-12, 4, SHAPE) for _ in range(STEPS)]
GRADS[2][0, :5] = 0.0
RATE = [0.01, 0.01, 0.01, 0.002, 0.002, 0.05]

Array = np.ndarray[Any, np.dtype[np.float64]]
Move = Callable[[Array, list[Array]], Array]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rule]:
    """The rules of the page, by name."""
    (text,) = python_blocks(PAGE)
    path = tmp_path_factory.mktemp("page") / "theirs.py"
    path.write_text(text)
    names = [line.removeprefix("def ").partition("(")[0] for line in text.splitlines() if line.startswith("def ")]
    return {name: Rule.from_file(path, name) for name in names}


def ours(rule: Rule | str, rates: list[float] | None = None, **settings: Any) -> Array:
    """Parameters after the steps of a rule of ours."""
    p = START.copy()
    opt = of.Optimizer([p], rule, target="numpy", **settings)
    for k, g in enumerate(GRADS):
        if rates is not None:
            opt.lr = rates[k]
        opt.step([g])
    return p


def alike(one: Array, other: Array) -> bool:
    """Whether parameters have moved alike, to 9 digits of the move or to the last of the parameter itself."""
    allowed = 1e-9 * np.abs(other - START) + 8 * np.spacing(np.abs(START) + np.abs(other))
    return bool((np.abs(one - other) <= allowed).all())


# ── PyTorch ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def torch_moves(name: str, rates: list[float] | None = None, **settings: Any) -> Array:
    """Parameters after the steps of an optimizer of PyTorch."""
    torch = require_torch()
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of its scalar state, too
    try:
        p = torch.nn.Parameter(torch.tensor(START))
        opt = getattr(torch.optim, name)([p], **settings)
        for k, g in enumerate(GRADS):
            if rates is not None:
                opt.param_groups[0]["lr"] = rates[k]
            p.grad = torch.tensor(g)
            opt.step()
        return p.detach().numpy()
    finally:
        torch.set_default_dtype(usual)


TORCH = [
    ("SGD", {"lr": 0.01}, "sgd", {"lr": 0.01}),
    ("SGD", {"lr": 0.01, "momentum": 0.9}, "momentum", {"lr": 0.01, "momentum": 0.9}),
    ("SGD", {"lr": 0.01, "momentum": 0.9, "nesterov": True}, "nesterov", {"lr": 0.01, "momentum": 0.9}),
    ("SGD", {"lr": 0.01, "momentum": 0.8, "dampening": 0.3}, "torch_sgd", {"lr": 0.01, "momentum": 0.8, "dampening": 0.3}),
    ("SGD", {"lr": 0.01, "momentum": 0.8, "nesterov": True}, "torch_sgd", {"lr": 0.01, "momentum": 0.8, "nesterov": True}),
    ("SGD", {"lr": 0.01, "weight_decay": 0.1}, "add_weight_decay:sgd", {"lr": 0.01, "weight_decay": 0.1}),
    ("Adagrad", {}, "torch_adagrad", {}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.2, "eps": 1e-4}, "torch_adagrad", {"lr": 0.1, "lr_decay": 0.2, "eps": 1e-4}),
    ("Adadelta", {}, "adadelta", {"rho": 0.9}),
    ("RMSprop", {}, "torch_rmsprop", {}),
    ("RMSprop", {"alpha": 0.8, "momentum": 0.7, "eps": 1e-3}, "torch_rmsprop", {"alpha": 0.8, "momentum": 0.7, "eps": 1e-3}),
    ("RMSprop", {"centered": True, "eps": 1e-2}, "torch_rmsprop", {"centered": True, "eps": 1e-2}),
    ("Adam", {}, "adam", {"lam": 1, "eps": 1e-8}),
    ("Adam", {"weight_decay": 0.1}, "add_weight_decay:adam", {"lam": 1, "eps": 1e-8, "weight_decay": 0.1}),
    ("Adam", {"amsgrad": True}, "torch_amsgrad", {}),
    ("AdamW", {}, "adamw", {}),
    ("Adamax", {}, "torch_adamax", {}),
    ("NAdam", {}, "torch_nadam", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "rule", "settings"), TORCH, ids=lambda value: str(value)[:40])
def test_pytorch(
    name: str, given: dict[str, Any], rule: str, settings: dict[str, Any], theirs: dict[str, Rule]
) -> None:
    assert alike(ours(theirs.get(rule, rule), **settings), torch_moves(name, **given))


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_of_pytorch_where_the_rate_changes(nesterov: bool, theirs: dict[str, Rule]) -> None:
    expected = torch_moves("SGD", RATE, lr=0.01, momentum=0.9, nesterov=nesterov)
    assert alike(ours(theirs["torch_sgd"], RATE, momentum=0.9, nesterov=nesterov), expected)
    assert not alike(ours("nesterov" if nesterov else "momentum", RATE, momentum=0.9), expected)


def test_what_is_said_not_to_be_the_same_is_not() -> None:
    assert not alike(ours("adagrad", eps=1e-10), torch_moves("Adagrad"))
    assert not alike(ours("rmsprop", lr=0.01, rho=0.99, eps=1e-8), torch_moves("RMSprop"))
    assert not alike(ours("adam", eps=1e-8), torch_moves("Adam"))  # lam
    assert not alike(ours("adam", lam=1), torch_moves("Adam"))  # eps


def test_clipping_of_pytorch() -> None:
    torch = require_torch()
    for g in (GRADS[0], GRADS[0] * 1e-9):
        p = torch.nn.Parameter(torch.tensor(START))
        p.grad = torch.tensor(g)
        torch.nn.utils.clip_grad_norm_([p], 0.5)
        own = START.copy()
        of.Optimizer(
            [own], of.clip_by_global_norm(max_norm=0.5, form="pytorch") >> of.rules.sgd, lr=1, target="numpy"
        ).step([g])
        assert alike(own, START - p.grad.numpy())
        p.grad = torch.tensor(g)
        torch.nn.utils.clip_grad_value_([p], 0.5)
        own = START.copy()
        of.Optimizer([own], of.clip_by_value(max_value=0.5) >> of.rules.sgd, lr=1, target="numpy").step([g])
        assert alike(own, START - p.grad.numpy())


# ── optax ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def double() -> Iterator[None]:
    """JAX in double precision."""
    jax = require_jax()
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def optax(double: None) -> Any:
    """The library."""
    require_jax("optax")
    import optax

    return optax


OPTAX: list[tuple[Callable[[Any], Any], str, dict[str, Any]]] = [
    (lambda o: o.sgd(0.01), "sgd", {"lr": 0.01}),
    (lambda o: o.sgd(0.01, momentum=0.9), "momentum", {"lr": 0.01, "momentum": 0.9}),
    (lambda o: o.sgd(0.01, momentum=0.9), "torch_sgd", {"lr": 0.01, "momentum": 0.9}),
    (lambda o: o.sgd(0.01, momentum=0.9, nesterov=True), "nesterov", {"lr": 0.01, "momentum": 0.9}),
    (lambda o: o.adagrad(0.01, initial_accumulator_value=0), "adagrad", {"lr": 0.01, "eps": 1e-7}),
    (lambda o: o.adadelta(1.0), "adadelta", {"rho": 0.9}),
    (lambda o: o.rmsprop(1e-3), "rmsprop", {"eps": 1e-8}),
    (lambda o: o.adam(1e-3), "adam", {"lam": 1, "eps": 1e-8}),
    (lambda o: o.adamw(1e-3), "adamw", {"weight_decay": 1e-4}),
    (lambda o: o.lamb(1e-3), "lamb", {"weight_decay": 0}),
    (lambda o: o.novograd(0.01), "novograd", {"beta1": 0.9, "beta2": 0.25, "eps": 1e-6, "weight_decay": 0}),
    (lambda o: o.lion(1e-3), "lion", {"beta2": 0.99, "weight_decay": 1e-3}),
    (lambda o: o.chain(o.clip_by_global_norm(0.5), o.sgd(1.0)), "clip_by_global_norm:sgd", {"max_norm": 0.5, "lr": 1}),
    (lambda o: o.chain(o.clip(0.5), o.sgd(1.0)), "clip_by_value:sgd", {"max_value": 0.5, "lr": 1}),
    (lambda o: o.chain(o.add_decayed_weights(0.1), o.sgd(1.0)), "add_weight_decay:sgd", {"weight_decay": 0.1, "lr": 1}),
]


@pytest.mark.parametrize(("made", "rule", "settings"), OPTAX, ids=[row[1] for row in OPTAX])
def test_optax(
    made: Callable[[Any], Any], rule: str, settings: dict[str, Any], optax: Any, theirs: dict[str, Rule]
) -> None:
    import jax.numpy as jnp

    opt = made(optax)
    p = jnp.asarray(START)
    state = opt.init(p)
    for g in GRADS:
        update, state = opt.update(jnp.asarray(g), state, p)
        p = optax.apply_updates(p, update)
    assert alike(ours(theirs.get(rule, rule), **settings), np.asarray(p))


def test_lars_of_optax_is_another(optax: Any) -> None:
    import jax.numpy as jnp

    opt, p = optax.lars(0.1, weight_decay=0.05), jnp.asarray(START)
    update, _ = opt.update(jnp.asarray(GRADS[0] * 1e-3), opt.init(p), p)
    own = START.copy()
    of.Optimizer([own], "lars", lr=0.1, weight_decay=0.05, target="numpy").step([GRADS[0] * 1e-3])
    assert not alike(own, np.asarray(p + update))


# ── Keras ───────────────────────────────────────────────────────────────────────────────────────────────────────────

KERAS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("SGD", {"learning_rate": 0.01}, "sgd", {"lr": 0.01}),
    ("SGD", {"learning_rate": 0.01, "momentum": 0.9}, "momentum", {"lr": 0.01, "momentum": 0.9}),
    ("SGD", {"learning_rate": 0.01, "momentum": 0.9, "nesterov": True}, "nesterov", {"lr": 0.01, "momentum": 0.9}),
    ("Adagrad", {"learning_rate": 0.01, "initial_accumulator_value": 0.0}, "adagrad", {"lr": 0.01, "eps": 1e-7}),
    ("Adadelta", {}, "adadelta", {"lr": 1e-3, "eps": 1e-7}),
    ("RMSprop", {}, "rmsprop", {"eps": 1e-7}),
    ("Adam", {}, "keras_adam", {}),
    ("AdamW", {}, "keras_adamw", {}),
    ("Adamax", {"learning_rate": 0.002}, "adamax", {"eps": 1e-7}),
    ("Lamb", {}, "lamb", {"weight_decay": 0, "eps": 1e-7}),
    ("Lion", {}, "lion", {}),
    ("SGD", {"learning_rate": 1.0, "clipvalue": 0.5}, "clip_by_value:sgd", {"max_value": 0.5, "lr": 1}),
    ("SGD", {"learning_rate": 1.0, "clipnorm": 0.5}, "clip_by_norm:sgd", {"max_norm": 0.5, "lr": 1}),
    ("SGD", {"learning_rate": 1.0, "global_clipnorm": 0.5}, "clip_by_global_norm:sgd", {"max_norm": 0.5, "lr": 1}),
    ("SGD", {"learning_rate": 0.1, "weight_decay": 0.1}, "decoupled_weight_decay:sgd", {"weight_decay": 0.1, "lr": 0.1}),
]  # fmt: skip


@pytest.fixture
def keras(double: None) -> Any:
    """The library, over JAX."""
    require_jax("keras")
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    keras.config.set_floatx("float64")
    return keras


@pytest.mark.parametrize(("name", "given", "rule", "settings"), KERAS, ids=lambda value: str(value)[:40])
def test_keras(
    name: str, given: dict[str, Any], rule: str, settings: dict[str, Any], keras: Any, theirs: dict[str, Rule]
) -> None:
    p = keras.Variable(START, dtype="float64")
    opt = getattr(keras.optimizers, name)(**given)
    opt.build([p])
    for g in GRADS:
        opt.apply([keras.ops.convert_to_tensor(g, dtype="float64")], [p])
    assert alike(ours(theirs.get(rule, rule), **settings), np.asarray(p))


def test_adam_of_keras_is_another(keras: Any) -> None:
    p = keras.Variable(START, dtype="float64")
    opt = keras.optimizers.Adam()
    opt.build([p])
    for g in GRADS:
        opt.apply([keras.ops.convert_to_tensor(g, dtype="float64")], [p])
    assert not alike(ours("adam", lam=1, eps=1e-7), np.asarray(p))


# ── Lasagne, whose formulas are stated here from its documentation ──────────────────────────────────────────────────


def lasagne(name: str) -> Array:
    """Parameters after the steps of an update of Lasagne, with its own defaults and a rate of 0.01."""
    p, a, b = START.copy(), np.zeros(SHAPE), np.zeros(SHAPE)
    lr = {"adadelta": 1.0, "adam": 0.001, "adamax": 0.002}.get(name, 0.01)
    for t, g in enumerate(GRADS, 1):
        if name == "sgd":
            p = p - lr * g
        elif name == "momentum":
            a = 0.9 * a - lr * g
            p = p + a
        elif name == "nesterov_momentum":
            a = 0.9 * a - lr * g
            p = p + 0.9 * a - lr * g
        elif name == "adagrad":
            a = a + g**2
            p = p - lr * g / np.sqrt(a + 1e-6)
        elif name == "rmsprop":
            a = 0.9 * a + 0.1 * g**2
            p = p - lr * g / np.sqrt(a + 1e-6)
        elif name == "adadelta":
            a = 0.95 * a + 0.05 * g**2
            update = g * np.sqrt(b + 1e-6) / np.sqrt(a + 1e-6)
            p = p - lr * update
            b = 0.95 * b + 0.05 * update**2
        elif name == "adam":
            a = 0.9 * a + 0.1 * g
            b = 0.999 * b + 0.001 * g**2
            p = p - lr * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * a / (np.sqrt(b) + 1e-8)
        elif name == "adamax":
            a = 0.9 * a + 0.1 * g
            b = np.maximum(0.999 * b, np.abs(g))
            p = p - lr / (1 - 0.9**t) * a / (b + 1e-8)
    return p


LASAGNE: list[tuple[str, str, dict[str, Any]]] = [
    ("sgd", "sgd", {"lr": 0.01}),
    ("momentum", "momentum", {"lr": 0.01}),
    ("nesterov_momentum", "nesterov", {"lr": 0.01}),
    ("adagrad", "adagrad", {"lr": 0.01}),
    ("rmsprop", "rmsprop", {"lr": 0.01}),
    ("adadelta", "adadelta", {}),
    ("adam", "keras_adam", {"eps": 1e-8}),
    ("adamax", "adamax", {}),
]


@pytest.mark.parametrize(("name", "rule", "settings"), LASAGNE, ids=[row[0] for row in LASAGNE])
def test_lasagne(name: str, rule: str, settings: dict[str, Any], theirs: dict[str, Rule]) -> None:
    assert alike(ours(theirs.get(rule, rule), **settings), lasagne(name))


def test_the_norm_constraint_of_lasagne() -> None:
    for g in (GRADS[0], GRADS[0] * 1e-9):
        norm = np.sqrt((g**2).sum())
        own = START.copy()
        rule = of.clip_by_global_norm(max_norm=0.5, form="lasagne") >> of.rules.sgd
        of.Optimizer([own], rule, lr=1, target="numpy").step([g])
        assert alike(own, START - g * (min(norm, 0.5) / (1e-7 + norm)))


# ── the page ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_rule_of_the_page_is_in_its_table_and_tested(theirs: dict[str, Rule]) -> None:
    text = PAGE.read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    heads = [row.split("`")[1] for row in rows]
    tested = {row[2] for row in (*TORCH, *KERAS)} | {row[1] for row in (*OPTAX, *LASAGNE)}
    assert {*of.rules, *of.transforms} - {"centralize"} <= {*heads}
    for name in theirs:
        assert f"`{name}`" in "\n".join(rows)
        assert name in tested
