"""The random bits of stochastic rounding look random, and what is stored is right on average.

Each check has a planted fault that it must find: bits that are too few, elements that share theirs, steps that do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from converting import COLUMNS, SETS, STOCHASTIC, Conversions, build
from oracles import _formats

pytestmark = pytest.mark.skipif(not SETS, reason="the instruction sets of x86-64 are run")

N = 10_000_000
SEED, T, STREAM, ARRAY = 20_24, 7, 3, 2
ALLOWED = 5.0  # standard deviations; less than one in a million goes farther by chance


@pytest.fixture(scope="module")
def conversions() -> Conversions:
    return build("gcc", "-O2")


@pytest.fixture(scope="module")
def draws(conversions: Conversions) -> Callable[..., Any]:
    """Draws by what they are made of."""

    def draw(seed: int = SEED, t: int = T, stream: int = STREAM, array: int = ARRAY, begin: int = 0) -> Any:
        return conversions.draws((seed, t, stream, array, begin), N)

    return draw


def deviation(cells: Any, number: int) -> float:
    """How far chi squared of equally likely cells is from its mean, in standard deviations."""
    counts = np.bincount(cells, minlength=number)
    expected = cells.size / number
    return float((((counts - expected) ** 2).sum() / expected - (number - 1)) / math.sqrt(2 * (number - 1)))


def uniform(drawn: Any) -> list[float]:
    """The deviations of the upper half, of the lower half, and of each bit, of the number of ones from the mean."""
    found = [deviation(drawn >> np.uint32(16), 2**16), deviation(drawn & np.uint32(0xFFFF), 2**16)]
    for bit in range(32):
        ones = int(np.count_nonzero(drawn & np.uint32(1 << bit)))
        found.append((ones - drawn.size / 2) / math.sqrt(drawn.size / 4))
    return found


def paired(a: Any, b: Any) -> list[float]:
    """The deviations of pairs: upper bytes, and lower bytes, and of each bit's agreement."""
    upper = (a >> np.uint32(24)) << np.uint32(8) | b >> np.uint32(24)
    lower = (a & np.uint32(0xFF)) << np.uint32(8) | b & np.uint32(0xFF)
    middle = (a >> np.uint32(16) & np.uint32(0xFF)) << np.uint32(8) | b >> np.uint32(16) & np.uint32(0xFF)
    found = [deviation(cells, 2**16) for cells in (upper, middle, lower)]
    for bit in range(32):
        apart = int(np.count_nonzero((a ^ b) & np.uint32(1 << bit)))
        found.append((apart - a.size / 2) / math.sqrt(a.size / 4))
    return found


def worst(deviations: list[float]) -> float:
    return max(map(abs, deviations))


def test_draws_are_the_oracle_s(conversions: Conversions) -> None:
    key = (SEED, T, STREAM, ARRAY)
    for begin in (0, 1024, 2**32, 3 * 2**32 + 4096):
        expected = _formats.draws(*key, begin + np.arange(100_000, dtype=np.uint64))
        assert np.array_equal(conversions.draws((*key, begin), 100_000), expected)


def test_draws_are_uniform(draws: Callable[..., Any]) -> None:
    for changed in ({}, {"seed": 0, "t": 1, "stream": 0, "array": 0}):
        assert worst(uniform(draws(**changed))) < ALLOWED


def test_one_bit_less_is_found(draws: Callable[..., Any]) -> None:
    assert worst(uniform(draws() & np.uint32(0xFFFEFFFF))) > 100 * ALLOWED


@pytest.mark.parametrize("apart", [1, 3, 256, 1024])
def test_neighbours_are_independent(apart: int, draws: Callable[..., Any]) -> None:
    drawn = draws()
    assert worst(paired(drawn[:-apart], drawn[apart:])) < ALLOWED


def test_a_shared_index_is_found(draws: Callable[..., Any]) -> None:
    drawn = np.repeat(draws(), 2)[:N]  # as of index / 2
    assert worst(paired(drawn[:-1], drawn[1:])) > 100 * ALLOWED


@pytest.mark.parametrize(
    "changed",
    [{"t": T + 1}, {"array": ARRAY + 1}, {"stream": STREAM + 1}, {"begin": 2**32}],
    ids=str,
)
def test_steps_arrays_tensors_and_seeds_are_independent(changed: dict[str, int], draws: Callable[..., Any]) -> None:
    assert worst(paired(draws(), draws(**changed))) < ALLOWED


