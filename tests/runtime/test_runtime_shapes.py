"""Other shapes of a step: what it adds in memory of its own, and ranges of tensors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from amount import LEVEL
from conftest import require
from embedding import SOURCES, Library, Part, emitted, lists_of, same, shared, step, tensors_of
from optforge import norm, rule, scalar


@rule
def early(p, g, s: scalar = 1.0, *, lr=0.5):
    """The parameter is written, added up as it is then, and written again."""
    p = p - lr * g
    s = s / 2 + 0.25
    p = p / (1 + norm(p)) - s * g
    return p, s


RULES = {
    "adamw": of.rules.adamw,
    "sgd": of.rules.sgd,
    "lamb": of.rules.lamb,
    "novograd": of.rules.novograd,
    "clipped": of.transforms.clip_by_global_norm(max_norm=0.5) >> of.rules.momentum,
    "early": early,
}
SIZES = (5000, 0, 1, 33, 1024, 2049)
PAIRS = [(prefix, dtype) for prefix in (*RULES, "hand") for dtype in ("f32", "f64")]


@pytest.fixture(scope="module", params=["", "-fopenmp"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    require("gcc")
    files = emitted("split", RULES)
    files["optforge.c"] = files["optforge.c"].replace("THREAD_SIZE = 65536", "THREAD_SIZE = 1024")
    flags = [LEVEL, request.param] if request.param else [LEVEL]
    path = shared(tmp_path_factory.mktemp("library"), files, [SOURCES / "hand.c"], flags)
    names = ", ".join(f"{prefix}_kernel_{dtype}" for prefix, dtype in PAIRS)
    return Library(path, f"extern optforge_kernel {names};")


def stepped(library: Library, part: Part, delta: Sequence[np.ndarray] | None, **options: Any) -> tuple[int, np.ndarray]:
    """A step with statistics, and with what it adds in other memory, if there is some; its status and its statistics."""
    lists, kept = lists_of(library, [part])
    if delta is not None:
        places = np.array([own.ctypes.data for own in delta], np.uintp)
        lists[0].delta = library.pointer(places, "void **")
        kept.append(places)
    o = library.options(**options)
    stats = np.full(8, 7.0)
    o.stats = library.pointer(stats, "optforge_stats *")
    size = library.calls.optforge_workspace_size(lists, 1, o)
    workspace = np.full(size // 8, np.nan)
    o.workspace, o.workspace_size = library.pointer(workspace), size
    return int(library.calls.optforge_step_lists(lists, 1, o)), stats


# ---- what a step adds


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": 1, "zero_grads": 1, "threads": 3}], ids=["plain", "all"])
@pytest.mark.parametrize(("prefix", "dtype"), PAIRS)
def test_what_a_step_adds(library: Library, prefix: str, dtype: str, options: dict[str, Any]) -> None:
    """p stays, and all else is as by the plain step, statistics too."""
    kernel = library.kernel(prefix, dtype)
    plain = tensors_of(kernel, SIZES, 5)
    other = copy.deepcopy(plain)
    for t in (1, 2):
        before = [own[0].copy() for own in other]
        delta = [np.full_like(own[0], np.nan) for own in other]
        for own, like in zip(plain, other, strict=True):
            own[0][:] = like[0]
        expected = stepped(library, Part(kernel, plain, t), None, **options)
        status, stats = stepped(library, Part(kernel, other, t), delta, **options)
        assert (status, status) == (0, expected[0]) and same(stats, expected[1])
        for k in range(len(SIZES)):
            assert same(other[k][0], before[k])
            assert same(delta[k], plain[k][0] - before[k])
            assert same(other[k][1:], plain[k][1:])
        for own, seen in zip(other, plain, strict=True):  # as an engine that adds it would, but for the rounding
            own[0][:] = seen[0]
            own[1][:] = seen[1][:] = 0.25


def test_what_a_skipped_step_adds(library: Library) -> None:
    """Nothing is written."""
    kernel = library.kernel("lamb", "f32")
    tensors = tensors_of(kernel, SIZES, 6)
    tensors[3][1][7] = np.inf
    before = copy.deepcopy(tensors)
    delta = [np.full_like(own[0], 7) for own in tensors]
    assert stepped(library, Part(kernel, tensors), delta, skip_nonfinite=1)[0] == -1
    assert same(tensors, before) and all((own == 7).all() for own in delta)


@pytest.mark.parametrize(
    ("wrong", "name"), [("none", "NULL"), ("p", "OVERLAP"), ("g", "OVERLAP"), ("m", "OVERLAP"), ("odd", "ALIGNMENT")]
)
def test_wrong_memory_for_what_a_step_adds(library: Library, wrong: str, name: str) -> None:
    kernel = library.kernel("adamw", "f64")
    tensors = tensors_of(kernel, (40, 33), 7)
    before = copy.deepcopy(tensors)
    delta = [np.full_like(own[0], 7) for own in tensors]
    room = np.zeros(40 * 8 + 8, np.uint8)
    delta[1] = {
        "none": np.empty(0, np.float64),
        "p": tensors[1][0][32:],
        "g": tensors[1][1],
        "m": tensors[1][2],
        "odd": room[1:],
    }[wrong]
    lists, _kept = lists_of(library, [Part(kernel, tensors)])
    places = np.array([own.ctypes.data for own in delta], np.uintp)
    places[1] *= wrong != "none"
    lists[0].delta = library.pointer(places, "void **")
    status = library.calls.optforge_step_lists(lists, 1, library.options())
    assert status == getattr(library.calls, f"OPTFORGE_ERROR_{name}")
    assert same(tensors, before) and (delta[0] == 7).all()


def test_what_a_step_adds_has_no_fewer_bits(library: Library) -> None:
    """Parameters of 16 bits have no delta; what else is wrong with a tensor is said first."""
    kernel = library.kernel("sgd", "f32")
    formats = library.ffi.new("unsigned char[]", [4, 4])  # bfloat16
    narrow = library.ffi.new("optforge_kernel *", kernel[0])
    narrow.formats = formats
    tensors = [[np.full(40, 0x3F80, np.uint16) for _ in range(2)]]
    before = copy.deepcopy(tensors)
    delta = [np.full(40, 7, np.float32)]
    status, _ = stepped(library, Part(narrow, tensors), delta)
    assert library.text(status) == "delta is for parameters that are float or double"
    assert same(tensors, before) and (delta[0] == 7).all()
    none = [[np.empty(0, np.uint16), tensors[0][1]]]
    lists, _kept = lists_of(library, [Part(narrow, none, sizes=[40])])
    table = library.table(none, [40])
    table[0, 1] = 0
    lists[0].tensors = library.pointer(table)
    lists[0].delta = library.ffi.cast("void **", delta[0].ctypes.data)
    assert library.text(library.calls.optforge_step_lists(lists, 1, library.options())) == "a pointer is NULL"


# ---- ranges


def ranges(library: Library, kernel: Any, tensor: list[np.ndarray], cuts: Sequence[int]) -> list[list[np.ndarray]]:
    """A tensor cut by the runtime, as arrays."""
    table = library.table([tensor])
    made = []
    for begin, end in zip((0, *cuts), (*cuts, tensor[0].size), strict=True):
        row = np.zeros_like(table)
        given = (kernel, library.pointer(table), begin, end - begin, library.pointer(row))
        assert library.calls.optforge_range(*given) == 0
        assert row[0, 0] == end - begin
        own = []
        for a, array in enumerate(tensor):
            scalar_state = kernel.formats[a] == 3
            view = array if scalar_state else array[begin:end]
            assert row[0, 1 + a] == view.ctypes.data or not view.size
            own.append(view)
        made.append(own)
    return made


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_ranges_in_calls_of_their_own(library: Library, dtype: str) -> None:
    """A rule that adds up nothing takes any cut, in any order, with hyperparameters of each range's own."""
    kernel = library.kernel("adamw", dtype)
    [whole] = tensors_of(kernel, (5000,), 8)
    parts = copy.deepcopy(whole)
    names = ["lr", "beta1", "beta2", "eps", "weight_decay"]
    assert [library.ffi.string(kernel.hyper_names[k]).decode() for k in range(5)] == names
    hyper = [0.01, 0.9, 0.99, 1e-6, 0.1]
    assert step(library, Part(kernel, [whole], 3, hyper)).status == 0
    for own in ranges(library, kernel, parts, (1, 7, 1031, 4999))[::-1]:
        assert step(library, Part(kernel, [own], 3, hyper)).status == 0
    assert same(parts, whole)
    first, second = ranges(library, kernel, parts, (3000,))
    assert step(library, Part(kernel, [first], 4, hyper)).status == 0
    assert step(library, Part(kernel, [second], 4, [*hyper[:4], 0.0])).status == 0
    decayed = copy.deepcopy(whole)
    assert step(library, Part(kernel, [decayed], 4, hyper)).status == 0
    assert step(library, Part(kernel, [whole], 4, [*hyper[:4], 0.0])).status == 0
    assert same([own[:3000] for own in parts], [own[:3000] for own in decayed])
    assert same([own[3000:] for own in parts], [own[3000:] for own in whole])


