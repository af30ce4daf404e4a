"""The scalars of a step as a compiled Python function: what the host computes for a device, one row a step."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

from ...core.diagnostics import ScalarError
from ...core.functions import FUNCTIONS
from ...core.ir import Expr, Kernel, Type
from ...core.names import Names
from ...emit.scalars import CScalars

INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "mod": "%", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
INFIX |= {"eq": "==", "ne": "!=", "and": "and", "or": "or"}

Compute = Callable[[list[float], float, float], tuple[float, ...]]


def power(a: float, b: float) -> float:
    """`a ** b`, which has no value where Python's is complex."""
    result = a**b
    if isinstance(result, complex):
        raise ScalarError(f"({a!r}) ** {b!r} is complex")
    return float(result)


class Rows:
    """The scalars that are known before a step and the same for all tensors of a group.

    Attributes
    ----------
    size : int
        Bytes of a row, laid out as the emitted struct of scalars.
    compute : callable
        From the hyperparameters, t and 1/grad_scale to the values of a row: those that a step begins with. It raises
        ArithmeticError or ValueError where a scalar has no value.
    pack : callable
        From those values, as arguments, to the bytes of the row.
    """

    def __init__(self, kernel: Kernel):
        crossing = CScalars(kernel, "", Names(), Names(), "n", lambda role, _: role)
        fields = crossing.crossing
        lets = [let for group in kernel.scalars if (group.scope, group.phase) == ("step", 0) for let in group.lets]
        self.hypers = {name: f"h[{k}]" for k, (name, _) in enumerate(kernel.hyperparameters)}
        begun = [e for e in fields if crossing.made(e) == (0, False)]
        if fields[: len(begun)] != begun:
            raise AssertionError("what a step begins with comes first")
        codes = ["i" if e.type is Type.CONDITION else "d" for e in fields]
        self.size = struct.calcsize(f"@{''.join(codes)}0d")
        given = "@" + "".join(codes[: len(begun)])
        self.pack = struct.Struct(f"{given}{self.size - struct.calcsize(given)}x").pack
        lines = [f"    v{let.id} = {self.text(let.expr)}" for let in lets]
        text = "\n".join(
            ["def compute(h, t, unscale):", *lines, f"    return ({''.join(self.text(e) + ', ' for e in begun)})"]
        )
        scope: dict[str, Any] = {"power": power, "square": lambda x: x * x, "inf": math.inf, "nan": math.nan}
        scope |= {f"do_{name}": function.scalar for name, function in FUNCTIONS.items()}
        exec(compile(text, f"<scalars of {kernel.name}>", "exec"), scope)
        self.compute: Compute = scope["compute"]

    def text(self, expr: Expr) -> str:
        """An expression in Python."""
        args = [self.text(arg) for arg in expr.args]
        match expr.op:
            case "const":
                return f"({expr.value!r})"
            case "hyper":
                return self.hypers[str(expr.value)]
            case "time":
                return "t"
            case "unscale":
                return "unscale"
            case "ref":
                return f"v{expr.value}"
            case "select":
                return f"({args[1]} if {args[0]} else {args[2]})"
            case "not":
                return f"(not {args[0]})"
            case "neg":
                return f"(-{args[0]})"
            case "square":
                return f"square({args[0]})"
            case "pow":
                return f"power({args[0]}, {args[1]})"
            case op if op in INFIX:
                return f"({args[0]} {INFIX[op]} {args[1]})"
        return f"do_{expr.op}({', '.join(args)})"
