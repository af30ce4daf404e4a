"""The host program of the page on CUDA: compiled by nvcc as it stands there, and run on the emulation, with bits."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np

import optforge as of
from amount import FULL
from conftest import require
from data import same
from emulation import compile_emulated
from pages import PAGES, blocks

PAGE = PAGES / "cuda.md"
HEAD = """
extern "C" int train(size_t n, float *weights, const float *gradients, float *m, float *v, uint64_t steps, cudaStream_t stream)
{
"""
TAIL = """
    cudaStreamSynchronize(stream);
    cudaFree(options.workspace);
    return status;
}
"""


def program() -> str:
    """The page's lines as a function."""
    (block,) = (text for text in blocks(PAGE, "cpp") if text.startswith('#include "adam.cuh"\n'))
    first, _, rest = block.partition("\n")
    return f"{first}\n{HEAD}{rest}{TAIL}"


def test_nvcc_takes_the_program(tmp_path: Path) -> None:
    nvcc = require("nvcc")
    for name, text in {**of.rules.adam.generate("cuda"), "host.cu": program()}.items():
        (tmp_path / name).write_text(text)
    for source in ("host.cu", "adam.cu") if FULL else ("host.cu",):  # rules are compiled elsewhere
        command = [nvcc, "-std=c++17", "-Werror", "all-warnings", "-c", source, "-o", f"{source}.o"]
        answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stdout + answer.stderr


def test_the_program_trains(tmp_path: Path) -> None:
    library = ctypes.CDLL(str(compile_emulated({**of.rules.adam.generate("cuda"), "host.cu": program()}, tmp_path)))
    n, steps = 40_001, 3
    rng = np.random.default_rng(1)
    p, g, m, v = (rng.standard_normal(n).astype(np.float32) for _ in range(4))
    expected = of.Optimizer([p.copy()], "adam", target="numpy")
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (p, g, m, v)]
    assert library.train(ctypes.c_size_t(n), *pointers, ctypes.c_uint64(steps), None) == 0
    for _ in range(steps):
        expected.step([g])
    assert same(p, expected.params[0])
    assert same(m, expected.state["m"][0])
    assert same(v, expected.state["v"][0])
