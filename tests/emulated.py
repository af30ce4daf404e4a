"""Runs the tests of the Optimizer on the CUDA target: the real PyCUDA, on a driver that emulates a GPU.

    python tests/emulated.py [arguments of pytest]

Where PyCUDA is not installed it says so and succeeds, unless OPTFORGE_TEST_REQUIRE names pycuda.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import emulation

HERE = Path(__file__).parent
FILES = (
    "bits/test_bits.py",
    "bits/test_statistics.py",
    "language/test_reductions.py",
    "bits/test_transforms.py",
    "language/test_compositions.py",
    "train/test_optimizer.py",
    "train/test_optimizer_refusals.py",
    "train/test_optimizer_resuming.py",
    "train/test_groups.py",
    "train/test_schedule_hook.py",
    "language/test_meanings.py",
    "engines/test_interrupts.py",
    "engines/test_arrays_in_place.py",
    "train/test_copying.py",
    "bits/test_formats_optimizer.py",
)


def main(arguments: list[str]) -> int:
    """Run pytest; its exit code."""
    if importlib.util.find_spec("pycuda") is None:
        required = "pycuda" in os.environ.get("OPTFORGE_TEST_REQUIRE", "").split()
        print("PyCUDA is not installed (tests/emulation/build-pycuda builds it): the CUDA target is not tested")
        return int(required)
    with tempfile.TemporaryDirectory() as directory:
        emulation.build_driver(Path(directory))
        emulation.write_nvcc(Path(directory))
        environment = {**emulation.environment(Path(directory)), "OPTFORGE_TEST_TARGETS": "cuda"}
        quiet = ["-W", "ignore::optforge.PerformanceWarning"]
        files = [str(HERE / name) for name in FILES]
        command = [sys.executable, "-m", "pytest", "-q", *quiet, *(arguments or files)]
        return subprocess.run(command, env=environment, cwd=HERE.parent, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
