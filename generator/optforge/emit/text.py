"""Text of emitted files: templates, comments, string literals, long lines."""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.diagnostics import printable

if TYPE_CHECKING:
    import jinja2

WIDTH = 110
PACKAGE = Path(__file__).resolve().parent.parent
# Inside the wheel the templates are beside this module, in a checkout beside generator/.
TEMPLATES = next(where for where in (PACKAGE / "templates", PACKAGE.parent.parent / "templates") if where.is_dir())


@functools.cache
def environment() -> jinja2.Environment:
    """Jinja over the template directory."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def render_template(name: str, context: Mapping[str, Any]) -> str:
    """A template filled in."""
    return environment().get_template(name).render(context)


def comment_text(text: str) -> str:
    """A line of text as it can stand in a C comment."""
    text = printable(text).replace("*/", "* /").replace("/*", "/ *")
    text = re.sub(r"\?(?=\?)", "? ", text)  # no trigraph
    return text[:-1] + "(backslash)" if text.endswith("\\") else text


def comment(lines: Iterable[str]) -> str:
    """A block comment."""
    text = "\n".join(f" * {comment_text(line)}".rstrip() for line in lines)
    return f"/*{text[2:]}\n */" if "\n" in text else f"/*{text[2:]} */"


def wrapped(line: str, under: int | None = None) -> list[str]:
    """A line of prose in pieces that fit into a comment; they begin under its first word, or in column `under`."""
    margin = " " * (len(line) - len(line.lstrip()) if under is None else under)
    if len(line) <= WIDTH - 6:  # what opens and closes the comment
        return [line]
    return textwrap.wrap(line, WIDTH - 6, subsequent_indent=margin, break_long_words=False, break_on_hyphens=False)


def c_string(text: str) -> str:
    """A C string literal of the text in UTF-8."""
    pieces = []
    for byte in text.encode():
        c = chr(byte)
        if c in '"\\?':
            pieces.append(f"\\{c}")
        elif 32 <= byte < 127:
            pieces.append(c)
        else:
            pieces.append(f"\\{byte:03o}")
    return f'"{"".join(pieces)}"'


def status_lines(prefix: str, statuses: Sequence[tuple[str, int, str]], unsaid: str = "") -> list[dict[str, str]]:
    """Statuses, each a name, a code and a text, as templates show them; their comments do not begin with `unsaid`."""
    entries = [f"{prefix}_{name} = {code}{',' * (k < len(statuses))}" for k, (name, code, _) in enumerate(statuses, 1)]
    widest = max(map(len, entries))
    return [
        {
            "name": name,
            "literal": c_string(text),
            "line": f"{entry:<{widest}} /* {comment_text(text.removeprefix(unsaid))} */",
        }
        for entry, (name, _, text) in zip(entries, statuses, strict=True)
    ]


def fold(text: str, everywhere: bool = False) -> str:
    """Break lines of code that are too long, never in a literal: calls and heads of functions behind a comma, comments.

    With `everywhere` other lines are broken as well, at another blank where there is no comma.
    """
    return "\n".join(part for line in text.split("\n") for part in fold_line(line, everywhere))


def fold_line(line: str, everywhere: bool) -> list[str]:
    """A line in pieces; those behind the first stand under what is behind its parenthesis, if there is room."""
    code = line.lstrip()
    if len(line) <= WIDTH or line.endswith("\\") or code.startswith(("*", "#")):
        return [line]
    if code.startswith("/*"):
        return wrapped_comment(line) if code.find("*/") == len(code) - 2 else [line]
    if not everywhere and ("(" not in line or code.startswith(("return", "const "))):
        return [line]
    margin = " " * (line.find("(") + 1)
    if code.startswith("const ") or not 0 < len(margin) <= WIDTH // 2:  # a long name leaves no room behind it
        margin = " " * (len(line) - len(code) + 8)
    pieces, rest = [], line
    while len(rest) > WIDTH:
        blanks = [k for k in breaks(rest) if len(margin) < k <= WIDTH]
        commas = [k for k in blanks if rest[k - 1] == ","]
        if not (commas or (everywhere and blanks)):
            break
        place = max(commas or blanks)
        pieces.append(rest[:place])
        rest = margin + rest[place + 1 :]
    return [*pieces, rest]


def wrapped_comment(line: str) -> list[str]:
    """A comment of one line in pieces."""
    margin = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(line, WIDTH, subsequent_indent=f"{margin} * ", break_long_words=False, break_on_hyphens=False)


LITERAL = re.compile(r'"(?:[^"\\]|\\.)*"|/\*.*?\*/')


def breaks(line: str) -> list[int]:
    """Where blanks are at which a line may be broken: outside of literals and comments."""
    closed = LITERAL.sub(lambda match: "x" * len(match[0]), line)
    return [k for k, c in enumerate(closed) if c == " " and closed[:k].strip()]
