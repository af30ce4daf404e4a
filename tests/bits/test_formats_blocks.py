"""State of 8 bits: the numbers of codes, what is nearest to them, and blocks, beside the oracle and bitsandbytes."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import numpy as np
import pytest

from amount import FULL
from converting import BLOCKS, SETS, build
from optforge.core import blocks
from optforge.core.formats import FORMATS
from oracles import _formats
from places import TESTS

RECORDED = json.loads((TESTS / "recorded" / "bitsandbytes.json").read_text(encoding="utf-8"))
COMPILED = pytest.mark.skipif(not SETS, reason="the instruction sets of x86-64 are run")


def signed(name: str) -> bool:
    return name == "q8"


@pytest.mark.parametrize("name", BLOCKS)
def test_the_numbers_of_codes_are_those_of_bitsandbytes(name: str) -> None:
    table = blocks.table(signed(name))
    assert (np.diff(table) > 0).all() and table.dtype == np.float32 and table.size == 256
    assert hashlib.sha256(table.tobytes()).hexdigest() == RECORDED[name]["map"]
    assert table.tobytes() == _formats.numbers(name).tobytes()


@pytest.mark.parametrize("name", BLOCKS)
def test_codes_and_scales_are_those_of_bitsandbytes(name: str) -> None:
    """As its plain search gave them, which had -1 in the place of the first number: its first two codes mean others."""
    scale = 10.0 ** np.random.RandomState(8).uniform(-6, 0, 1000)
    x = (np.random.RandomState(7).standard_normal(1000) * scale).astype(np.float32)
    codes, scales = FORMATS[name].store(x if signed(name) else np.abs(x))
    theirs = np.frombuffer(bytes.fromhex(RECORDED[name]["codes"]), np.uint8)
    meant = (theirs > 1) & (codes.view(np.uint8) > 1)
    assert meant.mean() > 0.7
    assert np.array_equal(codes.view(np.uint8)[meant], theirs[meant])
    assert scales.tobytes().hex() == RECORDED[name]["absmax"]


@pytest.mark.skipif(not FULL, reason="takes long; set OPTFORGE_TEST_FULL=1")
@pytest.mark.parametrize("name", BLOCKS)
def test_the_package_beside_it(name: str) -> None:
    """bitsandbytes as it is installed: the same map, scales and numbers; its code is ours, or is not nearer."""
    functional = pytest.importorskip("bitsandbytes.functional")
    torch = pytest.importorskip("torch")
    table = functional.create_dynamic_map(signed(name))
    assert table.numpy().tobytes() == blocks.table(signed(name)).tobytes()
    number = blocks.table(signed(name)).astype(np.float64)
    for seed in range(100):
        x = np.random.default_rng(seed).standard_normal(256 * 10_000, np.float32)
        x = x if signed(name) else np.abs(x)
        ours, scales = FORMATS[name].store(x)
        own = table.clone()  # some versions write to it
        theirs, state = functional.quantize_blockwise(torch.from_numpy(x), code=own, blocksize=256)
        assert scales.tobytes() == state.absmax.numpy().tobytes()
        share = (x.reshape(-1, 256) / scales[:, None]).reshape(-1).astype(np.float64)
        far = [np.abs(number[each.view(np.uint8)] - share) for each in (ours, theirs.numpy())]
        assert (far[0] <= far[1]).all()
        codes = torch.from_numpy(ours.view(np.uint8))
        loaded = functional.dequantize_blockwise(codes, absmax=state.absmax, code=table, blocksize=256)
        assert loaded.numpy().tobytes() == FORMATS[name].load(ours, scales).tobytes()


def edges(name: str) -> Any:
    """Blocks whose scale is 1, of floats at and beside every midpoint, and others that are something else."""
    number = _formats.numbers(name).astype(np.float64)
    x = ((number[1:] + number[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(x, np.float32(to), dtype=np.float32) for to in (2, -2)]
    x = np.concatenate([number.astype(np.float32), x, *beside])
    x = np.append(x, np.zeros(-x.size % 255, np.float32)).reshape(-1, 255)
    random = np.random.default_rng(4).standard_normal((20, 256)).astype(np.float32)
    random *= np.float32(10.0) ** np.arange(-45, 39, 84 / 20)[:20, None].astype(np.float32)  # subnormal scales as well
    special = np.zeros((12, 256), np.float32)
    special[:, 7] = [0, -0.0, np.nan, np.inf, -np.inf, -1, 1e-45, -1e-45, 3.4e38, -3.4e38, 1e-38, 1]
    special[::2, 9] = -0.25
    return np.concatenate([np.insert(x, 0, 1, axis=1), random, -random, special]).reshape(-1)[:-56]


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_nearest(name: str) -> None:
    x = edges(name)
    for values in (x, x[:1], x[:0], x[:257]):
        codes, scales = FORMATS[name].store(values)
        expected = _formats.store_blocks(name, values)
        assert np.array_equal(codes.view(np.uint8), expected[0])
        assert np.array_equal(scales, expected[1], equal_nan=True)
        loaded = FORMATS[name].load(codes, scales)
        assert np.array_equal(loaded, _formats.load_blocks(name, *expected), equal_nan=True)


@COMPILED
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_runtime_has_the_same(name: str, compiler: str) -> None:
    """With each instruction set, blocks of any length, and any bits where codes and scales are read."""
    own = build(compiler, "-O2")
    x = edges(name)
    for which in SETS:
        for values in (x, *(x[-n:] for n in (1, 31, 255, 256, 257, 600))):
            codes, scales = own.store_blocks(name, which, values)
            expected = _formats.store_blocks(name, values)
            assert np.array_equal(codes, expected[0]) and np.array_equal(scales, expected[1], equal_nan=True)
            assert np.array_equal(np.signbit(scales) & ~np.isnan(scales), np.zeros(scales.size, bool))
        random = np.random.default_rng(9)
        codes = random.integers(0, 256, 5001, np.uint8)
        scales = random.integers(0, 2**32, 20, np.uint32).view(np.float32)
        loaded = own.load_blocks(name, which, codes, scales)
        assert np.array_equal(loaded, _formats.load_blocks(name, codes, scales), equal_nan=True)
        stride = 1 if FULL else 4099
        assert own.block_faults(name, which, os.getpid() % stride, stride) == 0
