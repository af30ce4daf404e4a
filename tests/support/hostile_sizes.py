"""Hostile sizes: rule files that ask for much of one thing, and what a file may do besides.

Each is compiled, or refused with a diagnostic, in bounded time and memory; most exist in several sizes, from what a rule
may have to what no file should get away with. Nothing here is imported or executed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from hostile_rules import IMPORTS, function, usual

SIZES = (40, 400, 4_000, 25_000)
REDUCING = IMPORTS.replace("import rule", "import rule, transform, norm, sum, mean, max_abs, global_norm, global_sum")
TRANSFORM = "@transform\ndef a0(g):\n    g = g * 2\n    return g\n\n"
LAST = "@rule\ndef last(p, g, *, lr=0.1):\n    p = p - lr * g\n    return p\n\n"


@dataclass(frozen=True)
class Sized:
    """A rule file; `name` is what is asked for in it."""

    id: str
    source: bytes = field(repr=False)
    name: str = "hostile"


def sized(
    id: str, make: Callable[[int], str | bytes], sizes: Iterable[int] = SIZES, name: str = "hostile"
) -> list[Sized]:
    """A text in several sizes."""
    made = []
    for n in sizes:
        text = make(n)
        made.append(Sized(f"{id}-{n}", text if isinstance(text, bytes) else text.encode(), name))
    return made


def declared(signature: str, body: str = "p = p - lr * g\nreturn p") -> str:
    """A rule of this signature."""
    return REDUCING + function(body, signature=signature)


def body(text: str, **more: str) -> str:
    """A rule with these statements."""
    return REDUCING + usual(text, **more).removeprefix(IMPORTS)


def lines(template: str, n: int) -> str:
    """A line for each number, in which {k} is the number and {j} the one before."""
    return "\n".join(template.format(k=k, j=k - 1) for k in range(1, n + 1))


def listed(template: str, n: int, separator: str = ", ") -> str:
    """A word for each number."""
    return separator.join(template.format(k=k) for k in range(n))


def quoted(name: str, value: str, n: int) -> str:
    """Parameters with this string as their default."""
    return listed(f"{name}{{k}}='{value}'", n)


def indented(n: int, what: str, last: str) -> str:
    """A block in a block."""
    return "".join(f"{' ' * k}{what}\n" for k in range(n)) + " " * n + last


def reducing(n: int, states: int, reduction: str = "norm") -> str:
    """A chain of reductions, each over what the one before has changed, and states that read all of it."""
    names = [f"s{k}" for k in range(states)]
    text = ["x = g"] + [f"x = x * {reduction}(x + {k})" for k in range(n)]
    text += [f"{name} = {name} + x * {k}" for k, name in enumerate(names)] + [
        f"p = p - lr * {'x' if not states else ' - '.join(names)}"
    ]
    return declared(
        f"p, g, {listed('s{k}=0.0', states) + ', ' if states else ''}*, lr=0.1",
        "\n".join([*text, f"return {', '.join(['p', *names])}"]),
    )


def compositions(n: int) -> str:
    """A composition of itself, doubled again and again."""
    return REDUCING + TRANSFORM + LAST + lines("a{k} = a{j} >> a{j}", n) + f"\nhostile = a{n} >> last\n"


MODULE = [
    *sized("doubled", compositions, (3, 4, 5, 6, 16, 30, 64, 400, 4_000)),
    *sized(
        "doubled-calls",
        lambda n: REDUCING + TRANSFORM + LAST + lines("a{k} = a{j}() >> a{j}()", n) + f"\nhostile = a{n} >> last\n",
        (5, 16, 40),
    ),
    *sized(
        "doubled-right",
        lambda n: REDUCING + TRANSFORM + LAST + lines("a{k} = a0 >> a{j} >> a{j}", n) + f"\nhostile = a{n} >> last\n",
        (3, 16, 40),
    ),
    *sized(
        "centralized",
        lambda n: (
            REDUCING + "from optforge import centralize\n" + LAST + "hostile = " + "centralize >> " * n + "last\n"
        ),
        (1, 8, 31, 32, 100, 1_000, 10_000),
    ),
    *sized(
        "composed-long",
        lambda n: REDUCING + TRANSFORM + LAST + "hostile = " + "a0 >> " * n + "last\n",
        (10, 31, 100, 140, 160, 900, 10_000),
    ),
    *sized(
        "composed-right",
        lambda n: REDUCING + TRANSFORM + LAST + "hostile = " + "a0 >> (" * n + "last" + ")" * n + "\n",
        (10, 31, 90, 150, 190, 250),
    ),
    *sized(
        "composed-undone",
        lambda n: (
            REDUCING
            + LAST
            + "\n".join(f"@transform\ndef t{k}(g, *, c{k}=1.0):\n    g = g * c{k}\n    return g\n" for k in range(n))
            + f"hostile = {listed('t{k}', n, ' >> ')} >> last\n"
        ),
        (5, 30, 100, 1_000),
    ),
    *sized(
        "aliases",
        lambda n: REDUCING + LAST + "b0 = last\n" + lines("b{k} = b{j}", n) + f"\nhostile = b{n}\n",
        (20, 74, 140, 1_000, 8_000),
    ),
    *sized(
        "aliases-of-transforms",
        lambda n: REDUCING + TRANSFORM + LAST + lines("a{k} = a{j}", n) + f"\nhostile = a{n} >> last\n",
        (20, 140, 1_000),
    ),
    *sized(
        "aliases-turned",
        lambda n: (
            REDUCING + LAST + "".join(f"b{k} = b{k - 1}\n" for k in range(n, 0, -1)) + f"b0 = last\nhostile = b{n}\n"
        ),
        (20, 1_000),
    ),
    *sized("circle", lambda n: REDUCING + lines("c{k} = c{j}", n) + f"\nc0 = c{n}\nhostile = c0\n", (1, 2, 50, 1_000)),
    *sized(
        "import-aliases",
        lambda n: (
            REDUCING
            + lines("from optforge import sqrt as root{k}", n)
            + "\n"
            + function("p = p - root1(abs(g))\nreturn p", signature="p, g")
        ),
    ),
    *sized(
        "import-names",
        lambda n: (
            REDUCING
            + f"from optforge import {listed('sqrt as r{k}', n)}\n"
            + function("p = p - r1(abs(g))\nreturn p", signature="p, g")
        ),
        (40, 4_000, 12_000),
    ),
    *sized("statements", lambda n: body("a = g") + "x = 1\n" * n),
    *sized("rules", lambda n: REDUCING + LAST * n + LAST.replace("last", "hostile"), (40, 400, 2_000)),
    *sized("rules-of-a-name", lambda n: REDUCING + LAST.replace("last", "hostile") * n, (40, 2_000)),
    *sized("decorators", lambda n: body("a = g").replace("@rule\n", "@rule\n" * n)),
    *sized(
        "decorators-in-parentheses",
        lambda n: body("a = g").replace("@rule\n", f"@{'(' * n}rule{')' * n}\n"),
        (50, 150, 199, 5_000),
    ),
    *sized("decorators-deep", lambda n: body("a = g").replace("@rule\n", f"@{'rule.' * n}rule\n"), (50, 190, 4_000)),
    *sized(
        "ifs-of-the-module",
        lambda n: REDUCING + indented(n, "if True:", "pass") + "\n" + LAST.replace("last", "hostile"),
        (20, 99, 120),
    ),
    *sized(
        "elifs-of-the-module",
        lambda n: REDUCING + "if a:\n    b = 1\n" + "elif a:\n    b = 1\n" * n + LAST.replace("last", "hostile"),
        (40, 190, 900, 2_000),
    ),
    *sized(
        "tries-of-the-module",
        lambda n: REDUCING + "try:\n    b = 1\n" + "except a:\n    b = 1\n" * n + LAST.replace("last", "hostile"),
        (40, 4_000),
    ),
    *sized("targets-of-the-module", lambda n: REDUCING + "b = " * n + "1\n" + LAST.replace("last", "hostile")),
    *sized(
        "settings",
        lambda n: REDUCING + TRANSFORM + LAST + f"hostile = a0({listed('x{k}=1', n)}) >> last\n",
        (1, 300, 10_000),
    ),
    *sized(
        "settings-deep",
        lambda n: (
            REDUCING
            + "from optforge import clip_by_value\n"
            + LAST
            + f"hostile = clip_by_value(max_value={'-' * n}1) >> last\n"
        ),
        (20, 140, 5_000),
    ),
    *sized(
        "missing",
        lambda n: REDUCING + "\n".join(f"@rule\ndef hostil{k}(p, g):\n    return p\n" for k in range(n)),
        (40, 3_000),
    ),
    *sized(
        "classes",
        lambda n: (
            REDUCING
            + "".join(f"{' ' * k}class c:\n" for k in range(n))
            + " " * n
            + "pass\n"
            + LAST.replace("last", "hostile")
        ),
        (20, 95),
    ),
]

SIGNATURES = [
    *sized(
        "states",
        lambda n: declared(
            f"p, g, {listed('s{k}=0.0', n)}, *, lr=0.1",
            "p = p - lr * g\n" + lines("s{k} = s{k} + g", n - 1) + f"\nreturn p, {listed('s{k}', n)}",
        ),
        (40, 99, 100, 101, 400, 10_000),
    ),
    *sized(
        "states-unread",
        lambda n: declared(
            f"p, g, {listed('s{k}=0.0', n)}, *, lr=0.1", f"p = p - lr * g\nreturn p, {listed('s{k}', n)}"
        ),
        (100, 4_000),
    ),
    *sized(
        "scalar-states",
        lambda n: declared(
            f"p, g, {listed('s{k}: scalar = 0.0', n)}, *, lr=0.1",
            "p = p - lr * g\n" + lines("s{k} = s{k} + lr", n - 1) + f"\nreturn p, {listed('s{k}', n)}",
        ),
        (40, 100, 400, 10_000),
    ),
    *sized(
        "states-of-g",
        lambda n: declared(
            f"p, g, {quoted('s', 'g', n)}, *, lr=0.1",
            "p = p - lr * g\n" + lines("s{k} = s{k} + g", n - 1) + f"\nreturn p, {listed('s{k}', n)}",
        ),
        (100, 4_000),
    ),
    *sized(
        "states-wrong",
        lambda n: declared(
            f"p, g, {quoted('s', 'x', n)}, *, {listed('h{k}=0', n)}", f"p = p - g\nreturn p, {listed('s{k}', n)}"
        ),
        (100, 300, 4_000),
    ),
    *sized("states-twice", lambda n: declared(f"p, g, {listed('s=0.0', n)}, *, lr=0.1"), (40, 300, 4_000)),
    *sized(
        "hyperparameters",
        lambda n: declared(
            f"p, g, *, lr=0.1, {listed('h{k}={k}', n)}",
            "p = p - lr * g\n" + lines("p = p - h{j} * g", min(n, 900)) + "\nreturn p",
        ),
        (40, 199, 200, 400, 10_000),
    ),
    *sized("hyperparameters-unused", lambda n: declared(f"p, g, *, lr=0.1, {listed('h{k}={k}', n)}"), (199, 4_000)),
    *sized("hyperparameters-bare", lambda n: declared(f"p, g, *, lr=0.1, {listed('h{k}', n)}"), (199, 300, 4_000)),
    *sized(
        "flags",
        lambda n: declared(
            f"p, g, *, lr=0.1, {listed('o{k}=True', n)}", lines("if o{j}:\n    p = p - lr * g", n) + "\nreturn p"
        ),
        (6, 7, 20, 40, 41, 200, 1_000, 5_000),
    ),
    *sized("flags-unused", lambda n: declared(f"p, g, *, lr=0.1, {listed('o{k}=True', n)}"), (40, 1_000, 10_000)),
    *sized(
        "flags-of-a-long-rule",
        lambda n: declared(
            f"p, g, *, lr=0.1, {listed('o{k}=True', 40)}", lines("p = p - lr * g * {k}", n) + "\nreturn p"
        ),
        (100, 600, 1_500),
    ),
    *sized(
        "strings",
        lambda n: declared(
            "p, g, *, lr=0.1, mode='x'", lines("if mode == 'm{k}':\n    p = p - lr * {k} * g", n) + "\nreturn p"
        ),
        (20, 99, 100, 200, 1_000, 5_000),
    ),
    *sized("strings-unused", lambda n: declared(f"p, g, *, lr=0.1, {quoted('o', 'x', n)}"), (40, 1_000, 10_000)),
    *sized(
        "strings-squared",
        lambda n: declared(
            f"p, g, *, lr=0.1, {quoted('o', 'x', n)}",
            "\n".join(f"if o{k} == 's{j}':\n    p = p - {j} * g" for k in range(n) for j in range(n)) + "\nreturn p",
        ),
        (4, 12, 30),
    ),
    *sized("string-long", lambda n: declared(f"p, g, *, lr=0.1, mode='{'x' * n}'")),
    *sized("default-deep", lambda n: declared(f"p, g, *, lr={'-' * n}1"), (40, 140, 160, 4_000)),
    *sized("default-sum", lambda n: declared(f"p, g, *, lr={'1 + ' * n}1"), (40, 140, 160, 900, 4_000)),
    *sized("default-power", lambda n: declared(f"p, g, *, lr={'1.0 ** ' * n}1"), (40, 140, 900)),
    *sized("default-powers-of-ten", lambda n: declared(f"p, g, *, lr=9 ** 9 ** {'9' * n}"), (1, 15, 400, 4_400)),
    *sized(
        "annotations",
        lambda n: declared(f"p, g, s: {'(' * n}scalar{')' * n} = 0.0, *, lr=0.1", "p = p - lr * g\nreturn p, s"),
        (40, 150, 5_000),
    ),
    *sized(
        "annotation-deep",
        lambda n: declared(f"p, g, s: scalar{'.a' * n} = 0.0, *, lr=0.1", "p = p - lr * g\nreturn p, s"),
        (40, 500, 5_000),
    ),
    *sized("positional-only", lambda n: declared(f"p, g, {listed('s{k}=0.0', n)}, /, *, lr=0.1"), (40, 4_000)),
    *sized("parameters-twice", lambda n: declared(f"p, g, *, {listed('lr=0.1', n)}"), (40, 4_000)),
]

STATEMENTS = [
    *sized(
        "bindings",
        lambda n: body("x0 = g\n" + lines("x{k} = x{j} * beta + g", n) + f"\np = p - x{n}"),
        (400, 1_000, 1_600, 10_000),
    ),
    *sized("bindings-unused", lambda n: body(lines("x{k} = g * {k}", n)), (400, 1_000, 2_000, 15_000)),
    *sized(
        "rebindings", lambda n: body("x = g\n" + "x = x * beta + g\n" * n + "p = p - x"), (400, 1_000, 1_600, 10_000)
    ),
    *sized(
        "rebindings-both",
        lambda n: body("x = g\ny = g\n" + "z = x\nx = y * g\ny = z\n" * n + "p = p - x * y"),
        (100, 500, 900),
    ),
    *sized(
        "rebindings-kept",
        lambda n: body(
            "x = g\n"
            + "\n".join(f"k{k} = x\nx = x * g" for k in range(n))
            + f"\np = p - {listed('k{k}', min(n, 100), ' - ')}"
        ),
        (100, 500, 900),
    ),
    *sized(
        "scalars",
        lambda n: body("x0 = lr\n" + lines("x{k} = x{j} * beta + {k}", n) + f"\np = p - x{n} * g"),
        (400, 1_000, 1_600, 10_000),
    ),
    *sized(
        "scalars-rebound", lambda n: body("x = lr\n" + "x = x * beta + lr\n" * n + "p = p - x * g"), (400, 1_000, 1_600)
    ),
    *sized(
        "scalars-unnamed",
        lambda n: body(lines("p = p - ((lr + {k}.5) * (beta + {k}) * (lr + 1.25) * (beta - {k}.125)) * g", n)),
        (100, 350, 400, 4_000),
    ),
    *sized("divisions", lambda n: body(lines("p = p - (lr / (beta + {k})) * g", n)), (400, 800, 4_000)),
    *sized("asserts", lambda n: body(lines("assert lr < {k} + 1", n)), (40, 99, 100, 101, 3_000, 12_000)),
    *sized("asserts-on-lines", lambda n: body(lines("assert (lr <\n    {k} + 1)", n)), (40, 100, 3_000)),
    *sized("assert-message", lambda n: body(f"assert lr > 0, '{'x' * n}'")),
    *sized("assert-messages", lambda n: body(lines(f"assert lr < 9, '{'é' * 1000}'", n)), (90,)),
    *sized("assert-deep", lambda n: body(f"assert {'not ' * n}lr > 0"), (40, 140, 4_000)),
    *sized("ifs", lambda n: body(indented(n, "if True:", "m = g")), (20, 90, 98, 150)),
    *sized(
        "elifs",
        lambda n: body('if mode == "a":\n    m = g\n' + 'elif mode == "b":\n    m = g * 2\n' * n, extra='mode="a"'),
        (40, 140, 160, 400, 900),
    ),
    *sized("ifs-in-a-row", lambda n: body("if not False:\n    m = m + g\n" * n), (400, 900, 4_000)),
    *sized(
        "if-condition",
        lambda n: body(f"if {' or '.join(['False'] * n)} or True:\n    m = m + g"),
        (40, 140, 160, 4_000),
    ),
    *sized("whiles", lambda n: body(indented(n, "while g:", "m = g")), (20, 95)),
    *sized("functions", lambda n: body(indented(n, "def f():", "return g")), (20, 95)),
    *sized("returns", lambda n: body("return p, m\n" * n), (40, 400, 4_000, 9_000)),
    *sized("returns-in-ifs", lambda n: body("if True:\n    return p, m\n" * n), (40, 900)),
    *sized("semicolons", lambda n: body("m = g; " * n + "m = m"), (40, 400, 1_900, 20_000)),
    *sized("continued", lambda n: body("m = m + \\\n" * n + "g"), (40, 140, 4_000)),
    *sized("targets", lambda n: body("m = " * n + "g"), (2, 400, 25_000)),
    *sized("tuples", lambda n: body(f"{listed('x{k}', n)} = {listed('g', n)}"), (40, 2_000)),
    *sized("augmented", lambda n: body("m += g\n" * n), (40, 1_500, 20_000)),
]

EXPRESSIONS = [
    *sized("parentheses", lambda n: body(f"p = p - {'(' * n}g{')' * n}"), (100, 190, 199, 5_000)),
    *sized("minus", lambda n: body(f"p = p - {'-' * n}g"), (100, 145, 150, 5_000)),
    *sized("minus-scalar", lambda n: body(f"p = p - g * {'-' * n}lr"), (100, 145, 5_000)),
    *sized("plus", lambda n: body(f"p = p - {'+' * n}g"), (1, 145, 5_000)),
    *sized("sum", lambda n: body("p = p - " + " - ".join(["g"] * n)), (100, 145, 160, 900, 25_000)),
    *sized("sum-scalar", lambda n: body("p = p - g * (" + " + ".join(["lr"] * n) + ")"), (100, 140, 900)),
    *sized("sum-right", lambda n: body("p = p - " + "(g + " * n + "g" + ")" * n), (100, 145, 190)),
    *sized("sum-right-scalar", lambda n: body("p = p - g * " + "(lr + " * n + "lr" + ")" * n), (100, 140, 190)),
    *sized("product", lambda n: body("p = " + " * ".join(["lr"] * n) + " * g"), (100, 140, 900, 25_000)),
    *sized("quotient", lambda n: body("p = p - g * (" + " / ".join(["lr"] * n) + ")"), (100, 140, 900)),
    *sized("power", lambda n: body("p = p - g * (" + "**".join(["lr"] * n) + ")"), (100, 140, 900)),
    *sized("squares", lambda n: body("p = p - g * " + "(" * n + "lr" + "**2)" * n), (100, 140, 180)),
    *sized("squares-of-elements", lambda n: body("p = p - " + "(" * n + "g" + "**2)" * n), (100, 140, 180)),
    *sized("remainder", lambda n: body("p = p - g * (" + " % ".join(["lr"] * n) + ")"), (100, 140)),
    *sized("and", lambda n: body(f"p = p - (g if {' and '.join(['lr > 0'] * n)} else m)"), (100, 140, 250, 4_000)),
    *sized("or", lambda n: body(f"p = p - (g if {' or '.join(['lr > 1'] * n)} else m)"), (100, 140, 250, 4_000)),
    *sized(
        "and-or", lambda n: body(f"p = p - (g if {' or '.join(['lr > 1 and lr < 2'] * n)} else m)"), (100, 140, 250)
    ),
    *sized(
        "and-in-or",
        lambda n: body(f"p = p - (g if {'(lr > 1 and (lr > 2 or ' * n}t > 3{'))' * n} else m)"),
        (20, 60, 99),
    ),
    *sized("and-in-assert", lambda n: body(f"assert {' and '.join(['lr > 0'] * n)}"), (100, 140, 250, 4_000)),
    *sized("and-bound", lambda n: body(f"c = {' and '.join(['lr > 0'] * n)}\np = p - (g if c else m)"), (140, 250)),
    *sized(
        "and-of-sums", lambda n: body(f"p = p - (g if {' and '.join(['norm(g) > lr'] * n)} else m)"), (10, 31, 100, 250)
    ),
    *sized("not", lambda n: body(f"p = p - (g if {'not ' * n}lr > 0 else m)"), (100, 140, 900)),
    *sized("compared", lambda n: body(f"p = p - (g if {' < '.join(['lr'] * n)} else m)"), (100, 140, 900, 3_000)),
    *sized(
        "compared-numbers",
        lambda n: body(f"p = p - (g if {' < '.join(map(str, range(n)))} < lr else m)"),
        (100, 140, 3_000),
    ),
    *sized("compared-in-assert", lambda n: body(f"assert {' <= '.join(['lr'] * n)}"), (100, 140, 3_000)),
    *sized("compared-elements", lambda n: body(f"p = where({' < '.join(['g'] * n)}, p, m)"), (2, 100, 3_000)),
    *sized("conditionals", lambda n: body("p = p - g * (" + "lr if lr > 1 else " * n + "lr)"), (60, 100, 140, 900)),
    *sized(
        "conditionals-of-elements", lambda n: body("p = p - (" + "g if lr > 1 else " * n + "m)"), (60, 100, 140, 900)
    ),
    *sized(
        "conditionals-of-sums",
        lambda n: body("p = p - g * (" + "".join(f"lr / norm(g * {k}) if lr > {k} else " for k in range(n)) + "lr)"),
        (5, 16, 31, 100),
    ),
    *sized(
        "conditionals-inside",
        lambda n: body("p = p - g * (" + "lr if (" * n + "lr > 1" + ") else lr" * n + ")"),
        (5, 60, 140),
    ),
    *sized(
        "conditionals-first",
        lambda n: body("p = p - g * " + "(" * n + "lr" + " if lr > 1 else beta)" * n),
        (20, 60, 140),
    ),
    *sized(
        "conditionals-that-raise",
        lambda n: body("p = p - g * (" + "".join(f"1 / (t - {k}) if t > {k} else " for k in range(n)) + "lr)"),
        (20, 60, 140),
    ),
    *sized(
        "conditionals-of-elements-that-raise",
        lambda n: body("p = p - (" + "".join(f"g * (1 / (t - {k})) if t > {k} else " for k in range(n)) + "g)"),
        (20, 60, 140),
    ),
    *sized("where", lambda n: body("p = p - " + "where(g > 0, m, " * n + "g" + ")" * n), (50, 100, 140, 900)),
    *sized("where-first", lambda n: body("p = p - " + "where(g > 0, " * n + "g" + ", m)" * n), (50, 100, 140)),
    *sized(
        "where-both", lambda n: body("p = p - " + "where(where(" * n + "g" + " > 0, 1, 0) > 0, g, m)" * n), (5, 40, 70)
    ),
    *sized(
        "where-in-masks",
        lambda n: body(
            "x0 = g\n"
            + lines("x{k} = where(where(x{j} > 0, x{j}, m) > x{j}, where(x{j} > m, x{j}, g), x{j})", n)
            + f"\np = p - x{n}"
        ),
        (20, 200, 300),
    ),
    *sized("calls", lambda n: body("p = p - " + "sqrt(abs(" * n + "g" + "))" * n), (20, 70, 80, 900)),
    *sized("calls-scalar", lambda n: body("p = p - g * " + "sqrt(abs(" * n + "lr" + "))" * n), (20, 70, 80)),
    *sized("calls-of-two", lambda n: body("p = p - " + "maximum(minimum(" * n + "g" + ", m), m)" * n), (20, 70, 80)),
    *sized("calls-exp", lambda n: body(lines("m = exp(m) + log(m) + tanh(m)", n)), (20, 300, 500)),
    *sized("arguments", lambda n: body(f"p = p - sqrt({listed('g', n)})"), (2, 400, 4_000)),
    *sized("keywords", lambda n: body(f"p = p - sqrt({listed('a{k}=g', n)})"), (2, 400, 2_000)),
    *sized("starred", lambda n: body(f"p = p - sqrt({listed('*g', n)})"), (2, 400)),
    *sized("attributes", lambda n: body(f"p = p - g{'.T' * n}"), (20, 140, 4_000)),
    *sized("subscripts", lambda n: body(f"p = p - g{'[0]' * n}"), (20, 70, 4_000)),
    *sized("lambdas", lambda n: body("p = p - " + "(lambda: " * n + "g" + ")" * n), (20, 90, 190)),
    *sized("lists", lambda n: body("p = p - " + "[" * n + "g" + "]" * n), (20, 90, 190)),
    *sized("comprehensions", lambda n: body("p = p - " + "[" * n + "g" + " for x in g]" * n), (5, 20, 60)),
    *sized("f-strings", lambda n: body("p = p - f'" + "{g}" * n + "'"), (20, 4_000)),
    *sized("walrus", lambda n: body("p = p - " + "(x := " * n + "g" + ")" * n), (20, 190)),
    *sized("dead-branch-deep", lambda n: body(f"p = p - (g if True else {'-' * n}g)"), (20, 140, 5_000)),
    *sized(
        "all-on-a-line",
        lambda n: body(
            "p = p - " + "(" * 60 + ")".join(["g * lr + m * beta"] * 61)
            if n == 1
            else f"p = p - {' - '.join(['g * lr + m * beta'] * n)}"
        ),
        (1, 60, 140),
    ),
]

REDUCTIONS = [
    *sized(
        "reductions-and-free-states",
        lambda n: declared(
            f"p, g, {listed('s{k}=0.0', n)}, *, lr=0.1",
            lines("s{j} = s{j} * 0.5 + g * {k}", n) + f"\np = p - lr * g / norm(g)\nreturn p, {listed('s{k}', n)}",
        ),
        (5, 9, 14, 20, 40, 100),
    ),
    *sized(
        "reductions-two-and-free-states",
        lambda n: declared(
            f"p, g, {listed('s{k}=0.0', n)}, *, lr=0.1",
            lines("s{j} = s{j} * 0.5 + g * {k}", n)
            + f"\np = p - lr * g / norm(g) / norm(p * norm(s1))\nreturn p, {listed('s{k}', n)}",
        ),
        (5, 9, 14, 40, 100),
    ),
    *sized(
        "reductions-twelve-and-free-states",
        lambda n: declared(
            f"p, g, {listed('s{k}=0.0', n)}, *, lr=0.1",
            lines("s{j} = s{j} * 0.5 + g * {k}", n)
            + "\nx = g\n"
            + "x = x / norm(x)\n" * 12
            + f"p = p - lr * x\nreturn p, {listed('s{k}', n)}",
        ),
        (5, 20, 100),
    ),
    *sized("reductions", lambda n: body(lines("p = p - g / norm(g + {k})", n)), (5, 31, 32, 33, 300, 3_000)),
    *sized("reductions-chained", lambda n: reducing(n, 0), (2, 5, 9, 16, 32, 33, 400)),
    *sized("reductions-and-states", lambda n: reducing(1, n), (5, 12, 13, 14, 20, 40, 100)),
    *sized("reductions-two-and-states", lambda n: reducing(2, n), (3, 8, 9, 20, 60, 100)),
    *sized("reductions-many-and-states", lambda n: reducing(n, n), (3, 5, 6, 10, 20, 32)),
    *sized("reductions-all-and-states", lambda n: reducing(32, n, "global_norm"), (1, 5, 40, 100)),
    *sized(
        "reductions-mixed",
        lambda n: body(
            lines(
                "a{k} = norm(g) * sum(p) * mean(m + {k}) * max_abs(g * {k}) * global_sum(p - {k})\np = p - a{k} * g", n
            )
        ),
        (1, 3, 6),
    ),
    *sized(
        "reductions-in-reductions",
        lambda n: body("p = p - g * " + "norm(g * " * n + "lr" + ")" * n),
        (2, 8, 31, 40, 70),
    ),
    *sized(
        "reductions-in-choices",
        lambda n: body(
            "\n".join(f"a{k} = norm(g) if lr > {k} else sum(p * {k})" for k in range(n))
            + f"\np = p - g * ({listed('a{k}', n, ' + ')})"
        ),
        (3, 16, 17),
    ),
    *sized(
        "reductions-of-a-long-rule",
        lambda n: body("x = g\n" + "x = x * beta + g\n" * n + "p = p - x / norm(x) / norm(x * x)"),
        (100, 800, 1_500),
    ),
    *sized(
        "reductions-of-a-long-rule-with-states",
        lambda n: declared(
            f"p, g, {listed('s{k}=0.0', 8)}, *, lr=0.1",
            "x = g\n"
            + "x = x * lr + g\n" * n
            + "\n".join(f"s{k} = x / norm(x + {k})" for k in range(8))
            + f"\np = p - s1\nreturn p, {listed('s{k}', 8)}",
        ),
        (10, 100, 800, 1_400),
    ),
    *sized(
        "reductions-written-in-between",
        lambda n: declared(
            f"p, g, {listed('s{k}=0.0', n)}, *, lr=0.1",
            "x = g\n"
            + "\n".join(f"s{k} = s{k} + x\nx = x / norm(s{k})" for k in range(n))
            + f"\np = p - lr * x\nreturn p, {listed('s{k}', n)}",
        ),
        (2, 4, 6, 10, 20, 32),
    ),
    *sized(
        "scalar-state-of-reductions",
        lambda n: declared(
            f"p, g, {listed('s{k}: scalar = 0.0', n)}, *, lr=0.1",
            "\n".join(f"s{k} = s{k} + norm(g * s{k})" for k in range(n))
            + f"\np = p - lr * g\nreturn p, {listed('s{k}', n)}",
        ),
        (5, 31, 32),
    ),
]

ERRORS = [
    *sized("errors", lambda n: body(lines("p = p - {k} * nobody{k}", n)), (10, 49, 50, 51, 800, 1_600)),
    *sized("errors-on-a-line", lambda n: body("; ".join(["p = p - nobody"] * n)), (10, 400, 1_600, 5_000)),
    *sized(
        "errors-in-an-expression",
        lambda n: body("p = p - sqrt(" + ", ".join(f"x{k}" for k in range(n)) + ")"),
        (10, 3_000),
    ),
    *sized(
        "errors-of-unicode",
        lambda n: body("p = p - g # " + "é" * n + "\n" + "; ".join(["é = nobody - 'é'"] * 200)),
        (10, 20_000),
    ),
    *sized(
        "errors-behind-unicode",
        lambda n: body(f"assert lr > 0, '{'é' * n}'; " + "; ".join(["p = p - nobody"] * 500)),
        (10, 20_000),
    ),
    *sized(
        "misspelt",
        lambda n: body(lines("beat{k} = g", n) + "\n" + lines("p = p - baet{k}", n)),
        (50, 400, 1_000, 2_000),
    ),
    *sized(
        "misspelt-long",
        lambda n: declared(
            f"p, g, *, {listed('a' * 60 + '{k}=0', n)}", lines(f"p = p - {'a' * 61}{{k}}", n) + "\nreturn p"
        ),
        (50, 200),
    ),
    *sized(
        "misspelt-alike",
        lambda n: declared(
            f"p, g, *, {listed('a' * 35 + '{k}=0', n)}", lines(f"p = p - {'a' * 36}{{k}}", n) + "\nreturn p"
        ),
        (50, 200),
    ),
    *sized(
        "misspelt-cyrillic",
        lambda n: declared(f"p, g, *, {listed('h{k}=0', n)}", lines("p = p - \u0430{k}", n) + "\nreturn p"),
        (50, 200, 2_000),
    ),
    *sized("misspelt-functions", lambda n: body(lines("p = p - sqrd{k}(g)", n)), (50, 1_500)),
    *sized("never-equal", lambda n: body("\n".join(["if flag == 'x':\n    m = g"] * n), extra="flag=True"), (50, 800)),
]

WORDS = {
    "ascii": "a",
    "greek": "α",
    "cyrillic": "ж",
    "chinese": "的",
    "mathematical": "𝐱",
    "combining": "e\u0301",
    "arabic": "ب",
    "hangul": "한",
}
NAMES = [
    item
    for script, letter in WORDS.items()
    for item in (
        *sized(
            f"name-{script}",
            lambda n, c=letter: REDUCING + LAST.replace("last", c * n).replace("hostile", c * n),
            (14, 100, 101, 300),
            name="last",
        ),
        *sized(f"local-{script}", lambda n, c=letter: body(f"{c * n}_1 = g * 2\np = p - {c * n}_1"), (9, 98, 20_000)),
        *sized(
            f"parameter-{script}",
            lambda n, c=letter: declared(f"p, g, *, lr=0.1, {c * n}_1=2.0", f"p = p - {c * n}_1 * g\nreturn p"),
            (9, 98, 300),
        ),
    )
]
NAMES = [
    Sized(
        c.id,
        c.source,
        "".join(__import__("unicodedata").normalize("NFKC", c.source.decode().rpartition("def ")[2].partition("(")[0]))
        if c.name == "last"
        else c.name,
    )
    for c in NAMES
]
NAMES += [
    *sized("names-alike", lambda n: body("\n".join(f"{'a' * 95}{k} = g" for k in range(n))), (40, 900)),
    *sized("names-with-underscores", lambda n: body("\n".join(f"int{'_' * k} = g" for k in range(n))), (40, 96)),
    *sized(
        "names-numbered",
        lambda n: body("x = g\n" + "\n".join(f"x_{k} = x\nx = x * g" for k in range(2, n)) + "\np = p - x"),
        (40, 700),
    ),
]

NUMBERS = [
    *sized("digits", lambda n: body(f"p = p - {'1' * n} * g"), (15, 16, 400, 4_299, 4_301, 100_000)),
    *sized("digits-of-a-float", lambda n: body(f"p = p - {'1' * n}.5 * g"), (15, 300, 400, 100_000)),
    *sized("digits-behind-the-point", lambda n: body(f"p = p - 0.{'1' * n} * g"), (15, 400, 100_000)),
    *sized("zeros", lambda n: body(f"p = p - 0.{'0' * n}1 * g"), (15, 400, 100_000)),
    *sized("hexadecimal", lambda n: body(f"p = p - 0x{'f' * n} * g"), (13, 400, 100_000)),
    *sized("exponents", lambda n: body(f"p = p - 1e{'9' * n} * g"), (1, 2, 3, 20, 100_000)),
    *sized("negative-exponents", lambda n: body(f"p = p - 1e-{'9' * n} * g"), (1, 2, 3, 20, 100_000)),
    *sized("imaginary", lambda n: body(f"p = p - {'1' * n}j * g"), (1, 100_000)),
    *sized("dead-digits", lambda n: body(f"p = p - (g if True else 0x{'f' * n} * g)"), (13, 400, 4_000, 100_000)),
    *sized("dead-statements", lambda n: body(f"if False:\n    p = 0x{'f' * n}"), (400, 4_000, 100_000)),
    *sized("dead-assert", lambda n: body(f"assert True or 0x{'f' * n}"), (400, 4_000, 100_000)),
    *sized("dead-assert-on-lines", lambda n: body(f"assert (True or\n 0x{'f' * n})"), (400, 4_000, 100_000)),
    *sized(
        "dead-on-a-line",
        lambda n: REDUCING + f"@rule\ndef hostile(p, g): p = p - g if True else 0x{'f' * n}; return p\n",
        (400, 4_000, 100_000),
    ),
    *sized("powers", lambda n: body(f"p = p - g * 10 ** {n}"), (2, 308, 309, 25_000)),
    *sized("underscores", lambda n: body(f"p = p - 1{'_0' * n} * g"), (5, 400, 4_400)),
]

TEXTS = [
    *sized("docstring", lambda n: body(f'"""{"x" * n}"""'), (400, 25_000, 200_000)),
    *sized("docstring-lines", lambda n: body('"""' + "x\n    " * n + '"""'), (400, 25_000)),
    *sized("docstring-tabs", lambda n: body('"""' + "\t" * n + '"""'), (400, 200_000)),
    *sized("docstring-ends", lambda n: body('"""' + "*/ ?? \\\\ " * n + '"""'), (400, 20_000)),
    *sized("docstring-quotes", lambda n: body("'''" + '"' * n + "'''"), (400, 200_000)),
    *sized("docstring-control", lambda n: body('"""' + "\\x1b[2J\\u202e" * n + '"""'), (400, 15_000)),
    *sized("docstring-surrogates", lambda n: body('"""' + "\\ud800" * n + '"""'), (1, 15_000)),
    *sized("comment", lambda n: body("# " + "x" * n + "\na = g"), (400, 200_000)),
    *sized("comments", lambda n: body("# x\n" * n + "a = g"), (400, 25_000)),
    *sized("comments-inside", lambda n: body("a = (g\n" + "# x\n" * n + ")"), (400, 25_000)),
    *sized("comment-tabs", lambda n: body("a = g\n#" + "\t" * n + "\na = g"), (400, 200_000)),
    *sized("blank-lines", lambda n: body("a = g\n" + "\n" * n + "a = g"), (400, 100_000)),
    *sized("blanks", lambda n: body("a = g" + " " * n + "+ g"), (400, 200_000)),
    *sized("form-feeds", lambda n: REDUCING + "\f" * n + LAST.replace("last", "hostile"), (1, 100_000)),
    *sized("lines-with-form-feeds", lambda n: REDUCING + "\f\n" * n + LAST.replace("last", "hostile"), (1, 50_000)),
    *sized("carriage-returns", lambda n: body("a = g\n" * n).replace("\n", "\r"), (1, 900)),
    *sized("both-ends", lambda n: body("a = g\n" * n).replace("\n", "\r\n"), (1, 900)),
    *sized("file", lambda n: body("a = g") + "#" * n, (200_000, 262_144, 300_000, 5_000_000)),
    *sized("nul", lambda n: body("a = g") + "\0" * n, (1, 100_000)),
    *sized("nul-first", lambda n: "\0" * n + body("a = g"), (1, 100_000)),
    *sized("byte-order-marks", lambda n: "\ufeff" * n + body("a = g"), (1, 2, 1_000)),
    *sized("utf-16", lambda n: body("a = g\n" * n).encode("utf-16"), (1, 900)),
    *sized("utf-32", lambda n: body("a = g\n" * n).encode("utf-32"), (1, 400)),
    *sized(
        "latin-1",
        lambda n: ("# -*- coding: latin-1 -*-\n" + body("# " + "é" * n + "\na = g")).encode("latin-1"),
        (1, 10_000),
    ),
    *sized("latin-1-said", lambda n: "# -*- coding: latin-1 -*-\n" + body("# " + "é" * n + "\na = g"), (1, 10_000)),
    *sized("utf-7-said", lambda n: "# coding: utf-7\n" + body("a = g"), (1,)),
    *sized("unknown-encoding-said", lambda n: f"# coding: {'x' * n}\n" + body("a = g"), (1, 10_000)),
    *sized("not-utf-8", lambda n: body("a = g").encode() + b"\xff" * n, (1, 100_000)),
    *sized("surrogates-encoded", lambda n: body("a = g").encode() + b"# \xed\xa0\x80" * n, (1, 10_000)),
    *sized("overlong", lambda n: body("a = g").encode() + b"# \xc0\xaf" * n, (1, 10_000)),
    *sized(
        "option-surrogate",
        lambda n: declared(
            f"p, g, *, lr=0.1, mode='{chr(92)}ud800'", f"if mode == '{chr(92)}udfff':\n    p = p - g\nreturn p"
        ),
        (1,),
    ),
    *sized("option-control", lambda n: declared(f"p, g, *, lr=0.1, mode='{(chr(92) + 'x00') * n}'"), (1, 20_000)),
    *sized("assert-message-surrogates", lambda n: body(f"assert lr > 0, '{(chr(92) + 'ud800') * n}'"), (1, 10_000)),
    *sized("dead-surrogate", lambda n: body(f"if False:\n    p = '{(chr(92) + 'ud800') * n}'"), (1, 10_000)),
    *sized("bytes", lambda n: body(f"if False:\n    p = b'{(chr(92) + 'x00') * n}'"), (1, 10_000)),
    *sized("quotes-unclosed", lambda n: body('"""' * n + "a = g" + "'" * n), (1, 10_001)),
    *sized("brackets-unclosed", lambda n: body("a = " + "([{" * n), (1, 60, 10_000)),
    *sized("brackets-wrong", lambda n: body("a = " + "(" * n + "]" * n), (1, 190)),
    *sized("indents", lambda n: REDUCING + "".join(f"{' ' * k}x\n" for k in range(n)), (2, 500)),
    *sized(
        "dedents",
        lambda n: REDUCING + indented(n, "if x:", "pass\n") + "".join(f"{' ' * k} pass\n" for k in range(n, 0, -1)),
        (20, 99),
    ),
    *sized("noise", lambda n: bytes((k * k * 7919 + k) % 256 for k in range(n)), (1_000, 200_000)),
    *sized(
        "noise-of-words",
        lambda n: " ".join(
            ("def", "(", ")", ":", "@", "if", "[", "rule", "=", "lambda", "\n")[(k * k * 7919 + k // 3) % 11]
            for k in range(n)
        ),
        (1_000, 40_000),
    ),
    *sized("empty", lambda n: "\n" * n, (0, 1, 200_000)),
]

CASES: list[Sized] = [*MODULE, *SIGNATURES, *STATEMENTS, *EXPRESSIONS, *REDUCTIONS, *ERRORS, *NAMES, *NUMBERS, *TEXTS]
