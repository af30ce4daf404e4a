"""What a step tells of itself: norms, counts of NaN and infinity, whether it was skipped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..core.functions import Array

NORMS = ("grad_norm", "clipped_grad_norm", "param_norm", "update_norm")
RECORD = np.dtype(
    [(name, np.float64) for name in (*NORMS, "max_update_ratio")]
    + [(name, np.uint64) for name in ("nan", "inf", "skipped")]
)

FIELDS = RECORD.names or ()


class PerTensor:
    """The statistics of each tensor, as arrays in the order of `params`, by attribute or by name.

    A tensor without a gradient has NaN for its norms and its ratio, and 0 for its counts.
    """

    def __init__(self, records: Array, places: Sequence[int], count: int):
        self._records, self._places, self._count = records, places, count

    def __getattr__(self, name: str) -> Array:
        if name not in FIELDS:
            raise AttributeError(f"there is no statistic {name!r}; there are {', '.join(FIELDS)}")
        counted = RECORD[name].kind == "u"
        kind = bool if name == "skipped" else np.int64 if counted else np.float64
        whole: Array = np.full(self._count, 0 if counted else math.nan, kind)
        whole[list(self._places)] = self._records[name]
        return whole

    __getitem__ = __getattr__

    def __repr__(self) -> str:
        return f"<statistics of {self._count} tensor(s)>"


class Stats:
    """What one step tells of itself, over all tensors that had a gradient.

    Attributes
    ----------
    grad_norm : float
        Euclidean norm of the gradients, after unscaling and before any transform.
    clipped_grad_norm : float
        Norm of the gradients as the rule sees them, behind all transforms.
    param_norm : float
        Norm of the parameters after the step.
    update_norm : float
        Norm of the difference between the parameters after and before the step, subtracted in their dtype.
    max_update_ratio : float
        The largest of the tensors' update_norm / param_norm; 0 where nothing moved.
    nan, inf : int
        Elements of the unscaled gradients that are NaN, or infinite.
    skipped : bool
        Whether the step was skipped. Then nothing was updated: update_norm and max_update_ratio are 0, and what the
        step would have computed on its way, clipped_grad_norm and param_norm, is NaN.
    per_tensor : PerTensor
        The same of each tensor, as arrays in the order of `params`.
    """

    grad_norm: float
    clipped_grad_norm: float
    param_norm: float
    update_norm: float
    max_update_ratio: float
    nan: int
    inf: int
    skipped: bool
    per_tensor: PerTensor

    def __init__(self, records: Array, places: Sequence[int], count: int):
        self.__dict__.update(zip(FIELDS, records[0].item(), strict=True))
        self.skipped = bool(self.skipped)
        self.per_tensor = PerTensor(records[1:], places, count)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in FIELDS)
        return f"Stats({values})"


def fill(
    records: Array, squares: Sequence[Mapping[str, float]], counts: Sequence[tuple[int, int]], skipped: bool
) -> None:
    """Write records, the first of all tensors together, from the sums of squares of each and of all.

    `squares` (by "grad", "clipped", "param" and "update") and `counts` (of NaN and of infinity) are of all tensors
    first, then of each.
    """
    for record, own, (nan, inf) in zip(records, squares, counts, strict=True):
        record["grad_norm"] = math.sqrt(own["grad"])
        record["clipped_grad_norm"] = math.nan if skipped else math.sqrt(own["clipped"])
        record["param_norm"] = math.nan if skipped else math.sqrt(own["param"])
        record["update_norm"] = 0.0 if skipped else math.sqrt(own.get("update", 0.0))
        record["max_update_ratio"] = 0.0
        record["nan"], record["inf"], record["skipped"] = nan, inf, skipped
        if record["update_norm"] != 0:
            with np.errstate(all="ignore"):
                record["max_update_ratio"] = record["update_norm"] / record["param_norm"]
    records[0]["max_update_ratio"] = np.max(records[1:]["max_update_ratio"], initial=0.0)
