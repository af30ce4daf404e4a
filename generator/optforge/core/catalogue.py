"""Packages of built-in rules or transforms: one file each, found by being there."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any


class Catalogue(ModuleType):
    """A package as a mapping from names to what its modules hold under their own names."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(module.name for module in pkgutil.iter_modules(self.__path__)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return any(name == own for own in self)

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(self._missing(name))
        return getattr(self, name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self:
            raise AttributeError(self._missing(name))
        importlib.import_module(f"{self.__name__}.{name}")
        return self.__dict__[name]

    def _missing(self, name: str) -> str:
        from .diagnostics import nearest

        return f"there is no {self.__name__.rpartition('.')[2].removesuffix('s')} {name!r}{nearest(name, self)}"

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a submodule sets it on its package: what it holds stands there instead of the module.
        super().__setattr__(name, getattr(value, name) if isinstance(value, ModuleType) else value)

    def __dir__(self) -> list[str]:
        return list(self)
