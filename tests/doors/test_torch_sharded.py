"""Shards over several processes with gloo: the same bits for every number of ranks, through checkpoints too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amount import FULL
from conftest import require_torch

torch = require_torch()
if not torch.distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

import torch_ranks  # noqa: E402

long = pytest.mark.skipif(not FULL, reason="OPTFORGE_TEST_FULL is not set")
SIZES = (1, 2, 3, 4)
STEPS = 20 if FULL else 4
CLIPPED = {"rule": "clip_by_global_norm:adamw", "how": {"lr": 0.01, "max_norm": 0.5, "skip_nonfinite": True}}


def run(size: int, path: Path, what: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 of so many prints."""
    store = path / f"store.{len([*path.iterdir()])}"
    command = [sys.executable, torch_ranks.__file__]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(store), json.dumps(what)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(size)
    ]
    told = [rank.communicate(timeout=300) for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(errors for _, errors in told)
    return json.loads(told[0][0])


def close(one: dict[str, Any], other: dict[str, Any], bound: float) -> bool:
    """Whether all parameters are within a bound, relative to the largest of each."""
    return all(
        np.max(np.abs(np.subtract(a, b)), initial=0) <= bound * np.max(np.abs(b), initial=0)
        for a, b in zip(one["values"], other["values"], strict=True)
    )


@pytest.mark.parametrize("size", [2] if not FULL else SIZES)
@pytest.mark.parametrize(
    "rule", [CLIPPED] if not FULL else [CLIPPED, {"rule": "lamb", "how": {"skip_nonfinite": True}}]
)
def test_shards_that_end_at_leaves_have_the_bits_of_one_process(rule: Any, size: int, tmp_path: Path) -> None:
    """Norms, the skipped step, parameters and state."""
    what = {"model": "leaves", "steps": [0, STEPS], **rule}
    expected = torch_ranks.alone(what)
    assert [skipped for _, _, skipped, _ in expected["told"]].count(True) == 1
    assert run(size, tmp_path, what) == expected


@long
@pytest.mark.parametrize("size", SIZES[1:])
def test_other_shards_are_within_the_rounding_of_their_norms(size: int, tmp_path: Path) -> None:
    what = {"model": "uneven", "steps": [0, STEPS], **CLIPPED}
    expected, found = torch_ranks.alone(what), run(size, tmp_path, what)
    for mine, theirs in zip(found["told"], expected["told"], strict=True):
        assert mine[2] == theirs[2]
        norms = [(float.fromhex(a), float.fromhex(b)) for a, b in zip(mine[:2], theirs[:2], strict=True)]
        assert all(a == b or abs(a - b) <= 4 * np.spacing(b) or np.isnan([a, b]).all() for a, b in norms)
    assert found["steps"] == expected["steps"]


@long
@pytest.mark.parametrize(
    "how", [{}, {"rounding": "stochastic", "store": {"m": "bf16"}, "seed": 5}], ids=["", "stochastic"]
)
def test_element_wise_rules_have_the_same_bits_however_they_are_sharded(how: Any, tmp_path: Path) -> None:
    """Nothing travels between ranks, and random bits are those of the element."""
    what = {"model": "uneven", "steps": [0, 3], "rule": "adamw", "how": how, "plain": True}
    expected = torch_ranks.alone(what)
    for size in (2, 3):
        found = run(size, tmp_path, what)
        assert found["parameters"] == expected["parameters"]
        assert found["state"] == expected["state"]


@long
def test_a_rule_that_adds_up_over_tensors_refuses_other_shards(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="do not end at multiples of 1024 elements"):
        run(2, tmp_path, {"model": "uneven", "steps": [0, 1], "rule": "lamb"})


@long
@pytest.mark.parametrize(("before", "after"), [(3, 2), (1, 4), (4, 1)])
def test_a_checkpoint_goes_on_at_another_number_of_ranks(before: int, after: int, tmp_path: Path) -> None:
    """Saved and loaded by torch.distributed.checkpoint, in processes that are killed behind it."""
    what = {"model": "leaves", **CLIPPED}
    expected = torch_ranks.alone({**what, "steps": [0, 12]})
    run(before, tmp_path, {**what, "steps": [0, 7], "save": str(tmp_path / "checkpoint")})
    found = run(after, tmp_path, {**what, "steps": [7, 12], "load": str(tmp_path / "checkpoint")})
    assert found["parameters"] == expected["parameters"]
    assert found["state"] == expected["state"]
    assert found["steps"] == expected["steps"]
    assert found["told"] == expected["told"][7:]


@long
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_networks_are_trained(kind: str, tmp_path: Path) -> None:
    """Gradients are averaged over ranks, in float32: within that rounding of one process."""
    what = {"fit": kind, "steps": [0, 10], "how": {"lr": 0.01, "max_norm": 0.5}}
    expected, found = torch_ranks.alone(what), run(2, tmp_path, what)
    assert close(found, expected, 1e-5)
    assert found["told"] == pytest.approx(expected["told"], rel=1e-4)
    start = torch_ranks.alone({**what, "steps": [0, 0]})
    assert not close(found, start, 0.01)
