"""Syntax to Definition: check a rule's signature and the shape of its body, and gather what it declares."""

from __future__ import annotations

import ast
import functools
import hashlib
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ..core import bounds
from ..core.diagnostics import Reporter, Text
from ..core.functions import REDUCTIONS
from ..core.ir import State
from ..core.names import spelled
from .literals import literal
from .toplevel import TopLevel, decorated, shadowed

# Names that the Optimizer uses itself.
RESERVED = frozenset(
    "params rule target threads skip_nonfinite zero_grads store master rounding seed groups add_group step state "
    "state_dict load_state_dict save load stats".split()
)
ARRAYS = ("p", "g")
LARGEST_EXPONENT = 1024  # of 2, in a double
NESTING_HINT = "give intermediate results names, a line each"


@dataclass(frozen=True)
class Definition:
    """A rule or a transform as written: what its signature declares, and its body as syntax.

    `kind` is "rule" or "transform". `takes` are those of p and g that are in the signature, `changes` those that it
    returns; `borrowed` are the hyperparameters without a default, which a transform takes from its rule. `aliases` maps
    names that the file imports to the language's own names.
    """

    kind: str
    name: str
    doc: str
    text: Text
    node: ast.FunctionDef
    body: tuple[ast.stmt, ...]
    state: tuple[State, ...]
    hyperparameters: Mapping[str, float]
    options: Mapping[str, bool | str]
    time: bool
    takes: tuple[str, ...] = ARRAYS
    changes: tuple[str, ...] = ("p",)
    borrowed: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def nodes(self) -> int:
        """How large it is: the nodes of its syntax tree."""
        return len(counted(self.node))

    @functools.cached_property
    def reductions(self) -> tuple[ast.Call, ...]:
        """The calls of reductions."""
        calls = (n for n in ast.walk(self.node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name))
        return tuple(n for n in calls if self.aliases.get(n.func.id, n.func.id) in REDUCTIONS)  # type: ignore[attr-defined]

    @functools.cached_property
    def compared(self) -> dict[str, list[str]]:
        """The strings that each option is compared with."""
        found: dict[str, list[str]] = {}
        for node in ast.walk(self.node):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                strings = [s.value for s in sides if isinstance(s, ast.Constant) and isinstance(s.value, str)]
                for side in sides:
                    if isinstance(side, ast.Name) and side.id in self.options:
                        found.setdefault(side.id, []).extend(strings)
        return found

    @functools.cached_property
    def locals(self) -> tuple[str, ...]:
        """The names that the body binds."""
        return tuple({name: None for statement in self.body for n in ast.walk(statement) for name in stores(n)})

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

    @functools.cached_property
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
    if isinstance(node, ast.arg) and node.annotation and not says_scalar(node.annotation, aliases):
        node = ast.arg(node.arg)  # other annotations are ignored
    if isinstance(node, ast.AST):
        fields = (
            f"{name}={canonical(value, aliases)}"
            for name, value in ast.iter_fields(node)
            if name not in ("ctx", "kind", "type_comment", "type_params") and value not in (None, [])
        )
        return f"{type(node).__name__}({','.join(fields)})"
    return repr(node)


def define(kind: str, node: ast.FunctionDef, text: Text, top: TopLevel) -> Definition:
    """Check everything of a rule or transform that does not depend on types, and gather what it declares."""
    reporter = Reporter(text)
    depth, deepest = nesting(node)
    if depth > bounds.NESTING:
        reporter.error(deepest, "nested too deeply", NESTING_HINT)
        reporter.check()
    check_size(kind, node, reporter)
    aliases = top.aliases
    for decorator in node.decorator_list:
        if decorated(decorator, aliases) != kind:
            reporter.error(decorator, f"a {kind} has no decorator but @{kind}")
    shadowed(node, top, reporter)

    body = list(node.body)
    doc = ""
    if (
        isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant)
        and isinstance(body[0].value.value, str)
    ):
        doc = cleaned(body[0].value.value)
        body = body[1:]
    signature = Signature(kind, node, aliases, reporter)
    changes = check_return(signature, body)
    reporter.check()
    made = Definition(
        kind,
        node.name,
        doc,
        text,
        node,
        tuple(body),
        tuple(signature.state),
        signature.hyperparameters,
        signature.options,
        signature.time,
        signature.takes,
        changes,
        tuple(signature.borrowed),
        aliases,
    )
    if len(made.reductions) > bounds.REDUCTIONS:
        what = f"there are at most {bounds.REDUCTIONS} reductions, and here are {len(made.reductions)}"
        reporter.error(made.reductions[bounds.REDUCTIONS], what)
        reporter.check()
    return made


