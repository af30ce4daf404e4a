"""The arrays of a step looked at by compiled code in one call: some tens of nanoseconds for one of NumPy or PyTorch."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import struct
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...core.formats import FORMAT_OF, GIVEN
from ...core.functions import Array
from ..arrays import Ranges, address, teller
from ..inputs import Inputs
from ..tensor import Tensor
from .compile import library

FORM = np.dtype(
    [*((name, np.uintp) for name in ("shape", "strides")), ("bytes", np.uint64)]
    + [(name, np.int32) for name in ("ndim", "code", "bits")],
    align=True,
)
FLOAT, BFLOAT = 2, 4  # types of numbers, as DLPack calls them
ABSENT, FOUND, UNSIGNED, OTHER = range(4)  # what a gradient is, as inputs.c says
PARAMETERS, CHANGED, ASKED, MOVED = 1, 2, 4, 8  # what it leaves to do
KINDS = [*GIVEN]
BYTES = np.array([0, *(dtype.itemsize for dtype in KINDS)], np.uint64)  # of an element, by 1 and the number of its kind
POINTERS = "none item set attribute clear ndarray float32 float64 tensor parameter describe".split()
OFFSETS = "storage version object meta gradient keys".split()  # of what is in a tensor of PyTorch


class Struct(ctypes.Structure):
    """`Inputs` of inputs.c."""

    _fields_ = [
        ("head", ctypes.c_size_t),
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_size_t) for name in OFFSETS),
        ("negative", ctypes.c_uint64),
        ("count", ctypes.c_size_t),
        ("forms", ctypes.c_void_p),
        ("zero_grads", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("homes", "parameters", "gradients", "addresses")),
        ("ranges", ctypes.c_size_t),
        *((name, ctypes.c_void_p) for name in ("starts", "ends")),
    ]


@dataclass(frozen=True)
class Form:
    """What an array has to be; `strides` are in elements, C-contiguous where they are left out."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    strides: tuple[int, ...] | None = None

    @property
    def laid_out(self) -> tuple[int, ...]:
        """The strides."""
        if self.strides is not None:
            return self.strides
        return tuple(math.prod(self.shape[d + 1 :]) for d in range(len(self.shape)))


class Look:
    """One call that looks at parameters and gradients of these forms.

    Attributes
    ----------
    homes : array of uintp
        Where each parameter is known to be.
    parameters : array of uint8
        1 where a parameter is elsewhere, or is not what the compiled code knows.
    gradients : array of uint8
        What each gradient is: ABSENT, FOUND, UNSIGNED (found, but for its sign) or OTHER (not known).
    addresses : array of uintp
        Where each gradient is; 0 where it is not known, or has no elements.
    """

    def __init__(self, forms: Sequence[Form], zero_grads: bool = False):
        count = len(forms)
        self.homes, self.addresses = np.zeros(count, np.uintp), np.zeros(count, np.uintp)
        self.parameters, self.gradients = np.zeros(count, np.uint8), np.zeros(count, np.uint8)
        self.forms = np.zeros(count, FORM)
        self.lengths = np.array([n for form in forms for n in form.shape], np.int64)
        self.strides = np.array([n for form in forms for n in form.laid_out], np.int64)
        ndims = np.array([len(form.shape) for form in forms], np.int64)
        begins = 8 * (np.cumsum(ndims) - ndims)
        self.forms["shape"], self.forms["strides"] = address(self.lengths) + begins, address(self.strides) + begins
        self.forms["ndim"], self.forms["bits"] = ndims, [8 * form.dtype.itemsize for form in forms]
        self.forms["code"] = [BFLOAT if FORMAT_OF[form.dtype].name == "bf16" else FLOAT for form in forms]
        self.forms["bytes"] = [math.prod(form.shape) * form.dtype.itemsize for form in forms]
        self.struct = Struct(head=object.__basicsize__, count=count, zero_grads=zero_grads)
        for name in ("forms", "homes", "parameters", "gradients", "addresses"):
            setattr(self.struct, name, address(getattr(self, name)))
        self.calls, self.place = compiled(), ctypes.addressof(self.struct)

    def __call__(self, parameters: list[Any], gradients: list[Any], name: str | None = None) -> int:
        """Look at arrays, None where one is not to be looked at; what there is to do, as bits.

        With a name, gradients are read from the parameters under it, into the list.
        """
        return self.calls.optforge_inputs(self.place, parameters, gradients, name)  # type: ignore[no-any-return]

    def same(self, one: list[Any], other: list[Any]) -> bool:
        """Whether two lists of one length have the same objects."""
        return bool(self.calls.optforge_same(self.place, one, other, len(one)))

    def fetch_versions(self, tensors: list[Any]) -> None:
        """Have the processor fetch the versions of tensors, which are counted up next."""
        self.calls.optforge_fetch_versions(self.place, tensors, len(tensors))

    def know(self, pointers: dict[str, int]) -> None:
        """Tell it of the libraries whose arrays it is to look at itself."""
        for name, pointer in pointers.items():
            setattr(self.struct, name, pointer)

    def keep_apart(self, ranges: Ranges) -> None:
        """Leave gradients in this memory to Python."""
        self.ranges = np.array(ranges.starts, np.uintp), np.array(ranges.ends, np.uintp)
        self.struct.ranges = 0  # while the others change
        self.struct.starts, self.struct.ends = map(address, self.ranges)
        self.struct.ranges = len(ranges.starts)


