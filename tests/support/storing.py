"""Rules over arrays in every format: emitted, compiled, and run beside the oracle of number formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import data
import optforge as of
from amount import FULL
from embedding import NORMS, Library, Part, shared, step
from optforge import norm, rule
from optforge.core.formats import Storage, storage
from optforge.emit import layout
from oracles import _formats, begin, names, oracle

SEED = 2**63 + 25
GRAD_SCALE = 2.5

# Store, where "all" is every array, and master.
STORES: dict[str, tuple[dict[str, str], str]] = {
    "p_g_bf16": ({"p": "bf16", "g": "bf16"}, ""),
    "p_g_f16": ({"p": "f16", "g": "f16"}, ""),
    "p_bf16": ({"p": "bf16"}, ""),
    "g_bf16": ({"g": "bf16"}, ""),
    "all_bf16": ({"all": "bf16"}, ""),
    "all_f16": ({"all": "f16"}, ""),
    "state_bf16": ({"all": "bf16", "p": "f32", "g": "f32"}, ""),
    "bf16_master": ({"p": "bf16", "g": "bf16"}, "f32"),
    "f16_master": ({"p": "f16", "g": "f16"}, "f32"),
    "all_bf16_master": ({"all": "bf16"}, "f32"),
    "split": ({"p": "bf16", "g": "bf16"}, "split"),
    "all_bf16_split": ({"all": "bf16"}, "split"),
    "state_8": ({"all": "8", "p": "f32", "g": "f32"}, ""),
    "p_g_bf16_state_8": ({"all": "8", "p": "bf16", "g": "bf16"}, ""),
    "split_state_8": ({"all": "8", "p": "bf16", "g": "bf16"}, "split"),
}
POSITIVE = ("v", "acc", "acc_delta")  # state that is never negative: "8" is uq8 there, else q8


@rule
def settled(p, g, m=0.0, *, lr=0.25):
    """What a phase has stored is asked for by the next, as it was computed."""
    m = 0.5 * m + g
    p = p - lr * m
    p = p / (1 + norm(p) + norm(m))
    return p, m


@rule
def forgetful(p, g, m=0.0, *, lr=0.25):
    """The parameter is written and never read."""
    m = lr * g
    p = m / 3
    return p, m


@rule
def following(p, g, first="p", last="g", *, lr=0.25, t):
    """State that begins as the parameter and as the gradient."""
    last = 0.75 * last + 0.25 * g
    first = first - lr / t * last
    p = 0.5 * p + 0.5 * first
    return p, first, last


EIGHT = ("q8", "uq8")
OWN = {own.name: own for own in (settled, forgetful, following)}
RULES = {name: of.rules[name] for name in names()} | OWN


def of_function(own: of.Rule) -> Any:
    """A rule's plain Python function, as an oracle."""
    states = [state.name for state in own.kernel().state]

    def call(p: Any, g: Any, state: Mapping[str, Any], t: int, **hyper: float) -> tuple[Any, dict[str, Any]]:
        time = {"t": t} if own is following else {}
        with np.errstate(all="ignore"):
            new, *rest = own.function(p, g, *(state[name] for name in states), **hyper, **time)
        return new, dict(zip(states, rest, strict=True))

    return SimpleNamespace(step=call)


@cache
def oracle_of(name: str) -> Any:
    return of_function(OWN[name]) if name in OWN else oracle(name)


def setting(name: str) -> dict[str, float]:
    return {"lr": 0.25} if name in OWN else oracle(name).SETTINGS[0]


def beginning(name: str, p: Any, g: Any) -> dict[str, Any]:
    """The state before the first step, in float32."""
    if name in OWN:
        states = [state.name for state in OWN[name].kernel().state]
        return {state: {"first": p, "last": g}.get(state, np.zeros_like(p)).copy() for state in states}
    return begin(name, p)


