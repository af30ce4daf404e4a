"""Hostile rule files: what must be refused with a diagnostic, and what must be accepted and do no harm.

Nothing here is imported or executed: every source is text for the compiler. Two tables come out of this module,
``REFUSED`` and ``ACCEPTED``. The sources are bytes because encodings, byte order marks and NULs are part of the attack.

A line that a diagnostic should point at is marked with ``HERE`` while a source is put together; the mark is taken out
again and the line number counted, so that no number is written by hand.
"""

from __future__ import annotations

import keyword
import textwrap
from dataclasses import dataclass, field

HERE = "¶"
"""Marks the line to point at. It stands in no source."""

IMPORTS = "from optforge import rule, scalar, sqrt, where, maximum, minimum, exp, log, tanh, sign, abs\n\n"

RESERVED = (
    "params",
    "rule",
    "target",
    "threads",
    "skip_nonfinite",
    "zero_grads",
    "step",
    "state",
    "state_dict",
    "load_state_dict",
    "save",
    "load",
    "stats",
)
"""Names that no hyperparameter may have, because `Optimizer` uses them itself."""

WRITE_MARKER = 'open(os.environ["HOSTILE_MARKER"], "w").close()'
"""An expression that leaves a file behind when someone executes it (in a module that imports os)."""


@dataclass(frozen=True)
class Refused:
    """A rule file that must be refused with a diagnostic.

    `line` is the line, from 1, that the first diagnostic should point at (0: not checked). At least one of `words`, in
    lower case, should occur in the diagnostic (none: not checked). `name` is the rule to compile.
    """

    id: str
    source: bytes = field(repr=False)
    line: int
    words: tuple[str, ...] = ()
    name: str = "hostile"


@dataclass(frozen=True)
class Accepted:
    """A rule file whose rule `name` must compile, without a side effect and into valid sources."""

    id: str
    source: bytes = field(repr=False)
    name: str = "hostile"


def function(body: str, *, signature: str, name: str = "hostile", mark: str = "") -> str:
    """Return the text of a decorated rule; `mark` goes before its `def`."""
    # Not textwrap.indent: it takes form feeds and the like for line ends.
    indented = "\n".join(f"    {line}" if line else "" for line in body.split("\n"))
    return f"@rule\n{mark}def {name}({signature}):\n{indented}\n"


def usual(body: str, *, states: str = "", extra: str = "") -> str:
    """Return a file whose rule is momentum with a bias correction, preceded by the statements in `body`.

    `states` and `extra` are states and hyperparameters beside the usual m, t, lr and beta, as in a signature.
    """
    declared = ", ".join(filter(None, ("p, g, m=0.0", states, "*, t, lr=0.1, beta=0.9", extra)))
    returned = ["p", "m", *(state.split("=")[0].split(":")[0].strip() for state in states.split(",") if state)]
    tail = f"m = beta * m + (1 - beta) * g\np = p - lr * m / (1 - beta**t)\nreturn {', '.join(returned)}"
    return IMPORTS + function(f"{body}\n{tail}", signature=declared)


def refused(id: str, text: str, *words: str, name: str = "hostile") -> Refused:
    """Take the mark out of a text and count its line."""
    position = text.find(HERE)
    line = text.count("\n", 0, position) + 1 if position >= 0 else 0
    return Refused(id, text.replace(HERE, "").encode(), line, words, name)


def bad_statement(id: str, body: str, *words: str, states: str = "", extra: str = "") -> Refused:
    """Refuse a statement: the first line of `body`, unless another one is marked."""
    return refused(id, usual(body if HERE in body else HERE + body, states=states, extra=extra), *words)


def bad_expression(id: str, text: str, *words: str, extra: str = "") -> Refused:
    """Refuse an expression, standing where its value would reach the parameter."""
    return bad_statement(id, f"p = p - lr * ({text})", *words, extra=extra)


def bad_signature(id: str, text: str, *words: str, returns: str = "p", update: str = "p = p - 0.1 * g") -> Refused:
    """Refuse a signature, at its `def`."""
    return refused(id, IMPORTS + function(f"{update}\nreturn {returns}", signature=text, mark=HERE), *words)


ASIDE = ("default", "initial", "literal", "number", "value")
"""What a diagnostic about a default may say without naming what is wrong with it."""


def bad_default(id: str, text: str, *words: str) -> Refused:
    """Refuse a hyperparameter's default."""
    return bad_signature(f"default-{id}", f"p, g, *, lr={text}", *words, *ASIDE, update="p = p - lr * g")


def bad_initial(id: str, text: str, *words: str, annotation: str = "") -> Refused:
    """Refuse a state's initial value."""
    declared = f"p, g, m{annotation}={text}, *, lr=0.1"
    update = "m = m + 1\np = p - lr * g / m" if annotation else "m = m + g\np = p - lr * m"
    return bad_signature(f"initial-{id}", declared, *words, *ASIDE, returns="p, m", update=update)


def bad_return(id: str, body: str, *words: str, text: str = "p, g, m=0.0, v=0.0, *, lr=0.1") -> Refused:
    """Refuse the way in which a body returns; `body` is all that follows the updates of m, v and p."""
    updates = "m = m + g\nv = v + g * g\np = p - lr * m / (sqrt(v) + 1)"
    return refused(f"return-{id}", IMPORTS + function(f"{updates}\n{body}", signature=text), *words, "return")


# Statements -----------------------------------------------------------------------------------------------------------

STATEMENTS = [
    bad_statement("for", "for i in range(3):\n    m = m + g", "loop", "for"),
    bad_statement("for-else", "for i in range(3):\n    m = m + g\nelse:\n    m = g", "loop", "for"),
    bad_statement("while", "while lr > 1:\n    m = m + g", "loop", "while"),
    bad_statement("while-true", "while True:\n    m = m + g", "loop", "while"),
    bad_statement("async-for", "async for i in g:\n    m = m + i", "loop", "for", "async"),
    bad_statement("break", "break", "break"),
    bad_statement("continue", "continue", "continue"),
    bad_statement("with", "with lock:\n    m = m + g", "with"),
    bad_statement("async-with", "async with lock:\n    m = m + g", "with", "async"),
    bad_statement("try-except", "try:\n    m = m / g\nexcept ZeroDivisionError:\n    m = g", "try", "except"),
    bad_statement("try-finally", "try:\n    m = m / g\nfinally:\n    m = g", "try", "finally"),
    bad_statement("try-star", "try:\n    m = m / g\nexcept* ValueError:\n    m = g", "try", "except"),
    bad_statement("raise", 'raise ValueError("no")', "raise"),
    bad_statement("del", "del m", "del"),
    bad_statement("global", "global counter", "global"),
    bad_statement("nonlocal", "nonlocal counter", "nonlocal"),
    bad_statement("import", "import math", "import"),
    bad_statement("import-from", "from math import pi", "import"),
    bad_statement("nested-function", "def helper(x):\n    return x * x", "function", "def", "helper"),
    bad_statement("nested-async-function", "async def helper(x):\n    return x", "function", "def", "helper", "async"),
    bad_statement("nested-class", "class Helper:\n    pass", "class"),
    bad_statement("match", "match t:\n    case 1:\n        m = g", "match"),
    bad_statement("pass", "pass", "pass"),
    bad_statement("expression-statement", "m + g", "expression", "statement"),
    bad_statement("call-statement", "print(g)", "expression", "statement", "print"),
    bad_statement("ellipsis-statement", "...", "expression", "statement", "ellipsis", "..."),
    # Only the first statement is a docstring, and only when it is a plain string.
    bad_statement("second-string", f'm = g\n{HERE}"""Not a docstring."""', "expression", "statement", "string"),
    bad_statement("bytes-docstring", 'b"""Not a docstring."""', "expression", "statement", "bytes"),
    bad_statement("formatted-docstring", 'f"""{lr}"""', "expression", "statement", "string"),
    bad_statement("augmented-add", "m += g", "+=", "augmented"),
    bad_statement("augmented-subtract", "p -= lr * g", "-=", "augmented"),
    bad_statement("augmented-power", "m **= 2", "**=", "augmented"),
    bad_statement("augmented-hyperparameter", "lr *= 0.5", "*=", "augmented", "lr"),
    bad_statement("tuple-assignment", "a, b = g, m", "tuple", "unpack", "name"),
    bad_statement("tuple-swap", "p, m = m, p", "tuple", "unpack", "name"),
    bad_statement("list-assignment", "[a, b] = g, m", "list", "unpack", "name"),
    bad_statement("starred-assignment", "a, *b = g, m, p", "star", "unpack", "tuple", "name"),
    bad_statement("multiple-targets", "a = b = g", "target", "multiple", "chain", "name"),
    bad_statement("subscript-assignment", "m[0] = 1.0", "subscript", "index", "["),
    bad_statement("slice-assignment", "m[:] = g", "subscript", "slice", "["),
    bad_statement("mask-assignment", "m[g > 0] = 0.0", "subscript", "mask", "where"),
    bad_statement("attribute-assignment", "m.data = g", "attribute", "m.data"),
    bad_statement("annotated-assignment", "a: float = 1.0", "annot"),
    bad_statement("annotation-only", "a: float", "annot"),
    bad_statement("walrus-statement", "(a := g)", ":=", "expression", "statement", "walrus"),
    bad_statement("yield-statement", "yield g", "yield"),
    bad_statement("yield-from", "yield from g", "yield"),
    bad_statement("await-statement", "await g", "await"),
    bad_statement("lambda-assignment", "helper = lambda x: x * x", "lambda"),
    bad_statement("rebind-hyperparameter", "lr = 2 * lr", "lr"),
    bad_statement("rebind-option", "nesterov = False", "nesterov", extra="nesterov=True"),
    bad_statement("rebind-string-option", 'mode = "other"', "mode", extra='mode="plain"'),
    bad_statement("rebind-t", "t = t + 1", "t"),
    bad_statement("semicolon", f"a = g; b = m\n{HERE}c = g; del c", "del"),
]

