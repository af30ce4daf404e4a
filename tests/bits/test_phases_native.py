"""Phases, norms and counts of emitted C through ctypes: every compiler, flag, number of threads, and split of tensors."""

from __future__ import annotations

import ctypes
import math
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from amount import FULL
from conftest import COMPILERS, require
from data import Guarded, same
from native import Library, Stats, Work, code, compile_shared, instruction_sets
from oracles import _phase, _transforms, _tree, oracle
from phases import CHUNK, CHUNKS, KERNELS, LAMB, LEAF, SIZES, Arrays, Run, Told, run_of
from stepping import agree

CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
FLAGS: dict[str, tuple[str, ...]] = {"O0": ("-O0",), "O2": ("-O2",), "native": ("-O3", "-march=native")}
if platform.machine() == "x86_64":
    FLAGS |= {flag: ("-O3", f"-m{flag}") for flag in ("avx2", "avx512f") if flag in CPU.split()}
COMPILED = [
    (name, compiler, flags)
    for name, several in (("lamb", FLAGS), ("gathering", ("O0", "native")))
    for flags in several
    for compiler in COMPILERS
    if FULL or flags != {"gcc": "avx2", "clang": "avx512f"}[compiler]  # the other has it, and both have native
]


class Kernel(Library):
    """The functions of an emitted rule, over lists of tensors."""

    def __init__(self, path: Path, rule: of.Rule, prefix: str):
        scalars = [state.name for state in rule.kernel().state if state.scalar]
        super().__init__(path, prefix, list(rule.hyperparameters), list(rule.state), scalars)

    def workspace(self, sizes: Sequence[int]) -> Any:
        """As much workspace as the rule asks for, for tensors of these sizes, between guards."""
        elements = ctypes.c_uint64(int(np.sum(sizes, dtype=np.int64)))
        size = self.call("workspace_size", ctypes.c_size_t)(elements, ctypes.c_size_t(len(sizes)))
        guarded = Guarded([size // 8], np.float64)
        guarded.arrays[0][:] = np.nan  # what it holds does not matter
        return guarded

    def exact(self, lists: Any, options: Any, sizes: Sequence[int] | None = None) -> Any:
        """Exactly as much workspace as a step of these lists takes, between guards, and taken into the options."""
        size = self.runtime("workspace_size", ctypes.c_size_t)(lists, ctypes.c_size_t(1), ctypes.byref(options))
        if sizes is not None:
            assert size <= self.workspace(sizes).arrays[0].nbytes
        guarded = Guarded([size // 8], np.float64)
        guarded.arrays[0][:] = np.nan
        options.workspace, options.workspace_size = guarded.arrays[0].ctypes.data, size
        options.kept = guarded  # alive with the options
        return guarded

    def listed(self, t: int, arrays: Sequence[Arrays], hyper: Mapping[str, float] | None = None, **values: Any) -> Any:
        """A list of these tensors."""
        suffix = {4: "f32", 8: "f64"}[next((own["p"].itemsize for own in arrays), 4)]
        return self.lists(suffix, self.hyper(**hyper or {}), t, self.tensors(arrays), len(arrays), **values)

    def run(self, t: int, arrays: Sequence[Arrays], options: Any, **hyper: float) -> int:
        """A step with options; its status."""
        suffix = {4: "f32", 8: "f64"}[next((own["p"].itemsize for own in arrays), 4)]
        arguments = [ctypes.byref(self.hyper(**hyper)), ctypes.c_uint64(t), self.tensors(arrays)]
        arguments += [ctypes.c_size_t(len(arrays)), None if options is None else ctypes.byref(options)]
        return int(self.call(f"step_with_{suffix}")(*arguments))

    def begin(self, work: Any, lists: Any, options: Any) -> int:
        """Begin a step; the status."""
        arguments = [lists, ctypes.c_size_t(1), None if options is None else ctypes.byref(options)]
        return int(self.runtime("begin")(ctypes.byref(work), *arguments))

    def share(self, work: Any, phase: int, shares: int = 1) -> None:
        """All shares of a phase, the last one first."""
        function = self.runtime("share", None)
        for ith in reversed(range(shares)):
            function(ctypes.byref(work), ctypes.c_int(phase), ctypes.c_size_t(ith), ctypes.c_size_t(shares))

    def fold(self, work: Any, phase: int) -> int:
        """Behind a phase; the status."""
        return int(self.runtime("fold")(ctypes.byref(work), ctypes.c_int(phase)))

    def partials(self, work: Any, phase: int, workspace: Any) -> Any:
        """The sums of a phase, live."""
        number = ctypes.c_size_t(7)
        function = self.runtime("partials", ctypes.c_void_p)
        address = function(ctypes.byref(work), ctypes.c_int(phase), ctypes.byref(number))
        if address is None:
            assert number.value == 0
            return workspace[:0]
        first = (address - workspace.ctypes.data) // 8
        assert 0 <= first < first + number.value <= workspace.size
        return workspace[first : first + number.value]

    def text(self, status: int) -> str:
        """What a status means."""
        return str(self.call("strerror", ctypes.c_char_p)(status).decode())


def build(rule: of.Rule, directory: Path, compiler: str, flags: Sequence[str], dtypes: str | None = None) -> Kernel:
    return Kernel(compile_shared(rule.generate(prefix="k", dtypes=dtypes), directory, compiler, flags), rule, "k")


class Kernels:
    """Kernels by name, compiler and flags, which are compiled while tests are already running."""

    def __init__(self, pool: ThreadPoolExecutor, directory: Path):
        wanted = [(name, "gcc", "openmp") for name in KERNELS]
        wanted += COMPILED
        self.directory = directory
        self.made = {case: pool.submit(self.make, *case) for case in wanted if shutil.which(case[1])}

    def make(self, name: str, compiler: str, flags: str) -> Kernel:
        chosen = ("-O2", "-fopenmp") if flags == "openmp" else FLAGS[flags]
        dtypes = None if flags in ("openmp", "native") else "f32"
        return build(KERNELS[name], self.directory / f"{name}-{compiler}-{flags}", compiler, chosen, dtypes)

    def __getitem__(self, case: tuple[str, str, str]) -> Kernel:
        return self.made[case].result()


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernels]:
    pool = ThreadPoolExecutor(2)
    yield Kernels(pool, tmp_path_factory.mktemp("kernels"))
    pool.shutdown(cancel_futures=True)


def one_rank(kernel: Kernel, run: Run, **how: Any) -> None:
    """Both steps in one call each."""
    tensors, memory = run.arrays()
    whole, each = Stats(), (Stats * len(run.sizes))()
    for step in range(2):
        for tensor, g in zip(tensors, run.grads[step], strict=True):
            tensor["g"][:] = g
        options = kernel.options(grad_scale=2.5, stats=ctypes.addressof(whole), **how)
        options.tensor_stats = ctypes.addressof(each)
        workspace = kernel.exact(kernel.listed(step + 1, tensors), options, run.sizes)
        assert kernel.run(step + 1, tensors, options) == 0
        run.check(step, tensors)
        run.told(step, Told(whole, each))
        assert workspace.intact()
    assert all(own.intact() for own in memory.values())


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", KERNELS)
def test_threads_tell_the_same(name: str, dtype: Any, threads: int, kernels: Kernels) -> None:
    require("gcc")
    one_rank(kernels[name, "gcc", "openmp"], run_of(name, dtype), threads=threads, skip_nonfinite=threads % 2)


def test_the_reference_is_the_oracle() -> None:
    """What this file compares with is what oracles say: of LAMB behind a clipping."""
    run = run_of("lamb", np.float32)
    params, states = run.first, [{s: np.zeros_like(p) for s in ("m", "v")} for p in run.first]
    chain = [(_transforms.clip_by_global_norm, {"max_norm": 21.0})]
    for step, grads in enumerate(run.grads):
        made = _phase.phase(params, grads, states, step + 1, oracle("lamb"), chain, {}, grad_scale=2.5)
        params, states = made.params, made.states
        agree(run.expected[step][1], made.stats)
        run.check(step, [{"p": p, **state} for p, state in zip(params, states, strict=True)])


# ── parts on several ranks ──────────────────────────────────────────────────────────────────────────────────────────

# For each rank its parts: the tensor, and the range of its chunks.
LEAVES: dict[str, list[list[tuple[int, int, int]]]] = {
    "inside chunks": [
        [(0, 0, 1), (0, 40, 69), (4, 1, 2), (5, 0, 31), (6, 33, 95)],
        [(0, 1, 40), (1, 0, 1), (2, 0, 0), (3, 0, 32), (4, 0, 1), (5, 31, 33), (6, 0, 33), (6, 95, 96), (7, 0, 1)],
    ],
    "each leaf by itself": [
        [(k, i, i + 1) for k, n in enumerate(SIZES) for i in range(max(-(-n // LEAF), 1)) if (k + i) % 3 == rank]
        for rank in range(3)
    ],
}
PER_CHUNK = CHUNK // LEAF
SPLITS = LEAVES | {
    name: [[(k, first * PER_CHUNK, last * PER_CHUNK) for k, first, last in parts] for parts in ranks]
    for name, ranks in CHUNKS.items()
}


class Rank:
    """One rank: its own arrays of its parts, its own workspace."""

    def __init__(self, kernel: Kernel, run: Run, parts: Sequence[tuple[int, int, int]], **how: Any):
        self.kernel, self.run = kernel, run
        self.scalars = {s.name for s in run.rule.kernel().state if s.scalar}
        whole, _ = run.arrays()
        self.spans = [(k, first * LEAF, min(last * LEAF, run.sizes[k])) for k, first, last in parts]
        self.tensors = [
            {name: (array if name in self.scalars else array[begin:end]).copy() for name, array in whole[k].items()}
            for k, begin, end in self.spans
        ]
        self.suffix = "f32" if run.dtype is np.float32 else "f64"
        self.sizes = (ctypes.c_size_t * len(run.sizes))(*run.sizes)
        count = max(len(parts), 1)
        self.number = (ctypes.c_size_t * count)(*(k for k, _, _ in self.spans))
        self.part = (ctypes.c_size_t * count)(*(begin for _, begin, _ in self.spans))
        self.stats, self.each, self.work = Stats(), (Stats * len(run.sizes))(), Work()
        self.options = kernel.options(
            grad_scale=2.5,
            tensors=len(run.sizes),
            sizes=ctypes.addressof(self.sizes),
            stats=ctypes.addressof(self.stats),
            tensor_stats=ctypes.addressof(self.each),
            **how,
        )
        self.lists = self.listed(1)
        self.workspace = kernel.exact(self.lists, self.options)

    def listed(self, t: int) -> Any:
        own = {"number": ctypes.addressof(self.number), "part": ctypes.addressof(self.part)}
        table = self.kernel.tensors(self.tensors)
        return self.kernel.lists(self.suffix, self.kernel.hyper(), t, table, len(self.tensors), **own)

    def begin(self, t: int, grads: Sequence[Any]) -> int:
        self.workspace.arrays[0][:] = np.nan  # what it holds does not matter
        for tensor, (k, begin, end) in zip(self.tensors, self.spans, strict=True):
            tensor["g"][:] = grads[k][begin:end]
        self.lists = self.listed(t)
        return self.kernel.begin(self.work, self.lists, self.options)

    def partials(self, phase: int) -> Any:
        return self.kernel.partials(self.work, phase, self.workspace.arrays[0])


def step_of(ranks: Sequence[Rank], t: int, grads: Sequence[Any]) -> set[int]:
    """One step of all ranks, phase by phase, their sums added in between; what the last fold returned."""
    assert {rank.begin(t, grads) for rank in ranks} == {0}
    (phases,) = {rank.work.phases for rank in ranks}
    statuses: set[int] = set()
    for phase in range(phases):
        assert statuses <= {0}
        for shares, rank in enumerate(ranks, 1):
            rank.kernel.share(rank.work, phase, shares)
        everywhere = np.sum([rank.partials(phase) for rank in ranks], axis=0)
        for rank in ranks:
            rank.partials(phase)[:] = everywhere
        statuses = {rank.kernel.fold(rank.work, phase) for rank in ranks}
    return statuses


def together(ranks: Sequence[Rank], run: Run) -> list[dict[str, Any]]:
    """Whole tensors from the parts; scalar state, of which every rank has its own, must agree."""
    whole, _ = run.arrays()
    for rank in ranks:
        for tensor, (k, begin, end) in zip(rank.tensors, rank.spans, strict=True):
            for name, array in tensor.items():
                if name in rank.scalars:
                    seen = whole[k].setdefault(f"{name} seen", array)
                    assert same(seen, array)
                    whole[k][name][:] = array
                else:
                    whole[k][name][begin:end] = array
    return whole


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", KERNELS)
def test_ranks_have_the_bits_of_one(name: str, split: str, dtype: Any, kernels: Kernels) -> None:
    """Tensors split between leaves, the sums added as an all-reduce adds them."""
    require("gcc")
    kernel, run = kernels[name, "gcc", "openmp"], run_of(name, dtype)
    skip = int(split != "two")
    ranks = [Rank(kernel, run, parts, skip_nonfinite=skip) for parts in SPLITS[split]]
    for step in range(2):
        assert step_of(ranks, step + 1, run.grads[step]) == {0}
        run.check(step, together(ranks, run), split)
        for rank in ranks:
            run.told(step, Told(rank.stats, rank.each))
    assert all(rank.workspace.intact() for rank in ranks)


@pytest.mark.parametrize("name", KERNELS)
def test_one_rank_s_nan_skips_the_step_of_all(name: str, kernels: Kernels) -> None:
    require("gcc")
    kernel, run = kernels[name, "gcc", "openmp"], run_of(name, np.float32)
    ranks = [Rank(kernel, run, parts, skip_nonfinite=1, zero_grads=1) for parts in SPLITS["three"]]
    before = together(ranks, run)
    grads = [g.copy() for g in run.grads[0]]
    grads[0][70_000] = np.inf
    grads[6][-1] = np.nan
    assert step_of(ranks, 1, grads) == {-1}
    after = together(ranks, run)
    for k, tensor in enumerate(after):
        assert not tensor["g"].any()
        assert all(same(array, before[k][n]) for n, array in tensor.items() if n != "g")
    for rank in ranks:
        assert (rank.stats.skipped, rank.stats.nan, rank.stats.inf) == (1, 1, 1)
        assert [own.nan + own.inf for own in rank.each] == [1, 0, 0, 0, 0, 0, 1, 0]
    assert step_of(ranks, 1, run.grads[0]) == {0}
    for rank in ranks:
        assert not any(tensor["g"].any() for tensor in rank.tensors)
    for tensor in (behind := together(ranks, run)):
        tensor.pop("g")
    run.check(0, behind)


def test_parts_of_a_plain_step_end_anywhere(kernels: Kernels) -> None:
    """Where nothing is added up. Where something is, they are refused, and nothing is written."""
    require("gcc")
    kernel, rng = kernels["adam", "gcc", "openmp"], np.random.default_rng(6)
    whole = {name: rng.standard_normal(5001).astype("f4") * (name in "pg") for name in ("p", "g", "m", "v")}
    cuts, order = (0, 1, 999, 1024, 3333, 5001), (3, 0, 4, 2, 1)
    parts = [{name: array[cuts[k] : cuts[k + 1]].copy() for name, array in whole.items()} for k in order]
    sizes = (ctypes.c_size_t * 2)(7, 5001)  # the first is elsewhere
    number, part = (ctypes.c_size_t * 5)(*[1] * 5), (ctypes.c_size_t * 5)(*(cuts[k] for k in order))
    own = {"number": ctypes.addressof(number), "part": ctypes.addressof(part)}
    options = kernel.options(tensors=2, sizes=ctypes.addressof(sizes), threads=2)
    stats = Stats()
    for asked in ({"skip_nonfinite": 1}, {"stats": ctypes.addressof(stats)}):
        before = [{name: array.copy() for name, array in tensor.items()} for tensor in parts]
        other, lists = kernel.options(tensors=2, sizes=ctypes.addressof(sizes), **asked), kernel.listed(1, parts, **own)
        kernel.exact(lists, other)
        assert kernel.runtime("step_lists")(lists, ctypes.c_size_t(1), ctypes.byref(other)) == code("ERROR_PART")
        for tensor, old in zip(parts, before, strict=True):
            assert all(same(tensor[name], old[name]) for name in old)
    for t in (1, 2):
        lists = kernel.listed(t, parts, **own)
        assert kernel.runtime("step_lists")(lists, ctypes.c_size_t(1), ctypes.byref(options)) == 0
        assert kernel.run(t, [whole], kernel.options()) == 0
        for tensor, k in zip(parts, order, strict=True):
            assert all(same(tensor[name], whole[name][cuts[k] : cuts[k + 1]]) for name in whole)


def test_more_tensors_than_a_chunk_has_elements(kernels: Kernels) -> None:
    """Their sums are added up in chunks as well."""
    require("gcc")
    kernel, count = kernels["adam", "gcc", "openmp"], CHUNK + 1500
    arrays = {name: np.zeros(count) for name in ("p", "g", "m", "v")}
    arrays["g"][:] = np.random.default_rng(0).standard_normal(count)
    table = np.empty((count, 5), np.uintp)
    table[:, 0] = 1
    for k, own in enumerate(arrays.values(), 1):
        table[:, k] = own.ctypes.data + 8 * np.arange(count, dtype=np.uintp)
    workspace, stats = kernel.workspace([1] * count), Stats()
    options = kernel.options(workspace.arrays[0], stats=ctypes.addressof(stats))
    pointer = ctypes.c_void_p(table.ctypes.data)
    arguments = [ctypes.byref(kernel.hyper()), ctypes.c_uint64(1), pointer, ctypes.c_size_t(count)]
    assert kernel.call("step_with_f64")(*arguments, ctypes.byref(options)) == 0
    for name, norm_of in (("g", stats.grad_norm), ("p", stats.param_norm)):
        assert same(norm_of, math.sqrt(_tree.tree_sum(arrays[name] * arrays[name])))
    assert workspace.intact()


# ── statuses ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small(kernels: Kernels) -> tuple[Kernel, list[dict[str, Any]]]:
    """The kernel of clipped LAMB, and two tensors."""
    require("gcc")
    tensors = [{name: np.ones(n, np.float32) for name in ("p", "g", "m", "v")} for n in (CHUNK + 5, 3)]
    return kernels["lamb", "gcc", "openmp"], tensors


def unchanged(kernel: Kernel, tensors: list[dict[str, Any]], options: Any, **values: Any) -> str:
    """The text of a status of a step that changes nothing, over a list with these values; a check has the same."""
    before = [{name: array.copy() for name, array in tensor.items()} for tensor in tensors]
    lists = kernel.listed(1, tensors, **values)
    arguments = [lists, ctypes.c_size_t(1), None if options is None else ctypes.byref(options)]
    checked, status = (int(kernel.runtime(name)(*arguments)) for name in ("check", "step_lists"))
    assert checked == (0 if status == -1 else status)  # a check does not look at gradients
    if not values:
        assert kernel.run(1, tensors, options) == status
    for tensor, old in zip(tensors, before, strict=True):
        assert all(same(array, old[name]) for name, array in tensor.items())
    return kernel.text(status)


def room(kernel: Kernel, tensors: list[dict[str, Any]]) -> Any:
    """The workspace of a plain step, exactly."""
    return kernel.exact(kernel.listed(1, tensors), kernel.options()).arrays[0]


def test_statuses_of_options(small: Any) -> None:
    kernel, tensors = small
    workspace = room(kernel, tensors)
    for value in (0.0, -1.0, np.nan, np.inf, -np.inf, 1e-320):
        said = unchanged(kernel, tensors, kernel.options(workspace, grad_scale=value))
        assert said == "grad_scale is not a positive number with a finite inverse"
    assert unchanged(kernel, tensors, None) == "a pointer is NULL"
    assert unchanged(kernel, tensors, kernel.options()) == "a pointer is NULL"
    short = "the workspace is too small, or not aligned to doubles"
    assert unchanged(kernel, tensors, kernel.options(workspace, workspace_size=workspace.nbytes - 1)) == short
    for size in (0, kernel.options().size - 8, kernel.options().size + 8):
        said = unchanged(kernel, tensors, kernel.options(workspace, size=size))
        assert said == "the options are of another version: fill them in with optforge_options_init"
    askew = kernel.options(workspace)
    askew.workspace += 4
    assert unchanged(kernel, tensors, askew) == short
    tensors[0]["g"][CHUNK] = np.nan
    said = unchanged(kernel, tensors, kernel.options(workspace, skip_nonfinite=1))
    assert said == "a gradient is NaN or infinite, so nothing was changed, and t does not advance"
    assert kernel.run(1, tensors, kernel.options(workspace, skip_nonfinite=1)) == -1
    tensors[0]["g"][CHUNK] = 1.0
    assert kernel.run(1, tensors, kernel.options(workspace, skip_nonfinite=1)) == 0
    assert (tensors[0]["p"] != 1).all()


@pytest.mark.parametrize(
    ("size", "parts"),
    {
        "no such tensor": (CHUNK + 5, [(2, 0), (1, 0)]),
        "it begins inside a leaf": (CHUNK + 6, [(0, 1), (1, 0)]),
        "it begins inside another leaf": (2 * CHUNK + 5, [(0, CHUNK - 1), (1, 0)]),
        "it ends behind the tensor": (CHUNK + 5, [(0, CHUNK), (1, 0)]),
        "it ends a leaf behind the tensor": (CHUNK + 5, [(0, LEAF), (1, 0)]),
        "it begins behind the tensor": (CHUNK + 5, [(0, 0), (1, CHUNK)]),
        "it ends inside a leaf": (CHUNK + 6, [(0, 0), (1, 0)]),
    }.values(),
)
def test_statuses_of_parts(size: int, parts: Any, small: Any) -> None:
    kernel, tensors = small
    sizes = (ctypes.c_size_t * 2)(size, 3)
    number, part = ((ctypes.c_size_t * 2)(*column) for column in zip(*parts, strict=True))
    options = kernel.options(kernel.workspace([size, 3]).arrays[0], tensors=2, sizes=ctypes.addressof(sizes))
    own = {"number": ctypes.addressof(number), "part": ctypes.addressof(part)}
    said = unchanged(kernel, tensors, options, **own)
    if parts[0][0] == 2:
        assert said == "a tensor's number is none of the tensors, or two have the same"
    else:
        assert said == "a part is not in its tensor, or begins or ends inside a leaf of 1024 elements"


def test_statuses_of_parts_of_no_whole(small: Any) -> None:
    """Without sizes every tensor is whole, and has a number of its own."""
    kernel, tensors = small
    options = kernel.options(room(kernel, tensors))
    part, number = (ctypes.c_size_t * 2)(CHUNK, 0), (ctypes.c_size_t * 2)(1, 1)
    said = unchanged(kernel, tensors, options, part=ctypes.addressof(part))
    assert said == "a part is not in its tensor, or begins or ends inside a leaf of 1024 elements"
    for wrong in ((1, 1), (0, 2), (2**63, 0)):
        number[:] = wrong
        said = unchanged(kernel, tensors, options, number=ctypes.addressof(number))
        assert said == "a tensor's number is none of the tensors, or two have the same"


@pytest.mark.parametrize("zero_grads", [0, 1])
def test_phases_that_are_not_due(zero_grads: int, small: Any) -> None:
    """A share does nothing then, and a fold says so."""
    kernel, tensors = small
    options, lists = kernel.options(room(kernel, tensors), zero_grads=zero_grads), kernel.listed(1, tensors)
    before = [{name: array.copy() for name, array in tensor.items()} for tensor in tensors]
    work = Work()
    order = "optforge_begin was not called, or this phase is not the one that is due"

    def refused(phase: int) -> None:
        kernel.share(work, phase, 3)
        assert kernel.text(kernel.fold(work, phase)) == order, phase
        for tensor, old in zip(tensors, before, strict=True):
            assert all(same(array, old[name]) for name, array in tensor.items())

    refused(0)
    assert kernel.begin(work, lists, None) == code("ERROR_NULL")
    refused(0)
    assert kernel.begin(work, lists, options) == 0
    for phase in (-1, 1, 2, work.phases, work.phases + 9, 2**31 - 1, -(2**31)):
        refused(phase)
    copied = Work.from_buffer_copy(work)  # a step is under way where it began, and nowhere else
    kernel.share(copied, 0)
    assert kernel.text(kernel.fold(copied, 0)) == order
    for ith, nth in ((1, 1), (2, 1), (0, 0), (2**63, 5)):
        kernel.runtime("share", None)(ctypes.byref(work), 0, ctypes.c_size_t(ith), ctypes.c_size_t(nth))
    for phase in range(work.phases - 1):
        kernel.share(work, phase, 2)
        assert kernel.fold(work, phase) == 0
        assert kernel.text(kernel.fold(work, phase)) == order
    before = [{name: array.copy() for name, array in tensor.items()} for tensor in tensors]
    refused(work.phases)
    kernel.share(work, work.phases - 1)
    assert kernel.fold(work, work.phases - 1) == 0
    assert all((tensor["p"] != 1).all() for tensor in tensors)
    before = [{name: array.copy() for name, array in tensor.items()} for tensor in tensors]
    for phase in range(-1, work.phases + 2):
        refused(phase)


def test_a_step_that_is_applied_is_counted(small: Any) -> None:
    kernel, tensors = small
    count = np.full(1, 6, np.uint64)
    options = kernel.options(room(kernel, tensors), skip_nonfinite=1, applied=count.ctypes.data)
    assert kernel.run(0, tensors, options) > 0
    work, lists = Work(), kernel.listed(7, tensors)
    assert kernel.begin(work, lists, options) == 0
    for phase in range(work.phases):
        kernel.share(work, phase)
        assert phase == work.phases - 1 or kernel.fold(work, phase) == 0
    assert count[0] == 6
    tensors[1]["g"][0] = np.nan
    assert kernel.text(kernel.run(7, tensors, options)).startswith("a gradient is NaN")
    assert count[0] == 6
    tensors[1]["g"][0] = 1.0
    assert kernel.run(7, tensors, options) == 0
    assert count[0] == 7


def test_partials_outside_of_the_phases(small: Any, kernels: Kernels) -> None:
    kernel, tensors = small
    work, workspace, lists = Work(), room(kernel, tensors), kernel.listed(1, tensors)
    assert kernel.partials(work, 0, workspace).size == 0
    options = kernel.options(workspace)
    assert kernel.begin(work, lists, options) == 0
    assert work.phases == 3
    assert [kernel.partials(work, phase, workspace).size > 0 for phase in range(-1, work.phases + 2)] == [
        False,
        *([True] * work.phases),
        False,
        False,
    ]
    adam = kernels["adam", "gcc", "openmp"]
    options, lists = adam.options(), adam.listed(1, tensors)
    assert adam.begin(work, lists, options) == 0  # which adds up nothing
    assert [adam.partials(work, phase, workspace).size for phase in range(-1, work.phases + 1)] == [0, 0, 0]


def test_a_plain_step_takes_the_workspace_alone(small: Any) -> None:
    """`step` is `step_with` and the defaults; a check sees that the same arguments will do."""
    kernel, tensors = small
    own = [{name: array.copy() for name, array in tensor.items()} for tensor in tensors]
    workspace = kernel.workspace([CHUNK + 5, 3]).arrays[0]
    arguments = [ctypes.byref(kernel.hyper()), ctypes.c_uint64(1), kernel.tensors(own), ctypes.c_size_t(2)]
    lists, options = kernel.listed(1, own), kernel.options(workspace)
    assert kernel.runtime("check")(lists, ctypes.c_size_t(1), ctypes.byref(options)) == 0
    assert same(own[0]["p"], tensors[0]["p"])
    assert kernel.text(kernel.call("step_f32")(*arguments, None)) == "a pointer is NULL"
    assert kernel.call("step_f32")(*arguments, ctypes.c_void_p(workspace.ctypes.data)) == 0
    assert kernel.run(1, tensors, kernel.options(workspace)) == 0
    for a, b in zip(own, tensors, strict=True):
        assert all(same(a[name], b[name]) for name in ("p", "m", "v"))


def test_a_rule_without_reductions_needs_no_workspace(kernels: Kernels) -> None:
    require("gcc")
    kernel = kernels["adam", "gcc", "openmp"]
    tensors = [{name: np.zeros(40) for name in ("p", "g", "m", "v")}]
    tensors[0]["g"][:] = 1.0
    assert kernel.run(1, tensors, kernel.options(zero_grads=1)) == 0
    assert (tensors[0]["p"] < 0).all()
    assert not tensors[0]["g"].any()
    stats = Stats()
    assert unchanged(kernel, tensors, kernel.options(skip_nonfinite=1)) == "a pointer is NULL"
    assert unchanged(kernel, tensors, kernel.options(stats=ctypes.addressof(stats))) == "a pointer is NULL"


def test_the_first_step_begins_state(tmp_path: Path) -> None:
    """State that starts as the gradient is begun by a step that is told so, tensor by tensor."""

    @of.rule
    def begun(p, g, first="g", *, lr=1.0):
        p = p - lr * first
        return p, first

    kernel = build(of.clip_by_norm >> begun, tmp_path, require("gcc"), ("-O2",))
    tensors = [{"p": np.zeros(3), "g": np.full(3, 5.0), "first": np.full(3, 7.0)} for _ in range(2)]
    starting = np.array([1, 0], np.uint8)
    options = kernel.options(kernel.workspace([3, 3]).arrays[0])
    lists = kernel.listed(1, tensors, {"max_norm": 75.0**0.5 / 5}, starting=starting.ctypes.data)
    assert kernel.runtime("step_lists")(lists, ctypes.c_size_t(1), ctypes.byref(options)) == 0
    assert [np.round(tensor["first"], 12).tolist() for tensor in tensors] == [[1.0] * 3, [7.0] * 3]
    assert [np.round(tensor["p"], 12).tolist() for tensor in tensors] == [[-1.0] * 3, [-7.0] * 3]


@pytest.mark.parametrize(("name", "skip", "phases"), [("lamb", 0, 3), ("lamb", 1, 3), ("adam", 0, 1), ("adam", 1, 2)])
def test_phases_are_those_of_the_kernel(name: str, skip: int, phases: int, kernels: Kernels) -> None:
    """Clipped LAMB: the norm of all gradients, the moments with the norms of a tensor, the parameter.

    Where the first pass writes, a phase before it looks at the gradients of a step that may be skipped.
    """
    require("gcc")
    if name == "lamb":
        stores = [[stored for stored, _ in phase.stores] for phase in LAMB.kernel().phases]
        assert stores == [[], ["m", "v"], ["p"]]
    kernel, work = kernels[name, "gcc", "openmp"], Work()
    lists = kernel.listed(1, [{name: np.ones(3, np.float32) for name in ("p", "g", "m", "v")}])
    options = kernel.options(skip_nonfinite=skip)
    workspace = kernel.exact(lists, options)
    assert kernel.begin(work, lists, options) == 0
    assert (work.phases, work.due) == (phases, 0)
    assert workspace.intact()


# ── compilers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "compiler", "flags"), COMPILED)
def test_compilers_and_flags_tell_the_same(name: str, compiler: str, flags: str, kernels: Kernels) -> None:
    require(compiler)
    kernel = kernels[name, compiler, flags]
    for chosen in [own for own, there in instruction_sets().items() if there] or [None]:
        if chosen is not None:
            assert kernel.runtime("use")(chosen.encode()) == 0
        for dtype in (np.float32, np.float64) if flags == "native" else (np.float32,):
            one_rank(kernel, run_of(name, dtype), skip_nonfinite=flags != "O2")
