"""optforge.jax on a GPU: XLA calls the handler, and the bits are those of the reference. Without one it is emulated."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from amount import some
from conftest import require, require_jax
from data import same
from emulation import link_emulated
from places import TESTS

jax = require_jax()
jnp = jax.numpy

import optforge.jax as ofj  # noqa: E402
from jaxing import RULES, agree, begin, begins, every_gradient, reference, stepped, x64  # noqa: E402
from optforge.core import formats  # noqa: E402
from optforge.core.dtypes import DTYPES  # noqa: E402
from optforge.jax import xla  # noqa: E402

SAID = (jax.errors.JaxRuntimeError, ValueError)  # the latter from a jitted function that ran before
P = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}


def emulated(files: Mapping[str, str]) -> Path:
    """The handler and the kernels for the emulation."""
    directory = Path(tempfile.mkdtemp(dir=os.environ["OPTFORGE_CACHE_DIR"]))
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    shim = directory / "xla_on_cpu.cu"
    shim.write_text((TESTS / "emulation" / shim.name).read_text(encoding="utf-8"), encoding="utf-8")
    return link_emulated([shim], directory / "kernel.so", ["-O0", f"-I{directory}"])


GPU = xla.PLATFORMS["cuda"]
REAL = jax.default_backend() == "gpu"
emulation_alone = pytest.mark.skipif(REAL, reason="the emulation is told what to answer")


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where there is none, JAX's CPU is one that emulates it."""
    if REAL:
        yield
        return
    require("g++")
    monkeypatch.setitem(xla.PLATFORMS, "cpu", replace(GPU, name="cpu", library=emulated))
    xla.compiled.cache_clear()
    yield
    xla.compiled.cache_clear()


# ── bits ────────────────────────────────────────────────────────────────────────────────────────────────────────────

CASES = [(name, dtype, how) for name in RULES for dtype in ("float32", "float64") for how in ("jit", "scan")]
USUAL = (("lamb", "float64", "jit"), ("begins", "float32", "scan"))


@pytest.mark.parametrize(("name", "dtype", "how"), some(CASES, 1000, USUAL.__contains__))
def test_bits_of_the_reference(name: str, dtype: Any, how: str) -> None:
    own, settings = RULES[name]
    rng = np.random.default_rng(1)
    params, grads = begin(rng, np.dtype(dtype)), every_gradient(rng, np.dtype(dtype))
    expected = reference(own, params, grads, **settings)
    with x64(dtype == "float64"):
        agree(*stepped(ofj.Optimizer(own, **settings), params, grads, how), expected)


def test_all_that_a_step_can_be_told() -> None:
    """Two dtypes in one norm, masters, random rounding; a traced rate and loss scale; statistics and a skipped step."""
    rng = np.random.default_rng(2)
    kinds = [jnp.float16, jnp.bfloat16, jnp.float16, jnp.float16, jnp.bfloat16]
    sizes = (3, 1030, 0, 40, 5)
    params = [rng.standard_normal(n).astype(kind) for n, kind in zip(sizes, kinds, strict=True)]
    how: dict[str, Any] = {"master": "f32", "rounding": "stochastic", "seed": 3, "store": {"m": "bf16"}}
    how |= {"skip_nonfinite": True, "max_norm": 0.5}
    rule = "clip_by_global_norm:adamw"
    expected = of.Optimizer([p.copy() for p in params], rule, target="c", lr=lambda t: 0.25 / t, **how)
    opt = ofj.Optimizer(rule, lr=lambda count: 0.25 / (1 + count), **how)
    p, state = [jnp.asarray(own) for own in params], None
    state = opt.init(p)
    step = jax.jit(lambda p, g, s, scale: opt.step(p, g, s, grad_scale=scale, stats=True), donate_argnums=(0, 2))
    for k, scale in enumerate((4.0, 0.5, 2.0, 1.0)):
        g = [rng.standard_normal(n).astype(kind) for n, kind in zip(sizes, kinds, strict=True)]
        if k == 1:
            g[1][1029] = np.nan
        stats = expected.step([own.copy() for own in g], grad_scale=scale, stats=True)
        p, state, told = step(p, [jnp.asarray(own) for own in g], state, jnp.float32(scale))
        assert int(state.count) == expected.t == (1, 1, 2, 3)[k]
        assert all(a.tobytes() == np.asarray(b).tobytes() for a, b in zip(expected.params, p, strict=True)), k
        assert (int(told.nan), bool(told.skipped)) == (stats.nan, stats.skipped)
        for name in ("grad_norm", "clipped_grad_norm", "param_norm", "update_norm", "max_update_ratio"):
            assert same(told._asdict()[name], np.float32(stats[name])), name
            assert same(told.per_tensor._asdict()[name], stats.per_tensor[name].astype(np.float32)), name
    for of_state, values in expected.state.items():
        assert all(same(a, np.asarray(b)) for a, b in zip(values, state.state[of_state], strict=True)), of_state


