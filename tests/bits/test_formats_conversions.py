"""The conversions of the runtime beside the oracle: every number of 16 bits, rounding, what a split master leaves."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from amount import FULL
from converting import BF16, COLUMNS, F16, KEY, LOAD, NEAREST, SETS, SPLIT, STOCHASTIC, Conversions, build
from oracles import _formats

pytestmark = pytest.mark.skipif(not SETS, reason="the instruction sets of x86-64 are run")

SHORT = [("gcc", "-O2"), ("clang", "-O2")]
LONG = [(compiler, flags) for compiler in ("gcc", "clang") for flags in ("-O0", "-O2", "-O3 -march=native")]


@pytest.fixture(params=LONG if FULL else SHORT, ids=" ".join)
def conversions(request: pytest.FixtureRequest) -> Conversions:
    return build(*request.param)


@cache
def every_float(seed: int = 5) -> Any:
    """Floats of all signs and exponents and upper fractions, at, beside and between the ties of both formats; and those
    around every number and tie of f16 below its least normal one."""
    random = np.random.default_rng(seed)
    upper = np.arange(2**16, dtype=np.uint32) << np.uint32(16)
    lower = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    tails = [random.integers(0, 8, upper.size) << 13 | tail if tail < 0x2000 else tail for tail in lower]
    bits = [upper | np.asarray(tail, np.uint32) for tail in [*tails, *random.integers(0, 2**16, (3, upper.size))]]
    halves = np.arange(2**11 + 9) * 2.0**-25
    around = np.nextafter(halves, np.float32(np.inf), dtype=np.float32), np.nextafter(halves, 0, dtype=np.float32)
    small = np.concatenate([halves.astype(np.float32), *around])
    return np.concatenate([*(own.view(np.float32) for own in bits), small, -small])


@cache
def rounded(name: str) -> Any:
    """Those to nearest, as the oracle has them."""
    return _formats.nearest(name, every_float())


@cache
def drawn(name: str, key: Any) -> Any:
    """Those at random."""
    x = every_float()
    draws = _formats.draws(*key[:4], key[4] + np.arange(x.size, dtype=np.uint64))
    return _formats.stochastic(name, x, draws)


def canonical(values: Any) -> Any:
    """Bits, all NaN of a sign alike."""
    return np.where(np.isnan(values), np.float32(np.nan), values).view(np.uint32), np.signbit(values)


# ── the oracle beside what others have made ─────────────────────────────────────────────────────────────────────────


def test_the_oracle_is_numpy_s_half_precision() -> None:
    codes = np.arange(2**16, dtype=np.uint16)
    assert np.array_equal(_formats.values("f16"), codes.view(np.float16).astype(np.float32), equal_nan=True)
    x = every_float()
    x = x[~np.isnan(x)]
    with np.errstate(over="ignore"):
        assert np.array_equal(_formats.nearest("f16", x), x.astype(np.float16).view(np.uint16))


def test_the_oracle_is_the_upper_half_of_a_float() -> None:
    codes = np.arange(2**16, dtype=np.uint32)
    halves = (codes << np.uint32(16)).view(np.float32)
    assert np.array_equal(_formats.values("bf16"), halves, equal_nan=True)
    number = ~np.isnan(halves)
    assert np.array_equal(_formats.nearest("bf16", halves)[number], codes[number])


def test_the_oracle_draws_what_integers_of_any_size_give() -> None:
    indices = np.array([0, 1, 2, 1023, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 5 * 2**32 + 77, 2**40], np.uint64)
    for words in [(0, 1, 0, 0), KEY[:4], (2**64 - 1, 2**64 - 1, 2**64 - 1, 190)]:
        expected = [_formats.one_draw(*words, int(index)) for index in indices]
        assert _formats.draws(*words, indices).tolist() == expected


# ── to and fro ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("set", SETS)
def test_every_number_is_loaded_exactly_and_stored_as_it_was(name: str, set: int, conversions: Conversions) -> None:
    codes = np.arange(2**16, dtype=np.uint16)
    loaded = conversions.load(name, set, codes)
    for own, expected in zip(canonical(loaded), canonical(_formats.values(name)), strict=True):
        assert np.array_equal(own, expected)
    nan = np.isnan(loaded)
    quiet = (codes & 0x8000) | _formats.NAN[name]
    for row in (NEAREST, STOCHASTIC):
        assert np.array_equal(conversions.store(name, set, loaded, row), np.where(nan, quiet, codes))


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("set", SETS)
def test_floats_are_rounded_to_nearest(name: str, set: int, conversions: Conversions) -> None:
    assert np.array_equal(conversions.store(name, set, every_float()), rounded(name))


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("set", SETS)
def test_floats_are_rounded_at_random(name: str, set: int, conversions: Conversions) -> None:
    for key in (KEY, (7, 2**33, 1, 0, 5 * 2**32 + 1024)):
        assert np.array_equal(conversions.store(name, set, every_float(), STOCHASTIC, key), drawn(name, key))


@pytest.mark.parametrize("set", SETS)
def test_a_split_master_is_the_oracle_s(set: int, conversions: Conversions) -> None:
    x = every_float()
    stored, low, again = np.empty(x.size, np.uint16), np.empty(x.size, np.uint16), np.empty_like(x)
    conversions.convert(NEAREST, SPLIT, set, stored, x, low)
    p, left = _formats.split(x)
    assert np.array_equal(stored, p)
    assert np.array_equal(low, left)
    random = np.random.default_rng(3).integers(0, 2**16, x.size).astype(np.uint16)
    conversions.convert(LOAD, SPLIT, set, stored, again, random)
    for own, expected in zip(canonical(again), canonical(_formats.join(stored, random)), strict=True):
        assert np.array_equal(own, expected)


@pytest.mark.parametrize("set", SETS)
def test_a_split_master_loses_nothing(set: int, conversions: Conversions) -> None:
    assert conversions.split_faults(set, 7, 251) == 0


@pytest.mark.skipif(not FULL, reason="takes long; set OPTFORGE_TEST_FULL=1")
@pytest.mark.parametrize("set", SETS)
def test_a_split_master_loses_no_float_at_all(set: int) -> None:
    assert build("gcc", "-O2").split_faults(set, 0, 1) == 0


@pytest.mark.parametrize("row", [LOAD, NEAREST, STOCHASTIC])
@pytest.mark.parametrize("set", SETS)
def test_conversions_of_all_sizes_stay_in_their_arrays(row: int, set: int, conversions: Conversions) -> None:
    random = np.random.default_rng(row)
    codes = random.integers(0, 2**16, 300).astype(np.uint16)
    for column in (BF16, F16, SPLIT) if row != STOCHASTIC else (BF16, F16):
        floats = codes.astype(np.float32) / 3
        whole = [codes.copy(), floats.copy(), codes[::-1].copy()]
        conversions.convert(row, column, set, whole[0], whole[1], whole[2])
        for n in range(0, 258) if FULL else (*range(0, 70), 127, 128, 255, 256, 257):
            own = [codes.copy(), floats.copy(), codes[::-1].copy()]
            conversions.convert(row, column, set, own[0][3:], own[1][3 : 3 + n], own[2][3:], (*KEY[:4], 3))
            written = [(1,), (0, 2) if column == SPLIT else (0,), (0,)][row]
            for k, before in enumerate((codes, floats, codes[::-1])):
                expected = before.copy()
                if k in written:
                    expected[3 : 3 + n] = whole[k][3 : 3 + n]
                assert np.array_equal(own[k], expected, equal_nan=True), (column, n, k)