@pytest.mark.parametrize(("prefix", "dtype"), PAIRS)
def test_ranges_in_one_call(library: Library, prefix: str, dtype: str) -> None:
    """Any rule takes cuts between leaves, and has one norm, one advance of the scalar state."""
    kernel = library.kernel(prefix, dtype)
    [whole] = tensors_of(kernel, (5000,), 9)
    parts = copy.deepcopy(whole)
    expected = step(library, Part(kernel, [whole], 2), stats=True)
    cut = ranges(library, kernel, parts, (1024, 3072))
    rows = {"part": np.array([0, 1024, 3072]), "number": np.array([0, 0, 0])}
    found = step(library, Part(kernel, cut, 2, rows=rows), stats=True, sizes=[5000])
    assert found.status == expected.status == 0
    assert same(parts, whole) and same(found.stats, expected.stats)


def test_wrong_ranges(library: Library) -> None:
    calls, kernel = library.calls, library.kernel("lamb", "f32")
    [tensor] = tensors_of(kernel, (100,), 10)
    table, row = library.table([tensor]), np.full((1, 5), 7, np.uintp)
    for begin, n in ((101, 0), (100, 1), (0, 101), (2**64 - 1, 2), (50, 2**64 - 50)):
        assert calls.optforge_range(kernel, library.pointer(table), begin, n, library.pointer(row)) == 10
    null = library.ffi.NULL
    assert calls.optforge_range(null, library.pointer(table), 0, 1, library.pointer(row)) == 1
    assert calls.optforge_range(kernel, null, 0, 1, library.pointer(row)) == 1
    assert calls.optforge_range(kernel, library.pointer(table), 0, 1, null) == 1
    assert (row == 7).all()
    assert calls.optforge_range(kernel, library.pointer(table), 100, 0, library.pointer(table)) == 0  # in its place
    assert table[0, 0] == 0


