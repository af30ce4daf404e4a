"""The script for machines with a GPU, and the benchmark there: what they say without one, and that they run, on the emulation."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import gpu
import gpu_jax
import gpu_torch
from conftest import require
from places import TESTS

SCRIPT, TORCH, BENCHMARK = TESTS / "gpu.py", TESTS / "gpu_torch.py", TESTS.parent / "benchmarks" / "gpu.py"


def start(*words: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def without_torch(emulated_cuda: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of the emulation, where PyTorch is not found, which is slow to import."""
    directory = tmp_path_factory.mktemp("without_torch")
    (directory / "torch.py").write_text('raise ImportError("not here")\n')
    path = os.pathsep.join([str(directory), *filter(None, [emulated_cuda.get("PYTHONPATH")])])
    return {**emulated_cuda, "PYTHONPATH": path}


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
    assert (
        answer.returncode == 2
        and "steps are graph, bits, sanitizer, torch, jax, suite, benchmark, traffic" in answer.stderr
    )


def test_the_benchmark_refuses_parts_that_it_does_not_know(without_torch: dict[str, str], tmp_path: Path) -> None:
    require("pycuda")
    answer = start(BENCHMARK, "--parts", "speed", "--json", tmp_path / "out.json", env=without_torch)
    assert answer.returncode == 2 and "there are no parts ['speed']: ['kernels', " in answer.stderr


def test_names_of_files_and_parts() -> None:
    assert all(gpu.test_file(name).exists() for name in gpu.SUITE)
    assert gpu.TORCH == tuple(gpu_torch.PARTS)
    assert sorted(gpu.JAX) == sorted(gpu_jax.PARTS)
    assert all((TESTS / "doors" / file).exists() for file, _ in gpu_jax.PARTS.values())
    assert all(hasattr(gpu.Run, name) for name in gpu.HALVES)
    assert gpu.LIMIT <= 5.5 * 60


