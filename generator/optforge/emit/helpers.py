"""The small functions that emitted code may need, as text: the language's own operations where C has none."""

from __future__ import annotations

from ..core.dtypes import DType
from ..core.functions import FUNCTIONS

# role: parameters, comment, body lines. Roles that begin with "scalar" note where Python would raise, those that begin
# with "ieee" are the same without.
SCALARS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "scalar div": (
        "double a, double b, int *failed",
        "a / b; failed where Python raises.",
        ("if (b == 0.0)", "    *failed = 1;", "return a / b;"),
    ),
    "scalar mod": (
        "double a, double b, int *failed",
        "a % b with Python's sign.",
        (
            "double r = fmod(a, b);",
            "",
            "if (b == 0.0)",
            "    *failed = 1;",
            "if (r == 0.0)",
            "    return copysign(0.0, b);",
            "if ((r < 0.0) != (b < 0.0))",
            "    r += b;",
            "return r;",
        ),
    ),
    "scalar pow": (
        "double a, double b, int *failed",
        "The library's pow, which no compiler may fold or rewrite; failed where Python raises or turns complex.",
        (
            "volatile double base = a, exponent = b;",
            "const double y = pow(base, exponent);",
            "",
            "if (a - a == 0.0 && b - b == 0.0 && y - y != 0.0) /* x - x is 0 for finite x alone */",
            "    *failed = 1;",
            "return y;",
        ),
    ),
}
WORDS = {"div": "divide", "mod": "modulo", "pow": "power"}


def name(role: str, kind: DType, prefix: str) -> str:
    """What the emitted function is called."""
    sort, _, own = role.rpartition(" ")
    word = WORDS.get(own, own)
    if sort:
        return f"{prefix}_{'' if sort == 'scalar' else 'ieee_'}{word}"
    return f"{prefix}_{word}_{kind.suffix}"


def definition(role: str, kind: DType, prefix: str, inline: str) -> str:
    """The text of the emitted function; `inline` begins the declaration of those that are meant to be inlined."""
    own = name(role, kind, prefix)
    sort, _, word = role.rpartition(" ")
    if sort and f"scalar {word}" in SCALARS:
        parameters, comment, body = SCALARS[f"scalar {word}"]
        if sort == "ieee":
            parameters, comment, body = (
                parameters.removesuffix(", int *failed"),
                comment.partition(";")[0],
                unchecked(body),
            )
        return function(f"static double {own}({parameters})", f"{comment.rstrip('.')}.", body)
    if role == "square":
        return function(f"{inline} {kind.c} {own}({kind.c} x)", "", ("return x * x;",))
    row = FUNCTIONS[word]
    if sort:
        return function(*checked(word, own, sort == "scalar"))
    parameters = ", ".join(f"{kind.c} {parameter}" for parameter in row.parameters)
    lines = row.c.format(real=kind.c, zero=kind.constant(0.0), one=kind.constant(1.0)).split("\n")
    return function(f"{inline} {kind.c} {own}({parameters})", f"{row.doc}.", tuple(lines))


def unchecked(body: tuple[str, ...]) -> tuple[str, ...]:
    """The lines without those that note a failure."""
    kept: list[str] = []
    for line in body:
        if "*failed = 1" in line:
            kept.pop()  # its condition
        else:
            kept.append(line)
    return tuple(kept)


def checked(function_name: str, own: str, failing: bool) -> tuple[str, str, tuple[str, ...]]:
    """A function of <math.h> on a scalar: not folded by compilers, and failed where Python raises, if that is noted."""
    row = FUNCTIONS[function_name]
    raises = row.raises if failing else ""
    body = [f"const double y = {row.c}(x);", ""]
    comment = f"{row.doc}".capitalize()
    if row.folds:
        body = ["volatile double argument = x;", f"const double y = {row.c}(argument);", ""]
        comment += ", by the library's own function, which no compiler may fold"
    if raises:
        body += [f"if ({raises})", "    *failed = 1;"]
        comment += "; failed where Python raises"
    return (
        f"static double {own}(double x{', int *failed' if raises else ''})",
        f"{comment}.",
        (*(body if raises else body[:-1]), "return y;"),
    )


def function(head: str, comment: str, body: tuple[str, ...]) -> str:
    """The pieces put together."""
    lines = [f"/* {comment} */"] if comment else []
    lines += [f"{head} {{", *(f"    {line}".rstrip() for line in body), "}"]
    return "\n".join(lines)