# ---- metadata


@pytest.mark.parametrize(("prefix", "dtype"), PAIRS)
def test_what_the_object_tells_of_itself(library: Library, prefix: str, dtype: str) -> None:
    kernel, ffi = library.kernel(prefix, dtype), library.ffi
    width = {"f32": 4, "f64": 8}[dtype]
    scalars = sum(kernel.formats[k] == 3 for k in range(2, kernel.arrays))
    states = kernel.arrays - 2 - scalars
    assert library.calls.optforge_state_size(kernel, 1001) == 1001 * width * states + 8 * scalars
    assert library.calls.optforge_state_size(kernel, 2**64 - 1) == (2**64 - 1 if states else 8 * scalars)
    assert library.calls.optforge_state_size(ffi.NULL, 3) == 0
    if prefix == "hand":
        return
    own = RULES[prefix]
    assert ffi.string(kernel.name).decode() == own.name and ffi.string(kernel.hash).decode() == own.hash
    assert kernel.abi == library.calls.OPTFORGE_TYPES if hasattr(library.calls, "OPTFORGE_TYPES") else kernel.abi == 1
    assert kernel.bytes == width * sum(own.kernel(**own.definition.settings).moved)
    assert [ffi.string(kernel.state_names[k]).decode() for k in range(kernel.arrays - 2)] == [*own.state]
    assert kernel.state_names[kernel.arrays - 2] == ffi.NULL


def test_the_version(tmp_path: Path) -> None:
    assert f'#define OPTFORGE_VERSION "{of.__version__}"' in emitted("split", {"sgd": of.rules.sgd})["optforge.h"]
