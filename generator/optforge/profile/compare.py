"""`--compare`: whether kernels have become slower than in an earlier run, beyond the noise and a threshold.

Rows that both runs have are compared by how many times as long as their limit they take at best (statistics.py says
why). Rows whose cores others needed, in either run, say nothing of a step on several threads, which then wait for each
other, and are left out; on one thread they do. Cold caches are left out too: what memory takes varies too much. Chances
are corrected for the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.diagnostics import UsageError
from . import document
from .statistics import SUPPORT, THRESHOLD, Change, change, significant

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Compared:
    """A row of two runs."""

    label: str
    change: Change
    slower: bool
    faster: bool
    other_rule: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "row": self.label,
            "ratio": finite(self.change.ratio),
            "error": finite(self.change.error),
            "p": self.change.p,
            "slower": self.slower,
            "faster": self.faster,
            "other_rule": self.other_rule,
        }


def finite(value: float) -> float | None:
    """A number for JSON, which has no infinity."""
    return value if math.isfinite(value) else None


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two rows have in common that can be compared."""
    size = row["size"]["name"], row["size"]["elements"]
    return (*size, *(row[name] for name in ("rule", "store", "work", "threads", "isa", "cache")))


def usable(row: Mapping[str, Any]) -> bool:
    """Whether a row can be compared at all."""
    enough = len(row["rounds"]["low"]["kernel"]) >= SUPPORT
    return enough and row["cache"] == "warm" and not (row["contended"] and row["threads"] > 1)


def limit(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The limit that a row of two runs is compared by: the one that bound it, in the first run as in the second."""
    both = "divider" in old["rounds"]["low"] and "divider" in new["rounds"]["low"]
    return "divider" if both and old["divider_ns"] > old["traffic_ns"] else "traffic"


def times(row: Mapping[str, Any], name: str) -> tuple[list[float], list[float]]:
    """Seconds per step of the kernel and of a limit, turn by turn."""
    low = row["rounds"]["low"]
    return low["kernel"], low[name]


def read(path: Path) -> dict[str, Any]:
    """A document from a file that can be compared with.

    Raises
    ------
    UsageError
        It is none, or has not what is compared.
    """
    found = document.read(path)
    try:
        if found["rows"]:
            compare(found, found)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise UsageError(
            f"{path} is no profile as it was written: parts are missing or changed; measure again"
        ) from None
    return found


def compare(old: Document, new: Document, threshold: float = THRESHOLD) -> tuple[list[Compared], list[str]]:
    """The rows that both have and how they changed; and what else is to be said.

    Raises
    ------
    UsageError
        Nothing can be compared.
    """
    before = {key(row): row for row in old["rows"]}
    both = [(before[key(row)], row) for row in new["rows"] if key(row) in before]
    pairs = [(a, b) for a, b in both if usable(a) and usable(b)]
    others = [b for a, b in both if b["cache"] == "warm" and not (usable(a) and usable(b))]
    notes = []
    if not both:
        raise UsageError("the two runs have no row in common: give the same rules, --sizes and --threads")
    if others:
        notes.append(f"{len(others)} of {len(both)} rows were not compared: others used their cores, or turns were few")
    same = all(old["machine"][name] == new["machine"][name] for name in ("processor", "isa"))
    if not same:
        notes.append(
            "the two runs are of different machines: what is compared is how near to its own limits each comes"
        )
    if old["machine"]["compiler"] != new["machine"]["compiler"]:
        notes.append(f"the compilers differ: {old['machine']['compiler']}, and now {new['machine']['compiler']}")
    changes = []
    for a, b in pairs:
        name, places = limit(a, b), min(own["rounds"].get("laps", 2) for own in (a, b))
        changes.append(change(times(a, name), times(b, name), threshold, places, same))
    if same and (far := sum(own.shift > threshold for own in changes)):
        notes.append(
            f"{far} of {len(pairs)} rows say little: their limits take more than {threshold:.0%} longer or shorter "
            "than before, so the machine was in another state; measure again"
        )
    slower = significant([own.p for own in changes])
    faster = significant([own.p_faster for own in changes])
    found = [
        Compared(label(b), own, slow, fast, a["hash"] != b["hash"])
        for (a, b), own, slow, fast in zip(pairs, changes, slower, faster, strict=True)
    ]
    return found, notes


def label(row: Mapping[str, Any]) -> str:
    """How a row is called."""
    threads = f"{row['threads']} thread{'s' * (row['threads'] != 1)}"
    cold = ", cold" * (row["cache"] == "cold")
    return f"{row['rule']} {row['store']} {row['work']} {row['size']['name']}, {threads}, {row['isa']}{cold}"


def text(found: Sequence[Compared], notes: Sequence[str], threshold: float) -> str:
    """What is said on a terminal."""
    lines = [*notes]
    changed = [own for own in found if own.slower or own.faster]
    for own in changed:
        what = "slower" if own.slower else "faster"
        rule = "; the rule is another one" if own.other_rule else ""
        chance = own.change.p if own.slower else own.change.p_faster
        lines.append(
            f"{what}: {own.label}: {own.change.ratio:.2f} times as long for its limit as before "
            f"(chance by noise {chance:.1e}){rule}"
        )
    slow = sum(own.slower for own in found)
    verdict = f"{slow} of {len(found)} rows are slower" if slow else f"none of {len(found)} rows is slower"
    lines.append(f"Compared with the earlier run: {verdict} by more than {threshold:.0%} and the noise")
    return "\n".join(lines)
