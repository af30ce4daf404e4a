"""Compilers whose flags switch subnormal numbers off, in the whole process, when the kernel is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from amount import FULL
from conftest import COMPILERS, require
from native import quick

SCRIPT = """
import os, sys, threading
import numpy as np
import optforge as of

def subnormal():
    return bool((np.full(64, 1e-38, np.float32) * np.float32(0.25)).all() and (np.full(64, 1e-308) * 0.25).all())

for again in range(2):
    try:
        of.Optimizer([np.ones(3, np.float32)], "sgd")
    except of.EnvironmentProblem as problem:
        assert "-funsafe-math-optimizations" in str(problem) and "subnormal" in str(problem), problem
    else:
        sys.exit("it was loaded")
    assert subnormal()
found = []
thread = threading.Thread(target=lambda: found.append(subnormal()))
thread.start()
thread.join()
assert found == [True]

os.environ["CC"] = sys.argv[1]
p = [np.full(4099, 1e-38, np.float32)]
of.Optimizer(p, "sgd", lr=0.25).step([np.full(4099, 3e-38, np.float32)])
assert (p[0] == np.float32(1e-38) - np.float32(0.25) * np.float32(3e-38)).all() and p[0].all()
print("subnormal numbers are there")
"""
FLAG = "-funsafe-math-optimizations"


HOW = [(compiler, wrapped) for compiler in COMPILERS for wrapped in (False, True)]


@pytest.mark.parametrize(("compiler", "wrapped"), HOW if FULL else [HOW[1]])
def test_a_kernel_that_flushes_is_refused_and_the_process_stays_as_it_was(
    compiler: str, wrapped: bool, tmp_path: Path
) -> None:
    program = require(compiler)
    command = f"{program} {FLAG}"
    if wrapped:
        (tmp_path / "wrapped").mkdir()
        command = quick(program, tmp_path / "wrapped", FLAG)
    environment = {**os.environ, "CC": command, "OPTFORGE_CACHE_DIR": str(tmp_path / "cache")}
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT, quick(program, tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == "subnormal numbers are there\n"
