"""Reductions: the tree that adds up, their values in rules, IEEE arithmetic, and the plan of passes over memory."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from data import DTYPES, same, special
from optforge import exp, global_norm, global_sum, log, max_abs, maximum, mean, norm, scalar, sqrt, sum, where
from optforge.core.diagnostics import RuleError, ScalarError
from optforge.core.summation import tensor_total, total
from optimizing import TARGETS, bits
from oracles import _tree as oracle

LEAF, CHUNK = 1024, 32768
BORDERS = sorted(
    {max(0, k * n + d) for n in (32, LEAF, CHUNK) for k in (0, 1, 2, 3) for d in (-1, 0, 1)} | {5000, 70_001}
)


# ── the tree ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", BORDERS)
def test_the_tree_is_the_slow_one(size: int) -> None:
    """Addition by addition, with values of which every order gives other bits; the error is small."""
    rng = np.random.default_rng(size)
    x = rng.standard_normal(size) * np.exp(rng.standard_normal(size) * 4)
    slow = oracle.slow_tree_sum(x)
    assert same(tensor_total(x, "sum"), slow)
    assert same(tensor_total(x, "squares"), oracle.slow_tree_sum(x * x))
    single = x.astype(np.float32)
    assert same(tensor_total(single, "sum"), oracle.slow_tree_sum(single))
    assert same(tensor_total(single, "squares"), oracle.squares_sum(single))
    assert same(total(x, "sum"), slow)
    assert tensor_total(x, "max") == oracle.max_abs(x) == total(np.abs(x), "max")
    positive = np.abs(x)
    exact = math.fsum(positive)
    assert abs(tensor_total(positive, "sum") - exact) <= 2e-15 * exact


def test_the_tree_grows_another_level() -> None:
    """More than 32768 chunks: the sums of the chunks are of two chunks themselves."""
    sums = np.resize(np.array([1.0, 1e-9, 3e7, 2.0**-40]), CHUNK + 17)
    assert same(total(sums, "sum"), oracle.slow_tree_sum(sums))
    x = np.broadcast_to(np.float32(0.1), (CHUNK * LEAF + 40_000,))
    chunk, rest = tensor_total(x[:CHUNK], "sum"), tensor_total(x[:40_000][CHUNK:], "sum")
    assert same(tensor_total(x, "sum"), total([chunk] * (LEAF + 1) + [rest], "sum"))
    exact = float(x[0]) * x.size
    assert abs(tensor_total(x, "sum") - exact) <= 2e-15 * exact


@pytest.mark.parametrize("size", [1, 33, 1025, CHUNK + 1])
def test_the_largest_is_nan_where_any_is(size: int) -> None:
    x = np.linspace(-3, 2, size)
    for place in {0, size // 2, size - 1}:
        y = x.copy()
        y[place] = np.nan
        assert math.isnan(tensor_total(y, "max"))
        y[place] = -np.inf
        assert tensor_total(y, "max") == np.inf
    assert tensor_total(x, "max") == 3.0 if size > 1 else True
    assert tensor_total(np.zeros(0), "max") == 0.0


def test_sums_of_zeros_are_positive() -> None:
    for size in (1, 2, 33, CHUNK + 1):
        assert math.copysign(1, tensor_total(np.full(size, -0.0), "sum")) == 1
        assert math.copysign(1, tensor_total(np.full(size, -0.0, np.float32), "max")) == 1


# ── their values in rules ───────────────────────────────────────────────────────────────────────────────────────────


@of.rule
def reducing(
    p,
    g,
    a: scalar = 0.0,
    b: scalar = 0.0,
    c: scalar = 0.0,
    d: scalar = 0.0,
    e: scalar = 0.0,
    f: scalar = 0.0,
    h: scalar = 0.0,
):
    """Each reduction, as scalar state."""
    a = norm(g)
    b = sum(g)
    c = mean(g)
    d = max_abs(g)
    e = global_norm(g)
    f = global_sum(g)
    h = norm(p - g)
    return p, a, b, c, d, e, f, h


@pytest.mark.parametrize("target", TARGETS)
def test_reductions_against_their_oracles(target: str) -> None:
    """Of tensors of both dtypes at once, of values that overflow, and of NaN, of which one infects what sees it."""
    rng = np.random.default_rng(0)
    sizes = (0, 1, 31, 32, 33, 1023, 1024, 1025, 32_767, 32_768, 32_769, 70_000)
    grads = [rng.standard_normal(n).astype(DTYPES[k % 2]) for k, n in enumerate(sizes)]
    params = [rng.standard_normal(n).astype(g.dtype) for n, g in zip(sizes, grads, strict=True)]
    for place, value in ((None, 0.0), (8, 1e30), (6, np.inf), (5, np.nan)):
        if place is not None:
            grads[place][-1] = value
        opt = of.Optimizer(params, reducing, target=target)
        opt.step(grads)
        for k, g in enumerate(grads):
            with np.errstate(all="ignore"):
                difference = params[k] - g
            expected = {
                "a": oracle.norm(g),
                "b": oracle.sum_(g),
                "c": oracle.mean(g),
                "d": oracle.max_abs(g),
                "e": oracle.global_norm(grads),
                "f": oracle.global_sum(grads),
                "h": oracle.norm(difference),
            }
            for name, wanted in expected.items():
                assert same(opt.state[name][k], wanted), f"{name} of size {g.size}"


@pytest.mark.parametrize("target", TARGETS)
def test_a_tensor_without_gradient_is_in_no_reduction(target: str) -> None:
    params = [np.ones(3), np.ones(2), np.ones(1)]
    opt = of.Optimizer(params, reducing, target=target)
    opt.step([np.full(3, 2.0), None, np.full(1, 3.0)])
    assert [*opt.state["f"]] == [9.0, 0.0, 9.0]
    assert opt.state["b"] == [6.0, 0.0, 3.0]


@of.rule
def nested(p, g, m=0.0, last: scalar = 0.0, *, lr=0.1):
    """Each reduction needs the one before it; the state keeps the last."""
    unit = g / norm(g)
    centred = unit - mean(unit * p)
    m = m + centred / (1 + max_abs(centred))
    last = last + global_norm(m)
    p = p - lr * m / (1 + last)
    return p, m, last


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nested_reductions(dtype: Any, target: str) -> None:
    """Four reductions, one behind the other, by hand."""
    rng = np.random.default_rng(1)
    sizes = (40_000, 33)
    params = [rng.standard_normal(n).astype(dtype) for n in sizes]
    m, last = [np.zeros_like(p) for p in params], 0.0
    expected = [p.copy() for p in params]
    opt = of.Optimizer(params, nested, target=target, lr=0.3)
    assert sum_of_phases(nested) == 5
    for _ in range(3):
        grads = [rng.standard_normal(n).astype(dtype) for n in sizes]
        for k, (p, g) in enumerate(zip(expected, grads, strict=True)):
            unit = g / dtype(oracle.norm(g))
            centred = unit - dtype(oracle.mean(unit * p))
            m[k] = m[k] + centred / dtype(1 + oracle.max_abs(centred))
        last = last + oracle.global_norm(m)
        expected = [p - dtype(0.3) * own / dtype(1 + last) for p, own in zip(expected, m, strict=True)]
        opt.step(grads)
        for k in range(2):
            assert same(opt.params[k], expected[k])
            assert same(opt.state["m"][k], m[k])
        assert opt.state["last"] == [last, last]


def sum_of_phases(rule: of.Rule) -> int:
    return len([phase for phase in rule.kernel().phases if not phase.optional])


@of.rule
def choosing(p, g, m=0.0, *, lr=0.1, bound=1.0, nothing=1.0):
    """Reductions in branches and masks, of which some are not taken."""
    size = norm(g)
    m = m + (g / size if size > bound else g - mean(g))
    mask = where(abs(m) > mean(abs(m)), max_abs(m), 0.5 * m)
    rate = lr / nothing if nothing != 0 else lr * max_abs(g)
    p = p - rate * mask if bound > 0 else p + sum(g) * m
    return p, m


@pytest.mark.parametrize("hyper", [{}, {"bound": 1e9}, {"bound": -1.0}, {"nothing": 0.0}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions_in_branches(dtype: Any, hyper: dict[str, float]) -> None:
    rng = np.random.default_rng(2)
    p = rng.standard_normal(1500).astype(dtype)
    live = {target: p.copy() for target in TARGETS}
    opts = {target: of.Optimizer([live[target]], choosing, target=target, **hyper) for target in TARGETS}
    m = np.zeros_like(p)
    for _ in range(2):
        g = rng.standard_normal(1500).astype(dtype)
        p, m = choosing(p, g, m, **hyper)
        for target in TARGETS:
            opts[target].step([g])
            assert same(live[target], p)
            assert same(opts[target].state["m"][0], m)


# ── IEEE values and errors ──────────────────────────────────────────────────────────────────────────────────────────


@of.rule
def ieee(
    p,
    g,
    a: scalar = 0.0,
    b: scalar = 0.0,
    c: scalar = 0.0,
    d: scalar = 0.0,
    e: scalar = 0.0,
    f: scalar = 0.0,
    h: scalar = 0.0,
    i: scalar = 0.0,
    j: scalar = 0.0,
    k: scalar = 0.0,
    *,
    one=1.0,
):
    """What would raise of Python's own scalars."""
    x = sum(g)
    a = one / x
    b = -one / x
    c = x / x
    d = x**-one
    e = sqrt(x - one)
    f = (x - one) ** 0.5
    h = log(x)
    i = one % x
    j = exp(1000 * (x + one))
    k = (1e200 * (x + one)) ** 2 * maximum(x, -one)
    return p, a, b, c, d, e, f, h, i, j, k


