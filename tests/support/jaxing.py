"""JAX and NumPy beside each other: the same parameters, gradients and rules in both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import optforge as of
import optforge.jax as ofj
from data import gradients, same
from optforge import rule, scalar, transform

STEPS = 50
SHAPES = ((), (1,), (33,), (3, 5), (0, 4), (1025,))
TINY = np.array([1e-39, -3e-45, 5e-41])  # subnormal in float32: XLA flushes them on its threads


@rule
def begins(p, g, slow="p", first="g", level="lr", mu: scalar = "beta", seen: scalar = 0, *, t, lr=0.1, beta=0.9):
    """State that begins in every way there is."""
    mu = mu * beta + t
    seen = seen + 1
    slow = 0.9 * slow + 0.1 * p
    first = beta * first + g
    level = level * beta
    p = p - lr * first / mu * level + 0.01 * (slow - p) / seen
    return p, slow, first, level, mu, seen


@transform
def shrink(g, *, factor=0.5):
    """A composition of one's own."""
    g = g * factor
    return g


RULES: dict[str, tuple[Any, dict[str, float]]] = {
    "momentum": ("momentum", {"lr": 0.03, "momentum": 0.8}),
    "rmsprop": ("rmsprop", {"lr": 0.003, "rho": 0.8, "eps": 1e-5}),
    "adamw": ("adamw", {"lr": 0.003, "weight_decay": 0.1, "eps": 1e-4}),
    "lamb": ("lamb", {"lr": 0.003, "weight_decay": 0.1}),
    "novograd": ("novograd", {"lr": 0.003}),
    "begins": (begins, {"lr": 0.01}),
    "composition": ("clip_by_global_norm:adamw", {"lr": 0.003, "max_norm": 0.7}),
    "own composition": (shrink(factor=0.25) >> of.rules.lamb, {"lr": 0.003}),
}


def x64(wanted: bool) -> Any:
    """A context in which arrays are, or are not, float64."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(wanted)
    from jax import experimental

    return experimental.enable_x64(wanted)


def tree(leaves: Sequence[Any]) -> Any:
    """Arrays as a pytree of several kinds of nodes."""
    a, b, c, d, e, f = leaves
    return {"scalar": a, "layers": [(b, c), {"w": d, "none": None}], "rest": (e, f)}


def flat(made: Any) -> list[Any]:
    """The leaves of `tree`, in the order in which they were given."""
    return [made["scalar"], *made["layers"][0], made["layers"][1]["w"], *made["rest"]]


def begin(rng: np.random.Generator, dtype: Any) -> list[Any]:
    """Parameters."""
    return [np.asarray(rng.standard_normal(shape)).astype(dtype) for shape in SHAPES]


def every_gradient(rng: np.random.Generator, dtype: Any) -> list[Any]:
    """Gradients of all steps, one array for each tensor; some are subnormal."""
    made = []
    for shape in SHAPES:
        own = gradients(rng, STEPS * int(np.prod(shape)), dtype).reshape(STEPS, *shape)
        if own.size > 3 * STEPS:
            own.reshape(STEPS, -1)[:, :3] = TINY.astype(dtype)
        made.append(own)
    return made


def reference(rule: Any, params: Sequence[Any], grads: Sequence[Any], **settings: Any) -> of.Optimizer:
    """An optimizer of the reference behind steps with these gradients; its parameters are copies."""
    opt = of.Optimizer([p.copy() for p in params], rule, target="numpy", **settings)
    for k in range(STEPS):
        opt.step([np.array(g[k]) for g in grads])
    return opt


def stepped(opt: ofj.Optimizer, params: Sequence[Any], grads: Sequence[Any], how: str) -> tuple[list[Any], Any]:
    """Parameters and state behind the same steps in JAX, one jitted call each ("jit"), or all in one ("scan")."""
    p = tree([jnp.asarray(own) for own in params])
    s = opt.init(p)
    every = tree([jnp.asarray(own) for own in grads])
    if how == "scan":
        run = jax.jit(lambda p, s: jax.lax.scan(lambda c, g: (opt.step(c[0], g, c[1]), None), (p, s), every)[0])
        p, s = run(p, s)
    elif how == "jit":
        step = jax.jit(lambda p, g, s: opt.step(p, g, s), donate_argnums=(0, 2))
        for k in range(STEPS):
            p, s = step(p, jax.tree.map(lambda g, k=k: g[k], every), s)
    else:
        for k in range(STEPS):
            p, s = opt.step(p, jax.tree.map(lambda g, k=k: g[k], every), s)
    return [np.asarray(own) for own in flat(p)], s


def agree(p: Sequence[Any], state: ofj.OptimizerState, expected: of.Optimizer) -> None:
    """Assert that parameters and state have the bits of the reference behind all steps."""
    assert int(state.count) == expected.t
    for k, array in enumerate(p):
        assert same(array, expected.params[k]), f"p of shape {array.shape}"
    assert sorted(state.state) == sorted(expected.state)
    for of_state, values in expected.state.items():
        told = flat(state.state[of_state])
        if isinstance(values[0], float):
            assert ofj.doubles(told) == values, of_state
        else:
            assert all(same(a, b) for a, b in zip(told, values, strict=True)), of_state