# ── what is emitted ─────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def storages(name: str) -> dict[str, Storage]:
    """All ways to store the arrays of a rule, each once, by name; `_random` ends those with stochastic rounding."""
    kernel = RULES[name].kernel()
    found: dict[str, Storage] = {}
    for title, (store, master) in STORES.items():
        given = {array: store.get(array, store.get("all", "f32")) for array in kernel.arrays}
        given = {array: EIGHT[array in POSITIVE] if own == "8" else own for array, own in given.items()}
        for rounding in ("nearest", "stochastic"):
            if master == "split" and rounding == "stochastic":
                continue
            suffix = title if rounding == "nearest" else f"{title}_random"
            others = [state.name for state in kernel.scalar_state]
            made = storage(kernel.arrays, given, master or None, rounding, suffix, others)
            seen = {(own.formats, own.master, own.stochastic) for own in found.values()}
            if (made.formats, made.master, made.stochastic) not in seen:
                found[suffix] = made
    return found


ALL = ("lamb",)  # in every format; each of the others has some, in turn
CASES = [
    (name, title)
    for turn, name in enumerate(RULES)
    for number, title in enumerate(storages(name))
    if FULL or name in ALL or (turn + number) % 10 == 0
]


@dataclass(frozen=True)
class Several:
    """What is wanted of a rule: several ways to store its arrays."""

    every: tuple[Storage, ...]

    def storages(self, _: Any) -> tuple[Storage, ...]:
        return self.every


def groups(name: str) -> Iterator[tuple[str, tuple[Storage, ...]]]:
    """The ways that have the same passes, and the prefix of what is emitted for them."""
    found: dict[frozenset[str], list[Storage]] = {}
    for title, own in storages(name).items():
        if (name, title) in CASES:
            found.setdefault(own.inexact - {"g"}, []).append(own)
    for number, together in enumerate(found.values()):
        yield f"{name}_{number}", tuple(together)


class Kernels:
    """All rules in all ways, in one library."""

    def __init__(self, directory: Path, flags: Sequence[str] = ()):
        files: dict[str, str] = dict(layout.runtime())
        self.prefix: dict[tuple[str, str], str] = {}
        for name in RULES:
            for prefix, together in groups(name):
                wanted: Any = Several(together)
                files |= RULES[name].emit("c", wanted, prefix, {})
                self.prefix |= {(name, own.suffix): prefix for own in together}
        # The threads of a list so small are not worth waking.
        files["optforge.c"] = files["optforge.c"].replace("THREAD_SIZE = 65536", "THREAD_SIZE = 1024")
        declared = ", ".join(f"{prefix}_kernel_{title}" for (_, title), prefix in self.prefix.items())
        self.library = Library(shared(directory, files, flags=flags), f"extern optforge_kernel {declared};")

    def __getitem__(self, case: tuple[str, str]) -> Any:
        return self.library.kernel(self.prefix[case], case[1])

    def use(self, isa: str) -> None:
        """Take another instruction set."""
        assert self.library.calls.optforge_use(isa.encode()) == 0


# ── what is expected ────────────────────────────────────────────────────────────────────────────────────────────────

SIZES = (*range(258), 511, 512, 513, 1023, 1024, 1025, 2048, 5000, 32_767, 32_768, 32_769, 65_537)
FEW = (0, 1, 2, 31, 32, 33, 63, 65, 129, 255, 256, 257, 1023, 1024, 1025, 2050)
LARGE = (32_767, 5, 32_769, 32_768)
STEPS = 3


def formats_of(own: Storage) -> _formats.Formats:
    return _formats.Formats({n: f.name for n, f in own.formats if f.name != "f32"}, own.master, own.stochastic)


def tame(name: str, formats: _formats.Formats, sizes: Sequence[int], seed: int = 1) -> list[list[dict[str, Any]]]:
    """Tensors at their beginning, and behind them gradients of later steps, as they are stored."""
    random = np.random.default_rng(seed)
    tensors, later = [], []
    for n in sizes:
        p, *grads = (data.gradients(random, n, np.float32) for _ in range(1 + STEPS))
        seen = _formats.load_all(formats, _formats.begin(formats, p, grads[0], {}))  # as it is stored
        tensors.append(_formats.begin(formats, p, grads[0], beginning(name, seen["p"], seen["g"])))
        later.append([_formats.begin(formats, p, g, {})["g"] for g in grads[1:]])
    return [tensors, *([{"g": own[k]} for own in later] for k in range(STEPS - 1))]