def says_scalar(annotation: ast.expr, aliases: Mapping[str, str]) -> bool:
    """Whether an annotation is `scalar`, however the file names it; all others are ignored."""
    if isinstance(annotation, ast.Attribute):
        return annotation.attr == "scalar" and isinstance(annotation.value, ast.Name)
    if isinstance(annotation, ast.Constant):
        return annotation.value == "scalar"
    return isinstance(annotation, ast.Name) and aliases.get(annotation.id, annotation.id) == "scalar"


def looks_scalar(annotation: ast.expr) -> bool:
    """Whether an annotation says scalar in a way that would be ignored: `Scalar`, `optforge.words.scalar`."""
    if isinstance(annotation, ast.Constant):
        return isinstance(annotation.value, str) and annotation.value.strip().lower() == "scalar"
    name = annotation.attr if isinstance(annotation, ast.Attribute) else getattr(annotation, "id", "")
    return str(name).lower() == "scalar"


def cleaned(docstring: str) -> str:
    """A docstring without its indentation.

    Versions of Python differ in what `inspect.cleandoc` takes for blanks, and the same text must give the same files.
    """
    first, *rest = docstring.expandtabs().split("\n")
    margin = min((len(line) - len(line.lstrip(" ")) for line in rest if line.strip(" ")), default=0)
    return "\n".join([first.lstrip(" "), *(line[margin:] for line in rest)]).strip(" \n")


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
        chained = {ast.BoolOp: "values", ast.Compare: "ops"}.get(type(current))
        below = level + max(1, len(getattr(current, chained)) if chained else 1)
        stack += [(child, below, place) for child in ast.iter_child_nodes(current)]
    return depth, deepest


def counted(node: ast.AST) -> list[ast.AST]:
    """The nodes of a syntax tree that somebody has written."""
    return [n for n in ast.walk(node) if not isinstance(n, ast.expr_context)]


def check_size(kind: str, node: ast.FunctionDef, reporter: Reporter) -> None:
    """Refuse what is larger than any real rule or transform, at once."""
    nodes = counted(node)
    if len(nodes) > bounds.NODES:
        hint = f"a {kind} has at most {bounds.NODES:,} (every name, number and operation counts)"
        reporter.error(node, f"the {kind} is too large: {len(nodes):,} nodes of syntax", hint)
        reporter.check()
    for kinds, most, what in (
        ((ast.Assert,), bounds.ASSERTS, "asserts"),
        ((ast.arg,), bounds.STATES + bounds.HYPERPARAMETERS + bounds.OPTIONS, "parameters"),
    ):
        found = [n for n in nodes if isinstance(n, kinds)]
        if len(found) > most:
            reporter.error(found[most], f"a {kind} has at most {most} {what}, and this has {len(found):,}")
            reporter.check()
    for n in nodes:
        if isinstance(n, ast.Constant) and isinstance(n.value, int) and n.value.bit_length() > LARGEST_EXPONENT:
            reporter.error(n, "the constant overflows a double", "the largest is 1.7976931348623157e308")
        name = n.arg if isinstance(n, ast.arg) else n.id if isinstance(n, ast.Name) else ""
        check_length(n, name, reporter)
    check_length(node, node.name, reporter)
    reporter.check()


def check_length(node: ast.AST, name: str, reporter: Reporter) -> None:
    """Refuse a name that is too long."""
    if len(name) > bounds.NAME_LENGTH or len(spelled(name)) > bounds.NAME_LENGTH:
        as_c = "" if len(name) > bounds.NAME_LENGTH else f", and as C spells it {len(spelled(name))}"
        message = f"the name {name[:20]}… is too long: it has {len(name):,} characters{as_c}"
        reporter.error(node, message, f"a name has at most {bounds.NAME_LENGTH}")


