"""What a whole step does with arrays in other formats: skipping, zeroing, transforms, groups, lists, parts, refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import data
import optforge as of
from conftest import require
from embedding import Library, Part, shared, step
from native import code
from optforge.emit import layout
from oracles import _formats, _transforms, begin, oracle
from storing import alike, check_told, moved

SEED = 77
HYPER = oracle("adamw").SETTINGS[0]
ORDER = ("p", "g", "m", "v")
CLIPPED = of.transforms.clip_by_global_norm(max_norm=0.5) >> of.rules.adamw
MADE: dict[str, tuple[of.Rule, dict[str, Any]]] = {
    "plain": (of.rules.adamw, {"dtypes": ["f32"]}),
    "bf16": (of.rules.adamw, {"store": {"p": "bf16", "g": "bf16"}}),
    "random": (of.rules.adamw, {"store": dict.fromkeys(ORDER, "bf16"), "rounding": "stochastic"}),
    "eight": (of.rules.adamw, {"store": {"m": "q8", "v": "uq8"}}),
    "clipped_f32": (CLIPPED, {"dtypes": "f32"}),
    "clipped_bf16": (CLIPPED, {"store": {"p": "bf16", "g": "bf16"}, "master": "split"}),
    "clipped_f16": (CLIPPED, {"store": dict.fromkeys(ORDER, "f16"), "rounding": "stochastic", "suffix": "half"}),
}
FORMATS = {
    "plain": _formats.Formats({}),
    "bf16": _formats.Formats({"p": "bf16", "g": "bf16"}),
    "random": _formats.Formats(dict.fromkeys(ORDER, "bf16"), stochastic=True),
    "eight": _formats.Formats({"m": "q8", "v": "uq8"}),
    "clipped_f32": _formats.Formats({}),
    "clipped_bf16": _formats.Formats({"p": "bf16", "g": "bf16"}, master="split"),
    "clipped_f16": _formats.Formats(dict.fromkeys(ORDER, "f16"), stochastic=True),
}
SUFFIX = {
    "plain": "f32",
    "bf16": "bf16",
    "random": "bf16_m_bf16_v_bf16_stochastic",
    "eight": "f32_m_q8_v_uq8",
    "clipped_f32": "f32",
    "clipped_bf16": "bf16_split",
    "clipped_f16": "half",
}


def make(directory: Path, flags: Sequence[str] = ()) -> Library:
    require("gcc")
    files = layout.runtime()
    for prefix, (own, how) in MADE.items():
        files |= own.generate("c", prefix=prefix, **how)
    files["optforge.c"] = files["optforge.c"].replace("THREAD_SIZE = 65536", "THREAD_SIZE = 1024")
    declared = ", ".join(f"{prefix}_kernel_{SUFFIX[prefix]}" for prefix in MADE)
    return Library(shared(directory, files, flags=flags), f"extern optforge_kernel {declared};")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return make(tmp_path_factory.mktemp("steps"), ["-fopenmp"])


Tensors = list[dict[str, Any]]


def tensors(prefix: str, sizes: Sequence[int], seed: int = 1) -> Tensors:
    random = np.random.default_rng(seed)
    made = []
    for n in sizes:
        p, g = (data.gradients(random, n, np.float32) for _ in range(2))
        made.append(_formats.begin(FORMATS[prefix], p, g, begin("adamw", p)))
    return made


def names(prefix: str) -> tuple[str, ...]:
    beside = [FORMATS[prefix].beside()] if FORMATS[prefix].master else []
    return (*ORDER, *beside, *FORMATS[prefix].scales())


def part(library: Library, prefix: str, own: Tensors, t: int = 1, **rows: Any) -> Part:
    """A list of copies of tensors."""
    groups = rows.pop("groups", [HYPER])
    fields = MADE[prefix][0].hyperparameters
    every = [{**fields, **group}[name] for group in groups for name in fields]
    live = [[moved(tensor[name]) for name in names(prefix)] for tensor in own]
    kernel = library.kernel(prefix, SUFFIX[prefix])
    return Part(kernel, live, t, every, rows=rows, groups=len(groups))


def check(prefix: str, found: Part, expected: Sequence[dict[str, Any]]) -> None:
    for k, (arrays, tensor) in enumerate(zip(found.tensors, expected, strict=True)):
        for name, array in zip(names(prefix), arrays, strict=True):
            assert alike(array, np.array(tensor[name], ndmin=1), FORMATS[prefix].of.get(name, "f32")), (prefix, k, name)


def expected(prefix: str, own: Tensors, t: int = 1, transforms: Any = (), hyper: Any = HYPER, **how: Any) -> Any:
    formats = [FORMATS[prefix]] * len(own)
    return _formats.step(formats, own, t, oracle("adamw"), transforms, hyper, order=ORDER, seed=SEED, **how)


# ── options ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prefix", ["bf16", "random", "eight"])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
@pytest.mark.parametrize("zero_grads", [False, True])
def test_skipping_and_zeroing(prefix: str, bad: float | None, zero_grads: bool, library: Library) -> None:
    own = tensors(prefix, (40, 0, 2050))
    if bad is not None:
        own[2]["g"][2049] = bad if prefix == "eight" else _formats.nearest("bf16", np.array([bad], np.float32))[0]
    live = part(library, prefix, own)
    told = step(library, live, stats=True, seed=SEED, skip_nonfinite=1, zero_grads=int(zero_grads), grad_scale=4.0)
    wanted = expected(prefix, own, grad_scale=4.0, skip_nonfinite=True, zero_grads=zero_grads)
    assert (told.status == -1) == wanted.skipped == (bad is not None)
    check(prefix, live, wanted.tensors)
    check_told(told, wanted, "skipping")


def test_a_skipped_step_draws_again(library: Library) -> None:
    """The step that follows has the skipped one's number, and its random bits."""
    own = tensors("random", (300,))
    live = part(library, "random", own)
    live.tensors[0][1][7] = _formats.NAN["bf16"]
    assert step(library, live, seed=SEED, skip_nonfinite=1).status == -1
    live.tensors[0][1][:] = own[0]["g"]
    assert step(library, live, seed=SEED, skip_nonfinite=1).status == 0
    check("random", live, expected("random", own).tensors)


