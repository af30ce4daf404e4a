"""The hyperparameters of an optimizer's groups: numbers, and functions of t that give a number for each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..core.functions import Array
from ..core.ir import Kernel
from ..core.scalars import check_hyperparameters
from ..frontend.settings import real

Schedule = Callable[[int], Any]
Schedules = dict[tuple[int, str], Schedule]


class Hyperparameters:
    """The hyperparameters of all groups.

    Parameters
    ----------
    kernel : Kernel
    rows : sequence of Mapping[str, float or Schedule]
        Those of each group.

    Attributes
    ----------
    names : tuple of str
    values : array of float64
        A row for each group, with a column at least: what the engines read. It stays where it is.
    schedules : dict
        The functions of t, by group and name.
    """

    def __init__(self, kernel: Kernel, rows: Sequence[Mapping[str, Any]]):
        self.kernel = kernel
        self.names = tuple(name for name, _ in kernel.hyperparameters)
        # A rule without hyperparameters still passes an address.
        self.values = np.zeros((len(rows), max(len(self.names), 1)), np.float64)
        self.schedules: Schedules = {
            (k, name): value for k, row in enumerate(rows) for name, value in row.items() if callable(value)
        }
        self.replace(*self.changed(rows, self.schedules, 1))

    def changed(self, rows: Sequence[Mapping[str, Any]], schedules: Schedules, t: int) -> tuple[Array, Schedules]:
        """Other values of all groups, and schedules with their values at a step in place of those; for `replace`.

        Raises
        ------
        TypeError, ValueError
            A schedule gives no value, or the rule refuses a value.
        """
        values = np.zeros_like(self.values)
        for k, row in enumerate(rows):
            values[k, : len(self.names)] = [0.0 if (k, name) in schedules else row[name] for name in self.names]
        values = self.at(t, values, schedules)
        self.check(values, range(len(rows)))
        return values, schedules

    def replace(self, values: Array, schedules: Schedules) -> None:
        """Take over values and schedules that were checked."""
        self.values[...] = values
        self.schedules = schedules

    def where(self, group: int) -> str:
        """What errors begin with, where there are several groups."""
        return f"groups[{group}]: " if len(self.values) > 1 else ""

    def of(self, group: int) -> dict[str, float]:
        """The values of a group."""
        return dict(zip(self.names, self.values[group].tolist(), strict=False))

    def column(self, name: str) -> list[float]:
        """The values of a hyperparameter in all groups."""
        column: list[float] = self.values[:, self.names.index(name)].tolist()
        return column

    def assign(self, groups: Iterable[int], name: str, value: Any, t: int) -> None:
        """Set a hyperparameter of some groups to a number, or to a function of t, whose value at this step it has then.

        Raises
        ------
        TypeError, ValueError
            The value is no number or NaN, or the rule refuses it; nothing was changed.
        """
        groups = list(groups)
        values, schedules = self.values.copy(), dict(self.schedules)
        for group in groups:
            where = self.where(group) if len(groups) < len(values) else ""
            schedules.pop((group, name), None)
            if callable(value):
                schedules[group, name] = value
                number = scheduled(value, name, t, where)
            else:
                number = real(name, value, where)
            values[group, self.names.index(name)] = number
        self.check(values, groups, f"at t={t} " if callable(value) else "")
        self.replace(values, schedules)

    def at(self, t: int, values: Array | None = None, schedules: Schedules | None = None) -> Array:
        """The values at a step: those of schedules anew.

        Raises
        ------
        TypeError, ValueError
            A schedule gives none, or one that the rule refuses.
        """
        values = (self.values if values is None else values).copy()
        schedules = self.schedules if schedules is None else schedules
        for (group, name), schedule in schedules.items():
            values[group, self.names.index(name)] = scheduled(schedule, name, t, self.where(group))
        self.check(values, sorted({group for group, _ in schedules}), f"at t={t} ")
        return values

    def check(self, values: Array, groups: Iterable[int], when: str = "") -> None:
        """Raise ValueError where an assert of the rule does not hold for some groups."""
        for group in groups:
            named = dict(zip(self.names, values[group].tolist(), strict=False))
            check_hyperparameters(self.kernel, named, self.where(group) + when)


def scheduled(schedule: Schedule, name: str, t: int, where: str = "") -> float:
    """The value of a schedule at a step.

    Raises
    ------
    TypeError, ValueError
        It raises, or gives no number, or NaN.
    """
    of = f"{where}the schedule of hyperparameter {name!r}"
    try:
        value = schedule(t)
    except Exception as problem:
        raise ValueError(f"{of} raised {type(problem).__name__} at t={t}: {problem}") from problem
    try:
        return real(name, value)
    except (TypeError, ValueError) as problem:
        raise type(problem)(f"{of} gives {value!r} at t={t}, which is no number") from None
