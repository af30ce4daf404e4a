"""Arrays of other libraries: seen as NumPy arrays over the same memory, or refused by name."""

from __future__ import annotations

import array
import ctypes
from typing import Any

import numpy as np
import pytest

from optforge.engines.arrays import Ranges, address, checked, gradient, is_array, kind, parameter, pointer, view
from optimizing import Elsewhere, Exporter, FakeTensor, bits

FLOATS = [0.25, -1.5, 3.0]


def buffers() -> dict[str, Any]:
    """Arrays of three floats, by how they share their memory."""
    own = np.array(FLOATS, np.float32)
    return {
        "ndarray": own.copy(),
        "matrix": own.copy().view(np.matrix),
        "recarray": own.copy().view(np.recarray),
        "array.array": array.array("f", FLOATS),
        "memoryview": memoryview(own.copy()),
        "memoryview of bytes, cast": memoryview(bytearray(own.tobytes())).cast("f"),
        "ctypes": (ctypes.c_float * 3)(*FLOATS),
        "DLPack": Exporter(own.copy()),
        "tensor": FakeTensor(own.copy()),
        "double": np.array(FLOATS),
        "double array.array": array.array("d", FLOATS),
    }


@pytest.mark.parametrize("name", buffers())
def test_the_same_memory_is_seen_and_can_be_written(name: str) -> None:
    shared = buffers()[name]
    seen = parameter(shared, "w")
    assert type(seen) is np.ndarray
    assert seen.reshape(-1).tolist() == FLOATS
    seen[...] = 7
    assert view(shared, "w").reshape(-1).tolist() == [7, 7, 7]


def test_a_memory_map_is_seen(tmp_path: Any) -> None:
    path = tmp_path / "weights"
    np.array(FLOATS, np.float32).tofile(path)
    mapped = np.memmap(path, np.float32, "r+")
    seen = parameter(mapped, "w")
    assert type(seen) is np.ndarray
    seen += 1
    mapped.flush()
    assert np.fromfile(path, np.float32).tolist() == [1.25, -0.5, 4.0]
    with pytest.raises(ValueError, match=r"^w is read-only"):
        parameter(np.memmap(path, np.float32, "r"), "w")


def test_any_shape_is_seen_as_it_is() -> None:
    for shape in [(), (0,), (0, 3), (1,), (2, 3), (2, 1, 3)]:
        assert parameter(np.zeros(shape), "w").shape == shape


def test_a_numpy_scalar_is_a_gradient_and_no_parameter() -> None:
    assert gradient(np.float32(0.5), "g", (), np.dtype("f4")).tolist() == 0.5
    with pytest.raises(ValueError, match=r"^w is a float32 that may only be read"):
        parameter(np.float32(0.5), "w")


def test_a_gradient_may_be_read_only() -> None:
    fixed = np.array(FLOATS)
    fixed.setflags(write=False)
    assert gradient(fixed, "g", (3,), np.dtype("f8")) is fixed
    assert gradient(memoryview(fixed.tobytes()).cast("d"), "g", (3,), np.dtype("f8")).tolist() == FLOATS


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


def unaligned() -> Any:
    return np.frombuffer(bytearray(17), np.float32, 4, offset=1)


def read_only() -> Any:
    fixed = np.zeros(3, np.float32)
    fixed.setflags(write=False)
    return fixed


class Copying(FakeTensor):
    """A tensor whose numpy() does not share its memory."""

    def numpy(self) -> Any:
        return self.array.copy()


class OnDevice(FakeTensor):
    """A tensor that NumPy cannot see."""

    def numpy(self) -> Any:
        raise TypeError("can't convert device tensor to numpy")


class Masked(np.ma.MaskedArray):  # type: ignore[type-arg]
    """A masked array of another name."""


class Unfinished:
    """Half of DLPack."""

    def __dlpack__(self, **arguments: Any) -> Any:
        raise AttributeError("no capsule")


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "int": (lambda: np.zeros(3, np.int64), TypeError, "w is int64; it must be float32, float64, bfloat16 or float16"),
    "short": (lambda: np.zeros(3, np.int16), TypeError, "w is int16"),
    "long double": (lambda: np.zeros(3, np.longdouble), TypeError, "w is float128|w is longdouble|w is float64"),
    "complex": (lambda: np.zeros(3, np.complex64), TypeError, "w is complex64"),
    "object": (lambda: np.zeros(3, object), TypeError, "w is object"),
    "other byte order": (lambda: np.zeros(3, np.dtype("f4").newbyteorder()), TypeError, "w is [<>]f4"),
    "structured": (lambda: np.zeros(3, [("x", "f4")]), TypeError, "w is "),
    "strings": (lambda: np.zeros(3, "U4"), TypeError, "w is <U4"),
    "transposed": (lambda: np.zeros((2, 3)).T, ValueError, r"w is not C-contiguous \(strides \(8, 24\)\)"),
    "every second": (lambda: np.zeros(6)[::2], ValueError, "w is not C-contiguous"),
    "reversed": (lambda: np.zeros(6)[::-1], ValueError, "w is not C-contiguous"),
    "broadcast": (lambda: np.broadcast_to(np.zeros(1), (3,)), ValueError, "w is not C-contiguous"),
    "unaligned": (unaligned, ValueError, "w is not aligned"),
    "read-only": (read_only, ValueError, "w is read-only"),
    "masked": (lambda: np.ma.array([1.0]), TypeError, r"w is a masked array; pass its \.data"),
    "masked by another name": (lambda: np.ma.array([1.0]).view(Masked), TypeError, "w is a masked array"),
    "list": (lambda: [1.0, 2.0], TypeError, "w is a list; it must be a NumPy array"),
    "float": (lambda: 1.0, TypeError, "w is a float; it must be"),
    "None": (lambda: None, TypeError, "w is a NoneType; it must be"),
    "string": (lambda: "weights", TypeError, "w is a str; it must be"),
    "bytes": (lambda: b"weights", TypeError, "w is uint8"),
    "buffer of ints": (lambda: array.array("i", [1]), TypeError, "w is int32"),
    "copying tensor": (lambda: Copying(np.zeros(3)), TypeError, r"w is a Copying, whose numpy\(\) gives a copy"),
    "tensor on a device": (lambda: OnDevice(np.zeros(3)), TypeError, "w does not share its memory .*device tensor"),
    "DLPack on a device": (lambda: Elsewhere(np.zeros(3)), TypeError, "w is an Elsewhere, .*device 7"),
    "half of DLPack": (Unfinished, TypeError, "w is an Unfinished, .*no capsule"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_parameter_is_refused_by_its_name(name: str) -> None:
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=f"^({message})") as refusal:
        parameter(make(), "w")
    assert type(refusal.value) is error


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "read-only"])
def test_a_bad_gradient_is_refused_by_its_name(name: str) -> None:
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=f"^({message})"):
        gradient(make(), "w", (3,), np.dtype("f4"))


