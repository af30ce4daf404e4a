"""The emulation of CUDA on the CPU, by hand-written kernels: what it computes, and which mistakes it sees."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from conftest import require
from emulation import HERE, compile_emulated, run

SOURCE = (HERE / "kernels.cu").read_text(encoding="utf-8")
ORDERS = ("ascending", "descending", "random:1", "random:2")
POISON = np.full(4, 0x7F, np.uint8).view(np.float32)[0]


class Work(ctypes.Structure):
    """The argument of most kernels."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("x", "y", "partial", "count")), ("n", ctypes.c_size_t))


def launch(
    library: ctypes.CDLL, name: str, argument: ctypes.Structure | bytes, grid: Sequence[int], block: Sequence[int]
) -> None:
    """A kernel, through cudaLaunchKernel."""
    by_reference = argument if isinstance(argument, bytes) else ctypes.byref(argument)
    assert library.launch(name.encode(), by_reference, (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block)) == 0


class Memory:
    """Arrays for a kernel, filled with what it does not write."""

    def __init__(self, n: int):
        rng = np.random.default_rng(n)
        self.x = rng.standard_normal(n, dtype=np.float32)
        self.y = np.full(n + 64, -7, np.float32)
        self.partial = np.full(n + 64, -7, np.float64)
        self.count = np.zeros(n + 1024, np.uint32)

    @property
    def work(self) -> Work:
        arrays = (self.x, self.y, self.partial, self.count)
        return Work(*(array.ctypes.data for array in arrays), self.x.size)


