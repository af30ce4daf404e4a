"""Breaking a barrier, a tail or the width of an index in emitted CUDA makes a check on the emulation fail.

A mutant is one change of the text. All of them go through a few steps that every kernel takes part in, under orders of
threads and blocks that differ; a mutant survives where no bit and no statistic differs and nothing aborts.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cuda_formats import Library, begin, compare_blocks, compare_vectors, execute, showing
from test_cuda_formats import Steps as Stored
from test_cuda_native import Steps

import optforge as of
from conftest import require
from cuda import Cuda, Memory, order
from data import same
from emulation import compile_emulated
from optforge import global_norm, max_abs, scalar
from storing import live, run_of

CHUNK, TILE = 32768, 4096
SIZES = (3, 0, CHUNK + 1029, 129, TILE + 2, *[7] * 251)
BARRIER, WARP = r"__syncthreads\(\);", r"__syncwarp\(\);"
CHANGES = {  # by the file of the runtime
    "optforge.cuh": {
        BARRIER: "",
        WARP: "",
        r"__shfl_down_sync": "__shfl_up_sync",
        r"__shfl_sync\(0xffffffffu, value, 0, 32\)": "value",
        r"__shfl_sync\(0xffffffffu, before, 0, 32\)": "before",
        r"live == 4 && optforge_cuda_aligned\((from|to)\)": r"live == 4",
        r"(?<=\()live == 4 && ": "",
        r"k < live\b": "true",
        r"i <= 0 \? 0 : i < 4 \? i : 4": "4",
        r"n - begin < OPTFORGE_LEAF \? \(int\)\(n - begin\) : \+OPTFORGE_LEAF": "OPTFORGE_LEAF",
        r"u >= w\.units": "false",
        r"leaf < end \?": "true ?",
        r" && i < n\b": "",
        r"\(c >= w\.chunks && c > 0\)": "false",
        r"lane == leaf\b": "lane == leaf + 1",
        r"number - 1\b": "number",
        r"\*arrived = 0;": ";",
        r"row >= c->rows": "false",
        r"c->set = 0;": "",
        r"if \(leaf\.skipped\)": "if (false)",
        r"control->idle \|\| control->skipped": "control->idle",
        r"\|\| w\.control->idle\b": "",
        r"slot = w\.slot \+ blockIdx\.y": "slot = w.slot",
        r" \+ at\.leaf;": ";",
        r"sum - at\.leaf": "sum",
        r"int row = 0; row < leaf\.left": "int row = 0; row < leaf.left - 1",
        r"start \+= AT_ONCE": "start += 2 * AT_ONCE",
        r"finite &= ": "finite |= ",
        r"if \(!finite\)": "if (false)",
        r"nan \+= x != x": "nan += 0",
        r"!x\.finite\(\)": "false",
    },
    "optforge.cu": {
        BARRIER: "",
        r"\bdistance \*= 2": "distance *= 4",
        r"lane >= distance \?": "true ?",
        r"__shfl_up_sync": "__shfl_down_sync",
        r"__shfl_sync\(0xffffffffu, sum, 31, 32\)": "sum",
        r"start <= count": "start < count",
        r"0 < k && k <= count": "0 < k",
        r"if \(k <= count\)": "if (true)",
        r"leaf \+= 32": "leaf += 64",
        r"\bc \+= 32": "c += 64",
    },
}
ORDERS = (("descending", "random:1"), ("ascending", "descending"), ("random:5", "ascending"))
# Those that this rule and these steps cannot tell, and why.
SURVIVORS = {
    ("optforge.cuh", r"(?<=\()live == 4 && ", 0): "a load beyond the end, of what nobody uses",
    ("optforge.cuh", r"k < live\b", 0): "likewise",
    ("optforge.cuh", r"control->idle \|\| control->skipped", 0): "a skipped step adds up what nobody reads",
    ("optforge.cu", r"0 < k && k <= count", 0): "a load beyond the end, of what nobody uses",
    ("optforge.cu", r"\bc \+= 32", 0): "needs 33 chunks: test_more_chunks_than_a_row_of_the_tree has 34",
    ("optforge.cuh", r"lane == leaf\b", 0): "needs 1,025 tensors: test_totals_of_many_tensors has them, and fails",
}


# What arrays of 16 bits are loaded and stored by, all in optforge.cuh.
NARROW = {
    r"magnitude < 0x7c00u \?": "true ?",
    r"magnitude < 0x400u": "false",
    r"magnitude <= 0x7f7f0000u": "true",
    r"0x7fffu \+": "0x8000u +",
    r"magnitude > 0x7f800000u": "false",
    r"magnitude >= 0x38800000u": "true",
    r"magnitude <= 0x477fe000u": "true",
    r"0xfffu \+": "0x1000u +",
    r"rounded < 0x7c00u": "true",
    r"random < \(upper": "random > (upper",
    r"\| \(uint32_t\)rest\.x": "",
    r" \^ second": "",
    r"\* element;": "* 1;",
    r"stir\(0, seed\), t\)": "stir(0, t), seed)",
    r"\(int32_t\)\(int16_t\)low": "low",
    r"bits \+ 0x8000u": "bits + 0x7fffu",
    r"\(given & 0x7fffffffu\) > 0x7f800000u": "false",
    r"live == 4 && optforge_cuda_aligned\((from|to)\)": "live == 4",
    r"k < live\b(?= \? from\[k\])": "true",
    r"tensor\.part\(\) \+ leaf\.begin": "leaf.begin",
    r"w\.stream\[k\]": "number",
    r"w\.control->t - w\.behind\[w\.group\[k\]\]": "w.control->t",
    r"first >> 32": "0",
    r"&& !mastered\(a\);": ";",
    r"arrays\.kept\(x\[r\]\[0\]\[k\], 0, i \+ k\)": "x[r][0][k]",
    r"a, i \+ k\);": "a, i);",
}
NARROW_SURVIVORS = {
    (r"k < live\b(?= \? from\[k\])", 0): "a load beyond the end, of what nobody uses",
    (r"\| \(uint32_t\)rest\.x", 0): "the lower half of a fraction decides once in 65,536 times",
    (r"first >> 32", 0): "needs 2^32 elements: a test of its own",
    (r"&& !mastered\(a\);", 0): "where p has a master, no sum is said to be of what is stored",
    (r"magnitude <= 0x7f7f0000u", 0): "beyond the largest number: test_what_is_stored_of_any_float has them",
    (r"magnitude <= 0x477fe000u", 0): "likewise",
}


# What arrays of 8 bits in blocks are loaded and stored by, which no other kernel has; and where those functions are.
BLOCKS = {
    BARRIER: "",
    r"is_signed && code < 127": "is_signed && code < 126",
    r"place == \(is_signed \? 0u : 1u\)": "place == 0u",
    r"code < 255": "code < 254",
    r"place >= 2 \* parts": "place > 2 * parts",
    r"place - parts;": "place;",
    r"edge\(k \+ 1, parts\)": "edge(k, parts)",
    r"\(parts \+ 1\) / 2": "parts / 2",
    r"low \? k : parts - k": "k",
    r"code > 0 \? code - 1": "code > 1 ? code - 1",
    r"< 0\.0f \? 1u : ~0u": "< 0.0f ? ~0u : 1u",
    r"code == 0 \? -2\.0f :": "",
    r"rounded\.x > middle\.x": "false",
    r"decade < 6": "decade < 5",
    r"optforge_f32\(0\.25f\)": "optforge_f32(1.25f)",
    r"optforge_f32\(1\.25f\)": "optforge_f32(0.25f)",
    r"x\.x > above\[code\]": "x.x >= above[code]",
    r"!is_signed && bits >> 31 != 0": "false",
    r" && size < 0x7f800000u": "",
    r"k % 4 < live\[k / 4\] && ": "",
    r"size > most": "size < most",
    r"most > 0 && ": "",
    r" && most < 0x7f800000u": "",
    r"plain && k < live\[row\]": "plain",
    r"is_signed \? 127 : 0": "0",
    r"row \* OPTFORGE_CUDA_ROW \+ 4": "4",
    r"most == 0 \? 0\.0f :": "",
    r"row / OPTFORGE_CUDA_ROW % 2": "1",
    r" \|\| row \+ OPTFORGE_CUDA_ROW >= left": "",
    r"second \? held\[0\]\[k\]": "false ? held[0][k]",
    r"second \? lives\[0\]": "false ? lives[0]",
    r"second \? live : 0": "live",
    r"\[i / OPTFORGE_BLOCK\]": "[0]",
    r"\+ begin / OPTFORGE_BLOCK": "",
    r"live > 0 \? scales\[a\]": "true ? scales[a]",
    r"== OPTFORGE_UQ8\]": "== OPTFORGE_Q8]",
}
OWN = re.compile(
    r"^(struct optforge_cuda_map \{.*?^\};|OPTFORGE_DEVICE void optforge_cuda_(fill_map|store_block)\(.*?^\}"
    r"|    __device__ void (take_scales|load|hold)\(.*?^    \})",
    re.DOTALL | re.MULTILINE,
)
EIGHT = ("state_8", "split_state_8")
BLOCKS_SURVIVORS = {
    (r"\(parts \+ 1\) / 2", 0): "tells of one part alone, whose middle is rounded to the same float either way",
    (
        r"code > 0 \? code - 1",
        0,
    ): "for code 1 both are number 0",
    (r"plain && k < live\[row\]", 0): "codes beyond the end are not stored",
    (r"live > 0 \? scales\[a\]", 0): "a load beyond the end, of what nobody uses",
}


@of.rule
def mixed(p, g, m=0.0, seen: scalar = 0.0, *, lr=0.1):
    """Two phases, sums and largest values, scalar state."""
    m = 0.9 * m + 0.1 * g + 0.5
    rate = lr / (1 + global_norm(m) + max_abs(p - 4))
    p = p - rate * m
    seen = seen + max_abs(p - 4)
    return p, m, seen


def mutants(files: Mapping[str, str]) -> Iterator[tuple[str, str, int, str]]:
    """The file, what was changed in it, which occurrence, and the changed text."""
    for file, changes in CHANGES.items():
        for pattern, other in changes.items():
            for k, found in enumerate(places(pattern, files[file])):
                yield file, pattern, k, files[file][: found.start()] + other + files[file][found.end() :]


def places(pattern: str, text: str, in_blocks: bool = False) -> list[re.Match[str]]:
    """Where a text has a pattern, in the functions for blocks of 8 bits alone, or outside of them."""
    blocks = [own.span() for own in OWN.finditer(text)]
    found = [(own, any(begin <= own.start() < end for begin, end in blocks)) for own in re.finditer(pattern, text)]
    return [own for own, inside in found if inside == in_blocks]


SECONDS = 300  # many times what steps take without a mutation


def survives(do: Callable[[], object]) -> bool:
    """Whether steps notice nothing; in a process of its own, for a mutant may end it, or have it go on for ever."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            do()
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
            if number != 1 and t == (1 if number == 0 else 0):  # with statistics, and without
                grads[2][CHUNK + 1028], grads[2][5] = np.nan, np.inf
            run.step(grads, observe=t > 0)
        if number == 1:
            assert run.rows(4, 2, begins=True) == 0
            for _ in range(2):
                run.begin(run.gradients())
                assert run.launch() == 0
                memory.check("rows")
            run.how["zero_grads"] = 1
            given = run.gradients()
            memory.begin(given)
            assert run.launch() == 0
            memory.check("no rows")
            assert cuda.control(run.plan).idle
            assert all(same(tensor["g"], g) for tensor, g in zip(memory.tensors, given, strict=True))


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
    assert survives(lambda: check(base))
    files = mixed.generate("cuda", "f32", prefix="k")
    every = list(mutants(files))
    assert {(file, pattern) for file, pattern, _, _ in every} == {
        (file, pattern) for file, own in CHANGES.items() for pattern in own
    }

    def build(entry: tuple[str, str, int, str]) -> Any:
        file, pattern, k, text = entry
        directory = tmp_path / f"{file}-{abs(hash(pattern))}-{k}"
        try:
            return compile_emulated({**files, file: text}, directory)
        except RuntimeError as problem:
            pytest.fail(f"{file} {pattern} {k}: {problem}")

    survivors = []
    with ThreadPoolExecutor(2) as pool:
        for (file, pattern, k, _), library in zip(every, pool.map(build, every), strict=True):
            mutant = Mutant(base, library)
            if survives(lambda own=mutant: check(own)):
                survivors.append((file, pattern, k))
    for file, pattern, k in survivors:
        at = list(re.finditer(pattern, files[file]))[k].start()
        print(f"{file} {pattern} {k}:", " ".join(files[file][at - 160 : at + 60].split()))
    assert set(survivors) == set(SURVIVORS)


