"""The arrays of a step: parameters, which may be elsewhere than they were, and gradients, which may be new ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from operator import is_
from types import MappingProxyType
from typing import Any

import numpy as np

from ..core.formats import spelled
from .arrays import Forms, Ranges, address, teller
from .tensor import Tensor


class Inputs:
    """Looks at all arrays anew before each step, and keeps no gradient beyond it.

    An engine may name another class with these methods as its `inputs`.

    Parameters
    ----------
    tensors : sequence of Tensor
    space : Host
        Where arrays are.
    zero_grads : bool
        Whether gradients are written to.

    Attributes
    ----------
    places : list of int
        The tensors that have a gradient.
    gradients : list of arrays
        Theirs, flat, in the space; between steps there are none.

    Raises
    ------
    ValueError
        Two parameters overlap.
    """

    def __init__(self, tensors: Sequence[Tensor], space: Any, zero_grads: bool):
        self.tensors, self.space, self.zero_grads = tensors, space, zero_grads
        self.ranges = self.written()
        # NumPy resizes no array that there is a weak reference to, whatever its `refcheck` says.
        self.held = [weakref.ref(tensor.owner) for tensor in tensors if isinstance(tensor.owner, np.ndarray)]
        self.places: list[int] = []
        self.gradients: list[Any] = []

    def written(self, moved: Mapping[str, Any] = MappingProxyType({})) -> Ranges:
        """The memory that a step writes to, but gradients, where parameters of these labels are elsewhere now."""
        memory = self.space.memory
        arrays = [(tensor.label, memory(moved.get(tensor.label, tensor.p))) for tensor in self.tensors]
        for tensor in self.tensors:
            arrays += [(f"state[{name!r}]{tensor.path}", array) for name, array in tensor.arrays.items()]
        return Ranges(arrays)

    @property
    def stepped(self) -> list[Tensor]:
        """The tensors that have a gradient."""
        return [self.tensors[place] for place in self.places]

    def take(self, grads: Sequence[Any], plan: Any) -> bool:
        """Look at the arrays of a step, one gradient or None for each tensor; whether a plan made before does for them.

        Raises
        ------
        TypeError, ValueError
            One is not as it has to be.
        """
        self.follow()
        self.places, self.gradients = [], []
        for place, given in enumerate(grads):
            if given is not None:
                self.gradients.append(self.gradient(place, given))
                self.places.append(place)
        if self.zero_grads:
            self.check_gradients_apart()
        return False

    def gradient(self, place: int, given: Any) -> Any:
        """The gradient of a tensor as a flat array, checked."""
        tensor = self.tensors[place]
        label = tensor.gradient_label
        checked = self.space.gradient(given, label, tensor.shape, tensor.p.dtype, self.zero_grads)
        self.ranges.check_apart(self.space.memory(checked), label)
        return checked.reshape(-1)

    def check_gradients_apart(self) -> None:
        """Raise ValueError where two gradients overlap."""
        memory, pairs = self.space.memory, zip(self.stepped, self.gradients, strict=True)
        Ranges((tensor.gradient_label, memory(gradient)) for tensor, gradient in pairs)

    def follow(self, places: Collection[int] | None = None) -> bool:
        """Find the parameters, or those at some places, that were given other memory; whether there are any.

        Raises
        ------
        TypeError, ValueError
            One has become another one than it was.
        """
        moved = {}
        for tensor in self.tensors if places is None else [self.tensors[place] for place in places]:
            if self.can_move(tensor.owner):
                array = self.space.parameter(tensor.owner, tensor.label)
                if array.shape != tensor.shape or array.dtype != tensor.p.dtype:
                    now = f"{spelled(array.dtype)} of shape {array.shape}"
                    raise ValueError(f"{tensor.label} has become {now} since the optimizer was made")
                if address(self.space.memory(array)) != tensor.home:
                    moved[tensor.label] = array.reshape(-1)
        if moved:
            self.ranges = self.written(moved)
            for tensor in self.tensors:
                if tensor.label in moved:
                    tensor.place(moved[tensor.label])
        return bool(moved)

    def can_move(self, owner: Any) -> bool:
        """Whether a parameter's owner can be given other memory or another form, although there is a view of it."""
        return isinstance(owner, np.ndarray) or self.space.pointer(owner) is not None

    def same(self, one: Sequence[Any], other: Sequence[Any]) -> bool:
        """Whether two sequences have the same objects."""
        return same(one, other)

    def teller(self, tensors: Iterable[Any]) -> Callable[[], None] | None:
        """What tells a library that its tensors have been written to."""
        return teller(tensors)

    def release(self) -> None:
        """The step is over."""
        self.gradients = []


def same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two sequences have the same objects."""
    return len(one) == len(other) and all(map(is_, one, other))


class SameInputs(Inputs):
    """Looks at arrays only where they are others than at the last step, whose gradients it keeps."""

    def __init__(self, tensors: Sequence[Tensor], space: Any, zero_grads: bool):
        super().__init__(tensors, space, zero_grads)
        self.kept: list[Any] = []
        self.watched: list[tuple[Callable[[], int], int]] = []
        self.forms = Forms([], [])

    def take(self, grads: Sequence[Any], plan: Any) -> bool:
        """`Inputs.take`."""
        if (
            plan is not None
            and len(grads) == len(self.kept)
            and all(map(is_, grads, self.kept))
            and not any(ask() != at for ask, at in self.watched)
            and self.forms.hold()
        ):
            return True
        self.kept = []
        super().take(grads, plan)
        owners, given = [tensor.owner for tensor in self.tensors], [array for array in grads if array is not None]
        watched = [self.space.pointer(array) for array in (*owners, *given)]
        self.watched = [own for own in watched if own is not None]
        self.forms = Forms([] if self.zero_grads else given, [*owners, *(given if self.zero_grads else ())])
        self.kept = [*grads]
        return False

    def release(self) -> None:
        """The gradients are kept, with the plan."""