# Conditions, assertions and options -----------------------------------------------------------------------------------

CONDITIONS = [
    bad_statement("if-hyperparameter", "if lr > 0:\n    m = g", "static", "if", "lr"),
    bad_statement("if-bare-hyperparameter", "if lr:\n    m = g", "static", "if", "lr"),
    bad_statement("if-t", "if t == 1:\n    m = g", "static", "if"),
    bad_statement("if-element", "if g > 0:\n    m = g", "static", "if", "where"),
    bad_statement("if-state", "if m == 0:\n    m = g", "static", "if", "where"),
    bad_statement("if-local", f"a = 2 * lr\n{HERE}if a > 1:\n    m = g", "static", "if"),
    bad_statement("if-static-and-scalar", "if nesterov and lr > 0:\n    m = g", "static", "if", extra="nesterov=True"),
    bad_statement(
        "elif-scalar",
        f"if nesterov:\n    m = g\n{HERE}elif lr > 0:\n    m = m + g",
        "static",
        "if",
        extra="nesterov=False",
    ),
    bad_statement(
        "if-option-is-hyperparameter", "if mode == lr:\n    m = g", "static", "mode", "lr", extra='mode="plain"'
    ),
    bad_statement("if-option-is-element", "if mode == g:\n    m = g", "static", "mode", extra='mode="plain"'),
    bad_statement(
        "if-option-below-number", "if mode < 1:\n    m = g", "static", "mode", "string", extra='mode="plain"'
    ),
    bad_statement("if-hyperparameter-is-string", 'if lr == "big":\n    m = g', "static", "string", "lr"),
    bad_statement("if-call", "if isinstance(g, list):\n    m = g", "isinstance", "static", "if"),
    bad_statement("assert-element", "assert g > 0", "assert", "element"),
    bad_statement("assert-state", "assert m > 0", "assert"),
    bad_statement("assert-scalar-state", "assert k > 0", "assert", states="k: scalar = 1.0"),
    bad_statement("assert-t", "assert t > 0", "assert"),
    bad_statement("assert-partly-element", "assert 0 < lr and g > 0", "assert", "element"),
    bad_statement("assert-call", "assert callable(lr)", "assert", "callable"),
    bad_expression("option-string-arithmetic", "mode * g", "mode", "option", "static", extra='mode="plain"'),
    bad_expression("option-bool-arithmetic", "nesterov * g", "nesterov", "option", "static", extra="nesterov=True"),
    bad_expression("option-in-function", "sqrt(mode)", "mode", "option", "static", extra='mode="plain"'),
    bad_expression("option-power", "g * beta**nesterov", "nesterov", "option", "static", extra="nesterov=True"),
]

# Expressions ----------------------------------------------------------------------------------------------------------

EXPRESSIONS = [
    bad_expression("attribute-math", "math.sqrt(lr) * g", "attribute", "math", "sqrt"),
    bad_expression("attribute-numpy", "np.sqrt(g)", "attribute", "np", "sqrt"),
    bad_expression("attribute-constant", "math.pi * g", "attribute", "math"),
    bad_expression("attribute-method", "g.sum()", "attribute", "sum", "method"),
    bad_expression("attribute-dunder", "g.__class__", "attribute", "__class__"),
    bad_expression("subscript", "g[0]", "subscript", "index", "["),
    bad_expression("subscript-slice", "g[1:]", "subscript", "slice", "["),
    bad_expression("subscript-mask", "g[g > 0]", "subscript", "mask", "["),
    # Brackets are markup to some terminal libraries, which would print the line without them.
    bad_expression("subscript-markup", "p[g] + m[red]", "p[g]"),
    bad_expression("unknown-function", "cos(g)", "cos"),
    bad_expression("unknown-function-typo", "sqtr(g)", "sqtr"),
    bad_expression("builtin-max", "max(g, m)", "max"),
    bad_expression("builtin-pow", "pow(g, 2)", "pow"),
    bad_expression("builtin-float", "float(lr) * g", "float"),
    bad_expression("builtin-eval", 'eval("g")', "eval"),
    bad_expression("builtin-import", '__import__("os").system("true")', "attribute", "__import__", "system"),
    bad_expression("recursive-call", "hostile(p, g)", "hostile"),
    bad_expression("scalar-call", "scalar(lr) * g", "scalar"),
    bad_expression("call-of-call", "sqrt(g)(g)", "call", "function"),
    bad_expression("call-of-lambda", "(lambda x: x * x)(g)", "lambda", "call", "function"),
    bad_expression("function-as-value", "sqrt * g", "sqrt"),
    bad_expression("call-keyword", "sqrt(x=g)", "keyword", "argument"),
    bad_expression("call-extra-keyword", "sqrt(g, out=m)", "keyword", "argument"),
    bad_expression("call-star", "maximum(*g)", "star", "*", "argument"),
    bad_expression("call-double-star", "sqrt(**g)", "star", "**", "keyword", "argument"),
    bad_expression("call-no-argument", "sqrt()", "argument", "sqrt"),
    bad_expression("call-two-for-one", "sqrt(g, m)", "argument", "sqrt"),
    bad_expression("call-one-for-two", "maximum(g)", "argument", "maximum"),
    bad_expression("call-three-for-two", "maximum(g, m, p)", "argument", "maximum"),
    bad_expression("call-where-two", "where(g > 0, g)", "argument", "where"),
    bad_expression("call-where-four", "where(g > 0, g, m, p)", "argument", "where"),
    bad_expression("formatted-string", 'f"{lr}" * g', "string"),
    bad_expression("string", '"abc" * g', "string"),
    bad_expression("bytes", 'b"abc" * g', "bytes", "literal", "constant"),
    bad_expression("complex", "1j * g", "complex", "imaginary", "1j"),
    bad_expression("none", "None * g", "none"),
    bad_expression("ellipsis", "... * g", "ellipsis", "..."),
    bad_expression("list", "[g, m]", "list"),
    bad_expression("tuple", "(g, m)", "tuple"),
    bad_expression("set", "{g, m}", "set"),
    bad_expression("dict", "{1: g}", "dict"),
    bad_expression("list-comprehension", "[x for x in g]", "comprehension", "loop", "for"),
    bad_expression("set-comprehension", "{x for x in g}", "comprehension", "loop", "for"),
    bad_expression("dict-comprehension", "{x: x for x in g}", "comprehension", "loop", "for"),
    bad_expression("generator", "sqrt(x for x in g)", "generator", "comprehension", "loop", "for"),
    bad_expression("lambda", "lambda: g", "lambda"),
    bad_expression("walrus", "(a := g)", ":=", "walrus", "named", "assign"),
    bad_expression("yield", "(yield g)", "yield"),
    bad_expression("await", "(await g)", "await"),
    bad_expression("floor-division", "g // 2", "//", "floor"),
    bad_expression("floor-division-scalars", "(lr // 2) * g", "//", "floor"),
    bad_expression("matrix-product", "g @ m", "@", "matrix", "matmul"),
    bad_expression("bit-and", "g & m", "&", "bit"),
    bad_expression("bit-or", "g | m", "|", "bit"),
    bad_expression("bit-xor", "g ^ m", "^", "bit", "**"),
    bad_expression("bit-xor-scalars", "(lr ^ 2) * g", "^", "bit", "**"),
    bad_expression("bit-not", "~g", "~", "bit", "invert"),
    bad_expression("shift-left", "g << 1", "<<", "shift"),
    bad_expression("shift-right", "g >> 1", ">>", "shift"),
    bad_expression("unary-plus", "+g", "+", "unary", "plus"),
    bad_expression("is", "m if lr is beta else g", "is", "identity"),
    bad_expression("is-not", "m if lr is not beta else g", "is", "identity"),
    bad_expression("in", "m if lr in (0.1, 0.2) else g", "in", "member"),
    bad_expression("not-in", "m if lr not in (0.1, 0.2) else g", "in", "member"),
    bad_expression("remainder-of-element", "g % 2", "%", "remainder", "modulo"),
    bad_expression("remainder-by-element", "lr % g", "%", "remainder", "modulo"),
    bad_expression("power-3", "g**3", "power", "**", "exponent"),
    bad_expression("power-1.5", "g**1.5", "power", "**", "exponent"),
    bad_expression("power-minus-2", "g**-2", "power", "**", "exponent"),
    bad_expression("power-minus-half", "m**-0.5", "power", "**", "exponent", "sqrt"),
    bad_expression("power-0", "g**0", "power", "**", "exponent"),
    bad_expression("power-hyperparameter", "g**beta", "power", "**", "exponent"),
    bad_expression("power-t", "g**t", "power", "**", "exponent"),
    bad_expression("power-element-exponent", "g**m", "power", "**", "exponent"),
    bad_expression("power-of-scalar-by-element", "beta**g", "power", "**", "exponent"),
    bad_expression("power-of-literal-by-element", "2**g", "power", "**", "exponent"),
    bad_expression("power-of-mask", "(g > 0) ** 2", "mask", "power", "comparison"),
    bad_expression("chained-elements", "where(0 < g < 1, g, m)", "chain", "comparison", "where"),
    bad_expression("chained-ends-in-element", "where(0 < lr < g, g, m)", "chain", "comparison", "where"),
    bad_expression("mask-and", "where(g > 0 and m > 0, g, m)", "and", "mask", "where"),
    bad_expression("mask-or", "where(g > 0 or m > 0, g, m)", "or", "mask", "where"),
    bad_expression("mask-not", "where(not g > 0, g, m)", "not", "mask", "where"),
    bad_expression("mask-bit-and", "where((g > 0) & (m > 0), g, m)", "&", "mask", "where"),
    bad_expression("mask-bit-not", "where(~(g > 0), g, m)", "~", "mask", "where"),
    bad_expression("mask-compared", "where((g > 0) == (m > 0), g, m)", "mask", "comparison"),
    bad_expression("mask-arithmetic", "(g > 0) * g", "mask", "comparison", "where"),
    bad_expression("mask-negated", "-(g > 0)", "mask", "comparison", "where"),
    bad_expression("mask-in-function", "sqrt(g > 0)", "mask", "comparison", "where"),
    bad_expression("mask-in-maximum", "maximum(g > 0, g)", "mask", "comparison", "where"),
    bad_expression("mask-as-branch", "where(g > 0, m > 0, g)", "mask", "comparison", "branch", "where"),
    bad_expression("conditional-on-mask", "g if g > 0 else m", "where", "mask", "element"),
    bad_expression("conditional-on-element", "g if g else m", "where", "element", "condition"),
    bad_expression("conditional-mask-branches", "(g > 0) if lr > 0 else (m > 0)", "mask", "comparison", "branch"),
    bad_expression("conditional-mixed-branches", "g if lr > 0 else 0.0", "branch", "element", "type"),
    bad_expression("conditional-mixed-scalar-first", "lr if t > 1 else g", "branch", "element", "type"),
    bad_expression("not-element", "not g", "not", "element"),
    bad_expression("and-elements", "g and m", "and", "element"),
    bad_expression("where-scalar-condition", "where(lr > 0, g, m)", "where", "scalar"),
    bad_expression("where-t-condition", "where(t == 1, g, m)", "where", "scalar"),
    bad_expression("where-element-condition", "where(g, g, m)", "where", "mask", "condition"),
    bad_expression("unknown-name", "nobody * g", "nobody"),
    bad_expression("unlisted-hyperparameter", "learning_rate * g", "learning_rate"),
    # Cyrillic letters that look exactly like the Latin p, a and c.
    bad_expression("cyrillic-p", "\u0440 * lr", "\u0440"),
    bad_expression("cyrillic-maximum", "m\u0430ximum(g, m)", "m\u0430ximum"),
    bad_expression(
        "integer-2**53+1", "9007199254740993 * g", "9007199254740993", "integer", "2**53", "2^53", "literal"
    ),
    bad_expression("integer-negative", "-9007199254740993 * g", "9007199254740993", "integer", "2**53", "literal"),
    # A double holds this one exactly, but it lies beyond 2**53 all the same.
    bad_expression("integer-1e16", "10000000000000000 * g", "10000000000000000", "integer", "literal"),
    bad_expression("integer-hexadecimal", "0x20000000000001 * g", "integer", "literal"),
    bad_expression("integer-400-digits", "1" + "0" * 400 + " * g", "integer", "literal"),
    # Python itself refuses to read more than 4,300 digits, with an exception of its own.
    bad_expression("integer-5000-digits", "9" * 5000 + " * g", "integer", "literal", "digits", "syntax"),
]

