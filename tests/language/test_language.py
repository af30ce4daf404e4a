"""The rule language: what rules may say, and that they mean what NumPy would do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from data import DTYPES, gradients, same, special
from optforge import exp, log, maximum, minimum, rule, scalar, sign, sqrt, tanh, where
from optforge.library.rule import Rule


@rule
def options(
    p, g, m=0.0, v="g", w="p", r="start", mu: scalar = 1.0, *, t, lr=0.1, start=0.25, nesterov=False, mode="plain"
):
    """Every kind of declaration."""
    assert lr > 0 and not (start == 3), "lr is positive"
    if mode == "plain":
        d = g
    elif mode == "signed":
        d = sign(g)
    else:
        d = where(abs(g) > 1, 1.2, 0.5) * g
        assert mode == "bounded"
    mu = mu * (0.9 if t < 3 else 0.8)
    m = mu * m + (1 - mu) * d
    step = (m + d) if nesterov else m
    before = p
    p = p - lr * step
    w = 0.5 * w + 0.5 * before
    r = maximum(r, abs(d))
    v = minimum(v, d)
    return p, m, v, w, r, mu


@rule
def branches(p, g, *, t, lr=0.1):
    rho = t - 4
    rate = lr * sqrt(rho) if rho > 0 else lr
    p = (p - rate * g / (rho % 3)) if rho > 0 else (p - rate * g)
    # At the first step 1 / (t - 1) has no value, and nothing asks for it, however deep it stands.
    p = ((p - lr * (1 / (t - 1)) * g) if t < 9 else (p + log(t - 1) * g)) if t > 1 else p
    p = p if t == 1 else (p - lr / (t - 1) * g)
    return p


@rule
def lazily(p, g, *, t, lr=0.1, k=0.0):
    a = lr if k == 0 or 1 / k > 2 else 2 * lr
    b = 1 / k if k != 0 and log(k) > -5 else 0
    p = p - (a + b) * g
    return p


@rule
def swaps(p, g, a=0.0, b=1.0, *, lr=0.1):
    old = a
    a = b
    b = old + g
    p = p - lr * (a - b)
    return p, a, b


@rule
def averages(p, g, slow="p", last=0.0, *, lr=0.1):
    slow = p
    last = g
    p = p - lr * g
    return p, slow, last


@rule
def powers(p, g, *, lr=0.1):
    p = p - lr * (g**2 + abs(g) ** 0.5 + (1 + g**2) ** -1 + (p - g) ** 2)
    return p


@rule
def integers(p, g, n: scalar = 1, *, t, k=3):
    p = p - 0 * g + 3**40 % 7 + ((2**53 + 1) - 2**53) + where(g > 100, p, -0) + k**2 % 5
    n = 10 if t < 2 else 3 * n
    return p, n


@rule
def unused(p, g, never=0.0, written=0.0, *, lr=0.1, forgotten=2.0, with_never=False):
    if with_never:
        never = never + g
    written = g
    dead = exp(g) / 0
    p = p - lr * g
    return p, never, written


def run(rule: Rule, target: str, dtype: Any, steps: int = 6, **settings: Any) -> list[Any]:
    """Parameters and state after some steps."""
    rng = np.random.default_rng(0)
    p = [np.concatenate([rng.standard_normal(50), special(dtype)]).astype(dtype), rng.standard_normal(7).astype(dtype)]
    optimizer = of.Optimizer(p, rule, target=target, **settings)
    for _ in range(steps):
        optimizer.step([gradients(rng, x.size, dtype) for x in p])
    return [*p, *(value for values in optimizer.state.values() for value in values)]


def run_plain(rule: Rule, dtype: Any, steps: int = 6, **settings: Any) -> list[Any]:
    """The same with the rule as plain Python."""
    rng = np.random.default_rng(0)
    tensors: list[Any] = [
        [np.concatenate([rng.standard_normal(50), special(dtype)]).astype(dtype)],
        [rng.standard_normal(7).astype(dtype)],
    ]
    for t in range(1, steps + 1):
        time = {"t": t} if rule.definition.time else {}
        for k, (p, *state) in enumerate(tensors):
            returned = rule.function(p, gradients(rng, p.size, dtype), *state, **time, **settings)
            tensors[k] = list(returned) if isinstance(returned, tuple) else [returned]
    return [*(x[0] for x in tensors), *(x[k] for k in range(1, len(tensors[0])) for x in tensors)]


CASES: list[tuple[Rule, dict[str, Any]]] = [
    (options, {}),
    (options, {"mode": "signed", "nesterov": True, "lr": 0.3}),
    (options, {"mode": "bounded", "start": 2.0}),
    (branches, {"lr": 0.07}),
    (lazily, {}),
    (lazily, {"k": 0.3}),
    (lazily, {"k": 0.001}),
    (swaps, {}),
    (averages, {}),
    (powers, {}),
    (integers, {}),
    (integers, {"k": 7}),
    (unused, {"with_never": True}),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_all_targets_mean_the_same(case: int, dtype: Any) -> None:
    own, settings = CASES[case]
    plain = run_plain(own, dtype, **settings) if own is not unused else None
    reference = run(own, "numpy", dtype, **settings)
    compiled = run(own, "c", dtype, **settings)
    assert all(same(a, b) for a, b in zip(reference, compiled, strict=True))
    if plain is not None:
        assert all(same(a, b) for a, b in zip(plain, compiled, strict=True))


def test_state_that_the_options_never_touch_is_dropped() -> None:
    assert [s.name for s in unused.kernel().state] == ["written"]
    assert [s.name for s in unused.kernel(with_never=True).state] == ["never", "written"]
    assert "never" not in of.Optimizer([np.ones(3)], unused).state
    assert list(unused.state) == ["never", "written"]
    assert unused.kernel().moved == (2, 2)


def test_dead_code_is_removed() -> None:
    _, phase = unused.kernel().phases  # the first only looks at gradients, where a step may be skipped
    assert [let.name for let in phase.lets] == ["old_p", "g", "written", "p", "change"]
    assert "exp" not in "".join(unused.generate().values()).split("#ifndef")[1]


def test_scalars_are_hoisted_under_their_own_names() -> None:
    kernel = of.rules["adam"].kernel()
    (group,) = kernel.scalars
    assert (group.scope, group.phase) == ("step", 0)
    assert [let.name for let in group.lets] == [
        "beta1_t",
        "one_minus_beta1_t",
        "one_minus_beta2",
        "one_minus_beta1_pow_t",
        "one_minus_beta2_pow_t",
    ]


def test_functions_on_scalars_stay_floats_and_on_arrays_keep_the_dtype() -> None:
    for function in (sqrt, abs, sign, exp, log, tanh):
        assert type(function(0.5)) is float
    array = np.array([0.5, 2.0], np.float32)
    for function in (of.sqrt, of.abs, of.sign, of.exp, of.log, of.tanh):
        assert function(array).dtype == np.float32
    assert type(maximum(1, 2)) is float
    assert maximum(array, 1).dtype == np.float32
    assert where(array > 1, array, 0).dtype == np.float32


def test_functions_at_the_edges() -> None:
    for kind in (float, np.float32, np.float64):
        values = [(maximum, (0.0, -0.0), "-0.0"), (maximum, (-0.0, 0.0), "0.0"), (minimum, (0.0, -0.0), "-0.0")]
        values += [(sign, (-0.0,), "0.0"), (sign, (math.nan,), "nan"), (sign, (-math.inf,), "-1.0")]
        values += [
            (maximum, (math.nan, 1.0), "nan"),
            (maximum, (1.0, math.nan), "nan"),
            (minimum, (1.0, math.nan), "nan"),
        ]
        for function, args, expected in values:
            own = [x if kind is float else np.array([x], kind) for x in args]
            result = function(*own)
            assert str(float(np.asarray(result).reshape(-1)[0])) == expected, (function, args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inexact_functions_keep_their_error_bounds(dtype: Any) -> None:
    """exp, log and tanh on elements are within the bound of their table, on every target."""

    @rule
    def transcendental(p, g, e=0.0, l=0.0, h=0.0):  # noqa: E741
        e = exp(g)
        l = log(abs(g))  # noqa: E741
        h = tanh(g)
        return p, e, l, h

    rng = np.random.default_rng(2)
    g = np.concatenate(
        [rng.uniform(-20, 20, 4000), rng.uniform(-1, 1, 4000) * 10.0 ** rng.integers(-30, 1, 4000)]
    ).astype(dtype)
    exact = g.astype(np.longdouble)
    for target in ("c", "numpy"):
        optimizer = of.Optimizer([np.zeros_like(g)], transcendental, target=target)
        optimizer.step([g])
        for name, expected in (("e", np.exp(exact)), ("l", np.log(abs(exact))), ("h", np.tanh(exact))):
            ulp = np.spacing(np.abs(expected).astype(dtype)).astype(np.longdouble)
            error = np.abs(optimizer.state[name][0].astype(np.longdouble) - expected) / ulp
            assert error.max() <= of.exp.ulp, (target, name, float(error.max()))


def test_rules_know_their_attributes(tmp_path: Path) -> None:
    assert options.name == "options"
    assert options.doc == "Every kind of declaration."
    assert dict(options.hyperparameters) == {"lr": 0.1, "start": 0.25}
    assert dict(options.options) == {"nesterov": False, "mode": "plain"}
    assert dict(options.state) == {"m": 0.0, "v": "g", "w": "p", "r": "start", "mu": 1.0}
    assert len(options.hash) == 64


def test_the_hash_is_of_the_parsed_form(tmp_path: Path) -> None:
    texts = [
        "from optforge import rule\n@rule\ndef r(p, g, *, lr=0.1):\n    p = p - lr * g\n    return p\n",
        'from optforge import rule\n\n\n@rule\ndef r(p, g, *,\n      lr=1e-1):  # rate\n    """A rule."""\n    p = (p\n         - (lr * g))\n    return p\n',
        "from optforge import rule\n@rule\ndef r(p, g, *, lr=0.2):\n    p = p - lr * g\n    return p\n",
        "from optforge import rule\n@rule\ndef r(p, g, *, lr=0.1):\n    p = p + lr * g\n    return p\n",
    ]
    hashes = []
    for text in texts:
        (tmp_path / "r.py").write_text(text)
        hashes.append(Rule.from_file(tmp_path / "r.py", "r").hash)
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_rule_never_raises_and_errors_come_on_use() -> None:
    @rule
    def broken(p, g, *, lr=0.1):
        p = p - lr * q  # noqa: F821
        return g

    assert of.rule(3).name == "3"
    with pytest.raises(of.RuleError) as caught:
        of.Optimizer([np.ones(2)], broken)
    assert "a rule returns p and every state" in str(caught.value)
    with pytest.raises(of.RuleError, match="stands on a function"):
        of.rule(3).hyperparameters  # noqa: B018


def test_all_errors_of_a_rule_come_together(tmp_path: Path) -> None:
    (tmp_path / "many.py").write_text(
        "from optforge import rule\n@rule\ndef many(p, g, m=0.0, *, lr=0.1, fancy=False):\n"
        "    m += g\n    x = unknown * g\n    if fancy:\n        y = g[0]\n    lr = 2\n    p = p - x + math.sqrt(g) + 1e999 * g\n    return p, m\n"
    )
    with pytest.raises(of.RuleError) as caught:
        Rule.from_file(tmp_path / "many.py", "many")
    lines = [(d.line, d.column) for d in caught.value.diagnostics]
    assert lines == [(4, 5), (5, 9), (7, 13), (8, 5), (9, 17), (9, 32)]


def test_constants_are_rounded_once_and_written_short(tmp_path: Path) -> None:
    (tmp_path / "c.py").write_text(
        "from optforge import rule\n@rule\ndef c(p, g):\n    p = p - 0.1 * g - 1e300 * g - 1e-50 * g - 1/3 * g - 16777217 * g\n    return p\n"
    )
    text = Rule.from_file(tmp_path / "c.py", "c").generate(dtypes=["f32"])["c.c"]
    assert "p = p - 0.1f * g - HUGE_VALF * g - 0.0f * g - 0.33333334f * g - 1.6777216e7f * g;" in text


def test_operation_order_and_parentheses_are_kept(tmp_path: Path) -> None:
    (tmp_path / "o.py").write_text(
        "from optforge import rule\n@rule\ndef o(p, g, a=1.0):\n"
        "    a = p - (g - a) - (p + g) + (a * (g / p)) / g * (p * a)\n    p = -(-a) - -g\n    return p, a\n"
    )
    text = Rule.from_file(tmp_path / "o.py", "o").generate()["o.c"]
    assert "a = p - (g - a) - (p + g) + a * (g / p) / g * (p * a);" in text
    assert "p = -(-a) - -g;" in text


def test_the_plain_function_gives_new_arrays_of_the_parameter_s_shape(tmp_path: Path) -> None:
    file = tmp_path / "keeps.py"
    text = "def keeps(p, g, start='p', before='g', *, lr=1.0):\n    before = g\n    p = p - lr * g\n"
    file.write_text(f"from optforge import rule\n\n@rule\n{text}    return p, start, before\n")
    keeps = of.Rule.from_file(file, "keeps")
    p, g = np.array(3.0, np.float32), np.array(1.0, np.float32)
    state: list[Any] = []
    for _ in range(2):  # with state that it makes itself, and with state that it is given
        p, *state = keeps(p, g, *state)
        start, before = state
        assert p.shape == start.shape == before.shape == () and p.dtype == before.dtype == np.float32
        assert not np.shares_memory(before, g) and not np.shares_memory(start, p)
        again = keeps(p, g, start, before)
        assert not np.shares_memory(again[1], start)
    assert (p, start, before) == (1, 3, 1)
    assert keeps(np.zeros((0, 2)), np.zeros((0, 2)))[1].shape == (0, 2)
    with pytest.raises(ValueError, match=r"^the gradient has the shape \(1,\), the parameter \(3,\)$"):
        keeps(np.ones(3), np.ones(1))
    with pytest.raises(ValueError, match=r"^state 'start' has the shape \(2,\), the parameter \(3,\)$"):
        keeps(np.ones(3), np.ones(3), np.ones(2))


def test_the_plain_function_checks_what_it_is_given() -> None:
    p = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="takes 'plain' or 'signed' or 'bounded', not 'other'"):
        options.function(p, p, t=1, mode="other")
    with pytest.raises(TypeError, match="has no hyperparameter 'rate'"):
        options.function(p, p, t=1, rate=2)
    with pytest.raises(TypeError, match="2 state"):
        swaps.function(p, p, p, p, p)
    with pytest.raises(TypeError, match="float32 and its gradient float64"):
        swaps.function(p, p.astype(np.float64))
    with pytest.raises(TypeError, match="needs the step count"):
        branches.function(p, p)
    assert swaps(p, p)[0].dtype == np.float32


def test_a_rule_of_a_file_runs_as_plain_python_without_being_imported(tmp_path: Path) -> None:
    text = "from optforge import rule, sqrt as root\nraise SystemExit\n@rule\ndef r(p, g, *, lr=0.5):\n    p = p - lr * root(g)\n    return p\n"
    (tmp_path / "r.py").write_text(text)
    loaded = Rule.from_file(tmp_path / "r.py", "r")
    assert loaded.function(np.ones(2), np.full(2, 4.0)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "(p, g, m=0.0, lr=0.1):\n    m = g\n    p = p - lr * m\n    return p, m",
            "put them behind a *: def r(p, g, …, *, lr)",
        ),
        ("(p, g, *, lr=0.1, fast=0):\n    if fast:\n        g = g\n    return p", "fast=False in the signature"),
        (
            "(p, g, *, mode='a'):\n    if mode in ('a', 'b'):\n        g = g\n    return p",
            'write mode == "…" or mode == "…"',
        ),
        ("(p, g):\n    return p\n    p = g", "remove what follows the return"),
        ("(p, g, *, b=True):\n    if b:\n        return p\n    return p", "return once, at the end"),
        ("(p, g, *, betas=(0.9, 0.999)):\n    return p", "one name for each"),
        ("(p, g):\n    p = clip(g, 0, 1)\n    return p", "write minimum(maximum(x, low), high)"),
        ("(p, g):\n    p = g.pow(2)\n    return p", "its functions are sqrt, abs"),
        ("(p, g, *, t):\n    p = g if t > 5 else 0\n    return p", "where(g == g, s, s)"),
    ],
)
def test_hints_for_common_slips(body: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(f"from optforge import rule\n@rule\ndef r{body}\n")
    with pytest.raises(of.RuleError) as caught:
        Rule.from_file(tmp_path / "r.py", "r")
    assert message in str(caught.value)
