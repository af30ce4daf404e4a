"""A CUDA device through PyCUDA: its context, and arrays in its memory."""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import itertools
import math
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...core.diagnostics import EnvironmentProblem, PerformanceWarning
from ...core.formats import FORMAT_OF, GIVEN, spelled
from ...core.functions import Array
from .. import arrays
from ..arrays import is_bits, kind
from ..host import Host
from ..memory import size_of

ALIGNMENT = 256  # bytes to a multiple of which arrays begin
OLDEST = (7, 0)  # the compute capability that emitted kernels need


@functools.cache
def driver() -> Any:
    """PyCUDA's driver, initialised.

    Raises
    ------
    EnvironmentProblem
        There is no PyCUDA, no driver or no device.
    """
    try:
        import pycuda.driver as drv
    except ImportError as problem:
        if "libcuda" in str(problem):
            raise EnvironmentProblem(f'target "cuda" needs NVIDIA\'s driver, and there is none: {problem}') from None
        what = f'target "cuda" needs PyCUDA, which cannot be imported ({problem})'
        raise EnvironmentProblem(f"{what}: pip install 'optforge[cuda]'") from None
    try:
        drv.init()
        number = drv.Device.count()
    except drv.Error as problem:
        raise EnvironmentProblem(f"NVIDIA's driver does not start: {problem}") from None
    if number == 0:
        raise EnvironmentProblem('target "cuda" needs a CUDA device, and this machine has none')
    return drv


class Device:
    """A device and its primary context, the one that PyTorch and CuPy use as well.

    It is made current around each use, whichever thread that is in, and never left so: a thread may then end, and other
    libraries find the device current that they chose.
    """

    def __init__(self, number: int):
        self.drv, self.number = driver(), number
        count = self.drv.Device.count()
        if not 0 <= number < count:
            raise EnvironmentProblem(f"there is no CUDA device {number}; there are {count}, counted from 0")
        device = self.drv.Device(number)
        self.name, self.capability = device.name(), device.compute_capability()
        if self.capability < OLDEST:
            own, least = (".".join(map(str, version)) for version in (self.capability, OLDEST))
            what = f"CUDA device {number}, {self.name}, is too old"
            raise EnvironmentProblem(f"{what}: its compute capability is {own}, and {least} is needed")
        try:
            self.context = device.retain_primary_context()
            with self:
                pass
        except self.drv.Error as problem:
            raise EnvironmentProblem(f"CUDA device {number}, {self.name}, cannot be used: {problem}") from None
        self.array = device_array(self)
        self.modules: dict[Path, Any] = {}
        atexit.register(self.leave)

    def __enter__(self) -> None:
        self.context.push()

    def __exit__(self, *_: object) -> None:
        self.context.pop()

    def leave(self) -> None:
        """Give the context back before PyCUDA is torn down, which would end the process with an error otherwise."""
        with contextlib.suppress(self.drv.Error):
            with self:
                self.modules.clear()
            self.context.detach()

    def module(self, path: Path) -> Any:
        """The kernels of a cubin, loaded once.

        Raises
        ------
        EnvironmentProblem
            They cannot be loaded.
        """
        with self:
            try:
                if path not in self.modules:
                    self.modules[path] = self.drv.module_from_buffer(path.read_bytes())
            except self.drv.Error as problem:
                version = self.drv.get_driver_version()
                what = f"the compiled kernel {path} cannot be loaded by the driver, which is of CUDA {version // 1000}"
                hint = "one older than the toolkit of nvcc may need an update"
                raise EnvironmentProblem(f"{what}.{version % 1000 // 10}: {problem}; {hint}") from None
        return self.modules[path]

    def allocate(self, size: int, fill: int | None = None) -> Memory:
        """So many bytes, each of this value.

        Raises
        ------
        EnvironmentProblem
            The device has not so many.
        """
        size = max(size, 1)
        with self:
            try:
                memory = Memory(self, self.drv.mem_alloc(size))
            except self.drv.MemoryError:
                free, total = self.drv.mem_get_info()
                has = f"has {free:,} of {total:,} bytes left"
                raise EnvironmentProblem(
                    f"CUDA device {self.number}, {self.name}, {has}, and {size:,} are needed"
                ) from None
            if fill is not None:
                self.drv.memset_d8(int(memory), fill, size)
                self.drv.Context.synchronize()  # streams that do not wait for the default one find it filled
        return memory


