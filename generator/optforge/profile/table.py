"""The tables of a profile on a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .models import count

Document = Mapping[str, Any]


def text(document: Document) -> str:
    """All tables as text."""
    parts = [heading(document), *document["notes"], bandwidth(document["bandwidth"])]
    for rule, rows in by_rule(document["rows"]):
        parts.append(kernels(rule, rows))
        parts.append(reasons(rows))
    if document["peers"]:
        parts.append(peers(document["peers"]))
    if "compared" in document:
        parts.append(document["compared"]["text"])
    return "\n\n".join(part for part in parts if part)


def by_rule(rows: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, list[Mapping[str, Any]]]]:
    """Rows of each rule and storage, with a title."""
    for (rule, store), own in itertools.groupby(rows, key=lambda row: (row["rule"], row["store"])):
        yield f"{rule}, {store}", list(own)


def heading(document: Document) -> str:
    """The machine, and whether it was quiet."""
    machine = document["machine"]
    caches = ", ".join(f"{level} {count_bytes(size)}" for level, size in machine["caches"].items())
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['isa']}; {caches}; {machine['compiler']}",
        f"optforge {machine['versions']['optforge']}, measured in {document['settings']['took']:.0f} s; "
        + quietness(document),
    ]
    return "\n".join(lines)


def quietness(document: Document) -> str:
    """What else the machine did."""
    busy, contended = document["machine"]["busy"], sum(row["contended"] for row in document["rows"])
    said = f"other processes kept {busy:.2f} cores busy"
    if not contended:
        return said
    return f"{said}: too much for {contended} of {len(document['rows'])} rows, which are marked ~ and say little"


def count_bytes(size: float) -> str:
    """Bytes with a unit."""
    for unit, one in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= one:
            return f"{size / one:.3g} {unit}"
    return f"{size:.0f} B"


def bandwidth(rows: Sequence[Mapping[str, Any]]) -> str:
    """Bytes per second of each level of cache."""
    lines = ["Bandwidth of this machine, GB/s"]
    cells = [("level", "threads", "read", "copy", "triad")]
    cells += [
        (
            row["level"],
            str(row["threads"]),
            *(f"{row[kind] / 1e9:.1f}" if row[kind] else "-" for kind in ("read", "copy", "triad")),
        )
        for row in rows
    ]
    return "\n".join([*lines, *aligned(cells, 1)])


def kernels(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """How far each row of a rule is from its limits."""
    cells = [("work", "size", "thr", "", "ns/elem", "± %", "traffic", "divider", "of limit", "GB/s", "binds")]
    for row in rows:
        ns, size = row["ns"], row["size"]
        elements = count(size["elements"])
        named = size["name"] if size["name"] == elements.replace(" ", "") else f"{size['name']} ({elements})"
        width = (ns["high"] - ns["low"]) / 2 / ns["value"]
        kind = " ".join(filter(None, [row["cache"] * (row["cache"] == "cold"), row["isa"] * different(row, rows)]))
        cells.append((
            row["work"], named, str(row["threads"]), kind, f"{digits(ns['value'])}{'~' if row['contended'] else ''}",
            f"{100 * width:.1f}", digits(row["traffic_ns"]), digits(row["divider_ns"]) if row["divider_ns"] else "-",
            f"{100 * row['share']['value']:.0f} %", f"{row['gbs']:.1f}", row["binds"],
        ))  # fmt: skip
    bytes = ", ".join(f"{work} {own['bytes']:g}" for work, own in {row["work"]: row for row in rows}.items())
    return "\n".join([f"{title}: {bytes} bytes per element", *aligned(cells, 4)])


def different(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a row is of another instruction set than most."""
    sets = [own["isa"] for own in rows]
    return bool(row["isa"] != max(set(sets), key=sets.count))


def place(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """A row's work and size, and what tells it from others of both."""
    alike = [own for own in rows if (own["work"], own["size"]["name"]) == (row["work"], row["size"]["name"])]
    threads = f"{row['threads']} thread{'s' * (row['threads'] != 1)}" * (len({own["threads"] for own in alike}) > 1)
    told = filter(None, [threads, "cold" * (row["cache"] == "cold"), row["isa"] * different(row, rows)])
    return " ".join([row["work"], row["size"]["name"], *told])


def reasons(rows: Sequence[Mapping[str, Any]]) -> str:
    """What binds, and what to do: each sentence once, with the rows that it is about."""
    lines = []
    for binds, own in itertools.groupby(sorted(rows, key=lambda row: row["binds"]), key=lambda row: row["binds"]):
        listed = list(own)
        places = ", ".join(dict.fromkeys(place(row, rows) for row in listed))
        lines.append(f"{binds} ({places}):\n    {listed[0]['why']}")
    return "\n".join(lines)


def peers(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many times as long as ours others take."""
    cells = [
        ("rule", "work", "size", "thr", "gradients", "against", "theirs ms", "ours ms", "ratio", "interval", "best")
    ]
    for row in rows:
        size = row["size"]
        for result in row["results"]:
            ratio = result["ratio"]
            cells.append((
                row["rule"], row["work"], f"{size['name']} ({count(size['elements'])})", str(row["threads"]),
                row["gradients"], result["name"], milliseconds(result["ms"]), milliseconds(row["ms"]),
                f"{ratio['value']:.2f}{'~' if row['contended'] else ''}",
                f"{ratio['low']:.2f} to {ratio['high']:.2f}", f"{result['best']:.2f}",
            ))  # fmt: skip
    title = "Against others, from Python, in turns: a ratio above 1 is in favour of optforge"
    return "\n".join([title, *aligned(cells, 6)])


def milliseconds(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def digits(value: float) -> str:
    """Nanoseconds per element."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def aligned(cells: Sequence[Sequence[str]], left: int) -> list[str]:
    """Rows in columns, of which so many at the left are aligned to the left."""
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if k < left or (k == len(row) - 1 and not cell[:1].isdigit()) else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
