"""Pictures as PNG files, with matplotlib where it is installed; no window is ever opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..core.atomic import replace_file
from ..core.diagnostics import EnvironmentProblem

# Okabe and Ito's palette, which the colour-blind can tell apart, without its yellow, which is too faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def require_matplotlib() -> None:
    """Raise where there is no matplotlib, for callers that want to know before they start.

    Raises
    ------
    EnvironmentProblem
        It is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as problem:
        raise EnvironmentProblem("drawing needs matplotlib: pip install matplotlib") from problem


def require_place(picture: str | Path, what: str = "the plot") -> None:
    """Raise where a picture, or another file, cannot be put, for callers that want to know before they start.

    Raises
    ------
    OSError
        Its directory is not there or may not be written, or it is a directory itself.
    """
    place = Path(os.path.realpath(picture))
    for parent in (Path(picture).parent, place.parent):
        if not parent.is_dir():
            raise FileNotFoundError(f"{parent}, where {what} is to go, is no directory")
    if place.is_dir():
        raise IsADirectoryError(f"{picture}, where {what} is to go, is a directory")
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{place.parent}, where {what} is to go, may not be written")


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches at 120 pixels each, that leaves matplotlib's global state alone."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Any) -> None:
    """A light grid and no frame: what is drawn should stand out."""
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Any, picture: str | Path) -> None:
    """Write a figure as a PNG; the file is there completely or not at all.

    Raises
    ------
    OSError
        It cannot be written.
    """
    replace_file(picture, lambda new: figure.savefig(new, format="png"))
