"""Colour, where a terminal is that shows it: the text itself is the same without."""

from __future__ import annotations

import os
import re
from typing import TextIO

BOLD, RED, GREEN, YELLOW, CYAN = "1", "1;31", "32", "1;33", "36"

MESSAGE = re.compile(r"(?P<red>\berror:)|(?P<yellow>\bwarning:)", re.ASCII)
DIFF = ((("---", "+++"), BOLD), (("@@",), CYAN), (("-",), "31"), (("+",), GREEN))


def shown(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal with colours; the variables NO_COLOR, FORCE_COLOR and TERM have their say."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    except ValueError:  # it is closed
        return False


def paint(text: str, style: str) -> str:
    """A text in a style."""
    return f"\x1b[{style}m{text}\x1b[0m" if text else text


def message(text: str) -> str:
    """An error or a warning: what it is, the carets under a rule's line, and the hint."""
    lines = []
    for line in text.split("\n"):
        if line.strip() and not line.strip().strip("^"):
            line = paint(line, GREEN)
        elif line.startswith("hint: "):
            line = paint("hint:", CYAN) + line.removeprefix("hint:")
        else:
            line = MESSAGE.sub(lambda found: paint(found[0], RED if found["red"] else YELLOW), line, count=1)
        lines.append(line)
    return "\n".join(lines)


def difference(text: str) -> str:
    """A unified diff."""

    def line(own: str) -> str:
        return next((paint(own, style) for begins, style in DIFF if own.startswith(begins)), own)

    return "\n".join(map(line, text.split("\n")))


def headings(text: str) -> str:
    """A description: its first line up to the colon, and the titles of its blocks."""
    first, newline, rest = text.partition("\n")
    name, colon, about = first.partition(":")
    bold = re.sub(r"^\S[^\n]*:$|^Hash:", lambda found: paint(found[0], BOLD), rest, flags=re.MULTILINE)
    return f"{paint(name, BOLD)}{colon}{about}{newline}{bold}"


def title(text: str) -> str:
    """A heading of a table."""
    return paint(text, BOLD)


def row(text: str) -> str:
    """A row of a table: its first word is what it is about."""
    start, space, rest = text.partition(" ")
    return f"{paint(start, CYAN)}{space}{rest}"