# Types of what is bound, and names ------------------------------------------------------------------------------------

SCALAR_STATE = "k: scalar = 0.0"

BINDINGS = [
    bad_statement("element-to-scalar-state", "k = g * lr", "k", "scalar", states=SCALAR_STATE),
    bad_statement("parameter-to-scalar-state", "k = p", "k", "scalar", states=SCALAR_STATE),
    bad_statement("choice-to-scalar-state", "k = where(g > 0, 1, 0)", "k", "scalar", states=SCALAR_STATE),
    # Where the diagnostic of a mask as a result belongs, the binding or the return, is open: both are fair.
    refused(
        "mask-to-state",
        IMPORTS + function("p = p - lr * g\nm = g > 0\nreturn p, m", signature="p, g, m=0.0, *, lr=0.1"),
        "mask",
        "comparison",
        "where",
    ),
    refused("mask-to-parameter", IMPORTS + function("p = g > 0\nreturn p", signature="p, g"), "mask", "comparison"),
    bad_statement("use-before-assignment", "p = p - lr * later\nlater = g", "later"),
    bad_statement("use-in-own-definition", "later = later + g", "later"),
    bad_statement(
        "bound-in-untaken-branch",
        f"if nesterov:\n    direction = g + m\n{HERE}p = p - lr * direction",
        "direction",
        extra="nesterov=False",
    ),
    bad_statement(
        "bound-in-other-branch",
        f'if mode == "sign":\n    direction = sign(g)\nelse:\n    bias = g\n{HERE}p = p - lr * direction',
        "direction",
        extra='mode="plain"',
    ),
    bad_statement("shadowed-function", f"sqrt = 2 * lr\n{HERE}p = p - sqrt(g)", "sqrt"),
    bad_statement("shadowed-by-state", "p = p - exp(g)", "exp", states="exp=0.0"),
    bad_statement("shadowed-by-hyperparameter", "p = p - log(g)", "log", extra="log=0.5"),
    refused("unlisted-t", IMPORTS + function(f"{HERE}p = p - g / t\nreturn p", signature="p, g, *, lr=0.1"), "t"),
    refused(
        "module-constant",
        IMPORTS + "EPS = 1e-8\n\n" + function(f"{HERE}p = p - lr * g / EPS\nreturn p", signature="p, g, *, lr=0.1"),
        "eps",
    ),
    refused(
        "module-function",
        IMPORTS
        + "def helper(x):\n    return x * x\n\n"
        + function(f"{HERE}p = p - lr * helper(g)\nreturn p", signature="p, g, *, lr=0.1"),
        "helper",
    ),
    refused(
        "other-rule-called",
        IMPORTS
        + function("p = p - g\nreturn p", signature="p, g", name="other")
        + function(f"{HERE}p = other(p, g)\nreturn p", signature="p, g"),
        "other",
    ),
    refused(
        "cyrillic-p-returned",
        IMPORTS + function(f"\u0440 = p - lr * g\n{HERE}return \u0440", signature="p, g, *, lr=0.1"),
        "\u0440",
        "return",
    ),
]

# Signatures -----------------------------------------------------------------------------------------------------------

SIGNATURES = [
    bad_signature("signature-empty", "", "p", "parameter", returns="1", update="q = 1"),
    bad_signature("signature-no-gradient", "p", "g", "gradient", update="p = p - 0.1 * p"),
    bad_signature("signature-no-gradient-but-state", "p, m=0.0", "g", "gradient", update="m = p", returns="p, m"),
    bad_signature("signature-swapped", "g, p", "p", "first"),
    bad_signature("signature-other-names", "x, y", "p", "first", update="x = x - 0.1 * y", returns="x"),
    bad_signature("signature-state-first", "m, p, g", "p", "first", returns="p, m"),
    bad_signature("signature-gradient-keyword", "p, *, g", "g", "gradient"),
    bad_signature("signature-parameter-default", "p=0.0, g=0.0", "p", "default"),
    bad_signature("signature-gradient-default", "p, g=0.0", "g", "default"),
    bad_signature("signature-state-without-default", "p, g, m", "m", "default", "initial", returns="p, m"),
    bad_signature("signature-hyperparameter-without-default", "p, g, *, lr", "lr", "default"),
    bad_signature("signature-t-default", "p, g, *, t=1", "t", "default"),
    bad_signature("signature-t-positional", "p, g, t", "t", "positional", "keyword"),
    bad_signature("signature-t-as-state", "p, g, t=0.0", "t", "state", "keyword", returns="p, t"),
    bad_signature("signature-star-args", "p, g, *args", "args", "*"),
    bad_signature("signature-star-args-and-keyword", "p, g, *args, lr=0.1", "args", "*"),
    bad_signature("signature-double-star", "p, g, **kwargs", "kwargs", "**"),
    bad_signature("signature-positional-only", "p, g, m=0.0, /, *, lr=0.1", "/", "positional", returns="p, m"),
    bad_signature("signature-duplicate-state", "p, g, m=0.0, m=1.0", "m", "duplicate", "twice", returns="p, m"),
    bad_signature("signature-duplicate-hyperparameter", "p, g, *, lr=0.1, lr=0.2", "lr", "duplicate", "twice"),
    bad_signature("signature-state-and-hyperparameter", "p, g, m=0.0, *, m=0.1", "m", "duplicate", "twice"),
    bad_signature("signature-gradient-twice", "p, g, g=0.0", "g", "duplicate", "twice"),
    *(
        bad_signature(f"reserved-{name}", f"p, g, *, {name}=0.1", name, update=f"p = p - {name} * g")
        for name in RESERVED
    ),
    # An argument on a line of its own is where to point, not at the def.
    refused(
        "reserved-on-its-own-line",
        IMPORTS
        + function(
            "p = p - lr * g\nreturn p", signature=f"\n    p,\n    g,\n    *,\n    lr=0.1,\n{HERE}    threads=4,\n"
        ),
        "threads",
    ),
    refused(
        "default-on-its-own-line",
        IMPORTS + function("p = p - lr * g\nreturn p", signature=f"\n    p,\n    g,\n    *,\n{HERE}    lr=None,\n"),
        "lr",
        "none",
        "default",
    ),
]