def test_an_exotic_buffer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^w is a memoryview of elements that NumPy does not know"):
        checked(memoryview((ctypes.CFUNCTYPE(None) * 1)()), "w")


def test_a_gradient_is_like_its_parameter() -> None:
    with pytest.raises(TypeError, match=r"^g is float64, its parameter float32"):
        gradient(np.zeros(3), "g", (3,), np.dtype("f4"))
    for shape in [(3, 1), (1, 3), (4,), ()]:
        with pytest.raises(ValueError, match=r"^g has the shape \(.*\), its parameter \(3,\)"):
            gradient(np.zeros(shape), "g", (3,), np.dtype("f8"))


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ranges_find_what_overlaps() -> None:
    memory = np.zeros(100, np.float32)
    empty = memory[15:][:0]  # where a is
    ranges = Ranges([("b", memory[40:60]), ("a", memory[10:20]), ("c", memory[60:61]), ("empty", empty)])
    for start, end, hit in [(0, 11, "a"), (19, 40, "a"), (12, 13, "a"), (5, 95, "a"), (59, 60, "b"), (41, 90, "b")]:
        with pytest.raises(ValueError, match=f"^g and {hit} overlap in memory$"):
            ranges.check_apart(memory[start:end], "g")
    with pytest.raises(ValueError, match=r"^g and c overlap in memory$"):
        ranges.check_apart(memory[60:61].view(np.uint8)[3:], "g")
    for start, end in [(0, 10), (20, 40), (61, 100), (0, 0)]:
        ranges.check_apart(memory[start:end], "g")
    ranges.check_apart(empty, "g")
    Ranges([]).check_apart(memory, "g")


@pytest.mark.parametrize(("first", "second"), [((0, 6), (5, 9)), ((5, 9), (0, 6)), ((0, 9), (3, 4)), ((2, 5), (2, 5))])
def test_ranges_that_overlap_are_refused(first: tuple[int, int], second: tuple[int, int]) -> None:
    memory = np.zeros(9, np.uint8)
    with pytest.raises(ValueError, match=r"^(a and b|b and a) overlap in memory$"):
        Ranges([("a", memory[slice(*first)]), ("b", memory[slice(*second)])])


def test_neighbours_do_not_overlap() -> None:
    memory = np.zeros(9)
    Ranges([("a", memory[3:6]), ("b", memory[:3]), ("c", memory[6:]), ("d", memory[3:3])])


def test_the_pointer_tells_when_memory_moves() -> None:
    for moving in (FakeTensor(np.array(FLOATS)), Exporter(np.array(FLOATS))):
        before = moving.array
        found = pointer(moving)
        assert found is not None
        ask, at = found
        assert ask() == at == address(before)
        moving.array = before.copy()
        assert ask() != at
        moving.array = before
        assert ask() == at
    assert pointer(np.zeros(3)) is None
    assert pointer(array.array("f", FLOATS)) is None


def test_arrays_are_told_from_collections() -> None:
    for shared in [*(value for name, value in buffers().items() if name != "tensor"), np.float32(1), b"", bytearray(2)]:
        assert is_array(shared)
    for collection in [[], (), {}, "text", 1.0, None, {np.float32(1)}, iter([])]:
        assert not is_array(collection)


def test_types_are_named() -> None:
    assert kind([]) == "a list"
    assert kind(1) == "an int"
    assert kind(np.zeros(1)) == "an ndarray"


def test_bits_tell_zeros_and_nans_apart() -> None:
    assert bits(np.array([0.0])) != bits(np.array([-0.0]))
    assert bits([0.0]) != bits([-0.0])
    assert bits({"x": np.array([np.nan])}) == bits({"x": np.array([np.nan])})
    assert bits(np.zeros(1, np.float32)) != bits(np.zeros((), np.float32))
