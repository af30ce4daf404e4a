"""What emission and engines know of a rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..core.dtypes import DType
from ..core.ir import Kernel


class Rule(Protocol):
    """A rule as files and engines need it; `optforge.Rule` is one."""

    @property
    def name(self) -> str:
        """Its name, as the author wrote it."""

    @property
    def doc(self) -> str:
        """Its docstring."""

    @property
    def formulas(self) -> str:
        """Its body, as the author wrote it."""

    @property
    def origin(self) -> str:
        """How the command line names it."""

    @property
    def hash(self) -> str:
        """SHA-256 over its parsed form."""

    @property
    def options(self) -> Mapping[str, bool | str]:
        """Its static options with their defaults."""

    @property
    def hyperparameters(self) -> Mapping[str, float]:
        """Its hyperparameters with their defaults."""

    def kernel(self, /, **settings: object) -> Kernel:
        """The compiled form."""

    def golden(self, kernel: Kernel, dtype: DType) -> int:
        """What the self-test of a kernel of it has to find."""
