"""Every rule over arrays in every format has the bits of the oracle on emulated CUDA, as the emitted launchers run it."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import data
import optforge as of
import storing
from amount import FULL
from conftest import require
from cuda import Options, Plan, Stats
from embedding import NORMS
from emulation import compile_emulated
from native import code
from optforge.core.formats import FORMATS, draw, storage
from oracles import _formats
from storing import GRAD_SCALE, RULES, SEED, Run, Several, check, check_told, run_of, storages

SAMPLE = {
    "lamb": ("all_bf16_random", "split", "p_g_f16", "state_8", "split_state_8"),
    "novograd": ("all_f16_random", "bf16_master"),
    "following": ("all_f16", "all_bf16_master_random"),
}
CASES = [(name, title) for name in RULES for title in storages(name) if FULL or title in SAMPLE.get(name, ())]


class Library:
    """A rule in several ways to store arrays, compiled for the CPU."""

    def __init__(self, name: str, titles: Sequence[str], directory: Path, change: Mapping[str, str] | None = None):
        own = [storages(name)[title] for title in titles]
        inexact: dict[frozenset[str], list[Any]] = {}
        for each in own:  # those that have the same passes
            inexact.setdefault(each.inexact - {"g"}, []).append(each)
        files: dict[str, str] = {}
        self.prefix: dict[str, str] = {}
        for number, together in enumerate(inexact.values()):
            wanted: Any = Several(tuple(together))
            files |= RULES[name].emit("cuda", wanted, f"k{number}", {})
            self.prefix |= {each.suffix: f"k{number}" for each in together}
        self.files = files | dict(change or {})
        self.calls = ctypes.CDLL(str(compile_emulated(self.files, directory)))

    def kernel(self, title: str) -> Any:
        """The table of a way to store arrays."""
        return ctypes.byref(ctypes.c_char.in_dll(self.calls, f"{self.prefix[title]}_cuda_kernel_{title}"))

    def call(self, name: str, *arguments: Any) -> int:
        """The status of a call."""
        return int(getattr(self.calls, f"optforge_cuda_{name}")(*arguments))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    require("g++")
    titles = {name: [title for owner, title in CASES if owner == name] for name, _ in CASES}
    return cache(lambda name: Library(name, titles[name], tmp_path_factory.mktemp(name)))


def words(values: Sequence[int]) -> Any:
    """Numbers as the options take them."""
    return (ctypes.c_uint64 * len(values))(*values)


class Steps:
    """Steps over arrays, which are tensors or parts of them."""

    def __init__(
        self,
        library: Library,
        title: str,
        arrays: Sequence[Sequence[np.ndarray]],
        beside: Steps | None = None,
        **how: Any,
    ):
        self.library, self.arrays, self.count = library, arrays, len(arrays)
        width = 1 + len(arrays[0])
        rows = [[own[0].size, *(array.ctypes.data for array in own)] for own in arrays]
        self.table = words([word for row in rows for word in row])
        assert len(self.table) == width * self.count
        sizes = how.get("sizes", [own[0].size for own in arrays])
        size = library.calls.optforge_cuda_workspace_size
        size.restype = ctypes.c_size_t
        most = max(self.count, len(sizes))
        room = size(library.kernel(title), ctypes.c_uint64(sum(sizes)), ctypes.c_size_t(most), ctypes.c_size_t(1))
        self.workspace = np.full(room // 8 + 2, np.nan) if room < 1 << 26 else np.empty(room // 8 + 2)
        self.options, self.plan = Options(), Plan()
        library.call("options_init", ctypes.byref(self.options))
        start = self.workspace.ctypes.data
        self.options.workspace, self.options.workspace_size = start + -start % 16, room
        self.kept = {name: words(values) for name, values in how.items() if name != "sizes"}
        for name, values in self.kept.items():
            setattr(self.options, name, ctypes.addressof(values))
        if "sizes" in how:
            self.kept["sizes"] = words(sizes)
            self.options.sizes, self.options.tensors = ctypes.addressof(self.kept["sizes"]), len(sizes)
        self.options.beside = None if beside is None else ctypes.addressof(beside.plan)
        self.told = (Stats * (1 + len(sizes)))()
        given = ctypes.byref(self.plan), library.kernel(title), self.table, ctypes.c_size_t(self.count)
        assert library.call("plan_list", *given, ctypes.byref(self.options), None) == 0

    def step(self, t: int, hyper: Sequence[float], stats: bool, **how: Any) -> Any:
        """One step; its statistics."""
        options = self.options
        options.seed, options.grad_scale = SEED, GRAD_SCALE
        for name, value in how.items():
            setattr(options, name, value)
        options.stats = ctypes.addressof(self.told) if stats else None
        options.tensor_stats = ctypes.addressof(self.told) + ctypes.sizeof(Stats) if stats else None
        doubles = (ctypes.c_double * max(len(hyper), 1))(*hyper)
        given = doubles, ctypes.c_uint64(t), ctypes.byref(self.plan), ctypes.byref(options), None
        assert self.library.call("step", *given) == 0
        every = (*NORMS, "nan", "inf")
        each = {name: np.array([getattr(own, name) for own in self.told[1:]]) for name in every}
        return SimpleNamespace(stats={name: getattr(self.told[0], name) for name in every}, each=each)


def execute(library: Library, run: Run, *, stats: bool = True, cut: int = 0) -> None:
    """Run the steps and compare each; `cut` makes parts of so many elements."""
    own = storing.live(run, run.tensors)
    sizes = [arrays[0].size for arrays in own]
    parts = [(k, at) for k, n in enumerate(sizes) for at in range(0, n if cut else 1, cut or 1)]
    how: dict[str, Any] = {}
    if cut:
        how = {"sizes": sizes, "number": [k for k, _ in parts], "part": [at for _, at in parts]}
    if run.streams is not None:
        how["stream"] = [run.streams[k] for k, _ in parts]
    slices = [
        [storing.piece(name, array, at, cut or sizes[k]) for name, array in zip(run.arrays, own[k], strict=True)]
        for k, at in parts
    ]
    steps = Steps(library, run.own.suffix, slices, **how)
    for t, (grads, expected) in enumerate(zip(run.grads, run.steps, strict=True), 1):
        for arrays, g in zip(own, grads, strict=True):
            arrays[1][...] = g
        told = steps.step(t, run.hyper, stats)
        where = f"step {t}, parts {cut}"
        check(run, own, expected.tensors, where)
        if stats:
            check_told(told, expected, where)


def begin(library: Library, run: Run) -> None:
    """Let state begin, and compare it."""
    arrays = storing.live(run, run.tensors)
    for own in arrays:
        for array in own[2:]:
            array.view(np.uint8)[:] = 0xA5
    steps = Steps(library, run.own.suffix, arrays)
    doubles = (ctypes.c_double * max(len(run.hyper), 1))(*run.hyper)
    assert library.call("state_init", ctypes.byref(steps.plan), doubles, None) == 0
    check(run, arrays, run.tensors, "at the beginning")


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_rule_in_every_format(case: tuple[str, str], library: Any) -> None:
    turn = CASES.index(case)
    own = library(case[0])
    execute(own, run_of(*case, "wild"), stats=turn % 2 == 1)
    execute(own, run_of(*case, "tame"), stats=turn % 2 == 0)
    if FULL or turn % 3 == 0:
        execute(own, run_of(*case, "tame"), cut=1024)
    if FULL and turn % 8 == 0:
        execute(own, run_of(*case, "large"))


def compare_vectors(library: Library, run: Run) -> None:
    """A step over arrays at multiples of 8 bytes, and at others."""
    found = []
    for shift in (0, 1, 2, 3):
        arrays = []
        for tensor in run.tensors:
            arrays.append([])
            for k, name in enumerate(run.arrays):
                x = np.array(tensor[name], ndmin=1)
                room = np.zeros(x.size + 32, x.dtype)
                start = -room.ctypes.data % 16 // x.itemsize + (shift if shift < 3 else k % 2)
                room[start : start + x.size] = x
                arrays[-1].append(room[start : start + x.size])
        steps = Steps(library, run.own.suffix, arrays)
        steps.step(1, run.hyper, True)
        found.append([array.tobytes() for own in arrays for array in own])
    assert found[0] == found[1] == found[2] == found[3]


def test_vectors_and_elements_have_the_same_bits(library: Any) -> None:
    """Arrays that begin at a multiple of 8 bytes are read four at a time, each by itself."""
    compare_vectors(library("lamb"), run_of("lamb", "all_bf16_random", "tame"))


@of.rule
def kept(p, g, m=0.0):
    """What is stored of a gradient."""
    m = g
    p = p + 0 * m
    return p, m


STORED = [(format, rounding) for format in ("bf16", "f16") for rounding in ("nearest", "stochastic")]


@pytest.mark.parametrize(("format", "rounding"), STORED if FULL else STORED[1:3])
def test_what_is_stored_of_any_float(format: str, rounding: str, tmp_path: Path) -> None:
    """Random bits, and neighbours of the largest, the least and the least normal numbers, and of halves between."""
    require("g++")
    own = FORMATS[format]
    files = kept.generate("cuda", prefix="k0", store={"m": format}, rounding=rounding, suffix="own")
    library = Library.__new__(Library)
    library.prefix, library.calls = {"own": "k0"}, ctypes.CDLL(str(compile_emulated(files, tmp_path)))
    edges = [
        0,
        1,
        0x7F7F0000,
        0x7F7F8000,
        0x7F7FFFFF,
        0x7F800000,
        0x7F800001,
        0x477FE000,
        0x477FEFFF,
        0x477FF000,
        0x47800000,
    ]
    edges += [
        0x38800000,
        0x387FC000,
        0x387FE000,
        0x33800000,
        0x33000000,
        0x32FFFFFF,
        0x3F808000,
        0x3F801000,
        0x00800000,
    ]
    near = np.array([edge + step for edge in edges for step in range(-3, 4) if edge + step >= 0], np.uint32)
    several = np.concatenate([near, near | 0x80000000]).repeat(40)
    any_bits = np.random.default_rng(4).integers(0, 2**32, 20_000, dtype=np.uint32)
    g = np.concatenate([several, any_bits]).view(np.float32)
    arrays = [np.zeros_like(g), g, np.zeros(g.size, own.numpy)]
    Steps(library, "own", [arrays]).step(3, [0.0], False, grad_scale=1.0)
    random = draw(SEED, 3, 0, 2, 0, g.size) if rounding == "stochastic" else None
    with np.errstate(all="ignore"):
        assert storing.alike(arrays[2].view(np.uint16), own.store(g, random).view(np.uint16), format)


@of.rule
def shown(p, g, m=0.0):
    """What is stored of a state, and then of a gradient."""
    p = m
    m = g
    return p, m


def showing(format: str, directory: Path, change: Mapping[str, str] | None = None) -> Library:
    """`shown` over state in blocks of 8 bits."""
    files = shown.generate("cuda", prefix="k0", store={"m": format}, suffix="own") | dict(change or {})
    library = Library.__new__(Library)
    library.prefix, library.files, library.calls = (
        {"own": "k0"},
        files,
        ctypes.CDLL(str(compile_emulated(files, directory))),
    )
    return library


def compare_blocks(library: Library, format: str) -> None:
    """Each code under scales of all kinds; and what is stored of numbers, of what is between two, and of any bits."""
    rng, numbers = np.random.default_rng(6), _formats.numbers(format)
    middles = ((numbers[:-1].astype(np.float64) + numbers[1:]) / 2).astype(np.float32)
    near = [np.nextafter(middles, np.float32(-2)), middles, np.nextafter(middles, np.float32(2)), numbers[:-1]]
    one = np.ones(1, np.float32)  # the largest of its block, so that shares are the numbers themselves
    edges = [np.concatenate([own, one]) for own in near]
    any_bits = rng.integers(0, 2**32, 20 * 256, dtype=np.uint32).view(np.float32)
    tame = (rng.standard_normal(8 * 256) * 10.0 ** rng.integers(-40, 38, 8).repeat(256)).astype(np.float32)
    zeros = np.zeros(256, np.float32)
    alone = [np.append(zeros[:-1], np.float32(x)) for x in (-0.0, -1.0, 1e-45, np.inf, -np.inf, np.nan, -np.nan)]
    g = np.concatenate([*edges, any_bits, tame, zeros, *alone, tame[:77]])
    m = np.concatenate([rng.permutation(256).astype(np.uint8) for _ in range(0, g.size, 256)])[: g.size]
    scales = rng.integers(0, 2**31, -(-g.size // 256), dtype=np.uint32).view(np.float32)
    scales[:6] = 1, 0, 1e-42, 3e38, np.inf, np.nan
    expected = _formats.load_blocks(format, m, scales)
    arrays = [np.zeros_like(g), g, m.view(FORMATS[format].numpy), scales]
    Steps(library, "own", [arrays]).step(1, [0.0], False, grad_scale=1.0)
    assert data.same(arrays[0], expected)
    codes, absmax = _formats.store_blocks(format, g)
    assert np.array_equal(arrays[2].view(np.uint8), codes) and data.same(arrays[3], absmax)


@pytest.mark.parametrize("format", ["q8", "uq8"])
def test_what_is_stored_in_blocks_of_any_float(format: str, tmp_path: Path) -> None:
    require("g++")
    compare_blocks(showing(format, tmp_path), format)


def test_the_tensor_s_own_step_and_the_seed(library: Any) -> None:
    """The draw is of the step that the tensor has come to, and of all 64 bits of the seed."""
    run = run_of("lamb", "all_bf16_random", "tame")

    def first(t: int, **how: Any) -> bytes:
        arrays = storing.live(run, run.tensors[-1:])
        late = {"late": [how.pop("late")]} if "late" in how else {}
        Steps(library("lamb"), "all_bf16_random", arrays, **late).step(t, run.hyper, False, **how)
        return b"".join(array.tobytes() for array in arrays[0])

    assert first(3) == first(8, late=5) != first(8)
    assert len({first(1, seed=seed) for seed in (0, 1, 2**32, 2**63)}) == 4


@pytest.mark.skipif(not FULL, reason="takes memory: set OPTFORGE_TEST_FULL")
def test_elements_behind_2_32_have_other_words(library: Any) -> None:
    """A part of a tensor of 2^32 + 2048 elements; so the 64 bits of an index count."""
    run = run_of("lamb", "all_bf16_random", "wild")
    found = []
    for part in (0, 1024, 2**32, 2**32 + 1024):
        arrays = [[array[:1024] for array in storing.live(run, run.tensors)[-1]]]
        steps = Steps(library("lamb"), "all_bf16_random", arrays, sizes=[2**32 + 2048], number=[0], part=[part])
        steps.step(1, run.hyper, False)
        found.append(arrays[0][2].tobytes())
    assert len(set(found)) == 4


def test_gradients_of_16_bits_are_zeroed_and_counted(library: Any) -> None:
    run = run_of("lamb", "all_bf16_random", "tame")
    for bad in (None, 0x7F80, 0xFF80, 0x7FC1):
        arrays = storing.live(run, run.tensors)
        before = [[array.copy() for array in own] for own in arrays]
        if bad is not None:
            arrays[-1][1][-1] = bad
        steps = Steps(library("lamb"), "all_bf16_random", arrays)
        told = steps.step(1, run.hyper, True, skip_nonfinite=1, zero_grads=1)
        assert not any(own[1].any() for own in arrays)
        assert (told.stats["nan"], told.stats["inf"]) == (bad == 0x7FC1, bad in (0x7F80, 0xFF80))
        for own, earlier in zip(arrays, before, strict=True):
            same = all(np.array_equal(a, b) for k, (a, b) in enumerate(zip(own, earlier, strict=True)) if k != 1)
            assert same == (bad is not None or not own[0].size)


def test_lists_of_different_numbers_of_arrays_share_a_step(library: Any) -> None:
    """With a master or scales beside one without: each has the bits that it has alone."""
    own = library("lamb")
    titles = [title for name, title in CASES if name == "lamb"]
    several = [(a, b) for a in titles for b in titles if own.prefix[a] == own.prefix[b]]
    wide = {title: len(run_of("lamb", title, "tame").arrays) for title in titles}
    pairs = [(a, b) for a, b in several if wide[a] != wide[b]]
    assert pairs
    for pair in pairs if FULL else (pairs[0], pairs[0][::-1]):
        runs = [run_of("lamb", title, "tame") for title in pair]
        together, alone = ([storing.live(run, run.tensors) for run in runs] for _ in range(2))
        counts = [len(arrays) for arrays in together]
        sizes = [arrays[0].size for arrays in (*together[0], *together[1])]
        steps: list[Steps] = []
        for title, arrays, first in zip(pair, together, (0, counts[0]), strict=True):
            count = len(arrays)
            how = {"sizes": sizes, "number": range(first, first + count), "part": [0] * count, "stream": range(count)}
            steps.append(Steps(own, title, arrays, *steps, **how))
        hyper = (ctypes.c_double * len(runs[0].hyper))(*runs[0].hyper)
        options, plans = ctypes.byref(steps[0].options), [ctypes.byref(each.plan) for each in steps]
        steps[0].options.seed, steps[0].options.grad_scale = SEED, GRAD_SCALE
        assert own.call("rows", plans[0], hyper, ctypes.c_uint64(1), ctypes.c_size_t(2), 1, options, None) == 0
        for _ in range(2):
            phase, done = 0, [0, 0]
            while done == [0, 0]:
                done = [own.call("phases", plan, options, phase, phase + 1, None) for plan in plans]
                phase += 1
            assert phase > 2 and done == 2 * [code("ERROR_ORDER")]
        for title, arrays, others in zip(pair, together, alone, strict=True):
            expected = Steps(own, title, others)
            for t in (1, 2):
                expected.step(t, runs[0].hyper, False)
            assert [a.tobytes() for each in arrays for a in each] == [a.tobytes() for each in others for a in each], (
                pair
            )


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_state_begins_as_the_oracle_s(case: tuple[str, str], library: Any) -> None:
    begin(library(case[0]), run_of(*case, "tame"))


def test_misaligned_and_overlapping_arrays_of_16_bits(library: Any) -> None:
    own = library("lamb")
    memory = np.zeros(256, np.uint16)
    room = np.zeros(4096)
    options, plan = Options(), Plan()
    own.call("options_init", ctypes.byref(options))
    options.workspace, options.workspace_size = room.ctypes.data + -room.ctypes.data % 16, room.nbytes - 16

    def status(*places: int) -> int:
        table = words([8, *(memory.ctypes.data + place for place in places)])
        given = ctypes.byref(plan), own.kernel("all_bf16_random"), table, ctypes.c_size_t(1)
        return own.call("plan_list", *given, ctypes.byref(options), None)

    assert status(0, 16, 32, 48) == 0
    assert status(0, 16, 33, 64) == code("ERROR_ALIGNMENT")
    assert status(0, 14, 32, 48) == code("ERROR_OVERLAP")


def test_a_rule_of_a_file_takes_every_format_on_cuda() -> None:
    """Its text does not change, and neither do the passes: a way to store arrays is a few lines of its own."""
    kernel = of.rules.adamw.kernel()
    own = storage(kernel.arrays, {"p": "bf16", "g": "bf16"}, "split")
    plain = of.rules.adamw.generate("cuda", dtypes=["f32"])["adamw.cu"]
    stored = of.rules.adamw.generate("cuda", store={"p": "bf16", "g": "bf16"}, master="split")["adamw.cu"]
    assert own.suffix == "bf16_split"
    begin, end = "template <typename real>", "/* ---- kernels"
    assert plain[plain.index(begin) : plain.index(end)] == stored[stored.index(begin) : stored.index(end)]
    assert "struct adamw_cuda_stored_bf16_split : optforge_cuda_storage<optforge_f32> {" in stored
    assert "enum { MASTER = OPTFORGE_LOW };" in stored
    assert "a == 2 || a == 3 ? OPTFORGE_F32 : OPTFORGE_BF16" in stored
