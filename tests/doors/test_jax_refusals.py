"""optforge.jax: mistakes are found when a step is traced, and said clearly."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import optforge as of
from conftest import require_jax

jax = require_jax()
jnp = jax.numpy

import optforge.jax as ofj  # noqa: E402
from optforge import rule  # noqa: E402

OPT = ofj.adamw()
P = {"w": jnp.ones((2, 3)), "b": [jnp.ones(3)]}
STATE = OPT.init(P)
KEY = jax.random.key(0)


def traced(p: Any = P, g: Any = P, s: Any = STATE, opt: Any = OPT, **how: Any) -> Any:
    """A step, as it is traced; nothing runs."""
    return jax.eval_shape(lambda p, g, s: opt.step(p, g, s, **how), p, g, s)


def other(shape: Any = (2, 3), dtype: Any = jnp.float32) -> Any:
    """The same pytree, with another array."""
    return {"w": jnp.ones(shape, dtype), "b": [jnp.ones(3)]}


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        (
            {"p": other(dtype=jnp.int32)},
            TypeError,
            r"params\['w'\] is int32; parameters and gradients are float32, float64, bfl",
        ),
        ({"p": other(dtype=jnp.float8_e4m3fn)}, TypeError, r"params\['w'\] is float8_e4m3fn"),
        ({"p": {"w": KEY, "b": P["b"]}}, TypeError, r"params\['w'\] is key<"),
        ({"g": {"w": np.zeros((2, 3), jax.dtypes.float0), "b": P["b"]}}, TypeError, r"grads\['w'\] is float0; "),
        ({"p": other(dtype=jnp.complex64)}, TypeError, r"params\['w'\] is complex64"),
        ({"g": other(dtype=jnp.int32)}, TypeError, r"grads\['w'\] is int32"),
        (
            {"g": other((3, 2))},
            ValueError,
            r"grads\['w'\] is float32 of shape \(3, 2\), and params\['w'\] is .*\(2, 3\)",
        ),
        (
            {"p": other((4, 3)), "g": other((4, 3))},
            ValueError,
            r"state.state\['m'\]\['w'\] is .*\(2, 3\), and what par",
        ),
        ({"p": other(dtype=jnp.bfloat16), "s": OPT.init(other(dtype=jnp.bfloat16))}, None, ""),
        (
            {"g": {"w": P["w"]}},
            ValueError,
            r"grads and params .*: there is params\['b'\]\[0\] and no grads\['b'\]\[0\]",
        ),
        ({"g": {**P, "c": P["w"]}}, ValueError, r"there is grads\['c'\] and no params\['c'\]"),
        ({"g": {**P, "b": tuple(P["b"])}}, ValueError, "grads and params are different pytrees: PyTreeDef"),
        (
            {"p": {"w": P["w"]}, "g": {"w": P["w"]}},
            ValueError,
            r"there is state.state\['m'\]\['b'\]\[0\] and no params",
        ),
        ({"s": ofj.sgd().init(P)}, ValueError, "the state is none, and rule 'adamw' over these parameters has m, v"),
        (
            {"g": STATE, "s": P},
            TypeError,
            r"grads is the state of an optimizer: write step\(params, grads, state\), or",
        ),
        ({"s": (1, 2)}, TypeError, r"the state is what init\(params\) gives, not tuple"),
        ({"s": STATE._replace(count=jnp.float32(1))}, ValueError, "state.count is float32"),
    ],
)
def test_arrays_that_do_not_fit(given: dict[str, Any], kind: Any, words: str) -> None:
    if kind is None:
        traced(**given)
        return
    with pytest.raises(kind, match=words):
        traced(**given)


def test_what_is_no_array() -> None:
    with pytest.raises(TypeError, match=r"params\['w'\] is no array, but float"):
        OPT.init({"w": 1.0})
    with pytest.raises(TypeError, match=r"grads\[0\] is no array, but str"):
        ofj.sgd().step([jnp.ones(1)], ["x"], ofj.sgd().init([jnp.ones(1)]))


def test_float64_is_not_narrowed_in_silence() -> None:
    with pytest.raises(TypeError, match=r"params\['w'\] is float64, of which JAX makes float32 unless jax_enable_x64"):
        OPT.init({"w": np.ones(3)})


def test_settings_have_names() -> None:
    with pytest.raises(TypeError, match=r"settings of adamw have names: write lr=0\.1"):
        ofj.adamw(0.1)


def test_statistics_are_chosen_at_trace_time() -> None:
    with pytest.raises(TypeError, match="stats is True or False, and known when the step is traced, not"):
        jax.jit(lambda stats: OPT.step(P, P, STATE, stats=stats))(True)


def test_shapes_that_change_between_steps() -> None:
    step = jax.jit(OPT.step)
    p, state = step(P, P, STATE)
    with pytest.raises(ValueError, match=r"grads\['w'\] is float32 of shape \(2, 4\), and params\['w'\] is"):
        step(p, other((2, 4)), state)
    with pytest.raises(ValueError, match=r"state.state\['m'\]\['w'\] is float32 of shape \(2, 3\), and what params"):
        step(other((2, 4)), other((2, 4)), state)


def test_update_needs_the_parameters() -> None:
    with pytest.raises(ValueError, match=r"update needs the parameters: update\(grads, state, params\)"):
        OPT.update(P, STATE)


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"learning_rate": 0.1}, TypeError, "has no hyperparameter 'learning_rate'; write lr=…"),
        ({"b1": 0.1}, TypeError, "has no hyperparameter 'b1'; write beta1=…"),
        ({"lr": "fast"}, TypeError, "hyperparameter 'lr' is a number, not 'fast'"),
        ({"lr": float("nan")}, ValueError, "hyperparameter 'lr' is NaN"),
        ({"lr": jnp.ones(3)}, TypeError, r"hyperparameter 'lr' is a number, or an array of shape \(\), not float32 of"),
        ({"beta1": 2.0}, ValueError, "rule 'adamw' needs 0 <= beta1 < 1"),
        ({"beta1": 2.0, "lr": jnp.float32(1)}, ValueError, "rule 'adamw' needs 0 <= beta1 < 1"),
        ({"threads": 0}, ValueError, "threads is a number from 1"),
        ({"skip_nonfinite": 1}, TypeError, "skip_nonfinite is True or False"),
        ({"seed": -1}, ValueError, "seed is a whole number"),
        ({"store": {"x": "bf16"}}, of.UsageError, "there is no array 'x'"),
        ({"store": {"p": "bf16"}}, of.UsageError, "p is stored as the array that is given"),
        ({"store": {"m": "int8"}}, of.UsageError, "m: there is no format 'int8'"),
        ({"master": "f64"}, of.UsageError, "master is 'f32' or 'split'"),
        ({"rounding": "up"}, of.UsageError, "rounding is 'nearest' or 'stochastic'"),
    ],
)
def test_settings(settings: dict[str, Any], kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        ofj.adamw(**settings)


def test_rules_that_are_none() -> None:
    with pytest.raises(of.UsageError, match="there is no rule 'adamv'; did you mean 'adam'"):
        ofj.Optimizer("adamv")
    with pytest.raises(TypeError, match="a rule is made by @rule"):
        ofj.Optimizer(3)


def test_schedules_that_cannot_be_traced() -> None:
    for lr in (of.schedules.cosine(3e-4, steps=10), lambda count: 0.1 if count > 3 else 0.2):
        opt = ofj.adamw(lr=lr)
        with pytest.raises(TypeError, match="the schedule of hyperparameter 'lr' cannot be traced"):
            traced(s=opt.init(P), opt=opt)
    opt = ofj.adamw(lr=lambda count: "fast")
    with pytest.raises(TypeError, match="'lr' gives 'fast', which is no number"):
        traced(s=opt.init(P), opt=opt)
    opt = ofj.adamw(lr=lambda count: jnp.ones(2))
    with pytest.raises(TypeError, match="the schedule of hyperparameter 'lr' is a number, or an array of shape"):
        traced(s=opt.init(P), opt=opt)


def test_loss_scales() -> None:
    for scale, kind in ((0.0, ValueError), ("x", TypeError), (jnp.ones(2), TypeError)):
        with pytest.raises(kind, match="grad_scale"):
            traced(grad_scale=scale)


def test_what_shows_when_a_step_runs() -> None:
    p = [jnp.ones(2)]
    opt = ofj.adamw(beta1=jnp.float32(2))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"rule 'adamw': .*0 <= beta1 < 1.* \(at t=1\)"):
        jax.block_until_ready(jax.jit(opt.step)(p, p, opt.init(p)))

    @rule
    def divides(p, g, *, t, lr=0.1):
        p = p - lr / (t - 1) * g
        return p

    opt = ofj.Optimizer(divides)
    with pytest.raises(jax.errors.JaxRuntimeError, match="rule 'divides': a scalar has no value: division by zero"):
        jax.block_until_ready(jax.jit(opt.step)(p, p, opt.init(p)))
    assert p[0].tolist() == [1, 1]


def test_derivatives() -> None:
    p = [jnp.ones(2)]
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(lambda p: OPT.step(p, p, OPT.init(p))[0][0].sum())(p)


SEVERAL = """
import jax, jax.numpy as jnp, optforge as of, optforge.jax as ofj
from jax.sharding import NamedSharding, PartitionSpec
mesh = jax.make_mesh((2,), ("x",))
for spec in (PartitionSpec("x"), PartitionSpec()):
    x = jax.device_put(jnp.ones(4), NamedSharding(mesh, spec))
    opt = ofj.sgd()
    for call in (opt.step, jax.jit(lambda p, g, s: opt.step(p, g, s))):
        try:
            call([x], [x], opt.init([jnp.ones(4)]))
        except of.UsageError as problem:
            print(problem)
