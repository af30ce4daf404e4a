"""What the parts of an Optimizer (groups, checkpoints, copies) know of the whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from ..core.ir import Kernel
from ..engines.host import Host
from ..engines.inputs import Inputs
from ..engines.tensor import How, Progress, Tensor
from ..library.rule import Rule
from .hyperparameters import Hyperparameters
from .structure import Structure


class OptimizerLike(Protocol):
    """An `Optimizer`, whose attributes are described there."""

    params: Any
    rule: Rule
    store: dict[str, str]
    master: str | None
    rounding: str
    seed: int

    _common: Mapping[str, Any]
    _engine: Any
    _hyper: Hyperparameters
    _inputs: Inputs
    _kernel: Kernel
    _options: Mapping[str, bool | str]
    _progress: Progress
    _space: Host
    _structure: Structure
    _tensors: Sequence[Tensor]
    _usual: How

    @property
    def t(self) -> int:
        """The step count."""

    @property
    def state(self) -> Mapping[str, Any]:
        """The state, by name."""

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""

    def _assign(self, groups: Iterable[int], name: str, value: Any) -> None:
        """Set a hyperparameter of some groups."""

    def _rows(self) -> Sequence[Mapping[str, float]]:
        """The hyperparameters of each group."""

    def _set(self, **attributes: Any) -> None:
        """Set own attributes."""

    def _settle(self) -> None:
        """Wait for what a device is at."""
