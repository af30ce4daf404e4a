"""Emitted CUDA, unmodified, on an emulation: bits, boundaries, orders of threads and blocks, graphs, ranks, refusals."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from cuda import Cuda, Memory, Stats, agree, order
from oracles import names, oracle
from stepping import spread

CHUNK, TILE = 32768, 4096
SIZES = (0, 1, 3, 4, 5, 31, 32, 33, 1023, 1025, TILE - 1, TILE + 1, CHUNK - 1, CHUNK, CHUNK + 5, 2 * CHUNK + 1028)


def steps(cuda: Cuda, memory: Memory, number: int = 3, grad_scale: float = 2.5, **how: Any) -> None:
    """Steps with statistics and without, in turn, each compared with the reference."""
    workspace = cuda.workspace(memory.sizes)
    plain = cuda.options(workspace.arrays[0], grad_scale=grad_scale, **how)
    status, plan = cuda.plan(memory.tensors, plain, memory.dtype)
    assert status == 0
    hyper = memory.reference._rows()
    assert cuda.call("state_init", ctypes.byref(plan), cuda.hyper(*hyper), None) == 0
    told, each = Stats(), (Stats * max(len(memory.sizes), 1))()
    starting = np.ones(max(len(memory.sizes), 1), np.uint8)
    for t in range(1, number + 1):
        grads = [spread(memory.rng, n, memory.dtype) for n in memory.sizes]
        memory.begin(grads)
        options = cuda.options(workspace.arrays[0], grad_scale=grad_scale, **how)
        if t == 1:
            options.starting = starting.ctypes.data
        if t % 2 == 0:
            options.stats, options.tensor_stats = ctypes.addressof(told), ctypes.addressof(each)
        assert cuda.step(t, plan, options, *hyper) == 0
        expected = memory.reference.step([g.copy() for g in grads], grad_scale=grad_scale, stats=True)
        memory.check(f"step {t}")
        if t % 2 == 0:
            agree(told, each, expected, f"step {t}")
        if how.get("zero_grads"):
            assert all(not tensor["g"].any() for tensor in memory.tensors)
    assert workspace.intact()


@pytest.mark.parametrize("name", names())
def test_every_rule(name: str, tmp_path: Path) -> None:
    cuda = Cuda(of.rules[name], tmp_path)
    settings = oracle(name).SETTINGS[0]
    for dtype in (np.float32, np.float64):
        for aligned in (False, True):
            order("random:7" if aligned else "descending", "descending" if aligned else "random:3")
            memory = Memory(cuda, dtype, SIZES, aligned, settings=settings, skip_nonfinite=aligned, zero_grads=aligned)
            steps(cuda, memory, skip_nonfinite=aligned, zero_grads=aligned)
