"""Number formats: how arrays are stored, how they are loaded and stored, and which arrays of a rule have which.

A rule computes with float or double; what an array is stored as is a setting. Loading is exact. Storing rounds to
nearest even, or at random: up with a probability of what is dropped, by bits that are drawn from the seed, the step,
the tensor, the array and the element alone, so that they are the same everywhere. What has 8 bits has scales beside it.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from . import blocks
from .diagnostics import UsageError, nearest
from .dtypes import DTYPES, F32, F64, DType
from .functions import Array
from .ir import Kernel, State

# ── random bits ─────────────────────────────────────────────────────────────────────────────────────────────────────


def stir(x: int, more: int) -> int:
    """A step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) that takes in 64 more bits."""
    mask = (1 << 64) - 1
    x = ((x ^ more) + 0x9E3779B97F4A7C15) & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


def draw(seed: int, t: int, stream: int, array: int, begin: int, n: int) -> Array:
    """32 random bits for each of n elements of an array of a tensor, from element `begin` on.

    Parameters
    ----------
    seed : int
        Of all, 64 bits.
    t : int
        The tensor's own step, from 1.
    stream : int
        The number of the tensor.
    array : int
        The number of the array in the tensor: p is 0, g is 1, the state follows in the order of the signature.
    begin, n : int
        Elements of the whole tensor; every 2^32 have words of their own.

    Returns
    -------
    array of uint32
    """
    index = np.arange(begin, begin + n, dtype=np.uint64)
    bits = np.empty(n, np.uint32)
    for high in range(begin >> 32, (begin + max(n, 1) - 1 >> 32) + 1):
        own = index >> np.uint64(32) == high
        key = 0
        for word in (seed, t, stream, array, high):
            key = stir(key, word)
        x = index[own].astype(np.uint32) * np.uint32(0x9E3779B9) + np.uint32(key & 0xFFFFFFFF)
        x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D) ^ np.uint32(key >> 32)
        x = (x ^ x >> np.uint32(15)) * np.uint32(0x846CA68B)
        bits[own] = x ^ x >> np.uint32(16)
    return bits


# ── formats ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def same(values: Array, random: Array | None = None) -> Array:
    """What is stored as it is computed."""
    return values


def load_bf16(stored: Array) -> Array:
    """Bfloat16, the upper half of a float."""
    return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)


def store_bf16(values: Array, random: Array | None = None) -> Array:
    """Floats as bfloat16, to nearest even, or at random."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    add = np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    if random is not None:
        add = np.where(magnitude <= 0x7F7F0000, random >> np.uint32(16), add)
    quiet = bits >> np.uint32(16) & np.uint32(0x8000) | np.uint32(0x7FC0)
    with np.errstate(over="ignore"):
        return np.where(magnitude > 0x7F800000, quiet, bits + add >> np.uint32(16)).astype(np.uint16)


def load_f16(stored: Array) -> Array:
    """Half precision."""
    return stored.view(np.float16).astype(np.float32)


def store_f16(values: Array, random: Array | None = None) -> Array:
    """Floats in half precision, to nearest even, or at random."""
    values = np.ascontiguousarray(values, np.float32)
    with np.errstate(all="ignore"):
        to_nearest = values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    sign, magnitude = (bits >> np.uint32(16) & np.uint32(0x8000)).astype(np.uint16), bits & np.uint32(0x7FFFFFFF)
    if random is not None:
        with np.errstate(over="ignore"):
            normal = magnitude + (random >> np.uint32(19)) - np.uint32(112 << 23) >> np.uint32(13)
        # Below the least normal number they are multiples of 2^-24, and a fraction of 32 bits decides.
        units = np.where(magnitude < 0x38800000, np.abs(values), 0).astype(np.float64) * 2.0**24
        whole = np.floor(units)
        small = whole.astype(np.uint32) + (random < np.floor((units - whole) * 2.0**32))
        drawn = np.where(magnitude < 0x38800000, small, normal).astype(np.uint16) | sign
        to_nearest = np.where(magnitude <= 0x477FE000, drawn, to_nearest)
    return np.where(magnitude > 0x7F800000, sign | np.uint16(0x7E00), to_nearest).astype(np.uint16).view(np.float16)


