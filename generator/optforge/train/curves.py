"""The curves of a training run, kept in bounded memory and drawn as one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .pictures import COLOURS, new_figure, save, tidy

MOST = 4096  # points that are kept, more than a picture has pixels across

PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("loss", {"loss": "loss"}),
    ("learning rate", {"lr": "lr"}),
    (
        "norm",
        {
            "param_norm": "parameters",
            "grad_norm": "gradients",
            "clipped_grad_norm": "clipped gradients",
            "update_norm": "updates",
        },
    ),
)
COLUMNS = ("step", *(name for _, lines in PANELS for name in lines))

Point = tuple[float | None, ...]


class History:
    """Rows of a run: all at first, then every second, every fourth and so on, so that memory is bounded; and the last.

    Parameters
    ----------
    most : int
        Rows that are kept; an even number, so that the newest is kept where every second one goes.
    """

    def __init__(self, most: int = MOST):
        self._most, self._every, self._seen = most, 1, 0
        self._points: list[Point] = []
        self._last: Point | None = None

    def add(self, row: Mapping[str, float | int | None]) -> None:
        """Keep a row, or let it go."""
        point = tuple(row[name] for name in COLUMNS)
        kept = self._seen % self._every == 0
        self._last = None if kept else point
        self._seen += 1
        if kept:
            self._points.append(point)
            if len(self._points) > self._most:
                self._points = self._points[::2]
                self._every *= 2

    def points(self) -> list[Point]:
        """What is kept, in order."""
        return [*self._points, *([] if self._last is None else [self._last])]


def draw(points: Sequence[Point], picture: str | Path) -> None:
    """Draw loss, learning rate and norms over the steps as a PNG; panels without a number are left out.

    Axes are logarithmic where all is positive and the range is more than tenfold. What is not finite leaves a gap.

    Raises
    ------
    EnvironmentProblem
        matplotlib is not installed.
    OSError
        The picture cannot be written.
    """
    columns = {name: [usable(point[k]) for point in points] for k, name in enumerate(COLUMNS)}
    if columns["grad_norm"] == columns["clipped_grad_norm"]:  # nothing clips
        del columns["clipped_grad_norm"]
    shown = []
    for title, lines in PANELS:
        drawn = {name: label for name, label in lines.items() if any(map(math.isfinite, columns.get(name, ())))}
        if drawn:
            shown.append((title, drawn))
    figure = new_figure(8, 1 + 2.4 * max(len(shown), 1))
    panels = figure.subplots(max(len(shown), 1), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, drawn) in zip(panels, shown, strict=False):
        plot_panel(axes, columns, drawn)
        axes.set_ylabel(title)
    panels[-1].set_xlabel("step")
    save(figure, picture)


def plot_panel(axes: Any, columns: Mapping[str, Sequence[float]], drawn: Mapping[str, str]) -> None:
    """Draw lines by name, with a legend where there are several."""
    steps = columns["step"]
    marker = "." if len(steps) < 40 else ""
    for index, (name, label) in enumerate(drawn.items()):
        # What clips now and then lies on the gradients' line mostly, which must show through.
        dash = (0, (4, 4)) if name == "clipped_grad_norm" else "-"
        axes.plot(steps, columns[name], linestyle=dash, marker=marker, color=COLOURS[index], linewidth=1.5, label=label)
    values = [value for name in drawn for value in columns[name] if math.isfinite(value)]
    positive = [value for value in values if value > 0]
    if positive and len(positive) == len(values) and max(positive) > 10 * min(positive):
        axes.set_yscale("log")
    if len(drawn) > 1:
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(drawn), borderaxespad=0.2)
    axes.margins(x=0.01)
    tidy(axes)


def usable(value: float | int | None) -> float:
    """A number that can be drawn, or NaN."""
    return float(value) if value is not None and math.isfinite(value) else math.nan
