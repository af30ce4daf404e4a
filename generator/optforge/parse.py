"""Text to Definition: find a rule in a file, check its signature and the shape of its body. Nothing is executed."""

from __future__ import annotations

import ast
import hashlib
import math
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .diagnostics import Diagnostic, RuleError, Text, UsageError, nearest, printable
from .functions import IMPORTABLE
from .ir import State

RESERVED = frozenset(
    [
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
    ]
)
LARGEST_INTEGER = 2**53
DEEPEST_NESTING = 150


@dataclass(frozen=True)
class Definition:
    """A rule as written: what its signature declares, and its body as syntax.

    `aliases` maps names that the file imports to the language's own names.
    """

    name: str
    doc: str
    text: Text
    node: ast.FunctionDef
    body: tuple[ast.stmt, ...]
    state: tuple[State, ...]
    hyperparameters: Mapping[str, float]
    options: Mapping[str, bool | str]
    time: bool
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def formulas(self) -> str:
        """The author's own lines, from the first statement behind the docstring to the return, dedented."""
        statements = self.body[:-1]
        if not statements:
            return ""
        first, last = statements[0].lineno, statements[-1].end_lineno
        if first == self.node.lineno or last == self.body[-1].lineno:  # several statements share a line
            return "\n".join(ast.unparse(statement) for statement in statements)
        return textwrap.dedent("\n".join(self.text.lines[first - 1 : last]).expandtabs(4))

    @property
    def hash(self) -> str:
        """SHA-256 over the parsed form: comments, docstring and layout do not change it, nor does Python's version."""
        parsed = canonical([self.node.name, self.node.args, list(self.body)], self.aliases)
        return hashlib.sha256(parsed.encode()).hexdigest()


def canonical(node: object, aliases: Mapping[str, str] = {}) -> str:
    """A syntax tree as text, without positions and without fields that differ between versions of Python."""
    if isinstance(node, list):
        return f"[{','.join(canonical(item, aliases) for item in node)}]"
    if isinstance(node, ast.Name):
        return f"Name({aliases.get(node.id, node.id)})"
    if isinstance(node, ast.AST):
        fields = (
            f"{name}={canonical(value, aliases)}"
            for name, value in ast.iter_fields(node)
            if name not in ("ctx", "kind", "type_comment", "type_params") and value not in (None, [])
        )
        return f"{type(node).__name__}({','.join(fields)})"
    return repr(node)


class Reporter:
    """Collects the diagnostics of one rule."""

    def __init__(self, text: Text):
        self.text = text
        self.diagnostics: dict[tuple[int, int, str], Diagnostic] = {}

    def error(self, node: ast.AST, message: str, hint: str = "") -> None:
        """Record an error at a node; the same one twice counts once."""
        line: int = getattr(node, "lineno", 1)
        column = self.text.column(line, getattr(node, "col_offset", 0))
        end = 0
        if getattr(node, "end_lineno", None) == line:
            end = self.text.column(line, getattr(node, "end_col_offset", 0))
        diagnostic = Diagnostic(line, column, printable(message), hint, end, self.text)
        self.diagnostics.setdefault((line, column, message), diagnostic)

    def check(self) -> None:
        """Raise RuleError if anything was recorded."""
        if self.diagnostics:
            raise RuleError(sorted(self.diagnostics.values(), key=lambda d: (d.line, d.column)))


def read(path: Path) -> Text:
    """The text of a rule file."""
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise UsageError(f"{path}: {(problem.strerror or str(problem)).lower()}") from None
    try:
        source = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data[: problem.start].count(b"\n") + 1
        column = problem.start - (data.rfind(b"\n", 0, problem.start) + 1) + 1
        message = f"byte 0x{data[problem.start]:02x} is not UTF-8"
        hint = "save the file as UTF-8"
        raise RuleError([Diagnostic(line, column, message, hint, text=Text(str(path), ()))]) from None
    return Text(str(path), tuple(source.replace("\r\n", "\n").replace("\r", "\n").split("\n")))