def test_an_f16_gradient_is_unscaled_in_float(library: Library) -> None:
    own = tensors("clipped_f16", (300,))
    own[0]["g"][:4] = [0x7BFF, 0xFBFF, 1, 0x8001]
    live = part(library, "clipped_f16", own)
    how = ((_transforms.clip_by_global_norm, {"max_norm": 0.5}),)
    told = step(library, live, stats=True, seed=SEED, grad_scale=2.0**16)
    wanted = expected("clipped_f16", own, transforms=how, grad_scale=2.0**16)
    check("clipped_f16", live, wanted.tensors)
    check_told(told, wanted, "unscaling")


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_openmp_s_threads(threads: int, library: Library) -> None:
    for prefix in ("bf16", "random"):
        own = tensors(prefix, (3000, 5, 5000))
        live = part(library, prefix, own)
        told = step(library, live, stats=threads != 3, seed=SEED, threads=threads)
        wanted = expected(prefix, own)
        check(prefix, live, wanted.tensors)
        if threads != 3:
            check_told(told, wanted, "threads")


def test_the_seed_is_all_of_64_bits(library: Library) -> None:
    own = tensors("random", (2000,))
    found = []
    for seed in (0, 1, 2**32, 2**64 - 1):
        live = part(library, "random", own)
        step(library, live, seed=seed)
        found.append(live.tensors[0][0].tobytes())
    assert len(set(found)) == 4


# ── per tensor ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_groups_and_counts_of_their_own(library: Library) -> None:
    """The random bits are of the tensor's own step, its number, or its stream."""
    sizes, steps, group = (70, 400, 1030), [3, 9, 1], [1, 0, 1]
    groups = [HYPER, {**HYPER, "lr": 0.01, "beta1": 0.5}]
    own = tensors("random", sizes)
    for number, stream in (([0, 1, 2], None), ([2, 0, 1], None), ([0, 1, 2], [2**63 + 1, 5, 5])):
        rows = {"steps": steps, "group": group, "number": number} | ({"stream": stream} if stream else {})
        live = part(library, "random", own, 9, groups=groups, **rows)
        assert step(library, live, seed=SEED, threads=2).status == 0
        for k, tensor in enumerate(own):
            streams = [(stream or number)[k]]
            wanted = expected("random", [tensor], steps[k], hyper=groups[group[k]], streams=streams)
            alone = Part(live.kernel, [live.tensors[k]])
            check("random", alone, wanted.tensors)


