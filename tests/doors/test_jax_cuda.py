"""optforge.jax on a GPU, which is emulated: XLA itself calls the handler, and the bits are those of the reference."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from conftest import require, require_jax
from data import same
from emulation import link_emulated
from places import TESTS

jax = require_jax()
jnp = jax.numpy

import optforge.jax as ofj  # noqa: E402
from jaxing import STEPS, begin, every_gradient, flat, reference, stepped, x64  # noqa: E402
from optforge.jax import xla  # noqa: E402


def emulated(files: Mapping[str, str]) -> Path:
    """The handler and the kernels for the emulation, called on the CPU."""
    directory = Path(tempfile.mkdtemp(dir=CACHE[0]))
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    shim = directory / "xla_on_cpu.cu"
    shim.write_text((TESTS / "emulation" / shim.name).read_text())
    return link_emulated([shim], directory / "kernel.so", ["-O0", f"-I{directory}"])


CACHE: list[Path] = []


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[None]:
    """JAX's CPU is one that emulates a GPU."""
    require("g++")
    CACHE[:] = [cache]
    monkeypatch.setitem(xla.PLATFORMS, "cpu", EMULATED)
    xla.compiled.cache_clear()
    yield
    xla.compiled.cache_clear()


EMULATED = replace(xla.PLATFORMS["cuda"], name="cpu", library=emulated)


def test_one() -> None:
    rng = np.random.default_rng(1)
    params, grads = begin(rng, np.float32), every_gradient(rng, np.float32)
    expected = reference("adamw", params, grads, lr=0.003)
    for how in ("jit", "scan"):
        p, state = stepped(ofj.Optimizer("adamw", lr=0.003), params, grads, how)
        assert int(state.count) == STEPS
        for k, array in enumerate(p):
            assert same(array, expected.params[k]), f"p of shape {array.shape}"
