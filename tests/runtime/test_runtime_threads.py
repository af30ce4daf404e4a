"""Whose threads do a step, and on what instruction set, with what floating-point environment: the bits are the same."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from amount import FULL, LEVEL
from conftest import require
from embedding import RULES, WAYS, battery, run

X86 = platform.machine() == "x86_64"
only_x86 = pytest.mark.skipif(not X86, reason="of x86-64")
QUICKLY = () if FULL else (LEVEL,)  # under a sanitizer, which sees as much of it
full = pytest.mark.skipif(not FULL, reason="takes long; set OPTFORGE_TEST_FULL=1")
PASSIVE = {"OMP_WAIT_POLICY": "passive"}  # OpenMP's threads do not spin while they wait
LEVELS = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512dq"}  # and what the last of its features is called


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The battery without OpenMP."""
    require("gcc")
    return battery(tmp_path_factory.mktemp("serial"))


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The battery with OpenMP."""
    require("gcc")
    return battery(tmp_path_factory.mktemp("parallel"), ["-fopenmp"])


@pytest.fixture(scope="module")
def expected(serial: Path) -> str:
    """What the battery prints, on one thread."""
    lines = run([serial, "threads=1"], serial.parent)
    assert "status" not in lines and len(set(lines.splitlines())) == 96
    return lines


@pytest.fixture(scope="module")
def few(serial: Path) -> str:
    """What the battery prints of small tensors."""
    return run([serial, "threads=1", "few"], serial.parent)


# ---- threads


@pytest.mark.parametrize("threads", range(1, 8) if FULL else (1, 3, 7))
def test_openmp(parallel: Path, expected: str, threads: int) -> None:
    assert run([parallel, f"threads={threads}"], parallel.parent, PASSIVE) == expected


def test_openmp_that_gives_fewer_threads(parallel: Path, few: str) -> None:
    assert run([parallel, "threads=7", "few"], parallel.parent, {**PASSIVE, "OMP_THREAD_LIMIT": "2"}) == few
    assert run([parallel, "few"], parallel.parent, {**PASSIVE, "OMP_NUM_THREADS": "3"}) == few


@pytest.mark.parametrize("threads", [1, 3, 7])
@pytest.mark.parametrize("pool", ["reverse", "one", "posix"])
def test_a_pool(serial: Path, few: str, pool: str, threads: int) -> None:
    assert run([serial, f"threads={threads}", f"pool={pool}", "few"], serial.parent) == few


def test_a_pool_of_large_tensors(serial: Path, expected: str) -> None:
    assert run([serial, "threads=3", "pool=posix"], serial.parent) == expected


def test_a_pool_is_taken_before_openmp(parallel: Path, few: str) -> None:
    """The pool asks that OpenMP's threads are not in it: it runs its shares here, one after another."""
    assert run([parallel, "threads=5", "pool=reverse", "few"], parallel.parent) == few


@pytest.mark.parametrize("threads", range(1, 8))
def test_threads_that_are_running_already(serial: Path, few: str, threads: int) -> None:
    assert run([serial, f"threads={threads}", "shares", "few"], serial.parent) == few


def test_threads_that_are_running_already_over_large_tensors(serial: Path, expected: str) -> None:
    assert run([serial, "threads=3", "shares"], serial.parent) == expected