def test_a_master_beside_tensors_that_need_none() -> None:
    """As norms are float32 in a model of bfloat16: the lists have different numbers of arrays. LAMB has no sum of both."""
    rng = np.random.default_rng(6)
    kinds = (np.float32, jnp.bfloat16, np.float32, jnp.bfloat16)
    params, grads = ([rng.standard_normal(1100 + k).astype(kind) for k, kind in enumerate(kinds)] for _ in range(2))
    expected = [p.copy() for p in params]
    alone = [
        of.Optimizer(expected[k::2], "lamb", target="c", master=master, lr=0.25)
        for k, master in enumerate((None, "f32"))
    ]
    opt = ofj.Optimizer("lamb", master="f32", lr=0.25)
    p = [jnp.asarray(own) for own in params]
    state = opt.init(p)
    for _ in range(2):
        for k, own in enumerate(alone):
            own.step([g.copy() for g in grads[k::2]])
        p, state = opt.step(p, [jnp.asarray(g) for g in grads], state)
        assert all(a.tobytes() == np.asarray(b).tobytes() for a, b in zip(expected, p, strict=True))


def test_double_beside_float() -> None:
    """Two dtypes share a norm; with x64 it is told in double, and a traced rate has the bits of a double."""
    rng = np.random.default_rng(3)
    kinds = (np.float64, np.float32)
    params, grads = ([rng.standard_normal(700).astype(kind) for kind in kinds] for _ in range(2))
    expected = of.Optimizer(
        [p.copy() for p in params], "clip_by_global_norm:adamw", target="c", max_norm=0.5, lr=0.0031
    )
    stats = expected.step(grads, stats=True)
    with x64(True):
        opt = ofj.Optimizer("clip_by_global_norm:adamw", max_norm=0.5, lr=jnp.float64(0.0031))
        p = [jnp.asarray(own) for own in params]
        p, _, told = opt.step(p, [jnp.asarray(own) for own in grads], opt.init(p), stats=True)
        assert all(same(a, b) for a, b in zip(p, expected.params, strict=True))
        assert same(told.grad_norm, np.float64(stats.grad_norm))
        assert same(told.per_tensor.param_norm, stats.per_tensor.param_norm)


def test_state_that_begins_as_a_traced_hyperparameter() -> None:
    rng = np.random.default_rng(7)
    params, grads = begin(rng, np.float32), every_gradient(rng, np.float32)
    beta = float(np.float32(0.7))
    expected = reference(begins, params, grads, lr=0.5, beta=beta)
    own = ofj.Optimizer(begins, lr=lambda count: jnp.float32(0.5), beta=jnp.float32(beta))
    p, state = stepped(own, params, grads, "scan")
    agree(p, state, expected)