def test_models_of_the_benchmark() -> None:
    program = """
import json
import gpu
print(json.dumps([[m.name, len(m.shapes), m.elements] for m in gpu.SIZES["brief"].models]))
print(len(list(gpu.sweep_variants(True))), gpu.SIZES["brief"].elements)
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=BENCHMARK.parent)
    models, rest = answer.stdout.splitlines()
    assert json.loads(models) == [
        ["GPT-2 small", 148, 124_439_808],
        ["10,000 x 64", 10_000, 640_000],
        ["ResNet-50", 161, 25_557_032],
        ["one tensor of 1 M", 1, 1_000_000],
    ]
    variants, elements = map(int, rest.split())
    assert variants <= 8 and elements == 10**9


def test_modules_are_those_of_the_project() -> None:
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"typer", "rich", "safetensors", "numpy", "pycuda", "pytest"} <= set(gpu.MODULES)
    assert len(gpu.MODULES) == len(project["dependencies"]) + 2 and all(name.isidentifier() for name in gpu.MODULES)


def test_one_process_where_the_device_is_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert [gpu.together(mode) for mode in (0, 1, 2, 3)] == [12, 1, 1, 1]


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
    assert gpu.find_tool("compute-sanitizer") == str(tmp_path / "bin" / "compute-sanitizer")


def test_runs_on_the_emulation(emulated_cuda: dict[str, str], tmp_path: Path) -> None:
    require("pycuda")
    whole = "OPTFORGE_TEST_FULL" in os.environ
    steps = "graph,sanitizer,traffic,jax" + (",torch,bits,suite" if whole else "")
    limit = "3000" if whole else "330"
    words = "--quick", "--out", tmp_path, "--steps", steps, "--limit", limit
    answer = start(SCRIPT, *words, env=emulated_cuda)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    correct, fast = (json.loads((tmp_path / f"{half}.json").read_text(encoding="utf-8")) for half in gpu.HALVES)
    assert correct["device"] == fast["device"] == "optforge emulation"
    assert correct["steps"]["graph"]["said"].startswith("6 steps, one of them skipped, have the bits")
    assert correct["steps"]["sanitizer memcheck"]["status"].startswith("passed")
    assert correct["steps"]["jax bits"]["status"] == "skipped"  # JAX knows nothing of the emulation
    assert correct["steps"].get("torch threads", {}).get("status") == ("passed" if whole else None)
    assert fast["steps"]["traffic"]["status"].startswith("passed")
    files = sorted(path.name for path in tmp_path.rglob("*"))
    assert set(files) <= {"correct.json", "correct.log", "fast.json", "fast.log"}


def test_time_that_is_up_is_no_failure(emulated_cuda: dict[str, str], tmp_path: Path) -> None:
    require("pycuda")
    answer = start(SCRIPT, "--correct", "--quick", "--out", tmp_path, "--limit", "0.01", env=emulated_cuda)
    found = json.loads((tmp_path / "correct.json").read_text(encoding="utf-8"))
    assert answer.returncode == 4, answer.stderr
    assert found["steps"]["requirements"]["status"] == "cut"


def test_a_run_that_is_ended_tells_what_it_found(emulated_cuda: dict[str, str], tmp_path: Path) -> None:
    require("pycuda")
    command = [sys.executable, str(SCRIPT), "--correct", "--quick", "--out", str(tmp_path)]
    process = subprocess.Popen(command, env=emulated_cuda, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    report, found = tmp_path / "correct.json", {}
    until = time.monotonic() + 60
    while "graph" not in found.get("steps", {}) and time.monotonic() < until:
        time.sleep(0.05)
        found = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["device"] == "optforge emulation" and found["steps"]["requirements"]["status"] == "passed"
    assert found["steps"]["graph"] == {"status": "running"}


def test_parts_of_pytorch_on_the_emulation(emulated_cuda: dict[str, str]) -> None:
    """Threads are shown; the others say what is missing. One process, which imports PyTorch once."""
    require("pycuda")
    names = ("threads", "parameters", "devices")
    program = f"import sys, gpu_torch; print('codes:', *(gpu_torch.main([name]) for name in {names}))"
    path = os.pathsep.join([str(TESTS), *filter(None, [emulated_cuda.get("PYTHONPATH")])])
    answer = start("-c", program, env={**emulated_cuda, "PYTHONPATH": path})
    assert answer.returncode == 0, answer.stderr
    threads, *skipped, codes = answer.stdout.splitlines()
    assert threads.startswith("shown: four optimizers") and codes == "codes: 0 3 3"
    assert len(skipped) == 2 and all(line.startswith("skipped: PyTorch ") for line in skipped)


def test_a_failed_step_is_told(emulated_cuda: dict[str, str], tmp_path: Path) -> None:
    require("pycuda")
    broken = {**emulated_cuda, "OPTFORGE_EMULATION_REFUSE": "cuLaunchKernel:2"}
    answer = start(SCRIPT, "--correct", "--quick", "--out", tmp_path, "--steps", "sanitizer", env=broken)
    found = json.loads((tmp_path / "correct.json").read_text(encoding="utf-8"))
    assert answer.returncode == 1 and found["steps"]["sanitizer memcheck"]["status"] == "failed"
    assert found["steps"]["requirements"]["status"] == "passed"
    assert "── sanitizer memcheck\n$ " in (tmp_path / "correct.log").read_text(encoding="utf-8")


def test_benchmark_runs_on_the_emulation(without_torch: dict[str, str], tmp_path: Path) -> None:
    require("pycuda")
    report = tmp_path / "out.json"
    answer = start(BENCHMARK, "--sizes", "tiny", "--no-sweep", "--json", report, env=without_torch)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(report.read_text(encoding="utf-8"))
    assert not found["failed"] and {row["section"] for row in found["results"]} == {"large", "phase", "step", "replay"}
    assert {row["work"] for row in found["results"] if row["section"] == "replay"} == {
        "step",
        "phase",
        "phase, statistics",
    }
    assert not found["not_begun"] and all(math.isfinite(row["found"]) for row in found["aims"])
    assert {row["what"] for row in found["aims"]} >= {
        "Adam, one tensor (4.1 k): share of a copy",
        "adamw p, g bf16, split: share of a copy",
        "µs of the host to enqueue a step, 148 tensors",
        "µs more for each new gradient, 148 tensors",
    }
    assert answer.stdout.startswith("# optforge emulation\n") and "Not measured" not in answer.stdout
    assert "What moves less than 50.0 MiB" in answer.stdout


def test_benchmark_begins_nothing_when_time_is_up(without_torch: dict[str, str], tmp_path: Path) -> None:
    require("pycuda")
    report = tmp_path / "out.json"
    answer = start(BENCHMARK, "--sizes", "tiny", "--limit", "0.001", "--json", report, env=without_torch)
    found = json.loads(report.read_text(encoding="utf-8"))
    assert answer.returncode == 4, answer.stderr
    assert not found["results"] and found["not_begun"][0] == "kernels" and found["not_begun"][-1] == "sweep"


@pytest.mark.parametrize(
    ("refused", "failed"),
    {
        "the copy": ("cuMemcpyDtoDAsync_v2:2", ["phase"]),
        "timing": ("cuEventRecord:2", ["MLP", "phase"]),
    }.values(),
)
def test_a_failed_part_of_the_benchmark_is_told(
    refused: str, failed: list[str], without_torch: dict[str, str], tmp_path: Path
) -> None:
    require("pycuda")
    report = tmp_path / "out.json"
    broken = {**without_torch, "OPTFORGE_EMULATION_REFUSE": refused}
    answer = start(
        BENCHMARK, "--sizes", "tiny", "--parts", "overhead,MLP,phase", "--no-sweep", "--json", report, env=broken
    )
    found = json.loads(report.read_text(encoding="utf-8"))
    assert answer.returncode == 1, answer.stderr
    assert [entry["part"] for entry in found["failed"]] == failed
    assert all(f"\n- {entry['part']}: {type_of(entry)}" in answer.stdout for entry in found["failed"])
    assert found["overhead_us"]


def type_of(entry: dict[str, str]) -> str:
    return entry["problem"].split(":")[0]


def test_what_fails_before_the_comparisons_does_not_end_the_benchmark(
    without_torch: dict[str, str], tmp_path: Path
) -> None:
    require("pycuda")
    report = tmp_path / "out.json"
    program = f"""
import sys
from unittest import mock
sys.path.insert(0, {str(BENCHMARK.parent)!r})
sys.argv = ["gpu.py", "--sizes", "tiny", "--no-sweep", "--json", {str(report)!r}]
sys.argv += ["--parts", "agreement with PyTorch,overhead,MLP,phase"]
import gpu
gpu.Bench.overheads = mock.Mock(side_effect=MemoryError("too little"))
gpu.torch = mock.Mock()
gpu.torch.cuda.is_available.return_value = True
gpu.torch.randn.side_effect = RuntimeError("no kernel image is available for execution on the device")
sys.exit(gpu.main())
"""
    answer = start("-c", program, env=without_torch)
    assert answer.returncode == 1, answer.stderr
    found = json.loads(report.read_text(encoding="utf-8"))
    assert [entry["part"] for entry in found["failed"]] == ["agreement with PyTorch", "overhead"]
    assert {row["section"] for row in found["results"]} == {"phase", "step"}