def tree(values: np.ndarray) -> np.ndarray:
    """Sums of 256 values each, in the order in which block_sum adds."""
    lanes = values.reshape(-1, 8, 32)
    while lanes.shape[-1] > 1:
        lanes = lanes[..., : lanes.shape[-1] // 2] + lanes[..., lanes.shape[-1] // 2 :]
    warps = lanes[..., 0]
    while warps.shape[-1] > 1:
        warps = warps[..., : warps.shape[-1] // 2] + warps[..., warps.shape[-1] // 2 :]
    return warps[..., 0]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require("g++")
    return compile_emulated({"kernels.cu": SOURCE}, tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module")
def library(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OPTFORGE_EMULATION_THREADS", request.param)
    monkeypatch.setenv("OPTFORGE_EMULATION_BLOCKS", request.param)
    return str(request.param)


def test_every_thread_runs_once_and_knows_its_place(library: ctypes.CDLL, order: str) -> None:
    memory = Memory(1024)
    launch(library, "where", memory.work, (2, 3, 4), (5, 2, 3))
    expected = (np.arange(24, dtype=np.uint32)[:, None] << 16 | np.arange(30, dtype=np.uint32)).ravel()
    assert np.array_equal(memory.count[:720], expected) and not memory.count[720:].any()


@pytest.mark.parametrize("n", [0, 1, 3, 4, 255, 1023, 1024, 1025, 5000])
def test_arithmetic_and_tails(library: ctypes.CDLL, n: int) -> None:
    memory = Memory(n)
    launch(library, "arithmetic", memory.work, (n // 1024 + 1, 1, 1), (256, 1, 1))
    assert np.array_equal(memory.y[:n], memory.x * np.float32(3) + memory.x) and (memory.y[n:] == -7).all()


@pytest.mark.parametrize("n", [1, 256, 3000])
def test_reductions_by_shuffles_have_the_bits_of_their_tree(library: ctypes.CDLL, n: int, order: str) -> None:
    memory = Memory(n)
    blocks = -(-n // 256)
    padded = np.zeros(blocks * 256, np.float32)
    padded[:n] = memory.x
    launch(library, "sums_f32", memory.work, (blocks, 1, 1), (256, 1, 1))
    launch(library, "sums_f64", memory.work, (blocks, 1, 1), (256, 1, 1))
    assert np.array_equal(memory.y[:blocks], tree(padded))
    assert np.array_equal(memory.partial[:blocks], tree(padded.astype(np.float64)))


def test_last_block_adds_up_all(library: ctypes.CDLL, order: str) -> None:
    memory = Memory(3000)
    for _ in range(2):  # the counter returns to 0
        memory.partial[:] = -7
        launch(library, "total", memory.work, (12, 1, 1), (256, 1, 1))
        partial = np.zeros(256)
        partial[:12] = memory.partial[1:13]
        assert memory.count[0] == 0 and memory.partial[0] == tree(partial)[0]


def test_shuffles_votes_and_counting_barriers(library: ctypes.CDLL, order: str) -> None:
    memory = Memory(1)
    launch(library, "lanes", memory.work, (1, 1, 1), (32, 1, 1))
    results, lane = memory.count[:1024].reshape(-1, 32), np.arange(32)
    for row, width in zip((0, 4, 8), (32, 16, 8), strict=True):
        within, start = lane % width, lane - lane % width
        assert np.array_equal(results[row], start + 3)
        assert np.array_equal(results[row + 1], np.where(within >= 3, lane - 3, lane))
        assert np.array_equal(results[row + 2], np.where(within + 3 < width, lane + 3, lane))
        assert np.array_equal(results[row + 3], lane ^ 3)
    assert (results[12] == sum(1 << i for i in range(0, 32, 3))).all() and (results[13] == 2).all()
    assert (results[14][:8] == 5).all() and (results[15] == 9 * 4 + 2).all()


def test_atomics(library: ctypes.CDLL, order: str) -> None:
    memory = Memory(1)
    launch(library, "atomics", memory.work, (3, 1, 1), (200, 1, 1))
    assert memory.count[:6].tolist() == [600, 0xFFFFFFFF, 0, 600, 1200, 199]


@pytest.mark.parametrize("size", [16, 24, 32, 40, 264, 4000])
def test_struct_arguments_of_all_sizes(library: ctypes.CDLL, size: int) -> None:
    words = np.arange(size // 8 - 1, dtype=np.uint64) ** 3
    out = np.zeros_like(words)
    launch(library, f"sized_{size}", np.uint64(out.ctypes.data).tobytes() + words.tobytes(), (1, 1, 1), (1, 1, 1))
    assert np.array_equal(out, words)


def test_several_arguments(library: ctypes.CDLL) -> None:
    y = np.zeros(4, np.float32)
    numbers = (ctypes.c_double(0.5), ctypes.c_int(2), ctypes.c_float(3))
    assert library.run_several(ctypes.c_void_p(y.ctypes.data), *numbers, None) == 0
    assert y.tolist() == [0, 0, 3.5, 0]


def test_memory_functions(library: ctypes.CDLL) -> None:
    x, y = np.arange(10, dtype=np.float32), np.zeros(10, np.float32)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (x, y)]
    assert library.copy_and_back(*pointers, ctypes.c_size_t(10), ctypes.c_size_t(4), None) == 0
    assert np.array_equal(y, np.where(x < 4, 0, x))


def test_errors_that_a_test_asks_for(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    y = np.zeros(4, np.float32)
    arguments = (ctypes.c_void_p(y.ctypes.data), ctypes.c_double(0.5), ctypes.c_int(2), ctypes.c_float(3), None)
    monkeypatch.setenv("OPTFORGE_EMULATION_REFUSE", "cudaLaunchKernel:719")
    assert library.run_several(*arguments) == 719 and not y.any()
    assert [library.cudaPeekAtLastError(), library.cudaGetLastError(), library.cudaGetLastError()] == [719, 719, 0]


def test_missing_barrier_shows(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, seen = Memory(256), set()
    for order in ORDERS:
        monkeypatch.setenv("OPTFORGE_EMULATION_THREADS", order)
        launch(library, "reversed", memory.work, (1, 1, 1), (256, 1, 1))
        assert np.array_equal(memory.y[:256], memory.x[::-1])
        launch(library, "reversed_without_barrier", memory.work, (1, 1, 1), (256, 1, 1))
        seen.add(memory.y.tobytes())
    assert len(seen) == len(ORDERS)


def test_shared_memory_is_poisoned_between_blocks(library: ctypes.CDLL) -> None:
    memory = Memory(64)
    launch(library, "reads_before_it_writes", memory.work, (5, 1, 1), (32, 1, 1))
    assert (memory.y[:5] == POISON).all()


WARP, BLOCK = ((1, 1, 1), (32, 1, 1)), ((1, 1, 1), (256, 1, 1))
MISTAKES = {
    ("barrier_for_some", *BLOCK): "100 wait in __syncthreads, 0 in a warp operation, 156 have returned",
    ("barrier_or_shuffle", *WARP): "of 32 threads, 31 wait in __syncthreads, 1 in a warp operation",
    (
        "shuffle_without_lane",
        *WARP,
    ): "ffffffff of a warp operation names lane 5, which has returned or is not in the block",
    ("shuffle_outside_its_mask", *WARP): "the mask 0000ffff of a warp operation does not name lane",
    ("shuffle_from_outside_its_mask", *WARP): "which its mask 0000ffff does not name",
    ("misaligned_hint", *WARP): "misaligned_hint, block (0, 0, 0), thread (1, 0, 0): misaligned access",
    ("misaligned_plain", *WARP): "misaligned_plain, block (0, 0, 0), thread (2, 0, 0): {}:",
    ("where", (0, 1, 1), (32, 1, 1)): "where: a grid of (0, 1, 1) blocks is impossible",
    ("where", (1, 65536, 1), (32, 1, 1)): "where: a grid of (1, 65536, 1) blocks is impossible",
    ("where", (1, 1, 1), (1025, 1, 1)): "where: blocks of (1025, 1, 1) threads are impossible",
    ("where", (1, 1, 1), (32, 1, 0)): "where: blocks of (32, 1, 0) threads are impossible",
    ("lanes", (1, 1, 1), (16, 1, 1)): "which has returned or is not in the block",
}
MISTAKEN = """
import ctypes, os, sys, tempfile
library, memory, outcomes = ctypes.CDLL(sys.argv[1]), (ctypes.c_double * 4000)(), {}
start = ctypes.addressof(memory) + 64 - ctypes.addressof(memory) % 64
work = (ctypes.c_size_t * 5)(start, start, start, start, 2000)
for name, grid, block in eval(sys.stdin.read()):
    with tempfile.TemporaryFile() as said:
        if (child := os.fork()) == 0:
            os.dup2(said.fileno(), 2)
            library.launch(name.encode(), work, (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        outcomes[name, grid, block] = status, said.read().decode()
print(outcomes)
"""


@pytest.mark.parametrize("order", ORDERS[1:3])
def test_mistakes_end_the_process(path: Path, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTFORGE_EMULATION_THREADS", order)
    command = [sys.executable, "-c", MISTAKEN, str(path)]
    answer = subprocess.run(command, input=str(list(MISTAKES)), capture_output=True, text=True, check=True)
    for mistake, (status, said) in eval(answer.stdout).items():
        expected = MISTAKES[mistake].format("kernels.cu")
        assert status == -signal.SIGABRT and said.startswith("CUDA emulation: ") and expected in said, (mistake, said)


def test_write_beyond_an_allocation_is_seen_when_it_is_freed(path: Path) -> None:
    code = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
buffer = (ctypes.c_float * 16)()
library.copy_and_back(buffer, buffer, ctypes.c_size_t(10), ctypes.c_size_t(11), None)
"""
    answer = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert answer.returncode < 0 and "memory beside the allocation of 40 bytes" in answer.stderr


def test_kernels_are_cuda(tmp_path: Path) -> None:
    nvcc = require("nvcc")
    run([nvcc, "-cubin", "-std=c++17", "-arch=sm_90", "-o", str(tmp_path / "kernels.cubin"), str(HERE / "kernels.cu")])


@pytest.mark.parametrize("lazy", [{}, {"OPTFORGE_EMULATION_LAZY": "1"}], ids=["eager", "lazy"])
def test_pycuda_on_the_emulated_driver(emulated_cuda: dict[str, str], tmp_path: Path, lazy: dict[str, str]) -> None:
    require("pycuda")
    cubin, trace = tmp_path / "kernels.cubin", tmp_path / "trace"
    nvcc = ["nvcc", "-cubin", "-std=c++17", "-arch=sm_90", "-Werror", "all-warnings", "-O3", "-o", str(cubin)]
    variables = {**emulated_cuda, "XDG_CACHE_HOME": str(tmp_path), "OPTFORGE_EMULATION_TRACE": str(trace), **lazy}
    subprocess.run([*nvcc, str(HERE / "kernels.cu")], env=variables, check=True)
    command = [sys.executable, "-W", "error", str(HERE / "with_pycuda.py"), str(cubin)]
    answer = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (0, "done\n"), answer.stderr
    assert trace.read_text().splitlines().count("cuLaunchKernel") == 10
