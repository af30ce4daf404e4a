"""Optimizers beside the oracle of a whole step: transforms, rule, norms and counts, every bit compared."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

import optforge as of
from data import same
from optimizing import TARGETS
from oracles import _phase, _transforms, oracle

SIZES = (0, 1, 31, 32, 33, 1023, 1024, 1025, 32767, 32768, 32769, 70000)
Chain = Sequence[tuple[str, dict[str, Any]]]


def mixed(sizes: Sequence[int] = SIZES) -> list[Any]:
    """A dtype for each size: float32 and float64 in turn, so that neighbours differ."""
    return [(np.float32, np.float64)[k % 2] for k in range(len(sizes))]


def composed(chain: Chain, rule: of.Rule | str) -> of.Rule:
    """The transforms of a chain, with their static options, before a rule."""
    parts: list[Any] = []
    for name, settings in chain:
        transform = of.transforms[name]
        options = {option: settings[option] for option in transform.options if option in settings}
        parts.append(transform(**options) if options else transform)
    made: of.Rule = functools.reduce(operator.rshift, [*parts, of.rules[rule] if isinstance(rule, str) else rule])
    return made


def spread(rng: np.random.Generator, size: int, dtype: Any, scale: float = 1.0) -> Any:
    """Gradients over a few magnitudes."""
    return (rng.standard_normal(size) * rng.choice([1e-3, 0.1, 1.0, 3.0], size=size) * scale).astype(dtype)


class Beside:
    """Optimizers of all targets, and the oracle, which take the same steps.

    `chain` are transforms by name with their settings, `hyper` the hyperparameters of the rule.
    """

    def __init__(
        self,
        chain: Chain,
        name: str,
        hyper: dict[str, float],
        sizes: Sequence[int] = SIZES,
        dtypes: Sequence[Any] | None = None,
        *,
        seed: int = 0,
        targets: Sequence[str] = TARGETS,
        rule: of.Rule | None = None,
        **how: Any,
    ):
        self.rng = np.random.default_rng(seed)
        self.oracle, self.hyper, self.t = oracle(name), hyper, 0
        self.sizes, self.dtypes, self.steps = sizes, dtypes or mixed(sizes), [0] * len(sizes)
        self.params = [self.rng.standard_normal(n).astype(d) for n, d in zip(sizes, self.dtypes, strict=True)]
        scalars = getattr(self.oracle, "SCALAR_STATE", ())
        self.states = [
            {s: v if s in scalars else np.full_like(p, v) for s, v in self.oracle.STATE.items()} for p in self.params
        ]
        self.skips, self.zeroes = how.get("skip_nonfinite", False), how.get("zero_grads", False)
        self.chain: list[Any] = []
        settings = dict(hyper)
        for transform, given in chain:
            borrowed = {"lr": hyper["lr"]} if transform == "decoupled_weight_decay" else {}
            # The oracle calls the form "threshold" by another name.
            form = {"form": {"threshold": "seed"}.get(given["form"], given["form"])} if "form" in given else {}
            self.chain.append((getattr(_transforms, transform), {**given, **borrowed, **form}))
            settings |= {k: v for k, v in given.items() if k in of.transforms[transform].hyperparameters}
        made = rule or composed(chain, name)
        self.optimizers = {
            target: of.Optimizer([p.copy() for p in self.params], made, target=target, **settings, **how)
            for target in targets
        }

    def gradients(self, scale: float = 1.0) -> list[Any]:
        """Gradients for all tensors."""
        return [spread(self.rng, n, d, scale) for n, d in zip(self.sizes, self.dtypes, strict=True)]

    def step(self, grads: Sequence[Any], grad_scale: float | None = None) -> _phase.Phase:
        """One step everywhere, compared; what the oracle says of it."""
        asked = {} if grad_scale is None else {"grad_scale": grad_scale}
        expected = _phase.phase(
            self.params,
            grads,
            self.states,
            [steps + 1 for steps in self.steps],
            self.oracle,
            self.chain,
            self.hyper,
            skip_nonfinite=self.skips,
            **asked,
        )
        self.params, self.states = expected.params, expected.states
        self.t += not expected.skipped
        self.steps = [
            steps + (g is not None and not expected.skipped) for steps, g in zip(self.steps, grads, strict=True)
        ]
        for target, optimizer in self.optimizers.items():
            given = [None if g is None else g.copy() for g in grads]
            told = optimizer.step(given, stats=True, **asked)
            where = f"{target}, {optimizer.rule.name}, step {self.t}"
            self.compare(optimizer, where)
            agree(told, expected.stats, where)
            for own, before in zip(given, grads, strict=True):
                if own is not None:
                    left = np.zeros_like(before) if self.zeroes else before
                    assert own.tobytes() == left.tobytes(), f"gradients: {where}"
        return expected

    def compare(self, optimizer: of.Optimizer, where: str = "") -> None:
        """Parameters, state and time of an optimizer against the oracle."""
        assert optimizer.t == self.t, where
        for k, p in enumerate(self.params):
            assert same(optimizer.params[k], p), f"p of size {p.size}: {where}"
        for name in self.oracle.STATE:
            for k, state in enumerate(self.states):
                assert same(optimizer.state[name][k], state[name]), f"{name} of size {self.sizes[k]}: {where}"


def agree(told: Any, expected: _phase.Stats, where: str = "") -> None:
    """Statistics against the oracle's: every bit of the norms, and the counts."""
    assert told is not None
    for name, value in expected.totals.items():
        assert same(float(told[name]), float(value)), f"{name} is {told[name]!r}, not {value!r}: {where}"
    for name, values in expected.tensors.items():
        own = told.per_tensor[name]
        assert same(own.astype(np.float64), values.astype(np.float64)), f"{name} of each tensor: {where}"