DEFAULTS = [
    bad_default("none", "None", "none"),
    bad_default("ellipsis", "...", "ellipsis"),
    bad_default("list", "[0.1]", "list"),
    bad_default("tuple", "(0.1,)", "tuple"),
    bad_default("dict", "{}", "dict"),
    bad_default("call", 'float("0.1")', "call", "float"),
    bad_default("call-side-effect", WRITE_MARKER, "call", "attribute", "open"),
    bad_default("import-side-effect", '__import__("os").system("touch $HOSTILE_MARKER")', "call", "attribute"),
    bad_default("name", "DEFAULT_RATE", "default_rate"),
    bad_default("attribute", "math.pi", "attribute", "math"),
    bad_default("lambda", "lambda: 0.1", "lambda"),
    bad_default("complex", "1j", "complex", "imaginary"),
    bad_default("bytes", 'b"0.1"', "bytes"),
    bad_default("formatted-string", 'f"{1}"', "string"),
    bad_default("nan", "1e999 - 1e999", "nan", "finite", "number", "range", "overflow"),
    bad_default("division-by-zero", "1 / 0", "zero", "division"),
    bad_default("remainder-by-zero", "1 % 0", "zero", "remainder", "modulo"),
    bad_default("zero-to-negative-power", "0.0**-1", "zero", "power"),
    bad_default("turns-complex", "(-8) ** 0.5", "complex", "negative", "power"),
    bad_default("overflow", "10.0**400", "overflow", "range", "large", "finite"),
    # Exact integers would take all time and memory; doubles overflow at once.
    bad_default("power-tower", "9**9**9**9", "overflow", "range", "large", "finite"),
    bad_default("shift", "1 << 10**9", "<<", "shift", "overflow", "range", "large"),
    bad_default("long-string", '"a" * 10**9', "string", "literal", "arithmetic"),
    bad_default("floor-division", "7 // 2", "//", "floor"),
    bad_default("integer-2**53+1", "9007199254740993", "integer", "9007199254740993", "2**53"),
    bad_default("integer-400-digits", "1" + "0" * 400, "integer", "literal"),
    bad_initial("none", "None", "none"),
    bad_initial("list", "[]", "list"),
    bad_initial("call", "zeros()", "call", "zeros"),
    bad_initial("name", "lr", "string", '"lr"', "name"),
    bad_initial("complex", "1j", "complex", "imaginary"),
    bad_initial("bytes", 'b"p"', "bytes"),
    bad_initial("unknown-string", '"nobody"', "nobody"),
    bad_initial("itself", '"m"', "hyperparameter", "unknown", "string"),
    bad_initial("empty-string", '""', "string", "hyperparameter"),
    bad_initial("division-by-zero", "1 / 0", "zero", "division"),
    bad_initial("integer-2**53+1", "9007199254740993", "integer", "9007199254740993", "2**53"),
    bad_initial("parameter-in-scalar", '"p"', "scalar", "string", annotation=": scalar "),
    bad_initial("gradient-in-scalar", '"g"', "scalar", "string", annotation=": scalar "),
]

# Returns --------------------------------------------------------------------------------------------------------------

RETURNS = [
    bad_return("missing", "m = m * 2", "return"),
    bad_return("missing-with-docstring", '"""Update.\n\n    return p, m, v\n    """', "return", "expression", "string"),
    bad_return("not-last", "return p, m, v\nm = m * 2", "last", "after", "unreachable"),
    bad_return("twice", "return p, m, v\nreturn p, m, v", "last", "after", "one", "second"),
    bad_return("wrong-order", f"{HERE}return p, v, m", "order"),
    bad_return("parameter-last", f"{HERE}return m, v, p", "order"),
    bad_return("state-missing", f"{HERE}return p, m", "v"),
    bad_return("parameter-missing", f"{HERE}return m, v", "p"),
    bad_return("only-parameter", f"{HERE}return p", "m", "v"),
    bad_return("extra-name", f"{HERE}return p, m, v, g", "g", "extra", "state"),
    bad_return("extra-local", f"u = m\n{HERE}return p, m, v, u", "u"),
    bad_return("repeated", f"{HERE}return p, m, v, v", "v", "twice"),
    bad_return("hyperparameter", f"{HERE}return p, m, v, lr", "lr"),
    bad_return("unknown-name", f"{HERE}return p, m, w", "w"),
    bad_return("expression", f"{HERE}return p - lr * g, m, v", "name", "expression"),
    bad_return("call", f"{HERE}return p, m, abs(v)", "name", "expression", "call"),
    bad_return("list", f"{HERE}return [p, m, v]", "list", "name"),
    bad_return("dict", f'{HERE}return {{"p": p}}', "dict", "name"),
    bad_return("starred", f"{HERE}return p, *state", "star", "*", "name"),
    bad_return("nested-tuple", f"{HERE}return p, (m, v)", "tuple", "name"),
    bad_return("nothing", f"{HERE}return", "value", "nothing", "p"),
    bad_return("none", f"{HERE}return None", "none", "p"),
    bad_return(
        "in-branch",
        f"if nesterov:\n{HERE}    return p, m, v\nreturn p, m, v",
        "if",
        "last",
        "branch",
        text="p, g, m=0.0, v=0.0, *, lr=0.1, nesterov=True",
    ),
    bad_return(
        "only-in-branches",
        "if nesterov:\n    return p, m, v\nelse:\n    return p, m, v",
        "if",
        "last",
        "branch",
        text="p, g, m=0.0, v=0.0, *, lr=0.1, nesterov=True",
    ),
    # Everybody's first mistake: without the star, lr is state.
    bad_return("forgotten-star", f"{HERE}return p, m, v", "lr", text="p, g, m=0.0, v=0.0, lr=0.1"),
]

# Files ----------------------------------------------------------------------------------------------------------------

GOOD = function("p = p - lr * g\nreturn p", signature="p, g, *, lr=0.1")
"""The plainest rule, for files in which something else is wrong."""

PLAIN = GOOD.removeprefix("@rule\n")

FILES = [
    Refused("file-empty", b"", 0, ("hostile",)),
    Refused("file-only-byte-order-mark", b"\xef\xbb\xbf", 0, ("hostile",)),
    Refused("file-only-comment", b"# @rule\n# def hostile(p, g): return p\n", 0, ("hostile",)),
    Refused("file-only-string", f'"""\n{GOOD}"""\n'.encode(), 0, ("hostile",)),
    Refused("file-latin-1", f"# caf\xe9\n{IMPORTS}{GOOD}".encode("latin-1"), 0, ("utf-8", "utf8", "decode", "encod")),
    Refused("file-utf-16", (IMPORTS + GOOD).encode("utf-16"), 0, ("utf-8", "utf8", "decode", "encod", "null", "nul")),
    Refused("file-utf-16-no-mark", (IMPORTS + GOOD).encode("utf-16-le"), 0),
    Refused("file-byte-ff", f"{IMPORTS}{GOOD}# ".encode() + b"\xff\n", 0, ("utf-8", "utf8", "decode", "encod")),
    # Surrogates and overlong forms are not UTF-8, although lenient decoders take them.
    Refused("file-surrogate", f"{IMPORTS}{GOOD}# ".encode() + b"\xed\xa0\x80\n", 0, ("utf-8", "utf8", "decode")),
    Refused("file-overlong", f"{IMPORTS}{GOOD}# ".encode() + b"\xc0\xaf\n", 0, ("utf-8", "utf8", "decode")),
    Refused("file-truncated-character", f"{IMPORTS}{GOOD}# \u20ac".encode()[:-1], 0, ("utf-8", "utf8", "decode")),
    Refused("file-nul", f"{IMPORTS}{GOOD}# \0\n".encode(), 0, ("null", "nul")),
    Refused("file-nul-in-name", (IMPORTS + GOOD).replace("lr", "l\0r").encode(), 0, ("null", "nul")),
    Refused("file-nul-only", b"\0" * 1000, 0, ("null", "nul")),
    Refused("file-elf", b"\x7fELF\x02\x01\x01" + b"\0" * 9 + bytes(range(256)), 0),
    refused("syntax-missing-colon", IMPORTS + f"@rule\n{HERE}def hostile(p, g)\n    return p\n", "syntax", "expected"),
    refused("syntax-incomplete-expression", usual(f"{HERE}p = p - lr *")),
    refused("syntax-stray-parenthesis", usual(f"{HERE}p = p - lr * g)")),
    refused("syntax-open-parenthesis", IMPORTS + function(f"{HERE}p = (p - lr * g\nreturn p", signature="p, g")),
    refused("syntax-in-another-function", IMPORTS + GOOD + f"\n{HERE}def other(:\n    pass\n"),
    refused("syntax-not-python", f"{HERE}int main(void) {{ return 0; }}\n"),
    refused("syntax-assignment-in-if", usual(f"{HERE}if lr = 1:\n    m = g")),
    refused("syntax-assignment-to-call", usual(f"{HERE}sqrt(p) = g")),
    refused("syntax-default-order", IMPORTS + function("return p, g", signature="p=0.0, g", mark=HERE)),
    refused("syntax-two-stars", IMPORTS + function("return p", signature="p, g, *, *, lr=0.1", mark=HERE)),
    refused("syntax-star-without-names", IMPORTS + function("return p", signature="p, g, *", mark=HERE)),
    refused("syntax-typographic-minus", usual(f"{HERE}p = p \u2212 lr * g")),
    refused("syntax-typographic-quotes", usual(f"{HERE}a = \u201cg\u201d")),
    refused("syntax-no-break-space", usual(f"{HERE}p = p -\u00a0lr * g")),
    refused("syntax-zero-width-space", usual(f"{HERE}p = p - l\u200br * g")),
    refused("syntax-end-of-file-character", f"{IMPORTS}{GOOD}{HERE}\x1a"),
    refused("syntax-unterminated-string", usual(f'{HERE}a = "g')),
    refused(
        "syntax-unterminated-docstring",
        IMPORTS + f'@rule\ndef hostile(p, g):\n{HERE}    """Never closed.\n    return p\n',
    ),
    refused("indentation-none", IMPORTS + f"@rule\ndef hostile(p, g):\n{HERE}return p\n"),
    refused("indentation-unexpected", usual(f"a = g\n{HERE}    b = g")),
    refused("indentation-unmatched", IMPORTS + f"@rule\ndef hostile(p, g):\n        p = g\n{HERE}    return p\n"),
    refused("indentation-tabs-and-spaces", IMPORTS + f"@rule\ndef hostile(p, g):\n        p = g\n{HERE}\treturn p\n"),
    refused("rule-missing", IMPORTS + GOOD, "absent", name="absent"),
    refused("rule-missing-other-case", IMPORTS + GOOD, "hostile", name="Hostile"),
    refused("rule-is-number", IMPORTS + "hostile = 3.0\n", "hostile"),
    refused("rule-is-string", IMPORTS + f"hostile = '''\n{GOOD}'''\n", "hostile"),
    refused("rule-is-undecorated", IMPORTS + PLAIN, "rule"),
    refused("rule-is-undecorated-beside-rule", IMPORTS + GOOD.replace("hostile", "other") + PLAIN, "rule"),
    refused("rule-is-lambda", IMPORTS + "hostile = lambda p, g: p\n", "hostile", "lambda"),
    refused("rule-is-wrapped-lambda", IMPORTS + "hostile = rule(lambda p, g: p)\n", "hostile", "lambda"),
    refused("rule-is-class", IMPORTS + "@rule\nclass hostile:\n    pass\n", "hostile", "class"),
    refused("rule-is-async", IMPORTS + "@rule\nasync " + PLAIN, "async"),
    refused("rule-is-module", "import hostile\n", "hostile"),
    refused("rule-is-imported", "from elsewhere import hostile\n", "hostile"),
    refused(
        "rule-redefined-badly",
        IMPORTS + GOOD + function(f"{HERE}while True:\n    p = g\nreturn p", signature="p, g"),
        "while",
        "loop",
    ),
]

