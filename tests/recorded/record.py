"""The bits of all rules under everything that a step can be asked for, as they were when they were recorded.

    python tests/recorded/record.py [WORD…]             compare, and print what differs
    python tests/recorded/record.py --write [WORD…]     write the record anew

WORDs choose the combinations whose key has all of them. A change of the emitted code that means to change no result
leaves the record as it is; `tests/bits/test_recorded.py` compares with it. `record.json` has a hash for each combination of

* rule: every built-in one, compositions of every transform, two rules that have every kind of state and of reduction;
* dtype: f32, f64, or both in one optimizer;
* statistics, skip_nonfinite, zero_grads, groups of different hyperparameters;
* grad_scale, which half of the combinations have, by a fixed pattern.

Threads are no part of a key, because they change no bit: every number of threads is compared with the same hash, two
with new gradient arrays at each step, three with arrays that are aligned to their elements alone. A hash is of all that
the public interface shows: parameters, state, t, what the gradients are afterwards, statistics of all and of each
tensor, with all NaN alike. Some more are of steps over tensors of many chunks, and over many tensors.

Everything here depends on this file alone and on IEEE arithmetic; values come from a generator of integers, so that no
version of NumPy matters. One thing does: powers of scalars are the platform's libm's. The record is of glibc 2.36 on
x86-64, and has with it the powers that its rules take, computed by Python. Where these differ, the record says nothing.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import math
import operator
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import optforge as of
from optforge import abs, global_norm, global_sum, max_abs, mean, norm, rule, scalar, sqrt, sum
from optforge.library.targets import engine

RECORD = Path(__file__).with_name("record.json")
THREADS = (1, 2, 3)
GRAD_SCALE = 192.0  # its inverse is no power of two
UNDONE = 256.0  # what gradients are multiplied by where they will be unscaled
FIELDS = (
    *("grad_norm", "clipped_grad_norm", "param_norm", "update_norm", "max_update_ratio"),
    *("nan", "inf", "skipped"),
)

# Size, whether it is of float64 where dtypes are mixed, and group. Chunks have 32,768 elements, leaves 1,024, lanes 32;
# the elements do for three threads, and where dtypes are mixed, for three and two.
LAYOUT = (
    *((70_000, 0, 0), (0, 0, 1), (33, 1, 0), (32_768, 0, 1), (1, 0, 0), (1025, 1, 1), (32_767, 1, 0), (31, 0, 1)),
    *((36_001, 1, 1), (1023, 0, 1), (32_769, 0, 0), (32, 1, 0), (2047, 0, 1), (1024, 1, 0), (0, 1, 0)),
)
LONG = ((5 * 32_768 + 100, 0, 0), (3 * 32_768, 1, 1))
MANY = tuple((k % 37, k % 2, k // 2 % 2) for k in range(1100))  # more tensors than a leaf has
LAYOUTS = {LAYOUT: [], LONG: ["sizes=163940+98304"], MANY: ["tensors=1100"]}

SCALES = (1.0, 0.125, 8.0, 0.03125, 1.0, 1.0)  # of the gradients of each step
STEPS = 7  # at most, the one without gradients too


# ── rules ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@rule
def beginnings(
    p,
    g,
    m=0.0,
    slow="p",
    first="g",
    scale="floor",
    mu: scalar = 1.0,
    rate: scalar = "lr",
    *,
    t,
    lr=0.01,
    beta=0.9,
    psi=0.004,
    floor=1e-3,
):
    """State of every kind and beginning."""
    mu_t = beta * (1 - 0.5 * 0.96 ** (t * psi))
    mu = mu * mu_t
    rate = 0.75 * rate + 0.25 * lr
    m = beta * m + (1 - beta) * g
    first = first - 0.125 * (first - g)
    scale = beta * scale + (1 - beta) * abs(first)
    step = mu_t * m / (1 - mu) + (1 - mu_t) * g
    p = p - rate * step / (sqrt(scale) + floor)
    slow = slow + psi * (p - slow)
    return p, m, slow, first, scale, mu, rate


@rule
def gathering(p, g, m=0.0, slow="p", seen: scalar = 0.0, *, lr=0.1):
    """Every reduction, one of them over what others entered, and scalar state that they feed."""
    centred = g - mean(g)
    scaled = centred / (1 + max_abs(p) + norm(centred))
    m = m + scaled * (1 + 0.001 * sum(abs(p)))
    seen = seen + max_abs(m) + 1e-3 * global_sum(scaled * p)
    slow = slow + 0.25 * (p - slow)
    p = p - lr * m / (1 + global_norm(m))
    return p, m, slow, seen


ADAM = {"lr": 0.0173, "beta1": 0.83, "beta2": 0.971, "eps": 3e-7}
DECAY = {"weight_decay": 0.043}

# The name of a rule, or of a composition, its static options behind a name of its own; the hyperparameters; those that
# the second group has instead.
SETTINGS: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "adadelta": ({"lr": 0.7, "rho": 0.91, "eps": 3e-7}, {"lr": 0.35, "rho": 0.87}),
    "adagrad": ({"lr": 0.0173, "eps": 3e-7}, {"lr": 0.03, "eps": 2e-6}),
    "adam": ({**ADAM, "lam": 0.999}, {"beta1": 0.61, "eps": 2e-6, "lam": 0.99}),
    "adamw": ({**ADAM, **DECAY}, {"lr": 0.006, "weight_decay": 0.31}),
    "lamb": ({**ADAM, **DECAY}, {"lr": 0.006, "beta2": 0.91}),
    "lars": (
        {"lr": 0.23, "momentum": 0.71, "weight_decay": 0.003, "trust_coefficient": 0.007},
        {"lr": 0.11, "trust_coefficient": 0.02},
    ),
    "momentum": ({"lr": 0.0173, "momentum": 0.71}, {"lr": 0.03}),
    "nesterov": ({"lr": 0.0173, "momentum": 0.71}, {"momentum": 0.57}),
    "novograd": (
        {"lr": 0.0173, "beta1": 0.83, "beta2": 0.71, "eps": 3e-7, "weight_decay": 0.011},
        {"lr": 0.006, "beta2": 0.93},
    ),
    "rmsprop": ({"lr": 0.0173, "rho": 0.83, "eps": 3e-7}, {"rho": 0.71, "eps": 2e-6}),
    "sgd": ({"lr": 0.0173}, {"lr": 0.03}),
    "clip_by_global_norm:adamw": ({"max_norm": 57.0, **ADAM, **DECAY}, {"max_norm": 300.0, "beta1": 0.61}),
    "clip_by_global_norm(pytorch):adamw": ({"max_norm": 57.0, **ADAM, **DECAY}, {"max_norm": 300.0, "beta1": 0.61}),
    "clip_by_global_norm(lasagne):adamw": ({"max_norm": 57.0, **ADAM, **DECAY}, {"max_norm": 300.0, "beta1": 0.61}),
    "clip_by_norm:lamb": ({"max_norm": 5.0, **ADAM, **DECAY}, {"max_norm": 0.9, "lr": 0.006}),
    "centralize:novograd": (
        {"lr": 0.0173, "beta1": 0.83, "beta2": 0.71, "eps": 3e-7, "weight_decay": 0.011},
        {"lr": 0.006, "beta2": 0.93},
    ),
    "add_weight_decay:clip_by_global_norm:momentum": (
        {**DECAY, "max_norm": 57.0, "lr": 0.0173, "momentum": 0.71},
        {"weight_decay": 0.31, "max_norm": 300.0},
    ),
    "decoupled_weight_decay:adam": ({**DECAY, **ADAM, "lam": 0.999}, {"weight_decay": 0.31, "lam": 0.99}),
    "clip_by_value:rmsprop": ({"max_value": 0.6, "lr": 0.0173, "rho": 0.83, "eps": 3e-7}, {"max_value": 0.2}),
    "beginnings": ({"lr": 0.03, "beta": 0.7, "psi": 0.3, "floor": 3e-4}, {"floor": 0.02, "lr": 0.05}),
    "gathering": ({"lr": 0.3}, {"lr": 0.07}),
}
OWN = {"beginnings": beginnings, "gathering": gathering}
WHOLE = ("lamb", "lars", "novograd", "clip_by_global_norm:adamw")


@functools.cache
def rule_of(name: str) -> of.Rule:
    """The rule of a name in SETTINGS."""
    *transforms, last = name.split(":")
    parts: list[Any] = []
    for transform in transforms:
        bare, _, form = transform.removesuffix(")").partition("(")
        parts.append(of.transforms[bare](form=form) if form else of.transforms[bare])
    made: of.Rule = functools.reduce(operator.rshift, [*parts, OWN.get(last) or of.rules[last]])
    return made


@functools.cache
def target_of(name: str) -> Any:
    """The target "c" for a rule, whose library is loaded once: that is most of an Optimizer's making, and no step's."""
    engines: list[Any] = []

    def once(rule: of.Rule, kernel: Any) -> Any:
        if not engines:
            engines.append(engine("c")(rule, kernel))
        return engines[0]

    return once


def powers() -> dict[str, str]:
    """The powers that the recorded rules take, as Python computes them, which takes them from the same library."""
    bases = {
        float(value)
        for both in SETTINGS.values()
        for own in both
        for name, value in own.items()
        if name in ("beta1", "beta2", "lam")
    }
    pairs = [(base, float(t)) for base in sorted(bases) for t in range(STEPS + 1)]
    pairs += [(0.96, t * SETTINGS["beginnings"][0]["psi"]) for t in range(1, STEPS + 1)]
    return {f"{base!r}**{exponent!r}": math.pow(base, exponent).hex() for base, exponent in pairs}


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def integers(seed: int, size: int) -> Any:
    """So many 64-bit integers: splitmix64 of a counter."""
    x = (np.arange(size, dtype=np.uint64) + np.uint64(seed << 24)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(seed: int, size: int, dtype: Any) -> Any:
    """Numbers in [−1, 1), which are multiples of a power of two."""
    kept = 24 if dtype == np.float32 else 53
    return np.ldexp((integers(seed, size) >> np.uint64(64 - kept)).astype(np.float64), 1 - kept).astype(dtype) - dtype(
        1
    )


EXPONENTS = np.array([-24, -16, -12, -11, -11, -10, -6, -3, 0, 1], np.int32)
"""Of the gradients' magnitudes; the root of the usual eps is near 2⁻¹¹."""