def in_blocks(signed: bool) -> tuple[Callable[..., Array], Callable[..., tuple[Array, Array]]]:
    """How codes of 8 bits are loaded and stored, with the scales of their blocks; never at random."""

    def load(codes: Array, scales: Array) -> Array:
        return blocks.load(codes, scales, signed)

    def store(values: Array, random: Array | None = None) -> tuple[Array, Array]:
        return blocks.store(values, signed)

    return load, store


@dataclass(frozen=True)
class Format:
    """A way to store an array.

    `name` is what users write, `c` the type of an element, `numpy` the dtype that holds its bits; `real` is what is
    computed with. `load` and `store` convert NumPy arrays; `store` takes random bits where it shall round at random.
    Where there are `scales`, one for each block, `load` takes them as well, and `store` gives both.
    """

    name: str
    numpy: type[np.generic]
    c: str
    real: DType
    load: Callable[..., Array] = field(default=same, repr=False)
    store: Callable[..., Any] = field(default=same, repr=False)
    scales: bool = False

    @property
    def bytes(self) -> int:
        """Size of one element."""
        return np.dtype(self.numpy).itemsize

    @property
    def cost(self) -> float:
        """Bytes of an element with its share of the scale."""
        return self.bytes + 4 / blocks.BLOCK if self.scales else self.bytes

    @property
    def narrow(self) -> bool:
        """Whether storing rounds."""
        return self.load is not same


FORMATS: dict[str, Format] = {
    made.name: made
    for made in (
        Format("f32", np.float32, "float", F32),
        Format("f64", np.float64, "double", F64),
        Format("bf16", np.uint16, "uint16_t", F32, load_bf16, store_bf16),
        Format("f16", np.float16, "uint16_t", F32, load_f16, store_f16),
        # That codes have a sign is what tells the two apart; the bits are those of a uint8.
        Format("q8", np.int8, "uint8_t", F32, *in_blocks(signed=True), scales=True),
        Format("uq8", np.uint8, "uint8_t", F32, *in_blocks(signed=False), scales=True),
    )
}

FORMAT_OF: dict[np.dtype[np.generic], Format] = {np.dtype(own.numpy): own for own in FORMATS.values()}
GIVEN = {dtype: own for dtype, own in FORMAT_OF.items() if not own.scales}  # what parameters and gradients can have


@dataclass(frozen=True)
class Master:
    """What p is rounded from: an array beside it, which is one more state.

    `name` is what users see, `format` holds its bits, `code` is what the runtime calls it (OPTFORGE_F32), and `initial`
    how it begins, as of a State.
    """

    name: str
    format: Format
    code: str
    initial: float | str


MASTERS: dict[str, Master] = {
    "f32": Master("p_master", FORMATS["f32"], "F32", "p"),
    "split": Master("p_low", FORMATS["bf16"], "LOW", 0.0),
}
ROUNDINGS = ("nearest", "stochastic")
MOST_NARROW = 32  # arrays that the runtime converts at once, where some are in blocks


def join(stored: Array, low: Array) -> Array:
    """The floats that bfloat16 numbers and what they left are."""
    upper = stored.astype(np.uint32) << np.uint32(16)
    with np.errstate(over="ignore"):
        return (upper + low.view(np.int16).astype(np.int32).view(np.uint32)).view(np.float32)


def split(values: Array) -> tuple[Array, Array]:
    """Floats as bfloat16 numbers, ties away from zero, and what those leave; a NaN leaves nothing."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nan = (bits & np.uint32(0x7FFFFFFF)) > 0x7F800000
    bits = np.where(nan, bits & np.uint32(0x80000000) | np.uint32(0x7FC00000), bits)
    with np.errstate(over="ignore"):
        return (bits + np.uint32(0x8000) >> np.uint32(16)).astype(np.uint16), bits.astype(np.uint16)


def raw(array: Array) -> Array:
    """An array of whatever NumPy knows as bfloat16 as the bits of it; others as they are."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def spelled(dtype: np.dtype[Any]) -> str:
    """The dtype of an array as users know it."""
    return {"uint16": "bfloat16", "int8": "uint8"}.get(str(dtype), str(dtype))