def test_ensembles_and_empty_trees() -> None:
    rng = np.random.default_rng(9)
    p, g = (rng.standard_normal((3, 40)).astype(np.float32) for _ in range(2))
    opt = ofj.adamw()
    state = jax.vmap(opt.init)(p)
    state = state._replace(count=jnp.array([0, 4, 70], jnp.int32))
    made, behind = jax.jit(jax.vmap(lambda p, g, s: opt.step(p, g, s)))(p, g, state)
    for k, t in enumerate((0, 4, 70)):
        expected = of.Optimizer([p[k].copy()], "adamw", target="numpy")
        expected.t = t
        expected.step([g[k]])
        assert same(made[k], expected.params[0])
    assert behind.count.tolist() == [1, 5, 71]
    assert int(opt.step({}, {}, opt.init({}))[1].count) == 1
    updates, _ = opt.update({"w": jnp.ones(3)}, opt.init({"w": jnp.ones(3)}), {"w": jnp.ones(3)})
    assert updates["w"].shape == (3,) and float(updates["w"][0]) < 0


# ── what goes wrong on the device is told by the next step ──────────────────────────────────────────────────────────


def whole(tree: Any) -> bytes:
    """The bits of all arrays of a pytree."""
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))


def test_a_step_whose_scalars_have_no_value_changes_nothing() -> None:
    opt = ofj.adamw(beta1=lambda count: jnp.where(count == 1, 2.0, 0.9))
    step = jax.jit(lambda p, s: opt.step(p, P, s))
    first = step(P, opt.init(P))
    second = step(*first)
    assert whole(second) == whole(first)
    words = r"rule 'adamw': .*0 <= beta1 < 1.* \(at t=2, in a step before this one, which changed nothing\)"
    with pytest.raises(SAID, match=words):
        jax.block_until_ready(step(P, opt.init(P)))
    assert whole(step(P, opt.init(P))) == whole(first)  # which is told once


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_a_traced_loss_scale_that_is_none(scale: float) -> None:
    opt = ofj.adamw()
    step = jax.jit(lambda p, s, scale: opt.step(p, P, s, grad_scale=scale))
    jax.block_until_ready(step(P, opt.init(P), jnp.float32(scale)))
    with pytest.raises(SAID, match="grad_scale is not a positive number"):
        jax.block_until_ready(step(P, opt.init(P), jnp.float32(1)))


@emulation_alone
@pytest.mark.parametrize("call", ["cudaLaunchKernel", "cudaMemsetAsync", "cudaLaunchHostFunc", "cudaStreamIsCapturing"])
def test_a_call_of_cuda_that_fails(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = ofj.adamw()
    monkeypatch.setenv("OPTFORGE_EMULATION_REFUSE", f"{call}:719")
    with pytest.raises(SAID, match="rule 'adamw': an emulated error"):
        jax.block_until_ready(jax.jit(opt.step)(P, P, opt.init(P)))


@emulation_alone
def test_no_step_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = ofj.adamw()
    monkeypatch.setenv("OPTFORGE_EMULATION_CAPTURING", "1")
    with pytest.raises(SAID, match="a step cannot be captured in a command buffer"):
        jax.block_until_ready(jax.jit(opt.step)(P, P, opt.init(P)))


# ── what is handed to XLA, and to nvcc ──────────────────────────────────────────────────────────────────────────────


@emulation_alone
def test_lowered_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One custom call, whose results lie in its operands, and scratch memory behind them."""
    monkeypatch.setitem(xla.PLATFORMS, "cuda", replace(GPU, library=emulated))
    opt = ofj.adamw()
    lowered = jax.jit(lambda p, g, s: opt.step(p, g, s)).trace(P, P, opt.init(P)).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("custom_call @optforge_cuda_adamw_") == 1
    assert text.count("output_operand_alias<") == 7
    assert "xui8>" in text


def test_nvcc_takes_the_handler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a warning, for the oldest device; and what is loaded knows how much memory a step needs."""
    require("nvcc")
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-Werror all-warnings -Xcompiler=-Wall,-Wextra,-Werror")
    kernel = of.rules.novograd.kernel()
    storages = tuple(formats.plain(DTYPES[name], kernel.arrays) for name in ("f32", "f64"))
    own = xla.target(GPU, of.rules.novograd, (), storages)
    assert own.library.optforge_xla_scratch_size(1_000_000, 3) > 2 * 8 * 1_000_000 / 1024