# Lines: what precedes the error must not move it ----------------------------------------------------------------------

CULPRIT = function(f"{HERE}p = p - lr * nobody\nreturn p", signature="p, g, *, lr=0.1")


def recoded(item: Refused, *, ends: str = "\n", start: bytes = b"") -> Refused:
    """Return a refused file with other line ends, and with bytes before its first line."""
    source = start + item.source.replace(b"\n", ends.encode())
    return Refused(item.id, source, item.line, item.words, item.name)


LINES = [
    recoded(refused("line-after-crlf", IMPORTS + CULPRIT, "nobody"), ends="\r\n"),
    recoded(refused("line-after-byte-order-mark", IMPORTS + CULPRIT, "nobody"), start=b"\xef\xbb\xbf"),
    # str.splitlines() sees a line end in each of these, Python's tokenizer in none.
    refused(
        "line-after-unicode-line-ends", IMPORTS + "# \u2028 \u2029 \x85 \x0b \x0c \x1c \x1d \x1e\n" + CULPRIT, "nobody"
    ),
    refused("line-after-form-feed", IMPORTS + "\f\n\f" + CULPRIT, "nobody"),
    refused("line-in-long-file", IMPORTS + "# filler\n" * 50_000 + CULPRIT, "nobody"),
    refused("line-after-strings", IMPORTS + 'text = """\n@rule\ndef hostile(p, g):\n"""\n' + CULPRIT, "nobody"),
    refused("line-after-continuation", IMPORTS + "text = \\\n    1\n" + CULPRIT, "nobody"),
    refused(
        "line-inside-expression",
        IMPORTS + function(f"p = p - lr * (\n    g\n{HERE}    + nobody\n)\nreturn p", signature="p, g, *, lr=0.1"),
        "nobody",
    ),
    refused(
        "line-after-wide-characters",
        IMPORTS
        + function(f"{HERE}p = p - lr * (\u540d\u524d + e\u0301 + nobody)\nreturn p", signature="p, g, *, lr=0.1"),
        "\u540d\u524d",
    ),
    refused("line-is-long", usual(f"{HERE}p = p - lr * nobody  # {'x' * 100_000}"), "nobody"),
    refused("line-has-escapes", usual(f"{HERE}p = p - lr * nobody  # \x1b[2J\x1b]0;title\x07\b\b"), "nobody"),
    refused("line-has-markup", usual(f"{HERE}p = p - lr * nobody  # [bold red][/bold red][/] {{0}} %s"), "nobody"),
    refused("line-has-bidi-controls", usual(f"{HERE}p = p - lr * nobody  # \u202e\u2066 desrever \u2069"), "nobody"),
    refused("line-at-end-of-file", IMPORTS + f"@rule\ndef hostile(p, g):\n{HERE}    return nobody", "nobody"),
]

# Depth: more than a recursive reader can take. Python's own parser gives up on most of these, each in its own way -----

DEEP = ("nest", "deep", "depth", "recursion", "complex", "large", "long", "many", "memory", "syntax", "indent")


def too_deep(id: str, body: str, extra: str = "") -> Refused:
    """Refuse a body for its depth; where the reader gives up, and so the line, is open."""
    return refused(f"deep-{id}", usual(body, extra=extra), *DEEP)


DEPTHS = [
    too_deep("parentheses", "p = p - " + "(" * 5000 + "g" + ")" * 5000),
    too_deep("minus", "p = p - " + "-" * 5000 + "g"),
    too_deep("minus-50000", "p = p - " + "-" * 50_000 + "g"),
    too_deep("not", "p = p - (g if " + "not " * 50_000 + "lr > 0 else m)"),
    too_deep("sum", "p = " + " + ".join(["g"] * 100_000)),
    too_deep("product", "p = " + " * ".join(["lr"] * 100_000) + " * g"),
    too_deep("power", "p = p - g * " + "**".join(["lr"] * 5000)),
    too_deep("calls", "p = p - " + "sqrt(" * 3000 + "g" + ")" * 3000),
    too_deep("conditional", "p = p - g * (" + "lr if lr > 1 else " * 20_000 + "lr)"),
    too_deep("elif", 'if mode == "a":\n    m = g\n' + 'elif mode == "b":\n    m = g\n' * 20_000, extra='mode="a"'),
    # The tokenizer ends at 100 levels of indentation.
    too_deep(
        "if",
        "".join(f"{' ' * level}if nesterov:\n" for level in range(150)) + " " * 150 + "m = g",
        extra="nesterov=True",
    ),
    refused("deep-default", IMPORTS + function("return p", signature=f"p, g, *, lr={'-' * 50_000}1"), *DEEP),
    refused("deep-elsewhere", IMPORTS + GOOD + "x = " + "-" * 50_000 + "1\n", *DEEP),
]

REFUSED: list[Refused] = [
    *STATEMENTS,
    *CONDITIONS,
    *EXPRESSIONS,
    *BINDINGS,
    *SIGNATURES,
    *DEFAULTS,
    *RETURNS,
    *FILES,
    *LINES,
    *DEPTHS,
]


# What must be accepted ================================================================================================


def accepted(id: str, text: str, name: str = "hostile") -> Accepted:
    """Encode an accepted file."""
    return Accepted(id, text.encode(), name)


def fair(id: str, body: str, *, states: str = "", extra: str = "") -> Accepted:
    """Accept momentum with a bias correction, preceded by the statements in `body`."""
    return accepted(id, usual(body, states=states, extra=extra))


# Names that C, C++, CUDA, their libraries, Windows, or whoever writes a template would like to keep. Python's own
# keywords among them are dropped: they cannot be names.
VOCABULARIES = {
    "c-keywords": """
        auto break case char const constexpr continue default do double else enum extern false float for goto if inline
        int long nullptr register restrict return short signed sizeof static static_assert struct switch thread_local
        true typedef typeof typeof_unqual union unsigned void volatile while alignas alignof bool asm fortran _Alignas
        _Alignof _Atomic _BitInt _Bool _Complex _Decimal32 _Float16 _Float32 _Float64 _Generic _Imaginary _Noreturn
        _Pragma _Static_assert _Thread_local __asm__ __attribute__ __inline__ __restrict __restrict__ __typeof__
        __extension__ __builtin_sqrt""",
    "c-macros": """
        NULL EOF INFINITY NAN HUGE_VAL HUGE_VALF I complex imaginary errno assert_ offsetof size_t ssize_t ptrdiff_t
        uint8_t uint32_t uint64_t int32_t uintptr_t UINT64_C UINT64_MAX SIZE_MAX INT_MAX FLT_EPSILON DBL_MAX FLT_MAX
        M_PI MIN MAX linux unix i386 __LINE__ __FILE__ __DATE__ __func__ __COUNTER__ __VA_ARGS__ __STDC__ __cplusplus
        _OPENMP _WIN32 NDEBUG stdin stdout stderr signbit isnan isinf isfinite fpclassify va_list va_arg setjmp defined
        define pragma include ifdef endif undef line noreturn omp simd reduction FP_CONTRACT""",
    "cpp-keywords": """
        and_eq bitand bitor catch class char8_t char16_t co_await co_return co_yield compl concept const_cast consteval
        constinit decltype delete dynamic_cast explicit export final friend import module mutable namespace new noexcept
        not_eq operator or_eq override private protected public reinterpret_cast requires static_cast std template this
        throw try typeid typename using virtual wchar_t xor xor_eq""",
    "cuda": """
        threadIdx blockIdx blockDim gridDim warpSize __global__ __device__ __host__ __shared__ __constant__
        __syncthreads __launch_bounds__ __CUDA_ARCH__ __CUDACC__ __noinline__ __forceinline__ float2 float4 double2
        int2 uint3 dim3 half __half __nv_bfloat16 cudaError_t cudaStream_t cudaSuccess atomicAdd __shfl_down_sync
        __fsqrt_rn __fmul_rn __fadd_rn __ddiv_rn __ldg clock clock64 tex1D rsqrt rsqrtf sinpi normf warp block grid
        kernel launch lane_id shared""",
    "libm": """
        y0 y1 yn j0 j1 jn y0f gamma lgamma tgamma signgam sqrtf expf logf tanhf fabs fabsf fmax fmin fmaxf fmod fma pow
        powf pow10 erf cbrt hypot ldexp frexp modf nan nearbyint rint drem exp2 exp10 expm1 log1p log2 sin cos sincos
        sinf copysign copysignf index rindex div labs memcpy memset memmove malloc free alloca abort exit main printf
        puts time clock_t signal kill read write open close link pipe remove rename rand environ stat strlen bzero""",
    "windows": """
        near far min max small huge hyper interface pascal cdecl stdcall WINAPI CALLBACK APIENTRY IN OUT OPTIONAL ERROR
        TRUE FALSE DELETE STRICT BOOL BYTE WORD DWORD CHAR CONST VOID THIS RGB ABSOLUTE RELATIVE NO_ERROR IGNORE
        INFINITE DIFFERENCE NEAR FAR GetObject CreateWindow SendMessage __stdcall __declspec __forceinline __int64""",
    "template": """
        n N i j k a b c d e f h l u w x y z i0 begin end start stop first last low high lo hi count counts size length
        len index offset tensor tensors hyper h_ s chunk chunks chunk_count chunk_size leaf lane lanes row rows thread
        threads thread_count num_threads block_size stride status error err result rc ret out out_ in_ tmp temp value
        values acc accumulator total partial partials scratch workspace self ctx context args data dst src step state
        states steps one two zero half_ p_ g_ P G T p_i g_i m_i p_new p_old p_in p_out p0 g0 f32 f64 _f32 phase phase0
        phase_0 phase_1 pass_ pass_1 update init bool_ scalar_ scalars element elements dtype real real_t ok OK
        hostile hostile_hyper hostile_hyper_init hostile_tensor hostile_tensor_f32 hostile_step hostile_step_f32
        hostile_step_f64 hostile_state_init_f32 hostile_workspace_size hostile_strerror hostile_init hostile_kernel
        HOSTILE HOSTILE_H HOSTILE_OK HOSTILE_ERROR hostile_f32 hostile_maximum maximum_f32 sign_f32 scalar_pow
        one_minus_lr two_lr lr_ lr_f32 lr_t lr0 params stats""",
    "python": """
        rule transform scalar where sqrt abs sign minimum maximum exp log tanh norm sum mean max_abs global_norm
        global_sum np numpy math ctypes cffi ffi Optimizer cls lambda_ lambda__ def_ class_ None_ print eval type match
        case range list dict set id object super function name options hyperparameters state_ doc hash generate save
        load target state_dict load_state_dict skip_nonfinite zero_grads loop caller joinpath""",
    # Suffixes and prefixes of numbers and strings, and words that printf or scanf give for numbers.
    "literals": "f d e E F L U LL ULL u8 R LR u8R x0 e1 e10 b1 inf nan Infinity NaN infinity pi _1 _0 O0 l1",
    "underscores": """
        _ __ ___ _x __x _X _X_ __x__ x_ x__ x___ int int_ int__ n n_ n__ double double_ double__ _int __int lambda_
        _lambda if_ if__ m_ m__ g_ g__ p_ p__ restrict restrict_ this_ this__""",
    # Composed and combining, left to right and right to left, letters that look Latin, and spelled-out twins.
    "unicode": """
        \u03b21 \u03b22 \u03b2_ beta1 beta_1 u03b21 _u03b21 u_03b2 \u03b5 \u03bb \u03bc \u03b7\u0302 x\u0301 \u00e9
        e\u0301\u0301 na\u00efve \u00f1 \u00df \u00f8 \u540d\u524d \u52fe\u914d \u0645\u0639\u062f\u0644
        \u0921\u0947\u0932\u094d\u091f\u093e \u2118 l\u00b7l \u2135 \u0434 \u0440 \u0441 \U00010400""",
}