@functools.cache
def compiled() -> Any:
    """The compiled functions, which are called with the interpreter's lock held."""
    text = Path(__file__).with_name("inputs.c").read_text(encoding="utf-8")
    calls = ctypes.PyDLL(str(library({"inputs.c": text})))
    calls.optforge_inputs.argtypes = (ctypes.c_void_p, *[ctypes.py_object] * 3)
    calls.optforge_same.argtypes = (ctypes.c_void_p, ctypes.py_object, ctypes.py_object, ctypes.c_size_t)
    calls.optforge_fetch_versions.argtypes = (ctypes.c_void_p, ctypes.py_object, ctypes.c_size_t)
    calls.optforge_fetch_versions.restype = None
    return calls


@functools.cache
def known_of_numpy() -> dict[str, int]:
    """The pointers by which arrays of NumPy are known."""
    names = {"item": "PyList_GetItem", "set": "PyList_SetItem", "attribute": "PyObject_GetAttr", "clear": "PyErr_Clear"}
    functions = {own: ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p) for own, name in names.items()}
    found = {name: pointer.value or 0 for name, pointer in functions.items()} | {"none": id(None)}
    numpy = {"ndarray": id(np.ndarray), "float32": id(np.dtype(np.float32)), "float64": id(np.dtype(np.float64))}
    probes: list[Array] = [np.zeros((2, 3), np.float32), np.zeros(4)]
    forms = [Form(probe.shape, probe.dtype) for probe in probes]
    return found | numpy if proven(found | numpy, forms, probes, list(map(address, probes))) else found


@functools.cache
def known_of_torch() -> dict[str, int]:
    """The same for tensors of PyTorch; none where it is too old to describe them."""
    torch: Any = sys.modules["torch"]
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return {}
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
    table = pointer(capsule, b"dlpack_exchange_api")
    major = ctypes.c_uint32.from_address(table).value
    # Behind its version and a pointer to an older one it has functions; the fourth describes a tensor.
    describe = (ctypes.c_void_p * 6).from_address(table)[5] if major == 1 else None
    if not describe:
        return {}
    found = {"tensor": id(torch.Tensor), "parameter": id(torch.nn.Parameter), "describe": describe}
    made = [torch.zeros(*shape, device="cpu") for shape in ((2, 3), (4,), (3, 2))]
    probes = [made[0].float(), torch.nn.Parameter(made[1].double()), made[2].bfloat16().T]
    forms = [Form((2, 3), np.dtype(np.float32)), Form((4,), np.dtype(np.float64))]
    forms += [Form((2, 3), np.dtype(np.uint16), (1, 2))]
    where = [probe.data_ptr() for probe in probes]
    found |= offsets_in_torch()
    return found if proven({**known_of_numpy(), **found}, forms, probes, where) else {}


