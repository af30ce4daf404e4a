"""What tests of phases share, in C and in CUDA: rules that add up, their steps on the reference, and splits of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import optforge as of
from data import Guarded, same
from native import Stats
from optforge import global_norm, global_sum, max_abs, mean, norm, scalar, sum
from stepping import spread

NORMS = ("grad_norm", "clipped_grad_norm", "param_norm", "update_norm", "max_update_ratio")
LEAF, CHUNK = 1024, 32768
SIZES = (70_001, 1, 0, CHUNK, 1025, CHUNK + 33, 3 * CHUNK, 31)

Arrays = Mapping[str, Any]


@of.rule
def gathering(p, g, m=0.0, seen: scalar = 0.0, *, lr=0.1):
    """Every reduction, one of them over what others entered."""
    centred = g - mean(g)
    scaled = centred / (1 + max_abs(p) + norm(centred))
    m = m + scaled * (1 + 0.001 * sum(abs(p)))
    seen = seen + max_abs(m) + 1e-3 * global_sum(scaled * p)
    p = p - lr * m / (1 + global_norm(m))
    return p, m, seen


LAMB = of.clip_by_global_norm(max_norm=21.0) >> of.rules.lamb
KERNELS: dict[str, of.Rule] = {
    "lamb": LAMB,
    "novograd": of.clip_by_norm >> of.rules.novograd,
    "adam": of.rules.adam,
    "gathering": gathering,
}


CHUNKS: dict[str, list[list[tuple[int, int, int]]]] = {
    "two": [
        [(0, 0, 1), (1, 0, 1), (5, 0, 2), (6, 1, 3)],
        [(0, 1, 3), (2, 0, 0), (3, 0, 1), (4, 0, 1), (6, 0, 1), (7, 0, 1)],
    ],
    "three": [
        [(6, 2, 3), (0, 2, 3)],
        [(5, 1, 2), (0, 1, 2), (1, 0, 1), (6, 1, 2)],
        [(7, 0, 1), (5, 0, 1), (4, 0, 1), (3, 0, 1), (2, 0, 0), (0, 0, 1), (6, 0, 1)],
    ],
    "an idle one": [[], [(k, 0, 3) for k in range(8)]],
    "one in pieces": [
        [(0, 2, 3), (6, 0, 2), (1, 0, 1), (0, 0, 2), (2, 0, 0), (6, 2, 3), (3, 0, 1), (4, 0, 1), (5, 0, 2), (7, 0, 1)]
    ],
}
# The same in leaves: where parts begin and end inside a chunk.


class Told:
    """Statistics as `agree` reads them."""

    def __init__(self, whole: Stats, tensors: Any):
        self.whole = whole
        names = [name for name, _ in Stats._fields_]
        self.per_tensor = {name: np.array([getattr(own, name) for own in tensors]) for name in names}

    def __getitem__(self, name: str) -> Any:
        return getattr(self.whole, name)


class Run:
    """Arrays of a kernel, between guards, and what two steps of the reference make of them."""

    def __init__(self, name: str, dtype: Any, sizes: Sequence[int] = SIZES, **how: Any):
        self.name, self.dtype, self.sizes, self.how = name, dtype, sizes, how
        rng = np.random.default_rng(11)
        self.rule = KERNELS[name]
        self.first = [rng.standard_normal(n).astype(dtype) for n in sizes]
        self.grads = [[spread(rng, n, dtype) for n in sizes] for _ in range(2)]
        params = [p.copy() for p in self.first]
        opt = of.Optimizer(params, self.rule, target="numpy", **how)
        self.expected = []
        for grads in self.grads:
            told = opt.step([g.copy() for g in grads], grad_scale=2.5, stats=True)
            state = {s: [np.array(x, ndmin=1) for x in tree] for s, tree in opt.state.items()}
            self.expected.append(({"p": [p.copy() for p in params], **bits_of(state)}, told))

    def arrays(self) -> tuple[list[dict[str, Any]], dict[str, Guarded]]:
        """Tensors at the begin."""
        scalars = {s.name for s in self.rule.kernel().state if s.scalar}
        memory = {}
        for k, name in enumerate(("p", "g", *self.rule.state)):
            own = name in scalars
            memory[name] = Guarded(
                [1] * len(self.sizes) if own else self.sizes, np.float64 if own else self.dtype, offset=k
            )
        tensors = [{name: memory[name].arrays[k] for name in memory} for k in range(len(self.sizes))]
        for tensor, p in zip(tensors, self.first, strict=True):
            tensor["p"][:] = p
            for name, value in self.rule.state.items():
                tensor[name][:] = value
        return tensors, memory

    def check(self, step: int, tensors: Sequence[Arrays], where: str = "") -> None:
        """The arrays behind a step."""
        for name, values in self.expected[step][0].items():
            for k, own in enumerate(values):
                assert same(tensors[k][name], own), f"{name} of size {self.sizes[k]}, step {step}: {where}"

    def told(self, step: int, told: Told) -> None:
        """The statistics of a step."""
        expected = self.expected[step][1]
        for name, _ in Stats._fields_:
            assert same(float(told[name]), float(expected[name])), f"{name}: {told[name]} and {expected[name]}"
            own, other = told.per_tensor[name], expected.per_tensor[name]
            assert same(own.astype(np.float64), other.astype(np.float64)), name


def bits_of(state: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: [x.copy() for x in tree] for name, tree in state.items()}


_runs: dict[Any, Run] = {}


def run_of(name: str, dtype: Any, **how: Any) -> Run:
    """The reference's run, computed once."""
    key = name, dtype, tuple(how.items())
    if key not in _runs:
        _runs[key] = Run(name, dtype, **how)
    return _runs[key]
