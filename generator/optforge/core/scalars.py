"""Evaluate the scalars of a kernel in Python floats, raising where Python raises."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .diagnostics import ScalarError
from .functions import FUNCTIONS, ieee
from .ir import Expr, Kernel, Let, ScalarGroup

Value = float | bool

COMPARISONS = frozenset(("lt", "le", "gt", "ge", "eq", "ne"))
BINARY: dict[str, Callable[[float, float], Value]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "mod": lambda a, b: a % b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}


class Scalars:
    """The values of scalars at one step, for one tensor.

    Parameters
    ----------
    hyperparameters : Mapping[str, float]
    t : int
        The step count.
    state : Mapping[str, float]
        The scalar state of the tensor.
    unscale : float
        1 / grad_scale.
    size : int
        Elements of the tensor.
    starting : bool
        Whether this is the tensor's first step.

    `sums` and `totals` (by id of the reduction) are filled in phase by phase.
    """

    def __init__(
        self,
        hyperparameters: Mapping[str, float],
        t: int,
        state: Mapping[str, float] | None = None,
        unscale: float = 1.0,
        size: int = 0,
        starting: bool = False,
    ):
        self.hyperparameters, self.t, self.state = hyperparameters, t, state or {}
        self.unscale, self.size, self.starting = unscale, size, starting
        self.values: dict[int, Value] = {}
        self.sums: dict[int, float] = {}
        self.totals: dict[int, float] = {}
        self.reduced = False

    def run(self, group: ScalarGroup) -> None:
        """Evaluate a group of bindings in order.

        Raises
        ------
        ScalarError
            One has no value. (Those that depend on a reduction, computed behind a phase, have IEEE's value then.)
        """
        self.reduced = group.phase > 0
        for let in group.lets:
            try:
                self.values[let.id] = self(let.expr)
            except ScalarError as problem:
                raise ScalarError(self.complaint(let, problem)) from None

    def complaint(self, let: Let, problem: ScalarError) -> str:
        """What is said of a scalar without a value."""
        values = ", ".join(f"{name}={value!r}" for name, value in {**self.hyperparameters, **self.state}.items())
        return f"the scalar {let.name!r} has no value at t={self.t}: {problem} ({values})"

    def __call__(self, expr: Expr) -> Value:
        """The value of an expression."""
        args = expr.args
        match expr.op:
            case "const":
                assert isinstance(expr.value, (float, bool))
                return expr.value
            case "hyper":
                return self.hyperparameters[str(expr.value)]
            case "state":
                return self.state[str(expr.value)]
            case "time":
                return float(self.t)
            case "unscale":
                return self.unscale
            case "size":
                return float(self.size)
            case "starting":
                return self.starting
            case "sum" | "total":
                assert isinstance(expr.value, int)
                return (self.sums if expr.op == "sum" else self.totals)[expr.value]
            case "ref":
                assert isinstance(expr.value, int)
                return self.values[expr.value]
            case "select":
                return self(args[1] if self(args[0]) else args[2])
            case "and":
                return bool(self(args[0]) and self(args[1]))
            case "or":
                return bool(self(args[0]) or self(args[1]))
            case "not":
                return not self(args[0])
            case "neg":
                return -self(args[0])
            case "square":
                base = self(args[0])
                return base * base
        return self.compute(expr.op, [self(arg) for arg in args])

    def compute(self, op: str, values: list[Value]) -> Value:
        """An operation that may have no value."""
        if self.reduced and op not in COMPARISONS:
            return ieee(op, *values)
        try:
            if op == "pow":
                result = values[0] ** values[1]
                if isinstance(result, complex):
                    raise ScalarError(f"({values[0]!r}) ** {values[1]!r} is complex")
                return float(result)
            if op in BINARY:
                return BINARY[op](values[0], values[1])
            return FUNCTIONS[op].scalar(*values)
        except ZeroDivisionError:
            raise ScalarError("division by zero") from None
        except OverflowError:
            shown = f"{op}({', '.join(map(repr, values))})"
            raise ScalarError(f"{shown} overflows") from None
        except ScalarError:
            raise
        except ValueError:
            raise ScalarError(f"{op}({', '.join(map(repr, values))}) is not defined") from None


def check_hyperparameters(kernel: Kernel, hyperparameters: Mapping[str, float], where: str = "") -> None:
    """Raise ValueError where an assert of the rule does not hold, or has no value; the message begins with `where`."""
    scalars = Scalars(hyperparameters, 0)
    for assertion in kernel.asserts:
        problem = ""
        try:
            if scalars(assertion.condition):
                continue
        except ScalarError as failure:
            problem = f": {failure}"
        names = {e.value for e in assertion.condition.walk() if e.op == "hyper"}
        given = ", ".join(f"{name}={value!r}" for name, value in hyperparameters.items() if name in names)
        message = f" ({assertion.message})" if assertion.message else ""
        error = ScalarError if problem else ValueError
        raise error(f"{where}rule {kernel.name!r} needs {assertion.text}{message}; given are {given}{problem}")