def codes(random: np.random.Generator, dtype: Any, n: int) -> Any:
    """Any bits at all, those of NaN and of infinity too, and edges."""
    own = np.dtype(dtype)
    if own == np.float64:
        return float(random.standard_normal())
    kind = np.dtype(f"u{own.itemsize}")
    found = random.integers(0, 2 ** (8 * own.itemsize), n, dtype=kind)
    edges = [0, 1, 0x3FF, 0x400, 0x7F, 0x80, 0x7BFF, 0x7C00, 0x7C01, 0x7F7F, 0x7F80, 0x7F81, 0x7FFF]
    if own.itemsize == 1:
        return found
    edges = [edge << 16 | tail for edge in edges for tail in (0, 1, 0x8000, 0xFFFF)] if own.itemsize == 4 else edges
    both = np.array([*edges, *(edge | 0x80 << 8 * own.itemsize - 8 for edge in edges)], kind)
    found[: min(n, both.size)] = random.permutation(both)[:n]
    return found.view(own)


def wild(name: str, formats: _formats.Formats, sizes: Sequence[int], seed: int = 2) -> list[list[dict[str, Any]]]:
    """The same with every array of any bits."""
    random = np.random.default_rng(seed)
    tensors, *later = tame(name, formats, sizes)
    for tensor in (own for several in (tensors, *later) for own in several):
        for array, x in tensor.items():
            tensor[array] = codes(random, getattr(x, "dtype", np.float64), np.size(x))
    return [tensors, *later]


@dataclass(frozen=True)
class Run:
    """Tensors before the steps, the gradients of each, and what the oracle makes of them."""

    name: str
    own: Storage
    order: tuple[str, ...]  # p, g and the state
    tensors: list[dict[str, Any]]
    grads: list[list[Any]]
    steps: list[_formats.Step]
    streams: tuple[int, ...] | None

    @property
    def arrays(self) -> tuple[str, ...]:
        """All arrays as a tensor of the kernel has them."""
        beside = [self.own.beside.name] if self.own.beside else []
        return (*self.order, *beside, *formats_of(self.own).scales())

    @property
    def hyper(self) -> list[float]:
        given = {**RULES[self.name].hyperparameters, **setting(self.name)}
        return [given[name] for name in RULES[self.name].hyperparameters]


@cache
def run_of(name: str, title: str, kind: str) -> Run:
    """Some steps of a rule: over tame tensors, large ones, or wild ones, whose random bits have streams of their own."""
    own = storages(name)[title]
    formats = formats_of(own)
    order = ("p", "g", *(state.name for state in RULES[name].kernel().state))
    streams = None
    if kind == "wild":
        tensors, *later = wild(name, formats, (600, 3, 1030))
        streams = (2**40 + 1, 0, 17)
    else:
        tensors, *later = tame(name, formats, LARGE if kind == "large" else SIZES if FULL else FEW)
    grads = [[tensor["g"] for tensor in several] for several in (tensors, *later)]
    steps: list[_formats.Step] = []
    live: list[dict[str, Any]] = tensors
    for t, g in enumerate(grads, 1):
        live = [{**tensor, "g": fresh} for tensor, fresh in zip(live, g, strict=True)]
        steps.append(
            _formats.step(
                [formats] * len(live),
                live,
                t,
                oracle_of(name),
                [],
                setting(name),
                order=order,
                seed=SEED,
                streams=streams,
                grad_scale=GRAD_SCALE,
            )
        )
        live = steps[-1].tensors
    return Run(name, own, order, tensors, grads, steps, streams)


# ── comparison ──────────────────────────────────────────────────────────────────────────────────────────────────────


def live(run: Run, tensors: Sequence[Mapping[str, Any]]) -> list[list[np.ndarray]]:
    """Copies of tensors, as a kernel has them, aligned to their elements and to nothing more."""
    return [[moved(own[name]) for name in run.arrays] for own in tensors]


