"""The functions of the rule language: one row each, and the callables that rules import.

`sqrt(x)` on a Python float gives a Python float through `math`, so that a float32 array that meets it stays
float32; on an array it gives an array of the same dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .ieee_scalar import IEEE, Reduced
from .summation import tensor_total

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Function:
    """One function of the language.

    Attributes
    ----------
    parameters : tuple of str
        Names of its arguments.
    doc : str
        What it gives.
    scalar : callable
        On Python floats; raises where Python does.
    element : callable
        On arrays of one dtype, giving that dtype.
    ulp : float
        Largest error in units in the last place against the exact value, over all targets; 0 promises the same
        bits everywhere.
    c : str
        A function of <math.h> (its double form), or the lines of a helper's body, in which `{real}` is the element
        type and `{one}`, `{zero}` are constants of it. A helper has no branches and names what it chooses between:
        compilers vectorise that.
    raises : str
        A C condition on the arguments and the result `y` under which Python raises; empty: never.
    folds : bool
        Whether a compiler may compute it in advance with other bits than the platform's library gives.
    """

    name: str
    parameters: tuple[str, ...]
    doc: str
    scalar: Callable[..., float]
    element: Callable[..., Array]
    c: str
    ulp: float = 0
    raises: str = ""
    folds: bool = False

    @property
    def library(self) -> bool:
        """Whether C has the function in <math.h>."""
        return self.c.isidentifier()

    def __call__(self, *args: Any) -> Any:
        """Apply to floats or arrays, as rules do when they run as plain Python."""
        if len(args) != len(self.parameters):
            raise TypeError(f"{self.name}() takes {len(self.parameters)} arguments, not {len(args)}")
        arrays = any(isinstance(arg, np.ndarray) for arg in args)
        if any(isinstance(arg, Reduced) for arg in args):
            if not arrays:
                return Reduced(ieee(self.name, *map(float, args)))
            args = tuple(float(arg) if isinstance(arg, Reduced) else arg for arg in args)
        if not any(isinstance(arg, (np.ndarray, np.generic)) for arg in args):
            return self.scalar(*(float(arg) for arg in args))
        dtype = np.result_type(*args)
        with np.errstate(all="ignore"):
            return self.element(*(np.asarray(arg, dtype) for arg in args))

    def __repr__(self) -> str:
        return f"<optforge function {self.name}({', '.join(self.parameters)})>"


def _sign(x: float) -> float:
    return x if math.isnan(x) else float((x > 0) - (x < 0))


def _maximum(a: float, b: float) -> float:
    return a if math.isnan(a) or a > b else b


def _minimum(a: float, b: float) -> float:
    return a if math.isnan(a) or a < b else b


def _sign_of_elements(x: Array) -> Array:
    return np.where(np.isnan(x), x, (x > 0).astype(x.dtype) - (x < 0).astype(x.dtype))


def _maximum_of_elements(a: Array, b: Array) -> Array:
    return np.where(np.isnan(a) | (a > b), a, b)


def _minimum_of_elements(a: Array, b: Array) -> Array:
    return np.where(np.isnan(a) | (a < b), a, b)


FUNCTIONS: dict[str, Function] = {
    function.name: function
    for function in (
        Function("sqrt", ("x",), "square root", math.sqrt, np.sqrt, "sqrt", raises="x < 0.0"),
        Function("abs", ("x",), "absolute value", math.fabs, np.abs, "fabs"),
        Function(
            "sign",
            ("x",),
            "1, 0 or -1; +0 for both zeros, NaN for NaN",
            _sign,
            _sign_of_elements,
            "const {real} below = x < {zero} ? -{one} : {zero};\n"
            "const {real} y = x > {zero} ? {one} : below;\n\nreturn x != x ? x : y;",
        ),
        Function(
            "minimum",
            ("a", "b"),
            "NaN if either is, else a if a < b else b",
            _minimum,
            _minimum_of_elements,
            "const {real} y = a < b ? a : b;\n\nreturn a != a ? a : y;",
        ),
        Function(
            "maximum",
            ("a", "b"),
            "NaN if either is, else a if a > b else b",
            _maximum,
            _maximum_of_elements,
            "const {real} y = a > b ? a : b;\n\nreturn a != a ? a : y;",
        ),
        Function(
            "exp", ("x",), "e to the power x", math.exp, np.exp, "exp", 4, "x - x == 0.0 && y - y != 0.0", folds=True
        ),
        Function("log", ("x",), "natural logarithm", math.log, np.log, "log", 4, "x <= 0.0", folds=True),
        Function("tanh", ("x",), "hyperbolic tangent", math.tanh, np.tanh, "tanh", 4, folds=True),
    )
}


def ieee(op: str, *values: float) -> float:
    """An operation on scalars with IEEE's value where Python would raise."""
    if op in FUNCTIONS:
        try:
            return FUNCTIONS[op].scalar(*values)
        except (ValueError, OverflowError):
            with np.errstate(all="ignore"):
                return float(FUNCTIONS[op].element(*map(np.float64, values)))
    return IEEE[op](*values)