def test_what_would_raise_has_ieee_s_value_behind_a_reduction() -> None:
    inf, nan = math.inf, math.nan
    p, g = np.ones(3), np.zeros(3)
    expected = [inf, -inf, nan, inf, nan, nan, -inf, nan, inf, nan]
    _, *values = ieee(p, g)
    assert bits(list(map(abs_of_nan, values))) == bits(expected)
    for target in TARGETS:
        opt = of.Optimizer([p], ieee, target=target)
        opt.step([g])
        assert bits([abs_of_nan(tree[0]) for tree in opt.state.values()]) == bits(expected), target


def abs_of_nan(x: float) -> float:
    return math.nan if math.isnan(x) else x


@of.rule
def normed(p, g, *, lr=0.5, divisor=1.0):
    """A scalar that no reduction enters, in an expression that one enters."""
    p = p - (lr / divisor) * norm(g) * g / norm(p)
    return p


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_of_zero_divides(dtype: Any) -> None:
    p, g = np.zeros(3, dtype), np.array([1, 0, -1], dtype)
    expected = normed(p, g)
    assert same(expected, np.array([-np.inf, np.nan, np.inf], dtype))
    for target in TARGETS:
        live = p.copy()
        of.Optimizer([live], normed, target=target).step([g])
        assert same(live, expected)


