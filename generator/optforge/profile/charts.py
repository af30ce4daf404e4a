"""The charts of a profile, with matplotlib: time over size with the limits, bars against others, the roofline."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..train.pictures import COLOURS, new_figure, save, tidy
from .models import count, short

Rows = Sequence[Mapping[str, Any]]
AGAINST = "Against others"
APART = 0.22  # how much points of a roofline must differ, as a logarithm, for both to be named
WIDE, NARROW = (6.2, 4.1), (3.9, 3.8)  # inches
KERNEL, PHASE, TRAFFIC, DIVIDER, OTHER = COLOURS[0], COLOURS[2], "0.45", COLOURS[1], "0.72"


def usual(rows: Rows) -> list[Mapping[str, Any]]:
    """Rows with warm caches, in the instruction set that most have."""
    sets = [row["isa"] for row in rows]
    best = max(set(sets), key=sets.count) if sets else ""
    return [row for row in rows if row["cache"] == "warm" and row["isa"] == best]


def over_size(axes: Any, rows: Rows) -> None:
    """Nanoseconds per element over the size of one tensor, with the limits as lines."""
    alone = [row for row in usual(rows) if row["size"]["tensors"] == 1]
    most = max((row["threads"] for row in alone), default=1)
    for work, colour in (("step", KERNEL), ("phase", PHASE)):
        own = sorted((row for row in alone if row["work"] == work), key=lambda row: row["size"]["elements"])
        for threads in sorted({row["threads"] for row in own}):
            some = [row for row in own if row["threads"] == threads]
            x = [row["size"]["elements"] for row in some]
            y = [row["ns"]["value"] for row in some]
            errors = [
                [row["ns"]["value"] - row["ns"]["low"] for row in some],
                [row["ns"]["high"] - row["ns"]["value"] for row in some],
            ]
            filled = "full" if threads == 1 or most == 1 else "none"
            named = f"{work}, {threads} thread{'s' * (threads > 1)}"
            axes.errorbar(x, y, errors, color=colour, marker="o", fillstyle=filled, capsize=2, label=named)
            if work == "step":
                limits = [row["traffic_ns"] for row in some]
                label = "traffic alone" if threads == min(row["threads"] for row in own) else None
                axes.plot(x, limits, "--", color=TRAFFIC, marker=".", label=label)
                if any(row["divider_ns"] for row in some):
                    named_too = "divider alone" if label else None
                    axes.plot(x, [row["divider_ns"] for row in some], ":", color=DIVIDER, label=named_too)
    if alone:
        axes.set_xscale("log", base=2)
        ticks = sorted({row["size"]["elements"] for row in alone})
        axes.set_xticks(ticks, [short(n) for n in ticks])
        axes.minorticks_off()
        # What noise stretched is not to press the rest together.
        sure = [row["ns"]["high"] for row in alone if row["binds"] != "noise"]
        sure += [row["ns"]["value"] for row in alone if row["threads"] == 1]
        axes.set_ylim(0, 1.1 * max(sure or [row["ns"]["low"] for row in alone]))
        legend(axes)
    else:
        nothing(axes, "no single tensor was measured")
    axes.set_xlabel("elements of one tensor")
    axes.set_ylabel("ns per element")


def against(axes: Any, rows: Rows) -> None:
    """Bars: how many times as long as optforge others take."""
    shown = [row for row in rows if row["gradients"] == "new"] or list(rows)
    works = len({row["work"] for row in shown}) > 1
    bars = [(row["size"]["name"], row["size"]["elements"], r) for row in shown for r in row["results"]]
    if not bars:
        nothing(axes, "nothing else was measured")
        return
    names = list(dict.fromkeys(result["name"] for *_, result in bars))
    # One after another from the top, with a gap between models.
    place, ticks = 0.0, []
    for row in shown:
        first = place
        for result in row["results"]:
            ratio = result["ratio"]
            colour = COLOURS[names.index(result["name"]) % len(COLOURS)]
            label = (
                result["name"]
                if not any(result["name"] == text for text in axes.get_legend_handles_labels()[1])
                else None
            )
            errors = [[ratio["value"] - ratio["low"]], [ratio["high"] - ratio["value"]]]
            axes.barh(place, ratio["value"], 0.85, color=colour, label=label, xerr=errors, ecolor="0.3", capsize=2)
            axes.annotate(f" {times(ratio['value'])}", (ratio["high"], place), va="center", fontsize=8.5)
            place += 1
        named = f"{row['work']} " * works + row["size"]["name"]
        ticks.append(((first + place - 1) / 2, f"{named}\n({count(row['size']['elements'])})"))
        place += 0.7
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    largest = max(result["ratio"]["high"] for *_, result in bars)
    axes.set_xlim(min(0.5, 0.8 * min(result["ratio"]["low"] for *_, result in bars)), 2.5 * max(largest, 1))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,g}×")
    axes.set_yticks([y for y, _ in ticks], [text for _, text in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time of others by that of optforge")
    legend(axes)


def legend(axes: Any) -> None:
    """What is what, above the chart."""
    how = {"frameon": False, "ncols": 2, "borderaxespad": 0, "columnspacing": 1.2, "handlelength": 1.6}
    axes.legend(fontsize=8.5, loc="lower left", bbox_to_anchor=(0, 1.01), **how)


def times(ratio: float) -> str:
    """A ratio with two digits, or more where it has them."""
    return f"{ratio:,.0f}×" if ratio >= 100 else f"{ratio:.2g}×" if ratio >= 10 else f"{ratio:.2f}×"


def roofline(axes: Any, rows: Rows, bandwidth: Rows) -> None:
    """Operations per second over operations per byte, under the roofs of each level of cache and of the divider."""
    own = usual(rows)
    threads = min((row["threads"] for row in own), default=1)
    own = [row for row in own if row["threads"] == threads and sum(row["operations"].values())]
    if not own:
        nothing(axes, "the rule computes nothing")
        return
    at = [sum(row["operations"].values()) / row["bytes"] for row in own]
    low, high = min(at) / 3, max(at) * 3
    for k, level in enumerate(row for row in bandwidth if row["threads"] == threads):
        speed = level["triad"] / 1e9
        axes.plot([low, high], [low * speed, high * speed], color=f"{0.3 + 0.14 * k:.2f}", linewidth=1)
        axes.annotate(level["level"], (low, low * speed), fontsize=8.5, va="bottom")
    for work, marker, colour in (("step", "o", KERNEL), ("phase", "s", PHASE)):
        some = [row for row in own if row["work"] == work]
        label: str | None = work
        named: list[float] = []  # whose names would not stand on others
        for row in (row for row in some if row["binds"] != "noise"):
            operations = sum(row["operations"].values())
            x, y = operations / row["bytes"], operations / row["ns"]["value"]
            axes.plot([x], [y], marker, color=colour, label=label)
            label = None
            if all(abs(math.log(y / other)) > APART for other in named):
                axes.annotate(f"  {row['size']['name']}", (x, y), fontsize=8.5, va="center")
                named.append(y)
        if some and some[0]["divider_ns"]:
            operations = sum(some[0]["operations"].values())
            roof = operations / some[0]["divider_ns"]
            name = f"the divider ({work})"
            axes.plot([low, high], [roof, roof], ":", color=colour, linewidth=1.2, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xticks([x for k in range(-3, 4) for x in (10.0**k, 2 * 10.0**k, 5 * 10.0**k) if low <= x <= high])
    axes.xaxis.set_minor_formatter(lambda x, _: "")
    axes.set_xlabel("operations per byte")
    axes.set_ylabel(f"10⁹ operations per second, {threads} thread{'s' * (threads > 1)}")
    legend(axes)


def nothing(axes: Any, why: str) -> None:
    """An empty chart that says why."""
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color="0.4")


def height(document: Mapping[str, Any], rule: str, title: str, usual: float) -> float:
    """Inches of a chart: bars need room."""
    if title != AGAINST:
        return usual
    rows = [row for row in document["peers"] if row["rule"] == rule and row["gradients"] == "new"]
    return max(usual, 1.3 + 0.19 * sum(len(row["results"]) + 0.7 for row in rows))


def of_rule(document: Mapping[str, Any], rule: str, store: str) -> list[tuple[str, Callable[[Any], None]]]:
    """The charts of a rule with one way to store its arrays: title, and what draws it."""
    rows = [row for row in document["rows"] if (row["rule"], row["store"]) == (rule, store)]
    others = [row for row in document["peers"] if row["rule"] == rule] if store == "f32" else []
    found: list[tuple[str, Callable[[Any], None]]] = [
        ("Time per element, and the limits", lambda axes: over_size(axes, rows)),
        ("Roofline", lambda axes: roofline(axes, rows, document["bandwidth"])),
    ]
    if others:
        found.insert(1, (AGAINST, lambda axes: against(axes, others)))
    return found


def svg(draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    """A chart as SVG, for a page: its letters are text."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "optforge", "font.size": 10}):
        figure = new_figure(*size)
        axes = figure.add_subplot()
        tidy(axes)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # The page gives it its width.
    return re.sub(r' (?:height|width)="[\d.]+pt"', "", text, count=2)


def png(document: Mapping[str, Any], path: Path) -> None:
    """All charts as one picture, a row for each rule and storage."""
    kinds = list(dict.fromkeys((row["rule"], row["store"]) for row in document["rows"]))
    every = [of_rule(document, *kind) for kind in kinds]
    columns = max(map(len, every))
    figure = new_figure(5.6 * columns, 5.2 * len(every))
    for k, ((rule, store), own) in enumerate(zip(kinds, every, strict=True)):
        for j, (title, draw) in enumerate(own):
            axes = figure.add_subplot(len(every), columns, k * columns + j + 1)
            tidy(axes)
            draw(axes)
            axes.set_title(f"{rule}, {store}: {title[0].lower()}{title[1:]}", fontsize=10, loc="left", pad=48)
    machine = document["machine"]
    noisy = any(row["contended"] for row in document["rows"])
    said = f"{machine['processor']}, {machine['cores']} cores, {machine['isa']}"
    figure.suptitle(said + ("; other processes used its cores" if noisy else ""), fontsize=9, color="0.35")
    save(figure, path)
