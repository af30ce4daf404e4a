"""Wrong calls of the runtime: one status each, with a text, and not a byte written before it."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest

import optforge as of
from amount import FULL
from conftest import require
from embedding import SOURCES, Library, Part, emitted, linked, lists_of, run, same, shared, tensors_of, write

TEXTS = {
    "NULL": "a pointer is NULL",
    "SIZE": "a tensor has more elements than memory can hold",
    "ALIGNMENT": "an array is not aligned to its elements",
    "OVERLAP": "two arrays of a tensor overlap",
    "TIME": "t counts the steps from 1",
    "NAN": "a hyperparameter is NaN",
    "SCALAR": "a scalar has no value: division by zero, overflow, root of a negative number",
    "GRAD_SCALE": "grad_scale is not a positive number with a finite inverse",
    "WORKSPACE": "the workspace is too small, or not aligned to doubles",
    "PART": "a part is not in its tensor, or begins or ends inside a leaf of 1024 elements",
    "GROUP": "a tensor's group is none of the groups",
    "NUMBER": "a tensor's number is none of the tensors, or two have the same",
    "ABI": "a kernel is of another version of optforge, or asks for more than the runtime has",
    "OPTIONS": "the options are of another version: fill them in with optforge_options_init",
    "ISA": "OPTFORGE_ISA, or the argument of optforge_use, is no instruction set of this machine",
    "FLUSH": "this program flushes subnormal numbers to zero, which changes the results",
    "ORDER": "optforge_begin was not called, or this phase is not the one that is due",
    "SELFTEST": "this build computes other bits than it should: compile without flags that change arithmetic",
    "MEMORY": "there is no memory for the state, or for the workspace",
    "THREADS": "options.threads is negative",
    "DELTA": "delta is for parameters that are float or double",
    "ASSERT": "the hyperparameters break an assert of the rule",
}
RULES = {
    "clipped": of.transforms.clip_by_global_norm(max_norm=0.5) >> of.rules.adamw,
    "sgd": of.rules.sgd,
}
SIZES = (2049, 33, 5000)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    require("gcc")
    path = shared(tmp_path_factory.mktemp("library"), emitted("split", RULES), [SOURCES / "hand.c"])
    names = ", ".join(f"{prefix}_kernel_{dtype}" for prefix in [*RULES, "hand"] for dtype in ("f32", "f64"))
    own = "const char *clipped_strerror(int status);"
    return Library(path, f"extern optforge_kernel {names}; {own}")


class Call:
    """A valid call with statistics and everything, which a test spoils in one place."""

    def __init__(self, library: Library, prefix: str = "clipped", dtype: str = "f32", plain: bool = False):
        self.library, self.ffi = library, library.ffi
        self.kernel = self.ffi.new("optforge_kernel *", library.kernel(prefix, dtype)[0])
        self.tensors = tensors_of(self.kernel, SIZES, 1)
        rows = {
            "group": np.zeros(3),
            "steps": np.array([2, 1, 2]),
            "number": np.array([2, 0, 1]),
            "part": np.zeros(3),
            "starting": np.zeros(3),
        }
        self.lists, kept = lists_of(library, [Part(self.kernel, self.tensors, 2, rows={} if plain else rows, groups=1)])
        (self.table, self.hyper), self.rows = kept[:2], dict(zip(rows, kept[2:], strict=False))
        self.number = 1
        self.counted = np.zeros(1, np.uint64)
        self.stats = np.full(4 * 8, 7.0)
        self.options = library.options(applied=library.pointer(self.counted, "uint64_t *"), grad_scale=2.0)
        if not plain:
            self.options.skip_nonfinite = self.options.zero_grads = 1
            self.options.stats = library.pointer(self.stats, "optforge_stats *")
            self.options.tensor_stats = library.pointer(self.stats[8:], "optforge_stats *")
        self.size = library.calls.optforge_workspace_size(self.lists, 1, self.options)
        self.workspace = np.zeros(self.size // 8 + 2)
        self.options.workspace = library.pointer(self.workspace)
        self.options.workspace_size = self.size
        self.sizes: np.ndarray | None = None

    def whole(self, *sizes: int) -> None:
        """Say how large the whole tensors are, by their numbers."""
        self.sizes = np.array(sizes, np.uintp)
        self.options.sizes, self.options.tensors = self.library.pointer(self.sizes, "size_t *"), len(sizes)
        size = self.library.calls.optforge_workspace_size(self.lists, self.number, self.options)
        self.workspace = np.zeros(min(size // 8 + 2, 1 << 20))
        self.options.workspace, self.options.workspace_size = self.library.pointer(self.workspace), size

    def step(self) -> int:
        return int(self.library.calls.optforge_step_lists(self.lists, self.number, self.options))

    def fails(self, name: str) -> None:
        """The step, the check and begin give this error, and write nothing but to the workspace."""
        calls = self.library.calls
        before = copy.deepcopy((self.tensors, self.counted, self.stats))
        status = getattr(calls, f"OPTFORGE_ERROR_{name}")
        assert self.step() == status, self.library.text(self.step())
        assert self.library.text(status) == TEXTS[name]
        assert calls.optforge_check(self.lists, self.number, self.options) == status
        work = self.ffi.new("optforge_work *")
        assert calls.optforge_begin(work, self.lists, self.number, self.options) == status
        calls.optforge_share(work, 0, 0, 1)
        assert calls.optforge_fold(work, 0) == calls.OPTFORGE_ERROR_ORDER
        assert same((self.tensors, self.counted, self.stats), before)


@pytest.fixture
def call(library: Library) -> Call:
    return Call(library)


def test_it_is_valid_otherwise(library: Library) -> None:
    for prefix in (*RULES, "hand"):
        for dtype in ("f32", "f64"):
            for plain in (False, True):
                assert Call(library, prefix, dtype, plain).step() == 0


def test_every_status_has_a_text(library: Library) -> None:
    calls = library.calls
    for name, text in TEXTS.items():
        assert library.text(getattr(calls, f"OPTFORGE_ERROR_{name}")) == text
    assert library.text(0) == "done"
    assert library.text(-1) == "a gradient is NaN or infinite, so nothing was changed, and t does not advance"
    for status in (-2, -(2**31), 22, 99):
        assert library.text(status) == "unknown status"
    assert library.text(2**31 - 1) == TEXTS["ASSERT"]
    own = library.ffi.string(calls.clipped_strerror(100)).decode()
    assert own.startswith("the hyperparameters break: ") and own != TEXTS["ASSERT"]
    assert library.ffi.string(calls.clipped_strerror(5)).decode() == TEXTS["TIME"]
    assert library.ffi.string(calls.clipped_strerror(199)).decode() == "unknown status"


# ---- pointers that are NULL


@pytest.mark.parametrize("threads", [-1, -(2**31)])
def test_a_negative_number_of_threads(call: Call, threads: int) -> None:
    call.options.threads = threads
    call.fails("THREADS")


@pytest.mark.parametrize("name", ["kernel", "hyper", "tensors"])
def test_a_list_without(call: Call, name: str) -> None:
    setattr(call.lists[0], name, call.ffi.NULL)
    call.fails("NULL")


@pytest.mark.parametrize("array", range(5))
@pytest.mark.parametrize("tensor", range(3))
def test_a_tensor_without(library: Library, tensor: int, array: int) -> None:
    call = Call(library, "hand", "f64")
    if array < 4:
        call.table[tensor, 1 + array] = 0
        call.fails("NULL")


def test_an_empty_tensor_has_no_arrays_but_scalar_state(library: Library) -> None:
    call = Call(library, "hand", "f64")
    call.table[1, :4] = 0
    assert call.step() == 0
    call.table[1, 4] = 0
    call.fails("NULL")


def test_no_lists(call: Call) -> None:
    assert call.library.calls.optforge_step_lists(call.ffi.NULL, 1, call.options) == 1
    assert call.library.calls.optforge_step_lists(call.ffi.NULL, 0, call.options) == 0


def test_no_options_no_work_no_name(call: Call) -> None:
    calls, null = call.library.calls, call.ffi.NULL
    number, work = call.ffi.new("size_t *"), call.ffi.new("optforge_work *")
    for status in (
        calls.optforge_step_lists(call.lists, 1, null),
        calls.optforge_check(call.lists, 1, null),
        calls.optforge_begin(work, call.lists, 1, null),
        calls.optforge_begin(null, call.lists, 1, call.options),
        calls.optforge_step(null, null, 1, null, 0, call.options),
        calls.optforge_fold(null, 0),
        calls.optforge_use(null),
    ):
        assert status == 1
    calls.optforge_share(null, 0, 0, 1)
    assert calls.optforge_partials(null, 0, number) == null and number[0] == 0
    assert calls.optforge_partials(work, 0, null) == null
    assert calls.optforge_workspace_size(null, 1, call.options) == 0
    assert calls.optforge_workspace_size(call.lists, 1, null) == 0
    assert calls.optforge_kernel_workspace(null, 1, 1) == 0
    call.lists[0].tensors = null
    assert calls.optforge_workspace_size(call.lists, 1, call.options) == 0
    call.lists[0].kernel = null
    assert calls.optforge_workspace_size(call.lists, 1, call.options) == 0


def test_no_workspace(call: Call) -> None:
    call.options.workspace = call.ffi.NULL
    call.fails("NULL")


# ---- kernels and options of other versions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("abi", value) for value in (0, 2, 2**32 - 1)),
        *(("arrays", value) for value in (0, 1, 2**40)),
        *(("pass_count", value) for value in (0, 17, 2**32 - 1)),
        *(("scalars_size", value) for value in (4097, 2**64 - 1, 2**64 - 7)),
        *((name, None) for name in ("passes", "formats", "begin")),
    ],
)
def test_a_kernel_that_the_runtime_cannot_run(call: Call, name: str, value: int | None) -> None:
    setattr(call.kernel, name, call.ffi.NULL if value is None else value)
    call.fails("ABI")


@pytest.mark.parametrize(
    ("name", "value"),
    [("slot", 32), ("slot", 255), ("kind", 3), ("source", -27), ("source", -128), ("source", 4), ("source", 127)],
)
def test_a_sum_that_the_runtime_cannot_add_up(call: Call, name: str, value: int) -> None:
    passes = call.ffi.new("optforge_pass[]", [call.kernel.passes[0], call.kernel.passes[1]])
    sums = call.ffi.new("optforge_sum[]", [passes[0].sums[0]])
    setattr(sums[0], name, value)
    passes[0].sums, call.kernel.passes = sums, passes
    call.fails("ABI")


def test_a_pass_with_too_many_sums(call: Call) -> None:
    passes = call.ffi.new("optforge_pass[]", [call.kernel.passes[0], call.kernel.passes[1]])
    sums = call.ffi.new("optforge_sum[]", [passes[0].sums[0]] * 33)
    passes[0].sums, passes[0].sum_count, call.kernel.passes = sums, 33, passes
    call.fails("ABI")


@pytest.mark.parametrize(
    "values", [(3, 1, 1, 1), (0, 1, 1, 1), (1, 2, 1, 1), (1, 1, 9, 1), (7, 7, 7, 7), (1, 1, 6, 1), (2, 4, 2, 2)]
)
def test_formats_that_the_runtime_has_not(call: Call, values: tuple[int, ...]) -> None:
    formats = call.ffi.new("unsigned char[]", list(values))
    call.kernel.formats = formats
    call.fails("ABI")


@pytest.mark.parametrize("size", [0, 8, 80, 2**64 - 1])
def test_options_of_another_size(call: Call, size: int) -> None:
    call.options.size = size
    call.fails("OPTIONS")


def test_options_that_were_never_filled_in(call: Call) -> None:
    call.options = call.ffi.new("optforge_options *")
    call.fails("OPTIONS")


# ---- arrays


@pytest.mark.parametrize("by", [1, 2, 3])
@pytest.mark.parametrize("array", range(4))
def test_an_array_that_is_not_aligned(call: Call, array: int, by: int) -> None:
    call.table[1, 1 + array] += by
    call.fails("ALIGNMENT")


@pytest.mark.parametrize("by", [1, 2, 4, 7])
@pytest.mark.parametrize("array", range(4))
def test_an_array_of_doubles_that_is_not_aligned(library: Library, array: int, by: int) -> None:
    call = Call(library, "hand", "f64")
    call.table[2, 1 + array] += by
    call.fails("ALIGNMENT")


@pytest.mark.parametrize("by", [-2048, -1, 0, 1, 2048])
@pytest.mark.parametrize("pair", [(0, 1), (0, 3), (1, 2), (2, 3)])
def test_arrays_that_overlap(library: Library, pair: tuple[int, int], by: int) -> None:
    for a, b in (pair, pair[::-1]):
        call = Call(library)
        call.table[0, 1 + a] = int(call.table[0, 1 + b]) + by * 4
        call.fails("OVERLAP")


def test_scalar_state_in_an_array(library: Library) -> None:
    call = Call(library, "hand", "f64")
    for array in range(3):
        call.table[0, 4] = int(call.table[0, 1 + array]) + 8 * 2048
        call.fails("OVERLAP")


def test_arrays_that_touch_do_not_overlap(library: Library) -> None:
    call = Call(library, "sgd", "f64", plain=True)
    both = np.ones(2 * 2049)
    call.table[0, 1:] = both.ctypes.data + 8 * 2049, both.ctypes.data
    assert call.step() == 0


@pytest.mark.parametrize("size", [2**61, 2**62 - 1, 2**62, 2**63, 2**64 - 1024, 2**64 - 1])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_more_elements_than_memory_holds(library: Library, dtype: str, plain: bool, size: int) -> None:
    call = Call(library, "sgd", dtype, plain)
    call.table[1, 0] = size
    call.options.workspace_size = 2**64 - 8
    call.fails("SIZE")


@pytest.mark.parametrize("size", [2**61 - 10_000, 2**60, 2**52])
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_as_many_elements_as_memory_holds_overlap(library: Library, dtype: str, size: int) -> None:
    call = Call(library, "sgd", dtype, plain=True)
    call.table[1, 0] = size
    call.fails("OVERLAP")


def test_whole_tensors_whose_sizes_overflow(call: Call) -> None:
    """2^64 leaves in all would be none."""
    call.whole(*[2**64 - 1] * 1024)
    call.options.workspace_size = 2**64 - 8
    call.lists[0].count = 0
    call.fails("SIZE")


# ---- numbers of steps, hyperparameters, scales


def test_step_0(library: Library) -> None:
    call = Call(library, plain=True)
    call.lists[0].t = 0
    call.fails("TIME")


@pytest.mark.parametrize("tensor", range(3))
def test_a_count_of_steps_that_is_0(call: Call, tensor: int) -> None:
    call.rows["steps"][tensor] = 0
    call.fails("TIME")


@pytest.mark.parametrize("place", range(6))
def test_a_hyperparameter_that_is_nan(call: Call, place: int) -> None:
    call.hyper[place] = math.nan
    call.fails("NAN")


def test_asserts(library: Library) -> None:
    for place, value, status in ((0, -1.0, 100), (1, 1.0, 101), (1, -0.5, 101)):
        call = Call(library, "hand")
        call.hyper[place] = value
        before = copy.deepcopy(call.tensors)
        assert call.step() == status and library.text(status) == TEXTS["ASSERT"]
        assert same(call.tensors, before)


def test_a_scalar_without_a_value(library: Library) -> None:
    """Of any tensor, the last one too."""
    call = Call(library, "hand", "f64")
    call.tensors[2][3][0] = -1.0
    call.fails("SCALAR")


@pytest.mark.parametrize("scale", [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, 5e-324, 1e-310])
def test_a_grad_scale(call: Call, scale: float) -> None:
    call.options.grad_scale = scale
    call.fails("GRAD_SCALE")


@pytest.mark.parametrize("scale", [1.7e308, 2.3e-308, 5.7e-309])
def test_a_grad_scale_whose_inverse_is_finite(call: Call, scale: float) -> None:
    call.options.grad_scale = scale
    call.options.skip_nonfinite = 0
    assert call.step() == 0


# ---- workspaces


@pytest.mark.parametrize("prefix", ["clipped", "hand", "sgd"])
def test_a_workspace_that_is_a_byte_short(library: Library, prefix: str) -> None:
    call = Call(library, prefix)
    for size in (call.size - 1, call.size - 8, 1, 0):
        call.options.workspace_size = size
        call.fails("WORKSPACE")


@pytest.mark.parametrize("by", range(1, 8))
def test_a_workspace_that_is_not_aligned(call: Call, by: int) -> None:
    call.options.workspace = call.ffi.cast("void *", call.workspace.ctypes.data + by)
    call.fails("WORKSPACE")


# ---- groups, numbers, parts


@pytest.mark.parametrize("group", [1, 2, 2**64 - 1])
def test_a_group_that_is_not_there(call: Call, group: int) -> None:
    call.rows["group"][1] = group
    call.fails("GROUP")


@pytest.mark.parametrize("number", [3, 4, 2**64 - 1])
def test_a_number_out_of_range(call: Call, number: int) -> None:
    call.rows["number"][1] = number
    call.fails("NUMBER")


def test_a_number_twice(call: Call) -> None:
    call.rows["number"][1] = 2
    call.fails("NUMBER")


def test_numbers_of_two_lists(library: Library) -> None:
    """They are without those that the lists give themselves: 0 is there twice."""
    call = Call(library)
    lists = library.ffi.new("optforge_list[2]", [call.lists[0], call.lists[0]])
    lists[1].number = library.ffi.NULL
    call.lists, call.number, call.options.tensor_stats = lists, 2, library.ffi.NULL
    call.size = library.calls.optforge_workspace_size(lists, 2, call.options)
    call.workspace = np.zeros(call.size // 8)
    call.options.workspace, call.options.workspace_size = library.pointer(call.workspace), call.size
    assert call.step() == 0
    call.rows["number"][0] = 3
    call.fails("NUMBER")


@pytest.mark.parametrize(
    ("part", "whole"),
    [
        (0, 2048),  # of 2049 elements
        (1024, 3072),
        (1, 2050),
        (1023, 5000),
        (512, 2561),
        (1024, 5000),  # ends inside a leaf
        (2**64 - 1024, 5000),
        (2**64 - 1, 2**64 - 1),
    ],
)
def test_a_part(call: Call, part: int, whole: int) -> None:
    call.rows["part"][0] = part
    call.whole(33, 5000, min(whole, 10**6) if whole < 2**63 else 10**6)
    call.fails("PART")


def test_a_part_without_whole_tensors(call: Call) -> None:
    call.rows["part"][2] = 1024
    call.fails("PART")


def test_a_part_that_ends_with_its_tensor(call: Call) -> None:
    call.rows["part"][0] = 1024
    call.whole(33, 5000, 3073)
    assert call.step() == 0


def test_parts_need_not_end_between_leaves_where_nothing_is_added_up(library: Library) -> None:
    call = Call(library, "sgd", "f32")
    call.options.stats = call.options.tensor_stats = library.ffi.NULL
    call.rows["part"][0] = 7
    call.options.skip_nonfinite = 0
    call.whole(33, 5000, 10_000)
    assert call.step() == 0
    call.options.skip_nonfinite = 1
    call.whole(33, 5000, 10_000)
    call.fails("PART")


# ---- the order of begin, share and fold


def test_what_is_called_before_begin(call: Call) -> None:
    calls, work = call.library.calls, call.ffi.new("optforge_work *")
    before = copy.deepcopy(call.tensors)
    calls.optforge_share(work, 0, 0, 1)
    assert calls.optforge_fold(work, 0) == calls.OPTFORGE_ERROR_ORDER
    number = call.ffi.new("size_t *", 5)
    assert calls.optforge_partials(work, 0, number) == call.ffi.NULL and number[0] == 0
    assert same(call.tensors, before)


def test_phases_in_another_order(call: Call) -> None:
    calls, work = call.library.calls, call.ffi.new("optforge_work *")
    error = calls.OPTFORGE_ERROR_ORDER
    assert calls.optforge_begin(work, call.lists, 1, call.options) == 0 and work.phases == 2
    before = copy.deepcopy(call.tensors)
    for phase in (1, 2, -1, 2**31 - 1, -(2**31)):
        calls.optforge_share(work, phase, 0, 1)
        assert calls.optforge_fold(work, phase) == error
    for ith, nth in ((1, 1), (5, 3), (0, 0)):
        calls.optforge_share(work, 0, ith, nth)
    moved = call.ffi.new("optforge_work *", work[0])
    calls.optforge_share(moved, 0, 0, 1)
    assert calls.optforge_fold(moved, 0) == error
    assert same(call.tensors, before)
    calls.optforge_share(work, 0, 0, 1)
    assert calls.optforge_fold(work, 0) == 0
    assert calls.optforge_fold(work, 0) == error
    assert same(call.tensors, before)
    calls.optforge_share(work, 1, 0, 1)
    assert calls.optforge_fold(work, 1) == 0 and call.counted[0] == 1
    after = copy.deepcopy(call.tensors)
    assert not same(after, before)
    for phase in (0, 1, 2):
        calls.optforge_share(work, phase, 0, 1)
        assert calls.optforge_fold(work, phase) == error
    assert same(call.tensors, after) and call.counted[0] == 1


# ---- instruction sets


def test_an_instruction_set_that_is_not_there(library: Library) -> None:
    calls, ffi = library.calls, library.ffi
    before = ffi.string(calls.optforge_isa())
    for name in (b"", b"avx2", b"x86-64-v5", b"x86-64-v3 ", b"X86-64"):
        assert calls.optforge_use(name) == calls.OPTFORGE_ERROR_ISA
    assert ffi.string(calls.optforge_isa()) == before
    assert calls.optforge_use(before) == 0


ISA = """
#include "optforge.h"
#include <stdio.h>
int main(void)
{
    optforge_options o;
    optforge_options_init(&o);
    printf("%d [%s]", optforge_step_lists(NULL, 0, &o), optforge_isa());
    printf(" %d", optforge_use("unknown"));
#if defined(__x86_64__)
    printf(" %d", optforge_use("x86-64"));
#else
    printf(" %d", optforge_use(OPTFORGE_SETS_0));
#endif
    printf(" %d\\n", optforge_step_lists(NULL, 0, &o));
    return 0;
}
"""


def test_a_variable_that_names_no_instruction_set(tmp_path: Path) -> None:
    """It is the status of the first step and of those behind it, until another is used."""
    require("gcc")
    write(tmp_path, {**emitted("split", {"sgd": of.rules.sgd}), "main.c": ISA})
    linked(tmp_path, ["main.c", "optforge.c"], "program")
    for name in ("unknown", "x86-64-v5", "avx2", " "):
        assert run([tmp_path / "program"], tmp_path, {"OPTFORGE_ISA": name}) == "15 [] 15 0 0\n"
    assert run([tmp_path / "program"], tmp_path, {"OPTFORGE_ISA": "x86-64"}) == "0 [x86-64] 15 0 0\n"
    assert run([tmp_path / "program"], tmp_path, {"OPTFORGE_ISA": ""}).startswith("0 [x86-64")


# ---- at random


@pytest.mark.parametrize("sanitized", [False, pytest.param(True, marks=pytest.mark.skipif(not FULL, reason="long"))])
def test_wrong_calls_at_random(tmp_path: Path, sanitized: bool) -> None:
    """Each of the errors comes (that of scalars aside, which these rules always have), and none after a write."""
    require("gcc")
    rules = {**RULES, "novograd": of.rules.novograd, "lamb": of.rules.lamb}
    listed = " ".join(f"CALL({prefix})" for prefix in rules)
    text = "".join(f'#include "{prefix}.h"\n' for prefix in rules) + "#include <string.h>\n"
    text += f"#define RULES(CALL) {listed}\n#define KERNELS(rule) &rule##_kernel_f32, &rule##_kernel_f64,\n"
    files = emitted("split", rules)
    write(tmp_path, {**files, "emitted.h": text})
    sources = [*(name for name in files if name.endswith(".c")), SOURCES / "fuzz.c"]
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"] if sanitized else []
    lines = run(
        [linked(tmp_path, sources, "fuzz", flags), "1000000" if sanitized else "20000", "1"], tmp_path
    ).splitlines()
    counts = {int(line.split()[0]): int(line.split()[1]) for line in lines}
    assert set(counts) >= {*range(15), 100} - {7}
    assert counts[0] > 1000