def check_count(names: Iterable[ast.arg], most: int, what: str, reporter: Reporter) -> None:
    """Refuse more of something than a rule has."""
    found = list(names)
    if len(found) > most:
        reporter.error(found[most], f"there are at most {most} {what}, and here are {len(found)}")


class Signature:
    """What a signature declares: state, hyperparameters, options, time."""

    def __init__(self, kind: str, node: ast.FunctionDef, aliases: Mapping[str, str], reporter: Reporter):
        self.kind, self.node, self.aliases, self.reporter = kind, node, aliases, reporter
        self.takes: tuple[str, ...] = ARRAYS
        self.borrowed: list[str] = []
        self.state: list[State] = []
        self.hyperparameters: dict[str, float] = {}
        self.options: dict[str, bool | str] = {}
        self.time = False
        arguments = node.args
        positional, keywords = [*arguments.posonlyargs, *arguments.args], arguments.kwonlyargs
        every = [*positional, *keywords]
        seen: set[str] = set()
        for arg in every:
            if arg.arg in seen:
                reporter.error(arg, f"{arg.arg!r} is declared twice")
            seen.add(arg.arg)
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
        self._positional(positional, arguments.defaults)
        for arg, default in zip(keywords, arguments.kw_defaults, strict=True):
            self._keyword(arg, default)
        for state, default in zip(
            self.state, arguments.defaults[len(arguments.defaults) - len(self.state) :], strict=True
        ):
            self._initial_name(state, default)
        check_count(positional[len(self.takes) :], bounds.STATES, "states", reporter)
        check_count((a for a in keywords if a.arg in self.options), bounds.OPTIONS, "static options", reporter)
        others = (a for a in keywords if a.arg not in self.options)
        check_count(others, bounds.HYPERPARAMETERS, "hyperparameters", reporter)

    def _positional(self, args: list[ast.arg], defaults: list[ast.expr]) -> None:
        names = [arg.arg for arg in args[:2]]
        where = args[0] if args else self.node
        if self.kind == "rule" and names != [*ARRAYS]:
            hint = "def name(p, g, state=0.0, *, lr=1e-3): p is the parameter, g its gradient"
            self.reporter.error(where, "a rule's first two parameters are p, g", hint)
            self.reporter.check()
        if self.kind == "transform":
            self.takes = ARRAYS if names == [*ARRAYS] else tuple(names[:1])
            if not self.takes or self.takes[0] not in ARRAYS:
                hint = "def name(g, *, bound=1.0): p is the parameter, g its gradient"
                self.reporter.error(where, "a transform's first parameters are p, g, or one of them", hint)
                self.reporter.check()
        taken = len(self.takes)
        undefaulted = len(args) - len(defaults)
        for arg in args[undefaulted:taken]:
            self.reporter.error(arg, f"{arg.arg!r} has no default")
        for k, arg in enumerate(args[taken:], taken):
            if arg.arg == "t":
                self.reporter.error(arg, "t is the step count", "list it behind the *: def name(p, g, *, t, lr=1e-3)")
            elif arg.arg in ARRAYS:
                self.reporter.error(arg, f"{arg.arg!r} comes first", "def name(p, g, state=0.0, *, lr)")
            elif k < undefaulted:
                hint = (
                    f"{arg.arg}=0.0, if it is state, which the rule keeps from step to step; a step is given no other "
                    "arrays than p and g, and numbers that it is given are hyperparameters, behind a *"
                )
                self.reporter.error(arg, f"state {arg.arg!r} needs its initial value", hint)
            else:
                self._state(arg, defaults[k - undefaulted])
        if undefaulted < taken:
            self.reporter.check()

    def _state(self, arg: ast.arg, default: ast.expr) -> None:
        scalar = arg.annotation is not None and says_scalar(arg.annotation, self.aliases)
        if arg.annotation is not None and not scalar and looks_scalar(arg.annotation):
            hint = f"{arg.arg}: scalar, with `from optforge import scalar`, or no annotation where it is an array"
            what = f"{ast.unparse(arg.annotation)!r} does not make state {arg.arg!r} one number per tensor"
            self.reporter.error(arg.annotation, what, hint)
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
        if state.initial not in self.takes:
            names = [*self.takes, *self.hyperparameters]
            hint = f"a number, or one of {bounds.enumerated([repr(name) for name in names])}"
            self.reporter.error(default, f"state {state.name!r} cannot start as {state.initial!r}", hint)
        elif state.scalar:
            hint = "a number, or the name of a hyperparameter"
            self.reporter.error(
                default, f"scalar state {state.name!r} cannot start as the array {state.initial!r}", hint
            )

    def _keyword(self, arg: ast.arg, default: ast.expr | None) -> None:
        if arg.arg == "t":
            if default is not None:
                self.reporter.error(default, "t has no default", "it is the step count, 1 at the first step")
            self.time = True
        elif arg.arg in RESERVED:
            hint = "the Optimizer uses this name itself; choose another"
            self.reporter.error(arg, f"{arg.arg!r} is reserved and cannot name a hyperparameter", hint)
        elif default is None and self.kind == "transform":
            self.borrowed.append(arg.arg)
        elif default is None:
            self.reporter.error(arg, f"hyperparameter {arg.arg!r} needs a default", f"{arg.arg}=1e-3")
        elif isinstance(default, ast.Constant) and isinstance(default.value, (bool, str)):
            self.options[arg.arg] = default.value
        else:
            value = literal(default, self.reporter, f"the default of {arg.arg!r}")
            self.hyperparameters[arg.arg] = 0.0 if value is None else value


