"""The pages that people read, README and docs, and the blocks of code in them."""

from __future__ import annotations

import re
from pathlib import Path

from places import ROOT

PAGES = ROOT / "docs"
README = ROOT / "README.md"
WRITTEN = [
    README,
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted(PAGES.glob("*.md")),
]
FENCE = re.compile(r"^```(\w[\w-]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language in a page, in order."""
    return [text for own, text in FENCE.findall(page.read_text("utf-8")) if own == language]


def python_blocks(page: Path) -> list[str]:
    """Its blocks of Python."""
    return blocks(page, "python")


def commands(page: Path) -> list[str]:
    """The lines of its indented blocks that begin with a command, without comments; a line that goes on is one."""
    found = []
    for line in re.sub(r"```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE).splitlines():
        if re.match(r"    (optforge|make|pip|git) ", line):
            found.append(line.partition("  #")[0].strip())
    return found
