"""The built-in rules: one file each, found by being there.

`optforge.rules.adam` and `optforge.rules["adam"]` are the Rule of that name; iteration gives the names.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..language import Rule


class Catalogue(ModuleType):
    """This package as a mapping from names to rules."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(module.name for module in pkgutil.iter_modules(__path__)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return any(name == own for own in self)

    def __getitem__(self, name: str) -> Rule:
        if name not in self:
            from ..diagnostics import nearest

            raise KeyError(f"there is no rule {name!r}{nearest(name, self)}")
        return getattr(self, name)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Rule:
        if name.startswith("_") or name not in self:
            from ..diagnostics import nearest

            raise AttributeError(f"there is no rule {name!r}{nearest(name, self)}")
        importlib.import_module(f"{__name__}.{name}")
        return self.__dict__[name]  # type: ignore[no-any-return]

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a submodule sets it on its package: the rule stands there instead of its module.
        super().__setattr__(name, getattr(value, name) if isinstance(value, ModuleType) else value)

    def __dir__(self) -> list[str]:
        return list(self)


sys.modules[__name__].__class__ = Catalogue
