"""The report as one HTML page that needs no other file, made for wide screens and for phones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.atomic import replace_file
from ..emit.text import TEMPLATES
from . import charts, table
from .document import save
from .models import count

Document = Mapping[str, Any]
ENGLISH = {
    "memory": "memory", "divider": "the divider", "tensors": "work per tensor", "call": "the call",
    "code": "code without vectors", "functions": "functions of the math library", "statistics": "sums",
    "arithmetic": "arithmetic", "cold": "empty caches", "noise": "noise",
}  # fmt: skip


def html(document: Document) -> str:
    """The page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rules = {rule["name"]: rule for rule in document["rules"]}
    kinds = list(dict.fromkeys((row["rule"], row["store"]) for row in document["rows"]))
    return environment.get_template("profile/report.html.j2").render(
        document=document,
        title=", ".join(rules),
        quiet=table.quietness(document),
        noisy=any(row["contended"] for row in document["rows"]),
        caches={level: table.count_bytes(size) for level, size in document["machine"]["caches"].items()},
        memory=table.count_bytes(document["machine"]["memory"]),
        sections=[section(document, rules[rule], rule, store) for rule, store in kinds],
        english=ENGLISH,
        count=count,
        digits=table.digits,
        milliseconds=table.milliseconds,
    )


def section(document: Document, about: Mapping[str, Any], rule: str, store: str) -> dict[str, Any]:
    """What the page says of a rule with one way to store its arrays."""
    import markupsafe

    rows = [row for row in document["rows"] if (row["rule"], row["store"]) == (rule, store)]
    drawn = [
        {
            "title": title,
            "tall": title == charts.AGAINST,
            **{
                name: markupsafe.Markup(charts.svg(draw, (width, charts.height(document, rule, title, usual))))
                for name, (width, usual) in (("wide", charts.WIDE), ("narrow", charts.NARROW))
            },
        }
        for title, draw in charts.of_rule(document, rule, store)
    ]
    own = next(own for own in about["stores"] if own["store"] == store)
    return {
        "rule": rule,
        "store": store,
        "about": about,
        "own": own,
        "rows": rows,
        "cards": cards(document, rows, rule if store == "f32" else ""),
        "reasons": reasons(rows),
        "charts": drawn,
        "peers": [row for row in document["peers"] if row["rule"] == rule] if store == "f32" else [],
        "phases": [row for row in rows if row["phases"]],
        "code": code(rows),
        "counted": [row for row in rows if row["counters"]],
    }


def cards(document: Document, rows: Sequence[Mapping[str, Any]], rule: str) -> list[tuple[str, str]]:
    """The figures that stand at the top: a number, and what it is."""
    found = []
    steps = [row for row in charts.usual(rows) if row["work"] == "step" and row["binds"] != "noise"]
    large = max(steps, key=lambda row: (row["size"]["elements"], row["threads"]), default=None)
    small = [row for row in steps if row["binds"] == "divider"]
    if large:
        found.append((percent(large), f"of the limit, {named(large)}"))
    if small:
        found.append((percent(small[0]), f"of what the divider allows, {named(small[0])}"))
    for row in sorted(document["peers"], key=lambda row: -row["size"]["elements"]):
        if row["rule"] == rule and row["gradients"] == "new" and not row["contended"]:
            best = min(row["results"], key=lambda result: result["ratio"]["value"])
            what = f"as fast as {best['name']}, the fastest other: {row['work']}, {row['size']['name']}"
            found.append((charts.times(best["ratio"]["value"]), what))
    return found[:4]


def percent(row: Mapping[str, Any]) -> str:
    """The share of the limit."""
    return f"{100 * min(row['share']['value'], 9.99):.0f} %"


def named(row: Mapping[str, Any]) -> str:
    """A row's size and threads."""
    threads = f"{row['threads']} thread{'s' * (row['threads'] != 1)}"
    return f"{row['size']['name']} ({count(row['size']['elements'])} elements), {threads}"


def reasons(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What binds, most frequent first: where, and the sentence."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row["binds"], []).append(row)
    return [
        {
            "binds": ENGLISH[binds],
            "where": ", ".join(dict.fromkeys(table.place(row, rows) for row in own)),
            "why": own[0]["why"],
        }
        for binds, own in sorted(grouped.items(), key=lambda item: -len(item[1]))
    ]


def code(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The machine code of each pass in each instruction set."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        for k, own in enumerate(row["code"]):
            found.setdefault(f"{row['isa']}, pass {k + 1}", {"name": f"{row['isa']}, pass {k + 1}", **own})
    return [*found.values()]


def write(document: Document, path: Path) -> None:
    """Write the page, complete or not at all."""
    text = html(document)
    replace_file(path, lambda new: save(new, text))
