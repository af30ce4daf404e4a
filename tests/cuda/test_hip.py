"""Emitted CUDA, unmodified, compiled for AMD's GPUs through the header in examples/hip: that it compiles, and what is fused.

Nothing is run: assembly is read.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import optforge as of
from conftest import require
from oracles import names
from places import ROOT

HEADER = ROOT / "examples" / "hip"
INSTRUCTION = re.compile(r"^\tv_(pk_)?([a-z_]+?)_(f32|f64)(?:_e32|_e64)?\b", re.MULTILINE)
FUSED = {"fma", "fmac", "mad", "mac", "fmaak", "fmamk", "madak", "madmk"}
# How many fused operations are in the exact sequences of a division, a square root and a conversion to uint64_t, each
# known by an instruction that stands nowhere else.
EXPLAINED = {
    "f32": {"div_fixup": 5, "sqrt": 2},
    "f64": {"div_fixup": 5, "rsq": 7, "floor": 1},
}


def hipcc(files: dict[str, str], directory: Path, *flags: str) -> None:
    """What hipcc makes of emitted files for an MI200, without a warning."""
    compiler = require("hipcc")
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    source = next(name for name in files if name.endswith(".cu"))
    command = [compiler, "-x", "hip", "--offload-arch=gfx90a", "-O3", "-Wall", "-Wextra", f"-I{HEADER}", *flags]
    # Where an nvcc is installed as well, hipcc would take that.
    how = {**os.environ, "HIP_PLATFORM": "amd"}
    answer = subprocess.run([*command, source, "-o", "made"], cwd=directory, capture_output=True, text=True, env=how)
    said = [line for line in answer.stderr.splitlines() if re.search(r"\.cuh?:|cuda_runtime\.h:|error", line)]
    assert answer.returncode == 0 and not said, answer.stderr


def fused(assembly: str) -> dict[str, int]:
    """How many fused operations of each type there are beyond those that are explained."""
    counts = {"f32": Counter[str](), "f64": Counter[str]()}
    for packed, operation, kind in INSTRUCTION.findall(assembly):
        counts[kind]["fused" if operation in FUSED else operation] += 2 if packed else 1
    return {
        kind: own["fused"] - sum(number * own[name] for name, number in EXPLAINED[kind].items())
        for kind, own in counts.items()
    }


@pytest.mark.parametrize("name", [*names(), "clip_by_global_norm:adamw"])
def test_compiles_and_fuses_nothing(name: str, tmp_path: Path) -> None:
    *transforms, rule = name.split(":")
    made = of.rules[rule]
    for transform in transforms:
        made = of.transforms[transform] >> made
    files = made.generate("cuda", prefix="k")
    hipcc(files, tmp_path, "-c", "--save-temps")
    assembly = next(tmp_path.glob("*gfx90a.s")).read_text(encoding="utf-8")
    assert "k_cuda_begin:" in assembly and fused(assembly) == {"f32": 0, "f64": 0}
    modes = re.findall(r"\.amdhsa_float_(\w+) (\d+)", assembly)
    # Rounding to nearest, and no flush to zero.
    expected = {("round_mode_32", "0"), ("round_mode_16_64", "0"), ("denorm_mode_32", "3"), ("denorm_mode_16_64", "3")}
    assert set(modes) == expected