@functools.cache
def parameters(layout: tuple[Any, ...], dtype: str) -> list[Any]:
    """The parameters at the begin."""
    kinds = dtypes(layout, dtype)
    return [uniform(1000 + k, own[0], kind) for k, (own, kind) in enumerate(zip(layout, kinds, strict=True))]


@functools.cache
def gradients(layout: tuple[Any, ...], dtype: str, step: int, scaled: bool) -> list[Any]:
    """The gradients of a step, which it may have to unscale."""
    made = []
    for k, ((size, *_), kind) in enumerate(zip(layout, dtypes(layout, dtype), strict=True)):
        seed = 2000 + 100 * step + k
        exponents = EXPONENTS[(integers(seed + 50, size) % np.uint64(len(EXPONENTS))).astype(np.intp)]
        scale = SCALES[step] * (UNDONE if scaled else 1.0)
        made.append(np.ldexp(uniform(seed, size, kind), exponents) * kind(scale))
    return made


def dtypes(layout: Sequence[Any], dtype: str) -> list[Any]:
    """The dtype of each tensor."""
    double = {"f32": (0, 0), "f64": (1, 1), "mixed": (0, 1)}[dtype]
    return [np.float64 if double[own[1]] else np.float32 for own in layout]


# ── hashes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Digest:
    """A hash of numbers."""

    def __init__(self) -> None:
        self.sha = hashlib.sha256()

    def array(self, array: Any) -> None:
        """Take in an array, all NaN alike."""
        wrong = np.isnan(array)
        if wrong.any():
            array = np.where(wrong, array.dtype.type(math.nan), array)
        self.sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    def number(self, number: Any) -> None:
        """Take in a number."""
        own = float(number)
        self.sha.update(struct.pack("<d", math.nan if math.isnan(own) else own))

    def gradient(self, left: Any, given: Any) -> None:
        """Take in what a step left of a gradient: usually all of it or nothing."""
        bits = f"u{left.itemsize}"
        if not left.view(bits).any():
            self.sha.update(b"zero")
        elif np.array_equal(left.view(bits), given.view(bits)):
            self.sha.update(b"same")
        else:
            self.array(left)

    def stats(self, told: of.Stats) -> None:
        """Take in statistics."""
        for field in FIELDS:
            self.number(getattr(told, field))
            self.array(told.per_tensor[field].astype(np.float64))

    def hex(self) -> str:
        """The hash."""
        return self.sha.hexdigest()[:16]