def moved(x: Any) -> np.ndarray:
    """A copy that begins behind an element."""
    x = np.array(x, ndmin=1)
    return np.concatenate([x[:1], x])[min(x.size, 1) :]


def alike(found: np.ndarray, expected: np.ndarray, format: str) -> bool:
    """Whether arrays have the same bits, a NaN of either sign alike, which has one code."""
    if found.dtype == np.uint8:
        return np.array_equal(found, expected)
    if found.dtype != np.uint16:
        return data.same(found, expected)
    if format in _formats.NAN:
        nan = _formats.NAN[format]
        found, expected = (np.where(x & 0x7FFF == nan, nan, x) for x in (found, expected))
    return np.array_equal(found, expected)


def check(run: Run, found: Sequence[Sequence[np.ndarray]], expected: Sequence[Mapping[str, Any]], where: str) -> None:
    """All arrays have the bits that they should."""
    formats = formats_of(run.own).of
    for k, (arrays, tensor) in enumerate(zip(found, expected, strict=True)):
        for name, array in zip(run.arrays, arrays, strict=True):
            wanted, format = np.array(tensor[name], ndmin=1), formats.get(name, "f32")
            untouched = array.tobytes() == wanted.tobytes()
            agree = untouched if name == "g" else alike(array, wanted, format)
            assert agree, f"{run.name} {run.own.suffix}: {name} of tensor {k}, {where}"


def check_told(told: Any, expected: _formats.Step, where: str) -> None:
    """The statistics have the bits that they should."""
    for name in (*NORMS, "nan", "inf"):
        total, each = expected.stats.totals[name], expected.stats.tensors[name]
        assert data.same(np.float64(told.stats[name]), np.float64(total)), f"{name}, {where}"
        assert data.same(told.each[name].astype(np.float64), each.astype(np.float64)), f"{name} of tensors, {where}"


def piece(name: str, array: np.ndarray, at: int, n: int) -> np.ndarray:
    """A part of an array of a tensor: of so many elements, or of the scales of these."""
    if name.endswith("_absmax"):
        return array[at // 256 : at // 256 + -(-n // 256)]
    return array if array.dtype == np.float64 else array[at : at + n]


def execute(
    kernels: Kernels, case: tuple[str, str], kind: str, *, shares: int = 0, stats: bool = True, cut: int = 0, **how: Any
) -> None:
    """Run the steps and compare each; `cut` makes parts of so many elements."""
    run = run_of(*case, kind)
    own = live(run, run.tensors)
    sizes = [arrays[0].size for arrays in own]
    parts = [(k, at) for k, n in enumerate(sizes) for at in range(0, n if cut else 1, cut or 1)]
    cutting = dict(enumerate(sizes)) if not cut else dict.fromkeys(range(len(sizes)), cut)
    for t, (grads, expected) in enumerate(zip(run.grads, run.steps, strict=True), 1):
        where = f"step {t} of {kind}, shares {shares}, parts {cut}"
        for arrays, g in zip(own, grads, strict=True):
            arrays[1][...] = g
        tensors = [
            [piece(name, array, at, cutting[k]) for name, array in zip(run.arrays, own[k], strict=True)]
            for k, at in parts
        ]
        rows = {"number": np.array([k for k, _ in parts]), "part": np.array([at for _, at in parts])} if cut else {}
        if run.streams is not None:
            rows["stream"] = np.array([run.streams[k] for k, _ in parts], np.uint64)
        part = Part(kernels[case], tensors, t, run.hyper, rows=rows)
        more = {"sizes": sizes} if cut else {}
        told = step(kernels.library, part, stats=stats, shares=shares, seed=SEED, grad_scale=GRAD_SCALE, **more, **how)
        assert told.status == 0, kernels.library.text(told.status)
        check(run, own, expected.tensors, where)
        if stats:
            check_told(told, expected, where)
        own = [[array.copy() for array in arrays] for arrays in own]  # nothing but what is stored goes on
