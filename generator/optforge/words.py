"""Every word of the rule language, for `from optforge.words import *` at the top of a file of rules.

That replaces Python's `abs` and `sum` in the file, which `from optforge import *` does not. A rule needs neither import
to be compiled, nor to be called as plain Python: its words are the language's in any case.
"""

from __future__ import annotations

from typing import Any

from .core.functions import IMPORTABLE
from .library.rule import rule, scalar, transform

__all__ = ["rule", "scalar", "transform", *IMPORTABLE]


def __getattr__(name: str) -> Any:
    if name not in IMPORTABLE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return IMPORTABLE[name]
