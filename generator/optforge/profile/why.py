"""One sentence for each row: what binds the kernel, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NEAR = 0.9  # share of a limit from which the limit binds
SMALL = 8192  # elements of a tensor below which the work per tensor shows
WIDE = 0.1  # an interval, as a share of the time, that leaves open what binds
COSTLY = ("exp", "log", "tanh")


def call(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float:
    """Nanoseconds that a call takes before its first element: what a small tensor takes beyond the rate of others."""
    size = row["size"]
    if size["tensors"] > 1 or size["elements"] > SMALL or row["cache"] == "cold":
        return 0.0
    same = ("rule", "store", "work", "threads", "isa", "cache")
    alike = [o for o in rows if all(o[k] == row[k] for k in same) and o["size"]["elements"] > size["elements"]]
    least = min((own["ns"]["value"] for own in alike), default=row["ns"]["value"])
    return float(max(row["ns"]["value"] - least, 0.0) * size["elements"])


def binds(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> str:
    """What binds a row: noise, memory, divider, cold, tensors, call, code, functions, statistics or arithmetic."""
    least = max(row["traffic_ns"], row["divider_ns"])
    width = (row["ns"]["high"] - row["ns"]["low"]) / row["ns"]["value"]
    if row["contended"] and (row["threads"] > 1 or width > WIDE):
        return "noise"
    if least >= NEAR * row["ns"]["value"]:
        return "memory" if row["traffic_ns"] >= row["divider_ns"] else "divider"
    if row["cache"] == "cold":
        return "cold"
    size = row["size"]
    if size["tensors"] > 1 and size["elements"] < SMALL * size["tensors"]:
        return "tensors"
    if call(row, rows) > (1 - NEAR) * row["ns"]["value"] * size["elements"]:
        return "call"
    if any(not code["vectorised"] for code in row["code"]):
        return "code"
    if any(row["operations"].get(name) for name in COSTLY):
        return "functions"
    if row["sums"]:
        return "statistics"
    if row["traffic_ns"] >= row["divider_ns"] and row["size"]["elements"] >= 1 << 20:
        return "memory"
    return "arithmetic"


def why(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> str:
    """The sentence."""
    taken, traffic, divider = row["ns"]["value"], row["traffic_ns"], row["divider_ns"]
    share, bytes = row["share"]["value"], row["bytes"]
    limit = max(traffic, divider)
    operations, size = sum(row["operations"].values()), row["size"]["elements"]
    match binds(row, rows):
        case "noise":
            return (
                "Other processes used the cores that this ran on, so the figures say little: measure again on a quiet "
                "machine, or with --threads 1."
            )
        case "memory":
            which = "all" if share >= 0.97 else f"{share:.0%}"
            where = "Memory" if row["level"] == "memory" else f"The bandwidth of {row['level']}"
            fewer = "as --store with bf16 gives" if row["store"] in ("f32", "f64") else "in a format of fewer bits"
            return (
                f"{where} binds: the {bytes} bytes of an element are moved at {row['gbs']:.1f} GB/s, {which} of what "
                f"the same streams reach without mathematics; only fewer bytes help, {fewer}."
            )
        case "divider":
            divisions, roots = row["operations"].get("div", 0), row["operations"].get("sqrt", 0)
            return (
                f"The divider binds: {counted(divisions, 'division')} and {counted(roots, 'root')} of an element take "
                f"{divider:.2f} of {taken:.2f} ns by themselves; only a rule that divides less is faster in cache."
            )
        case "cold":
            return (
                f"Empty caches bind: {(taken - limit) * size:.0f} ns of {taken * size:.0f} are beyond what the same "
                "streams take out of memory, for code and scalars come from there too, and a core that calculates asks "
                "for less ahead; step right behind the backward pass, which leaves gradients in the caches."
            )
        case "tensors":
            each = (taken - limit) * row["size"]["elements"] / row["size"]["tensors"]
            return (
                f"The tensors are small: {each:.0f} ns for each, beyond what its elements take, go into the work per "
                "tensor; fewer and larger tensors help, such as views of one flat array."
            )
        case "call":
            return (
                f"The call binds: {call(row, rows):.0f} ns of {taken * size:.0f} pass before the first element, with "
                "checks and scalars, whatever the size; step all tensors in one call."
            )
        case "code":
            alone = sorted({name for code in row["code"] for name in code["unvectorised"]})
            return (
                f"The compiler did not make vectors of {', '.join(alone) or 'the loop'}: try another compiler by CC, "
                "gcc 12 or clang 14 at least, or write the rule without what stands in the way."
            )
        case "functions":
            named = " ".join(name for name in COSTLY if row["operations"].get(name))
            return (
                f"Functions of the math library bind ({named}): they are called for one element at a time; a rule "
                "with fewer of them, or more threads, helps."
            )
        case "statistics":
            return (
                f"The sums bind: of {taken:.2f} ns at least {taken - limit:.2f} are neither traffic nor division, but "
                f"{counted(row['sums'], 'total')} in double, in an order that is always the same; {spared(row)}."
            )
    formats = "" if row["store"] in ("f32", "f64") else ", and conversions of formats,"
    return (
        f"Neither memory ({traffic / taken:.0%}) nor divider ({divider / taken:.0%}) binds by itself, but the "
        f"{operations} operations of an element in {row['isa']}{formats} together; wider vectors or more threads help."
    )


def spared(row: Mapping[str, Any]) -> str:
    """What to do about sums."""
    if row["work"] == "phase":
        return "leave statistics and skip_nonfinite out where they are not needed"
    return "more threads help, or a rule with fewer norms"


def counted(number: int, what: str) -> str:
    """A number of things."""
    return f"{number} {what}{'s' * (number != 1)}"
