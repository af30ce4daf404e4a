"""Whether two runs differ: on made-up times with the noise of busy machines, whose truth is known."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from optforge.core.diagnostics import UsageError
from optforge.profile import compare, statistics

ROUNDS = 18
LIMITS = {"step 64k": 0.46, "step 1M": 0.46, "phase 64k": 0.30, "phase 1M": 0.40}


def times(random: np.random.Generator, true: float, busy: float, rounds: int = ROUNDS) -> list[float]:
    """Turns of a contender whose undisturbed step takes `true`.

    A clock and arrays that differ from run to run by under a percent, a little jitter, and in a share of the turns
    another process: a sixth more where it used the core in between, up to several times as much where it was in the way.
    """
    base = true * (1 + 0.003 * random.standard_normal())
    found = base * (1 + np.abs(0.004 * random.standard_normal(rounds)))
    disturbed = random.random(rounds) < busy
    found[disturbed] *= random.choice([1.17, 1.3, 2.0, 5.0], disturbed.sum()) * (
        1 + 0.05 * random.random(disturbed.sum())
    )
    return [float(x) for x in found]


def run(seed: int, slower: float = 1.0, busy: float = 0.0) -> dict[str, Any]:
    """A document of a run."""
    random = np.random.default_rng(seed)
    rows = []
    for name, limit in LIMITS.items():
        work, size = name.split()
        kernel = times(random, 1.05 * limit * slower, busy)
        low = {"kernel": kernel, "traffic": times(random, limit, busy), "divider": [0.1] * ROUNDS}
        rows.append({
            "rule": "adamw", "hash": "a", "store": "f32", "work": work, "size": {"name": size, "elements": len(size)},
            "threads": 1, "isa": "x86-64-v3", "cache": "warm", "contended": busy > 0, "traffic_ns": limit,
            "divider_ns": 0.1, "rounds": {"low": low},
        })  # fmt: skip
    machine = {"processor": "x", "isa": "y", "compiler": "z"}
    return {"machine": machine, "rows": rows}


@pytest.mark.parametrize("busy", [0.0, 0.6])
def test_a_tenth_slower_is_found(busy: float) -> None:
    """Ten times of ten, in every row, another process or not in the new run."""
    for seed in range(10):
        found, _ = compare.compare(run(seed), run(100 + seed, 1.1, busy))
        assert sum(own.slower for own in found) >= 1, seed
        assert not any(own.faster for own in found)


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.0), (0.0, 0.6), (0.6, 0.0), (0.7, 0.7)])
def test_the_same_is_no_regression(before: float, after: float) -> None:
    """Ten times of ten."""
    for seed in range(10):
        found, _ = compare.compare(run(seed, busy=before), run(200 + seed, busy=after))
        assert not any(own.slower or own.faster for own in found), seed


def test_without_floors_these_would_fail() -> None:
    """Medians call a busy machine a regression: the noise in these tests is not too kind."""
    old, new = run(1)["rows"][0], run(2, busy=0.6)["rows"][0]
    ratio = [np.median(row["rounds"]["low"]["kernel"]) for row in (old, new)]
    assert ratio[1] / ratio[0] > 1.1


def test_faster_is_no_regression() -> None:
    found, _ = compare.compare(run(1), run(2, 0.85))
    assert all(own.faster and not own.slower for own in found)
    assert "none of 4 rows is slower" in compare.text(found, [], 0.03)


def test_threshold() -> None:
    """A tenth is within a threshold of a fifth; by 2 % nothing is slower by more than 3."""
    assert not any(own.slower for own in compare.compare(run(1), run(2, 1.1), 0.2)[0])
    assert not any(own.slower for own in compare.compare(run(1), run(2, 1.02))[0])


def test_undisturbed_turns_that_are_missing_are_no_proof() -> None:
    """If all turns were disturbed, in ways that differ, the floor is not known, and nothing is said."""
    random = np.random.default_rng(3)
    wide = [1.0, 1.2, 1.33, 1.5, 1.7, 2.0, 2.5, 3.0]
    one = statistics.change((times(random, 0.8, 0), [1.0] * 9), (wide, [1.0] * 8))
    assert one.ratio > 1.2 and one.p > 1e-3
    assert not statistics.supported(wide) and statistics.supported([1.0, 1.001, 1.002, 1.003, 9.0])


def test_a_machine_in_another_state_is_no_regression() -> None:
    """Where another process has shared the core all the time, kernel and limit are slower, and not alike."""
    new = run(2, 1.5)
    for row in new["rows"]:
        row["rounds"]["low"]["traffic"] = [1.2 * value for value in row["rounds"]["low"]["traffic"]]
    found, notes = compare.compare(run(1), new)
    assert not any(own.slower for own in found)
    assert "4 of 4 rows say little: their limits take more than 3% longer or shorter" in notes[0]
    new["machine"] = {**new["machine"], "processor": "another"}  # whose limits may be others
    found, notes = compare.compare(run(1), new)
    assert all(own.slower for own in found) and len(notes) == 1


def test_both_runs_are_compared_by_the_same_limit() -> None:
    """Two limits that are as near as these change their places from run to run."""
    old, new = run(1), run(2)
    for own, more in ((old, 0.99), (new, 1.01)):
        for row in own["rows"]:
            row["divider_ns"] = more * row["traffic_ns"]
    found, notes = compare.compare(old, new)
    assert not any(own.slower or own.faster for own in found) and not notes
    for row in new["rows"]:  # a rule that divides no more
        del row["rounds"]["low"]["divider"]
    for row in old["rows"]:
        row["divider_ns"] = 2.0 * row["traffic_ns"]
    assert not any(own.slower or own.faster for own in compare.compare(old, new)[0])


@pytest.mark.parametrize(("laps", "slower"), [(1, False), (3, True)])
def test_arrays_in_one_place_alone(laps: int, slower: bool) -> None:
    """What a lap takes depends on where its arrays lie: one of each run says less than three."""
    old, new = run(1), run(2, 1.1)
    for row in (*old["rows"], *new["rows"]):
        row["rounds"]["laps"] = laps
    assert any(own.slower for own in compare.compare(old, new)[0]) == slower


@pytest.mark.parametrize("few", [[], [1.0], [1.0, 1.0, 1.0]])
def test_too_few_turns(few: list[float]) -> None:
    assert statistics.change((few, few), ([2.0] * 9, [1.0] * 9)).p == 1.0


def test_what_is_not_known_can_be_written() -> None:
    """JSON has no infinity."""
    one = compare.Compared("x", statistics.change(([], []), ([], [])), False, False, False)
    json.dumps(one.as_dict(), allow_nan=False)
    few = run(2, 2.0)
    for row in few["rows"]:
        row["rounds"]["low"] = {name: values[:3] for name, values in row["rounds"]["low"].items()}
    found, notes = compare.compare(run(1), few)
    assert not found and "not compared" in notes[0]


def test_steps_on_several_threads_of_a_busy_machine_are_left_out() -> None:
    old, new = run(1), run(2, 3.0)
    for row in new["rows"]:
        row["threads"], row["contended"] = 2, True
    for row in old["rows"]:
        row["threads"] = 2
    found, notes = compare.compare(old, new)
    assert not found and "4 of 4 rows were not compared" in notes[0]


def test_nothing_in_common() -> None:
    other = run(1)
    for row in other["rows"]:
        row["rule"] = "lamb"
    with pytest.raises(UsageError, match="no row in common"):
        compare.compare(run(1), other)


def test_other_machines_and_rules_are_said() -> None:
    other = run(2, 1.2)
    other["machine"] = {"processor": "X", "isa": "y", "compiler": "Z"}
    for row in other["rows"]:
        row["hash"] = "b"
    found, notes = compare.compare(run(1), other)
    assert any("different machines" in note for note in notes) and any("compilers differ" in note for note in notes)
    assert "the rule is another one" in compare.text(found, notes, 0.03)


def test_holm() -> None:
    """The least is compared with level / n, the next with level / (n - 1), until one fails."""
    assert statistics.significant([0.03, 0.01, 0.9], 0.06) == [True, True, False]
    assert statistics.significant([0.04, 0.01, 0.9], 0.06) == [False, True, False]
    assert statistics.significant([0.04, 0.021, 0.04], 0.06) == [False, False, False]
    assert statistics.significant([]) == []


def test_estimates() -> None:
    """Medians, and intervals that hold the true one 95 times of 100, give or take what 200 tries leave open."""
    random = np.random.default_rng(5)
    inside = 0
    for _ in range(200):
        own = statistics.estimate(np.exp(0.1 * random.standard_normal(25)).tolist())
        inside += own.low <= 1 <= own.high
    assert 180 <= inside <= 200
    own = statistics.estimate([1.0, 2.0, 3.0, 4.0, 100.0])
    assert own.value == 3.0 and own.low >= 1.0 and own == statistics.estimate([1.0, 2.0, 3.0, 4.0, 100.0])
    assert statistics.estimate([2.0, 1.0]) == statistics.Estimate(1.5, 1.0, 2.0)
