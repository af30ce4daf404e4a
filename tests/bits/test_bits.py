"""Every rule, dtype and target has the bits of independent oracles and of the rule run as plain Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import optforge as of
from amount import some
from data import DTYPES, SIZES, Guarded, gradients, same, special_pairs
from optimizing import TARGETS
from oracles import begin, names, oracle

RULES = names()
CASES = [(name, k) for name in RULES for k in range(len(oracle(name).SETTINGS) + 1)]


def settings(name: str, k: int) -> dict[str, float]:
    """The k-th set of hyperparameters of an oracle, the defaults last."""
    return [*oracle(name).SETTINGS, oracle(name).HYPERPARAMETERS][k]


def test_every_rule_has_an_oracle() -> None:
    assert sorted(of.rules) == RULES


@pytest.mark.parametrize("name", RULES)
def test_declarations_are_the_published_ones(name: str) -> None:
    assert dict(of.rules[name].hyperparameters) == oracle(name).HYPERPARAMETERS
    assert dict(of.rules[name].state) == oracle(name).STATE


def start(name: str, arrays: list[Any]) -> list[dict[str, Any]]:
    """The oracle's state for parameters."""
    return [begin(name, p) for p in arrays]


# Every rule with the first settings of its oracle, in C, and some in other ways.
TRAJECTORIES = [(name, k, dtype, target) for name, k in CASES for dtype in DTYPES for target in TARGETS]


@pytest.mark.parametrize(
    ("name", "k", "dtype", "target"),
    some(TRAJECTORIES, 8, lambda case: case[1] == 0 and case[2] is np.float32 and case[3] == "c"),
)
def test_trajectory_equals_the_oracle(name: str, k: int, dtype: Any, target: str) -> None:
    """Tensors of all sizes together, at odd offsets between guards, several steps."""
    rng = np.random.default_rng(k)
    hyper = settings(name, k)
    guarded = Guarded(SIZES, dtype, offset=k)
    expected = []
    for p in guarded.arrays:
        p[:] = rng.standard_normal(p.size).astype(dtype)
        expected.append(p.copy())
    state = start(name, expected)
    optimizer = of.Optimizer(guarded.arrays, name, target=target, **hyper)
    grads = Guarded(SIZES, dtype, offset=3 - k)
    for t in range(1, 6):
        for g in grads.arrays:
            g[:] = gradients(rng, g.size, dtype)
        optimizer.step(grads.arrays)
        stepped = optimizer.state
        for i, g in enumerate(grads.arrays):
            expected[i], state[i] = oracle(name).step(expected[i], g, state[i], t, **hyper)
            assert same(guarded.arrays[i], expected[i]), f"p of size {SIZES[i]}, step {t}"
            for s, values in state[i].items():
                assert same(stepped[s][i], values) if t == 5 else True, f"{s} of size {SIZES[i]}, step {t}"
    assert guarded.intact()
    assert grads.intact()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "k"), CASES)
def test_special_values_equal_the_oracle(name: str, k: int, dtype: Any, target: str) -> None:
    """Zeros of both signs, subnormal, huge and infinite values and NaN, in parameters and gradients."""
    hyper = settings(name, k)
    p, g = special_pairs(dtype)
    expected, state = p.copy(), start(name, [p])[0]
    optimizer = of.Optimizer([p], name, target=target, **hyper)
    for t, gradient in enumerate([g, g[::-1].copy(), np.roll(g, 7)], 1):
        optimizer.step([gradient])
        expected, state = oracle(name).step(expected, gradient, state, t, **hyper)
        assert same(p, expected)
        assert all(same(optimizer.state[s][0], values) for s, values in state.items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RULES)
def test_threads_do_not_change_bits(name: str, dtype: Any) -> None:
    """One large tensor beside many small ones, dealt out to 1, 2, 3 and 7 threads."""
    rng = np.random.default_rng(5)
    sizes = [470_001, 1, 0, 33_000, 64, *([40] * 50), 1024, 20_480]
    first = [rng.standard_normal(n).astype(dtype) for n in sizes]
    grads = [[gradients(rng, n, dtype) for n in sizes] for _ in range(2)]
    results = []
    for threads in (1, 2, 3, 7):
        params = [p.copy() for p in first]
        optimizer = of.Optimizer(params, name, threads=threads, **settings(name, 0))
        for gradient in grads:
            optimizer.step(gradient)
        results.append([*params, *(np.asarray(value) for s in optimizer.state.values() for value in s)])
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RULES)
def test_plain_python_equals_the_reference(name: str, dtype: Any) -> None:
    """The rule run as a Python function: the proof that the compiler understood its text."""
    rng = np.random.default_rng(1)
    rule = of.rules[name]
    hyper = settings(name, 0)
    p = rng.standard_normal(300).astype(dtype)
    live = p.copy()
    optimizer = of.Optimizer([live], rule, target="numpy", **hyper)
    state = [*begin(name, p).values()]
    time = {"t": 0.0} if rule.definition.time else {}
    for t in range(1, 4):
        g = gradients(rng, 300, dtype)
        time = {"t": t} if time else {}
        returned = rule.function(p, g, *state, **hyper, **time)
        p, *state = returned if isinstance(returned, tuple) else (returned,)
        optimizer.step([g])
        assert same(live, p)
        assert all(same(optimizer.state[s][0], v) for s, v in zip(rule.state, state, strict=True))
