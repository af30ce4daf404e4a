"""The script for machines with a GPU, and the benchmark there: what they say without one, and that they run, on the emulation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import require

HERE = Path(__file__).parent
SCRIPT, BENCHMARK = HERE / "gpu.py", HERE.parent / "benchmarks" / "gpu.py"


def start(*words: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=env)


def without_gpu() -> None:
    answer = start("-c", "import ctypes; ctypes.CDLL('libcuda.so.1')")
    if answer.returncode == 0:
        pytest.skip("there is a driver here")


@pytest.mark.parametrize("script", [SCRIPT, BENCHMARK], ids=["gpu.py", "benchmark"])
def test_help(script: Path) -> None:
    answer = start(script, "--help")
    assert answer.returncode == 0 and "usage: gpu.py" in answer.stdout


def test_names_what_is_missing() -> None:
    without_gpu()
    answer = start(SCRIPT)
    assert answer.returncode == 3 and not answer.stdout
    first, *lines = answer.stderr.splitlines()
    assert first == "gpu.py: this machine cannot run it; missing:"
    assert any(line.startswith("  NVIDIA's driver: libcuda.so.1") for line in lines)


def test_benchmark_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    without_gpu()
    answer = start(BENCHMARK, "--json", tmp_path / "out.json")
    assert answer.returncode == 3 and answer.stderr.startswith("gpu.py: no GPU here that can be used: ")
    assert not list(tmp_path.iterdir())


def test_refuses_steps_that_it_does_not_know() -> None:
    answer = start(SCRIPT, "--steps", "bits,speed")
    assert answer.returncode == 2 and "steps are requirements, suite, sanitizer" in answer.stderr


def test_runs_on_the_emulation(emulated_cuda: dict[str, str], tmp_path: Path) -> None:
    require("pycuda")
    answer = start(SCRIPT, "--quick", "--out", tmp_path, "--steps", "sanitizer,graph", env=emulated_cuda)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["device"] == "optforge emulation" and list(found["steps"]) == ["requirements", "sanitizer", "graph"]
    assert found["steps"]["graph"]["compared"].startswith("6 steps, one of them skipped, have the bits")


def test_a_failed_step_is_told(emulated_cuda: dict[str, str], tmp_path: Path) -> None:
    require("pycuda")
    broken = {**emulated_cuda, "OPTFORGE_EMULATION_REFUSE": "cuLaunchKernel:719"}
    answer = start(SCRIPT, "--quick", "--out", tmp_path, "--steps", "sanitizer", env=broken)
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert answer.returncode == 1 and found["steps"]["sanitizer"]["status"] == "failed"
    assert found["steps"]["requirements"]["status"] == "passed"


def test_benchmark_runs_on_the_emulation(emulated_cuda: dict[str, str], tmp_path: Path) -> None:
    require("pycuda")
    report = tmp_path / "out.json"
    answer = start(BENCHMARK, "--sizes", "tiny", "--no-sweep", "--json", report, env=emulated_cuda)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(report.read_text(encoding="utf-8"))
    assert not found["failed"] and {row["section"] for row in found["results"]} == {"large", "phase", "step"}
    assert answer.stdout.startswith("# optforge emulation\n")