STORED = ("all_bf16_random", "all_f16", "all_f16_random", "split", "all_bf16_master_random")


def check_stored(library: Library) -> None:
    """Steps over arrays of 16 bits, whole, in parts, with streams, and of tensors that are late."""
    for title in STORED:
        if title.startswith("all_"):  # others begin as what p is in full
            begin(library, run_of("following", title, "tame"))
        execute(library, run_of("following", title, "wild"))
        execute(library, run_of("following", title, "tame"), cut=1024)
    run = run_of("following", "all_bf16_random", "tame")
    compare_vectors(library, run)
    found = []
    for t, late in ((3, 0), (8, 5)):
        arrays = live(run, run.tensors)
        Stored(library, "all_bf16_random", arrays, late=[late]).step(t, run.hyper, False)
        found.append([array.tobytes() for own in arrays for array in own])
    assert found[0] == found[1]


class Several:
    """A rule in both ways to have state in blocks of 8 bits, and what is stored in them of any float."""

    def __init__(self, directory: Path, change: Mapping[str, str] | None = None):
        self.lamb = Library("lamb", EIGHT, directory / "lamb", change)
        self.any = {format: showing(format, directory / format, change) for format in ("q8", "uq8")}
        self.files = self.lamb.files


def of_16_bits(directory: Path, change: Mapping[str, str] | None = None) -> Library:
    """A rule in many ways to have arrays of 16 bits."""
    return Library("following", STORED, directory, change)


