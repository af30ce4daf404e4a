"""PyTorch's tensors as flat arrays over their memory, in whichever order their elements lie there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..core.formats import FORMAT_OF
from ..engines.arrays import TAKEN, kind
from ..engines.c.inputs import NativeInputs
from ..engines.host import Host
from ..engines.inputs import Inputs

TAKEN_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Moved(Exception):
    """A parameter has another form, dtype or device than when state was laid out for it."""


def local(tensor: Any) -> Any:
    """What this process has of a tensor: of a DTensor its own shard, else the tensor itself."""
    return tensor if not is_sharded(tensor) else landed(tensor._local_tensor)


def landed(tensor: Any) -> Any:
    """A tensor that a collective has maybe to deliver yet."""
    return tensor.wait() if hasattr(tensor, "wait") else tensor


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def layout(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a tensor."""
    return tuple(tensor.shape), tuple(tensor.stride())


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements lie behind each other, none twice, in the order of some permutation of the dimensions."""
    if 0 in shape:
        return True
    expected = 1
    for stride, length in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= length
    return True


def check(tensor: Any, label: str) -> None:
    """Raise where a tensor is no parameter that kernels can step in place.

    Raises
    ------
    TypeError, ValueError
        It is sparse, complex, negated, of another dtype, or its elements do not lie behind each other.
    """
    if torch.nn.parameter.is_lazy(tensor):
        raise ValueError(f"{label} has no shape yet: run the model once before the optimizer is made")
    if tensor.layout != torch.strided:
        raise TypeError(f"{label} is sparse ({tensor.layout}): parameters are dense; write p.data = p.data.to_dense()")
    if tensor.dtype.is_complex:
        advice = "make the parameter torch.view_as_real(p), and view_as_complex of it in the model"
        raise TypeError(f"{label} is {spelled(tensor)}, and kernels are for real numbers: {advice}")
    if tensor.dtype not in TAKEN_DTYPES:
        raise TypeError(f"{label} is {spelled(tensor)}; it must be {TAKEN}")
    if tensor.is_neg():
        advice = "before the optimizer is made, write p.data = p.data.resolve_neg() for it"
        raise ValueError(f"{label} is a view whose elements have the other sign than in memory: {advice}")
    if not is_dense(*layout(tensor)):
        raise ValueError(
            f"{label} has elements that do not lie behind each other in memory (shape {tuple(tensor.shape)}, strides "
            f"{tuple(tensor.stride())}): before the optimizer is made, write p.data = p.data.contiguous() for it"
        )


def spelled(tensor: Any) -> str:
    """The dtype of a tensor, for messages."""
    return str(tensor.dtype).removeprefix("torch.")


def flat(tensor: Any, label: str) -> Any:
    """A NumPy array of one dimension over the memory of a dense tensor on the CPU; of bfloat16 its bits.

    Raises
    ------
    TypeError
        It has no memory of its own, as tensors of some subclasses.
    """
    try:
        plain = tensor.detach().as_strided((tensor.numel(),), (1,))
        if plain.dtype == torch.bfloat16:
            return plain.view(torch.int16).numpy().view(np.uint16)
        return plain.numpy()
    except (TypeError, RuntimeError) as problem:
        reason = str(problem).strip().partition("\n")[0]
        raise TypeError(f"{label} is {kind(tensor)} that does not share its memory with NumPy: {reason}") from None


def on_gpu(tensor: Any) -> bool:
    """Whether a tensor is on a CUDA device."""
    return bool(tensor.device.type == "cuda")


class TensorSpace(Host):
    """Tensors on the CPU as flat arrays in memory order: what is dense, channels-last too, is stepped as it lies."""

    def __init__(self) -> None:
        self.forms: dict[int, Any] = {}  # of each parameter, by its id: what state was laid out for
        self.copied: list[Any] = []  # gradients that were copied into the layout of their parameter

    def parameter(self, array: Any, label: str) -> Any:
        """`Host.parameter`.

        Raises
        ------
        Moved
            It is another one than it was.
        """
        form = (*layout(array), array.dtype, array.device)
        if self.forms.setdefault(id(array), form) != form:
            raise Moved
        check(array, label)
        if array.numel() and type(array) in (torch.Tensor, torch.nn.Parameter) and not array.data_ptr():
            raise ValueError(f"{label} has no memory: that of its storage was freed")
        return self.flat(array, label)

    def flat(self, tensor: Any, label: str) -> Any:
        """An array of one dimension over the memory of a dense tensor."""
        return flat(tensor, label)

    def tensor(self, array: Any) -> Any:
        """A tensor over the memory of a flat array."""
        made = torch.from_numpy(array)
        return made.view(torch.bfloat16) if made.dtype == torch.uint16 else made

    def layout(self, owner: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides that a parameter and its gradient have."""
        shape, strides, _, _ = self.forms[id(owner)]
        return shape, strides

    def pointer(self, array: Any) -> tuple[Callable[[], int], int] | None:
        """`Host.pointer`."""
        return array.data_ptr, array.data_ptr()


def laid_out(inputs: Any, place: int, given: Any) -> Any:
    """The gradient of a tensor as a flat array in the layout of its parameter: a copy where it has another.

    Raises
    ------
    TypeError, ValueError
        It is no gradient of this parameter.
    """
    tensor = inputs.tensors[place]
    label, (shape, strides) = tensor.gradient_label, inputs.space.layout(tensor.owner)
    if not isinstance(given, torch.Tensor):
        raise TypeError(f"{label} is {kind(given)}, not a tensor")
    if given.layout != torch.strided:
        advice = "make it dense: sparse=False in nn.Embedding, or p.grad = p.grad.to_dense()"
        raise TypeError(f"{label} is sparse ({given.layout}), and kernels are for dense gradients: {advice}")
    if given.dtype not in TAKEN_DTYPES:
        raise TypeError(f"{label} is {spelled(given)}; it must be {TAKEN}")
    if given.device != tensor.owner.device:
        raise ValueError(f"{label} is on {given.device}, its parameter on {tensor.owner.device}")
    if tuple(given.shape) != shape:
        raise ValueError(f"{label} has the shape {tuple(given.shape)}, its parameter {shape}")
    plain = given.detach()
    unlike = any(n != 1 and own != s for n, own, s in zip(shape, plain.stride(), strides, strict=True))
    if (unlike and plain.numel()) or plain.is_neg():
        copy = torch.empty_strided(shape, strides, dtype=plain.dtype, device=plain.device)
        copy.copy_(plain)
        if inputs.zero_grads:
            inputs.space.copied.append(plain)
        plain = copy
    array = inputs.space.flat(plain, label)
    if FORMAT_OF[array.dtype].real is not FORMAT_OF[tensor.p.dtype].real:
        raise TypeError(f"{label} is {spelled(given)}, its parameter {spelled(tensor.owner)}")
    inputs.ranges.check_apart(inputs.space.memory(array), label)
    return array


class TensorInputs(Inputs):
    """`Inputs` of tensors."""

    def gradient(self, place: int, given: Any) -> Any:
        """`Inputs.gradient`."""
        return laid_out(self, place, given)


class NativeTensorInputs(NativeInputs):
    """`NativeInputs` of tensors: those with the layout of their parameter are found by compiled code."""

    def read(self) -> bool:
        """Read gradients from the parameters from here on, into the lists that `take` is given; whether it can."""
        self.learn()
        self.attribute = "grad" if self.look.struct.describe else None
        return self.attribute is not None

    def gradient(self, place: int, given: Any) -> Any:
        """`Inputs.gradient`."""
        return laid_out(self, place, given)
