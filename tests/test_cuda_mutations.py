"""Breaking a barrier, a tail or the width of an index in emitted CUDA makes a check on the emulation fail.

A mutant is one change of the text. All of them go through a few steps that every kernel takes part in, under orders of
threads and blocks that differ; a mutant survives where no bit and no statistic differs and nothing aborts.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from conftest import require
from cuda import Cuda, Memory, order
from emulation import compile_emulated
from optforge import global_norm, max_abs, scalar
from test_cuda_native import Steps

CHUNK, TILE = 32768, 4096
SIZES = (3, 0, CHUNK + 1029, 35, TILE + 2, *[7] * 260)
CHANGES = {
    r"aligned && live(\[r\])? == 4": "aligned",
    r"i >= n \? 0 : ": "",
    r"k < live\b": "true",
    r"i < x(\.|->)n\b": "true",
    r"n - i < 4 \? \(int\)\(n - i\) : 4": "4",
    r"row >= c->rows": "false",
    r"first\[middle\] <= block": "first[middle] < block",
    r"__shfl_down_sync": "__shfl_up_sync",
    r"c->done = 0;": "",
    r"\bdistance \*= 2": "distance *= 4",
    r"c->set = 0;": "",
    r"w->control->idle \|\| w->control->skipped": "w->control->idle",
    r"c->idle \|\| c->skipped": "c->idle",
    r"== gridDim\.x \* gridDim\.y - 1": "== 0",
}
ORDERS = (("descending", "random:1"), ("ascending", "descending"), ("random:5", "ascending"))
# Those that this rule and these steps cannot tell, and why.
SURVIVORS = {
    (r"__syncthreads\(\);", 1): "the tree's last: for more than one chunk of values, in test_totals_of_many_chunks",
    (r"__syncthreads\(\);", 13): "of the layout: each thread reads what it wrote itself",
    (r"__syncthreads\(\);", 14): "of the begin: for more than one group, in test_groups_have_their_own_hyperparameters",
    (
        r"__syncthreads\(\);",
        15,
    ): "of what skips: a block ends early where it sees the outcome, and has nothing to add then",
    (
        r"__syncthreads\(\);",
        17,
    ): "behind the totals of all: for more than one group, in test_groups_have_their_own_hyperparameters",
    (r"k < live\b", 0): "a load beyond the end, of what nobody uses",
    (r"aligned && live(\[r\])? == 4", 0): "likewise",
    **{(r"i < x(\.|->)n\b", k): "spares work alone: of rows behind the end no element is live" for k in range(4)},
    **{(r"k < live\b", k): "absent elements are 0, and so is what they would add" for k in (2, 3, 4, 7, 9)},
    (r"w->control->idle \|\| w->control->skipped", 0): "of the scan, before which no step is skipped but an idle one",
    (r"c->idle \|\| c->skipped", 0): "spares work alone",
}


@of.rule
def mixed(p, g, m=0.0, seen: scalar = 0.0, *, lr=0.1):
    """Two phases, sums and largest values, scalar state."""
    m = 0.9 * m + 0.1 * g + 0.5
    rate = lr / (1 + global_norm(m) + max_abs(p - 4))
    p = p - rate * m
    seen = seen + max_abs(p - 4)
    return p, m, seen


def mutants(text: str) -> Iterator[tuple[str, int, str]]:
    """What was changed, which occurrence, and the changed text."""
    for pattern, other in {r"__syncthreads\(\);": "", **CHANGES}.items():
        for k, found in enumerate(re.finditer(pattern, text)):
            yield pattern, k, text[: found.start()] + other + text[found.end() :]


def survives(cuda: Cuda) -> bool:
    """Whether steps in several orders notice nothing; in a process of its own, for a mutant may end it."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            check(cuda)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def check(cuda: Cuda) -> None:
    """Steps of all kinds."""
    for number, (threads, blocks) in enumerate(ORDERS):
        order(threads, blocks)
        how = {"skip_nonfinite": number != 1, "zero_grads": number != 1}
        memory = Memory(cuda, np.float32, SIZES, aligned=number > 0, seed=number, **how)
        run = Steps(cuda, memory, **how)
        for t in range(3):
            grads = run.gradients()
            if number != 1 and t == 1:
                grads[2][CHUNK + 1028] = np.nan
            run.step(grads, observe=t > 0)
        if number == 1:
            assert run.rows(4, 2, begins=True) == 0
            for done in range(3):
                if done == 2:
                    memory.begin(run.gradients())
                else:
                    run.begin(run.gradients())
                assert run.launch() == 0
                memory.check("rows")
            assert cuda.control(run.plan).idle


class Mutant(Cuda):
    """A rule whose emitted file was changed."""

    def __init__(self, base: Cuda, library: Path):
        self.__dict__.update(base.__dict__)
        self.loaded = ctypes.CDLL(str(library))


def test_every_mutation_is_seen(tmp_path: Path) -> None:
    require("g++")
    if not os.environ.get("OPTFORGE_TEST_MUTATIONS"):
        pytest.skip("takes minutes: set OPTFORGE_TEST_MUTATIONS")
    base = Cuda(mixed, tmp_path / "base", dtypes="f32")
    check(base)
    assert survives(base)
    files = mixed.generate("cuda", "f32", prefix="k")
    every = list(mutants(files["k.cu"]))
    assert {pattern for pattern, _, _ in every} == {r"__syncthreads\(\);", *CHANGES}

    def build(entry: tuple[str, int, str]) -> Any:
        pattern, k, text = entry
        directory = tmp_path / f"{abs(hash(pattern))}-{k}"
        try:
            return compile_emulated({**files, "k.cu": text}, directory)
        except RuntimeError as problem:
            pytest.fail(f"{pattern} {k}: {problem}")

    survivors = []
    with ThreadPoolExecutor(2) as pool:
        for (pattern, k, _), library in zip(every, pool.map(build, every), strict=True):
            if survives(Mutant(base, library)):
                survivors.append((pattern, k))
    for pattern, k in survivors:
        at = list(re.finditer(pattern, files["k.cu"]))[k].start()
        print(f"{pattern} {k}:", " ".join(files["k.cu"][at - 160 : at + 60].split()))
    assert set(survivors) == set(SURVIVORS)