def check_blocks(several: Several) -> None:
    """Steps over state in blocks of 8 bits, whole and in parts, under orders of threads and blocks that differ."""
    for title, orders in zip(EIGHT, ORDERS, strict=False):
        order(*orders)
        begin(several.lamb, run_of("lamb", title, "tame"))
        execute(several.lamb, run_of("lamb", title, "wild"))
        execute(several.lamb, run_of("lamb", title, "tame"), cut=1024)
    for format, library in several.any.items():
        compare_blocks(library, format)


@pytest.mark.parametrize(
    ("make", "changes", "explained", "do"),
    [
        (of_16_bits, NARROW, NARROW_SURVIVORS, check_stored),
        (Several, BLOCKS, BLOCKS_SURVIVORS, check_blocks),
    ],
    ids=["16 bits", "8 bits"],
)
def test_every_mutation_of_storage_is_seen(
    make: Callable[..., Any],
    changes: Mapping[str, str],
    explained: Mapping[tuple[str, int], str],
    do: Callable[[Any], None],
    tmp_path: Path,
) -> None:
    require("g++")
    if not os.environ.get("OPTFORGE_TEST_MUTATIONS"):
        pytest.skip("takes minutes: set OPTFORGE_TEST_MUTATIONS")
    base = make(tmp_path / "base")
    do(base)
    assert survives(lambda: do(base))
    text = base.files["optforge.cuh"]
    found = {pattern: places(pattern, text, changes is BLOCKS) for pattern in changes}
    assert all(found.values()), [pattern for pattern, own in found.items() if not own]
    every = [(pattern, k, own) for pattern, several in found.items() for k, own in enumerate(several)]

    def build(entry: tuple[str, int, re.Match[str]]) -> Any:
        pattern, k, own = entry
        changed = text[: own.start()] + changes[pattern] + text[own.end() :]
        directory = tmp_path / f"{abs(hash(pattern))}-{k}"
        try:
            return make(directory, {"optforge.cuh": changed})
        except RuntimeError as problem:
            pytest.fail(f"{pattern} {k}: {problem}")

    survivors = []
    with ThreadPoolExecutor(2) as pool:
        for (pattern, k, own), library in zip(every, pool.map(build, every), strict=True):
            if survives(lambda own=library: do(own)):
                survivors.append((pattern, k))
                print(f"{pattern} {k}:", " ".join(text[own.start() - 160 : own.start() + 60].split()))
    assert set(survivors) == set(explained)