@pytest.mark.parametrize("how", ["pool=posix", pytest.param("shares", marks=full)])
def test_no_races(tmp_path: Path, few: str, how: str) -> None:
    """gcc's OpenMP is unknown to ThreadSanitizer, so this is of POSIX threads."""
    require("gcc")
    program = battery(tmp_path, ["-fsanitize=thread", "-g", *QUICKLY])
    environment = {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    assert run([program, "threads=3", how, "few"], tmp_path, environment) == few


@pytest.mark.parametrize("compiler", ["gcc", pytest.param("clang", marks=full)])
def test_sanitized(tmp_path: Path, few: str, expected: str, compiler: str) -> None:
    """No read or write beyond an end, nothing undefined, nothing of the workspace that was not written before."""
    require(compiler)
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", *QUICKLY]
    program = battery(tmp_path, flags, compiler=compiler)
    for words in (["threads=1"], ["threads=3", "pool=posix"], ["threads=3", "shares"]):
        assert run([program, *words, "few"], tmp_path) == few
    if FULL:
        assert run([program, "threads=3", "shares"], tmp_path) == expected


# ---- the ways to take it, compilers, instruction sets


EVERY = [(way, compiler) for way in WAYS for compiler in ("gcc", "clang")]


@pytest.mark.parametrize(("way", "compiler"), EVERY if FULL else [("single", "gcc"), ("bundle", "clang")])
def test_the_ways_to_take_it_have_the_same_bits(tmp_path: Path, expected: str, way: str, compiler: str) -> None:
    """Where each rule brings the runtime along, one of two passes shows it but in the long run."""
    require(compiler)
    rules = RULES if FULL or way != "single" else {"lamb": RULES["lamb"]}
    program = battery(tmp_path, ["-O3" if FULL and compiler == "clang" else "-O1"], way, compiler, rules=rules)
    lines = [line for line in expected.splitlines() if line.split()[0] in rules]
    assert lines and run([program, "threads=1"], tmp_path).splitlines() == lines


@only_x86
def test_each_instruction_set_has_the_same_bits(serial: Path, expected: str) -> None:
    had = Path("/proc/cpuinfo").read_text().split()
    for name, feature in LEVELS.items():
        answer = subprocess.run([serial, "threads=1"], env={"OPTFORGE_ISA": name}, capture_output=True, text=True)
        if feature in had:
            assert (answer.returncode, answer.stdout) == (0, expected), name
        else:
            statuses = [line for line in answer.stdout.splitlines() if "status" in line]
            assert len(statuses) == 2 * 96 and all(line.endswith(": status 15") for line in statuses), name


# ---- flush to zero


@only_x86
@pytest.mark.parametrize("words", ["flush=main", "flush=workers", "flush=main flush=workers"])
@pytest.mark.parametrize("how", ["", "pool=posix", "shares", "openmp"])
def test_subnormals_are_kept(serial: Path, parallel: Path, few: str, words: str, how: str) -> None:
    """The program checks that the bits of its threads are afterwards as they were."""
    program = parallel if how == "openmp" else serial
    asked = [word for word in f"{words} {how}".split() if word != "openmp"]
    for threads in (1, 3):
        assert run([program, f"threads={threads}", "few", *asked], serial.parent, PASSIVE) == few


@only_x86
@pytest.mark.parametrize("compiler", ["gcc", pytest.param("clang", marks=full)])
def test_subnormals_are_kept_in_a_program_that_is_linked_with_fast_math(
    tmp_path: Path, few: str, compiler: str
) -> None:
    require(compiler)
    program = battery(tmp_path, compiler=compiler, linking=["-Ofast", "-ffast-math"])
    for words in (["threads=1"], ["threads=3", "pool=posix"], ["threads=3", "shares"]):
        assert run([program, *words, "few"], tmp_path) == few


@only_x86
def test_allow_flush_leaves_the_bits(serial: Path, few: str) -> None:
    """Where the data have subnormal numbers the result is another, and otherwise the same."""
    assert run([serial, "threads=1", "few", "allow"], serial.parent) == few
    flushed = run([serial, "threads=1", "few", "allow", "flush=main"], serial.parent)
    differing = {line.rsplit(" ", 1)[0] for line in {*few.splitlines()} - {*flushed.splitlines()}}
    tiny = {line.rsplit(" ", 1)[0] for line in few.splitlines() if int(line.split()[2]) & 16}
    assert differing == tiny


PYTORCH = """
import numpy as np
import torch
import optforge as of

def steps(flush):
    p = [np.full(4099, 1e-38, np.float32), np.full(1025, 1e-308)]
    g = [np.full(4099, 3e-39, np.float32), np.full(1025, 3e-309)]
    optimizer = of.Optimizer(p, "momentum", lr=0.25, momentum=0.5)
    torch.set_flush_denormal(flush)
    for k in range(3):
        optimizer.step(g)
        assert bool(torch.tensor([1e-39]) * 1 == 0) == flush, "the bits of the thread have changed"
    torch.set_flush_denormal(False)
    return [x.tobytes() for x in p]

assert steps(True) == steps(False)
print("same")
"""


@only_x86
def test_pytorch_that_flushes() -> None:
    require("torch")
    answer = subprocess.run([sys.executable, "-c", PYTORCH], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout) == (0, "same\n"), answer.stderr
