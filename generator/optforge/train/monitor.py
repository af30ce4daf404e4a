"""The Monitor: watches a training run, says how it goes, and warns when it goes wrong."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from ..engines.stats import Stats
from .curves import History, draw
from .display import Display
from .journal import Journal
from .pictures import require_matplotlib, require_place
from .schedules import count, positive

NORMS = ("grad_norm", "clipped_grad_norm", "param_norm", "update_norm")
COLUMNS = ("step", "loss", "lr", *NORMS, "ratio", "max_update_ratio", "nan", "inf", "skipped", "seconds")
SKIPS_IN_A_ROW = 20  # a loss scale that begins at 2**16 is halved 16 times at most until nothing overflows
BROUGHT_DOWN = 0.01  # of the largest rate so far: smaller ones are so on purpose
REDRAW = 60.0  # seconds between pictures, each of which takes about half a second


class Monitor:
    """Watches a training run: prints norms, keeps a log, draws curves, and warns when something goes wrong.

    Ask it before each step whether it wants statistics, and tell it of each step afterwards; one monitor watches one
    optimizer:

    >>> import numpy as np, optforge as of
    >>> w = [np.ones(3, np.float32)]
    >>> opt = of.Optimizer(w, "sgd", target="numpy")
    >>> with of.Monitor(every=100, show=False) as monitor:
    ...     for _ in range(1000):
    ...         stats = opt.step([2 * w[0]], stats=monitor.wants(opt))
    ...         monitor.update(opt, stats, loss=(w[0] ** 2).sum())

    It prints and logs a row after step 1 and after every step whose number is a multiple of `every`: on a terminal as a
    table that stays in its place, elsewhere as a line. All other steps cost it about a microsecond.

    Each of these is a RuntimeWarning, once in a run:

    - The loss is NaN or infinite. It is looked at after every step.
    - Gradients have NaN or infinity in a step that was not skipped; or the norm of the parameters or of the update is
      not finite. These are looked at whenever there are statistics.
    - The update is unusually large or small beside the parameters: update_norm / param_norm was outside of `usual` at
      two rows one after the other. A well chosen rate moves parameters by about a thousandth of their norm per step.
      Above a tenth, ten steps replace them, which is a rate too large. Below 1e-7 a float32, which has 24 bits, no
      longer changes when the update is added: training stands still. One row is not enough, since parameters that
      start at zero are always above at first; and where the rate is 0, or below a hundredth of what it was at most,
      as at the end of a schedule, a small update is what is meant.
    - 20 steps were skipped in a row: more than a loss scale needs to find its place.

    Parameters
    ----------
    every : int
        Steps from row to row; at least 1.
    log : str or Path, optional
        A file ending in `.csv` or `.jsonl`, to which each row is appended and flushed. One that is there goes on, if
        it has the same columns: step, loss, lr (of the first group), grad_norm, clipped_grad_norm, param_norm,
        update_norm, ratio (update_norm / param_norm), max_update_ratio, nan, inf, skipped (steps so far), seconds
        (since the start). A run that is resumed from a checkpoint takes the steps since then again, which have two
        rows in the log: the last one counts. Its `skipped` and `seconds` begin at 0.
    plot : str or Path, optional
        A PNG with loss, learning rate and norms over the steps, drawn by `close`, and about once a minute before. It
        replaces one that is there when there is a row to draw.
    show : bool
        Whether to print.
    usual : tuple of two floats
        Where update_norm / param_norm raises no warning.
    console : rich.console.Console, optional
        Where to print; standard output if left out.

    Attributes
    ----------
    skipped : int
        Steps that were skipped so far.

    Raises
    ------
    TypeError, ValueError
        An argument does not do, or `log` has other columns.
    EnvironmentProblem
        A plot is wanted and matplotlib is not installed.
    OSError
        `log` cannot be written, or `plot` is a directory, or in one that is not there or may not be written. Later on,
        in the midst of training, this is a warning, and so is a console that cannot be written.
    """

    def __init__(
        self,
        every: int = 100,
        *,
        log: str | Path | None = None,
        plot: str | Path | None = None,
        show: bool = True,
        usual: tuple[float, float] = (1e-7, 1e-1),
        console: Any = None,
    ):
        self.every = count("every", every)
        try:
            low, high = usual
        except (TypeError, ValueError):
            raise TypeError(f"usual is a tuple of two numbers, not {usual!r}") from None
        low, high = positive("usual", low), positive("usual", high)
        if low >= high:
            raise ValueError(f"usual is a smaller and a larger number, not {usual!r}")
        self.usual = low, high
        self.skipped = 0
        self._plot = None if plot is None else Path(plot)
        if self._plot is not None:
            require_matplotlib()
            require_place(self._plot)
        self._journal = None if log is None else Journal(log, COLUMNS)
        self._display = Display(console) if show else None
        self._shown_on = "standard output" if console is None else "the console"
        self._history = History()
        self._start = self._drawn = time.monotonic()
        self._last: int | None = None
        self._in_a_row = 0
        self._unusual = ""
        self._largest_rate = 0.0
        self._warned: set[str] = set()
        self._closed = False

    def wants(self, opt: Any) -> bool:
        """Whether the next step of an optimizer is to give statistics: `opt.step(grads, stats=monitor.wants(opt))`."""
        t = opt.t + 1
        if self._last is not None and t <= self._last:  # it went back, to a checkpoint
            self._last = t - 1
        return bool(t == 1 or t % self.every == 0)

    def update(self, opt: Any, stats: Stats | None = None, *, loss: Any = None) -> None:
        """Take note of a step, once after each.

        Parameters
        ----------
        opt : Optimizer
            With its `t` after the step. A step after which `t` is as before was skipped.
        stats : Stats, optional
            What the step gave, if it did; without it a row has no norms.
        loss : float, optional
            Anything with a float value. Of a loss that is elsewhere, on a GPU, this waits for it: give it where
            `monitor.wants(opt)` was true before the step, and None after other steps.

        Raises
        ------
        TypeError
            The loss is no number, or `stats` are no statistics.
        ValueError
            The monitor is closed.
        """
        if self._closed:
            raise ValueError("this monitor is closed")
        if stats is not None and not isinstance(stats, Stats):
            raise TypeError(
                f"stats are what opt.step(grads, stats=True) gives, not {stats!r}; a loss is given as loss="
            )
        t = opt.t
        value = None if loss is None else number(loss)
        skipped = t == self._last or t == 0 if stats is None else stats.skipped
        self._last = t
        if skipped:
            self.skipped += 1
            self._in_a_row += 1
            if self._in_a_row == SKIPS_IN_A_ROW:
                self._warn("skips", f"{SKIPS_IN_A_ROW} steps were skipped in a row after step {t}, as not finite")
        else:
            self._in_a_row = 0
        if value is not None and not math.isfinite(value):
            self._warn("loss", f"the loss is {value} at step {t}")
        if skipped:
            return
        if stats is not None:
            self._look_at(stats, t)
        if t == 1 or t % self.every == 0:
            self._record(self._row(opt, t, value, stats))

    def _look_at(self, stats: Stats, t: int) -> None:
        """Warn of what is not finite."""
        if stats.nan or stats.inf:
            places = [k for k, bad in enumerate(stats.per_tensor.nan + stats.per_tensor.inf) if bad]
            listed = f"{', '.join(map(str, places[:5]))}{', …' if len(places) > 5 else ''}"
            where = f"of tensor{'s' if len(places) > 1 else ''} {listed} (in the order of the parameters, from 0)"
            self._warn("gradients", f"the gradients {where} have {stats.nan} NaN and {stats.inf} infinity at step {t}")
        for name, what in (("param_norm", "parameters"), ("update_norm", "update")):
            norm = getattr(stats, name)
            if not math.isfinite(norm):
                self._warn(what, f"the norm of the {what} is {norm} at step {t}")

    def _row(self, opt: Any, t: int, loss: float | None, stats: Stats | None) -> dict[str, float | int | None]:
        """A row of the log."""
        row: dict[str, float | int | None] = dict.fromkeys(COLUMNS)
        row |= {"step": t, "loss": loss, "lr": learning_rate(opt), "skipped": self.skipped}
        row["seconds"] = round(time.monotonic() - self._start, 3)
        if stats is not None:
            row |= {name: getattr(stats, name) for name in (*NORMS, "max_update_ratio", "nan", "inf")}
            row["ratio"] = ratio = stats.update_norm / stats.param_norm if stats.param_norm else math.nan
            self._compare(ratio, row["lr"], t)
        return row

    def _compare(self, ratio: float, rate: float | None, t: int) -> None:
        """Warn where the update is unusual for the second time."""
        low, high = self.usual
        self._largest_rate = max(self._largest_rate, rate or 0.0)
        brought_down = rate is not None and rate <= BROUGHT_DOWN * self._largest_rate
        unusual = "large" if ratio > high else "small" if ratio < low and not brought_down else ""
        if unusual and unusual == self._unusual:
            advice = "a smaller learning rate may help" if unusual == "large" else "it hardly changes them"
            bound = f"above {high:g}" if unusual == "large" else f"below {low:g}"
            text = f"the update has {ratio:.2g} of the norm of the parameters at step {t}, {bound}: {advice}"
            self._warn(f"{unusual} update", text)
        self._unusual = unusual

    def _record(self, row: dict[str, float | int | None]) -> None:
        """Log, show and keep a row; what cannot be written is no reason to stop training."""
        self._history.add(row)
        if self._journal is not None:
            journal = self._journal
            self._try(lambda: journal.write(row), journal.path)
        if self._display is not None:
            display = self._display
            if not self._try(lambda: display.show(row), self._shown_on):
                self._display = None
                with contextlib.suppress(OSError):
                    display.close()
        if self._plot is not None and time.monotonic() - self._drawn > REDRAW:
            self.draw()

    def draw(self) -> None:
        """Draw the picture as it is now; before the first row there is none."""
        points = self._history.points()
        if self._plot is not None and points:
            plot = self._plot
            self._try(lambda: draw(points, plot), plot)
            self._drawn = time.monotonic()

    def _try(self, write: Callable[[], None], what: str | Path) -> bool:
        """Whether something could be written; where not, warn."""
        try:
            write()
        except OSError as problem:
            self._warn(str(what), f"{what} cannot be written: {problem.strerror or problem}")
            return False
        return True

    def _warn(self, kind: str, text: str) -> None:
        """Warn, once of each kind."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"{text} (said once)", RuntimeWarning, stacklevel=outside())

    def close(self) -> None:
        """Draw the picture, close the log, and leave the table as it is. To close twice does no harm."""
        if not self._closed:
            self._closed = True
            if self._display is not None:
                self._try(self._display.close, self._shown_on)
            if self._journal is not None:
                self._try(self._journal.close, self._journal.path)
            self.draw()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def number(loss: Any) -> float:
    """A loss as a double."""
    try:
        if isinstance(loss, (str, bytes)):
            raise TypeError
        return float(loss)
    except (TypeError, ValueError):
        raise TypeError(f"the loss is a number, not {loss!r}") from None


def learning_rate(opt: Any) -> float | None:
    """The learning rate of the first group, if there is one."""
    try:
        return float(opt.groups[0]["lr"] if hasattr(opt, "groups") else opt.lr)
    except (AttributeError, KeyError):
        return None


def outside() -> int:
    """The stacklevel at which a warning names the caller of this module, and not a line in it."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__") == __name__:
        frame, level = frame.f_back, level + 1
    return level