def flat(tree: Iterable[Any]) -> Iterator[Any]:
    """The leaves of a list of lists."""
    for own in tree:
        if isinstance(own, list):
            yield from flat(own)
        else:
            yield own


@dataclass(frozen=True)
class Case:
    """A combination."""

    rule: str
    dtype: str
    stats: bool = False
    skip: bool = False
    zero: bool = False
    groups: bool = False
    scale: bool = False
    layout: tuple[Any, ...] = LAYOUT

    @property
    def key(self) -> str:
        """What it is called in the record."""
        asked = [name for name in ("stats", "skip", "zero", "groups", "scale") if getattr(self, name)]
        return " ".join([self.rule, self.dtype, *asked, *LAYOUTS[self.layout]])

    def structured(self, arrays: list[Any]) -> list[Any]:
        """Arrays as the optimizer takes them."""
        if not self.groups:
            return arrays
        return [[a for a, own in zip(arrays, self.layout, strict=True) if own[2] == group] for group in (0, 1)]

    def optimizer(self, params: list[Any], threads: int) -> of.Optimizer:
        """An optimizer over these parameters."""
        common, other = SETTINGS[self.rule]
        given: list[Any] = self.structured(params)
        if self.groups:
            given = [{"params": given[0]}, {"params": given[1], **other}]
        how: dict[str, Any] = {"threads": threads, "skip_nonfinite": self.skip, "zero_grads": self.zero, **common}
        return of.Optimizer(given, rule_of(self.rule), target=target_of(self.rule), **how)

    def run(self, threads: int) -> str:
        """The hash of all steps with a number of threads."""
        return Run(self, threads).hash()