print(opt.step([jnp.ones(4)], [jnp.ones(4)], opt.init([jnp.ones(4)]))[0][0].tolist())
"""


def test_arrays_on_several_devices() -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    answer = subprocess.run([sys.executable, "-c", SEVERAL], env=environment, capture_output=True, text=True)
    lines = answer.stdout.splitlines()
    assert len(lines) == 5, answer.stderr
    for line in lines[:4:2]:
        assert line == "params[0] is on 2 devices; optforge.jax steps on one"
    for line in lines[1:4:2]:
        assert line.startswith("optforge.jax steps on one device, and this computation is compiled for 2")
    assert lines[4] == str([float(np.float32(1 - 0.01))] * 4) or lines[4].startswith("[0.9")


def test_other_platforms() -> None:
    traced_step = jax.jit(lambda p, g, s: OPT.step(p, g, s)).trace(P, P, STATE)
    for platforms, named in ((("rocm",), "rocm"), (("tpu",), "tpu"), (("cpu", "cuda"), "cpu, cuda")):
        with pytest.raises(of.UsageError, match=f"on CPUs and on NVIDIA's GPUs, and this .* is compiled for {named}:"):
            traced_step.lower(lowering_platforms=platforms)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("OPTFORGE_CACHE_DIR", str(tmp_path / "empty"))

    @rule
    def unseen(p, g, *, lr=0.1):
        p = p - lr * g * 3
        return p

    opt = ofj.Optimizer(unseen)
    with pytest.raises(of.EnvironmentProblem, match="there is no C compiler 'no-such-compiler', which the variable CC"):
        jax.jit(opt.step).lower(P, P, opt.init(P))