@pytest.mark.parametrize("target", TARGETS)
def test_a_scalar_beside_a_reduction_raises_before_the_first_write(target: str) -> None:
    with pytest.raises(ZeroDivisionError):
        normed(np.ones(3), np.ones(3), divisor=0.0)
    p, g = [np.ones(3), np.ones(2, np.float32)], [np.ones(3), np.ones(2, np.float32)]
    opt = of.Optimizer(p, normed, target=target, zero_grads=True, divisor=0.0)
    with pytest.raises(ScalarError, match="division by zero"):
        opt.step(g)
    assert opt.t == 0
    assert all((array == 1).all() for array in p + g)


@of.rule
def guarded(p, g, left: scalar = 2.0, *, lr=0.5, off=0.0):
    """Branches that are not taken divide by 0; what is left of a tensor runs out at its third step."""
    a = norm(g) / off if off != 0 else norm(g)
    b = 1 / off * norm(g) if off != 0 and 1 / off > 0 else lr / left
    p = p - (a * b) * g
    left = left - 1
    return p, left


@pytest.mark.parametrize("target", TARGETS)
def test_untaken_branches_are_not_evaluated(target: str) -> None:
    p = [np.ones(3), np.ones(3, np.float32)]
    g = [np.ones(3), np.ones(3, np.float32)]
    opt = of.Optimizer(p, guarded, target=target)
    expected = guarded(p[0], g[0])[0]
    opt.step([g[0], None])
    assert same(p[0], expected)
    opt.step([g[0], g[1]])
    before = bits((p, opt.state_dict()))
    with pytest.raises(ScalarError, match=re.escape("params[0]")):
        opt.step(g)
    assert bits((p, opt.state_dict())) == before
    opt.step([None, g[1]])


