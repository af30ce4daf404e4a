"""The script for machines with a GPU, and the benchmark there: what they say without one, and that they run, on the emulation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gpu
from conftest import require
from places import TESTS

SCRIPT, TORCH, BENCHMARK = TESTS / "gpu.py", TESTS / "gpu_torch.py", TESTS.parent / "benchmarks" / "gpu.py"


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


def test_modules_are_those_of_the_project() -> None:
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"typer", "rich", "safetensors", "numpy", "pycuda", "pytest"} <= set(gpu.MODULES)
    assert len(gpu.MODULES) == len(project["dependencies"]) + 2 and all(name.isidentifier() for name in gpu.MODULES)


def test_one_process_where_the_device_is_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert [gpu.together(mode) for mode in (0, 1, 2, 3)] == [6, 1, 1, 1]


def test_the_sanitizer_of_the_toolkit_of_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bin/nvcc", "bin/compute-sanitizer"):
        program = tmp_path / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    for name in ("NVCC", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nothing")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu.find_sanitizer() == str(tmp_path / "bin" / "compute-sanitizer")


def test_runs_on_the_emulation(emulated_cuda: dict[str, str], tmp_path: Path) -> None:
    require("pycuda")
    answer = start(SCRIPT, "--quick", "--out", tmp_path, "--steps", "sanitizer,graph", env=emulated_cuda)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["device"] == "optforge emulation" and list(found["steps"]) == ["requirements", "sanitizer", "graph"]
    assert found["steps"]["graph"]["compared"].startswith("6 steps, one of them skipped, have the bits")


@pytest.mark.parametrize("part", ["parameters", "devices"])
def test_parts_of_pytorch_say_what_is_missing(part: str, emulated_cuda: dict[str, str]) -> None:
    require("pycuda")
    answer = start(TORCH, part, env=emulated_cuda)
    assert answer.returncode == 3, answer.stderr
    assert answer.stdout.startswith("skipped: PyTorch ")


def test_threads_on_the_emulation(emulated_cuda: dict[str, str]) -> None:
    require("pycuda")
    answer = start(TORCH, "threads", env=emulated_cuda)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("shown: four optimizers")


def test_a_failed_step_is_told(emulated_cuda: dict[str, str], tmp_path: Path) -> None:
    require("pycuda")
    broken = {**emulated_cuda, "OPTFORGE_EMULATION_REFUSE": "cuLaunchKernel:2"}
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
    assert answer.stdout.startswith("# optforge emulation\n") and "Not measured" not in answer.stdout
    assert "What moves less than 50.0 MiB" in answer.stdout


@pytest.mark.parametrize(
    ("refused", "failed"),
    {
        "the copy": ("cuMemcpyDtoDAsync_v2:2", ["large", "phase"]),
        "timing": ("cuEventRecord:2", ["large", "phase", "20 x 64", "MLP"]),
    }.values(),
)
def test_a_failed_part_of_the_benchmark_is_told(
    refused: str, failed: list[str], emulated_cuda: dict[str, str], tmp_path: Path
) -> None:
    require("pycuda")
    report = tmp_path / "out.json"
    broken = {**emulated_cuda, "OPTFORGE_EMULATION_REFUSE": refused}
    answer = start(BENCHMARK, "--sizes", "tiny", "--no-sweep", "--json", report, env=broken)
    found = json.loads(report.read_text(encoding="utf-8"))
    assert answer.returncode == 1, answer.stderr
    assert [entry["part"] for entry in found["failed"]] == failed
    assert all(f"\n- {entry['part']}: {type_of(entry)}" in answer.stdout for entry in found["failed"])
    assert found["overhead_us"]


def type_of(entry: dict[str, str]) -> str:
    return entry["problem"].split(":")[0]


def test_what_fails_before_the_comparisons_does_not_end_the_benchmark(
    emulated_cuda: dict[str, str], tmp_path: Path
) -> None:
    require("pycuda")
    report = tmp_path / "out.json"
    program = f"""
import sys
from unittest import mock
sys.path.insert(0, {str(BENCHMARK.parent)!r})
sys.argv = ["gpu.py", "--sizes", "tiny", "--no-sweep", "--json", {str(report)!r}]
import gpu
gpu.Bench.overheads = mock.Mock(side_effect=MemoryError("too little"))
gpu.torch = mock.Mock()
gpu.torch.cuda.is_available.return_value = True
gpu.torch.randn.side_effect = RuntimeError("no kernel image is available for execution on the device")
sys.exit(gpu.main())
"""
    answer = start("-c", program, env=emulated_cuda)
    assert answer.returncode == 1, answer.stderr
    found = json.loads(report.read_text(encoding="utf-8"))
    assert [entry["part"] for entry in found["failed"]] == ["agreement with PyTorch", "overhead"]
    assert {row["section"] for row in found["results"]} == {"large", "phase", "step"}
