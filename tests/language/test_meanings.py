"""A name bound again: each binding is a value of its own, in every pass and every part of a composition."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from data import DTYPES, same
from optforge import abs, max_abs, maximum, minimum, norm, scalar, sign, where
from optforge.core.ir import Expr, Let, Phase, Type
from optforge.emit.variables import Variable, Variables, check
from optimizing import TARGETS
from oracles._tree import norm as norm_of


@of.transform
def soften(g, *, c=0.5):
    """A local of the name of the parameter."""
    p = abs(g) + c
    g = g / p
    return g


@of.transform
def soften_seen(p, g, *, c=0.5):
    """The same where the parameter is read before, and not returned."""
    g = g + p
    p = abs(g) + c
    g = g / p
    return g


@of.transform
def shrink(p, g, *, c=0.5):
    """A local of the name of the gradient, which is not returned."""
    g = g * c
    p = p - g
    return p


@of.rule
def reloaded(p, g, m=0.0, *, beta=0.9):
    """A state that the second pass loads again, behind an earlier meaning of its name that is alive there."""
    old = m
    m = p * 2
    a = m
    m = beta * old + g
    n = norm(m)
    p = p - n * m * a
    return p, m


@of.rule
def swapped(p, g, a=1.0, b=2.0, *, lr=0.1):
    """Names that change places, twice."""
    kept = a
    a = b
    b = kept
    kept = a + g
    a = b * kept
    b = kept - a
    p = p - lr * (a - b) * kept
    return p, a, b


@of.rule
def masks(p, g, m=0.0, *, lr=0.1):
    """A comparison and a number of one name, in turn."""
    m = g + m
    x = g > 0
    y = where(x, m, p)
    x = m * y
    z = x
    x = p < 0
    p = p - lr * where(x, y, z)
    return p, m


@of.rule
def ignores(p, g, *, lr=0.1):
    """Reduces, and reads no gradient."""
    p = p * (1 - lr * norm(p))
    return p


@of.rule
def powers(p, g, *, lr=0.1, k=2.0):
    """x·x where the exponent is the literal 2, and the library's pow elsewhere."""
    n = norm(g)
    a = n**k
    b = lr ** (1 + 1)
    c = lr**2.0
    d = (n + lr) ** 2
    p = p - a * g - b - c * p - d
    return p


@of.rule
def foreign(p, g, 名=0.0, _u540d=0.0, *, lr=0.1):
    """Totals whose names differ in letters that C has not."""
    名 = 名 + g
    _u540d = _u540d + 2 * g
    p = p - lr * (norm(名) + norm(_u540d) + max_abs(名)) * 名
    return p, 名, _u540d


@of.rule
def choosing(p, g, *, lr=0.1, k=3.0):
    """Functions of scalars before a step."""
    assert maximum(lr, 0) >= 0 and sign(k) > 0 and (lr + k) ** 2 > 0
    rate = maximum(lr, minimum(k, 0.25)) * (lr + k) ** 2 * sign(k - 4)
    p = p - rate * g
    return p


def softened(p: Any, g: Any, f: Any, lr: float, c: float) -> Any:
    return p - f(lr) * (g / (np.abs(g) + f(c)))


def reloaded_judge(p: Any, g: Any, m: Any, f: Any) -> Any:
    new = f(0.9) * m + g
    return p - f(norm_of(new)) * new * (p * f(2)), new


def swapped_judge(p: Any, g: Any, a: Any, b: Any, f: Any) -> Any:
    kept = b + g
    first = a * kept
    second = kept - first
    return p - f(0.1) * (first - second) * kept, first, second


def masks_judge(p: Any, g: Any, m: Any, f: Any) -> Any:
    m = g + m
    y = np.where(g > 0, m, p)
    return p - f(0.1) * np.where(p < 0, y, m * y), m


def powers_judge(p: Any, g: Any, f: Any) -> Any:
    n = norm_of(g)
    return p - f(n**2.0) * g - f(pow(0.1, 1.0 + 1.0)) - f(0.1 * 0.1) * p - f((n + 0.1) * (n + 0.1))


def foreign_judge(p: Any, g: Any, one: Any, two: Any, f: Any) -> Any:
    one, two = one + g, two + f(2) * g
    return p - f(0.1 * (norm_of(one) + norm_of(two) + float(np.abs(one).max()))) * one, one, two