def offsets_in_torch() -> dict[str, int]:
    """Where PyTorch keeps what belongs to a tensor, to fetch it ahead and see its sign; empty where that does not show.

    The words of a tensor with a gradient are compared with what it says of itself. Memory is read by way of a file,
    which answers with an error where there is none.
    """
    torch: Any = sys.modules["torch"]
    try:
        with torch.inference_mode(False), torch.no_grad(), open("/proc/self/mem", "rb", buffering=0) as memory:
            probe = torch.nn.Parameter(torch.zeros(4, device="cpu"))
            probe.grad = torch.ones(4, device="cpu")
            for _ in range(77):
                probe.zero_()
            wanted = {"storage": probe.untyped_storage()._cdata, "object": id(probe)}

            def words(at: int, count: int) -> list[int]:
                return [*struct.unpack(f"{count}Q", os.pread(memory.fileno(), 8 * count, at))]

            if words(id(probe) + object.__basicsize__, 1) != [probe._cdata]:
                return {}
            tensor = words(probe._cdata, 8)  # of its first line
            found = {name: 8 * tensor.index(pointer) for name, pointer in wanted.items()}
            for k, pointer in enumerate(tensor):
                if not 4096 < pointer < 1 << 47 or pointer in wanted.values():
                    continue  # no pointer, or another one
                near = words(pointer, 8)
                if probe.grad._cdata in near:
                    found |= {"meta": 8 * k, "gradient": 8 * near.index(probe.grad._cdata)}
                elif near[2] & 0xFFFFFFFF == probe._version == 77:  # behind its type and a count of references
                    found["version"] = 8 * k
            # A view of the other sign differs by a bit in what says which functions are for a tensor.
            both = probe.detach(), torch._neg_view(probe.detach())
            keys = [torch._C._dispatch_keys(view).raw_repr() for view in both]
            places = [
                [k for k, word in enumerate(words(view._cdata, 24)) if word == own]
                for view, own in zip(both, keys, strict=True)
            ]
            if len(places[0]) == 1 and places[0] == places[1]:
                found |= {"keys": 8 * places[0][0], "negative": keys[0] ^ keys[1]}
    except (AttributeError, OSError, OverflowError, RuntimeError, ValueError, struct.error):
        return {}
    return found if set(found) == {*OFFSETS, "negative"} else {}


def proven(pointers: dict[str, int], forms: Sequence[Form], probes: list[Any], where: list[int]) -> bool:
    """Whether arrays are found where they are: the compiled code relies on how libraries lay out their objects."""
    if sys.implementation.name != "cpython":
        return False
    look = Look(forms)
    look.know(pointers)
    look([None] * len(probes), probes)
    return {FOUND, UNSIGNED}.issuperset(look.gradients.tolist()) and look.addresses.tolist() == where


def form(space: Any, tensor: Tensor) -> Form:
    """What a parameter has to be, and its gradient: as the space has laid it out, where it has tensors of its own."""
    if not hasattr(space, "layout"):
        return Form(tensor.shape, tensor.p.dtype)
    shape, strides = space.layout(tensor.owner)
    return Form(shape, tensor.p.dtype, strides)


