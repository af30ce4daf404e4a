"""Reference steps of the optimizer rules, written by hand in NumPy from the published formulas.

Nothing here uses the package under test: agreement between the two is evidence only while they share no code.
Each module in this folder holds one rule: `STATE`, `HYPERPARAMETERS`, `SETTINGS` and `step(p, g, state, t, **hyper)`.

What every oracle does alike:

* an expression of hyperparameters, `t` and norms alone is a Python float, rounded once, by `dtype(...)`, where an array
  joins;
* every elementwise operation is one NumPy call on operands of the array's own dtype, so it rounds to that dtype;
* a power of a scalar is `math.pow`; a square is a product;
* inputs are only read: `step` returns new arrays.
"""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import numpy as np


@cache
def found() -> tuple[str, ...]:
    """Return `names()`, which are looked for once."""
    return tuple(sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_")))


def names() -> list[str]:
    """Return the names of the oracles, sorted: a module is one by being in this folder."""
    return [*found()]


def oracle(name: str) -> ModuleType:
    """Import and return the oracle of the rule called `name`."""
    if name not in found():
        raise LookupError(f"no oracle is called {name!r}; there are: {', '.join(names())}")
    return import_module(f"{__name__}.{name}")


def begin(name: str, p: Any) -> dict[str, Any]:
    """Return the state of the rule called `name` before its first step: arrays like `p`, or floats (`SCALAR_STATE`)."""
    scalars = getattr(oracle(name), "SCALAR_STATE", ())
    return {s: value if s in scalars else np.full_like(p, value) for s, value in oracle(name).STATE.items()}