@of.rule
def late(p, g, *, lr=0.5, off=0.0):
    """Whether there is a division by 0 is known behind a pass."""
    p = p - (lr / off if norm(g) > 2 else lr) * g
    return p


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_reduction_decides_never_raises(target: str) -> None:
    p = np.zeros(3)
    opt = of.Optimizer([p], late, target=target)
    opt.step([np.ones(3)])
    assert p.tolist() == [-0.5] * 3
    opt.step([np.full(3, 4.0)])
    assert p.tolist() == [-math.inf] * 3


# ── types ───────────────────────────────────────────────────────────────────────────────────────────────────────────

REFUSED = {
    "of a scalar": ("x = norm(lr)", "norm() is over elements, and this is a scalar", "norm(lr)"),
    "of a reduction": ("x = sum(norm(g))", "sum() is over elements, and this is a scalar", "sum(norm(g))"),
    "of a mask": ("x = mean(g > 0)", "a comparison of elements is not a number", ""),
    "of two": ("x = norm(p, g)", "norm(x) takes 1 argument(s), not 2", ""),
    "of none": ("x = global_sum()", "global_sum(x) takes 1 argument(s), not 0", ""),
    "by keyword": ("x = norm(x=g)", "norm() takes no keyword arguments", ""),
    "in an assert": ("assert norm(g) > 0", "an assert is about hyperparameters, and 'g' is none", ""),
    "in a static if": ("if norm(g) > 0:\n        p = g", "`if` decides on static options only", ""),
    "as an element's power": ("x = g ** norm(g)", "elements have the powers 2, 0.5 and -1 only", ""),
    "without a call": ("x = norm", "'norm' is a function", ""),
    "as state that is no scalar's": ("m = norm(g)\n    x = m[0]", "", ""),
}


@pytest.mark.parametrize(("line", "message", "_"), REFUSED.values(), ids=REFUSED)
def test_reductions_that_are_refused(line: str, message: str, _: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from optforge import global_sum, mean, norm, rule, sum\n\n\n@rule\n"
        f"def mine(p, g, m=0.0, *, lr=0.1):\n    {line}\n    return p, m\n"
    )
    with pytest.raises(RuleError) as refused:
        of.Rule.from_file(path, "mine")
    assert message in str(refused.value)
    assert f"{path}:6:" in str(refused.value) or f"{path}:7:" in str(refused.value)
    assert "^" in str(refused.value)


def test_reductions_are_over_arrays() -> None:
    for reduction in (norm, sum, mean, max_abs, global_norm, global_sum):
        with pytest.raises(TypeError, match="is over an array, not over 1"):
            reduction(1.0)
        assert repr(reduction).startswith("<optforge reduction ")
    assert float(norm(np.array([3.0, 4.0]))) == 5.0
    assert float(mean(np.array([3.0, 4.0], np.float32))) == 3.5


def test_a_sum_in_place_of_an_element_is_stored_as_one() -> None:
    """A scalar bound to an array is rounded to each element."""

    @of.rule
    def constant(p, g, m=0.0):
        m = sum(g)
        p = norm(g)
        return p, m

    for target in TARGETS:
        p = np.zeros(3, np.float32)
        opt = of.Optimizer([p], constant, target=target)
        opt.step([np.full(3, 0.1, np.float32)])
        assert same(p, np.full(3, oracle.norm(np.full(3, 0.1, np.float32)), np.float32))
        assert same(opt.state["m"][0], np.full(3, oracle.sum_(np.full(3, 0.1, np.float32)), np.float32))


# ── the plan ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_lamb_stores_its_moments_early() -> None:
    """In the first pass, where they are at hand, so that the second need not read the gradient."""
    first, second = (phase for phase in of.rules.lamb.kernel().phases if not phase.optional)
    assert (first.loads, [name for name, _ in first.stores]) == (("p", "g", "m", "v"), ["m", "v"])
    assert (second.loads, [name for name, _ in second.stores]) == (("p", "m", "v"), ["p"])


@pytest.mark.parametrize(
    ("rule", "moved"),
    {
        "sgd": (of.rules.sgd, (2, 1)),
        "adam": (of.rules.adam, (4, 3)),
        "lamb": (of.rules.lamb, (7, 3)),
        "lars": (of.rules.lars, (5, 2)),
        "novograd": (of.rules.novograd, (4, 2)),
        "clipped adam": (of.clip_by_global_norm >> of.rules.adam, (5, 3)),
        "decayed sgd": (of.add_weight_decay >> of.rules.sgd, (2, 1)),
        "clipped lamb": (of.clip_by_global_norm >> of.rules.lamb, (8, 3)),
    }.values(),
)
def test_memory_moved(rule: of.Rule, moved: tuple[int, int]) -> None:
    assert rule.kernel().moved == moved