def syntax(text: Text) -> ast.Module:
    """The syntax tree of a file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a docstring may say \\partial
            return ast.parse("\n".join(text.lines))
    except SyntaxError as problem:
        line, offset, end = problem.lineno or 1, problem.offset or 1, problem.end_offset or 0
        if problem.end_lineno != line:
            end = 0
        raise RuleError([Diagnostic(line, max(offset, 1), problem.msg, end=end, text=text)]) from None
    except ValueError:
        line = next((k for k, source in enumerate(text.lines, 1) if "\0" in source), 1)
        column = text.at(line).find("\0") + 1
        raise RuleError([Diagnostic(line, max(column, 1), "the file contains a NUL byte", text=text)]) from None
    except (RecursionError, MemoryError):
        line = max(range(len(text.lines)), key=lambda k: len(text.lines[k])) + 1
        raise RuleError([Diagnostic(line, 1, "nested too deeply", NESTING_HINT, text=text)]) from None


NESTING_HINT = "give intermediate results names, a line each"


def parse_file(path: Path, name: str) -> Definition:
    """The rule of this name at the top level of a file.

    Raises
    ------
    RuleError
        The file or the rule was refused.
    UsageError
        There is no such file, or no such rule in it.
    """
    text = read(path)
    tree = syntax(text)
    aliases = imports(tree)
    found = None
    for statement in top_level(tree.body):
        if name in bound(statement):
            found = statement
    if found is None:
        rules = [s.name for s in top_level(tree.body) if isinstance(s, ast.FunctionDef) and is_rule(s, aliases)]
        there = f"; its rules are: {', '.join(rules)}" if rules else "; it holds no rules"
        raise UsageError(f"{path} has no rule {name!r}{nearest(name, rules) or there}")
    if not isinstance(found, ast.FunctionDef) or not is_rule(found, aliases):
        reporter = Reporter(text)
        what = "is not decorated with @rule" if isinstance(found, ast.FunctionDef) else "is not a rule"
        reporter.error(found, f"{name!r} {what}", "a rule is a function under @rule (from optforge import rule)")
        reporter.check()
    assert isinstance(found, ast.FunctionDef)
    return define(found, text, tree)


def parse_function(text: Text, name: str, line: int) -> Definition:
    """The rule whose function, or its first decorator, starts at this line."""
    tree = syntax(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            if first == line and getattr(node, "name", "<lambda>") == name:
                if isinstance(node, ast.FunctionDef):
                    return define(node, text, tree)
                reporter = Reporter(text)
                reporter.error(node, f"{name!r} is not a plain function", "a rule is a `def` under @rule")
                reporter.check()
    message = f"the text of rule {name!r} is not here"
    hint = "the file has changed since it was imported; start again"
    raise RuleError([Diagnostic(line, 1, message, hint, text=text)])


def top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, those under a top-level `if` or `try` included."""
    for statement in body:
        yield statement
        if isinstance(statement, (ast.If, ast.Try)):
            yield from top_level(statement.body)
            yield from top_level(statement.orelse)
        if isinstance(statement, ast.Try):
            for handler in statement.handlers:
                yield from top_level(handler.body)


