"""Expressions to text of the C family: minimal parentheses, operations exactly as they are."""

from __future__ import annotations

from collections.abc import Callable

from ..core.dtypes import F64, DType
from ..core.functions import FUNCTIONS, RAISES
from ..core.ir import Expr, Type

# How tightly C binds, loosest first.
TERNARY, OR, AND, EQUALITY, RELATION, SUM, PRODUCT, UNARY, POSTFIX = range(1, 10)

INFIX = {
    "add": ("+", SUM),
    "sub": ("-", SUM),
    "mul": ("*", PRODUCT),
    "div": ("/", PRODUCT),
    "lt": ("<", RELATION),
    "le": ("<=", RELATION),
    "gt": (">", RELATION),
    "ge": (">=", RELATION),
    "eq": ("==", EQUALITY),
    "ne": ("!=", EQUALITY),
    "and": ("&&", AND),
    "or": ("||", OR),
}


LEAVES = frozenset(("load", "ref", "hyper", "time", "unscale", "state", "starting", "size", "sum", "total"))


class Printer:
    """Prints expressions of one dtype.

    Parameters
    ----------
    dtype : DType
        Of the elements; scalars are printed as doubles.
    leaf : callable
        The name of an expression without operands.
    helper : callable
        The name of an emitted function from its role and dtype; called for each that is needed.
    checked : str
        Passed as the last argument to functions that note where Python would raise; empty where scalars have IEEE's
        value.
    """

    def __init__(
        self,
        dtype: DType,
        leaf: Callable[[Expr], str],
        helper: Callable[[str, DType], str],
        checked: str = "",
    ):
        self.dtype, self.leaf, self.helper, self.checked = dtype, leaf, helper, checked

    def __call__(self, expr: Expr, least: int = TERNARY) -> str:
        """The text, in parentheses if it binds less tightly than `least`."""
        text, binds = self.print(expr)
        return f"({text})" if binds < least else text

    def print(self, expr: Expr) -> tuple[str, int]:
        """The text and how tightly it binds."""
        args = expr.args
        kind = F64 if expr.type.uniform else self.dtype
        match expr.op:
            case "const":
                return self.constant(expr, kind)
            case op if op in LEAVES:
                return self.leaf(expr), POSTFIX
            case "round":
                scalar = args[0]
                return self.constant(scalar, self.dtype) if scalar.op == "const" else (self.leaf(scalar), POSTFIX)
            case "neg":
                return f"-{self(args[0], POSTFIX)}", UNARY
            case "not":
                return f"!{self(args[0], POSTFIX)}", UNARY
            case "select" | "where":
                return f"{self(args[0], OR)} ? {self(args[1])} : {self(args[2])}", TERNARY
            case "square" if not args[0].args:
                name = self(args[0], POSTFIX)
                return f"{name} * {name}", PRODUCT
            case "div" if self.checked and expr.type is Type.SCALAR and not nonzero(args[1]):
                return self.called("div", kind, args)
            case op if op in INFIX:
                symbol, binds = INFIX[op]
                if op in ("and", "or"):  # compilers warn of && beside || without parentheses
                    a, b = (self(arg, EQUALITY if arg.op != op else binds) for arg in args)
                    return f"{a} {symbol} {b}", binds
                return f"{self(args[0], binds)} {symbol} {self(args[1], binds + 1)}", binds
            case op if op in FUNCTIONS and FUNCTIONS[op].library:
                checks = expr.type is Type.SCALAR and (bool(self.checked and op in RAISES) or FUNCTIONS[op].folds)
                if not checks:
                    return f"{FUNCTIONS[op].c}{kind.math}({', '.join(map(self, args))})", POSTFIX
        return self.called(expr.op, kind, args)

    def called(self, role: str, kind: DType, args: tuple[Expr, ...]) -> tuple[str, int]:
        """A call of an emitted function."""
        passed = [self(arg) for arg in args]
        if args[0].type is Type.SCALAR and (role in RAISES or self.folds(role)):
            role = f"scalar {role}" if self.checked else f"ieee {role}"
            if self.checked and role.removeprefix("scalar ") in RAISES:
                passed.append(self.checked)
        return f"{self.helper(role, kind)}({', '.join(passed)})", POSTFIX

    @staticmethod
    def folds(role: str) -> bool:
        """Whether a compiler may compute the function in advance with other bits."""
        return role in FUNCTIONS and FUNCTIONS[role].folds

    @staticmethod
    def constant(expr: Expr, dtype: DType) -> tuple[str, int]:
        """A number, or a truth value as C's int."""
        if expr.type is Type.CONDITION:
            return str(int(bool(expr.value))), POSTFIX
        assert isinstance(expr.value, float)
        text = dtype.constant(expr.value)
        return text, UNARY if text.startswith("-") else POSTFIX


def nonzero(expr: Expr) -> bool:
    """Whether a divisor is known not to be 0."""
    return expr.op == "const" and expr.value != 0
