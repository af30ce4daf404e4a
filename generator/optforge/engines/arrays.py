"""Other people's arrays as NumPy arrays over the same memory, checked, with errors that name the array."""

from __future__ import annotations

import bisect
import collections
import functools
import itertools
import operator
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..core.formats import FORMAT_OF, GIVEN, raw, spelled
from ..core.functions import Array


def view(array: Any, label: str) -> Array:
    """A NumPy array over the memory of an array on the CPU.

    Raises
    ------
    TypeError
        It is no such array.
    """
    if type(array) is np.ndarray:
        return array
    if isinstance(array, np.ndarray):
        if any(base.__name__ == "MaskedArray" for base in type(array).__mro__):  # numpy.ma is slow to import
            raise TypeError(f"{label} is a masked array; pass its .data")
        return np.asarray(array)  # subclasses may mean other things by the same operations
    if hasattr(array, "detach") and hasattr(array, "numpy"):  # PyTorch, whose tensors may require gradients
        try:
            if str(getattr(array, "dtype", "")) == "torch.bfloat16":  # of which NumPy knows nothing
                viewed = np.asarray(array.detach().view(sys.modules["torch"].int16).numpy()).view(np.uint16)
            else:
                viewed = np.asarray(array.detach().numpy())
        except (TypeError, RuntimeError) as problem:
            raise TypeError(f"{label} does not share its memory with NumPy: {problem}") from None
        if viewed.size and hasattr(array, "data_ptr"):
            place = array.data_ptr()
            if not place:
                raise ValueError(f"{label} has no memory: that of its storage was freed")
            if address(viewed) != place:
                raise TypeError(f"{label} is {kind(array)}, whose numpy() gives a copy")
        return viewed
    try:
        buffer = memoryview(array)
    except (TypeError, BufferError):
        if hasattr(array, "__dlpack__"):
            return from_dlpack(array, label)
        needed = "it must be a NumPy array, or share its memory through DLPack or the buffer protocol"
        raise TypeError(f"{label} is {kind(array)}; {needed}") from None
    try:
        return np.asarray(buffer)
    except ValueError as problem:
        raise TypeError(f"{label} is {kind(array)} of elements that NumPy does not know: {problem}") from None


def from_dlpack(array: Any, label: str) -> Array:
    """A NumPy array over the memory of an array that shares it through DLPack."""
    try:
        return np.from_dlpack(array)
    except (AttributeError, BufferError, NotImplementedError, RuntimeError, TypeError, ValueError) as problem:
        raise TypeError(f"{label} is {kind(array)}, which is no array in CPU memory: {problem}") from None


def is_array(thing: object) -> bool:
    """Whether a thing is an array itself, and no collection of arrays."""
    if hasattr(thing, "__array__") or hasattr(thing, "__dlpack__"):
        return True
    try:
        memoryview(thing).release()  # type: ignore[arg-type]
    except (TypeError, BufferError):
        return False
    return True


def kind(thing: object) -> str:
    """The type of a thing, for messages."""
    name = type(thing).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' or name == 'ndarray' else 'a'} {name}"


def own_layout(array: Any, copy: bool = False) -> str:
    """What to do about the layout of a parameter: a copy of it would be trained, and the model would stay as it is.

    With `copy` what helps is a copy alone: what is contiguous and not aligned is contiguous already.
    """
    if hasattr(array, "detach"):
        call = "clone" if copy else "contiguous"
        return f"before the optimizer is made, write p.data = p.data.{call}() for each parameter p of the model"
    return (
        f"make it so where the model keeps it, w = np.{'array' if copy else 'ascontiguousarray'}(w), and use that "
        "array everywhere: a copy that only the optimizer has would be trained, and the model would not"
    )


def copied(_: Any, copy: bool = False) -> str:
    """What to do about the layout of a gradient."""
    return "pass np.array(of it)" if copy else "pass np.ascontiguousarray of it, or a copy"


TAKEN = "float32, float64, bfloat16 or float16"


def is_bits(array: Any) -> bool:
    """Whether an array has the dtype of 16 bits that may be anything."""
    return str(getattr(array, "dtype", "")).rpartition(".")[2] == "uint16"


def checked(array: Any, label: str, advice: Callable[..., str] = copied) -> Array:
    """`view`, with a dtype and a layout that kernels take; `advice` says what to pass instead of another layout."""
    viewed = raw(view(array, label))
    if viewed.dtype not in GIVEN:
        raise TypeError(f"{label} is {viewed.dtype}; it must be {TAKEN}")
    if not viewed.flags.c_contiguous:
        raise ValueError(f"{label} is not C-contiguous (strides {viewed.strides}); {advice(array)}")
    if not viewed.flags.aligned:
        raise ValueError(f"{label} is not aligned to its elements; {advice(array, True)}")
    return viewed


def parameter(array: Any, label: str) -> Array:
    """A parameter's array, which can be written."""
    viewed = checked(array, label, own_layout)
    if not viewed.flags.writeable:
        if isinstance(array, np.ndarray):
            raise ValueError(f"{label} is read-only, and parameters are updated in place")
        advice = "train w = np.array(of it), and make the other library's array from w after each step"
        raise ValueError(
            f"{label} is {kind(array)} that may only be read, and parameters are updated in place: {advice}"
        )
    return viewed


