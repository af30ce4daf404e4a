"""Mistakes that people make, and what they are told to write instead."""

from __future__ import annotations

import builtins
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from conftest import require_torch

HEAD = "from optforge import rule, scalar\nimport numpy as np\n\n@rule\n"


def written(path: Path, text: str) -> of.Rule:
    """A rule of a file."""
    file = path / "mine.py"
    file.write_text(HEAD + text)
    return of.Rule.from_file(file, "mine")


def body(line: str) -> str:
    return f"def mine(p, g, *, lr=0.1):\n    {line}\n    p = p - lr * g\n    return p\n"


RULES: dict[str, tuple[str, str]] = {
    "axis": (body("m = mean(g**2, axis=-1)"), "hint: it is over the whole tensor, without axes: write mean\\(x\\)"),
    "axis by position": (body("m = mean(g**2, -1)"), "hint: it is over the whole tensor, without axes"),
    "input": (
        "def mine(p, g, h_new, h=0.0, *, lr=0.1):\n    h = h_new\n    p = p - lr * h\n    return p, h\n",
        "hint: h_new=0.0, if it is state, .* a step is given no other arrays than p and g",
    ),
    "fourth power": (body("m = g**4"), r"hint: write \(x\*\*2\)\*\*2, or x2 = x\*\*2 and then x2 \* x2"),
    "sixth power": (body("m = g**6"), r"hint: multiply: x2 = x\*\*2"),
    "odd power": (body("m = g**1.5"), r"where x is positive, .* where it has a sign, take abs\(x\)"),
    "print": (
        body("print(p)"),
        "a rule is compiled, and prints nothing(.|\n)*hint: return what you want to see as state",
    ),
    "f-string": (
        'def mine(p, g, *, lr=0.1):\n    assert lr > 0, f"lr is {lr}"\n    p = p - lr * g\n    return p\n',
        "hint: values are not filled in",
    ),
    "f-string elsewhere": (body('m = f"{g}"'), "hint: a rule has no texts"),
    "isnan": (body("m = where(isnan(g), 0, g)"), "hint: write where\\(x != x, a, b\\)"),
    "np.isnan": (body("m = where(np.isnan(g), 0, g)"), "hint: write where\\(x != x, a, b\\)"),
    "isfinite": (body("m = where(isfinite(g), g, 0)"), "hint: write where\\(x - x == 0, a, b\\)"),
    "size": (body("m = g / len(g)"), "hint: the number of elements is sum\\(where\\(x == x, 1, 1\\)\\)"),
    "g.size": (body("m = g / g.size"), "hint: the number of elements is sum"),
    "pi": (body("m = g * np.pi"), "hint: write 3.141592653589793; a rule knows only names"),
    "not of a mask": (body("m = where(not g > 0, g, 0)"), "hint: leave `not` out, and swap the branches of where"),
    "None": (body("m = g").replace("lr=0.1", "lr=0.1, bound=None"), "None is not a number(.|\n)*hint: a bool option"),
    "is": (
        "def mine(p, g, *, lr=0.1, flag=False):\n    if flag is True:\n        p = p - lr * g\n    return p\n",
        "hint: write `if flag` or `if not flag`",
    ),
    "is of a string": (
        'def mine(p, g, *, lr=0.1, form="a"):\n    if form is "a":\n        p = p - lr * g\n    return p\n',
        'hint: write form == "…"',
    ),
    "if": (
        "def mine(p, g, *, t, lr=0.1):\n    if t > 9:\n        p = p - lr * g\n    return p\n",
        "hint: choose by a comparison of elements with where.*, by one of scalars with `a if c else b`",
    ),
    "Scalar": (
        "def mine(p, g, n: Scalar = 0, *, lr=0.1):\n    n = n + 1\n    p = p - lr * g\n    return p, n\n",
        "'Scalar' does not make state 'n' one number per tensor(.|\n)*hint: n: scalar",
    ),
    "scalar of a module": (
        "def mine(p, g, n: of.words.scalar = 0, *, lr=0.1):\n    n = n + 1\n    p = p - lr * g\n    return p, n\n",
        "'of.words.scalar' does not make state 'n' one number per tensor",
    ),
    **{
        f"reserved {name}": (body("m = g").replace("lr=0.1", f"lr=0.1, {name}=1.0"), f"'{name}' is reserved")
        for name in ("store", "master", "rounding", "seed", "groups", "add_group")
    },
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_s_hint(name: str, tmp_path: Path) -> None:
    text, hint = RULES[name]
    with pytest.raises(of.RuleError, match=hint):
        written(tmp_path, text)


@pytest.mark.parametrize(
    "line", ["m: float = 2 * g", "m = k = 2 * g", "m, k = g, g", "for m in range(3):\n        m = m", "m[0] = g"]
)
def test_what_was_to_be_bound_is_not_missed_as_well(line: str, tmp_path: Path) -> None:
    text = body(line).replace("lr * g", "lr * m" if "[" not in line else "lr * g")
    with pytest.raises(of.RuleError) as caught:
        written(tmp_path, text)
    assert str(caught.value).count("error:") == 1


def test_annotations_of_hyperparameters_may_be_called_scalar(tmp_path: Path) -> None:
    rule = written(tmp_path, "def mine(p, g, *, lr: Scalar = 0.1):\n    p = p - lr * g\n    return p\n")
    assert dict(rule.hyperparameters) == {"lr": 0.1}


def test_the_number_of_elements_as_the_hint_says(tmp_path: Path) -> None:
    text = "def mine(p, g, *, lr=1.0):\n    p = p - lr * sum(where(g == g, 1, 1))\n    return p\n"
    p = [np.zeros(5)]
    of.Optimizer(p, written(tmp_path, text), target="numpy").step([np.array([1.0, np.nan, 0.0, np.inf, 2.0])])
    assert p[0].tolist() == [-5.0] * 5


def test_another_case_is_nearer_than_another_name() -> None:
    with pytest.raises(of.UsageError, match="there is no rule 'AdamW'; did you mean 'adamw'"):
        of.Optimizer([np.ones(2)], "AdamW")


def test_what_the_hints_say_to_write_is_right(tmp_path: Path) -> None:
    text = (
        "def mine(p, g, *, lr=1.0):\n    x2 = g**2\n    fourth = x2 * x2\n    same = (g**2)**2\n"
        "    known = where(g != g, 0, where(g - g == 0, fourth + same, 7))\n    p = p - lr * known\n    return p\n"
    )
    p = [np.zeros(4)]
    opt = of.Optimizer(p, written(tmp_path, text), target="numpy")
    opt.step([np.array([-2.0, np.nan, np.inf, -np.inf])])
    assert p[0].tolist() == [-32.0, 0.0, -7.0, -7.0]


def pairs() -> Any:
    return ((name, np.ones(2)) for name in ("w", "b"))


def jax_like() -> Any:
    array = np.ones(3, np.float32)
    array.setflags(write=False)
    return memoryview(array)


CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "betas": (lambda: of.Optimizer([np.ones(2)], "adam", betas=(0.9, 0.99)), "'betas'; write beta1=…, beta2=…$"),
    "learning_rate": (lambda: of.Optimizer([np.ones(2)], "adam", learning_rate=0.1), "'learning_rate'; write lr=…$"),
    "pairs": (lambda: of.Optimizer(pairs(), "adam"), r"^params has pairs .* pass dict\(params\)"),
    "list of pairs": (lambda: of.Optimizer(list(pairs()), "adam"), "^params has pairs"),
    "positional": (lambda: of.schedules.cosine(1e-3, 100, warmup=5), r"by name: cosine\(value, steps=…\)$"),
    "one cycle": (lambda: of.schedules.one_cycle(1e-3, 100), r"by name: one_cycle\(value, steps=…\)$"),
    "two": (lambda: of.schedules.linear(1e-3, 100, 0.0), r"by name: linear\(value, steps=…, end=…\)$"),
    "bits": (lambda: of.Optimizer([np.ones(2, np.uint16)], "adam"), r"uint16; .*say so by store=\{'p': 'bf16'\}$"),
    "bits of gradients": (
        lambda: of.Optimizer([np.ones(2)], "sgd", target="numpy").step([np.ones(2, np.uint16)]),
        r"^grads\[0\] is uint16; it must be float32, float64, bfloat16 or float16$",
    ),
    "read only": (lambda: of.Optimizer([jax_like()], "adam"), r"only be read, .*: train w = np\.array\(of it\)"),
    "columns": (lambda: of.Optimizer([np.ones((3, 2)).T], "adam"), "where the model keeps it.*and the model would not"),
    "columns of a gradient": (
        lambda: of.Optimizer([np.ones((2, 3))], "adam", target="numpy").step([np.ones((3, 2)).T]),
        r"^grads\[0\] is not C-contiguous .*; pass np\.ascontiguousarray of it",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_s_hint(name: str) -> None:
    function, hint = CALLS[name]
    with pytest.raises((TypeError, ValueError), match=hint):
        function()


def unaligned() -> Any:
    return np.frombuffer(bytearray(17), np.uint8)[1:].view(np.float32)


def test_the_remedy_of_an_array_that_is_not_aligned() -> None:
    with pytest.raises(ValueError, match=r"not aligned .*w = np\.array\(w\)"):
        of.Optimizer([unaligned()], "sgd", target="numpy")
    opt = of.Optimizer([np.array(unaligned())], "sgd", target="numpy")
    with pytest.raises(ValueError, match=r"not aligned .*np\.array\(of it\)"):
        opt.step([unaligned()])
    opt.step([np.array(unaligned())])


def test_named_parameters_as_the_hint_says() -> None:
    opt = of.Optimizer(dict(pairs()), "sgd", target="numpy")
    assert list(opt.params) == ["w", "b"]
    assert str(inspect.signature(of.schedules.cosine)).startswith("(value: 'float', *")


def test_hints_about_tensors_of_pytorch() -> None:
    torch = require_torch()
    with pytest.raises(TypeError, match=r"int32; it must be float32, float64, bfloat16 or float16$"):
        of.Optimizer([torch.ones(2, dtype=torch.int32)], "adam")
    p = torch.nn.Parameter(torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match=r"^params\[0\] is not C-contiguous .*p\.data = p\.data\.contiguous\(\)"):
        of.Optimizer([p], "adam")
    p.data = p.data.contiguous()
    of.Optimizer([p], "sgd", lr=1.0, target="numpy").step([torch.ones(2, 3, 4, 4)])
    assert not p.any()


def test_annotations_are_taken_and_ignored(tmp_path: Path) -> None:
    plain = "def mine(p, g, m=0.0, mu: scalar = 1.0, *, t, lr=0.1, nesterov=False):\n"
    noted = (
        'def mine(p: np.ndarray, g: "Array", m: float = 0.0, mu: scalar = 1.0, *, t: int, lr: float = 0.1, '
        "nesterov: bool = False) -> tuple[np.ndarray, ...]:\n"
    )
    rest = "    m = m + g\n    mu = mu * 0.5\n    p = p - lr * m * mu / t\n    return p, m, mu\n"
    bare, annotated = written(tmp_path, plain + rest), written(tmp_path, noted + rest)
    assert (annotated.hash, annotated.state, annotated.generate()) == (bare.hash, bare.state, bare.generate())
    arrays = [np.ones(3), np.ones(3)]
    for a, b in zip(annotated(*arrays, t=1), bare(*arrays, t=1), strict=True):
        assert np.array_equal(a, b)


STAR = """
from optforge import *

assert sum([1, 2]) == 3 and abs(-1) == 1
assert sqrt(4) == 2 and rule and schedules

@rule
def mine(p, g, *, lr=0.1):
    p = p - lr * abs(g) / sum(g)
    return p

import numpy as np
assert mine(np.zeros(2), np.ones(2))[0] == -0.05

from optforge.words import *
import optforge
assert abs is optforge.abs and sum is optforge.sum and rule and scalar and transform and where
"""


def test_star_imports_replace_nothing_of_python(tmp_path: Path) -> None:
    assert not [name for name in of.__all__ if hasattr(builtins, name)]
    (tmp_path / "star.py").write_text(STAR)
    answer = subprocess.run([sys.executable, "star.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