def stores(node: ast.AST) -> list[str]:
    """The name that a node binds, if it does."""
    return [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []


def returns(body: Iterable[ast.AST]) -> Iterator[ast.Return]:
    """The return statements of a function, not those of functions inside it."""
    for node in body:
        if isinstance(node, ast.Return):
            yield node
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            yield from returns(ast.iter_child_nodes(node))


def check_return(signature: Signature, body: list[ast.stmt]) -> tuple[str, ...]:
    """One return, at the end: of p and every state of a rule, of what a transform changes and its state.

    Gives those of p and g that are returned.
    """
    node, reporter, kind = signature.node, signature.reporter, signature.kind
    state = [state.name for state in signature.state]
    possible = [["p", *state]]
    if kind == "transform":
        possible = [[*changed, *state] for changed in (("g",), ("p",), ARRAYS) if set(changed) <= set(signature.takes)]
    expected = ", ".join(possible[-1] if kind == "rule" else possible[0])
    hint = f"end the {kind} with: return {expected}"
    last = body[-1] if body else None
    for statement in returns(body):
        if reporter.full:
            break
        if statement in body and statement is not last:
            behind = body[body.index(statement) + 1]
            reporter.error(behind, "there is a statement behind the return", "remove what follows the return")
        elif statement is not last:
            early = "bind what is returned in each branch, and return once, at the end"
            reporter.error(statement, f"a {kind} returns once, as its last statement", early)
    if not isinstance(last, ast.Return):
        if not reporter.diagnostics:
            reporter.error(last or node, f"the {kind} does not end with a return", hint)
        return ()
    if last.value is None:
        reporter.error(last, f"the {kind} returns nothing", hint)
        return ()
    values = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
    for value in values:
        if not isinstance(value, ast.Name):
            reporter.error(value, f"a {kind} returns names", f"bind the value before: p = …, then return {expected}")
            return ()
    returned = [value.id for value in values if isinstance(value, ast.Name)]
    missing = [name for name in state if name not in returned]
    if missing and not {name for s in body for n in ast.walk(s) for name in stores(n)} & set(missing):
        listed = ", ".join(missing)
        hint += f"; or, if {listed} are hyperparameters, put them behind a *: def {node.name}(p, g, …, *, {listed})"
    if returned not in possible:
        what = "p and every state" if kind == "rule" else "what it changes of p and g, and every state"
        reporter.error(last, f"a {kind} returns {what}, in the order of the signature", hint)
    return tuple(name for name in returned if name in ARRAYS)
