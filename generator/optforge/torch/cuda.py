"""PyTorch's tensors on a GPU: stepped where they are, by the CUDA target, in the order of PyTorch's streams."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..core.diagnostics import UsageError
from ..engines.cuda.device import DeviceSpace, View
from ..engines.cuda.engine import CudaEngine
from ..engines.inputs import SameInputs
from .tensors import TensorSpace, laid_out, spelled

NUMPY: dict[Any, np.dtype[Any]] = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}


def flat(tensor: Any) -> View:
    """A view of the memory of a dense tensor on a device, with one dimension."""
    plain = tensor.detach().as_strided((tensor.numel(),), (1,))
    return View(plain.data_ptr(), (plain.numel(),), NUMPY[plain.dtype], plain)


class DeviceTensorSpace(TensorSpace, DeviceSpace):
    """Tensors on a device as flat arrays in memory order."""

    def __init__(self, number: int):
        DeviceSpace.__init__(self, number)
        TensorSpace.__init__(self)

    def flat(self, tensor: Any, label: str) -> Any:
        """`TensorSpace.flat`."""
        if tensor.dtype not in NUMPY:
            raise UsageError(f"{label} is {spelled(tensor)}; on a GPU it must be float32 or float64 so far")
        return flat(tensor)

    def tensor(self, array: Any) -> Any:
        """`TensorSpace.tensor`."""
        return torch.as_tensor(array, device=f"cuda:{self.device.number}")


class DeviceTensorInputs(SameInputs):
    """Looks at all gradients anew before each step, and keeps none beyond it."""

    def gradient(self, place: int, given: Any) -> Any:
        """`Inputs.gradient`."""
        return laid_out(self, place, given)

    def release(self) -> None:
        """The step is enqueued: memory that is given back now is used again behind it, in the same stream."""
        self.kept, self.gradients = [], []


class DeviceTarget:
    """The CUDA target over tensors of a device: pass it as `target` to `optforge.Optimizer`."""

    def __init__(self, number: int):
        self.number, self.made = number, list[DeviceTensorSpace]()

    def space(self) -> DeviceTensorSpace:
        """Where the tensors are."""
        self.made.append(DeviceTensorSpace(self.number))
        return self.made[-1]

    def __call__(self, rule: Any, kernel: Any) -> Any:
        """The engine of a rule, on the device's default stream."""
        engine = CudaEngine(rule, kernel, self.made[-1].device)
        engine.inputs = DeviceTensorInputs
        return engine


@contextlib.contextmanager
def in_order(device: Any) -> Iterator[None]:
    """Work on the default stream stands behind what PyTorch's current stream has, and before what comes there.

    Raises
    ------
    UsageError
        The stream is being captured.
    """
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    if torch.cuda.is_current_stream_capturing():
        raise UsageError("a step cannot be captured into a CUDA graph: leave it out of torch.cuda.graph")
    if current == default:
        yield
        return
    default.wait_stream(current)
    try:
        yield
    finally:
        current.wait_stream(default)
