"""What goes wrong, and how it is said: diagnostics that point into a rule's text, and the exceptions of the package."""

from __future__ import annotations

import ast
import itertools
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .bounds import CANDIDATES, COMPARED_LENGTH, ERRORS

LONGEST_LINE = 240  # characters of a source line that a diagnostic shows


class OptforgeError(Exception):
    """Base of the package's own errors; `exit_code` is what the command line ends with."""

    exit_code = 2


class RuleError(OptforgeError, ValueError):
    """A rule's text was refused.

    Attributes
    ----------
    diagnostics : tuple of Diagnostic
        Every error found in the rule, in the order of the text.
    """

    def __init__(self, diagnostics: Iterable[Diagnostic]):
        self.diagnostics = tuple(diagnostics)
        super().__init__("\n".join(str(diagnostic) for diagnostic in self.diagnostics))


class UsageError(OptforgeError, ValueError):
    """The user asked for something that does not exist or does not fit."""


class EnvironmentProblem(OptforgeError, RuntimeError):
    """The machine lacks something: a compiler, disk space, an optional package."""

    exit_code = 3


class ScalarError(OptforgeError, ArithmeticError, ValueError):
    """A scalar of a rule has no value where Python would raise: x/0, overflow, the root of a negative number.

    Raised before the first write of a step.
    """


class InterruptedStep(OptforgeError, RuntimeError):
    """A step, or a load, was interrupted where a part of it had been written; loading a checkpoint ends that."""


class PerformanceWarning(RuntimeWarning):
    """Something works, and could be much faster."""


@dataclass(frozen=True)
class Text:
    """The text of a file that holds rules: its name for messages, and its lines without their ends."""

    file: str
    lines: tuple[str, ...]

    def at(self, line: int) -> str:
        """The line with this 1-based number, empty beyond the end."""
        return self.lines[line - 1] if 1 <= line <= len(self.lines) else ""

    def column(self, line: int, utf8_offset: int) -> int:
        """The 1-based column in characters of an offset in UTF-8 bytes, which is what `ast` gives."""
        source = self.at(line)
        if source.isascii():
            return min(utf8_offset, len(source)) + 1
        # A character has a byte at least.
        return len(source[:utf8_offset].encode(errors="replace")[:utf8_offset].decode(errors="replace")) + 1


@dataclass(frozen=True, order=True)
class Diagnostic:
    """One error at one place of a rule's text: line and column from 1, `end` the column behind it."""

    line: int
    column: int
    message: str
    hint: str = ""
    end: int = 0
    text: Text = Text("<unknown>", ())

    def __str__(self) -> str:
        shown = [f"{printable(self.text.file)}:{self.line}:{self.column}: error: {self.message}"]
        source = self.text.at(self.line)
        if source.strip():
            before, marked = source[: self.column - 1], source[self.column - 1 : max(self.end - 1, self.column)]
            behind = source[self.column - 1 + len(marked) :]
            if len(source) > LONGEST_LINE:  # show what stands around the place
                third = LONGEST_LINE // 3
                before = before if len(before) <= third else "…" + before[-third:]
                marked = marked[:third]
                behind = behind if len(behind) <= third else behind[:third] + "…"
            margin = "".join("\t" if c == "\t" else " " * _width(c) for c in before)
            shown += [printable(before + marked + behind), margin + "^" * max(1, sum(map(_width, marked)))]
        if self.hint:
            shown.append(f"hint: {self.hint}")
        return "\n".join(shown)


class Reporter:
    """Collects the diagnostics of one rule, as many as anybody reads."""

    def __init__(self, text: Text):
        self.text = text
        self.diagnostics: dict[tuple[int, int, str], Diagnostic] = {}

    @property
    def full(self) -> bool:
        """Whether there are so many that no more is recorded."""
        return len(self.diagnostics) >= ERRORS

    def error(self, node: ast.AST, message: str, hint: str = "") -> None:
        """Record an error at a node; the same one twice counts once."""
        if self.full:
            return
        line: int = getattr(node, "lineno", 1)
        column = self.text.column(line, getattr(node, "col_offset", 0))
        end = 0
        if getattr(node, "end_lineno", None) == line:
            end = self.text.column(line, getattr(node, "end_col_offset", 0))
        diagnostic = Diagnostic(line, column, printable(message), hint, end, self.text)
        self.diagnostics.setdefault((line, column, message), diagnostic)

    def check(self) -> None:
        """Raise RuleError if anything was recorded."""
        if self.diagnostics:
            found = sorted(self.diagnostics.values(), key=lambda d: (d.line, d.column))
            if self.full:
                hint = f"there may be more errors behind these {ERRORS}"
                found[-1] = replace(found[-1], hint="\n".join(filter(None, [found[-1].hint, hint])))
            raise RuleError(found)


def _width(character: str) -> int:
    """Columns that a terminal gives to a character (as `printable` shows it)."""
    if unicodedata.combining(character):
        return 0
    if not character.isprintable():
        return len(printable(character))
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def printable(text: str) -> str:
    r"""The text with every control, bidirectional or otherwise invisible character written as \xNN or \uNNNN."""
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)


def nearest(name: str, names: Iterable[str]) -> str:
    """A closing "; did you mean …?" where one of the names is close, else empty."""
    import difflib

    if len(name) > COMPARED_LENGTH:
        return ""
    likely = list(itertools.islice((own for own in names if 1 < len(own) <= COMPARED_LENGTH), CANDIDATES))
    same = [own for own in likely if own.lower() == name.lower()]  # adamW is adamw, and not adam
    close = same or difflib.get_close_matches(name, likely, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