def shown(array: Array) -> Array:
    """The bits of bfloat16 numbers as NumPy shows them where ml_dtypes is there, codes without a sign; others as is."""
    if array.dtype == np.int8:
        return array.view(np.uint8)
    if array.dtype == np.uint16:
        with contextlib.suppress(ImportError):
            ml_dtypes = importlib.import_module("ml_dtypes")

            return array.view(ml_dtypes.bfloat16)
    return array


def whole(stored: Array, beside: Array) -> Array:
    """What p is in full, from p and the array beside it: a master of floats, or what it leaves."""
    return beside if beside.dtype == np.float32 else join(stored, beside)


def parted(values: Array, dtype: np.dtype[np.generic], p: Format) -> tuple[Array, Array]:
    """New values of p, as p and the array beside it of this dtype hold them."""
    return (p.store(values), values) if dtype == np.float32 else split(values)


# ── which arrays have which ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Storage:
    """How the arrays of a tensor are stored: the format of p, g and each state that is an array, by name.

    Behind them are the master, if there is one, and the scales of those that are in blocks, in their order. `suffix`
    ends the names of what is emitted for it. With a `master`, "f32" or "split", p is rounded from it: all of p is in
    floats beside it, or in what it leaves. `stochastic` says that the others are rounded at random.
    """

    suffix: str
    formats: tuple[tuple[str, Format], ...]
    master: str = ""
    stochastic: bool = False

    def __getitem__(self, name: str) -> Format:
        return dict(self.formats)[name]

    @property
    def real(self) -> DType:
        """What is computed with."""
        return self["p"].real

    @property
    def inexact(self) -> frozenset[str]:
        """The arrays that do not hold what was computed."""
        return frozenset(name for name, own in self.formats if own.narrow and not (name == "p" and self.master))

    @property
    def beside(self) -> Master | None:
        """What p is rounded from, if there is a master."""
        return MASTERS.get(self.master)

    @property
    def scaled(self) -> tuple[str, ...]:
        """The arrays that are in blocks, whose scales are in arrays of their own."""
        return tuple(name for name, own in self.formats if own.scales)

    def read(self, name: str) -> float:
        """Bytes that are read to load an element."""
        if name == "p" and self.master:
            return 4
        return self[name].cost

    def written(self, name: str) -> float:
        """Bytes that are written to store an element."""
        return self[name].cost + (self.beside.format.bytes if name == "p" and self.beside else 0)

    def moved(self, loads: Iterable[str], stores: Iterable[str]) -> float:
        """Bytes that a pass moves per element."""
        return sum(map(self.read, loads)) + sum(map(self.written, stores))

    @property
    def title(self) -> str:
        """What comments call it."""
        return self.real.c if self.suffix == self.real.suffix else self.suffix

    def comment(self) -> str:
        """What is not stored as it is computed with; empty where all is."""
        words: dict[str, list[str]] = {}
        for name, own in self.formats:
            if own.narrow:
                words.setdefault(own.name, []).append(name)
        text = "; ".join(f"{' '.join(names)} as {format}" for format, names in words.items())
        text += f", p rounded from its master {self.beside.name}" if self.beside else ""
        text += ", rounded at random" if self.stochastic else ""
        scales = " ".join(name + blocks.SCALES for name in self.scaled)
        return text + (f"; {scales}: a float for {blocks.BLOCK} elements, or for fewer at the end" if scales else "")

    def flags(self) -> list[str]:
        """The options of the command line that ask for it."""
        changed = [f"{name}={own.name}" for name, own in self.formats if own.name != self.real.suffix]
        flags = [f"--store {','.join(changed)}"] if changed else []
        flags += [f"--master {self.master}"] if self.master else []
        flags += ["--rounding stochastic"] if self.stochastic else []
        return [*flags, f"--suffix {self.suffix}"] if flags else []