def test_lists_of_several_formats_in_one_step(library: Library) -> None:
    """One norm over float, bfloat16 and half precision, one decision, one set of statistics."""
    sizes = {"clipped_f32": (33, 1500), "clipped_bf16": (1025, 0, 7), "clipped_f16": (260,)}
    own = {prefix: tensors(prefix, some, k) for k, (prefix, some) in enumerate(sizes.items())}
    for t in (1, 2, 3):
        live = [part(library, prefix, some, t) for prefix, some in own.items()]
        every = [tensor for some in own.values() for tensor in some]
        formats = [FORMATS[prefix] for prefix, some in own.items() for _ in some]
        how = ((_transforms.clip_by_global_norm, {"max_norm": 0.5}),)
        wanted = _formats.step(formats, every, t, oracle("adamw"), how, HYPER, order=ORDER, seed=SEED)
        told = step(library, *live, stats=True, seed=SEED, shares=1 + t, skip_nonfinite=1)
        assert told.status == 0
        left = iter(wanted.tensors)
        for found, (prefix, some) in zip(live, own.items(), strict=True):
            own[prefix] = [next(left) for _ in some]
            check(prefix, found, own[prefix])
        check_told(told, wanted, f"step {t}")


def test_a_part_draws_what_the_whole_does(library: Library) -> None:
    """Wherever it begins where nothing is added up; elements behind 2^32 have other words."""
    n, begins = 40, (0, 5, 1024, 2**32 - 40, 2**32 - 17, 2**32 - 1, 2**32, 3 * 2**32 + 1)
    own = tensors("random", (n,))[0]
    for begin_at in begins:
        live = part(library, "random", [own], part=[begin_at])
        assert step(library, live, seed=SEED, sizes=[2**40]).status == 0
        loaded = _formats.load_all(FORMATS["random"], own)
        state = {"m": loaded["m"], "v": loaded["v"]}
        p, state = oracle("adamw").step(loaded["p"], loaded["g"], state, 1, **HYPER)
        for number, (name, x) in enumerate({"p": p, "g": None, **state}.items()):
            if x is not None:
                draws = _formats.draws(SEED, 1, 0, number, np.uint64(begin_at) + np.arange(n, dtype=np.uint64))
                stored = _formats.stochastic("bf16", x, draws)
                assert alike(live.tensors[0][number], stored, "bf16"), (begin_at, name)


# ── begins, and refusals ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prefix", MADE)
def test_state_begins_as_the_oracle_s(prefix: str, library: Library) -> None:
    own = tensors(prefix, (70,))
    live = part(library, prefix, own)
    for array in live.tensors[0][2:]:
        array.view(np.uint8)[:] = 0xA5
    table = library.table(live.tensors)
    library.calls.optforge_state_init(live.kernel, library.pointer(table), library.ffi.NULL)
    check(prefix, live, own)


BF16, F16, F32, F64, SCALAR, LOW, Q8, UQ8, ABSMAX = 4, 5, 1, 2, 3, 6, 7, 8, 9


@pytest.mark.parametrize(
    ("formats", "master"),
    [
        ([BF16, BF16, F32, F64], 0),
        ([F64, F64, F64, BF16], 0),
        ([F64, F32, F64, F64], 0),
        ([BF16, BF16, F32, 0], 0),
        ([BF16, SCALAR, F32, F32], 0),
        ([LOW, BF16, F32, F32], 0),
        ([BF16, BF16, F32, LOW], 0),
        ([F16, F16, F32, LOW], 3),
        ([F32, F32, F32, F32], 3),
        ([F64, F64, F64, F64], 3),
        ([BF16, BF16, F32, BF16], 3),
        ([BF16, BF16, F32, SCALAR], 3),
        ([BF16, F32, F32, F32], 1),
        ([BF16, BF16, F32, F32], 4),
        ([BF16, BF16, LOW, LOW], 3),
        ([F32, F32, Q8, F32], 0),
        ([F32, F32, Q8, UQ8, ABSMAX], 0),
        ([F32, F32, Q8, ABSMAX, ABSMAX], 0),
        ([F32, F32, ABSMAX, Q8], 0),
        ([Q8, F32, F32, F32, ABSMAX], 0),
        ([F32, UQ8, F32, F32, ABSMAX], 0),
        ([F64, F64, Q8, F64, ABSMAX], 0),
        ([BF16, BF16, F32, UQ8, ABSMAX], 3),
        ([BF16, BF16, Q8, F32, ABSMAX], 4),
        ([F32, F32, *[BF16] * 32, Q8, ABSMAX], 0),
        ([F32, F32, F32, 10], 0),
    ],
    ids=str,
)
def test_a_table_of_wrong_formats(formats: list[int], master: int, library: Library) -> None:
    ffi = library.ffi
    own = tensors("bf16", (8,))
    live = part(library, "bf16", own)
    kernel = ffi.new("optforge_kernel *", live.kernel[0])
    told = ffi.new("unsigned char[]", formats)
    kernel.formats, kernel.master, kernel.arrays = told, master, len(formats)
    live.kernel = kernel
    assert step(library, live).status == code("ERROR_ABI")
    check("bf16", live, own)