def names_of(vocabulary: str, *, without: tuple[str, ...] = ()) -> list[str]:
    """Return the names in a vocabulary that Python allows, once each."""
    names = dict.fromkeys(VOCABULARIES[vocabulary].split())
    return [name for name in names if not keyword.iskeyword(name) and name not in without]


def as_states(names: list[str]) -> str:
    """Return a rule that has these names as states of one value per element."""
    updates = "\n".join(f"{name} = 0.9 * {name} + 0.1 * g\np = p - lr * {name}" for name in names)
    states = ", ".join(f"{name}=0.0" for name in names)
    return IMPORTS + function(f"{updates}\nreturn p, {', '.join(names)}", signature=f"p, g, {states}, *, lr=0.1")


def as_scalar_states(names: list[str]) -> str:
    """Return a rule that has these names as states of one value per tensor."""
    updates = "\n".join(f"{name} = {name} + 1\np = p - lr / {name} * g" for name in names)
    states = ", ".join(f"{name}: scalar = 0.0" for name in names)
    return IMPORTS + function(f"{updates}\nreturn p, {', '.join(names)}", signature=f"p, g, {states}, *, lr=0.1")


def as_hyperparameters(names: list[str]) -> str:
    """Return a rule that has these names as hyperparameters, used as they are and in scalar expressions."""
    updates = "\n".join(f"p = p - {name} * g - (1 - {name}) * g" for name in names)
    defaults = ", ".join(f"{name}=0.5" for name in names)
    return IMPORTS + function(f"{updates}\nreturn p", signature=f"p, g, *, {defaults}")


def as_locals(names: list[str]) -> str:
    """Return a rule that has these names as locals: scalars, elements, and elements bound again."""
    updates = "\n".join(
        (
            f"{name} = 2 * lr\np = p - {name} * g",
            f"{name} = lr * g\np = p - {name}",
            f"{name} = g\n{name} = {name} * {name}\np = p - {name}",
        )[index % 3]
        for index, name in enumerate(names)
    )
    return IMPORTS + function(f"{updates}\nreturn p", signature="p, g, *, lr=0.1")


NAMES = [
    accepted(f"names-{vocabulary}-as-{role}", text)
    for vocabulary in VOCABULARIES
    for role, text in (
        ("states", as_states(names_of(vocabulary))),
        ("scalar-states", as_scalar_states(names_of(vocabulary))),
        ("hyperparameters", as_hyperparameters(names_of(vocabulary, without=RESERVED))),
        ("locals", as_locals(names_of(vocabulary))),
    )
]

# A rule's name becomes a prefix of C names and a file name: math.h and string.h must not get in anyone's way.
RULE_NAMES = """
    int double float size_t auto new delete template this operator namespace export restrict errno linux unix NULL I
    math string stdint stddef stdlib stdio omp std main con nul aux near min max y0 gamma sqrtf assert_ begin end count
    status self n i p g t lr m v rule scalar sqrt where params step match type _ __ _hidden __init__ Hostile HOSTILE h c
    cu cuda_runtime threadIdx kernel hyper tensors sgd adam \u03b2 \u66f4\u65b0 na\u00efve lambda_ int_ int__ x86_64 e1
    f32 hostile_f32
"""

RULES = [
    accepted(
        f"rule-name-{name}",
        IMPORTS
        + function("m = 0.9 * m + g\np = p - lr * m\nreturn p, m", signature="p, g, m=0.0, *, lr=0.1", name=name),
        name,
    )
    for name in RULE_NAMES.split()
]


def bold(word: str) -> str:
    """Return a lower-case word in mathematical bold letters."""
    return "".join(chr(ord(letter) - ord("a") + 0x1D41A) for letter in word)


COLLISIONS = [
    # The C name of a helper is free only where no author has taken it.
    fair("local-named-like-hoisted", "one_minus_beta = beta - 1\np = p - one_minus_beta * g * (1 - beta)"),
    fair("element-named-like-hoisted", "one_minus_beta = beta * g\np = p - one_minus_beta * (1 - beta)"),
    fair("state-named-like-hoisted", "p = p - beta_pow_t * beta**t", states="beta_pow_t=0.0"),
    fair(
        "hyperparameter-named-like-hoisted",
        "p = p - (1 - beta**t) * g * one_minus_beta_pow_t",
        extra="one_minus_beta_pow_t=0.5",
    ),
    fair(
        "underscores-across-roles",
        "int__ = int_ * g\nint = int + int__\np = p - int",
        states="int=0.0",
        extra="int_=0.5",
    ),
    fair("underscores-across-roles-n", "n__ = n * g\nn_ = n_ + n__\np = p - n_", states="n_=0.0", extra="n=0.5"),
    fair(
        "versions-named-like-locals",
        "a = lr\na_1 = 2 * a\na = a_1 + a\na_2 = a * a_1\na = a_2 + a\np = p - (a + a_1 + a_2) * g",
    ),
    fair("case-only", "p = p - M * Lr * g", states="M=0.0", extra="Lr=0.5, LR=0.5"),
    fair(
        "functions-shadowed-and-not-called", "sqrt = g * g\nabs = 2 * lr\np = p - abs * sqrt * where", extra="where=0.5"
    ),
    fair("greek-beside-spelled-out", "p = p - \u03b2 * beta * u03b2 * g", extra="\u03b2=0.5, u03b2=0.5"),
    # Python reads both spellings as one name: full-width p, the ligature fi, the micro sign, a combining accent.
    fair("normalised-parameter", "\uff50 = p - lr * \uff47\np = \uff50"),
    fair("normalised-ligature", "\ufb01 = g\np = p - fi"),
    fair("normalised-micro", "p = p - \u03bc * g", extra="\u00b5=0.5"),
    fair("normalised-accent", "e\u0301 = g\np = p - \u00e9"),
    fair("normalised-state", "p = p - \U0001d465", states="x=0.0"),
    # Bold letters: identifiers to Python, which afterwards spells them as its own keywords, and as those of C.
    fair(
        "normalised-to-keywords",
        f"{bold('return')} = {bold('for')} * g\np = p - lr * {bold('return')}",
        extra=f"{bold('for')}=0.5",
    ),
    fair(
        "long-names",
        f"p = p - {'a' * 99}b - {'a' * 99}c * {'d' * 100}",
        states=f"{'a' * 99}b=0.0, {'a' * 99}c=0.0",
        extra=f"{'d' * 100}=0.5",
    ),
    fair("reserved-as-state-and-local", "step = state + g\nparams = 2 * lr\np = p - params * step", states="state=0.0"),
]

# Docstrings end up in C comments, in templates, on terminals and in file encodings ------------------------------------


def documented(id: str, text: str) -> Accepted:
    """Accept a rule whose docstring has this value, written with escapes."""
    return fair(f"docstring-{id}", ascii(text))


def written(id: str, literal: str) -> Accepted:
    """Accept a rule whose docstring is this literal."""
    return fair(f"docstring-{id}", literal)