def test_what_is_added_to_the_seed_is_not_added_to_the_step(draws: Callable[..., Any]) -> None:
    """Words that trade places, or a bit, are other words."""
    drawn = draws(seed=5, t=9)
    for other in ({"seed": 9, "t": 5}, {"seed": 5, "t": 9, "stream": ARRAY, "array": STREAM}):
        assert worst(paired(drawn, draws(**other))) < ALLOWED


def test_a_repeated_step_is_found(draws: Callable[..., Any]) -> None:
    assert worst(paired(draws(t=T), draws(t=(T + 1) // 2 * 2 - 1))) > 100 * ALLOWED


# ── on average ──────────────────────────────────────────────────────────────────────────────────────────────────────

SHARES = (1 / 65536, 3 / 65536, 0.25, 0.5, 0.75, 32767 / 65536, 65535 / 65536)
MANY = 1 << 22


def neighbours(name: str, code: int) -> tuple[float, float]:
    table = _formats.magnitudes(name)
    return float(table[code]), float(table[code + 1])


def places(name: str) -> list[float]:
    """Floats between neighbours: large, of the size of one, and below the least normal number."""
    normal = [share for share in SHARES if name == "bf16" or share * 8192 % 1 == 0]
    codes = {"bf16": [0x3F80, 0x7F7E, 0x0081, 0x0003], "f16": [0x3C00, 0x7BFE, 0x0401]}[name]
    found = [(code, share) for code in codes for share in (*normal, 1 / 8192)]
    if name == "f16":
        found += [(code, share) for code in (0, 1, 0x1FF, 0x3FF) for share in SHARES]
    floats = []
    for code, share in found:
        low, high = neighbours(name, code)
        x = low + share * (high - low)
        if float(np.float32(x)) == x:  # numbers of many bits have no floats so near to them
            floats.append(x)
    return floats


def shares_up(name: str, stored: Any, x: float) -> tuple[float, float]:
    """How many were rounded up, in standard deviations from the number that x asks for."""
    code = int(np.searchsorted(_formats.magnitudes(name), x, side="right")) - 1
    low, high = neighbours(name, code)
    up = int(np.count_nonzero(stored == code + 1))
    assert up + int(np.count_nonzero(stored == code)) == stored.size
    share = (x - low) / (high - low)
    return (up - stored.size * share) / math.sqrt(stored.size * share * (1 - share)), share


@pytest.mark.parametrize("name", COLUMNS)
def test_what_is_stored_is_the_value_on_average(name: str, conversions: Conversions) -> None:
    own = places(name)
    assert len(own) > 20
    for number, x in enumerate(own):
        for sign in (1, -1) if number % 4 == 0 else (1,):
            wide = np.full(MANY, sign * x, np.float32)
            key = (SEED, number + 1, STREAM, ARRAY, 0)
            stored = conversions.store(name, SETS[-1], wide, STOCHASTIC, key) ^ np.uint16(0x8000 if sign < 0 else 0)
            found, share = shares_up(name, stored, x)
            assert abs(found) < ALLOWED, (x, share)


def test_fifteen_bits_are_found_on_average(draws: Callable[..., Any]) -> None:
    few = draws()[:MANY].astype(np.uint64) & np.uint64(0xFFFE0000)
    x = 1 + 2.0**-23  # 1 / 65,536 of the way
    found, share = shares_up("bf16", _formats.stochastic("bf16", np.full(MANY, x, np.float32), few), x)
    assert share == 1 / 65536
    assert abs(found) > ALLOWED


@pytest.mark.parametrize("name", COLUMNS)
def test_sums_of_many_steps_are_right(name: str, conversions: Conversions) -> None:
    """A sum of steps that are too small for the format grows all the same; to nearest it stays where it was."""
    step, steps, width = 2.0**-14, 1024, 4096
    random, nearest = (np.ones(width, np.float32) for _ in range(2))
    for t in range(1, steps + 1):
        wide = random + np.float32(step)
        stored = conversions.store(name, SETS[-1], wide, STOCHASTIC, (SEED, t, STREAM, ARRAY, 0))
        random = conversions.load(name, SETS[-1], stored)
        nearest = conversions.load(name, SETS[-1], conversions.store(name, SETS[-1], nearest + np.float32(step)))
    assert np.all(nearest == 1)
    gap = float(_formats.magnitudes(name)[_formats.nearest(name, np.ones(1, np.float32))[0] + 1]) - 1
    spread = math.sqrt(steps * step * gap / width)  # of the mean: a step's variance is at most step times gap
    assert abs(float(random.mean(dtype=np.float64)) - (1 + steps * step)) < ALLOWED * spread