class Run:
    """The steps of a case."""

    def __init__(self, case: Case, threads: int):
        self.case, self.digest = case, Digest()
        self.offset, self.renewed = int(threads == 3), threads == 2
        self.params = self.placed(parameters(case.layout, case.dtype))
        self.grads = self.placed(self.params)  # the same arrays at each step, which is usual
        self.opt = case.optimizer(self.params, threads)

    def placed(self, arrays: Sequence[Any]) -> list[Any]:
        """Copies, as they are aligned here."""
        copies = [np.empty(own.size + self.offset, own.dtype)[self.offset :] for own in arrays]
        for own, array in zip(copies, arrays, strict=True):
            own[...] = array
        return copies

    def hash(self) -> str:
        """The hash of everything.

        A step that is to be skipped comes first and one comes between others. Last, behind one in which no tensor has a
        gradient, comes one with NaN and infinity, which is skipped or not.
        """
        layout, skip = self.case.layout, self.case.skip
        everything = range(len(layout))
        *_, last = filled = [k for k in everything if layout[k][0] > 0]
        second = [k for k, own in enumerate(layout) if own[2] == 1]
        if skip:
            self.step(0, {0: math.inf})
        self.step(0)
        self.step(1, without=[k for k in everything if k % 8 == 2])
        if skip:
            self.step(2, {last: math.nan})
        self.step(2, without=second if self.case.groups else [])
        self.step(3)
        self.step(4)
        self.look()
        self.step(4, without=everything)
        self.step(5, {filled[0]: -math.inf, last: math.nan})
        self.look()
        return self.digest.hex()

    def step(self, number: int, values: Mapping[int, float] = {}, without: Iterable[int] = ()) -> None:
        """A step with the gradients of this number, some values instead in some tensors, and none for others."""
        case, digest, missing = self.case, self.digest, set(without)
        given = [*gradients(case.layout, case.dtype, number, case.scale)]
        for place, value in values.items():
            given[place] = given[place].copy()
            given[place][-1:] = value
        if self.renewed:
            self.grads = self.placed(given)
        else:
            for own, g in zip(self.grads, given, strict=True):
                own[...] = g
        told = self.opt.step(
            case.structured([None if k in missing else own for k, own in enumerate(self.grads)]),
            stats=case.stats,
            grad_scale=GRAD_SCALE if case.scale else None,
        )
        for own, before in zip(self.grads, given, strict=True):
            digest.gradient(own, before)
        if told is not None:
            digest.stats(told)
        digest.number(self.opt.t)

    def look(self) -> None:
        """Take in parameters and state."""
        for own in flat([self.params, *self.opt.state.values()]):
            if isinstance(own, float):
                self.digest.number(own)
            else:
                self.digest.array(own)