DOCSTRINGS = [
    documented("ends-comment", "Formula: m */ int injected = 1; /* end."),
    documented("starts-comment", "Outer /* inner /* innermost."),
    documented("line-comment", "See // below."),
    documented("starts-with-slash", "/ and so\n/ on each line\n/"),
    documented("ends-with-star", "m * g *\n*\n**\n*"),
    documented("preprocessor", 'Text.\n#include "/etc/passwd"\n#error no\n#pragma omp parallel\n# define p q'),
    documented("preprocessor-after-comment", 'Text */\n#include "/etc/passwd"\n#error no\n/* more.'),
    documented("template-expression", "{{ 7*7 }} {{ self.__init__.__globals__ }}"),
    documented("template-raw", "{% raw %} {{ 7*7 }} {# gone #} {% endraw %}"),
    documented("template-open", "{% {{ {# %} }} #} {%- if"),
    documented("template-line-statement", "# for x in y\n## comment\n% include 'x'"),
    documented("trigraph", "Really ??/\nnext ??) line"),
    documented("trigraph-splits-comment-end", "m *??/\n/ int injected;"),
    documented("backslash-at-line-end", "one \\\ntwo \\\nthree \\"),
    # A backslash before a line end joins the lines before comments are found.
    documented("backslash-splits-comment-end", "m *\\\n/ int injected; /\\\n* n"),
    documented("nul", "before\0after"),
    documented("control-characters", "".join(map(chr, range(1, 32))) + "\x7f\x80\x9f"),
    documented("line-ends", "a\rb\r\nc\vd\fe\x1cf\x85g\u2028h\u2029i*/"),
    documented("terminal-escapes", "\x1b[2J\x1b]0;title\x07 \x1b[31mred"),
    documented("markup", "[bold]m[/bold] [/] p[g] [link=file:///etc/passwd]x[/link]"),
    documented("bidi-controls", "\u202e\u2066 */ \u2069 \u202c \u200f"),
    # No encoding can write a lone surrogate.
    documented("surrogate", "half \ud800 a character \udc80"),
    documented("not-a-character", "\ufeff \ufffe \uffff \U0010ffff"),
    documented("triple-quotes", '""" and \'\'\' and \\"\\"\\"'),
    documented("printf", "%s %n %d %% {} {0} {name} $HOME `true` $(true) ${HOME}"),
    documented("long-line", "x" * 100_000),
    documented("long-line-of-words", "x */ " * 20_000),
    documented("many-lines", "line\n" * 10_000),
    documented("blank", " \n\t\n  "),
    documented("empty", ""),
    documented("only-comment-end", "*/"),
    documented("html", "<script>alert(1)</script> &lt; <!-- --> ]]>"),
    # An escape that Python does not know is worth a warning there, and LaTeX in a docstring is full of them.
    written("unknown-escapes", '"""Uses \\partial L / \\partial p, \\hat{m}, \\d and \\beta."""'),
    written("raw", 'r"""Backslash \\\nat line end, and \\x00 that is none. */"""'),
    written("raw-non-ascii", '"""\u03b2\u2081 \u2264 1, na\u00efve, \u540d\u524d, \u202e*/\u202c."""'),
    written("joined", "'one */ ' \"two\" '''\n    three'''"),
    written("ragged", '"""First.\n  Less indented\n          more\nnot at all */\n    """'),
    written("named-characters", r'"""\N{GREEK SMALL LETTER BETA} \u2028 \U0001F600"""'),
    written("line-continuation", '"""One \\\n    line."""'),
]

# Values of options are strings as well, and reach comments and messages.
OPTIONS = [
    fair(f"option-{id}", f"if mode == {value!a}:\n    m = m + g", extra=f"mode={value!a}")
    for id, value in (
        ("ends-comment", "*/ int injected; /*"),
        ("quotes", "\"'\\"),
        ("newline", 'a\n#error "no"\n'),
        ("template", "{{ 7*7 }}{% raw %}"),
        ("nul", "a\0b"),
        ("surrogate", "\ud800"),
        ("non-ascii", "\u03b2\u202e"),
        ("empty", ""),
        ("long", "x" * 10_000),
    )
]

# Modules: nothing in them may run -------------------------------------------------------------------------------------

MODULES = [
    accepted(f"module-{id}", f"import os\nimport sys\n{IMPORTS}{before}\n\n{GOOD}\n{after}\n")
    for id, before, after in (
        ("writes-file", WRITE_MARKER, WRITE_MARKER),
        ("runs-command", 'os.system("touch $HOSTILE_MARKER")', ""),
        ("raises", 'raise RuntimeError("executed")', ""),
        ("raises-after", "", 'raise RuntimeError("executed")'),
        ("exits", "sys.exit(3)", "sys.exit(3)"),
        ("exits-hard", "os._exit(3)", "os._exit(3)"),
        ("kills", "os.kill(os.getpid(), 9)", ""),
        ("loops", "while True:\n    pass", ""),
        ("recurses", "def again():\n    again()\n\n\nagain()", ""),
        ("takes-memory", "x = [0] * 10**15\ny = 9**9**9**9", ""),
        ("fails", "assert False\nx = 1 / 0\nundefined_name", ""),
        ("imports-missing", "import no_such_module_anywhere\nfrom . import nothing", ""),
        ("decorates-other", f"def evil(function):\n    {WRITE_MARKER}\n\n\n@evil\ndef other():\n    pass", ""),
        ("decorates-with-lambda", f"@(lambda f: {WRITE_MARKER})\ndef other():\n    pass", ""),
        ("defaults-of-other", f"def other(x={WRITE_MARKER}):\n    pass", ""),
        ("annotations-of-other", f"def other(x: {WRITE_MARKER}) -> {WRITE_MARKER}:\n    pass", ""),
        ("class-body", f"class Evil:\n    {WRITE_MARKER}", ""),
        (
            "metaclass",
            f"class Meta(type):\n    def __new__(*a):\n        {WRITE_MARKER}\n\nclass Evil(metaclass=Meta):\n    pass",
            "",
        ),
        ("comprehension", f"[{WRITE_MARKER} for _ in range(1)]", ""),
        ("formatted-string", f"f'''{{{WRITE_MARKER}}}'''", ""),
        ("at-exit", f"import atexit\n\natexit.register(lambda: {WRITE_MARKER})", ""),
        ("hooks", f"def __getattr__(name):\n    {WRITE_MARKER}\n\n\ndef __dir__():\n    {WRITE_MARKER}", ""),
        ("replaces-builtins", "import builtins\n\nbuiltins.open = builtins.len = None\nsys.setrecursionlimit(5)", ""),
        ("main-guard", "", f'if __name__ == "__main__":\n    {WRITE_MARKER}'),
        ("reads-input", "input()\nsys.stdin.read()", ""),
        ("exec", f"exec({WRITE_MARKER!r})\neval({WRITE_MARKER!r})\ncompile({WRITE_MARKER!r}, '', 'exec')", ""),
        (
            "other-rules-broken",
            function("for i in p:\n    pass", signature="x, *y", name="other")
            + function("return 1", signature="", name="another"),
            function("import os\nos.system()", signature="q=lambda: 1", name="third"),
        ),
        (
            "other-rule-has-bad-default",
            function("return p", signature=f"p, g, *, threads={WRITE_MARKER}", name="other"),
            "",
        ),
        ("other-rule-overflows", function("return p", signature="p, g, *, lr=9**9**9**9", name="other"), ""),
        ("rule-defined-twice", function("while True:\n    p = g", signature="x"), ""),
        (
            "rule-defined-three-times",
            "hostile = 3\n\n" + function("return p", signature="p, g, *, lr=None") + "class hostile:\n    pass",
            "",
        ),
    )
]

# How a file is written ------------------------------------------------------------------------------------------------

TIDY = usual('"""Momentum."""\na = g * g\np = p - lr * a')

FILLER = "".join(
    function("m = m + g\np = p - lr * m\nreturn p, m", signature="p, g, m=0.0, *, lr=0.1", name=f"filler_{index}")
    for index in range(2000)
)

TEXTS = [
    Accepted("text-crlf", TIDY.replace("\n", "\r\n").encode()),
    Accepted("text-mixed-line-ends", TIDY.replace("\n", "\r\n", 5).encode()),
    Accepted("text-byte-order-mark", b"\xef\xbb\xbf" + TIDY.encode()),
    Accepted("text-byte-order-mark-and-crlf", b"\xef\xbb\xbf" + TIDY.replace("\n", "\r\n").encode()),
    accepted("text-tabs", TIDY.replace("    ", "\t")),
    accepted("text-one-space", TIDY.replace("    ", " ")),
    accepted("text-form-feeds", TIDY.replace("    ", "\f    ").replace("@rule", "\f@rule")),
    accepted("text-no-final-newline", TIDY.rstrip("\n")),
    accepted("text-many-final-newlines", TIDY + "\n" * 10_000),
    accepted("text-trailing-space", TIDY.replace("\n", "   \n")),
    accepted("text-coding-comment", "# -*- coding: utf-8 -*-\n" + TIDY),
    accepted("text-script-line", "#!/usr/bin/env python3\n" + TIDY),
    *(
        accepted(f"annotation-{id}", IMPORTS + function("m = m + g\np = p - lr * m\nreturn p, m", signature=text))
        for id, text in {
            "float": "p, g, m: float = 0.0, *, lr: float = 0.1",
            "attribute": "p: np.ndarray, g: np.ndarray, m: np.ndarray = 0.0, *, lr: np.float64 = 0.1",
            "subscript": "p, g, m: list[float] = 0.0, *, lr=0.1",
            "call": f"p: {WRITE_MARKER}, g, m: {WRITE_MARKER} = 0.0, *, lr: {WRITE_MARKER} = 0.1",
        }.items()
    ),
    accepted("text-future-import", "from __future__ import annotations\n" + TIDY),
    accepted("text-module-docstring", '"""A module */ {{ 7*7 }}."""\n' + TIDY),
    accepted("text-one-line", IMPORTS + "@rule\ndef hostile(p, g, *, lr=0.1): p = p - lr * g; return p\n"),
    accepted("text-semicolons", usual("a = g; b = a * lr; p = p - b;")),
    accepted("text-continuations", usual("a = \\\n        g \\\n        * \\\n        lr\np = p - a")),
    accepted("text-parenthesised-lines", usual("a = (\n  g\n# comment */\n\n        * lr\n)\np = (p -\na)")),
    accepted("text-compact", usual("a=g*lr;p=p-a*(g if lr>0 else m)")),
    accepted("text-middle-of-large-file", IMPORTS + FILLER + TIDY.removeprefix(IMPORTS) + FILLER),
    accepted("text-after-long-comment", f"# {'x' * 500_000}\n" + TIDY),
    accepted("text-after-many-lines", "\n" * 100_000 + TIDY),
    accepted(
        "text-decoys", IMPORTS + f"text = '''\n{GOOD}'''\n# {GOOD.splitlines()[1]}\n" + TIDY.removeprefix(IMPORTS)
    ),
    accepted(
        "text-comments-everywhere",
        IMPORTS
        + textwrap.dedent('''
            # @rule def hostile(): */ {{ 7*7 }}
            @rule  # noqa /*
            # between decorator and def
            def hostile(  # type: ignore
                p,  # the parameter */
                g,  # {% raw %}
                # nothing here
                m=0.0,  # \\
                *,  # ??/
                # "
                lr=0.1,  # \'\'\' """
                nesterov=True,
            ):  # -> None
                # before the docstring
                """Momentum."""  # after it
                # {{ 7*7 }}
                if nesterov:  # if
                    # only a comment first
                    m = (  # open
                        m  # m
                        + g  # g
                    )  # close
                # dedented comment
                else:
                    m = g  # never
            # not indented at all
                p = p - lr * m  # #include "/etc/passwd"
                return p, m  # return
                # after the return
            # after the rule
            ''').lstrip("\n"),
    ),
]

