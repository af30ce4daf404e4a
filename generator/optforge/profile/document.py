"""The document of a profile: one dict with a versioned schema, which tables, pictures and comparisons are made of.

Times are in nanoseconds per element of the parameters, those of `rounds` in seconds per step, bandwidths in bytes per
second. In a later version of the schema keys may be added under the same number; what is taken away or changes its
meaning gets another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.atomic import replace_file
from ..core.diagnostics import UsageError
from ..core.reading import read_regular

SCHEMA, VERSION = "optforge-profile", 1
MOST_BYTES = 1 << 28

# What each part must have, for those who read it.
PARTS: dict[str, type] = {
    "machine": dict, "settings": dict, "bandwidth": list, "rules": list, "rows": list, "peers": list, "notes": list,
}  # fmt: skip
ROW: dict[str, type | tuple[type, ...]] = {
    "rule": str, "hash": str, "store": str, "work": str, "size": dict, "threads": int, "isa": str, "cache": str,
    "level": str, "bytes": (int, float), "sums": int, "operations": dict, "ns": dict, "traffic_ns": (int, float),
    "divider_ns": (int, float), "share": dict, "gbs": (int, float), "contended": bool, "binds": str, "why": str,
    "phases": list, "code": list, "counters": dict, "rounds": dict,
}  # fmt: skip


def write(document: Mapping[str, Any], path: Path) -> None:
    """Write a document, complete or not at all."""
    text = as_text(document)
    replace_file(path, lambda new: save(new, text))


def save(path: Path, text: str) -> None:
    """Write a file."""
    path.write_text(text, encoding="utf-8")


def as_text(document: Mapping[str, Any]) -> str:
    """A document as JSON."""
    return json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def read(path: Path) -> dict[str, Any]:
    """A document from a file.

    Raises
    ------
    UsageError
        It is none, or of another version.
    """
    try:
        found = json.loads(read_regular(path, MOST_BYTES))
    except OSError as problem:
        raise UsageError(f"{path}: {problem.strerror or problem}") from None
    except ValueError:
        raise UsageError(f"{path} is no JSON; a profile is written by optforge profile … --json FILE") from None
    check(found, str(path))
    return dict(found)


def check(document: Any, where: str = "the document") -> None:
    """Raise UsageError where something is no document of this version."""
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise UsageError(f"{where} is no profile; one is written by optforge profile … --json FILE")
    if document.get("version") != VERSION:
        raise UsageError(
            f"{where} has version {document.get('version')!r} of the schema, and this optforge reads {VERSION}: "
            "measure again"
        )
    for name, kind in PARTS.items():
        if not isinstance(document.get(name), kind):
            raise UsageError(f"{where}: {name} is missing or is no {kind.__name__}")
    for k, row in enumerate(document["rows"]):
        for name, kinds in ROW.items():
            if not isinstance(row, dict) or not isinstance(row.get(name), kinds):
                raise UsageError(f"{where}: rows[{k}] lacks {name}, or has it as something else")