def gradient(array: Any, label: str, shape: tuple[int, ...], dtype: np.dtype[Any], writes: bool = False) -> Array:
    """A gradient's array, of the shape of its parameter, and writable where it is to be zeroed.

    It may have another dtype, but one is float64 where the other is.
    """
    viewed = checked(array, label, copied)
    if writes and not viewed.flags.writeable:
        raise ValueError(f"{label} is read-only, and zero_grads=True sets gradients to zero")
    if is_bits(array) and dtype != np.uint16:
        raise TypeError(f"{label} is uint16; it must be {TAKEN}")
    if FORMAT_OF[viewed.dtype].real is not FORMAT_OF[dtype].real:
        raise TypeError(f"{label} is {spelled(viewed.dtype)}, its parameter {spelled(dtype)}")
    if viewed.shape != shape:
        raise ValueError(f"{label} has the shape {viewed.shape}, its parameter {shape}")
    return viewed


def address(array: Any) -> int:
    """Where an array's elements are, on whichever device."""
    interface = getattr(array, "__array_interface__", None)
    if interface is None and hasattr(array, "ptr"):  # on a device, where the interface is slow to ask
        return int(array.ptr)
    return int((array.__cuda_array_interface__ if interface is None else interface)["data"][0])


def pointer(array: Any) -> tuple[Callable[[], int], int] | None:
    """For an array that may be given other memory (PyTorch's): what tells its address, and the address now.

    Others stay where they are as long as a view of them is kept.
    """
    ask = getattr(array, "data_ptr", None)
    if ask is None and hasattr(array, "__dlpack__") and not isinstance(array, np.ndarray):
        ask = functools.partial(dlpack_address, array)
    return None if ask is None else (ask, ask())


def dlpack_address(array: Any) -> int:
    """Where the elements are of an array that shares its memory through DLPack."""
    return address(from_dlpack(array, "an array"))


DTYPE, SHAPE, WRITEABLE = map(operator.attrgetter, ("dtype", "shape", "flags.writeable"))


class Forms:
    """What a step relies on of arrays that it has checked: those of NumPy can be given another form in place.

    Parameters
    ----------
    read, written : iterable of arrays
        Those of other libraries are passed over.
    """

    def __init__(self, read: Iterable[Any], written: Iterable[Any]):
        self.written = [array for array in written if isinstance(array, np.ndarray)]
        self.arrays = [*(array for array in read if isinstance(array, np.ndarray)), *self.written]
        self.dtypes, self.shapes = [*map(DTYPE, self.arrays)], [*map(SHAPE, self.arrays)]
        # NumPy resizes no array that there is a weak reference to, whatever its `refcheck` says.
        self.held = [weakref.ref(array) for array in self.arrays]

    def hold(self) -> bool:
        """Whether they are as they were."""
        return (
            [*map(DTYPE, self.arrays)] == self.dtypes
            and [*map(SHAPE, self.arrays)] == self.shapes
            and all(map(WRITEABLE, self.written))
        )


FEW, AT_ONCE = 32, 512  # tensors that are not worth it, and whose versions have room in a cache


def teller(arrays: Iterable[Any], fetch: Callable[[list[Any]], None] | None = None) -> Callable[[], None] | None:
    """What tells PyTorch that its tensors among some arrays have been written to; None where there are none.

    It counts their versions up, by which a backward pass through values from before is an error. Where there are many
    of them, `fetch` is called with some before they are counted.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    tensors = [array for array in arrays if isinstance(array, torch.Tensor) and not array.is_inference()]
    increment = getattr(torch._C, "_increment_version", None)
    if not tensors or increment is None:
        return None
    try:
        increment([])
    except TypeError:  # an older one takes them one by one
        return lambda: collections.deque(map(increment, tensors), 0).clear()
    if fetch is None or len(tensors) < FEW:
        return functools.partial(increment, tensors)
    parts = [tensors[k : k + AT_ONCE] for k in range(0, len(tensors), AT_ONCE)]

    def tell() -> None:
        for part in parts:
            fetch(part)
            increment(part)

    return tell


class Ranges:
    """The memory that a step writes to, to find arrays that overlap it.

    Parameters
    ----------
    arrays : iterable of (str, array)
        What messages call an array, and the array.

    Raises
    ------
    ValueError
        Two of the arrays overlap.
    """

    def __init__(self, arrays: Iterable[tuple[str, Array]]):
        ranges = sorted((address(a), address(a) + a.nbytes, label) for label, a in arrays if a.nbytes)
        for (_, end, first), (start, _, second) in itertools.pairwise(ranges):
            if start < end:
                raise ValueError(f"{first} and {second} overlap in memory")
        self.starts = [start for start, _, _ in ranges]
        self.ends = [end for _, end, _ in ranges]
        self.labels = [label for _, _, label in ranges]

    def check_apart(self, array: Array, label: str) -> None:
        """Raise ValueError where an array overlaps one of these."""
        start = address(array)
        k = bisect.bisect_right(self.ends, start)
        if array.nbytes and k < len(self.starts) and self.starts[k] < start + array.nbytes:
            raise ValueError(f"{label} and {self.labels[k]} overlap in memory")
