"""Number formats: how arrays are stored, by their values, and a step over arrays that are stored so.

A bf16 number has 8 bits of exponent and 7 of fraction, an f16 number 5 and 10; both are laid out as IEEE 754 lays out
its formats, with infinities and NaN. All of their values are tabled here from the definition. A float lies between two
neighbours of the table, and everything about rounding is said of the two: which is nearer, which has an even code, how
far along the gap the float is. Those distances are exact in double, so there are no bits to handle, but in the hash.

The rule computes with float32. A master f32 is the parameter as computed, in an array beside p. A master split is the
parameter as computed too, but the array beside p holds 16 bits that are missing: bits = (p << 16) + low, low signed.

A q8 or uq8 number is a code of 8 bits for one of 256 numbers, times the largest magnitude of its block of 256 elements,
which is beside the array.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _phase
from ._tree import global_norm, norm

Array = NDArray[Any]

EXPONENT_BITS = {"bf16": 8, "f16": 5}
NAN = {"bf16": 0x7FC0, "f16": 0x7E00}


@cache
def magnitudes(name: str) -> NDArray[np.float64]:
    """The values of the codes 0, 1, … of the finite numbers without a sign, ascending."""
    bits = EXPONENT_BITS[name]
    fraction_bits, bias = 15 - bits, 2 ** (bits - 1) - 1
    codes = np.arange((2**bits - 1) * 2**fraction_bits)
    exponent, fraction = codes // 2**fraction_bits, codes % 2**fraction_bits
    whole = np.where(exponent == 0, fraction, 2**fraction_bits + fraction)
    return np.ldexp(whole.astype(np.float64), np.maximum(exponent, 1) - bias - fraction_bits)


@cache
def values(name: str) -> NDArray[np.float32]:
    """The values of all 65,536 codes."""
    upper = np.full(0x8000 - magnitudes(name).size, np.nan)
    upper[0] = np.inf
    positive = np.concatenate([magnitudes(name), upper])
    return np.concatenate([positive, -positive]).astype(np.float32)


def load(name: str, stored: Array) -> Array:
    """Return the values that are stored."""
    return values(name)[stored] if name in EXPONENT_BITS else stored.copy()


def between(name: str, x: Array) -> tuple[Array, Array]:
    """Return the codes of the numbers at or below |x|, and how far along the gap to the next numbers |x| is, from 0 on.

    Above the largest finite number is a gap like the one below it.
    """
    table = magnitudes(name)
    size = np.abs(np.where(np.isfinite(x), x, 0)).astype(np.float64)
    code = np.searchsorted(table, size, side="right") - 1
    above = np.append(table, 2 * table[-1] - table[-2])[code + 1]
    return code, (size - table[code]) / (above - table[code])


def coded(name: str, x: Array, code: Array) -> Array:
    """Return codes with signs, infinities and NaN put in."""
    infinite = magnitudes(name).size
    code = np.where(np.isinf(x), infinite, np.minimum(code, infinite))
    code = np.where(np.isnan(x), NAN[name], code)
    return np.where(np.signbit(x), code + 0x8000, code).astype(np.uint16)


def nearest(name: str, x: Array) -> Array:
    """Round to nearest, ties to the even code."""
    code, share = between(name, x)
    up = (share > 0.5) | ((share == 0.5) & (code % 2 == 1))
    return coded(name, x, code + up)


def away(name: str, x: Array) -> Array:
    """Round to nearest, ties away from zero."""
    code, share = between(name, x)
    return coded(name, x, code + (share >= 0.5))


def stochastic(name: str, x: Array, draws: Array) -> Array:
    """Round up with the probability of the share of the gap, decided by 32 bits each; as to nearest beyond the largest
    finite number.

    The upper bits of a draw, as many as are dropped of the float, are added to those; where they carry it is up. The
    numbers below the least normal f16 drop more than that, and compare all 32 bits.
    """
    code, share = between(name, x)
    dropped = {"bf16": 16, "f16": 13}[name]
    up = (draws >> np.uint64(32 - dropped)).astype(np.float64) + share * 2**dropped >= 2**dropped
    if name == "f16":
        small = code < 2**10
        up = np.where(small, draws.astype(np.float64) < np.floor(share * 2.0**32), up)
    beyond = ~(np.abs(x) <= np.float32(magnitudes(name)[-1]))
    return np.where(beyond, nearest(name, x), coded(name, x, code + up))


# ── blocks of 8 bits ────────────────────────────────────────────────────────────────────────────────────────────────

BLOCKS = ("q8", "uq8")


@cache
def numbers(name: str) -> NDArray[np.float32]:
    """The 256 numbers, ascending: 0, 1, and in each decade from 1e-7 on, up to 1, the middles of equal parts.

    That is `create_dynamic_map` of bitsandbytes, with what `torch.linspace` gives: edges that are rounded once.
    """
    made = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade if name == "q8" else 2 ** (decade + 1)
        step = (np.float32(1) - np.float32(0.1)) / np.float32(count)
        edges = []
        for k in range(count + 1):
            exact = Fraction(float(step)) * k + Fraction(float(np.float32(0.1)))
            if k >= (count + 1) // 2:
                exact = 1 - Fraction(float(step)) * (count - k)
            edges.append(np.float32(float(exact)))
        for low, high in pairwise(edges):
            middle = np.float32(10.0 ** (decade - 6)) * ((low + high) / np.float32(2))
            made += [float(middle), -float(middle)] if name == "q8" else [float(middle)]
    assert len(made) == 256
    return np.array(sorted(made), np.float32)


def in_blocks(x: Array) -> Iterator[tuple[int, Array]]:
    """Return each block of an array with its number; the last may be short."""
    for block, start in enumerate(range(0, x.size, 256)):
        yield block, x[start : start + 256]


def load_blocks(name: str, stored: Array, absmax: Array) -> Array:
    """Return the floats that codes of these scales are."""
    made = [np.zeros(0, np.float32)]
    with np.errstate(all="ignore"):
        made += [numbers(name)[own.view(np.uint8)] * absmax[block] for block, own in in_blocks(stored)]
    return np.concatenate(made)


def store_blocks(name: str, x: Array) -> tuple[Array, Array]:
    """Return codes, of the nearest numbers, from the midpoint of two that of the lower; and the scales."""
    table, zero = numbers(name).astype(np.float64), int(np.flatnonzero(numbers(name) == 0)[0])
    codes, scales = np.full(x.size, zero, np.uint8), np.zeros((x.size + 255) // 256, np.float32)
    for block, own in in_blocks(x):
        if not np.isfinite(own).all():
            scales[block] = np.nan
            continue
        positive = np.where(own < 0, np.float32(0), own) if name == "uq8" else own
        scales[block] = np.abs(positive).max()
        if scales[block] > 0:
            share = (positive / scales[block]).astype(np.float64)
            low = np.searchsorted(table, share, side="right") - 1
            low = np.clip(low, 0, 254)
            up = table[low + 1] - share < share - table[low]
            codes[256 * block : 256 * block + own.size] = low + up
    return codes, scales


# ── random bits ─────────────────────────────────────────────────────────────────────────────────────────────────────


def stir(x: int, more: int) -> int:
    """Return 64 bits into which 64 more have been stirred."""
    x = ((x ^ more) + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x // 2**30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x // 2**27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x // 2**31)


def one_draw(seed: int, t: int, stream: int, array: int, index: int) -> int:
    """Return the 32 bits of one element, in integers of any size."""
    key = 0
    for word in (seed, t, stream, array, index // 2**32):
        key = stir(key, word)
    x = (index * 0x9E3779B9 + key) % 2**32
    x = ((x ^ (x // 2**16)) * 0x7FEB352D) % 2**32 ^ (key // 2**32)
    x = (x ^ (x // 2**15)) * 0x846CA68B % 2**32
    return x ^ (x // 2**16)


def draws(seed: int, t: int, stream: int, array: int, indices: Array) -> NDArray[np.uint64]:
    """Return what `one_draw` returns, for many indices below 2^64."""
    low = np.uint64(2**32 - 1)
    drawn = np.empty(indices.shape, np.uint64)
    highs = indices.astype(np.uint64) >> np.uint64(32)
    for high in np.unique(highs):
        key = 0
        for word in (seed, t, stream, array, int(high)):
            key = stir(key, word)
        here = highs == high
        x = ((indices[here].astype(np.uint64) & low) * np.uint64(0x9E3779B9) + np.uint64(key % 2**32)) & low
        x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x7FEB352D)) & low
        x = x ^ np.uint64(key // 2**32)
        x = ((x ^ (x >> np.uint64(15))) * np.uint64(0x846CA68B)) & low
        drawn[here] = x ^ (x >> np.uint64(16))
    return drawn


# ── the parameter beside its master ─────────────────────────────────────────────────────────────────────────────────


def signed(low: Array) -> Array:
    """Return 16 bits as numbers from -32,768 on."""
    own = low.astype(np.int64)
    return np.where(own >= 2**15, own - 2**16, own)


def join(p: Array, low: Array) -> NDArray[np.float32]:
    """Return the floats that are split into p and `low`."""
    return ((p.astype(np.int64) * 2**16 + signed(low)) % 2**32).astype(np.uint32).view(np.float32)


def split(x: Array) -> tuple[Array, Array]:
    """Return p, which is x rounded to bf16 with ties away from zero, and the 16 bits that it leaves, 0 of a NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.int64)
    low = np.where(np.isnan(x), 0, bits % 2**16).astype(np.uint16)
    return away("bf16", x), low


