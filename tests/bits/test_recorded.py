"""Every bit is as it was recorded: all rules with everything that a step can be asked for (see recorded/record.py)."""

from __future__ import annotations

import itertools

import pytest

from amount import FULL
from recorded import record

CASES = record.cases()
# The full test takes every combination on every number of threads; otherwise numbers of threads take turns, and the
# tenth of the combinations that a generator chooses is taken.
TENTH = [number % 10 == 0 for number in record.integers(1, len(CASES))]
TURNS = dict(zip(itertools.compress(CASES, TENTH), itertools.cycle((n,) for n in record.THREADS), strict=False))
THREADS = dict.fromkeys(CASES, record.THREADS) if FULL else TURNS


@pytest.fixture(scope="module")
def recorded() -> dict[str, str]:
    """The hashes, where this platform's library takes the powers that it took there."""
    found = record.read()
    different = [name for name, value in record.powers().items() if found["powers"].get(name) != value]
    if different:
        pytest.skip(f"the bits of this platform's pow are others than the record's: {', '.join(different)}")
    return found["hashes"]


def test_the_record_has_every_combination(recorded: dict[str, str]) -> None:
    assert list(recorded) == [case.key for case in CASES]


@pytest.mark.parametrize("name", record.SETTINGS)
def test_every_bit_is_as_recorded(name: str, recorded: dict[str, str]) -> None:
    chosen = [case for case in THREADS if case.rule == name]
    differing = [line for case in chosen for line in record.differences([case], THREADS[case], recorded)]
    assert not differing, "\n".join(
        [f"{len(differing)} differ; python tests/recorded/record.py shows all:", *differing]
    )
