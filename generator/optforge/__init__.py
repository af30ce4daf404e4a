"""optforge: optimizer update rules, written once, as fused kernels that keep the same bits everywhere."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import rules
from .diagnostics import OptforgeError, RuleError
from .functions import FUNCTIONS, REDUCTIONS, reduction, where
from .rule import Rule, rule, scalar, transform

if TYPE_CHECKING:
    from .optimizer import Optimizer

__version__ = "0.1.0"

_functions = {**FUNCTIONS, **{name: reduction(name) for name in REDUCTIONS}, "where": where}
globals().update(_functions)

__all__ = ["Optimizer", "OptforgeError", "Rule", "RuleError", "rule", "rules", "scalar", "transform", *_functions]


def __getattr__(name: str) -> Any:
    # What training needs is imported when it is first used, so that reading rules stays quick.
    if name == "Optimizer":
        return importlib.import_module(".optimizer", __name__).Optimizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