def size(bytes: float) -> str:
    """A number of bytes as people read it."""
    return f"{round(bytes, 2):g}"


def plain(dtype: DType, arrays: Sequence[str]) -> Storage:
    """All arrays stored as they are computed with."""
    return Storage(dtype.suffix, tuple((name, FORMATS[dtype.suffix]) for name in arrays))


def parse_store(given: Iterable[str] | None) -> dict[str, str]:
    """What `p=bf16,g=bf16` says, and others like it.

    Raises
    ------
    UsageError
        It is written otherwise.
    """
    store: dict[str, str] = {}
    for pair in (pair for text in given or () for pair in text.split(",")):
        name, equals, format = (part.strip() for part in pair.partition("="))
        if not (name and equals and format):
            raise UsageError(f"--store takes ARRAY=FORMAT, as in p=bf16,g=bf16, not {pair!r}")
        if store.get(name, format) != format:
            raise UsageError(f"--store gives {name} two formats")
        store[name] = format
    return store


def storage(
    arrays: Sequence[str],
    store: Mapping[str, str],
    master: str | None = None,
    rounding: str = "nearest",
    suffix: str | None = None,
    others: Sequence[str] = (),
) -> Storage:
    """How arrays are stored that have these formats; those without one are f32, or f64 where p or g is.

    Parameters
    ----------
    arrays : sequence of str
        "p", "g" and the state that is an array.
    store : mapping of str to str
        Array to format.
    master : str, optional
        "f32" or "split".
    rounding : str
        "nearest" or "stochastic".
    suffix : str, optional
        Ends the names of what is emitted; told from the formats if left out.
    others : sequence of str
        State that is one number per tensor, which has no format.

    Raises
    ------
    UsageError
        There is no such array, format, master or rounding, or they do not go together.
    """
    for name, format in store.items():
        if name in others:
            raise UsageError(f"{name} is one double per tensor, which has no other format")
        if name not in arrays:
            raise UsageError(f"there is no array {name!r}{nearest(name, arrays)} (there are {', '.join(arrays)})")
        if format not in FORMATS:
            listed = ", ".join(FORMATS)
            raise UsageError(
                f"{name}: there is no format {format!r}{nearest(str(format), FORMATS)} (there are {listed})"
            )
    if master is not None and master not in MASTERS:
        raise UsageError(f"master is {' or '.join(map(repr, MASTERS))}, not {master!r}")
    if rounding not in ROUNDINGS:
        raise UsageError(f"rounding is {' or '.join(map(repr, ROUNDINGS))}, not {rounding!r}")
    doubles = [name for name, format in store.items() if format == "f64"]
    usual = "f64" if doubles else "f32"
    formats = tuple((name, FORMATS[store.get(name, usual)]) for name in arrays)
    for name, own in formats[:2]:
        if own.scales:
            raise UsageError(f"{own.name} is for state, and {name} is none: it is f32, f64, bf16 or f16")
    mixed = [f"{name} as {own.name}" for name, own in formats if doubles and own.name != "f64"]
    if mixed:
        raise UsageError(f"{doubles[0]} is f64, and what is computed in double is stored in it, not {mixed[0]}")
    if any(own.scales for _, own in formats) and sum(own.narrow for _, own in formats) > MOST_NARROW:
        raise UsageError(f"more than {MOST_NARROW} arrays of 16 and 8 bits have no room: leave some of the state f32")
    made = Storage(suffix or "", formats, master or "", rounding == "stochastic")
    p = made["p"].name
    if master and not made["p"].narrow:
        raise UsageError(f"a master is beside p where p is bf16 or f16, and p is {p}")
    if master == "split" and p != "bf16":
        raise UsageError(f"a split master is beside p where p is bf16, and p is {p}; master='f32' is for f16 too")
    if master == "split" and made.stochastic:
        raise UsageError("a split master has p to nearest: choose rounding='nearest', or master='f32'")
    if suffix is None:
        return Storage(telling(made), formats, made.master, made.stochastic)
    check_suffix(made)
    return made


