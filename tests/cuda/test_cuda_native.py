"""Emitted CUDA, unmodified, on an emulation: bits, boundaries, orders of threads and blocks, graphs, groups, ranks."""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from amount import FULL, some
from conftest import require
from cuda import Cuda, Memory, Options, Plan, Stats, agree, order
from data import same
from emulation import compile_emulated
from optforge import max_abs, scalar
from optforge.core import summation as tree
from optforge.core.formats import Wanted
from optimizing import SETTINGS, nadam
from oracles import names, oracle
from phases import CHUNKS, KERNELS, Run, Told, run_of
from stepping import spread

LEAF, CHUNK, TILE = 1024, 32768, 4096
SIZES = (0, 1, 3, 4, 5, 31, 32, 33, 1023, 1025, TILE - 1, TILE + 1, CHUNK - 1, CHUNK, CHUNK + 5, 2 * CHUNK + 1028)
FEW = (0, 1, 35, TILE + 1, 0, CHUNK + 1029, 3)
ORDERS = ("ascending", "descending", "random:1", "random:2")


@of.rule
def largest(p, g, seen: scalar = 0.0, *, lr=0.1):
    """Its only pass adds up what the state alone takes."""
    p = p - lr * g
    seen = max_abs(p)
    return p, seen


@of.rule
def running_out(p, g, left: scalar = 3.0, *, lr=0.1):
    """A scalar of the tensor that has no value at the fourth step."""
    p = p - lr / left * g
    left = left - 1
    return p, left


RULES: dict[str, of.Rule] = {**KERNELS, "nadam": nadam, "largest": largest, "running_out": running_out}


class Made:
    """Rules by name, each compiled when it is asked for."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.made: dict[str, Cuda] = {}

    def __getitem__(self, name: str) -> Cuda:
        if name not in self.made:
            self.made[name] = Cuda(RULES[name], self.directory / name)
        return self.made[name]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    require("g++")
    return Made(tmp_path_factory.mktemp("made"))


@pytest.fixture(autouse=True)
def usual_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders that a test has set end with it."""
    monkeypatch.setenv("OPTFORGE_EMULATION_THREADS", "ascending")
    monkeypatch.setenv("OPTFORGE_EMULATION_BLOCKS", "ascending")


class Steps:
    """A plan over arrays, whose steps are compared with those of the reference."""

    def __init__(self, cuda: Cuda, memory: Memory, grad_scale: float = 2.5, **how: Any):
        self.cuda, self.memory, self.how = cuda, memory, {"grad_scale": grad_scale, **how}
        self.hyper = memory.reference._rows()
        self.workspace = cuda.workspace(memory.sizes)
        status, self.plan = cuda.plan(memory.tensors, self.options(), memory.dtype)
        assert status == 0
        assert cuda.call("state_init", ctypes.byref(self.plan), cuda.hyper(*self.hyper), None) == 0
        self.told, self.each = Stats(), (Stats * max(len(memory.sizes), 1))()
        self.flags = np.ones(max(len(memory.sizes), 1), np.uint8)
        self.started = False

    def options(self, observe: bool = False) -> Options:
        options = self.cuda.options(self.workspace.arrays[0], **self.how)
        if observe:
            options.stats, options.tensor_stats = ctypes.addressof(self.told), ctypes.addressof(self.each)
        return options

    def gradients(self) -> list[Any]:
        return [spread(self.memory.rng, n, self.memory.dtype) for n in self.memory.sizes]

    def begin(self, grads: Sequence[Any]) -> None:
        """Put gradients into their place, and do the reference's step."""
        self.memory.begin(grads)
        copies = [g.copy() for g in grads]
        self.expected = self.memory.reference.step(copies, grad_scale=self.how["grad_scale"], stats=True)

    def check(self, where: str, observed: bool = False) -> None:
        """Compare with the reference."""
        self.memory.check(where)
        if observed:
            agree(self.told, self.each, self.expected, where)
        if self.how.get("zero_grads"):
            assert all(not tensor["g"].any() for tensor in self.memory.tensors), where
        assert self.workspace.intact()

    def step(self, grads: Sequence[Any], observe: bool = False, where: str = "") -> None:
        """One step, with everything checked."""
        t = self.memory.reference.t + 1
        options = self.options(observe)
        self.begin(grads)
        if not self.started:
            options.starting = self.flags.ctypes.data
        assert self.cuda.step(t, self.plan, options, *self.hyper) == 0
        control = self.cuda.control(self.plan)
        assert (control.t, control.skipped, control.status, control.idle, control.done) == (
            t,
            self.expected.skipped,
            0,
            0,
            0,
        )
        self.started = self.started or not self.expected.skipped
        self.check(f"step {t} {where}", observe)

    def rows(self, t: int, number: int, begins: bool) -> int:
        """Hand over the scalars of steps to come."""
        return self.cuda.rows(t, number, int(begins), self.plan, self.options(), *self.hyper)

    def launch(self, observe: bool = False) -> int:
        """One step, of which the device knows the number."""
        return int(self.cuda.call("launch", ctypes.byref(self.plan), ctypes.byref(self.options(observe)), None))


def steps(cuda: Cuda, memory: Memory, number: int = 3, **how: Any) -> None:
    """Steps without statistics and with them, in turn."""
    run = Steps(cuda, memory, **how)
    for t in range(1, number + 1):
        run.step(run.gradients(), observe=t % 2 == 0)


@pytest.mark.parametrize("name", some(names(), 3, lambda name: name == "adamw"))
def test_every_rule(name: str, tmp_path: Path) -> None:
    cuda = Cuda(of.rules[name], tmp_path)
    settings = oracle(name).SETTINGS[0]
    for dtype, aligned in ((np.float32, False), (np.float64, True)):
        order("random:7" if aligned else "descending", "descending" if aligned else "random:3")
        memory = Memory(cuda, dtype, SIZES, aligned, settings=settings, skip_nonfinite=aligned, zero_grads=aligned)
        steps(cuda, memory, skip_nonfinite=aligned, zero_grads=aligned)