def bound(statement: ast.stmt) -> list[str]:
    """The names that a module-level statement binds."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [name.asname or name.name.partition(".")[0] for name in statement.names]
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)):
        targets = [statement.target]
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


def imports(tree: ast.Module) -> dict[str, str]:
    """What the file calls the names that it imports from optforge: `from optforge import sqrt as root`."""
    return {
        name.asname: name.name
        for statement in ast.walk(tree)
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").partition(".")[0] == "optforge"
        for name in statement.names
        if name.asname
    }


def is_rule(node: ast.FunctionDef, aliases: Mapping[str, str]) -> bool:
    """Whether the function stands under @rule."""
    return any(names_rule(decorator, aliases) for decorator in node.decorator_list)


def names_rule(decorator: ast.expr, aliases: Mapping[str, str]) -> bool:
    """Whether a decorator is @rule, however the file names it."""
    if isinstance(decorator, ast.Attribute):
        return decorator.attr == "rule" and isinstance(decorator.value, ast.Name)
    return isinstance(decorator, ast.Name) and aliases.get(decorator.id, decorator.id) == "rule"


def define(node: ast.FunctionDef, text: Text, tree: ast.Module) -> Definition:
    """Check everything of a rule that does not depend on types, and gather what it declares."""
    reporter = Reporter(text)
    depth, deepest = nesting(node)
    if depth > DEEPEST_NESTING:
        reporter.error(deepest, "nested too deeply", NESTING_HINT)
        reporter.check()
    aliases = imports(tree)
    for decorator in node.decorator_list:
        if not names_rule(decorator, aliases):
            reporter.error(decorator, "a rule has no decorator but @rule")
    shadowed(node, tree, reporter)

    body = list(node.body)
    doc = ""
    if (
        isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
        and isinstance(body[0].value.value, str)
    ):
        doc = ast.get_docstring(node) or ""
        body = body[1:]
    signature = Signature(node, reporter)
    check_return(node, body, [state.name for state in signature.state], reporter)
    reporter.check()
    return Definition(
        node.name,
        doc,
        text,
        node,
        tuple(body),
        tuple(signature.state),
        signature.hyperparameters,
        signature.options,
        signature.time,
        aliases,
    )


def nesting(node: ast.AST) -> tuple[int, ast.AST]:
    """The depth of a syntax tree, and a node there that has a position."""
    depth, deepest = 0, node
    stack: list[tuple[ast.AST, int, ast.AST]] = [(node, 0, node)]
    while stack:
        current, level, place = stack.pop()
        if hasattr(current, "lineno"):
            place = current
        if level > depth:
            depth, deepest = level, place
        stack += [(child, level + 1, place) for child in ast.iter_child_nodes(current)]
    return depth, deepest


def shadowed(node: ast.FunctionDef, tree: ast.Module, reporter: Reporter) -> None:
    """Refuse a module-level definition that takes the name of a function that the rule calls."""
    called = {n.func.id: n for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    for statement in top_level(tree.body):
        for name in bound(statement):
            if name in called and name in IMPORTABLE and not isinstance(statement, (ast.Import, ast.ImportFrom)):
                message = f"{name!r} is the language's own function here, but line {statement.lineno} redefines it"
                reporter.error(called[name], message, "rename yours; a rule cannot call helper functions")


class Signature:
    """What a signature declares: state, hyperparameters, options, time."""

    def __init__(self, node: ast.FunctionDef, reporter: Reporter):
        self.node, self.reporter = node, reporter
        self.state: list[State] = []
        self.hyperparameters: dict[str, float] = {}
        self.options: dict[str, bool | str] = {}
        self.time = False
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        for k, arg in enumerate(every):
            if arg.arg in {a.arg for a in every[:k]}:
                reporter.error(arg, f"{arg.arg!r} is declared twice")
        if arguments.posonlyargs:
            reporter.error(
                arguments.posonlyargs[0], "positional-only parameters are not part of the language", "drop the /"
            )
        if arguments.vararg:
            reporter.error(arguments.vararg, f"*{arguments.vararg.arg} is not part of the language", "name each state")
        if arguments.kwarg:
            reporter.error(
                arguments.kwarg, f"**{arguments.kwarg.arg} is not part of the language", "name each hyperparameter"
            )
        if node.returns:
            reporter.error(node.returns, "a rule has no return annotation", "drop the ->")
        self._positional([*arguments.posonlyargs, *arguments.args], arguments.defaults)
        for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            self._keyword(arg, default)
        for state, default in zip(
            self.state, arguments.defaults[len(arguments.defaults) - len(self.state) :], strict=True
        ):
            self._initial_name(state, default)

    def _positional(self, args: list[ast.arg], defaults: list[ast.expr]) -> None:
        if [arg.arg for arg in args[:2]] != ["p", "g"]:
            where = args[0] if args else self.node
            hint = "def name(p, g, state=0.0, *, lr=1e-3): p is the parameter, g its gradient"
            self.reporter.error(where, "a rule's first two parameters are p, g", hint)
            self.reporter.check()
        for arg in args[:2]:
            if arg.annotation:
                self.reporter.error(arg, f"{arg.arg!r} has no annotation", "only state may be annotated, as scalar")
        undefaulted = len(args) - len(defaults)
        for arg in args[undefaulted:2]:
            self.reporter.error(arg, f"{arg.arg!r} has no default")
        for k, arg in enumerate(args[2:], 2):
            if arg.arg == "t":
                self.reporter.error(arg, "t is the step count", "list it behind the *: def name(p, g, *, t, lr=1e-3)")
            elif k < undefaulted:
                self.reporter.error(arg, f"state {arg.arg!r} needs its initial value", f"{arg.arg}=0.0")
            else:
                self._state(arg, defaults[k - undefaulted])
        if undefaulted < 2:
            self.reporter.check()

    def _state(self, arg: ast.arg, default: ast.expr) -> None:
        scalar = arg.annotation is not None
        if arg.annotation and not (isinstance(arg.annotation, ast.Name) and arg.annotation.id == "scalar"):
            self.reporter.error(
                arg.annotation, "state is annotated as scalar or not at all", f"{arg.arg}: scalar = 0.0"
            )
        initial: float | str | None
        if isinstance(default, ast.Constant) and isinstance(default.value, str):
            initial = default.value
        else:
            initial = literal(default, self.reporter, f"the initial value of {arg.arg!r}")
        self.state.append(State(arg.arg, 0.0 if initial is None else initial, scalar))

    def _initial_name(self, state: State, default: ast.expr) -> None:
        """Check a state's initial value that is given by name, once all names are known."""
        if not isinstance(state.initial, str) or state.initial in self.hyperparameters:
            return
        if state.initial not in ("p", "g"):
            names = ["p", "g", *self.hyperparameters]
            hint = f"a number, or one of {', '.join(map(repr, names))}"
            self.reporter.error(default, f"state {state.name!r} cannot start as {state.initial!r}", hint)
        elif state.scalar:
            hint = "a number, or the name of a hyperparameter"
            self.reporter.error(
                default, f"scalar state {state.name!r} cannot start as the array {state.initial!r}", hint
            )

    def _keyword(self, arg: ast.arg, default: ast.expr | None) -> None:
        if arg.annotation:
            self.reporter.error(arg.annotation, "a hyperparameter has no annotation", "its default says what it is")
        if arg.arg == "t":
            if default is not None:
                self.reporter.error(default, "t has no default", "it is the step count, 1 at the first step")
            self.time = True
        elif arg.arg in RESERVED:
            hint = "the Optimizer uses this name itself; choose another"
            self.reporter.error(arg, f"{arg.arg!r} is reserved and cannot name a hyperparameter", hint)
        elif default is None:
            self.reporter.error(arg, f"hyperparameter {arg.arg!r} needs a default", f"{arg.arg}=1e-3")
        elif isinstance(default, ast.Constant) and isinstance(default.value, (bool, str)):
            self.options[arg.arg] = default.value
        else:
            value = literal(default, self.reporter, f"the default of {arg.arg!r}")
            self.hyperparameters[arg.arg] = 0.0 if value is None else value


