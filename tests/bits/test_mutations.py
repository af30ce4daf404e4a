"""A wrong sign, a dropped term or a changed constant in any rule shows in the tests' data."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import optforge as of
from data import gradients, same
from optforge.core.diagnostics import RuleError
from optforge.library.rule import Rule
from oracles import begin, names, oracle

FLIPPED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}


def mutants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Every single mutation of a rule's body: what was changed, and the changed text."""
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    statements = [s for s in function.body if isinstance(s, ast.Assign)]
    places = [node for statement in statements for node in ast.walk(statement.value)]
    for k, node in enumerate(places):
        for change in ("flip", "left", "right", "double", "root"):
            changed = copy.deepcopy(tree)
            body = next(n for n in changed.body if isinstance(n, ast.FunctionDef)).body
            own = [n for s in body if isinstance(s, ast.Assign) for n in ast.walk(s.value)][k]
            if isinstance(node, ast.BinOp) and type(node.op) in FLIPPED and isinstance(own, ast.BinOp):
                if change == "flip":
                    own.op = FLIPPED[type(node.op)]()
                elif change in ("left", "right"):
                    kept = copy.deepcopy(own.left if change == "left" else own.right)
                    Replace(own, kept).visit(changed)
                else:
                    continue
            elif isinstance(own, ast.Constant) and change == "double" and not power(places, node):
                own.value = 2 * own.value or 1
            elif isinstance(own, ast.Call) and change == "root":
                Replace(own, own.args[0]).visit(changed)
            else:
                continue
            yield f"{change} {ast.unparse(node)}", ast.unparse(ast.fix_missing_locations(changed))


def power(places: list[ast.AST], node: ast.AST) -> bool:
    """Whether a constant is an exponent, which elements do not have otherwise."""
    return any(isinstance(n, ast.BinOp) and isinstance(n.op, ast.Pow) and n.right is node for n in places)


class Replace(ast.NodeTransformer):
    """Puts one node in the place of another."""

    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def differs(rule: Rule, name: str) -> bool:
    """Whether a rule's trajectory leaves the oracle's, on data as in the tests of bits."""
    for k, hyper in enumerate(oracle(name).SETTINGS):
        rng = np.random.default_rng(k)
        # A tensor of zeros and a short one with a small gradient show where norms are compared.
        params = [rng.standard_normal(500), np.zeros(7), 1e-3 * rng.standard_normal(1)]
        expected = [(p.copy(), begin(name, p)) for p in params]
        optimizer = of.Optimizer(params, rule, target="numpy", **hyper)
        for t in range(1, 6):
            grads = [gradients(rng, 500, np.float64), gradients(rng, 7, np.float64), 1e-4 * rng.standard_normal(1)]
            try:
                optimizer.step(grads)
            except ArithmeticError:
                return True
            expected = [oracle(name).step(p, g, own, t, **hyper) for (p, own), g in zip(expected, grads, strict=True)]
            for k, (p, state) in enumerate(expected):
                if not same(params[k], p) or any(not same(optimizer.state[s][k], v) for s, v in state.items()):
                    return True
    return False


@pytest.mark.parametrize("name", names())
def test_every_mutation_is_seen(name: str, tmp_path: Path) -> None:
    text = Path(of.rules[name].definition.text.file).read_text(encoding="utf-8")
    path = tmp_path / "mutant.py"
    path.write_text(text)
    assert not differs(Rule.from_file(path, name), name)
    survivors = []
    tried = 0
    for change, mutated in mutants(ast.parse(text)):
        path.write_text(mutated)
        tried += 1
        try:
            mutant = Rule.from_file(path, name)
        except RuleError:
            continue  # seen by the compiler
        if not differs(mutant, name):
            survivors.append(change)
    assert tried >= 5
    assert not survivors
