"""Numbers written out in a rule, and arithmetic on them, as Python computes it."""

from __future__ import annotations

import ast
import math

from ..core.diagnostics import Reporter

LARGEST_INTEGER = 2**53


def number(node: ast.Constant, reporter: Reporter) -> float | None:
    """The double that a numeric literal denotes; None where refused."""
    value = node.value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        what = {str: "a string", bytes: "a bytes literal", complex: "a complex number", bool: "a truth value"}
        hint = "a bool option beside a number switches what it stands for: clip=False, max_norm=1.0" * (value is None)
        reporter.error(node, f"{what.get(type(value), repr(value))} is not a number", hint)
        return None
    if isinstance(value, int) and value > LARGEST_INTEGER:
        hint = "integers are doubles; write it as a float literal if rounding is meant"
        reporter.error(node, "an integer beyond 2**53 has no exact double", hint)
        return None
    if math.isinf(value):
        reporter.error(node, "the constant overflows a double", "the largest is 1.7976931348623157e308")
        return None
    return float(value)


def fold(op: str, a: float, b: float) -> float:
    """Arithmetic on two constants, as Python computes it."""
    match op:
        case "add":
            return a + b
        case "sub":
            return a - b
        case "mul":
            return a * b
        case "div":
            return a / b
        case "mod":
            return a % b
        case "pow":
            return float(a**b)
    raise AssertionError(op)


OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.Mod: "mod",
    ast.Pow: "pow",
}


def fold_checked(node: ast.AST, op: str, a: float, b: float, reporter: Reporter) -> float | None:
    """`fold`, with an error at the node where there is no finite value."""
    try:
        value = fold(op, a, b)
        problem = "" if math.isfinite(value) else "the constant overflows a double"
    except ZeroDivisionError:
        problem = "division by zero"
    except OverflowError:
        problem = "the constant overflows a double"
    except TypeError:
        problem = "a negative number to a fractional power has no real value"
    if problem:
        reporter.error(node, problem)
        return None
    return value


def is_two(node: ast.expr) -> bool:
    """Whether this is the literal 2 or 2.0: x**2 is x·x where the exponent is that, and the library's pow elsewhere."""
    return isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value == 2


def literal(node: ast.expr, reporter: Reporter, what: str) -> float | None:
    """The value of literal arithmetic such as `1 - 1e-8`; None where refused."""
    if isinstance(node, ast.Constant):
        return number(node, reporter)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = literal(node.operand, reporter, what)
        return None if value is None else -value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = literal(node.left, reporter, what), literal(node.right, reporter, what)
        if left is None or right is None:
            return None
        if isinstance(node.op, ast.Pow) and is_two(node.right):
            return fold_checked(node, "mul", left, left, reporter)
        return fold_checked(node, OPERATORS[type(node.op)], left, right, reporter)
    hint = "numbers and + - * / % ** between them"
    if isinstance(node, (ast.Tuple, ast.List)) and node.elts:
        hint = "one name for each: beta1=0.9, beta2=0.999"
    reporter.error(node, f"{what} must be literal arithmetic", hint)
    return None
