"""Text of emitted files: templates, comments, string literals, long lines."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .diagnostics import printable

if TYPE_CHECKING:
    import jinja2

WIDTH = 110
HERE = Path(__file__).resolve().parent
# Inside the wheel the templates are beside this module, in a checkout beside generator/.
TEMPLATES = HERE / "templates" if (HERE / "templates").is_dir() else HERE.parent.parent / "templates"


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


def fold(text: str) -> str:
    """Break function heads and calls that are too long behind a comma, going on under the parenthesis if it fits."""
    return "\n".join(part for line in text.split("\n") for part in fold_line(line))


def fold_line(line: str) -> list[str]:
    """A line in pieces."""
    if (
        len(line) <= WIDTH
        or "(" not in line
        or line.endswith("\\")
        or line.lstrip().startswith(("*", "/*", "#", "return", "const "))
    ):
        return [line]
    margin = " " * (line.index("(") + 1)
    if len(margin) > WIDTH // 2:  # a long name leaves no room behind it
        margin = " " * (len(line) - len(line.lstrip()) + 8)
    pieces, current = [], ""
    for argument in line.split(", "):
        if current and len(current) + len(argument) + 2 > WIDTH:
            pieces.append(f"{current},")
            current = margin + argument
        else:
            current = f"{current}, {argument}" if current else argument
    return [*pieces, current]
