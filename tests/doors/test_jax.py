"""optforge.jax: the bits of the reference, under jit and in scan, over pytrees of any kind."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from amount import some
from conftest import require_jax
from data import same

jax = require_jax()
jnp = jax.numpy

import optforge.jax as ofj  # noqa: E402
from jaxing import RULES, STEPS, agree, begin, begins, every_gradient, flat, reference, stepped, x64  # noqa: E402

# Eager steps are jitted ones, so that two rules do for them.
CASES = [
    (name, dtype, how)
    for how in ("scan", "jit", "eager")
    for dtype in ("float32", "float64", "bfloat16")
    for name in (RULES if how != "eager" else ("adamw", "begins"))
]


@pytest.mark.parametrize(("name", "dtype", "how"), some(CASES, 4, lambda case: case[2] == "scan"))
def test_bits_of_the_reference(name: str, dtype: str, how: str) -> None:
    own, settings = RULES[name]
    rng, kind = np.random.default_rng(1), jnp.dtype(dtype)
    params, grads = begin(rng, kind), every_gradient(rng, kind)
    expected = reference(own, params, grads, **settings)
    with x64(dtype == "float64"):
        p, state = stepped(ofj.Optimizer(own, **settings), params, grads, how)
    agree(p, state, expected)


def narrow(values: Any, dtype: Any) -> Any:
    """Values rounded to a format of 16 bits, to nearest, as float32."""
    return np.asarray(values).astype(dtype).astype(np.float32)


@pytest.mark.parametrize("format", ["bf16", "f16"])
@pytest.mark.parametrize("name", ["momentum", "rmsprop", "adamw", "lamb", "novograd", "composition"])
@pytest.mark.parametrize("kept", [(), ("m", "acc")])
def test_narrow_parameters(name: str, kept: tuple[str, ...], format: str) -> None:
    # The reference computes in float32, and everything stored in 16 bits is rounded behind each of its steps.
    own, settings = RULES[name]
    dtype = {"bf16": jnp.bfloat16, "f16": jnp.float16}[format]
    rng = np.random.default_rng(2)
    params, grads = begin(rng, dtype), every_gradient(rng, dtype)
    expected = of.Optimizer([np.array(p, np.float32) for p in params], own, target="numpy", **settings)
    states = [state for state in expected.state if state in kept]
    for k in range(STEPS):
        expected.step([np.array(g[k], np.float32) for g in grads])
        for array in (*expected.params, *(array for state in states for array in expected.state[state])):
            array[...] = narrow(array, dtype)
    p, state = stepped(ofj.Optimizer(own, store=dict.fromkeys(states, format), **settings), params, grads, "scan")
    for told, array in zip(p, expected.params, strict=True):
        assert told.dtype == dtype
        assert same(told.astype(np.float32), array)
    for of_state, values in expected.state.items():
        if isinstance(values[0], float):
            assert ofj.doubles(flat(state.state[of_state])) == values
            continue
        for told, array in zip(flat(state.state[of_state]), values, strict=True):
            assert told.dtype == (dtype if of_state in states else jnp.float32)
            assert same(np.asarray(told).astype(np.float32), array), of_state


@pytest.mark.parametrize("master", ["f32", "split"])
def test_masters_hold_what_float32_has(master: str) -> None:
    rng = np.random.default_rng(3)
    params, grads = begin(rng, jnp.bfloat16), every_gradient(rng, jnp.bfloat16)
    wide = [np.array(p, np.float32) for p in params]
    expected = reference("adamw", wide, [np.array(g, np.float32) for g in grads], lr=0.01)
    p, state = stepped(ofj.adamw(lr=0.01, master=master), params, grads, "scan")
    for k, array in enumerate(expected.params):
        if master == "f32":
            assert same(flat(state.state["p_master"])[k], array)
            assert same(p[k].astype(np.float32), narrow(array, jnp.bfloat16))
        else:
            low = np.asarray(flat(state.state["p_low"])[k]).view(np.int16).astype(np.int64)
            joined = (p[k].view(np.uint16).astype(np.int64) << 16) + low
            assert same(joined.astype(np.uint32).view(np.float32), array)


HOWS: dict[str, dict[str, Any]] = {
    "stochastic": {"rounding": "stochastic", "seed": 3},
    "all stochastic": {"rounding": "stochastic", "seed": 1 << 40, "store": {"m": "bf16"}},
    "master and stochastic": {"master": "f32", "rounding": "stochastic", "store": {"m": "f16"}},
    "split": {"master": "split"},
    "master": {"master": "f32", "store": {"m": "f16"}},
}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", ["adamw", "novograd", "composition"])
def test_stored_otherwise_it_has_the_bits_of_the_optimizer(name: str, how: str) -> None:
    own, settings = RULES[name]
    rng = np.random.default_rng(10)
    sizes = (3, 1030, 40)
    params = [rng.standard_normal(n).astype(jnp.bfloat16) for n in sizes]
    grads = [rng.standard_normal((5, n)).astype(jnp.bfloat16) for n in sizes]
    expected = of.Optimizer([p.copy() for p in params], own, target="numpy", **HOWS[how], **settings)
    opt = ofj.Optimizer(own, **HOWS[how], **settings)
    state = opt.init(params)
    p, step = [jnp.asarray(own) for own in params], jax.jit(opt.step)
    for k in range(5):
        expected.step([np.array(g[k]) for g in grads])
        p, state = step(p, [g[k] for g in grads], state)
    assert all(a.tobytes() == np.asarray(b).tobytes() for a, b in zip(expected.params, p, strict=True))
    for of_state, values in expected.state.items():
        told = state.state[of_state]
        if isinstance(values[0], float):
            assert ofj.doubles(told) == values
        else:
            assert all(a.tobytes() == np.asarray(b).tobytes() for a, b in zip(values, told, strict=True)), of_state


def test_several_dtypes_step_together() -> None:
    # One norm over all; only what has 16 bits has a master.
    rng = np.random.default_rng(4)
    kinds = [np.float32, jnp.bfloat16, jnp.float16]
    params = [rng.standard_normal(300).astype(kind) for kind in kinds]
    given = [rng.standard_normal(300).astype(kind) for kind in [np.float32, np.float32, jnp.float16]]
    expected = of.Optimizer([np.array(p, np.float32) for p in params], "clip_by_global_norm:adamw", target="numpy")
    opt = ofj.Optimizer("clip_by_global_norm:adamw", master="f32")
    p, state = [jnp.asarray(own) for own in params], None
    state = opt.init(p)
    for _ in range(3):
        expected.step([np.array(g, np.float32) for g in given])
        p, state = jax.jit(opt.step)(p, given, state)
    assert state.state["p_master"][0] is None
    for k, array in enumerate(expected.params):
        assert p[k].dtype == kinds[k]
        assert same(p[k] if k == 0 else state.state["p_master"][k], array)


def test_stochastic_rounding_depends_on_the_seed_alone() -> None:
    params = [jnp.full((5000,), 1.0, jnp.bfloat16)]
    grads = [jnp.full((5000,), 0.3, jnp.bfloat16)]

    def one(seed: int, threads: int) -> Any:
        opt = ofj.sgd(lr=0.01, rounding="stochastic", seed=seed, threads=threads)
        return np.asarray(jax.jit(opt.step)(params, grads, opt.init(params))[0][0]).astype(np.float64)

    first = one(1, 1)
    assert same(first, one(1, 3))
    assert not same(first, one(2, 1))
    exact = 1 - 0.01 * 0.30078125
    below, above = 1 - 2**-8, 1.0
    share = (exact - below) / (above - below)
    assert {*first} == {below, above}
    assert abs((first == above).mean() - share) < 5 * (share * (1 - share) / 5000) ** 0.5


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_bits_on_any_number_of_threads(threads: int | None) -> None:
    rng = np.random.default_rng(5)
    params = [rng.standard_normal(n).astype(np.float32) for n in (1_300_001, 17)]
    grads = [rng.standard_normal(n).astype(np.float32) for n in (1_300_001, 17)]
    expected = of.Optimizer([p.copy() for p in params], "clip_by_global_norm:lamb", target="c", max_norm=0.1)
    opt = ofj.Optimizer("clip_by_global_norm:lamb", threads=threads, max_norm=0.1)
    p = [jnp.asarray(own) for own in params]
    state, step = opt.init(p), jax.jit(opt.step)
    for _ in range(3):
        expected.step(grads)
        p, state = step(p, grads, state)
    assert all(same(a, b) for a, b in zip(p, expected.params, strict=True))


def test_schedules_and_arrays_as_hyperparameters() -> None:
    rng = np.random.default_rng(6)
    params, grads = begin(rng, np.float32), every_gradient(rng, np.float32)

    def schedule(count: Any) -> Any:  # exact in float32, so that both have the same numbers
        return 0.25 / (1 + count)

    decay = jnp.float32(0.1)
    expected = reference(
        "adamw", params, grads, lr=lambda t: float(np.float32(schedule(np.float32(t - 1)))), weight_decay=float(decay)
    )
    for how in ("jit", "scan"):
        p, _ = stepped(ofj.adamw(lr=schedule, weight_decay=decay), params, grads, how)
        assert all(same(a, b) for a, b in zip(p, expected.params, strict=True)), how


def test_a_number_has_the_bits_of_a_double() -> None:
    # float32(0.999) is 1e-8 beside it, which 1 - beta2 shows.
    p = [jnp.zeros(1)]
    opt, of_array = ofj.adam(beta2=0.999), ofj.adam(beta2=jnp.float32(0.999))
    second = [jax.jit(o.step)(p, [jnp.ones(1)], o.init(p))[1].state["v"][0] for o in (opt, of_array)]
    assert same(second[0], np.array([1 - 0.999], np.float32))
    assert same(second[1], np.array([1 - float(np.float32(0.999))], np.float32))


def test_state_that_begins_as_a_traced_hyperparameter() -> None:
    rng = np.random.default_rng(7)
    params, grads = begin(rng, np.float32), every_gradient(rng, np.float32)
    beta = float(np.float32(0.7))
    expected = reference(begins, params, grads, lr=0.5, beta=beta)
    own = ofj.Optimizer(begins, lr=lambda count: jnp.float32(0.5), beta=jnp.float32(beta))
    p, state = stepped(own, params, grads, "scan")
    assert all(same(a, b) for a, b in zip(p, expected.params, strict=True))
    assert ofj.doubles(flat(state.state["mu"])) == expected.state["mu"]


def test_loss_scale_statistics_and_skipping() -> None:
    rng = np.random.default_rng(8)
    params = [rng.standard_normal(n).astype(np.float32) for n in (5, 3000)]
    opt = ofj.Optimizer("clip_by_global_norm:adamw", skip_nonfinite=True, max_norm=0.5)
    expected = of.Optimizer(
        [p.copy() for p in params], "clip_by_global_norm:adamw", target="numpy", skip_nonfinite=True, max_norm=0.5
    )
    p = [jnp.asarray(own) for own in params]
    state = opt.init(p)
    step = jax.jit(lambda p, g, s, scale: opt.step(p, g, s, grad_scale=scale, stats=True), donate_argnums=(0, 2))
    for k, scale in enumerate((1024.0, 512.0, 1024.0)):
        g = [rng.standard_normal(n).astype(np.float32) for n in (5, 3000)]
        if k == 1:
            g[1][7], g[0][2] = np.nan, np.inf
        stats = expected.step([own.copy() for own in g], grad_scale=scale, stats=True)
        p, state, told = step(p, g, state, jnp.float32(scale))
        assert int(state.count) == expected.t == (1, 1, 2)[k]
        for name in ("grad_norm", "clipped_grad_norm", "param_norm", "update_norm", "max_update_ratio"):
            assert same(told._asdict()[name], np.float32(stats[name])), name
            each = stats.per_tensor[name].astype(np.float32)
            assert same(told.per_tensor._asdict()[name], each), name
        assert (int(told.nan), int(told.inf), bool(told.skipped)) == (stats.nan, stats.inf, stats.skipped)
        assert told.per_tensor.nan.tolist() == stats.per_tensor.nan.tolist()
    assert all(same(a, b) for a, b in zip(p, expected.params, strict=True))
    for scale in (3.1, 1e300, 2.0**60):  # not in float32, beyond it, and in it
        p, state, told = opt.step(p, [jnp.ones(5), jnp.ones(3000)], state, grad_scale=scale, stats=True)
        unscaled = np.float32(1 / scale) * np.ones(3005, np.float32)
        assert same(told.grad_norm, np.float32(np.sqrt(np.sum(np.square(unscaled, dtype=np.float64)))))


def test_donated_buffers_are_stepped_in_place() -> None:
    opt = ofj.adamw()
    p, g = {"w": jnp.ones((300, 7))}, {"w": jnp.ones((300, 7))}
    state = opt.init(p)
    for step in (jax.jit(opt.step, donate_argnums=(0, 2)), opt.step):
        before = [own.unsafe_buffer_pointer() for own in jax.tree.leaves((p, state.state))]
        p, state = step(p, g, state)
        assert [own.unsafe_buffer_pointer() for own in jax.tree.leaves((p, state.state))] == before


def test_without_donation_nothing_changes() -> None:
    opt = ofj.Optimizer(begins)
    p, g = [jnp.arange(7.0)], [jnp.ones(7)]
    state = opt.init(p)
    first = jax.jit(opt.step)(p, g, state)
    assert p[0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert int(state.count) == 0
    again = jax.jit(opt.step)(p, g, state)
    first, again = (b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(made)) for made in (first, again))
    assert first == again


@pytest.mark.parametrize("donate", [(), (0, 1)])
def test_a_gradient_may_be_the_parameter_and_two_parameters_one_array(donate: tuple[int, ...]) -> None:
    values = np.linspace(-1, 1, 2000, dtype=np.float32)
    expected = of.Optimizer([values.copy(), values.copy()], "adamw", target="numpy")
    expected.step([values, values])
    opt = ofj.adamw()

    def run(x: Any, state: Any) -> Any:
        return opt.step([x, x], [x, x], state)

    p, _ = jax.jit(run, donate_argnums=donate)(jnp.asarray(values), opt.init([values, values]))
    assert all(same(a, b) for a, b in zip(p, expected.params, strict=True))


def test_vmap_trains_an_ensemble() -> None:
    rng = np.random.default_rng(9)
    p, g = (rng.standard_normal((3, 40)).astype(np.float32) for _ in range(2))
    opt = ofj.Optimizer("clip_by_global_norm:adamw", max_norm=0.1)
    state = jax.vmap(opt.init)(p)
    made, _ = jax.jit(jax.vmap(lambda p, g, s: opt.step(p, g, s)))(p, g, state)
    for k in range(3):
        expected = of.Optimizer([p[k].copy()], "clip_by_global_norm:adamw", target="numpy", max_norm=0.1)
        expected.step([g[k]])
        assert same(made[k], expected.params[0])


def test_an_empty_pytree_only_counts() -> None:
    opt = ofj.adamw()
    p, state = opt.step({}, {}, opt.init({}))
    assert p == {}
    assert int(state.count) == 1


def test_rules_of_files_and_equal_rules(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from optforge import rule\n\n@rule\ndef mine(p, g, *, lr=0.1):\n    p = p - lr * g\n    return p\n"
    )
    for _ in range(2):  # made anew, it is registered once
        opt = ofj.Optimizer(f"{tmp_path}/mine.py:mine", lr=0.5)
        p, _ = opt.step([jnp.ones(2)], [jnp.ones(2)], opt.init([jnp.ones(2)]))
        assert p[0].tolist() == [0.5, 0.5]


def test_importing_the_package_imports_no_jax() -> None:
    code = "import sys, optforge as of; of.Optimizer; of.rules.adam.kernel(); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_and_names() -> None:
    assert "lr" in str(inspect.signature(ofj.adamw))
    assert ofj.adamw is ofj.adamw
    assert "adamw" in dir(ofj)
    assert repr(ofj.adamw()) == "<optforge.jax.Optimizer of adamw>"
    with pytest.raises(AttributeError, match="adamv"):
        ofj.adamv  # noqa: B018
