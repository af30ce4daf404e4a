"""Random rules: plain Python, the reference and the compiled kernel agree in every bit."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from amount import some
from data import DTYPES, gradients, same, special

IMPORTS = "from optforge import rule, scalar, sqrt, where, maximum, minimum, exp, log, tanh, sign, abs\n"


class Author:
    """Writes a random rule, and keeps to what the language allows."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.elements = ["p", "g"]
        self.scalars = ["lr", "beta", "t"]
        self.options = ["fancy"]

    def pick(self, *choices: str) -> str:
        return self.random.choice(choices)

    def scalar(self, depth: int) -> str:
        if depth == 0 or self.random.random() < 0.2:
            return self.pick(*self.scalars, *self.scalars, "2", "0.5", "1e-3", "3.7")
        a, b = self.scalar(depth - 1), self.scalar(depth - 1)
        return self.pick(
            f"({a} + {b})",
            f"({a} - {b})",
            f"{a} * {b}",
            f"{a} / {b}",
            f"({a} % {b})",
            f"{a} ** {b}" if a.isidentifier() and b.isidentifier() else f"beta ** {self.pick('t', '(t - 1)')}",
            f"-{a}" if a.isidentifier() else f"-({a})",
            f"({a} if {self.condition(depth - 1)} else {b})",
            f"sqrt({a})",
            f"abs({a})",
            f"sign({a})",
            f"exp({a})",
            f"log({a})",
            f"tanh({a})",
            f"maximum({a}, {b})",
            f"minimum({a}, {b})",
        )

    def condition(self, depth: int) -> str:
        compare = self.pick("<", "<=", ">", ">=", "==", "!=")
        a, b = self.scalar(0), self.scalar(max(depth - 1, 0))
        simple = f"{a} {compare} {b}"
        if depth <= 0:
            return simple
        other = self.condition(depth - 1)
        return self.pick(
            simple, f"({simple} and {other})", f"({simple} or {other})", f"not ({simple})", f"0 < {a} <= {b}"
        )

    def element(self, depth: int) -> str:
        if depth == 0:
            return self.pick(*self.elements)
        a, b, s = self.element(depth - 1), self.element(depth - 1), self.scalar(2)
        return self.pick(
            f"({a} + {b})",
            f"({a} - {b})",
            f"({a}) * ({b})",
            f"({a}) / ({b})",
            f"({s}) * ({a})",
            f"({a}) - ({s})",
            f"({a}) / ({s})",
            f"({s}) / ({a})",
            f"({a}) ** 2",
            f"({a}) ** 0.5",
            f"({a}) ** -1",
            f"-({a})",
            f"sqrt(abs({a}))",
            f"sign({a})",
            f"maximum({a}, {b})",
            f"minimum({a}, {s})",
            f"where({a} {self.pick('<', '<=', '>', '>=', '==', '!=')} {self.pick(b, '0')}, {self.pick(b, '1.2')}, {self.pick(a, s)})",
            f"(({a}) if {self.condition(1)} else ({b}))",
            f"(({a}) if fancy else ({b}))",
        )

    def rule(self) -> str:
        states = [
            (f"s{k}", self.pick("0.0", "0.1", '"p"', '"g"', '"beta"', "-1/3")) for k in range(self.random.randint(0, 3))
        ]
        counters = [(f"c{k}", self.pick("1.0", "0.25", '"lr"')) for k in range(self.random.randint(0, 2))]
        self.elements += [name for name, _ in states]
        self.scalars += [name for name, _ in counters]
        signature = ["p", "g", *(f"{n}={v}" for n, v in states), *(f"{n}: scalar = {v}" for n, v in counters)]
        lines = []
        for k in range(self.random.randint(1, 3)):
            lines.append(f"k{k} = {self.scalar(2)}")
            self.scalars.append(f"k{k}")
        for k in range(self.random.randint(1, 4)):
            name = self.pick(f"x{k}", *self.elements[2:], "p")
            lines.append(f"{name} = {self.element(2)}")
            if name not in self.elements:
                self.elements.append(name)
        for name, _ in states:
            if self.random.random() < 0.7:
                lines.append(f"{name} = {self.pick(self.element(2), self.element(1), self.element(0), 'k0')}")
                if lines[-1].endswith("= k0"):
                    self.elements.remove(name)
        for name, _ in counters:
            lines.append(f"{name} = {self.pick(f'{name} * beta', f'minimum({name} + lr, 2)', 'k0', 'lr')}")
        lines.append(f"p = {self.element(2)}")
        returned = ", ".join(["p", *(name for name, _ in states), *(name for name, _ in counters)])
        head = f"@rule\ndef random_rule({', '.join(signature)}, *, t, lr=0.07, beta=0.9, fancy=False):\n"
        return IMPORTS + head + "".join(f"    {line}\n" for line in [*lines, f"return {returned}"])