def number(node: ast.Constant, reporter: Reporter) -> float | None:
    """The double that a numeric literal denotes; None where refused."""
    value = node.value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        what = {str: "a string", bytes: "a bytes literal", complex: "a complex number", bool: "a truth value"}
        reporter.error(node, f"{what.get(type(value), repr(value))} is not a number")
        return None
    if isinstance(value, int) and value > LARGEST_INTEGER:
        hint = "integers are doubles; write it as a float literal if rounding is meant"
        reporter.error(node, "an integer beyond 2**53 has no exact double", hint)
        return None
    if math.isinf(value):
        reporter.error(node, "the constant overflows a double", "the largest is 1.7976931348623157e308")
        return None
    return float(value)


def fold(op: str, a: float, b: float) -> float:
    """Arithmetic on two constants, as Python computes it."""
    match op:
        case "add":
            return a + b
        case "sub":
            return a - b
        case "mul":
            return a * b
        case "div":
            return a / b
        case "mod":
            return a % b
        case "pow":
            return a * a if b == 2 else float(a**b)
    raise AssertionError(op)


OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.Mod: "mod",
    ast.Pow: "pow",
}


def fold_checked(node: ast.AST, op: str, a: float, b: float, reporter: Reporter) -> float | None:
    """`fold`, with an error at the node where there is no finite value."""
    try:
        value = fold(op, a, b)
        problem = "" if math.isfinite(value) else "the constant overflows a double"
    except ZeroDivisionError:
        problem = "division by zero"
    except OverflowError:
        problem = "the constant overflows a double"
    except TypeError:
        problem = "a negative number to a fractional power has no real value"
    if problem:
        reporter.error(node, problem)
        return None
    return value


def literal(node: ast.expr, reporter: Reporter, what: str) -> float | None:
    """The value of literal arithmetic such as `1 - 1e-8`; None where refused."""
    if isinstance(node, ast.Constant):
        return number(node, reporter)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = literal(node.operand, reporter, what)
        return None if value is None else -value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = literal(node.left, reporter, what), literal(node.right, reporter, what)
        if left is None or right is None:
            return None
        return fold_checked(node, OPERATORS[type(node.op)], left, right, reporter)
    reporter.error(node, f"{what} must be literal arithmetic", "numbers and + - * / % ** between them")
    return None


def returns(body: Iterable[ast.AST]) -> Iterator[ast.Return]:
    """The return statements of a function, not those of functions inside it."""
    for node in body:
        if isinstance(node, ast.Return):
            yield node
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            yield from returns(ast.iter_child_nodes(node))


def check_return(node: ast.FunctionDef, body: list[ast.stmt], state: list[str], reporter: Reporter) -> None:
    """One return, at the end, of p and every state in the order of the signature."""
    expected = ", ".join(["p", *state])
    hint = f"end the rule with: return {expected}"
    last = body[-1] if body else None
    for statement in returns(body):
        if statement is not last:
            reporter.error(statement, "a rule returns once, as its last statement", hint)
    if not isinstance(last, ast.Return):
        if not reporter.diagnostics:
            reporter.error(last or node, "the rule does not end with a return", hint)
        return
    if last.value is None:
        reporter.error(last, "the rule returns nothing", hint)
        return
    values = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
    for value in values:
        if not isinstance(value, ast.Name):
            reporter.error(value, "a rule returns names", f"bind the value before: p = …, then return {expected}")
            return
    if [value.id for value in values if isinstance(value, ast.Name)] != ["p", *state]:
        reporter.error(last, "a rule returns p and every state, in the order of the signature", hint)
