"""optforge: optimizer update rules, written once, as fused kernels that keep the same bits everywhere."""

from __future__ import annotations

import builtins
import importlib
from typing import Any

from . import rules as rules
from . import transforms as transforms
from .core.version import __version__ as __version__

# Modules that are public as they are.
_MODULES = ("schedules",)

# Where each public name lives. They are imported when first used, so that `import optforge` takes no time; the
# functions of the rule language (sqrt, where, …) are found in their own table.
_HOMES = {
    "CudaTarget": "engines.cuda.engine",
    "from_torch": "train.interop",
    "Optimizer": "train.optimizer",
    "EnvironmentProblem": "core.diagnostics",
    "InterruptedStep": "core.diagnostics",
    "Monitor": "train.monitor",
    "OptforgeError": "core.diagnostics",
    "ReduceLROnPlateau": "train.plateau",
    "PerformanceWarning": "core.diagnostics",
    "Rule": "library.rule",
    "RuleError": "core.diagnostics",
    "rule": "library.rule",
    "scalar": "library.rule",
    "ScalarError": "core.diagnostics",
    "Stats": "engines.stats",
    "to_torch": "train.interop",
    "Transform": "library.rule",
    "transform": "library.rule",
    "UsageError": "core.diagnostics",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = importlib.import_module(f".{name}", __name__)
    elif name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    elif name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        words = {
            **importlib.import_module(".core.functions", __name__).IMPORTABLE,
            **dict.fromkeys(importlib.import_module(".transforms", __name__)),
        }
        if name == "__all__":  # what `from optforge import *` brings, which replaces nothing of Python
            return ["rules", "transforms", *_MODULES, *_HOMES, *(word for word in words if not hasattr(builtins, word))]
        if name not in words:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = words[name] or getattr(transforms, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(["__version__", *__getattr__("__all__"), "abs", "sum"])