# Sizes, numbers and shapes --------------------------------------------------------------------------------------------

EXTREMES = (
    "1e-320",
    "5e-324",
    "2.2250738585072014e-308",
    "1.7976931348623157e308",
    "1.401298464324817e-45",
    "1e-46",
    "1.1754943508222875e-38",
    "3.4028234663852886e38",
    "3.4028235677973366e38",
    "1e39",
    "1e300",
    "0.1",
    "0.0",
    "-0.0",
    "16777217",
    "9007199254740992",
    "0x20000000000000",
    "1_000_000.000_1",
    "0b1010",
    "0o17",
    "5.",
    ".5",
    "1E5",
)
"""Numbers that are awkward to print, or to round to float32."""

SIZES = [
    fair(
        "size-60-states",
        "\n".join(f"s{i} = s{i} * beta + g\np = p - lr * s{i}" for i in range(60)),
        states=", ".join(f"s{i}=0.{i + 1}" for i in range(60)),
    ),
    fair(
        "size-60-scalar-states",
        "\n".join(f"s{i} = s{i} + {i}\np = p - lr / s{i} * g" for i in range(60)),
        states=", ".join(f"s{i}: scalar = 1.0" for i in range(60)),
    ),
    fair(
        "size-60-hyperparameters",
        "\n".join(f"p = p - h{i} * g" for i in range(60)),
        extra=", ".join(f"h{i}={i}" for i in range(60)),
    ),
    fair(
        "size-200-elements",
        "x0 = g\n" + "\n".join(f"x{i + 1} = x{i} * beta + g" for i in range(199)) + "\np = p - x199",
    ),
    fair(
        "size-200-scalars",
        "x0 = lr\n" + "\n".join(f"x{i + 1} = x{i} * beta + {i}" for i in range(199)) + "\np = p - x199 * g",
    ),
    fair("size-200-rebindings", "a = g\n" + "a = a * beta + g\n" * 99 + "p = p - a\n" * 99 + "p = p - a"),
    fair("size-200-scalar-rebindings", "a = lr\n" + "a = a * beta + lr\n" * 199 + "p = p - a * g"),
    fair(
        "size-20-options",
        "\n".join(f"if o{i}:\n    m = m + {i} * g" for i in range(20)),
        extra=", ".join(f"o{i}={i % 2 == 0}" for i in range(20)),
    ),
    fair(
        "size-40-branches",
        'if mode == "b0":\n    m = g\n' + "\n".join(f'elif mode == "b{i}":\n    m = m + {i} * g' for i in range(1, 40)),
        extra='mode="b20"',
    ),
    fair("depth-20-parentheses", f"p = p - {'(' * 20}lr{')' * 20} * g"),
    fair("depth-20-sums", f"p = p - {'(g + ' * 20}m{')' * 20}"),
    fair("depth-20-differences", f"p = p - {'(g - ' * 20}m{')' * 20}"),
    fair("depth-20-minus", f"p = p {'- ' * 21}g"),
    fair("depth-20-calls", f"p = p - {'sqrt(abs(' * 10}g{'))' * 10}"),
    fair("depth-20-where", "p = p - " + "".join(f"where(g > {i}, {i} * m, " for i in range(20)) + "g" + ")" * 20),
    fair("depth-20-conditionals", "p = p - g * (" + "".join(f"lr if lr > {i} else " for i in range(20)) + "beta)"),
    fair("depth-20-powers", "p = p - g * (" + "**".join(["beta"] * 20) + ")"),
    fair("chain-20-divisions", "p = p - g * (" + " / ".join(["beta"] * 20) + ")"),
    fair("depth-20-not", f"p = p - g * (lr if {'not ' * 20}lr > 1 else beta)"),
    fair("depth-20-comparisons", f"p = p - g * (lr if {' < '.join(str(i) for i in range(20))} < t else beta)"),
    fair(
        "depth-20-if",
        "".join(f"{' ' * level}if nesterov:\n" for level in range(20)) + " " * 20 + "m = m + g",
        extra="nesterov=True",
    ),
    fair(
        "numbers-as-hyperparameters",
        "\n".join(f"p = p - h{i} * g" for i in range(len(EXTREMES))),
        extra=", ".join(f"h{i}={number}" for i, number in enumerate(EXTREMES)),
    ),
    fair(
        "numbers-as-initial-values",
        "\n".join(f"p = p - s{i} - k{i} * g" for i in range(len(EXTREMES))),
        states=", ".join(f"s{i}={number}, k{i}: scalar = {number}" for i, number in enumerate(EXTREMES)),
    ),
    fair(
        "numbers-meet-elements",
        "\n".join(f"p = p - {number} * g\np = where(g > {number}, -{number}, p)" for number in EXTREMES),
    ),
    fair("numbers-in-scalars", "\n".join(f"p = p - g * (lr - {number} - 1)" for number in EXTREMES)),
    fair("number-bound-to-state", "k = 1e300\nv = 1e300\np = p - v * k", states="k: scalar = 0.0, v=0.0"),
    fair(
        "arithmetic-in-defaults",
        "p = p - a * b * c * d * g",
        extra="a=1 - 1e-8, b=-(1 / 3), c=2**-10, d=(1 + 2) * 3 - 4",
    ),
    # Two literals, of which the exact value of the sum is not a double.
    fair("arithmetic-in-doubles", "p = p - a * g * (9007199254740992 + 1)", extra="a=9007199254740992 + 1"),
    fair("initial-arithmetic", "p = p - s", states="s=-(1 - 1e-8) / 3"),
    fair("initial-strings", "p = p - a - b - c", states='a="p", b="g", c="lr"'),
    fair("hyperparameters-unused", "a = g", extra="unused=1.0, also_unused=5e-324, flag=True, word='x'"),
    fair("local-unused", "a = g * lr\nb = 2 * lr\nc = a * b"),
    fair("state-written-not-read", "last = g", states="last=0.0"),
    fair("state-never-touched", "a = g", states="idle=0.0, idle_scalar: scalar = 0.0"),
    fair(
        "state-touched-in-untaken-branch",
        "if nesterov:\n    m = m + s\n    s = g",
        states="s=0.0",
        extra="nesterov=False",
    ),
    fair("state-bound-to-scalar", "v = 2 * lr\np = p - v", states="v=0.0"),
    fair("states-swapped", "old = m\nm = v\nv = old", states="v=0.0"),
    fair("scalar-states-swapped", "old = a\na = b\nb = old\np = p - a * g", states="a: scalar = 1.0, b: scalar = 2.0"),
    fair("parameter-kept", "previous = p\np = p - lr * g\np = p + beta * (p - previous)"),
    fair("gradient-rebound", "g = g + 0.1 * p\ng = where(g > 1, 1, g)"),
    fair("scalar-name-becomes-element", "a = 2 * lr\np = p - a * g\na = a * g\np = p - a"),
    fair("element-name-becomes-scalar", "a = g * g\np = p - a\na = 2 * lr\np = p - a * g"),
    # What is not chosen is not evaluated: at the first step t - 1 is zero.
    fair("untaken-division", "p = p - g * (1 / (t - 1) if t > 1 else 0.0)"),
    fair("lazy-division", "p = p - g * (0.5 if t > 1 and 1 / (t - 1) > 0.1 else lr)"),
    fair("untaken-power", "p = p - g * ((t - 5) ** 0.5 if t > 5 else lr)"),
    fair("conditional-elements", "p = p - (g if 0 < t <= 10 or not lr > 1 else m)"),
    fair("scalar-remainder", "p = p - g * (-t % 3) * (t % 2)"),
    fair("element-powers", "p = p - g**2 - abs(g) ** 0.5 - (g * g + 1) ** -1"),
    fair("assertions", "assert 0 <= beta < 1 and not lr < 0 or lr != lr\nassert lr == 0 or 1 / lr > 0"),
    fair("constant-elements", "p = p - where(g > 0, 1.2, 0.5) * where(g == 0, -0.0, 0)"),
]

ACCEPTED: list[Accepted] = [
    *NAMES,
    *RULES,
    *COLLISIONS,
    *DOCSTRINGS,
    *OPTIONS,
    *MODULES,
    *TEXTS,
    *SIZES,
]
