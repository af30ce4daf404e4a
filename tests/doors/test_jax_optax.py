"""optforge.jax beside optax: the same trajectories, and its combinators around ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import optforge as of
from conftest import require_jax
from data import same

jax = require_jax("optax")
jnp = jax.numpy

import optax  # noqa: E402

import optforge.jax as ofj  # noqa: E402
from jaxing import STEPS, begin, every_gradient, flat, stepped, tree, x64  # noqa: E402
from optforge import rule, sign  # noqa: E402


@rule
def lion(p, g, m=0.0, *, lr=1e-4, b1=0.9, b2=0.99, weight_decay=1e-3):
    """Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023)."""
    update = sign(b1 * m + (1 - b1) * g)
    m = b2 * m + (1 - b2) * g
    p = p - lr * (update + weight_decay * p)
    return p, m


def matrices(params: Any) -> Any:
    """Which parameters are decayed."""
    return jax.tree.map(lambda own: own.ndim > 1, params)


# What a user writes in place of optax, as the docs have it.
SWITCHED: dict[str, tuple[Any, Any]] = {
    "sgd": (lambda: optax.sgd(0.01), lambda: ofj.sgd(lr=0.01)),
    "momentum": (lambda: optax.sgd(0.01, momentum=0.8), lambda: ofj.momentum(lr=0.01, momentum=0.8)),
    "nesterov": (
        lambda: optax.sgd(0.01, momentum=0.8, nesterov=True),
        lambda: ofj.nesterov(lr=0.01, momentum=0.8),
    ),
    "adagrad": (
        lambda: optax.adagrad(0.01, initial_accumulator_value=0.0, eps=1e-7),
        lambda: ofj.adagrad(lr=0.01, eps=1e-7),
    ),
    "adadelta": (lambda: optax.adadelta(0.5), lambda: ofj.adadelta(lr=0.5, rho=0.9)),
    "novograd": (
        lambda: optax.novograd(0.01, b1=0.9, b2=0.8, weight_decay=0.1),
        lambda: ofj.novograd(lr=0.01, beta1=0.9, beta2=0.8, eps=1e-6, weight_decay=0.1),
    ),
    "adam": (lambda: optax.adam(1e-3, b1=0.8), lambda: ofj.adam(lr=1e-3, beta1=0.8, eps=1e-8, lam=1.0)),
    "adamw": (lambda: optax.adamw(1e-3, weight_decay=0.1), lambda: ofj.adamw(lr=1e-3, weight_decay=0.1)),
    "rmsprop": (lambda: optax.rmsprop(1e-3, decay=0.8), lambda: ofj.rmsprop(lr=1e-3, rho=0.8, eps=1e-8)),
    "lion": (lambda: optax.lion(1e-3, weight_decay=0.1), lambda: ofj.Optimizer(lion, lr=1e-3, weight_decay=0.1)),
    "lamb": (lambda: optax.lamb(1e-3, weight_decay=0.1), lambda: ofj.lamb(lr=1e-3, weight_decay=0.1)),
    "mask": (
        lambda: optax.adamw(1e-3, weight_decay=0.1, mask=matrices),
        lambda: optax.multi_transform(
            {True: ofj.adamw(lr=1e-3, weight_decay=0.1), False: ofj.adamw(lr=1e-3, weight_decay=0.0)}, matrices
        ),
    ),
    "clip": (
        lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-3)),
        lambda: ofj.Optimizer("clip_by_global_norm:adamw", lr=1e-3, max_norm=0.5, weight_decay=1e-4),
    ),
}


def two_passes(opt: Any, params: Any, grads: Any) -> list[Any]:
    """Parameters behind the steps of an optax transformation."""

    def step(carried: Any, g: Any) -> Any:
        updates, state = opt.update(g, carried[1], carried[0])
        return (optax.apply_updates(carried[0], updates), state), None

    p = tree([jnp.asarray(own) for own in params])
    every = tree([jnp.asarray(own) for own in grads])
    run = jax.jit(lambda p, s: jax.lax.scan(step, (p, s), every)[0][0])
    return [np.asarray(own) for own in flat(run(p, opt.init(p)))]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", SWITCHED)
def test_trajectories_of_optax(name: str, dtype: Any) -> None:
    theirs, ours = SWITCHED[name]
    rng = np.random.default_rng(1)
    params = begin(rng, dtype)
    # Of sizes that float32 takes as normal numbers: optax's own steps flush the others.
    grads = [np.where(np.abs(g) < 1e-12, dtype(1e-6), g) for g in every_gradient(rng, dtype)]
    with x64(dtype == np.float64):
        expected = two_passes(theirs(), params, grads)
        opt = ours()
        made = stepped(opt, params, grads, "scan")[0] if hasattr(opt, "step") else two_passes(opt, params, grads)
    for own, other, before in zip(made, expected, params, strict=True):
        # A few roundings of p, and of the moments that make its steps, in each step.
        size = np.maximum(np.abs(before), np.abs(other)) + np.abs(other - before)
        assert np.all(np.abs(own - other) <= 4 * STEPS * np.finfo(dtype).eps * size)


def test_updates_are_the_difference() -> None:
    rng = np.random.default_rng(2)
    p = {"w": jnp.asarray(rng.standard_normal(4000).astype(np.float32))}
    g = {"w": jnp.asarray(rng.standard_normal(4000).astype(np.float32))}
    opt = ofj.adamw(lr=0.05)
    fused, _ = jax.jit(opt.step)(p, g, opt.init(p))
    updates, state = jax.jit(opt.update)(g, opt.init(p), p)
    applied = optax.apply_updates(p, updates)
    before, behind = np.asarray(p["w"]), np.asarray(fused["w"])
    near = (behind / before > 0.5) & (behind / before < 2)
    assert near.sum() > 3000
    assert same(np.asarray(applied["w"])[near], behind[near])
    assert np.all(np.abs(applied["w"] - fused["w"]) <= np.spacing(np.abs(before) + np.abs(behind)))
    assert int(state.count) == 1


def test_chain_multi_transform_masked_and_accumulation() -> None:
    p = {"w": jnp.full((4, 4), 2.0), "b": jnp.full((4,), 1.0)}
    g = jax.tree.map(jnp.ones_like, p)

    def one(opt: Any) -> Any:
        updates, state = jax.jit(opt.update)(g, opt.init(p), p)
        return optax.apply_updates(p, updates), state

    chained, _ = one(optax.chain(optax.scale(0.5), ofj.sgd(lr=0.5)))
    assert float(chained["b"][0]) == 0.75
    labels = {"w": "decayed", "b": "plain"}
    several, _ = one(
        optax.multi_transform({"decayed": ofj.adamw(lr=0.125, weight_decay=1.0), "plain": ofj.sgd(lr=0.25)}, labels)
    )
    assert float(several["b"][0]) == 0.75
    expected = of.Optimizer([np.full(16, 2, np.float32)], "adamw", target="numpy", lr=0.125, weight_decay=1.0)
    expected.step([np.ones(16, np.float32)])
    assert same(np.asarray(several["w"]).ravel(), expected.params[0])
    masked, _ = one(optax.masked(ofj.sgd(lr=0.5), {"w": True, "b": False}))
    assert float(masked["w"][0, 0]) == 1.5
    every = optax.MultiSteps(ofj.sgd(lr=0.5), every_k_schedule=2)
    waiting, state = one(every)
    assert float(waiting["b"][0]) == 1.0
    updates, _ = jax.jit(every.update)(g, state, waiting)
    assert float(optax.apply_updates(waiting, updates)["b"][0]) == 0.5
    whole = optax.apply_if_finite(ofj.sgd(lr=0.5), 3)
    assert float(one(whole)[0]["b"][0]) == 0.5


def test_injected_hyperparameters() -> None:
    p, g = {"w": jnp.ones(3)}, {"w": jnp.ones(3)}
    opt = optax.inject_hyperparams(ofj.sgd)(lr=0.5)
    state = opt.init(p)
    update = jax.jit(opt.update)
    for lr in (0.5, 0.25):
        state.hyperparams["lr"] = jnp.float32(lr)
        updates, state = update(g, state, p)
        assert updates["w"].tolist() == [-lr] * 3
    scheduled = optax.inject_hyperparams(ofj.sgd)(lr=optax.linear_schedule(1.0, 0.0, 4))
    updates, _ = jax.jit(scheduled.update)(g, scheduled.init(p), p)
    assert updates["w"].tolist() == [-1.0] * 3


def test_schedules_of_optax_count_from_0() -> None:
    p, g = [jnp.ones(1)], [jnp.ones(1)]
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    opt = ofj.sgd(lr=schedule)
    state, step = opt.init(p), jax.jit(opt.step)
    for k in range(3):
        before = p[0]
        p, state = step(p, g, state)
        assert same(p[0], before - schedule(k))
    constant = ofj.sgd(lr=optax.constant_schedule(0.1))
    assert same(
        jax.jit(constant.step)([jnp.ones(1)], g, constant.init(p))[0][0],
        ofj.sgd(lr=0.1).step([jnp.ones(1)], g, constant.init(p))[0][0],
    )


def test_state_is_mapped_as_that_of_optax() -> None:
    opt, p = ofj.novograd(), {"a": jnp.ones(3), "b": [jnp.ones(2)]}
    mapped = optax.tree_map_params(opt, lambda own: own + 1, opt.init(p))
    assert mapped.state["m"]["a"].tolist() == [1, 1, 1]
    assert int(mapped.count) == 0