def cases() -> list[Case]:
    """All combinations."""
    found = []
    for (place, name), dtype in itertools.product(enumerate(SETTINGS), ("f32", "f64", "mixed")):
        for stats, skip, zero, groups in itertools.product((False, True), repeat=4):
            scale = (place + stats + skip + zero + groups + (dtype == "f64")) % 2 == 1
            found.append(Case(name, dtype, stats, skip, zero, groups, scale))
    for name, dtype, layout in itertools.product(WHOLE, ("f32", "f64", "mixed"), (LONG, MANY)):
        found.append(Case(name, dtype, stats=True, layout=layout))
    return found


# ── the record ──────────────────────────────────────────────────────────────────────────────────────────────────────


def read() -> dict[str, dict[str, str]]:
    """The record: "powers" and "hashes"."""
    found: dict[str, dict[str, str]] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def write(hashes: Mapping[str, str]) -> None:
    """Write the record, one combination per line."""
    text = json.dumps({"powers": powers(), "hashes": hashes}, indent=0, ensure_ascii=False)
    RECORD.write_text(text + "\n", encoding="utf-8")


def differences(chosen: Iterable[Case], threads: Sequence[int], recorded: Mapping[str, str]) -> Iterator[str]:
    """What differs from the record, a line for each combination and number of threads."""
    for case in chosen:
        for number in threads:
            found, expected = case.run(number), recorded.get(case.key)
            if found != expected:
                yield f"{case.key}, threads={number}: {found}, recorded {expected or 'nowhere'}"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Compare the bits of all rules with the record.")
    parser.add_argument("--write", action="store_true", help="write the record anew")
    parser.add_argument("words", nargs="*", metavar="WORD", help="only combinations whose key has this word")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait take no core from those that do not
    everything = cases()
    chosen = [case for case in everything if all(word in case.key.split() for word in arguments.words)]
    if arguments.write:
        before = read()["hashes"] if RECORD.exists() else {}
        made = {case.key: case.run(THREADS[0]) for case in chosen}
        hashes = {case.key: made.get(case.key) or before.get(case.key, "") for case in everything}
        write({key: value for key, value in hashes.items() if value})
        print(f"{len(made)} of {len(everything)} combinations written to {RECORD}")
    record = read()
    if record["powers"] != powers():
        print("the powers of this platform are not those of the record, which says nothing here")
        return 3
    threads = THREADS[1:] if arguments.write else THREADS
    count = 0
    for line in differences(chosen, threads, record["hashes"]):
        count += 1
        print(line, flush=True)
    print(f"{len(chosen)} combinations, {len(THREADS)} numbers of threads: {count or 'nothing'} differs")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