class Memory:
    """Memory of a device, which is freed in the device's context, whichever thread lets go of it."""

    def __init__(self, device: Device, allocation: Any):
        self.device, self.allocation = device, allocation

    def __int__(self) -> int:
        return int(self.allocation)

    def __del__(self) -> None:
        with contextlib.suppress(Exception), self.device:  # after the end of the context it is gone already
            self.allocation.free()


LOCK = threading.Lock()


def device(number: int) -> Device:
    """A device, asked for once."""
    with LOCK:
        return opened(number)


opened = functools.cache(Device)


def device_array(device: Device) -> Any:
    """The class of arrays on a device: PyCUDA's GPUArray, whose methods find the device's context current."""
    from pycuda import gpuarray

    def within(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with device:
                result = method(*args, **kwargs)
            if type(result) is gpuarray.GPUArray:  # a part of an array, or what is computed from it
                result.__class__ = DeviceArray
            return result

        return call

    class DeviceArray(gpuarray.GPUArray):  # type: ignore[misc]
        """An array on a CUDA device, with `__cuda_array_interface__` and the methods of PyCUDA's GPUArray."""

        def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
            if copy is False:
                raise ValueError("an array on a device is copied when it becomes a NumPy array")
            values: Array = self.get()
            return values if dtype is None else values.astype(dtype)

        def get(self, *args: Any, **kwargs: Any) -> Any:
            device.drv.Context.synchronize()  # steps may go on in streams that copies do not wait for
            return super().get(*args, **kwargs)

        def reshape(self, *shape: Any) -> Any:
            found = np.empty(self.shape, self.dtype).reshape(*shape)  # memory that nobody touches
            view = DeviceArray.__new__(DeviceArray)
            view.__dict__.update(self.__dict__, shape=found.shape, strides=found.strides, base=self)
            return view

    for name, method in {**vars(gpuarray.GPUArray), **vars(DeviceArray)}.items():
        if inspect.isfunction(method) and name not in ("reshape", "__del__"):
            setattr(DeviceArray, name, within(method))
    return DeviceArray


class View:
    """What kernels have to know of somebody's array on a device, whose owner it keeps alive."""

    __slots__ = ("base", "dtype", "nbytes", "ptr", "shape", "size")

    def __init__(self, ptr: int, shape: tuple[int, ...], dtype: np.dtype[Any], base: Any):
        self.ptr, self.shape, self.dtype, self.base = ptr, shape, dtype, base
        self.size = math.prod(shape)
        self.nbytes = self.size * dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        own = {"shape": self.shape, "typestr": self.dtype.str, "data": (self.ptr, False)}
        return {**own, "strides": None, "stream": None, "version": 3}

    def reshape(self, length: int) -> View:
        """The same in one dimension; the length is -1."""
        if len(self.shape) == 1:
            return self
        return View(self.ptr, (self.size,), self.dtype, self.base)


class DeviceSpace(Host):
    """Arrays in the memory of a device, as PyCUDA's GPUArrays.

    Arrays of the device are used where they are. For arrays of the host there is a copy on the device; `hosts` has the
    array by the copy's address, and the engine brings and fetches its elements at each step.
    """

    def __init__(self, number: int):
        self.device = device(number)
        self.copies: dict[str, Any] = {}
        self.hosts: dict[int, Array] = {}
        self.warned = False

    def parameter(self, array: Any, label: str) -> Any:
        """A parameter's array on the device."""
        return self.view(array, label, arrays.parameter, arrays.own_layout)

    def gradient(self, array: Any, label: str, shape: tuple[int, ...], dtype: Any, writes: bool = False) -> Any:
        """A gradient's array on the device, of the shape of its parameter; not of another width where one is double."""

        def check(given: Any, label: str) -> Array:
            return arrays.gradient(given, label, shape, dtype, writes)

        view = self.view(array, label, check, lambda _: "pass a contiguous copy")
        if view.dtype == np.uint16 and dtype != np.uint16 and is_bits(array):
            raise TypeError(f"{label} is uint16; it must be {arrays.TAKEN}")
        if FORMAT_OF[view.dtype].real is not FORMAT_OF[dtype].real:
            raise TypeError(f"{label} is {spelled(view.dtype)}, its parameter {spelled(dtype)}")
        if view.shape != shape:
            raise ValueError(f"{label} has the shape {view.shape}, its parameter {shape}")
        return view

    def view(self, array: Any, label: str, host: Callable[[Any, str], Array], advice: Callable[[Any], str]) -> Any:
        """A view of an array of the device, or of the copy of one of the host, which `host` checks.

        `advice` says what to pass instead of an array of another layout.
        """
        plain = array.detach() if hasattr(array, "detach") else array
        bits = is_bfloat16(getattr(plain, "dtype", None))
        if bits and getattr(plain, "is_cuda", False):  # of which the interface may know nothing
            plain = plain.view(sys.modules["torch"].int16)
        interface = getattr(plain, "__cuda_array_interface__", None)
        if interface is None:
            return self.held(host(array, label), label)
        found = np.dtype(np.uint16 if bits else interface["typestr"])
        if found not in GIVEN:
            raise TypeError(f"{label} is {found}; it must be {arrays.TAKEN}")
        shape = tuple(interface["shape"])
        strides = interface.get("strides")
        if strides is not None and not contiguous(shape, tuple(strides), found.itemsize):
            raise ValueError(f"{label} is not C-contiguous (strides {tuple(strides)}); {advice(array)}")
        pointer, read_only = interface["data"]
        if read_only:
            raise ValueError(f"{label} is {kind(array)} that may only be read")
        number = number_of_device(array)
        if number not in (None, self.device.number):
            hint = f"pass target=CudaTarget(device={number}), or move it"
            raise ValueError(f"{label} is on CUDA device {number}, this optimizer on {self.device.number}; {hint}")
        if pointer % found.itemsize:
            raise ValueError(f"{label} is not aligned to its elements; {advice(array)}")
        return View(int(pointer or 0), shape, found, plain)

    def held(self, array: Array, label: str) -> Any:
        """The copy of an array of the host, in the same place as the last of this label."""
        if not self.warned:
            self.warned = True
            message = (
                f"{label} is in the memory of the host, and so it is copied to the CUDA device and back at every step; "
                "arrays that are on the device (PyTorch, CuPy, PyCUDA) are updated in place, which is much faster"
            )
            warnings.warn(message, PerformanceWarning, stacklevel=6)
        held = self.copies.get(label)
        if held is None or held.shape != array.shape or held.dtype != array.dtype:
            memory = self.device.allocate(array.nbytes)
            self.copies[label] = held = View(int(memory), array.shape, array.dtype, memory)
        if array.size:
            self.hosts[held.ptr] = array
        return held

    def pointer(self, array: Any) -> tuple[Callable[[], int], int] | None:
        """For an array that may be given other memory (PyTorch's): what tells its address, and the address now."""
        # A tensor that requires gradients is not asked for the interface, which it refuses.
        name = "__cuda_array_interface__"
        on_device = not hasattr(array, "data_ptr") and (hasattr(type(array), name) or hasattr(array, name))
        return None if on_device else arrays.pointer(array)

    def allocate(self, parameters: Sequence[Any], dtypes: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Zeroed arrays of as many elements as the parameters, of these dtypes or Scales for each, in one block."""
        sizes = [
            size_of(p, own) * np.dtype(own).itemsize
            for p, wanted in zip(parameters, dtypes, strict=True)
            for own in wanted
        ]
        ends = [0, *itertools.accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
        block, places = self.device.allocate(ends[-1], 0), iter(ends)
        return [
            [self.made((size_of(parameter, own),), np.dtype(own), block, next(places)) for own in wanted]
            for parameter, wanted in zip(parameters, dtypes, strict=True)
        ]

    def made(self, shape: tuple[int, ...], dtype: Any, block: Memory, place: int = 0) -> Any:
        """A GPUArray in a block of memory, which it keeps."""
        return self.device.array(shape, dtype, gpudata=int(block) + place, base=block)

    def number(self) -> Any:
        """Room for one double."""
        return self.made((1,), np.float64, self.device.allocate(8, 0))

    def memory(self, array: Any) -> Any:
        """The array whose memory is the owner's: that of the host, where this is a copy of one."""
        return self.hosts.get(array.ptr, array) if array.size else array

    def copy(self, array: Any) -> Any:
        """A copy, in memory of its own."""
        made = self.made(array.shape, array.dtype, self.device.allocate(array.nbytes))
        self.write(made, array)
        return made

    def begin(self, array: Any, values: Any, scales: Any = None) -> None:
        """Set state to a number, or to what the elements of another array are, in the format that it has."""
        if not hasattr(values, "ptr"):
            super().begin(array, values, scales)
        elif values.dtype == array.dtype:
            self.write(array, values)
        else:
            super().begin(array, self.read(values), scales)

    def write(self, array: Any, values: Any) -> None:
        """Set elements, in the memory of their owner, to those of another array, or all to one number."""
        array = self.memory(array)
        if hasattr(values, "ptr"):
            values = self.memory(values)
        if isinstance(array, np.ndarray):
            super().write(array.reshape(-1), self.read(values) if hasattr(values, "ptr") else values)
        elif array.size:
            with self.device:
                drv = self.device.drv
                drv.Context.synchronize()  # steps may go on in streams that copies do not wait for
                if hasattr(values, "ptr"):
                    drv.memcpy_dtod(array.ptr, values.ptr, array.nbytes)
                else:
                    with np.errstate(all="ignore"):
                        flat = np.reshape(values, -1) if np.ndim(values) else values
                        whole = np.ascontiguousarray(np.broadcast_to(flat, (array.size,)), array.dtype)
                    drv.memcpy_htod(array.ptr, whole)
                drv.Context.synchronize()  # and steps to come do not wait for copies

    def read(self, array: Any) -> Array:
        """The elements on the host: a copy, unless they are there."""
        array = self.memory(array)
        if isinstance(array, np.ndarray):
            return array.reshape(-1)
        values = np.empty(array.shape, array.dtype)
        if array.size:
            with self.device:
                self.device.drv.Context.synchronize()
                self.device.drv.memcpy_dtoh(values, array.ptr)
        return values


def is_bfloat16(dtype: Any) -> bool:
    """Whether a dtype of NumPy or of another library is bfloat16; the name of one of NumPy's is slow to tell."""
    if isinstance(dtype, np.dtype):
        return dtype.kind == "V" and dtype.name == "bfloat16"
    return str(dtype) == "torch.bfloat16"


def contiguous(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether an array is C-contiguous."""
    expected = itemsize
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected and 0 not in shape:
            return False
        expected *= length
    return True


def number_of_device(array: Any) -> int | None:
    """The number of the device that an array is on, as PyTorch and CuPy tell it; None where nobody tells."""
    own = getattr(array, "device", None)
    number = getattr(own, "index", None) if getattr(own, "type", None) == "cuda" else getattr(own, "id", None)
    return number if isinstance(number, int) else None
