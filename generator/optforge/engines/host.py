"""Where arrays are: in the memory of the host. A target with a memory of its own has a space with the same methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..core.formats import FORMAT_OF
from ..core.functions import Array
from . import arrays, memory


class Host:
    """Arrays in the memory of the host, as NumPy arrays."""

    def parameter(self, array: Any, label: str) -> Any:
        """A parameter's array, which can be written, over the memory of its owner."""
        return arrays.parameter(array, label)

    def gradient(self, array: Any, label: str, shape: tuple[int, ...], dtype: Any, writes: bool = False) -> Any:
        """A gradient's array, of the shape and dtype of its parameter, and writable where it is to be zeroed."""
        return arrays.gradient(array, label, shape, dtype, writes)

    def pointer(self, array: Any) -> tuple[Callable[[], int], int] | None:
        """For an array that may be given other memory: what tells its address, and the address now."""
        return arrays.pointer(array)

    def allocate(self, parameters: Sequence[Any], dtypes: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Zeroed arrays of as many elements as the parameters, of these dtypes for each, or of `memory.Scales`."""
        return [list(own) for own in memory.allocate(parameters, dtypes)]

    def number(self) -> Any:
        """Room for one double."""
        return np.zeros(1)

    def write(self, array: Any, values: Any) -> None:
        """Set elements to those of an array of this space or of the host, or all to one number."""
        with np.errstate(all="ignore"):
            array[...] = values

    def begin(self, array: Any, values: Any, scales: Any = None) -> None:
        """Set state, and its scales, to a number, or to what the elements of another array are, in its own format."""
        own, given = FORMAT_OF.get(array.dtype), values
        if isinstance(values, np.ndarray) and values.dtype != array.dtype:
            given = FORMAT_OF[values.dtype].load(values)
        if own is not None and own.narrow and not (isinstance(values, np.ndarray) and values.dtype == array.dtype):
            given = own.store(np.full(array.shape, given, np.float32))
        if scales is not None:
            given, largest = given
            self.write(scales, largest)
        self.write(array, given)

    def memory(self, array: Any) -> Any:
        """The array whose memory is the owner's."""
        return array

    def copy(self, array: Any) -> Any:
        """A copy, in memory of its own."""
        return array.copy()

    def read(self, array: Any) -> Array:
        """The elements as an array of the host, maybe the same memory."""
        own: Array = array
        return own


HOST = Host()