@pytest.mark.parametrize("target", TARGETS)
def test_rules_that_change_nothing_behind_a_reduction(target: str) -> None:
    """The gradient as the rule sees it is told also where the rule does not look at it."""

    @of.rule
    def idle(p, g, m=0.0, *, lr=0.5):
        p = p * lr
        return p, m

    @of.rule
    def keeping(p, g, m=0.0):
        m = m + g
        return p, m

    @of.transform
    def leaning(p, g):
        g = g + mean(g) * p
        return g

    for chain, rule, norms in (
        (of.centralize, idle, (4.0, 0.0, 2.0)),
        (of.clip_by_norm(max_norm=2.0), idle, (4.0, 2.0, 2.0)),
        (of.clip_by_norm(max_norm=2.0), keeping, (4.0, 2.0, 4.0)),
        (leaning, idle, (4.0, 12.0, 2.0)),
        (leaning, keeping, (4.0, 12.0, 4.0)),
    ):
        p, g = np.full(4, 2.0), np.full(4, 2.0)
        opt = of.Optimizer([p], chain >> rule, target=target, skip_nonfinite=True, zero_grads=True)
        told = opt.step([g], stats=True)
        assert (told.grad_norm, told.clipped_grad_norm, told.param_norm) == norms
        assert not g.any()
        g[:] = np.nan, 1, 1, 1
        assert opt.step([g], stats=True).skipped
        assert not g.any()


# ── random rules ────────────────────────────────────────────────────────────────────────────────────────────────────

IMPORTS = "from optforge import rule, scalar, sqrt, where, maximum, abs, norm, sum, mean, max_abs, global_norm\n"


