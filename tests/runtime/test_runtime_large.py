"""Tensors of more elements than 32 bits count: their last elements, and nothing behind them, with norms that are exact.

Memory is for what is written alone, at most 8.1 GiB: 2^31 + 17 floats, or 2^32 + 17 numbers of 16 bits. Larger ones of
4 and 8 bytes take the same code: sizes and indices are counted in elements, by the same size_t, for every format.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import optforge as of
from amount import FULL
from compiling import objects
from conftest import require
from embedding import SOURCES, WARNINGS, run, write
from native import STRICT

CLIP = of.transforms.clip_by_global_norm()
BF16 = {"store": {"p": "bf16", "g": "bf16"}, "suffix": "bf16"}
CASES = {
    "f32": (CLIP >> of.rules.sgd, {"dtypes": ["f32"]}, 4, 2**31 + 17),
    "bf16": (CLIP >> of.rules.sgd, BF16, 2, 2**32 + 17),
    "state": (CLIP >> of.rules.momentum, {**BF16, "store": dict.fromkeys(("p", "g", "m"), "bf16")}, 2, 2**31 + 17),
}


def available() -> float:
    """GiB of memory that may be taken."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    return 0.0


def built(directory: Path, case: str, changed: Mapping[str, str] | None = None) -> Path:
    """The program of tests/runtime/large.c for a case; words of the runtime that are `changed` are others."""
    require("gcc")
    rule, how, element, _ = CASES[case]
    settings: dict[str, Any] = dict(how)
    files = rule.generate("c", prefix="large", **settings)
    for old, new in (changed or {}).items():
        assert old in files["optforge.c"]
        files["optforge.c"] = files["optforge.c"].replace(old, new)
    write(directory, files)
    kernel = f"large_kernel_{'f32' if element == 4 else 'bf16'}"
    flags = ["-std=gnu11", "-O2", "-fopenmp", *WARNINGS, "-I.", f"-DKERNEL={kernel}", f"-DELEMENT={element}"]
    made = objects(["gcc", *STRICT, "-O2", "-fopenmp", "-fPIC"], ["large.c", "optforge.c"], directory)
    run(["gcc", *flags, SOURCES / "large.c", *made, "-o", "large", "-lm"], directory)
    return directory / "large"


full = pytest.mark.skipif(not FULL, reason="takes long and 9 GiB; set OPTFORGE_TEST_FULL=1")


@pytest.mark.parametrize("case", ["f32", *(pytest.param(own, marks=full) for own in ("bf16", "state"))])
def test_the_program(case: str, tmp_path: Path) -> None:
    """It works, with a size that every machine has room for."""
    assert run([built(tmp_path, case), str(2**23 + 17)], tmp_path) == f"{2**23 + 17} elements\n"


@full
@pytest.mark.parametrize("case", CASES)
def test_an_index_that_is_too_narrow_is_found(case: str, tmp_path: Path) -> None:
    """One of 22 bits, as one of 32 would be with larger tensors."""
    program = built(tmp_path, case, {"k * OPTFORGE_LEAF, leaf + k": "(k & 4095) * OPTFORGE_LEAF, leaf + k"})
    answer = subprocess.run([program, str(2**23 + 17)], capture_output=True, text=True, check=False)
    assert answer.returncode == 1 and ("differs in period" in answer.stderr or "norms are" in answer.stderr)


@full
@pytest.mark.parametrize("case", CASES)
def test_sizes_beyond_32_bits(case: str, tmp_path: Path) -> None:
    if available() < 10:
        pytest.skip("needs 10 GiB of memory that is free")
    n = CASES[case][3]
    assert run([built(tmp_path, case), str(n)], tmp_path) == f"{n} elements\n"