CASES: dict[str, tuple[of.Rule, Callable[..., Any]]] = {
    "soften": (soften >> of.rules.sgd, lambda p, g, f: softened(p, g, f, 0.01, 0.5)),
    "soften_seen": (soften_seen >> of.rules.sgd, lambda p, g, f: softened(p, g + p, f, 0.01, 0.5)),
    "shrink": (shrink >> of.rules.sgd, lambda p, g, f: (p - g * f(0.5)) - f(0.01) * g),
    "reloaded": (reloaded, reloaded_judge),
    "swapped": (swapped, swapped_judge),
    "masks": (masks, masks_judge),
    "ignores": (
        of.clip_by_value >> ignores,
        lambda p, g, f: p * f(1 - 0.1 * norm_of(p)),
    ),
    "powers": (powers, powers_judge),
    "foreign": (foreign, foreign_judge),
    "choosing": (choosing, lambda p, g, f: p - f(max(0.1, 0.25) * ((0.1 + 3.0) * (0.1 + 3.0)) * -1.0) * g),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_every_binding_keeps_its_meaning(case: str, dtype: Any) -> None:
    rule, judge = CASES[case]
    rng = np.random.default_rng(5)
    p = rng.standard_normal(3000).astype(dtype)
    steps = [(rng.standard_normal(3000) * 10.0**-k).astype(dtype) for k in range(3)]
    settings = {"lr": 0.01} if case.startswith(("soften", "shrink")) else {}
    live = {target: p.copy() for target in TARGETS}
    optimizers = {t: of.Optimizer([live[t]], rule, target=t, **settings) for t in TARGETS}
    state = [np.full_like(p, own) for own in {"swapped": (1, 2), "foreign": (0, 0)}.get(case, (0,) * len(rule.state))]
    for g in steps:
        before = (p, *state)
        p, *state = as_tuple(judge(p, g, *state, dtype))
        plain = as_tuple(rule.function(before[0], g, *before[1:], **settings))
        assert all(same(own, right) for own, right in zip(plain, (p, *state), strict=True)), "function"
        for target, optimizer in optimizers.items():
            told = optimizer.step([g.copy()], stats=True)
            assert told.update_norm == norm_of(p - before[0]), target
            assert same(live[target], p), target
            for name, right in zip(rule.state, state, strict=True):
                assert same(optimizer.state[name][0], right), f"{name} of {target}"


@of.rule
def negative_zero(p, g, m=-0.0, n: scalar = -0.0):
    """State that starts as the other zero, and keeps its sign."""
    a = m
    b = n
    p = p - g - a - b
    return p, m, n


@pytest.mark.parametrize("target", TARGETS)
def test_state_may_start_as_negative_zero(target: str) -> None:
    p = np.ones(3, np.float32)
    optimizer = of.Optimizer([p], negative_zero, target=target)
    optimizer.step([np.ones(3, np.float32)])
    assert np.signbit(np.asarray(optimizer.state["m"][0])).all()
    assert np.signbit(optimizer.state["n"][0])


@of.transform
def keeps(g, d: scalar = "e", *, e=1.5):
    """State that it never touches."""
    return g, d


@of.rule
def calls_a_local_so(p, g, *, lr=0.1):
    """A local of the name of another part's state."""
    d = lr * g
    p = p - d
    return p


def test_state_that_no_part_touches_is_dropped() -> None:
    assert (keeps >> calls_a_local_so).kernel().state == ()


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_a_name_whose_earlier_meaning_is_dead_stays_one_variable() -> None:
    """Emitted lines read like the rule's."""
    text = of.rules.adam.generate("c", dtypes=["f32"])["adam.c"]
    assert "        m = beta1_t * m + one_minus_beta1_t * g;\n" in text
    assert "m_2" not in text


@pytest.mark.parametrize("name", list(of.rules))
def test_the_check_of_meanings_sees_a_shared_variable(name: str) -> None:
    """Any two variables of a pass, of which both meanings are read later, cannot be one."""
    seen = 0
    for phase in of.rules[name].kernel().phases:
        variables = Variables(phase).of
        for one, other in itertools.permutations(sorted(set(variables.values()), key=str), 2):
            merged = {meaning: other if own == one else own for meaning, own in variables.items()}
            try:
                check(phase, merged)
            except AssertionError:
                seen += 1
    assert seen


def test_a_copy_of_what_a_variable_holds_is_no_assignment() -> None:
    load = Expr("load", Type.ELEMENT, value="m")
    twice = Expr("mul", Type.ELEMENT, (load, load))
    again, other = Let("m", 2, load), Let("m", 1, twice)
    phase = Phase(("m",), (other, again), (("m", again.ref), ("p", other.ref)))
    variables = Variables(phase)
    assert variables.of == {"m": Variable("m"), 1: Variable("m", number=1), 2: Variable("m")}
    assert variables.copies(again)
    assert not variables.rebound(Variable("m"))
    dead = replace(phase, stores=(("m", again.ref),))
    assert Variables(dead).of[1] == Variable("m", number=1), "the load is read again by the copy"


def test_the_literal_2_is_a_product_and_every_other_exponent_is_pow() -> None:
    exprs = [let.expr for group in powers.kernel().scalars for let in group.lets]
    found = [e.op for expr in exprs for e in expr.walk() if e.op in ("square", "pow")]
    assert sorted(found) == ["pow", "pow", "square", "square"]


def test_a_default_is_squared_as_a_formula_is(tmp_path: Path) -> None:
    base = next(x for x in (k / 1000 for k in range(1, 100_000)) if x * x != x**2.0)
    path = tmp_path / "own.py"
    path.write_text(
        "from optforge import rule\n\n@rule\n"
        f"def own(p, g, *, a={base} ** 2, b={base} ** 2.0, c={base} ** (1 + 1)):\n"
        "    p = p - a * g - b - c\n    return p\n"
    )
    defaults = of.Rule.from_file(path, "own").hyperparameters
    assert dict(defaults) == {"a": base * base, "b": base * base, "c": base**2.0}
