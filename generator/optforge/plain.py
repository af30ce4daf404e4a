"""A rule as plain Python on NumPy arrays: its own text, run by Python."""

from __future__ import annotations

import ast
import copy
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .functions import IMPORTABLE, where
from .ir import State
from .parse import Definition


class Doubles(ast.NodeTransformer):
    """What the language says of numbers and Python does not: integers are doubles, and x**2 is x·x."""

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        """Make a double of an integer."""
        value = node.value
        return ast.copy_location(ast.Constant(float(value)), node) if type(value) is int else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        """Multiply for a square."""
        self.generic_visit(node)
        if isinstance(node.op, ast.Pow) and isinstance(node.right, ast.Constant) and node.right.value == 2:
            return ast.copy_location(ast.Call(ast.Name("square of", ast.Load()), [node.left], []), node)
        return node


def square(x: Any) -> Any:
    """x·x."""
    return x * x


def compiled(definition: Definition) -> types.CodeType:
    """The code of the rule's function, from its text, with its lines, so that a debugger shows them."""
    node = copy.deepcopy(definition.node)
    node.decorator_list, node.returns, node.args.defaults = [], None, []
    node.args.kw_defaults = [None for _ in node.args.kwonlyargs]
    for arg in node.args.args:
        arg.annotation = None
    node.body = [Doubles().visit(statement) for statement in node.body]
    module = ast.fix_missing_locations(ast.Module([node], []))
    code = compile(module, definition.text.file, "exec")
    return next(constant for constant in code.co_consts if isinstance(constant, types.CodeType))


def plain_python(
    definition: Definition, settings: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> Callable[..., Any]:
    """`rule.function`: see `Rule`. `settings` completes and checks hyperparameters and options."""
    code = compiled(definition)
    names = [state.name for state in definition.state]

    def call(p: Any, g: Any, *state: Any, **keywords: Any) -> Any:
        p, g = np.atleast_1d(p), np.atleast_1d(g)
        if p.dtype != g.dtype:
            raise TypeError(f"the parameter is {p.dtype} and its gradient {g.dtype}")
        if len(state) > len(names):
            raise TypeError(f"{definition.name}() has {len(names)} state(s) and was given {len(state)}")
        given = dict(zip(names, state, strict=False))
        given |= {name: keywords.pop(name) for name in names if name in keywords}
        time = {"t": float(keywords.pop("t"))} if definition.time and "t" in keywords else {}
        if definition.time and not time:
            raise TypeError(f"{definition.name}() needs the step count: t=1")
        chosen = settings(keywords)
        for s in definition.state:
            if s.name not in given:
                given[s.name] = initial(s, p, g, chosen)
            else:
                given[s.name] = float(given[s.name]) if s.scalar else np.atleast_1d(given[s.name])

        meanings = {**IMPORTABLE, "where": functools.partial(where, dtype=p.dtype)}
        words = meanings | {alias: meanings[name] for alias, name in definition.aliases.items() if name in meanings}
        run = types.FunctionType(
            code, {**words, "square of": square, "__builtins__": {"AssertionError": AssertionError}}
        )
        with np.errstate(all="ignore"):
            returned = run(p, g, *(given[name] for name in names), **chosen, **time)
            values = returned if isinstance(returned, tuple) else (returned,)
            scalars = (False, *(s.scalar for s in definition.state))
            # A scalar bound to an array is rounded where it is stored.
            stored = tuple(
                value if scalar or isinstance(value, np.ndarray) else np.full_like(p, value)
                for value, scalar in zip(values, scalars, strict=True)
            )
        return stored if definition.state else stored[0]

    call.__name__ = call.__qualname__ = definition.name
    call.__doc__ = definition.doc
    return call


def initial(state: State, p: Any, g: Any, hyperparameters: Mapping[str, Any]) -> Any:
    """What a state starts as: a float where it is scalar, else a new array like the parameter."""
    if state.initial in ("p", "g"):
        return (p if state.initial == "p" else g).copy()
    value = float(hyperparameters[state.initial]) if isinstance(state.initial, str) else state.initial
    return value if state.scalar else np.full_like(p, value)