# Operations on scalars that end a step with an error where Python would raise.
RAISES = frozenset({"div", "mod", "pow", *(function.name for function in FUNCTIONS.values() if function.raises)})


def where(mask: Any, a: Any, b: Any, dtype: Any = None) -> Any:
    """Choose `a` where the mask holds, `b` elsewhere, element by element.

    Inside a rule the result has the dtype of the rule's arrays, also where both branches are numbers.
    """
    if not isinstance(mask, np.ndarray):
        raise TypeError("where() chooses between elements; for a scalar condition write: a if condition else b")
    if dtype is None:
        dtype = next((x.dtype for x in (a, b) if isinstance(x, np.ndarray)), None)
    a, b = (float(x) if isinstance(x, Reduced) else x for x in (a, b))
    return np.where(mask, np.asarray(a, dtype), np.asarray(b, dtype))


@dataclass(frozen=True)
class Reduction:
    """A function from the elements of a tensor, or of all tensors, to a scalar.

    Attributes
    ----------
    doc : str
        What it gives.
    kind : str
        What is added up: "squares", "sum", or "max" for the largest absolute value.
    every : bool
        Whether it runs over all tensors of the optimizer.
    finish : str
        What is done with the total: "sqrt", "mean" or nothing.
    """

    name: str
    doc: str
    kind: str
    every: bool = False
    finish: str = ""
    parameters: tuple[str, ...] = ("x",)

    def __call__(self, x: Any) -> Reduced:
        """Apply to one array, as rules do when they run as plain Python: all tensors are that one."""
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{self.name}() is over an array, not over {x!r}")
        total = tensor_total(x, self.kind)
        if self.finish == "mean":
            return Reduced(IEEE["div"](total, float(x.size)))
        return Reduced(math.sqrt(total) if self.finish else total)

    def __repr__(self) -> str:
        return f"<optforge reduction {self.name}(x)>"


REDUCTIONS: dict[str, Reduction] = {
    reduction.name: reduction
    for reduction in (
        Reduction("norm", "Euclidean norm over one tensor", "squares", finish="sqrt"),
        Reduction("sum", "sum over one tensor", "sum"),
        Reduction("mean", "mean over one tensor", "sum", finish="mean"),
        Reduction("max_abs", "largest absolute value of one tensor", "max"),
        Reduction("global_norm", "Euclidean norm over all tensors of the optimizer", "squares", True, "sqrt"),
        Reduction("global_sum", "sum over all tensors of the optimizer", "sum", True),
    )
}

# What rules import from the package.
IMPORTABLE: dict[str, Callable[..., Any]] = {
    **FUNCTIONS,
    "where": where,
    **REDUCTIONS,
}