def load(path: Path) -> Any:
    """The rule of a file, imported as Python does."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.random_rule


@pytest.mark.parametrize("seed", some(range(60), 3))
def test_all_ways_to_run_a_rule_agree(seed: int, tmp_path: Path) -> None:
    author = Author(seed)
    text = author.rule()
    path = tmp_path / f"random_{seed}.py"
    path.write_text(text)
    rule = load(path)
    options = {"fancy": author.random.random() < 0.5}
    scalar = {state.name for state in rule.definition.state if state.scalar}
    for dtype in DTYPES:
        rng = np.random.default_rng(seed)
        first = [
            np.concatenate([rng.standard_normal(70).astype(dtype), special(dtype)]),
            rng.standard_normal(33).astype(dtype),
        ]
        steps = [[gradients(rng, p.size, dtype) for p in first] for _ in range(3)]
        steps[1][0][-21:] = rng.permutation(special(dtype))
        live = {target: [p.copy() for p in first] for target in ("numpy", "c")}
        optimizers = {target: of.Optimizer(live[target], rule, target=target, **options) for target in live}
        plain: Any = [[p.copy()] for p in first]
        for t, grads in enumerate(steps, 1):
            failures = {}
            for target, optimizer in optimizers.items():
                try:
                    optimizer.step(grads)
                except ArithmeticError as problem:
                    failures[target] = str(problem)
            assert failures.keys() in ({}.keys(), live.keys()), f"{failures}\n{text}"
            for k in range(len(first)):
                same_p = same(live["c"][k], live["numpy"][k])
                same_state = all(
                    same(optimizers["c"].state[s][k], optimizers["numpy"].state[s][k])
                    for s in rule.state
                    if s in optimizers["c"].state
                )
                assert same_p and same_state, f"c and numpy differ in tensor {k}, step {t}, {dtype}\n{text}"
            if failures:
                break
            try:
                plain = [
                    as_list(rule.function(*args, g, *state, t=t, **options))
                    for (*args, state), g in split(plain, grads)
                ]
            except (ArithmeticError, ValueError, TypeError):
                break  # Python stumbles over something that nothing needs
            for k, (p, *state) in enumerate(plain):
                assert same(live["c"][k], p), f"function differs in tensor {k}, step {t}, {dtype}\n{text}"
                for name, value in zip(rule.state, state, strict=True):
                    own = optimizers["c"].state.get(name)
                    if own is not None:
                        expected = (
                            float(value) if name in scalar else np.broadcast_to(np.asarray(value, dtype), p.shape)
                        )
                        assert same(own[k], expected), f"{name} differs in tensor {k}, step {t}, {dtype}\n{text}"


def as_list(returned: Any) -> list[Any]:
    return list(returned) if isinstance(returned, tuple) else [returned]


def split(plain: list[Any], grads: list[Any]) -> Any:
    """Each tensor's parameter and state, with its gradient."""
    return [((p, state), g) for (p, *state), g in zip(plain, grads, strict=True)]