class Author:
    """Writes random rules in which reductions enter everything; in every other one none is inside of another."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.elements, self.scalars = ["p", "g"], ["lr", "t", "0.5"]
        self.left = 4

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def scalar(self, depth: int) -> str:
        if self.left and self.random.random() < 0.45:
            self.left -= 1
            return f"{self.pick('norm', 'sum', 'mean', 'max_abs', 'global_norm')}({self.element(min(depth, 1))})"
        if depth == 0:
            return str(self.pick(*self.scalars))
        a, b = self.scalar(depth - 1), self.scalar(depth - 1)
        return str(
            self.pick(
                f"({a} + {b})",
                f"({a} - {b})",
                f"{a} * {b}",
                f"{a} / (2 + abs({b}))",
                f"sqrt(abs({a}))",
                f"maximum({a}, {b})",
                f"({a} if {b} > {self.pick('lr', '1')} else {b})",
            )
        )

    def element(self, depth: int) -> str:
        if depth == 0:
            return str(self.pick(*self.elements))
        a, b = self.element(depth - 1), self.element(depth - 1)
        if self.random.random() < 0.5:
            s = self.scalar(depth - 1)
            return str(self.pick(f"({s}) * {a}", f"({a} - {s})", f"({a} if {s} > 1 else {b})", f"{a} / (1 + abs({s}))"))
        return str(
            self.pick(
                f"({a} + {b})", f"({a} - {b})", f"{a} * {b}", f"where({a} > {b}, {a}, {b})", f"{a} / (1 + {b}**2)"
            )
        )

    def rule(self) -> str:
        states = [f"s{k}" for k in range(self.random.randint(0, 3))]
        counters = [f"c{k}" for k in range(self.random.randint(0, 1))]
        starts = ["0.0", '"p"', '"g"', '"lr"']
        declared = [f"{s}={self.pick(*starts)}" for s in states] + [f"{c}: scalar = 0.5" for c in counters]
        self.elements += states
        self.scalars += counters
        lines = []
        for k in range(self.random.randint(1, 2)):
            lines.append(f"x{k} = {self.element(2)}")
            self.elements.append(f"x{k}")
        for name in states:
            if self.random.random() < 0.8:
                lines.append(f"{name} = {self.element(2)}")
        for name in counters:
            lines.append(f"{name} = {self.scalar(1)}")
        place = self.random.randint(0, len(lines))
        lines.insert(place, f"p = {self.element(2) if place == len(lines) else 'p - lr * g'}")
        returned = ", ".join(["p", *states, *counters])
        head = f"@rule\ndef mine({', '.join(['p', 'g', *declared])}, *, t, lr=0.07):\n"
        return IMPORTS + head + "".join(f"    {line}\n" for line in [*lines, f"return {returned}"])


def written(text: str, path: Path) -> of.Rule:
    """The rule of a text, read from a file."""
    path.write_text(text)
    return of.Rule.from_file(path, "mine")


def random_rule(seed: int, path: Path) -> tuple[str, of.Rule]:
    text = Author(seed).rule()
    return text, written(text, path / f"random_{seed}.py")


def follow(rule: of.Rule, text: str, targets: tuple[str, ...], seed: int, dtype: Any = np.float32) -> None:
    """Three steps of one tensor: plain Python, and the targets."""
    rng = np.random.default_rng(seed)
    p = np.concatenate([rng.standard_normal(1100), special(np.float32)[:5]]).astype(dtype)
    opts = {target: of.Optimizer([p.copy()], rule, target=target) for target in targets}
    state: tuple[Any, ...] = ()
    for t in range(1, 4):
        g = rng.standard_normal(p.size).astype(dtype)
        returned = rule.function(p, g, *state, t=t) if rule.definition.time else rule.function(p, g, *state)
        p, *rest = returned if isinstance(returned, tuple) else (returned,)
        state = tuple(rest)
        told = {target: repr(opt.step([g], stats=True)) for target, opt in opts.items()}
        assert len(set(told.values())) == 1, f"statistics, step {t}\n{text}"
        for target, opt in opts.items():
            assert same(opt.params[0], p), f"p, {target}, step {t}\n{text}"
            for name, value in zip(rule.state, state, strict=True):
                if name in opt.state:
                    assert same(opt.state[name][0], value), f"{name}, {target}, step {t}\n{text}"


@pytest.mark.parametrize("seed", range(6))
def test_random_rules_with_reductions_agree(seed: int, tmp_path: Path) -> None:
    text, rule = random_rule(seed, tmp_path)
    for dtype in DTYPES:
        follow(rule, text, TARGETS, seed, dtype)


@pytest.mark.parametrize("block", range(4))
def test_plans_never_read_what_they_have_overwritten(block: int, tmp_path: Path) -> None:
    """The reference, which takes the passes in turn, against plain Python, which knows no passes."""
    several = 0
    for seed in range(100 + 25 * block, 125 + 25 * block):
        text, rule = random_rule(seed, tmp_path)
        kernel = rule.kernel()
        written_before: set[str] = set()
        for phase in kernel.phases:
            for name in phase.loads:
                if name in written_before:  # what is read again is what was stored
                    assert any(let.expr.op == "load" and let.expr.value == name for let in phase.lets), text
            written_before |= {name for name, _ in phase.stores}
        several += len(kernel.phases) > 1
        follow(rule, text, ("numpy",), seed)
    assert several > 12


def test_many_reductions_are_planned_in_time(tmp_path: Path) -> None:
    """More plans than can be compared."""
    lines = [
        f"x{k} = {'g' if k == 0 else f'x{k - 1}'} * (1 + norm({'p' if k == 0 else f'x{k - 1}'}))" for k in range(7)
    ]
    lines += [f"s{k} = s{k} + x{k}" for k in range(7)]
    states = ", ".join(f"s{k}=0.0" for k in range(7))
    body = "".join(f"    {line}\n" for line in [*lines, "p = p - lr * x6 / (1 + norm(s6))"])
    returned = ", ".join(["p", *(f"s{k}" for k in range(7))])
    text = f"{IMPORTS}@rule\ndef mine(p, g, {states}, *, lr=1e-3):\n{body}    return {returned}\n"
    follow(written(text, tmp_path / "many.py"), text, ("numpy",), 0)


def test_reductions_bound_to_a_name_are_one(tmp_path: Path) -> None:
    """The same norm, asked for twice and by the statistics, is added up once."""

    @of.rule
    def twice(p, g, *, lr=0.1):
        p = p - lr * norm(g) * g / (1 + norm(g) + global_norm(g))
        return p

    kernel = twice.kernel()
    needed = [r for r in kernel.reductions if not r.observed]
    assert len(needed) == 1
    assert dict(kernel.statistics)["grad"] == needed[0].id
    assert dict(kernel.statistics)["clipped"] == needed[0].id