# ── orders and boundaries ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name", some(["gathering", "lamb", "adam", "nadam"], 4, lambda name: name in ("gathering", "nadam"))
)
def test_the_order_of_threads_and_blocks_does_not_matter(name: str, made: Made) -> None:
    """With each order, steps with statistics and without, with skipping and zeroing and without, in both dtypes."""
    settings = SETTINGS if name == "nadam" else {}
    flags = itertools.cycle(itertools.product((False, True), (False, True)))
    for threads, blocks in zip(ORDERS, ("random:5", *reversed(ORDERS[:3])), strict=True):
        order(threads, blocks)
        for dtype, (skip, zero) in zip((np.float32, np.float64), flags, strict=False):
            how = {"skip_nonfinite": skip, "zero_grads": zero}
            steps(made[name], Memory(made[name], dtype, FEW, aligned=zero, settings=settings, **how), 2, **how)


def around(*boundaries: int) -> Iterator[int]:
    for boundary in boundaries:
        yield from range(boundary - 2, boundary + 3)


@pytest.mark.parametrize("name", ["lamb", "adam"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_boundaries(name: str, dtype: Any, made: Made) -> None:
    """Every size up to two rows of 32, and about every boundary, by an aligned and by an unaligned list."""
    sizes = (*range(67), *around(128, 1024, 1056, TILE), *((CHUNK - 1, CHUNK + 1) if name == "lamb" else ()))
    order("random:3", "random:4")
    for aligned in (True, False):
        steps(made[name], Memory(made[name], dtype, sizes, aligned), 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["lamb", "adam"])
def test_each_array_unaligned_alone(name: str, dtype: Any, made: Made) -> None:
    """One array that is not at a multiple of 16 bytes is enough to leave the vectors."""
    cuda = made[name]
    for other in ("p", "g", *cuda.state):
        memory = Memory(cuda, dtype, (5, 32, TILE + 9, 4), aligned=True)
        for tensor in memory.tensors:
            own = np.zeros(tensor[other].size + 32, dtype)
            start = -own.ctypes.data % 16 // own.itemsize + 1
            tensor[other] = own[start : start + tensor[other].size]
            assert not tensor[other].size or tensor[other].ctypes.data % 16
        for tensor, p in zip(memory.tensors, memory.reference.params, strict=True):
            tensor["p"][:] = p
        steps(cuda, memory, 2, zero_grads=True, skip_nonfinite=True)


def test_more_chunks_than_a_row_of_the_tree(made: Made) -> None:
    order("descending", "random:1")
    steps(made["lamb"], Memory(made["lamb"], np.float32, (33 * CHUNK + 7,), aligned=True), 2)


@pytest.mark.parametrize("name", ["gathering", "adam", "nadam"])
@pytest.mark.parametrize("sizes", [(0,), (0, 0, 0), (0, 7, 0)], ids=str)
def test_tensors_of_no_elements(name: str, sizes: tuple[int, ...], made: Made) -> None:
    """Their scalar state goes on."""
    memory = Memory(made[name], np.float32, sizes)
    steps(made[name], memory, 3, skip_nonfinite=True, zero_grads=True)


@pytest.mark.parametrize("name", ["gathering", "adam", "running_out"])
def test_an_empty_list(name: str, made: Made) -> None:
    cuda = made[name]
    workspace, stats = cuda.workspace([]), Stats(grad_norm=7.0)
    options = cuda.options(workspace.arrays[0], stats=ctypes.addressof(stats), skip_nonfinite=1, zero_grads=1)
    status, plan = cuda.plan([], options, np.float32)
    assert (status, cuda.call("state_init", ctypes.byref(plan), cuda.hyper(), None)) == (0, 0)
    for t in (1, 2):
        assert cuda.step(t, plan, options) == 0
        control = cuda.control(plan)
        assert (control.t, control.skipped, control.status, control.done) == (t, 0, 0, 0)
    assert bytes(stats) == bytes(Stats())
    assert workspace.intact()


def test_arrays_of_no_elements_may_be_null(made: Made) -> None:
    cuda = made["adam"]
    memory = Memory(cuda, np.float32, (0, 3))
    table = cuda.tensors(memory.tensors)
    for name in ("p", "g", "m", "v"):
        setattr(table[0], name, None)
    workspace = cuda.workspace(memory.sizes)
    options, plan = cuda.options(workspace.arrays[0]), Plan()
    assert cuda.call("plan_f32", ctypes.byref(plan), table, ctypes.c_size_t(2), ctypes.byref(options), None) == 0
    grads = [spread(memory.rng, n, np.float32) for n in memory.sizes]
    memory.begin(grads)
    assert cuda.call("state_init", ctypes.byref(plan), None, None) == 0
    assert cuda.step(1, plan, options) == 0
    memory.reference.step(grads)
    memory.check()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_state_begins_at_the_first_applied_step(dtype: Any, made: Made) -> None:
    """As p, as g, as a hyperparameter, as a number; scalar or not; and a skipped step does not begin it."""
    order("random:2", "descending")
    cuda = made["nadam"]
    memory = Memory(cuda, dtype, FEW, settings=SETTINGS, skip_nonfinite=True)
    run = Steps(cuda, memory, skip_nonfinite=True)
    before = [{name: array.copy() for name, array in tensor.items()} for tensor in memory.tensors]
    grads = run.gradients()
    grads[3][TILE] = np.inf
    run.begin(grads)
    options = run.options()
    options.starting = run.flags.ctypes.data
    assert run.expected.skipped and cuda.step(1, run.plan, options, *run.hyper) == 0
    for tensor, old in zip(memory.tensors, before, strict=True):
        assert all(same(array, old[name]) for name, array in tensor.items() if name != "g")
    for t in range(3):
        run.step(run.gradients(), observe=t == 1)


def test_state_begins_as_the_hyperparameter_of_its_group(made: Made) -> None:
    cuda, sizes, groups = made["nadam"], (5, 0, TILE + 3), np.array([2, 0, 1], np.uintp)
    memory = Memory(cuda, np.float32, sizes, settings=SETTINGS)
    workspace = cuda.workspace(sizes, groups=3)
    options = cuda.options(workspace.arrays[0], groups=3, group=groups.ctypes.data)
    status, plan = cuda.plan(memory.tensors, options)
    rows = cuda.hyper(*({"lr": 10.0**k, "floor": 2.0**-k} for k in range(3)))
    assert (status, cuda.call("state_init", ctypes.byref(plan), rows, None)) == (0, 0)
    for tensor, group in zip(memory.tensors, groups, strict=True):
        assert (tensor["scale"] == 2.0 ** -float(group)).all() and (tensor["m"] == 0).all()
        assert (tensor["rate"][0], tensor["mu"][0]) == (10.0**group, 1.0)
        assert same(tensor["slow"], tensor["p"])
    assert cuda.call("strerror", cuda.call("state_init", ctypes.byref(plan), None, None), result=ctypes.c_char_p) == (
        b"a pointer is NULL"
    )


def test_state_that_begins_as_a_number_begins_for_all_groups_at_once(made: Made) -> None:
    """Else it takes as many launches as there are groups: of which a tensor is, nobody asks."""
    cuda, sizes = made["adam"], (5, TILE + 3)
    memory, workspace = Memory(cuda, np.float32, sizes), cuda.workspace(sizes, groups=2)
    status, plan = cuda.plan(memory.tensors, cuda.options(workspace.arrays[0], groups=2))
    assert status == 0
    np.frombuffer((ctypes.c_uint64 * 2).from_address(plan.group), np.uint64)[:] = 2**40
    for tensor in memory.tensors:
        tensor["m"][:] = tensor["v"][:] = 7
    assert cuda.call("state_init", ctypes.byref(plan), None, None) == 0
    assert not any(tensor[name].any() for tensor in memory.tensors for name in ("m", "v"))


def test_a_scalar_without_value_leaves_everything_alone(made: Made) -> None:
    order("random:2", "random:3")
    cuda = made["running_out"]
    memory = Memory(cuda, np.float64, FEW)
    run = Steps(cuda, memory)
    for _ in range(3):
        run.step(run.gradients())
    memory.begin(run.gradients())
    for observe in (False, True):
        assert cuda.step(4, run.plan, run.options(observe), *run.hyper) == 0
        control = cuda.control(run.plan)
        assert cuda.call("strerror", control.status, result=ctypes.c_char_p).startswith(b"a scalar has no value")
        assert control.idle and control.t - control.skipped == 3
        memory.check()
    for tensor, left in zip(memory.tensors, memory.reference.state["left"], strict=True):
        assert left == 0
        tensor["left"][:] = 2.0
    memory.reference.load_state_dict({**memory.reference.state_dict()})
    run.rows(4, 1, begins=False)
    assert run.launch() == 0
    assert cuda.control(run.plan).idle == 0 and memory.tensors[1]["left"][0] == 1.0


# ── steps that are skipped, and graphs ──────────────────────────────────────────────────────────────────────────────

PLACES = [
    (1, 0),
    (2, 0),
    (2, 34),
    (3, 0),
    (3, TILE - 1),
    (3, TILE),
    (5, 31),
    (5, CHUNK - 1),
    (5, CHUNK),
    (5, -1),
    (6, 2),
]


@pytest.mark.parametrize("name", ["adam", "lamb", "gathering"])
def test_one_bad_gradient_anywhere_skips_the_step(name: str, made: Made) -> None:
    """The first step is skipped as well; t on the device counts what was applied."""
    cuda = made[name]
    how = {"skip_nonfinite": True, "zero_grads": True}
    memory = Memory(cuda, np.float32, FEW, **how)
    run = Steps(cuda, memory, **how)
    for number, (k, i) in enumerate(PLACES):
        order(ORDERS[number % 4], ORDERS[number // 2 % 4])
        grads = run.gradients()
        grads[k][i] = (np.nan, np.inf, -np.inf)[number % 3]
        if number % 4 == 3:
            grads[k][i - 1 if i else 0] = np.nan
        run.step(grads, observe=number % 2 == 0, where=f"{k, i}")
        assert run.expected.skipped
        if number % 5 == 4:
            run.step(run.gradients(), observe=number % 2 == 0)
            assert not run.expected.skipped
    assert memory.reference.t == 2


def test_without_skipping_nothing_is_skipped(made: Made) -> None:
    memory = Memory(made["adam"], np.float64, FEW)
    run = Steps(made["adam"], memory)
    grads = run.gradients()
    grads[3][TILE], grads[1][0] = np.nan, np.inf
    run.step(grads, observe=True)
    assert (run.told.nan, run.told.inf, run.told.skipped) == (1, 1, 0)


@pytest.mark.parametrize("name", ["lamb", "nadam"])
def test_launches_replayed_are_steps(name: str, made: Made) -> None:
    """What a CUDA graph does: rows handed over for several steps, then the same launch again and again."""
    cuda = made[name]
    memory = Memory(cuda, np.float32, FEW, settings=SETTINGS if name == "nadam" else {}, skip_nonfinite=True)
    run = Steps(cuda, memory, skip_nonfinite=True)
    run.step(run.gradients())  # state has begun
    assert run.rows(2, 5, begins=True) == 0
    order("random:9", "random:8")
    applied, t = 0, 1
    for launch in range(7):
        grads = run.gradients()
        if launch in (1, 3):
            grads[3][launch] = np.nan
        run.begin(grads)
        assert run.launch(observe=launch % 2 == 0) == 0
        applied += launch not in (1, 3)
        control = cuda.control(run.plan)
        assert (control.t - control.skipped, control.idle, control.status) == (1 + applied, 0, 0)
        run.check(f"launch {launch}", observed=launch % 2 == 0)
    # All five rows are used. The next step is not done, however often it is asked for.
    given = run.gradients()
    memory.begin(given)
    for observe, run.how["zero_grads"] in itertools.product((True, False), (1, 0)):
        assert run.launch(observe) == 0
        control = cuda.control(run.plan)
        said = cuda.call("strerror", control.status, result=ctypes.c_char_p)
        assert said == b"the device came to a step whose scalars it was not given"
        assert control.idle and control.t - control.skipped == 6
        memory.check("without rows")
        assert all(same(tensor["g"], g) for tensor, g in zip(memory.tensors, given, strict=True))
    # It goes on where it was.
    assert run.rows(7, 64, begins=False) == 0
    for launch in range(2):
        run.begin(run.gradients())
        assert run.launch() == 0
        run.check(f"launch {launch} of more rows")
    assert cuda.control(run.plan).t == memory.reference.t == 8
    # Rows that begin behind the next step are not its own either.
    assert run.rows(10, 3, begins=False) == 0
    memory.begin(run.gradients())
    assert run.launch() == 0
    assert cuda.control(run.plan).idle
    memory.check("rows of later steps")
    assert run.rows(9, 2, begins=False) == 0
    run.begin(run.gradients())
    assert run.launch() == 0
    run.check("rows of this step")


def test_time_can_be_set(made: Made) -> None:
    cuda = made["adam"]
    memory = Memory(cuda, np.float64, (40,))
    run = Steps(cuda, memory)
    for t in (10**6, 3, 2**53):
        memory.reference.t = t - 1
        run.step(run.gradients())


def test_a_number_that_was_set_holds_until_a_step(made: Made) -> None:
    """Also where rows come in between that let the device count on, as of another rate or loss scale."""
    memory = Memory(made["adam"], np.float32, (40,))
    run = Steps(made["adam"], memory)
    memory.reference.t = 10
    run.started = True
    assert (run.rows(11, 2, begins=True), run.rows(11, 3, begins=False)) == (0, 0)
    for launch in range(2):
        run.begin(run.gradients())
        assert run.launch() == 0
        run.check(f"launch {launch}")
    assert run.cuda.control(run.plan).t == memory.reference.t == 12


# ── groups, dtypes, ranks ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_groups_have_their_own_hyperparameters(dtype: Any, made: Made) -> None:
    """Also the threshold of the clipping, whose norm is over all groups; more groups than scalars go in one copy."""
    cuda, rng = made["lamb"], np.random.default_rng(3)
    sizes, groups = [5, TILE + 3, 0, 33, 700, *[3] * 15], [0, 0, 1, 1, 2, *range(3, 18)]
    rows = [{"lr": 0.01 * (k + 1), "max_norm": 0.5 + k, "weight_decay": 0.1 / (k + 1)} for k in range(18)]
    tensors = [
        {"p": rng.standard_normal(n).astype(dtype), **{name: np.zeros(n, dtype) for name in ("g", "m", "v")}}
        for n in sizes
    ]
    params = [tensor["p"].copy() for tensor in tensors]

    def grouped(arrays: Sequence[Any]) -> list[list[Any]]:
        return [[x for x, group in zip(arrays, groups, strict=True) if group == k] for k in range(18)]

    reference = of.Optimizer(
        [{"params": own, **row} for own, row in zip(grouped(params), rows, strict=True)], RULES["lamb"], target="numpy"
    )
    # The numbers of groups on the device are others: tensors need not be in their order.
    numbers = [(7 * k + 3) % 18 for k in range(18)]
    given = [rows[numbers.index(k)] for k in range(18)]
    workspace = cuda.workspace(sizes, groups=18)
    table, stats = np.array([numbers[group] for group in groups], np.uintp), Stats()
    options = cuda.options(workspace.arrays[0], groups=18, group=table.ctypes.data)
    status, plan = cuda.plan(tensors, options)
    assert status == 0
    table[:] = 99  # it may be freed now
    order("random:3", "random:3")
    for t in range(1, 7):
        grads = [spread(rng, n, dtype) for n in sizes]
        for tensor, g in zip(tensors, grads, strict=True):
            tensor["g"][:] = g
        options.stats = ctypes.addressof(stats) if t % 2 == 0 else None
        if t <= 3:
            assert cuda.step(t, plan, options, *given) == 0
        else:
            if t == 4:  # several steps ahead, of every group
                assert cuda.rows(4, 3, 1, plan, None, *given) == 0
            assert cuda.call("launch", ctypes.byref(plan), ctypes.byref(options), None) == 0
        told = reference.step(grouped(grads), stats=True)
        assert all(same(tensor["p"], p) for tensor, p in zip(tensors, params, strict=True)), t
        for name in ("grad_norm", "clipped_grad_norm", "update_norm") if t % 2 == 0 else ():
            assert same(getattr(stats, name), float(told[name])), name
    assert workspace.intact()


def test_tensors_that_began_later_have_counts_of_their_own(made: Made) -> None:
    """Two groups of the same hyperparameters, one of which has had three steps fewer."""
    cuda, rng = made["adam"], np.random.default_rng(4)
    sizes, behind = (5, TILE + 3, 33), (0, 3, 3)
    tensors = [{name: np.zeros(n, np.float32) for name in ("p", "g", "m", "v")} for n in sizes]
    references = []
    for tensor, late in zip(tensors, behind, strict=True):
        tensor["p"][:] = rng.standard_normal(tensor["p"].size)
        references.append(of.Optimizer([tensor["p"].copy()], RULES["adam"], target="numpy"))
        references[-1].t = 3 - late
    workspace = cuda.workspace(sizes, groups=2)
    group, late = np.array([0, 1, 1], np.uintp), np.array([0, 3], np.uint64)
    options = cuda.options(workspace.arrays[0], groups=2, group=group.ctypes.data, late=late.ctypes.data)
    status, plan = cuda.plan(tensors, options)
    assert status == 0
    assert cuda.rows(5, 2, 0, plan, options, {}, {}) == 0  # in the place of which step brings its own
    for t in (4, 5, 6):
        for tensor, reference in zip(tensors, references, strict=True):
            tensor["g"][:] = spread(rng, tensor["g"].size, np.float32)
            reference.step([tensor["g"].copy()])
        if t == 5:
            assert cuda.rows(5, 2, 0, plan, options, {}, {}) == 0
        done = cuda.step(t, plan, options, {}, {}) if t == 4 else cuda.call("launch", ctypes.byref(plan), None, None)
        assert done == 0
        for tensor, reference in zip(tensors, references, strict=True):
            assert same(tensor["p"], reference.params[0]), t
            assert same(tensor["m"], reference.state["m"][0]) and same(tensor["v"], reference.state["v"][0])


def test_other_gradients_are_a_column(made: Made) -> None:
    """Of which one is not aligned to vectors; nothing else of the plan is made again."""
    cuda = made["adam"]
    memory = Memory(cuda, np.float32, FEW, aligned=True, zero_grads=True)
    run = Steps(cuda, memory, zero_grads=True)
    run.step(run.gradients())
    for t in range(2):
        others = [np.zeros(n + 1 + t, np.float32)[1 + t :] for n in FEW]
        addresses = (ctypes.c_void_p * len(FEW))(*(own.ctypes.data for own in others))
        assert cuda.call("gradients", ctypes.byref(run.plan), addresses, None) == 0
        for tensor, own in zip(memory.tensors, others, strict=True):
            tensor["g"] = own
        run.step(run.gradients(), observe=t == 1)


@pytest.mark.parametrize("name", ["lamb", "nadam"] if FULL else ["nadam"])
def test_a_pair_that_stands_alone_has_the_same_bits(name: str, tmp_path: Path) -> None:
    """Two of them in one program, each with a runtime of its own, beside one that has the common one."""
    files: dict[str, str] = {}
    for prefix in ("k", "other"):
        rule = RULES[name]
        files |= rule.emit("cuda", Wanted("f32"), prefix, {}, True)
    assert sorted(files) == ["k.cu", "k.cuh", "other.cu", "other.cuh"]
    files |= RULES["adam"].generate("cuda", "f32", prefix="third")
    cuda = Cuda(RULES[name], tmp_path / "shared", dtypes="f32")
    cuda.loaded = ctypes.CDLL(str(compile_emulated(files, tmp_path / "alone", ["-O0"])))
    steps(cuda, Memory(cuda, np.float32, FEW, settings=SETTINGS if name == "nadam" else {}), 2)


class Rank:
    """One rank, or the tensors of one dtype: arrays of its own parts, with a workspace of its own."""

    def __init__(
        self,
        cuda: Cuda,
        tensors: Sequence[Mapping[str, Any]],
        sizes: Sequence[int],
        parts: Sequence[tuple[int, int]],
        dtype: Any,
        beside: Rank | None = None,
        **how: Any,
    ):
        self.cuda, self.tensors = cuda, tensors
        self.workspace = cuda.workspace(sizes, count=max(len(sizes), len(parts)))
        self.sizes = (ctypes.c_size_t * max(len(sizes), 1))(*sizes)
        self.number, self.part = (np.array([own[k] for own in parts] or [0], np.uintp) for k in (0, 1))
        self.stats, self.each = Stats(), (Stats * max(len(sizes), 1))()
        self.options = cuda.options(
            self.workspace.arrays[0],
            grad_scale=2.5,
            tensors=len(sizes),
            sizes=ctypes.addressof(self.sizes),
            number=self.number.ctypes.data,
            part=self.part.ctypes.data,
            stats=ctypes.addressof(self.stats),
            tensor_stats=ctypes.addressof(self.each),
            **how,
        )
        if beside is not None:
            self.options.beside = ctypes.addressof(beside.plan)
        status, self.plan = cuda.plan(tensors, self.options, dtype)
        assert status == 0

    def rows(self, t: int) -> None:
        assert self.cuda.rows(t, 1, 1, self.plan, self.options) == 0

    def phase(self, k: int) -> int:
        where, options = ctypes.byref(self.plan), ctypes.byref(self.options)
        return int(self.cuda.call("phases", where, options, k, k + 1, None))

    def partials(self, phase: int) -> Any:
        """The sums of a phase, live."""
        number = ctypes.c_size_t()
        where = ctypes.byref(self.plan)
        address = self.cuda.call("partials", where, phase, ctypes.byref(number), result=ctypes.c_void_p)
        if number.value == 0:
            return np.zeros(0)
        workspace = self.workspace.arrays[0]
        first = (address - workspace.ctypes.data) // 8
        assert 0 <= first <= first + number.value <= workspace.size
        return workspace[first : first + number.value]


class OfRun(Rank):
    """One rank of a run of the reference."""

    def __init__(self, cuda: Cuda, run: Run, parts: Sequence[tuple[int, int, int]], **how: Any):
        whole, _ = run.arrays()
        self.spans = [(k, first * CHUNK, min(last * CHUNK, run.sizes[k])) for k, first, last in parts]
        tensors = [
            {name: (array if name in cuda.scalars else array[begin:end]).copy() for name, array in whole[k].items()}
            for k, begin, end in self.spans
        ]
        super().__init__(cuda, tensors, run.sizes, [(k, begin) for k, begin, _ in self.spans], run.dtype, **how)

    def begin(self, grads: Sequence[Any], t: int) -> None:
        for phase in range(self.cuda.phases - 1):
            self.partials(phase)[:] = 0
        for tensor, (k, begin, end) in zip(self.tensors, self.spans, strict=True):
            tensor["g"][:] = grads[k][begin:end]
        self.rows(t)


def step_of(ranks: Sequence[OfRun], grads: Sequence[Any], t: int) -> None:
    """One step of all ranks, phase by phase, their sums added in between as an all-reduce adds them."""
    for rank in ranks:
        rank.begin(grads, t)
    for phase in range(ranks[0].cuda.phases):
        assert {rank.phase(phase) for rank in ranks} == {0}
        if phase < ranks[0].cuda.phases - 1:
            everywhere = np.sum([rank.partials(phase) for rank in ranks], axis=0)
            for rank in ranks:
                rank.partials(phase)[:] = everywhere


def together(ranks: Sequence[OfRun], run: Run) -> list[dict[str, Any]]:
    """Whole tensors from the parts; scalar state, of which every rank has its own, must agree."""
    whole, _ = run.arrays()
    for rank in ranks:
        for tensor, (k, begin, end) in zip(rank.tensors, rank.spans, strict=True):
            for name, array in tensor.items():
                if name in rank.cuda.scalars:
                    seen = whole[k].setdefault(f"{name} seen", array)
                    assert same(seen, array)
                    whole[k][name][:] = array
                else:
                    whole[k][name][begin:end] = array
    return whole


@pytest.mark.parametrize("split", CHUNKS)
@pytest.mark.parametrize("name", KERNELS)
def test_ranks_have_the_bits_of_one(name: str, split: str, made: Made) -> None:
    number = list(CHUNKS).index(split)
    dtype = (np.float32, np.float64)[(number + list(KERNELS).index(name)) % 2]
    run = run_of(name, dtype)
    order(ORDERS[number], ORDERS[3 - number])
    skip = int(split != "two")
    ranks = [OfRun(made[name], run, parts, skip_nonfinite=skip) for parts in CHUNKS[split]]
    for step in range(2):
        step_of(ranks, run.grads[step], step + 1)
        run.check(step, together(ranks, run), split)
        for rank in ranks:
            run.told(step, Told(rank.stats, rank.each))
    assert all(rank.workspace.intact() for rank in ranks)


def test_one_rank_s_nan_skips_the_step_of_all(made: Made) -> None:
    run = run_of("gathering", np.float32)
    ranks = [OfRun(made["gathering"], run, parts, skip_nonfinite=1, zero_grads=1) for parts in CHUNKS["three"]]
    before = together(ranks, run)
    grads = [g.copy() for g in run.grads[0]]
    grads[0][70_000], grads[6][-1] = np.inf, np.nan
    step_of(ranks, grads, 1)
    for k, tensor in enumerate(together(ranks, run)):
        assert not tensor["g"].any()
        assert all(same(array, before[k][n]) for n, array in tensor.items() if n in ("p", "m", "seen"))
    for rank in ranks:
        assert rank.cuda.control(rank.plan).skipped == 1
        assert (rank.stats.skipped, rank.stats.nan, rank.stats.inf) == (1, 1, 1)
        assert [own.nan + own.inf for own in rank.each] == [1, 0, 0, 0, 0, 0, 1, 0]
    step_of(ranks, run.grads[0], 1)
    after = together(ranks, run)
    for tensor in after:
        assert not tensor.pop("g").any()
    run.check(0, after)


@pytest.mark.parametrize("name", ["lamb", "gathering"])
def test_two_dtypes_in_one_step(name: str, made: Made) -> None:
    """A plan beside another shares its sums, so that global norms are over both."""
    cuda, rng = made[name], np.random.default_rng(5)
    sizes = (5, CHUNK + 3, 700, 0, TILE + 1, 33)
    dtypes = [(np.float32, np.float64)[k % 2] for k in range(len(sizes))]
    tensors = []
    for n, dtype in zip(sizes, dtypes, strict=True):
        arrays = {other: np.zeros(1 if other in cuda.scalars else n, dtype) for other in ("g", *cuda.state)}
        arrays |= {other: np.zeros(1) for other in cuda.scalars}
        tensors.append({"p": rng.standard_normal(n).astype(dtype), **arrays})
    how = {"skip_nonfinite": True}
    reference = of.Optimizer([t["p"].copy() for t in tensors], RULES[name], target="numpy", **how)
    first = Rank(cuda, tensors[::2], sizes, [(k, 0) for k in (0, 2, 4)], np.float32, **how)
    second = Rank(cuda, tensors[1::2], sizes, [(k, 0) for k in (1, 3, 5)], np.float64, first, **how)
    order("random:3", "descending")
    for step in range(4):
        grads = [spread(rng, n, dtype) for n, dtype in zip(sizes, dtypes, strict=True)]
        if step == 1:
            grads[1][CHUNK + 2] = np.nan
        for tensor, g in zip(tensors, grads, strict=True):
            tensor["g"][:] = g
        first.rows(reference.t + 1)
        for phase in range(cuda.phases):
            assert (first.phase(phase), second.phase(phase)) == (0, 0)
        expected = reference.step([g.copy() for g in grads], grad_scale=2.5, stats=True)
        assert expected.skipped == (step == 1)
        for rank in (first, second):
            agree(rank.stats, rank.each, expected, f"step {step}")
            assert rank.workspace.intact()
        for k, tensor in enumerate(tensors):
            assert same(tensor["p"], reference.params[k]), (step, k)
            for state in cuda.state:
                own = reference.state[state][k]
                assert same(tensor[state], np.array([own]) if state in cuda.scalars else own), (step, k, state)


# ── totals of many, and large indices ───────────────────────────────────────────────────────────────────────────────


class Reserved:
    """Addresses of so many bytes of zeros, of which only the pages that are written take memory."""

    def __init__(self, size: int):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python's module may not have
        try:
            self.pages = mmap.mmap(-1, size, flags)
        except (OSError, ValueError):
            pytest.skip(f"this machine does not reserve {size >> 30} GiB of addresses")
        self.array = np.frombuffer(self.pages, np.uint8)


def array_at(address: int, *shape: int) -> Any:
    """Doubles of the device."""
    return np.frombuffer((ctypes.c_double * math.prod(shape)).from_address(address)).reshape(shape)


class Last:
    """The last phase alone of a step over float64, behind sums of the phase before, which a test writes."""

    def __init__(self, cuda: Cuda, tensors: Any, count: int, options: Options):
        self.cuda, self.plan, self.options = cuda, Plan(), options
        where = ctypes.byref(self.plan)
        assert cuda.call("plan_f64", where, tensors, ctypes.c_size_t(count), ctypes.byref(options), None) == 0
        number = ctypes.c_size_t()
        address = cuda.call("partials", where, cuda.phases - 2, ctypes.byref(number), result=ctypes.c_void_p)
        self.names = slots_of(cuda)
        own = number.value // self.plan.leaves if self.plan.leaves else len(self.names)
        self.first = (address - self.plan.sums) // (8 * max(self.plan.leaves, 1))
        self.own = self.names[self.first : self.first + own]

    def of(self, column: str, width: int) -> dict[str, Any]:
        """One of the plan's columns, of the sums of the phase by name."""
        rows = array_at(getattr(self.plan, column), len(self.names), width)
        return dict(zip(self.own, rows[self.first :], strict=False))

    def arrived(self) -> Any:
        """How many chunks of each tensor, and how many tensors, each sum of the phase has seen."""
        size = len(self.names) * (self.plan.tensors + 1)
        counts = np.frombuffer((ctypes.c_uint32 * size).from_address(self.plan.arrived), np.uint32)
        return counts.reshape(len(self.names), -1)[self.first : self.first + len(self.own)]

    def do(self) -> None:
        """Do it."""
        last = self.cuda.phases - 1
        where = ctypes.byref(self.plan)
        assert self.cuda.call("phases", where, ctypes.byref(self.options), last, last + 1, None) == 0


def slots_of(cuda: Cuda) -> list[str]:
    """The names of what is added up, in the order of the emitted enum."""
    text = cuda.rule.generate("cuda", prefix="k")["k.cu"]
    return re.findall(r"^    k_cuda_SUM_(\w+),$", text, re.M)


def values(rng: Any, shape: Any) -> Any:
    """Sums of very different sizes, none negative."""
    return rng.standard_normal(shape) ** 2 * rng.choice([1e-9, 1.0, 1e9], shape)


@pytest.mark.parametrize("leaves", [1, 31, 32, 33, 1023, 1025, 32 * 255, 32 * 257 + 1])
def test_totals_of_many_leaves(leaves: int, made: Made) -> None:
    """Of the squares and of the largest, whatever the order in which chunks come."""
    cuda, rng = made["largest"], np.random.default_rng(leaves)
    size, base, state = leaves * LEAF - 5, 1 << 44, np.zeros(1)  # nothing is read there
    tensors = (cuda.Tensor * 1)(cuda.Tensor(size, base, base + 8 * size, state.ctypes.data))
    workspace, stats = cuda.workspace([size]), Stats()
    options = cuda.options(workspace.arrays[0], stats=ctypes.addressof(stats))
    last = Last(cuda, tensors, 1, options)
    for threads, blocks in zip(ORDERS, reversed(ORDERS), strict=True):
        order(threads, blocks)
        sums = last.of("sums", leaves)
        padded = np.zeros((len(sums), -(-leaves // 32), 32))
        for row, own in zip(padded, sums.values(), strict=True):
            own[:] = values(rng, leaves)
            row.reshape(-1)[:leaves] = own
        kept = dict(zip(sums, padded, strict=True))
        last.do()
        most = next(name for name in kept if "squares" not in name)
        squares = tree.total(tree.fold(kept["param_squares"], np.add), "sum")
        assert same(stats.param_norm, math.sqrt(squares))
        assert same(state[0], tree.total(tree.fold(kept[most], np.maximum), "max"))
        assert not last.arrived().any() and cuda.control(last.plan).done == 0
        assert workspace.intact()


@pytest.mark.parametrize("chunks", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 4464, 33 * CHUNK + 7])
def test_totals_of_many_chunks(chunks: int, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those of the last block have been added up already; the list has no element of the tensor."""
    cuda, rng, state = made["largest"], np.random.default_rng(chunks), np.zeros(1)
    order("random:1", "descending")
    size = ctypes.c_size_t(chunks * CHUNK)
    tensors = (cuda.Tensor * 1)(cuda.Tensor(0, None, None, state.ctypes.data))
    room = Reserved(1 << 33)
    stats, number, part = Stats(), ctypes.c_size_t(0), ctypes.c_size_t(size.value)
    address = room.array.ctypes.data
    options = cuda.options(workspace_size=1 << 33, stats=ctypes.addressof(stats))
    options.workspace, options.tensors, options.sizes = address, 1, ctypes.addressof(size)
    options.number, options.part = ctypes.addressof(number), ctypes.addressof(part)
    last = Last(cuda, tensors, 1, options)
    assert (last.plan.units, last.plan.chunks, last.plan.leaves) == (0, chunks, 32 * chunks)
    behind = chunks - 1 - (chunks - 1) % 8  # of which the last block has those
    sums, of_chunks, kept = last.of("sums", 32 * chunks), last.of("chunk_sums", chunks), {}
    for name, own in of_chunks.items():
        kept[name] = own[:] = values(rng, chunks)
        kept[name] = own.copy()
        sums[name][32 * behind :: 32] = own[behind:]
        own[behind:] = np.nan
    last.arrived()[:, 0] = behind
    monkeypatch.setenv("OPTFORGE_EMULATION_ONLY_LAST", "1")
    for own in range(len(last.own)):
        last.arrived()[own, 1] = 0
    cuda.control(last.plan).done = len(last.own) - 1  # the last block is that of the last sum
    for name in last.own[:-1]:
        last.of("tensor_sums", 1)[name][:] = 1.0
    last.do()
    name = last.own[-1]
    total = tree.total(kept[name], "max" if "squares" not in name else "sum")
    assert same(last.of("tensor_sums", 1)[name][0], total) and same(last.of("totals", 1)[name][0], total)


def test_totals_of_many_tensors(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than a node of the tree has values; all but those of the last block have been added up already."""
    cuda, rng, count = made["largest"], np.random.default_rng(1), 40_000
    state = np.zeros(count)
    table = np.zeros((count, 4), np.uintp)
    table[:, 0] = np.arange(count) % 3 * 10_000
    table[:, 1], table[:, 2] = 1 << 44, 1 << 45  # nothing is read there
    table[:, 3] = state.ctypes.data + 8 * np.arange(count, dtype=np.uintp)
    sizes = [int(n) for n in table[:, 0]]
    workspace, stats = cuda.workspace(sizes), Stats()
    options = cuda.options(workspace.arrays[0], stats=ctypes.addressof(stats))
    last = Last(cuda, ctypes.c_void_p(table.ctypes.data), count, options)
    plan = last.plan
    leaves, chunks = ([max(-(-n // size), least) for n in sizes] for size, least in ((LEAF, 0), (CHUNK, 1)))
    for name, own in (("first", leaves), ("before", leaves), ("before_chunk", chunks)):
        found = np.frombuffer((ctypes.c_uint64 * (count + 1)).from_address(getattr(plan, name)), np.uint64)
        assert np.array_equal(found, np.cumsum([0, *own])), name
    for name, own in (("unit", leaves), ("chunk", chunks)):
        found = np.frombuffer((ctypes.c_uint32 * (2 * sum(own))).from_address(getattr(plan, name)), np.uint32)
        expected = [(k, leaf) for k, number in enumerate(own) for leaf in range(number)]
        assert np.array_equal(found.reshape(-1, 2), expected), name
    assert (plan.units, plan.leaves, plan.chunks) == (sum(leaves), sum(leaves), sum(chunks))
    sums, of_tensors = last.of("sums", plan.leaves), last.of("tensor_sums", count)
    behind, kept = count - 8, {}
    for name, own in of_tensors.items():
        kept[name] = values(rng, count)
        kept[name][behind:] *= np.array(leaves[behind:]) > 0
        own[:behind], own[behind:] = kept[name][:behind], np.nan
        starts = np.cumsum([0, *leaves])
        for k in range(behind, count):
            sums[name][starts[k] : starts[k + 1]] = 0
            sums[name][starts[k] : starts[k + 1]][:1] = kept[name][k]
    last.arrived()[:, -1] = behind
    cuda.control(plan).done = len(last.own) - 1
    monkeypatch.setenv("OPTFORGE_EMULATION_ONLY_LAST", "1")
    last.do()
    name = last.own[-1]
    assert same(last.of("tensor_sums", count)[name], kept[name])
    assert same(last.of("totals", 1)[name][0], tree.total(kept[name], "max" if "squares" not in name else "sum"))
    assert not last.arrived()[-1].any() and cuda.control(plan).done == 0
    assert workspace.intact()


BEYOND = [(name, aligned) for name in ("largest", "adam") for aligned in (True, False)]


@pytest.mark.parametrize(("name", "aligned"), BEYOND if FULL else BEYOND[1:3])
def test_elements_beyond_32_bits(name: str, aligned: bool, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last blocks of a tensor of 2^32 elements and some, and of one behind it: what a 32-bit index would miss.

    Elements that are not done are 0, and so is what they add.
    """
    cuda, rng = made[name], np.random.default_rng(2)
    sizes, tail = ((1 << (33 if FULL else 32)) + CHUNK + 4 * TILE + 9, CHUNK + 1), TILE + 100
    arrays = [other for other in ("p", "g", *cuda.state) if other not in cuda.scalars]
    reserved = [Reserved(4 * sizes[0] + 16) for _ in arrays]
    tensors = [
        {
            other: np.frombuffer(own.array, np.float32, sizes[0], 0 if aligned else 4)
            for other, own in zip(arrays, reserved, strict=True)
        },
        {other: np.zeros(sizes[1], np.float32) for other in arrays},
    ]
    for tensor in tensors:
        tensor.update({other: np.zeros(1) for other in cuda.scalars})
        tensor["p"][-tail:] = rng.standard_normal(tail)
    workspace, stats = cuda.workspace(sizes), Stats()
    options = cuda.options(workspace.arrays[0], zero_grads=1, stats=ctypes.addressof(stats))
    status, plan = cuda.plan(tensors, options)
    assert status == 0
    slots = len(slots_of(cuda))
    for column, number in (("sums", plan.leaves), ("chunk_sums", plan.chunks), ("tensor_sums", 2)):
        ctypes.memset(getattr(plan, column), 0, 8 * slots * number)
    reference = of.Optimizer([tensor["p"][-tail:].copy() for tensor in tensors], RULES[name], target="numpy")
    for t in (1, 2):
        grads = [spread(rng, tail, np.float32) for _ in tensors]
        for tensor, g in zip(tensors, grads, strict=True):
            tensor["g"][-tail:] = g
        options.stats = ctypes.addressof(stats) if t == 1 else None
        assert cuda.rows(t, 1, 1, plan, options) == 0
        where, last = ctypes.byref(plan), cuda.phases - 1
        monkeypatch.setenv("OPTFORGE_EMULATION_ONLY_LAST", "14")
        assert cuda.call("phases", where, ctypes.byref(options), 0, last, None) == 0
        if t == 2:  # the sums of all leaves are added up, of which nearly all are 0
            monkeypatch.delenv("OPTFORGE_EMULATION_ONLY_LAST")
        assert cuda.call("phases", where, ctypes.byref(options), last, last + 1, None) == 0
        ctypes.memset(plan.arrived, 0, 4 * slots * 3)
        reference.step(grads)
        for k, tensor in enumerate(tensors):
            for other in arrays:
                assert not tensor[other][: 4 * TILE].any() and not tensor[other][-tail - 4 * TILE : -tail].any()
            assert not tensor["g"][-tail:].any()
            assert same(tensor["p"][-tail:], reference.params[k])
            for state in cuda.state:
                own = reference.state[state][k]
                own, found = (np.array([own]), tensor[state]) if state in cuda.scalars else (own, tensor[state][-tail:])
                assert same(found, own) or (state in cuda.scalars and t == 1), (t, k, state)
    assert workspace.intact()
