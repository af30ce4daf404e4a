"""What the tests of the Optimizer share: rules, arrays that are awkward, and a judge that steps in plain Python."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optforge import Optimizer, Rule, abs, exp, log, rule, scalar, sqrt

# A run on a GPU, or on the emulation of one, names others: OPTFORGE_TEST_TARGETS=cuda
TARGETS = tuple(os.environ.get("OPTFORGE_TEST_TARGETS", "c numpy").split())


@rule
def nadam(
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
    nesterov=True,
    average="slow",
):
    """Everything that an Optimizer has to keep: each kind of initial state, scalar state, time, options."""
    assert 0 <= beta < 1
    assert floor > 0
    mu_t = beta * (1 - 0.5 * 0.96 ** (t * psi))
    mu = mu * mu_t
    rate = 0.75 * rate + 0.25 * lr
    m = beta * m + (1 - beta) * g
    first = first - 0.125 * (first - g)
    scale = beta * scale + (1 - beta) * abs(first)
    step = mu_t * m / (1 - mu) + (1 - mu_t) * g if nesterov else m / (1 - mu)
    p = p - rate * step / (sqrt(scale) + floor)
    if average != "off":
        slow = slow + psi * (p - slow)
    return p, m, slow, first, scale, mu, rate


@rule
def brittle(
    p,
    g,
    left: scalar = 3.0,
    *,
    t,
    lr=0.1,
    divisor=1.0,
    modulus=3.0,
    exponent=1.0,
    radicand=2.0,
    base=2.0,
    logged=1.0,
    raised=1.0,
    nothing=1.0,
):
    """Scalars of every kind that may have no value; `left` runs out at the fourth step of a tensor."""
    one = 1 / divisor + 7 % modulus
    two = 10**exponent + sqrt(radicand) + base ** (t / 2)
    three = log(logged) + exp(raised)
    rate = lr / left
    lazy = 1 / nothing if nothing != 0 else 2.0
    both = 0.5 if nothing != 0 and 1 / nothing > 0 else 0.25
    either = 0.5 if nothing == 0 or 1 / nothing > 0 else 0.25
    u = g / nothing if nothing != 0 else lr * g
    p = p - rate * (one + two + three + lazy + both + either) * u
    left = left - 1
    return p, left


SETTINGS = {"lr": 0.03, "beta": 0.7, "psi": 0.3, "floor": 3e-4}
"""Other hyperparameters of `nadam` than its defaults."""


class FakeTensor:
    """What the package uses of a PyTorch tensor; its memory can be exchanged for other memory."""

    def __init__(self, array: Any):
        self.array = array

    def detach(self) -> FakeTensor:
        return self

    def numpy(self) -> Any:
        return self.array

    def data_ptr(self) -> int:
        return int(self.array.ctypes.data)

    def move(self, array: Any = None) -> None:
        self.array = self.array.copy() if array is None else array


class Exporter:
    """An array of another library, which shares its memory through DLPack."""

    def __init__(self, array: Any):
        self.array = array

    def __dlpack__(self, **arguments: Any) -> Any:
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


class Elsewhere(Exporter):
    """An array on a device."""

    def __dlpack__(self, **arguments: Any) -> Any:
        raise BufferError("the memory of device 7 cannot be reached")


def small(seed: int) -> list[Any]:
    """Arrays of both dtypes: scalar, empty, of one element, and a little more than a vectorised block."""
    random = np.random.default_rng(seed)
    shapes = [((5, 7), "f4"), ((), "f8"), ((0, 3), "f4"), ((1,), "f4"), ((33,), "f8"), ((), "f4")]
    return [np.asarray(random.standard_normal(shape), dtype) for shape, dtype in shapes]


def large(seed: int) -> list[Any]:
    """Arrays that several threads share, of odd sizes, one of them not."""
    random = np.random.default_rng(seed)
    shapes = [((301, 1203), "f4"), ((150_001,), "f8"), ((3,), "f4"), ((101, 3, 151), "f8"), ((50_001,), "f4")]
    return [random.standard_normal(shape).astype(dtype) for shape, dtype in shapes]


def bits(thing: Any) -> Any:
    """Something comparable that differs wherever a bit does: arrays, floats, and structures of them."""
    if isinstance(thing, Mapping):
        return {key: bits(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return type(thing)(map(bits, thing))
    if isinstance(thing, FakeTensor):
        return bits(thing.array)
    if hasattr(thing, "__cuda_array_interface__"):
        return bits(np.asarray(thing))
    if isinstance(thing, np.ndarray):
        return thing.dtype.str, thing.shape, thing.tobytes()
    if isinstance(thing, float):
        return struct.pack("d", thing)
    return thing


def everything(opt: Optimizer) -> Any:
    """All that a step or an assignment may change, as bits."""
    return bits({"params": opt.params, **opt.state_dict()})


class Judge:
    """Steps the plain Python function of a rule, tensor by tensor, as the contract says that an Optimizer does."""

    def __init__(self, params: Sequence[Any], rule: Rule, **settings: Any):
        self.params, self.rule, self.settings = params, rule, settings
        self.states: list[tuple[Any, ...] | None] = [None] * len(params)
        self.t, self.steps = 0, [0] * len(params)

    def step(self, grads: Sequence[Any]) -> None:
        """A tensor's state starts at its first gradient, from which its t counts; None leaves it alone."""
        self.t += 1
        for k, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is not None:
                self.steps[k] += 1
                timed = {"t": self.steps[k]} if self.rule.definition.time else {}
                state = self.states[k] or ()
                results = self.rule.function(p.reshape(-1).copy(), g.reshape(-1), *state, **timed, **self.settings)
                results = results if isinstance(results, tuple) else (results,)
                p[...] = results[0].reshape(p.shape)
                self.states[k] = results[1:]

    def agrees(self, opt: Optimizer) -> bool:
        """Whether parameters and the state of all tensors have the same bits as those of an Optimizer."""
        same = bits(list(opt.params)) == bits(list(self.params)) and opt.t == self.t
        for k, states in enumerate(self.states):
            if states is not None:
                named = dict(zip(self.rule.state, states, strict=True))
                for name, tree in opt.state.items():
                    own = tree[k] if isinstance(tree[k], float) else tree[k].reshape(-1)
                    same = same and bits(own) == bits(named[name])
        return same
