"""What a monitor shows while training goes: a live table on a terminal, a line for each row elsewhere."""

from __future__ import annotations

import atexit
import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.table import Table

ROWS = 12  # that the table shows; older ones are in the log
REDRAW = 0.5  # seconds from table to table at least: one takes several milliseconds
GAP = 3  # characters between columns
HEADINGS = {
    "step": "step",
    "loss": "loss",
    "lr": "lr",
    "grad_norm": "|grad|",
    "clipped_grad_norm": "|clipped|",
    "param_norm": "|param|",
    "update_norm": "|update|",
    "ratio": "ratio",
    "nan": "NaN",
    "inf": "inf",
    "skipped": "skipped",
    "seconds": "seconds",
}
LEAST = ("seconds", "|clipped|", "lr")  # headings of what goes first on a narrow terminal


class Display:
    """Shows rows on a console, until it is closed.

    Where the console cannot be written any more, showing and closing raise an OSError.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        self._rows: deque[list[str]] = deque(maxlen=ROWS)
        self._live: Live | None = None
        self._drawn = -REDRAW

    def show(self, row: Mapping[str, float | int | None]) -> None:
        """Show one more row."""
        with plain_errors():
            self._show(row)

    def _show(self, row: Mapping[str, float | int | None]) -> None:
        same = row["clipped_grad_norm"] == row["grad_norm"]  # nothing was clipped
        texts = ["" if name == "clipped_grad_norm" and same else short(name, row[name]) for name in HEADINGS]
        if not self.console.is_terminal:
            pairs = zip(HEADINGS.values(), texts, strict=True)
            line = "  ".join(f"{heading} {text}" for heading, text in pairs if text)
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
            return
        self._rows.append(texts)
        if self._live is None:
            # No thread of its own: it is drawn when there is something new.
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
            atexit.register(self.close)  # a terminal whose cursor is hidden is no present
        if time.monotonic() - self._drawn >= REDRAW:
            self._redraw(self._live)

    def _table(self) -> Table:
        """The last rows; columns that would be empty, or would make it too wide, are left out."""
        table = Table(box=SIMPLE, padding=(0, 1), pad_edge=False)
        widths = {}
        for heading, *texts in zip(HEADINGS.values(), *self._rows, strict=True):
            if any(texts):
                widths[heading] = max(map(len, (heading, *texts))) + GAP
        for heading in LEAST:
            if sum(widths.values()) > self.console.width:
                widths.pop(heading, None)
        for heading in widths:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self._rows:
            table.add_row(*(text for heading, text in zip(HEADINGS.values(), row, strict=True) if heading in widths))
        return table

    def _redraw(self, live: Live) -> None:
        live.update(self._table(), refresh=True)
        self._drawn = time.monotonic()

    def close(self) -> None:
        """Leave the table as it is, and give the terminal back."""
        if self._live is not None:
            live, self._live = self._live, None
            atexit.unregister(self.close)
            with plain_errors():
                try:
                    self._redraw(live)
                finally:
                    live.stop()


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """A pipe that nobody reads any more is an error like others: rich ends the process."""
    try:
        yield
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):
            raise end.__context__ from None
        raise


def short(name: str, value: float | int | None) -> str:
    """A number in a few characters; nothing where there is none, and where a count is 0."""
    if value is None or (name in ("nan", "inf", "skipped") and not value):
        return ""
    if name == "seconds":
        return f"{value:.1f}"
    if isinstance(value, int):
        return str(value)
    mantissa, e, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa
