"""A rule as plain Python on NumPy arrays: its own text, run by Python."""

from __future__ import annotations

import ast
import copy
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..core.functions import IMPORTABLE, where
from ..core.ir import State
from .compose import Composition
from .literals import is_two
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
        if isinstance(node.op, ast.Pow) and is_two(node.right):
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
    for arg in (*node.args.args, *node.args.kwonlyargs):
        arg.annotation = None
    node.body = [Doubles().visit(statement) for statement in node.body]
    module = ast.fix_missing_locations(ast.Module([node], []))
    code = compile(module, definition.text.file, "exec")
    return next(constant for constant in code.co_consts if isinstance(constant, types.CodeType))


def plain_part(part: Definition) -> Callable[..., dict[str, Any]]:
    """A part as a function of names and values, which gives what the part returns by name."""
    code = compiled(part)
    taken = [*part.takes, *(state.name for state in part.state)]
    keywords = [*part.hyperparameters, *part.borrowed, *part.options, *(["t"] if part.time else [])]
    returned = [*part.changes, *(state.name for state in part.state)]

    def call(known: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
        meanings = {**IMPORTABLE, "where": functools.partial(where, dtype=dtype)}
        words = meanings | {alias: meanings[name] for alias, name in part.aliases.items() if name in meanings}
        names = {**words, "square of": square, "__builtins__": {"AssertionError": AssertionError}}
        run = types.FunctionType(code, names)
        values = run(*(known[name] for name in taken), **{name: known[name] for name in keywords})
        return dict(zip(returned, values if isinstance(values, tuple) else (values,), strict=True))

    return call


def plain_python(
    composition: Composition, settings: Callable[[Mapping[str, Any]], Mapping[str, Any]], signature: Any
) -> Callable[..., Any]:
    """`rule.function`: see `Rule`. `settings` completes and checks hyperparameters and options."""
    parts = [(part, plain_part(part)) for part in composition.parts]
    names = [state.name for state in composition.state]

    def call(p: Any, g: Any, *state: Any, **keywords: Any) -> Any:
        shape = np.shape(p)
        p, g = np.atleast_1d(p), alike("the gradient", g, shape)
        if p.dtype != g.dtype:
            raise TypeError(f"the parameter is {p.dtype} and its gradient {g.dtype}")
        if len(state) > len(names):
            raise TypeError(f"{composition.name}() has {len(names)} state(s) and was given {len(state)}")
        given = dict(zip(names, state, strict=False))
        given |= {name: keywords.pop(name) for name in names if name in keywords}
        time = {"t": float(keywords.pop("t"))} if composition.time and "t" in keywords else {}
        if composition.time and not time:
            raise TypeError(f"{composition.name}() needs the step count: t=1")
        known: dict[str, Any] = {**settings(keywords), **time, "p": p, "g": g}
        with np.errstate(all="ignore"):
            for part, run in parts:
                for s in part.state:
                    if s.name not in given:
                        known[s.name] = initial(s, p, known["g"], known)
                    elif s.scalar:
                        known[s.name] = float(given[s.name])
                    else:
                        known[s.name] = alike(f"state {s.name!r}", given[s.name], shape)
                scalars = {s.name for s in part.state if s.scalar}
                for name, value in run(known, p.dtype).items():
                    # A scalar bound to an array is rounded where it is stored.
                    whole = name in scalars or isinstance(value, np.ndarray)
                    known[name] = value if whole else np.full_like(p, float(value))
        numbers = {s.name for s in composition.state if s.scalar}
        # New arrays, also of what the rule hands on: who writes into a gradient later must not change a state.
        stored = tuple(
            float(known[name]) if name in numbers else np.array(known[name]).reshape(shape) for name in ("p", *names)
        )
        return stored if names else stored[0]

    call.__name__ = call.__qualname__ = composition.name
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__doc__ = composition.doc
    return call


def alike(what: str, given: Any, shape: tuple[int, ...]) -> Any:
    """An array of the parameter's shape, of one dimension at least."""
    if np.shape(given) != shape:
        raise ValueError(f"{what} has the shape {np.shape(given)}, the parameter {shape}")
    return np.atleast_1d(given)


def initial(state: State, p: Any, g: Any, hyperparameters: Mapping[str, Any]) -> Any:
    """What a state starts as: a float where it is scalar, else a new array like the parameter."""
    if state.initial in ("p", "g"):
        return (p if state.initial == "p" else g).copy()
    value = float(hyperparameters[state.initial]) if isinstance(state.initial, str) else state.initial
    return value if state.scalar else np.full_like(p, value)