def test_tables_that_are_right_are_taken(library: Library) -> None:
    """So that what is refused is refused for its formats."""
    own = tensors("bf16", (8,))
    for formats, master in (
        ([BF16, BF16, F32, F32], 0),
        ([BF16, F32, F32, F32], 3),
        ([BF16, F16, BF16, LOW], 3),
        ([F32, BF16, UQ8, Q8, ABSMAX, ABSMAX], 0),
        ([BF16, BF16, Q8, F32, F32, ABSMAX], 4),
        ([BF16, BF16, Q8, F32, LOW, ABSMAX], 4),
    ):
        live = part(library, "bf16", own)
        kernel = library.ffi.new("optforge_kernel *", live.kernel[0])
        told = library.ffi.new("unsigned char[]", formats)
        kernel.formats, kernel.master, kernel.arrays = told, master, len(formats)
        lists = Part(kernel, [[np.zeros(8) for _ in formats]])
        assert step(library, lists).status == 0


# ── state of 8 bits ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_blocks_are_of_whole_leaves(library: Library) -> None:
    """A part, and a range, that begins or ends inside a leaf would share a scale with another, and is refused."""
    own = tensors("eight", (5000,))
    for begin_at, n, taken in (
        (0, 1024, True),
        (4096, 904, True),
        (1024, 2048, True),
        (256, 768, False),
        (0, 1000, False),
    ):
        live = part(library, "eight", own, part=[begin_at])
        scales = slice(begin_at // 256, -(-(begin_at + n) // 256))
        live.tensors[0] = [x[scales] if k > 3 else x[begin_at : begin_at + n] for k, x in enumerate(live.tensors[0])]
        assert step(library, live, sizes=[5000]).status == (0 if taken else code("ERROR_PART"))
        whole = part(library, "eight", own)
        table, made = library.table(whole.tensors), np.zeros(7, np.uintp)
        call = library.calls.optforge_range
        status = call(whole.kernel, library.pointer(table), begin_at, n, library.pointer(made))
        assert status == (0 if taken else code("ERROR_PART"))
        if taken:
            rows = np.asarray(table).reshape(-1).astype(np.uintp)
            at = [n, *(4 * begin_at,) * 2, *(begin_at,) * 2, *(4 * (begin_at // 256),) * 2]
            assert made.tolist() == [n, *(int(a) + by for a, by in zip(rows[1:], at[1:], strict=True))]


@pytest.mark.parametrize("place", [4, 5])
def test_scales_are_looked_at(place: int, library: Library) -> None:
    own = tensors("eight", (300,))
    nowhere: Any = SimpleNamespace(ctypes=SimpleNamespace(data=0))
    wrong = {
        "ERROR_NULL": lambda _: nowhere,
        "ERROR_ALIGNMENT": lambda _: np.zeros(16, np.uint8)[1:9].view(np.float32),
        "ERROR_OVERLAP": lambda p: p[299:],
    }
    for status, make in wrong.items():
        live = part(library, "eight", own)
        live.tensors[0][place] = make(live.tensors[0][0])
        assert step(library, live).status == code(status), status


def test_a_build_tests_itself(library: Library) -> None:
    assert library.calls.optforge_selftest(library.kernel("eight", SUFFIX["eight"])) == 0
    assert library.calls.optforge_state_size(library.kernel("eight", SUFFIX["eight"]), 257) == 2 * (257 + 2 * 4)