def check_suffix(made: Storage) -> None:
    """Raise UsageError where emitted names cannot end with a suffix that was given."""
    if not re.fullmatch(r"\w+", made.suffix, re.ASCII):
        raise UsageError(f"the suffix {made.suffix!r} cannot end a C identifier: letters, digits and _ can")
    if made.suffix in DTYPES and made.comment():
        raise UsageError(f"the suffix {made.suffix!r} is that of {made.suffix} arrays: give another suffix")
    if made.suffix.startswith("with_"):
        raise UsageError(f"the suffix {made.suffix!r} would end names like those of step_with: give another suffix")


def telling(made: Storage) -> str:
    """A suffix that says how arrays are stored: p's format, and what is not usual beside it."""
    p = made["p"].name
    words = [p]
    for name, own in made.formats[1:]:
        usual = p if name == "g" else made.real.suffix
        words += [name, own.name] if own.name != usual else []
    words += [f"master_{made.master}"] if made.master == "f32" else [made.master] if made.master else []
    words += ["stochastic"] if made.stochastic else []
    return "_".join(words)


def with_beside(kernel: Kernel, master: str | None, scaled: Sequence[str] = ()) -> Kernel:
    """A kernel whose state has what is beside p as well, and the scales of these arrays.

    Raises
    ------
    UsageError
        The rule has a state of that name.
    """
    added = [State(MASTERS[master].name, MASTERS[master].initial)] if master is not None else []
    added += [State(name + blocks.SCALES, 0.0) for name in scaled]
    for own in added:
        if own.name in (state.name for state in kernel.state):
            what = "the master is" if own.name.startswith("p_") else "an array of scales is"
            raise UsageError(f"{what} called {own.name!r}, and so is a state of the rule: rename that")
    return replace(kernel, state=(*kernel.state, *added))


def without_beside(kernel: Kernel, master: str, scaled: Sequence[str] = ()) -> Kernel:
    """A kernel as it was before `with_beside`."""
    count = bool(master) + len(scaled)
    return replace(kernel, state=kernel.state[: len(kernel.state) - count])


@dataclass(frozen=True)
class Wanted:
    """What a user asks for: dtypes that all arrays have, and a `storage` of their own. None of both is every dtype."""

    dtypes: Sequence[str] | str | None = None
    store: Mapping[str, str] | None = None
    master: str | None = None
    rounding: str = "nearest"
    suffix: str | None = None

    @property
    def own(self) -> bool:
        """Whether there is a storage beside dtypes that all arrays have."""
        return bool(self.store) or self.master is not None or self.rounding != "nearest"

    def storages(self, kernel: Kernel) -> tuple[Storage, ...]:
        """The ways to store the arrays of a kernel.

        Raises
        ------
        UsageError
            There is no such dtype, or as of `storage`.
        """
        own = self.own
        names = self.dtypes if self.dtypes is not None else [] if own else [*DTYPES]
        names = [names] if isinstance(names, str) else [*names]
        for name in names:
            if name not in DTYPES:
                hint = f"; arrays of {name} are asked for by store" if name in FORMATS else ""
                raise UsageError(f"there is no dtype {name!r} (there are {', '.join(DTYPES)}){hint}")
        if self.suffix is not None and not own:
            raise UsageError("a suffix is for arrays that are stored otherwise: give store as well")
        if not names and not own:
            raise UsageError("at least one dtype is needed")
        found = [plain(dtype, kernel.arrays) for name, dtype in DTYPES.items() if name in names]
        if own:
            scalar = [state.name for state in kernel.scalar_state]
            args = (self.store or {}, self.master, self.rounding, self.suffix, scalar)
            found.append(storage(kernel.arrays, *args))
            if found[-1].stochastic and not any(each.narrow and not each.scales for _, each in found[-1].formats):
                raise UsageError("rounding is of arrays that are bf16 or f16, and none is: give store as well")
        if len({each.suffix for each in found}) < len(found):
            raise UsageError(f"two kinds of tensors end with {found[-1].suffix!r}: give another suffix")
        return tuple(found)