# ── storage ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Formats:
    """The formats of arrays by name, those that are f32 left out; "f32" or "split" beside p, if anything is."""

    of: Mapping[str, str]
    master: str = ""
    stochastic: bool = False

    def beside(self) -> str:
        """Return the name of the array beside p, if there is one."""
        return {"": "", "f32": "p_master", "split": "p_low"}[self.master]

    def scales(self) -> list[str]:
        """Return the names of the arrays of scales."""
        return [f"{name}_absmax" for name, own in self.of.items() if own in BLOCKS]


def load_all(formats: Formats, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return p, g and the state as they are computed with, by name."""
    loaded = {}
    for name, x in stored.items():
        own = formats.of.get(name, "f32")
        if own in BLOCKS:
            loaded[name] = load_blocks(own, x, stored[f"{name}_absmax"])
        elif name != formats.beside() and name not in formats.scales():
            loaded[name] = load(own, x) if isinstance(x, np.ndarray) else x
    if formats.master == "f32":
        loaded["p"] = stored["p_master"].copy()
    elif formats.master == "split":
        loaded["p"] = join(stored["p"], stored["p_low"])
    return loaded


def store_all(
    formats: Formats, new: Mapping[str, Any], order: Sequence[str], *, seed: int, t: int, stream: int
) -> dict[str, Any]:
    """Return a parameter and its state as they are stored; `order` is p, g and the state as the rule has them."""
    stored: dict[str, Any] = {}
    for number, name in enumerate(order):
        x, own = new.get(name), formats.of.get(name, "f32")
        if name == "g":
            continue
        if name == "p" and formats.master == "f32":
            stored |= {"p": nearest(own, x), "p_master": x}
        elif name == "p" and formats.master == "split":
            stored["p"], stored["p_low"] = split(x)
        elif own == "f32":
            stored[name] = x
        elif own in BLOCKS:
            stored[name], stored[f"{name}_absmax"] = store_blocks(own, x)
        elif formats.stochastic:
            drawn = draws(seed, t, stream, number, np.arange(x.size, dtype=np.uint64))
            stored[name] = stochastic(own, x, drawn)
        else:
            stored[name] = nearest(own, x)
    return stored


def begin(formats: Formats, p: Array, g: Array, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tensor at its beginning: float32 arrays as they are stored, to nearest."""
    whole = {"p": p, "g": g, **state}
    stored = {}
    for name, x in whole.items():
        own = formats.of.get(name, "f32")
        if own in BLOCKS:
            stored[name], stored[f"{name}_absmax"] = store_blocks(own, x)
        else:
            stored[name] = nearest(own, x) if isinstance(x, np.ndarray) and own != "f32" else x
    if formats.master:
        p = load(formats.of["p"], stored["p"])
        stored[formats.beside()] = p if formats.master == "f32" else np.zeros(p.size, np.uint16)
    return stored


@dataclass(frozen=True)
class Step:
    """What a step leaves: tensors as they are stored, and statistics."""

    tensors: list[dict[str, Any]]
    skipped: bool
    stats: _phase.Stats


def step(
    formats: Sequence[Formats],
    tensors: Sequence[Mapping[str, Any]],
    t: int,
    oracle_module: ModuleType | Any,
    transforms: Sequence[tuple[_phase.Transform, dict[str, Any]]],
    hyper: dict[str, float],
    *,
    order: Sequence[str],
    seed: int = 0,
    streams: Sequence[int] | None = None,
    grad_scale: float | None = None,
    skip_nonfinite: bool = False,
    zero_grads: bool = False,
) -> Step:
    """Return the outcome of step `t` over tensors with formats of their own.

    `order` is p, g and the state; `streams` numbers the tensors for their random bits, in order if it is left out.
    """
    loaded = [load_all(own, x) for own, x in zip(formats, tensors, strict=True)]
    states = [{name: x for name, x in own.items() if name not in ("p", "g")} for own in loaded]
    outcome = _phase.phase(
        [own["p"] for own in loaded],
        [own["g"] for own in loaded],
        states,
        t,
        oracle_module,
        transforms,
        hyper,
        grad_scale=grad_scale,
        skip_nonfinite=skip_nonfinite,
    )
    after: list[dict[str, Any]] = []
    for k, (own, x) in enumerate(zip(formats, tensors, strict=True)):
        left = dict(x)
        if not outcome.skipped:
            new = {"p": outcome.params[k], **outcome.states[k]}
            stream = streams[k] if streams is not None else k
            left |= store_all(own, new, order, seed=seed, t=t, stream=stream)
        if zero_grads:
            left["g"] = np.zeros_like(left["g"])
        after.append(left)
    if not outcome.skipped:
        again = [load_all(own, x)["p"] for own, x in zip(formats, after, strict=True)]
        with np.errstate(all="ignore"):
            changes = [np.subtract(new, own["p"]) for new, own in zip(again, loaded, strict=True)]
        correct(outcome.stats, again, changes)
    return Step(after, outcome.skipped, outcome.stats)


def correct(stats: _phase.Stats, params: Sequence[Array], changes: Sequence[Array]) -> None:
    """Put in the statistics of what is stored."""
    for name, tensors in (("param_norm", params), ("update_norm", changes)):
        stats.totals[name] = global_norm(tensors)
        stats.tensors[name][:] = [norm(x) for x in tensors]
    pairs = zip(stats.tensors["update_norm"], stats.tensors["param_norm"], strict=True)
    ratios = [_phase.update_ratio(float(u), float(n)) for u, n in pairs]
    stats.tensors["max_update_ratio"][:] = ratios
    stats.totals["max_update_ratio"] = _phase.largest(ratios)
