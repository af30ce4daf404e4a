"""The runtime by itself: a kernel written by hand against NumPy, lists of several kernels, and parts of tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from conftest import require
from embedding import RULES, SOURCES, STATS, Library, Part, arrays, emitted, lists_of, same, shared, step, tensors_of
from optforge import global_norm, norm, rule, scalar
from oracles import _tree

SIZES = (100_001, 0, 1, 31, 32, 33, 1023, 1024, 1025, 32_767, 32_768, 32_769)
KERNELS = """
extern optforge_kernel hand_kernel_f32, hand_kernel_f64;
"""


@rule
def late(p, g, m=0.0, *, lr=0.5):
    """The gradient is read by the second pass alone."""
    size = norm(p)
    m = 0.5 * m + g
    p = p - lr * size * m
    return p, m


@rule
def keeps(p, g, s: scalar = 0.0, *, lr=0.5):
    """One pass, whose total over all tensors is kept."""
    s = global_norm(g)
    p = p - lr * g
    return p, s


@rule
def along(p, g, *, lr=0.5):
    """A total over all tensors that is called like one of the statistics."""
    update = 0.5 * g
    p = p - lr / (1 + global_norm(update)) * update
    return p


@rule
def bare(p, g):
    """No hyperparameters and no state."""
    p = p - g
    return p


EVERY = {
    **RULES,
    "clipped_adamw": of.transforms.clip_by_global_norm(max_norm=0.5) >> of.rules.adamw,
    "adam": of.rules.adam,
    "momentum": of.rules.momentum,
    "sgd": of.rules.sgd,
    "late": late,
    "keeps": keeps,
    "along": along,
    "bare": bare,
}


def make(directory: Path, *flags: str) -> Library:
    """The runtime, the kernel by hand and all rules."""
    require("gcc")
    names = ", ".join(f"{prefix}_kernel_{dtype}" for prefix in EVERY for dtype in ("f32", "f64"))
    path = shared(directory, emitted("split", EVERY), [SOURCES / "hand.c"], flags)
    return Library(path, f"{KERNELS}extern optforge_kernel {names};")


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return make(tmp_path_factory.mktemp("serial"))


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return make(tmp_path_factory.mktemp("parallel"), "-fopenmp")


@pytest.fixture(params=["serial", "parallel"])
def library(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


# ---- a kernel by hand


def by_hand(
    tensors: list[list[np.ndarray]], hyper: Mapping[str, float], starting: Sequence[int], unscale: float, zero: bool
) -> tuple[np.ndarray, np.ndarray]:
    """What hand.c does, in NumPy; the statistics of all and of each."""
    lr, momentum, bound = hyper["lr"], hyper["momentum"], hyper["bound"]
    grads, before = [], [own[0].copy() for own in tensors]
    for own in tensors:
        real = own[0].dtype.type
        g = own[1] * real(unscale)
        grads.append(g)
        own[2][:] = real(momentum) * own[2] + g
        if zero:
            own[1][:] = 0
    everything = _tree.global_norm([own[2] for own in tensors])
    clip = bound / everything if everything > bound else 1.0
    for own, begins in zip(tensors, starting, strict=True):
        p, _, m, s = own
        real = p.dtype.type
        size, along, gap = _tree.norm(m), _tree.tree_sum(m * p), _tree.max_abs(m - p)
        old = 1.0 if begins else float(s[0])
        by = lr * clip / (1.0 + size)
        drift = _tree.divide(along / (1.0 + gap), p.size) + _tree.divide(_tree.tree_sum(p), p.size)
        p[:] = p - real(by) * m - real(old / 8.0) * real(drift)
        s[0] = size / 2.0 + old / 2.0
    updates = [own[0] - b for own, b in zip(tensors, before, strict=True)]
    total, each = np.zeros(1, STATS), np.zeros(len(tensors), STATS)
    values = {"grad_norm": grads, "clipped_grad_norm": grads, "update_norm": updates}
    values["param_norm"] = [own[0] for own in tensors]
    for name, of_each in values.items():
        total[name] = _tree.global_norm(of_each)
        each[name] = [_tree.norm(x) for x in of_each]
    for k, row in enumerate(each):
        ratio = 0.0 if row["update_norm"] == 0.0 else _tree.divide(row["update_norm"], row["param_norm"])
        each["max_update_ratio"][k] = ratio
    total["max_update_ratio"] = each["max_update_ratio"].max()
    return total[0], each


HYPER = {"lr": 0.3, "momentum": 0.6, "bound": 50.0}
STARTING = [k % 3 == 0 for k in range(len(SIZES))]


@cache
def steps_by_hand(dtype: str, zero: bool) -> list[Any]:
    """Of each step the gradients, the arrays that it leaves, and its statistics, whatever else is asked for."""
    own, steps = arrays(SIZES, {"f32": np.float32, "f64": np.float64}[dtype], 1, 1, 1), []
    for t in range(1, 4):
        for tensor in own:
            tensor[1][:] = np.random.default_rng(t).standard_normal(tensor[1].size)
        grads = [tensor[1].copy() for tensor in own]
        told = by_hand(own, HYPER, STARTING if t == 1 else [False] * len(SIZES), 1.0 / 3.0, zero)
        steps.append((grads, copy.deepcopy(own), *told))
    return steps


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_a_kernel_by_hand(library: Library, dtype: str, skip: bool, stats: bool, zero: bool) -> None:
    real = {"f32": np.float32, "f64": np.float64}[dtype]
    own = arrays(SIZES, real, 1, 1, 1)
    for t, (grads, expected, total, each) in enumerate(steps_by_hand(dtype, zero), 1):
        for tensor, g in zip(own, grads, strict=True):
            tensor[1][:] = g
        part = Part(library.kernel("hand", dtype), own, t, list(HYPER.values()))
        part.rows["starting"] = np.array(STARTING if t == 1 else [0] * len(SIZES))
        counted = np.zeros(1, np.uint64)
        outcome = step(
            library,
            part,
            stats=stats,
            skip_nonfinite=skip,
            zero_grads=zero,
            grad_scale=3.0,
            threads=3,
            applied=library.pointer(counted, "uint64_t *"),
        )
        assert outcome.status == 0 and counted[0] == 1
        assert same(own, expected)
        if stats:
            assert outcome.stats is not None and same(outcome.stats, total)
            assert outcome.each is not None and same(outcome.each, each)


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("where", [0, 5, 8, 11])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_skipped(library: Library, bad: float, where: int, stats: bool) -> None:
    own = arrays(SIZES, np.float32, 2, 1, 1)
    own[where][1][-1] = bad
    expected = copy.deepcopy(own)
    for tensor in expected:
        tensor[1][:] = 0
    part, counted = Part(library.kernel("hand", "f32"), own), np.zeros(1, np.uint64)
    outcome = step(
        library, part, stats=stats, skip_nonfinite=1, zero_grads=1, applied=library.pointer(counted, "uint64_t *")
    )
    assert outcome.status == -1 and counted[0] == 0
    assert same(own, expected)
    if stats:
        assert outcome.stats is not None and outcome.each is not None
        rows = [outcome.stats, *outcome.each]
        assert [int(row["nan"]) for row in rows] == [int(bad != bad) * (k in (0, where + 1)) for k in range(13)]
        assert [int(row["inf"]) for row in rows] == [int(bad == bad) * (k in (0, where + 1)) for k in range(13)]
        for row in rows:
            assert row["skipped"] == 1 and math.isnan(row["param_norm"]) and math.isnan(row["clipped_grad_norm"])
            assert row["update_norm"] == row["max_update_ratio"] == 0.0
        assert [math.isfinite(row["grad_norm"]) for row in rows[1:]] == [k != where for k in range(12)]


def test_introspection(serial: Library) -> None:
    """An optimizer by its name needs no wrapper for each rule."""
    kernel, ffi = serial.kernel("novograd", "f64"), serial.ffi
    assert ffi.string(kernel.name) == b"novograd" and ffi.string(kernel.hash).decode() == of.rules.novograd.hash
    names = [ffi.string(kernel.hyper_names[k]).decode() for k in range(kernel.hypers)]
    assert names == list(of.rules.novograd.hyperparameters) and kernel.hyper_names[kernel.hypers] == ffi.NULL
    states = [ffi.string(kernel.state_names[k]).decode() for k in range(kernel.arrays - 2)]
    assert states == list(of.rules.novograd.state) and kernel.state_names[kernel.arrays - 2] == ffi.NULL


def test_state_begins(serial: Library) -> None:
    own = arrays([33], np.float64, 3, 1, 1)
    serial.calls.optforge_state_init(serial.kernel("hand", "f64"), serial.pointer(serial.table(own)), serial.ffi.NULL)
    assert same(own[0][2:], [np.zeros(33), np.ones(1)])


# ---- workspaces


def test_the_workspace_of_a_kernel_holds_a_step_of_its_lists(serial: Library) -> None:
    """What optforge_kernel_workspace says, and what NAME_workspace_size is, is enough for any step."""
    for prefix in [*EVERY, "hand"]:
        kernel = serial.kernel(prefix, "f32")
        states = sum(kernel.formats[k] == 1 for k in range(2, kernel.arrays))
        for sizes in ([0], [1], [5, 0, 1025], [33] * 70, [100_001]):
            own = arrays(sizes, np.float32, 4, states, kernel.arrays - 2 - states)
            most = serial.calls.optforge_kernel_workspace(kernel, sum(sizes), len(sizes))
            for rows in ({}, {"steps": np.arange(len(sizes)) + 1}, {"group": np.zeros(len(sizes))}):
                hyper = list(serial.ffi.unpack(kernel.hyper_defaults, kernel.hypers)) * len(sizes)
                part = Part(kernel, own, hyper=hyper, rows=rows, groups=len(sizes))
                lists, _kept = lists_of(serial, [part])
                stats = np.zeros(1 + len(sizes), STATS)
                o = serial.options(skip_nonfinite=1, stats=serial.pointer(stats, "optforge_stats *"))
                assert serial.calls.optforge_workspace_size(lists, 1, o) <= most, (prefix, sizes, rows)


# ---- lists of several kernels in one step


def test_lists_of_two_dtypes_of_one_rule(library: Library) -> None:
    """One norm over both, in the order of their numbers; the same as in any other order of the lists."""
    narrow, wide = (library.kernel("clipped", dtype) for dtype in ("f32", "f64"))
    a, b = tensors_of(narrow, (1025, 33, 40_000), 5), tensors_of(wide, (31, 0, 2049), 6)
    numbers = np.array([4, 0, 3]), np.array([2, 5, 1])
    in_order: list[np.ndarray] = [np.zeros(0)] * 6
    for own, number in zip([*a, *b], [*numbers[0], *numbers[1]], strict=True):
        in_order[number] = own[1].copy()
    seen = []
    for swapped in (False, True):
        mine, theirs = copy.deepcopy(a), copy.deepcopy(b)
        parts = [
            Part(narrow, mine, rows={"number": numbers[0]}),
            Part(wide, theirs, rows={"number": numbers[1]}),
        ]
        outcome = step(library, *(parts[::-1] if swapped else parts), stats=True, threads=3)
        assert outcome.status == 0 and outcome.stats is not None and outcome.each is not None
        seen.append((mine, theirs, outcome.stats, outcome.each))
        assert outcome.stats["grad_norm"] == _tree.global_norm(in_order)
        assert list(outcome.each["grad_norm"]) == [_tree.norm(g) for g in in_order]
        by = outcome.stats["clipped_grad_norm"]
        assert abs(by - 0.5) < 1e-5
    assert same(seen[0], seen[1])


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_two_rules_clip_over_one_norm(library: Library, skip: bool, stats: bool) -> None:
    """Each tensor is as in a step of the rule alone, with gradients that are clipped before."""
    kernels = library.kernel("clipped_adamw", "f32"), library.kernel("clipped", "f64")
    plain = library.kernel("adamw", "f32"), library.kernel("momentum", "f64")
    both = tensors_of(kernels[0], (1025, 33), 7), tensors_of(kernels[1], (31, 0, 40_000), 8)
    everything = _tree.global_norm([own[1] for tensors in both for own in tensors])
    assert everything > 0.5
    alone = copy.deepcopy(both)
    outcome = step(library, *map(Part, kernels, both), stats=stats, skip_nonfinite=skip, threads=3)
    assert outcome.status == 0
    for kernel, tensors, mine in zip(plain, alone, both, strict=True):
        for own in tensors:
            own[1][:] = own[1] * own[1].dtype.type(0.5 / everything)
        assert step(library, Part(kernel, tensors)).status == 0
        for own, stepped in zip(tensors, mine, strict=True):
            own[1][:] = stepped[1]
        assert same(mine, tensors)
    if stats:
        assert outcome.stats is not None and outcome.stats["grad_norm"] == everything


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("one", "other"), [("clipped", "momentum"), ("keeps", "sgd"), ("along", "sgd"), ("clipped_adamw", "adamw")]
)
def test_a_total_is_of_the_lists_that_add_it_up(
    library: Library, one: str, other: str, swapped: bool, stats: bool
) -> None:
    """Statistics of a rule that takes no part in a total change nothing about it."""
    a, b = (tensors_of(library.kernel(prefix, "f32"), (1025, 33), k) for k, prefix in enumerate((one, other)))
    alone = copy.deepcopy(a), copy.deepcopy(b)
    parts = [Part(library.kernel(one, "f32"), a), Part(library.kernel(other, "f32"), b)]
    assert step(library, *(parts[::-1] if swapped else parts), stats=stats).status == 0
    assert step(library, Part(library.kernel(one, "f32"), alone[0])).status == 0
    assert step(library, Part(library.kernel(other, "f32"), alone[1])).status == 0
    assert same(a, alone[0])
    assert same(b, alone[1])


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("one", "other"), [("late", "sgd"), ("late", "clipped"), ("lamb", "sgd"), ("hand", "late")])
def test_statistics_of_rules_of_different_phases(
    library: Library, one: str, other: str, swapped: bool, skip: bool
) -> None:
    """Each tensor's are what they are in a step of its rule alone; counts of NaN, too."""
    a, b = (tensors_of(library.kernel(prefix, "f32"), (1025, 33, 5000), k) for k, prefix in enumerate((one, other)))
    if not skip:
        a[0][1][7] = b[2][1][4999] = math.nan
        a[2][1][3] = b[0][1][3] = math.inf
    if "clipped" in (one, other):
        b = tensors_of(library.kernel("clipped", "f32"), (1025, 33, 5000), 9)
    alone = copy.deepcopy(a), copy.deepcopy(b)
    parts = [Part(library.kernel(one, "f32"), a), Part(library.kernel(other, "f32"), b)]
    outcome = step(library, *(parts[::-1] if swapped else parts), stats=True, skip_nonfinite=skip)
    each = [
        step(library, Part(library.kernel(prefix, "f32"), own), stats=True, skip_nonfinite=skip).each
        for prefix, own in zip((one, other), alone, strict=True)
    ]
    assert outcome.status == 0 and outcome.each is not None
    assert same(outcome.each, np.concatenate(each[::-1] if swapped else each))
    assert same(a, alone[0]) and same(b, alone[1])


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("prefix", ["late", "lamb", "novograd", "clipped", "keeps", "hand", "bare"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_decision_to_skip(library: Library, prefix: str, bad: float, stats: bool) -> None:
    """Whatever the phases of a rule are, a gradient of another list keeps it from changing anything, and its own others."""
    for where in (0, 1):
        a = tensors_of(library.kernel(prefix, "f32"), (1025, 33), 10)
        b = tensors_of(library.kernel("adamw", "f64"), (40, 2049), 11)
        (a, b)[where][1][1][-1] = bad
        before = copy.deepcopy((a, b))
        parts = [Part(library.kernel(prefix, "f32"), a), Part(library.kernel("adamw", "f64"), b)]
        for order in (parts, parts[::-1]):
            assert step(library, *order, stats=stats, skip_nonfinite=1, threads=2).status == -1
            assert same((a, b), before)
        if where == 0:
            assert step(library, parts[0], stats=stats, skip_nonfinite=1, threads=2).status == -1
            assert same((a, b), before)


@pytest.mark.parametrize("prefix", ["adamw", "clipped_adamw"])
def test_counts_of_steps_of_their_own(library: Library, prefix: str) -> None:
    """The same as a step of each count by itself, where no total is over all; groups too."""
    kernel = library.kernel(prefix, "f32")
    own = tensors_of(kernel, (33, 1025, 7, 70_000, 0, 1024), 12)
    if prefix == "clipped_adamw":
        for tensor in own:
            tensor[1][:] *= np.float32(1e-4)  # not clipped, so that the norm is no matter
    steps, group = [3, 1, 3, 9, 1, 4], [1, 0, 0, 1, 1, 1]
    defaults = list(library.ffi.unpack(kernel.hyper_defaults, kernel.hypers))
    hyper = [*defaults, *(0.5 * x for x in defaults)]
    alone = copy.deepcopy(own)
    part = Part(kernel, own, 9, hyper, rows={"steps": np.array(steps), "group": np.array(group)}, groups=2)
    outcome = step(library, part, stats=True, threads=2)
    assert outcome.status == 0
    for tensor, t, g in zip(alone, steps, group, strict=True):
        size = len(defaults)
        assert step(library, Part(kernel, [tensor], t, hyper[g * size : (g + 1) * size])).status == 0
    assert same(own, alone)


def test_many_groups_and_counts(library: Library) -> None:
    """More than the work has room for by itself: they are in the workspace."""
    kernel = library.kernel("adamw", "f64")
    own = tensors_of(kernel, [3] * 100, 13)
    alone = copy.deepcopy(own)
    defaults = list(library.ffi.unpack(kernel.hyper_defaults, kernel.hypers))
    hyper = [x * (1 - k / 1000) for k in range(50) for x in defaults]
    group, steps = np.arange(100) % 50, np.arange(100) // 3 + 1
    part = Part(kernel, own, 50, hyper, rows={"steps": steps, "group": group}, groups=50)
    assert step(library, part).status == 0
    for k, tensor in enumerate(alone):
        mine = hyper[(k % 50) * len(defaults) :][: len(defaults)]
        assert step(library, Part(kernel, [tensor], int(steps[k]), mine)).status == 0
    assert same(own, alone)


def test_nothing_to_do(library: Library) -> None:
    kernel = library.kernel("clipped", "f32")
    counted = np.zeros(1, np.uint64)
    for parts in ([], [Part(kernel, [])], [Part(kernel, []), Part(library.kernel("lamb", "f64"), [])]):
        outcome = step(library, *parts, stats=True, skip_nonfinite=1, applied=library.pointer(counted, "uint64_t *"))
        assert outcome.status == 0 and outcome.stats is not None
        assert {name: float(outcome.stats[name]) for name in STATS.names} == dict.fromkeys(STATS.names, 0.0)
    assert counted[0] == 3
    assert step(library, stats=True, skip_nonfinite=1, sizes=[5, 1025]).status == 0


# ---- parts of tensors over ranks


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("prefix", ["adamw", "lamb", "clipped", "hand", "late", "novograd"])
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_ranks(serial: Library, prefix: str, dtype: str, stats: bool) -> None:
    """Parts that end between leaves, on ranks that add up what is between share and fold, are as one whole."""
    kernel, library = serial.kernel(prefix, dtype), serial
    whole = tensors_of(kernel, (100_001, 33, 5000, 0, 2048), 14)
    sizes = [own[0].size for own in whole]
    pieces = copy.deepcopy(whole)
    single = step(library, Part(kernel, whole), stats=stats, skip_nonfinite=1)
    cuts = ((0, 0, 31_744, "a"), (0, 31_744, 100_001, "b"), (1, 0, 33, "c"), (2, 1024, 5000, "a"), (2, 0, 1024, "c"))
    cuts = (*cuts, (3, 0, 0, "a"), (4, 0, 2048, "b"))
    works, kept, results = [], [], []
    for rank in "abc":
        mine = [(number, begin, end) for number, begin, end, r in cuts if r == rank]
        tensors = [
            [
                x if x.size == 1 and k >= 2 and kernel.formats[k] == 3 else x[begin:end]
                for k, x in enumerate(pieces[number])
            ]
            for number, begin, end in mine
        ]
        # Scalar state is each rank's own copy.
        tensors = [[x.copy() if kernel.formats[k] == 3 else x for k, x in enumerate(own)] for own in tensors]
        rows = {"number": np.array([m[0] for m in mine]), "part": np.array([m[1] for m in mine])}
        lists, memory = lists_of(library, [Part(kernel, tensors, rows=rows)])
        all_sizes = np.array(sizes, np.uintp)
        o = library.options(skip_nonfinite=1, sizes=library.pointer(all_sizes, "size_t *"), tensors=len(sizes))
        total, each = np.full(1, 7, STATS), np.full(len(sizes), 7, STATS)
        if stats:
            o.stats, o.tensor_stats = (library.pointer(array, "optforge_stats *") for array in (total, each))
        size = library.calls.optforge_workspace_size(lists, 1, o)
        workspace = np.full(size // 8, np.nan)
        o.workspace, o.workspace_size = library.pointer(workspace), size
        work = library.ffi.new("optforge_work *")
        assert library.calls.optforge_begin(work, lists, 1, o) == 0
        works.append(work)
        results.append((total, each, tensors, mine))
        kept += [lists, memory, all_sizes, o, workspace]
    for phase in range(works[0].phases):
        sums = []
        for work in works:
            library.calls.optforge_share(work, phase, 1, 2)
            library.calls.optforge_share(work, phase, 0, 2)
            number = library.ffi.new("size_t *")
            found = library.calls.optforge_partials(work, phase, number)
            sums.append(
                np.frombuffer(library.ffi.buffer(found, number[0] * 8), np.float64) if number[0] else np.zeros(0)
            )
        everything = sums[0] + sums[1] + sums[2]
        statuses = set()
        for work, own in zip(works, sums, strict=True):
            own[:] = everything
            statuses.add(library.calls.optforge_fold(work, phase))
        assert statuses == {0}
    for total, each, tensors, mine in results:
        if stats:
            assert same(total[0], single.stats) and same(each, single.each)
        for own, (number, begin, end) in zip(tensors, mine, strict=True):
            for k, x in enumerate(own):
                assert same(x, whole[number][k] if kernel.formats[k] == 3 else whole[number][k][begin:end])


def test_parts_of_one_tensor_in_one_list_share_its_scalar_state(library: Library) -> None:
    """It advances once for each tensor, never for each part."""
    kernel = library.kernel("hand", "f64")
    whole = tensors_of(kernel, (5000, 33), 15)
    pieces = copy.deepcopy(whole)
    step(library, Part(kernel, whole))
    first, second = pieces
    tensors = [[*(x[:2048] for x in first[:3]), first[3]], [*(x[2048:] for x in first[:3]), first[3]], second]
    part = Part(kernel, tensors, rows={"number": np.array([0, 0, 1]), "part": np.array([0, 2048, 0])})
    assert step(library, part, sizes=[5000, 33]).status == 0
    assert same(pieces, whole)
