"""A scalar that depends on a reduction, as rules that run as plain Python meet it: with IEEE arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np


def _divide(a: float, b: float) -> float:
    if b != 0:
        return a / b
    return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1.0, b)


def _modulo(a: float, b: float) -> float:
    return math.nan if b == 0 or math.isinf(a) else a % b


def _power(a: float, b: float) -> float:
    odd = b % 2 == 1 if math.isfinite(b) else False
    try:
        return math.pow(a, b)
    except OverflowError:
        return -math.inf if a < 0 and odd else math.inf
    except ValueError:
        if a != 0:
            return math.nan  # a negative number to a fractional power
        return math.copysign(math.inf, a) if odd else math.inf


# What operations on doubles give where Python would raise as well.
IEEE: dict[str, Callable[[float, float], float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": _divide,
    "mod": _modulo,
    "pow": _power,
}


class Reduced:
    """A double whose arithmetic never raises, and which takes the dtype of an array that it meets."""

    __array_ufunc__ = None  # an array leaves an operation with it to the methods below

    def __init__(self, value: float):
        self.value = value

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return repr(self.value)

    def __neg__(self) -> Reduced:
        return Reduced(-self.value)

    def __eq__(self, other: object) -> Any:
        return self._compare(other, "__eq__")

    def __ne__(self, other: object) -> Any:
        return self._compare(other, "__ne__")

    def __lt__(self, other: object) -> Any:
        return self._compare(other, "__lt__")

    def __le__(self, other: object) -> Any:
        return self._compare(other, "__le__")

    def __gt__(self, other: object) -> Any:
        return self._compare(other, "__gt__")

    def __ge__(self, other: object) -> Any:
        return self._compare(other, "__ge__")

    __hash__ = None  # type: ignore[assignment]

    def _compare(self, other: Any, method: str) -> Any:
        if isinstance(other, np.ndarray):
            swapped = {"__lt__": "__gt__", "__le__": "__ge__", "__gt__": "__lt__", "__ge__": "__le__"}
            return getattr(other, swapped.get(method, method))(self.value)
        return getattr(self.value, method)(float(other))


def _binary(op: str, method: str) -> None:
    def forward(self: Reduced, other: Any) -> Any:
        if isinstance(other, np.ndarray):
            return getattr(other, f"__r{method}__")(self.value)
        return Reduced(IEEE[op](self.value, float(other)))

    def backward(self: Reduced, other: Any) -> Any:
        if isinstance(other, np.ndarray):
            return getattr(other, f"__{method}__")(self.value)
        return Reduced(IEEE[op](float(other), self.value))

    setattr(Reduced, f"__{method}__", forward)
    setattr(Reduced, f"__r{method}__", backward)


for _op, _method in (
    ("add", "add"),
    ("sub", "sub"),
    ("mul", "mul"),
    ("div", "truediv"),
    ("mod", "mod"),
    ("pow", "pow"),
):
    _binary(_op, _method)