class NativeInputs(Inputs):
    """Looks at all arrays anew before each step, by compiled code, and keeps no gradient beyond it.

    What that code does not know, or finds otherwise than it should be, Python looks at, which has an error for it.

    Attributes
    ----------
    addresses : array of uintp
        Where the gradient of each tensor is; of a plan, `aim(addresses)` takes others of the same tensors.
    present : bytes
        For each tensor 0 where it has no gradient, else 1 and the number of the gradient's format in FORMAT_OF; an
        attribute of a plan too.
    table : object
        What an engine keeps for all plans, and a plan has from here; None where parameters are elsewhere since.
    """

    def __init__(self, tensors: Sequence[Tensor], space: Any, zero_grads: bool):
        super().__init__(tensors, space, zero_grads)
        self.look = Look([form(space, tensor) for tensor in tensors], zero_grads)
        self.addresses, self.present = self.look.addresses, b""
        self.usual = np.array([1 + KINDS.index(tensor.p.dtype) for tensor in tensors], np.uint8)
        self.kinds, self.mixed = self.usual.copy(), False  # of gradients: as a rule what their parameters are
        self.elements = np.array([tensor.p.size for tensor in tensors], np.uint64)
        # Others stay where they are as long as there is a view of them.
        self.owners = [tensor.owner if self.can_move(tensor.owner) else None for tensor in tensors]
        self.views: list[Any] = []  # of gradients that live in them alone
        self.settled = False  # whether the plan is right for what was found at the last step
        self.attribute: str | None = None  # of parameters, that gradients are read from
        self.knows_torch = False
        self.look.know(known_of_numpy())
        self.learn()
        self.lay_out()

    def learn(self) -> None:
        """Learn of PyTorch, once it is loaded."""
        if not self.knows_torch and "torch" in sys.modules:
            self.look.know(known_of_torch())
            self.knows_torch = True

    def lay_out(self) -> None:
        """Note where parameters and state are."""
        self.table: Any = None
        self.look.keep_apart(self.ranges)
        self.addresses[...] = 0  # so that all gradients are compared with those places
        self.look.homes[...] = self.homes()  # last: as long as they are not these, parameters are looked at again

    def homes(self) -> list[int]:
        """Where parameters are."""
        return [tensor.home for tensor in self.tensors]

    def take(self, grads: Sequence[Any], plan: Any) -> bool:
        """`Inputs.take`."""
        listed = grads if type(grads) is list else [*grads]
        settled, self.settled = self.settled and not self.mixed, False  # until all is well: this can end anywhere
        if self.mixed:
            self.kinds[...], self.mixed = self.usual, False
        found = self.look(self.owners, listed, self.attribute)
        if found & PARAMETERS and self.follow(np.flatnonzero(self.look.parameters).tolist()):
            found |= self.look(self.owners, listed)
        others = bool(found & ASKED) and self.ask(listed)
        same = plan is not None and plan.table is self.table  # which is another one where parameters are elsewhere
        if same and settled and not (found & CHANGED or others):
            if found & MOVED:
                if self.zero_grads:
                    self.check_gradients_apart()
                plan.aim(self.addresses)
            self.settled = True
            return True
        if self.zero_grads:
            self.check_gradients_apart()
        self.present = np.where(self.look.gradients != ABSENT, self.kinds, 0).astype(np.uint8).tobytes()
        if not same or plan.present != self.present:
            self.places = np.flatnonzero(self.look.gradients).tolist()
            return False
        plan.aim(self.addresses)
        self.settled = True
        return True

    def ask(self, grads: Sequence[Any]) -> bool:
        """Look closer at some gradients; whether there are any that the compiled code does not know.

        A tensor may be a view of a complex one, of elements with the other sign than in memory.
        """
        self.learn()
        others = False
        for place in np.flatnonzero(self.look.gradients >= UNSIGNED).tolist():
            if self.look.gradients[place] == OTHER or grads[place].is_neg():
                view = self.gradient(place, grads[place])
                self.views.append(view)
                self.kinds[place] = 1 + KINDS.index(view.dtype)
                self.mixed |= bool(self.kinds[place] != self.usual[place])
                self.addresses[place] = address(view) if view.size else 0
                others = True
        return others

    def check_gradients_apart(self) -> None:
        """Raise ValueError where two gradients overlap."""
        places = np.flatnonzero(self.addresses)
        places = places[np.argsort(self.addresses[places])]
        starts, sizes = self.addresses[places], (self.elements * BYTES[self.kinds])[places]
        for k in np.flatnonzero(starts[:-1] + sizes[:-1] > starts[1:]):
            first, second = (self.tensors[place].gradient_label for place in places[k : k + 2])
            raise ValueError(f"{first} and {second} overlap in memory")

    def follow(self, places: Collection[int] | None = None) -> bool:
        """`Inputs.follow`."""
        super().follow(places)
        if self.homes() == self.look.homes.tolist():
            return False
        self.lay_out()
        return True

    def same(self, one: Sequence[Any], other: Sequence[Any]) -> bool:
        """`Inputs.same`; no object is touched, which would be waited for."""
        if type(one) is list and type(other) is list and len(one) == len(other):
            return self.look.same(one, other)
        return super().same(one, other)

    def teller(self, tensors: Iterable[Any]) -> Callable[[], None] | None:
        """`Inputs.teller`."""
        return teller(tensors, self.look.fetch_versions if self.look.struct.version else None)

    def release(self) -> None:
        """The step is over."""
        if self.views:
            self.views = []
