"""The example of a sharded step: the same bits on any number of MPI ranks, and as on NumPy."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import optforge as of
from amount import FULL
from compiling import objects, run
from conftest import require
from native import STRICT
from places import ROOT

EXAMPLE = ROOT / "examples" / "mpi"
SIZES = (10, 100000, 65536, 7, 300001)
STEPS, BAD_STEP = 5, 3

# All of MPI that the example uses, for one rank.
STUB = """
#include <stdlib.h>
#include <string.h>
typedef int MPI_Comm;
typedef size_t MPI_Datatype;
typedef int MPI_Op;
#define MPI_COMM_WORLD 0
#define MPI_DOUBLE sizeof(double)
#define MPI_FLOAT sizeof(float)
#define MPI_SUM 0
#define MPI_IN_PLACE NULL
static inline int MPI_Init(int *argc, char ***argv) { return argc == NULL || argv == NULL; }
static inline int MPI_Finalize(void) { return 0; }
static inline int MPI_Abort(MPI_Comm comm, int code) { exit(code + comm); }
static inline int MPI_Comm_rank(MPI_Comm comm, int *rank) { return *rank = comm; }
static inline int MPI_Comm_size(MPI_Comm comm, int *ranks) { *ranks = 1; return comm; }
static inline int MPI_Allreduce(const void *from, void *to, int count, MPI_Datatype type, MPI_Op op, MPI_Comm comm)
{
    if (from != MPI_IN_PLACE || to == NULL || count < 1 || type != MPI_DOUBLE || op != MPI_SUM)
        abort();
    return comm;
}
static inline int MPI_Gatherv(const void *from, int count, MPI_Datatype type, void *to, const int *counts,
                              const int *begins, MPI_Datatype types, int root, MPI_Comm comm)
{
    if (counts[0] != count || begins[0] != 0 || types != type || root != 0)
        abort();
    memcpy(to, from, (size_t)count * type);
    return comm;
}
"""


def noise(stream: int) -> np.ndarray:
    """What the example makes of each element's number."""
    with np.errstate(over="ignore"):
        x = np.arange(sum(SIZES), dtype=np.uint32) + np.uint32(stream * 0x9E3779B9 % 2**32)
        x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
        x = (x ^ x >> np.uint32(15)) * np.uint32(0x846CA68B)
    x = x ^ x >> np.uint32(16)
    return (x >> np.uint32(8)).astype(np.float32) / np.float32(2**24) - np.float32(0.5)


def split(values: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(SIZES)[:-1])


def fnv1a(data: bytes) -> int:
    h = 0xCBF29CE484222325
    for byte in data:
        h = (h ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return h


def reference() -> list[list[str | float]]:
    """The example's lines, from the reference on NumPy."""
    params, scale, lines = split(noise(0)), 1024.0, []
    rule = of.clip_by_global_norm >> of.rules.adamw
    optimizer = of.Optimizer(params, rule, target="numpy", skip_nonfinite=True, zero_grads=True, max_norm=1.0)
    for step in range(1, STEPS + 1):
        grads = split(noise(step) * np.float32(scale))
        if step == BAD_STEP:
            grads[-1][-1] = np.nan
        stats = optimizer.step(grads, grad_scale=scale, stats=True)
        assert stats is not None and not any(g.any() for g in grads)
        start: list[str | float] = ["step", str(step)]
        if stats.skipped:
            scale /= 2
            lines.append([*start, "skipped", "nan", str(stats.nan), "inf", str(stats.inf)])
        else:
            norms = ("grad_norm", "param_norm", "update_norm")
            lines.append([*start, *(word for name in norms for word in (name, stats[name]))])
    return [*lines, ["parameters", f"{fnv1a(np.concatenate(params).astype('<f4').tobytes()):016x}"]]


def parsed(text: str) -> list[list[str | float]]:
    """Lines of words, and of numbers where they are printed with %a."""
    return [[float.fromhex(w) if w.startswith("0x") else w for w in line.split()] for line in text.splitlines()]


def output(command: Sequence[str | Path]) -> str:
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def launcher() -> list[str]:
    """How to start ranks: also as root, and more of them than there are cores."""
    mpirun = require("mpirun")
    if "Open MPI" in output([mpirun, "--version"]):
        return [mpirun, "--oversubscribe", "--allow-run-as-root"]
    return [mpirun]


def test_any_number_of_ranks_prints_the_same(tmp_path: Path) -> None:
    """Built by the example's own Makefile; with 20 ranks some have no element."""
    mpicc, make, start = require("mpicc"), require("make"), launcher()
    optforge = f"{shlex.quote(sys.executable)} -m optforge"
    run([make, "-C", str(EXAMPLE), f"MPICC={mpicc}", f"OPTFORGE={optforge}", f"BUILD={tmp_path}"], tmp_path)
    texts = {ranks: output([*start, "-n", str(ranks), tmp_path / "sharded_step"]) for ranks in (1, 2, 3, 20)}
    assert f"step {BAD_STEP} skipped nan 1 inf 0\n" in texts[1]
    assert len(texts[1].splitlines()) == STEPS + 1
    for ranks, text in texts.items():
        assert text == texts[1], f"{ranks} ranks"


@pytest.mark.parametrize(
    "flags", [("-O2", "-fopenmp"), *([("-O1",), ("-O3", "-fopenmp")] if FULL else [])], ids=" ".join
)
def test_one_rank_without_mpi_has_the_bits_of_numpy(tmp_path: Path, flags: tuple[str, ...]) -> None:
    gcc = require("gcc")
    files = (of.clip_by_global_norm >> of.rules.adamw).generate("c", dtypes=["f32"], prefix="clip_adamw")
    for name, text in {**files, "mpi.h": STUB}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    sources = [EXAMPLE / "sharded_step.c", *(name for name in files if name.endswith(".c"))]
    command = [gcc, *STRICT, *flags, "-fPIC", "-I."]
    run([*command, *objects(command, sources, tmp_path), "-o", "sharded_step", "-lm"], tmp_path)
    assert parsed(output([tmp_path / "sharded_step"])) == reference()
