"""Rows of numbers appended to a file as they come, as CSV or as JSON lines."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..core.diagnostics import UsageError

Row = Mapping[str, float | int | None]


class Journal:
    """A file to which rows of the same columns are appended, each handed to the system at once.

    A `.csv` has a line of column names first; a number that is missing is empty, and others are nan, inf and -inf. Of a
    `.jsonl` each line is an object; what is missing or not finite is null, since JSON has no word for it.

    Parameters
    ----------
    path : str or Path
        Of a new file, or of one with the same columns, which goes on.
    columns : sequence of str

    Raises
    ------
    UsageError
        The name ends in something else, or the file has other columns.
    OSError
        The file cannot be read or written.
    """

    def __init__(self, path: str | Path, columns: Sequence[str]):
        self.path, self.columns = Path(path), list(columns)
        if self.path.suffix not in (".csv", ".jsonl"):
            raise UsageError(f"a log ends in .csv or .jsonl; {self.path} does not")
        present = self._present()
        if present not in (None, self.columns):
            raise UsageError(
                f"{self.path} has the columns {', '.join(present or [])}; name another log, or move it away"
            )
        self._file = self.path.open("a", encoding="utf-8", newline="")
        if present is None and self.path.suffix == ".csv":
            self._put(comma_separated(self.columns))

    def _present(self) -> list[str] | None:
        """The columns of what is there already; None where nothing is."""
        if not self.path.exists() or self.path.stat().st_size == 0:
            return None
        with self.path.open("r+", encoding="utf-8", errors="replace", newline="") as file:
            first = file.readline().rstrip("\r\n")
            if self.path.suffix == ".csv":
                columns = next(csv.reader([first]), [])
            else:
                try:
                    columns = list(json.loads(first))
                except (ValueError, TypeError):
                    columns = ["(no JSON object)"]
            if columns == self.columns:
                end_last_line(file)
        return columns

    def write(self, row: Row) -> None:
        """Append a row.

        Raises
        ------
        OSError
            It cannot be written.
        """
        values = [row[name] for name in self.columns]
        if self.path.suffix == ".csv":
            self._put(comma_separated(["" if value is None else value for value in values]))
        else:
            known = [value if value is not None and math.isfinite(value) else None for value in values]
            self._put(json.dumps(dict(zip(self.columns, known, strict=True))) + "\n")

    def _put(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def comma_separated(values: Sequence[object]) -> str:
    """A line of CSV."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def end_last_line(file: io.TextIOWrapper) -> None:
    """Give the last line of a file its end, if a crash has kept it from having one."""
    end = file.seek(0, io.SEEK_END)
    file.seek(end - 1)
    if file.read() != "\n":
        file.write("\n")
