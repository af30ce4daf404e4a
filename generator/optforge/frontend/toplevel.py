"""The top level of a rule's file: what it binds, and which functions stand under @rule and @transform."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator, Mapping

from ..core.diagnostics import Reporter
from ..core.functions import IMPORTABLE


def top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, those under a top-level `if` or `try` included."""
    pending = body[::-1]
    while pending:
        statement = pending.pop()
        yield statement
        if isinstance(statement, (ast.If, ast.Try)):
            handlers = statement.handlers if isinstance(statement, ast.Try) else []
            below = [statement.body, statement.orelse, *(handler.body for handler in handlers)]
            pending += [inner for part in reversed(below) for inner in reversed(part)]


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


def imports(nodes: Iterable[ast.AST]) -> dict[str, str]:
    """What the file calls the names that it imports from optforge: `from optforge import sqrt as root`."""
    return {
        name.asname: name.name
        for statement in nodes
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").partition(".")[0] == "optforge"
        for name in statement.names
        if name.asname
    }


HOMES = ("optforge", "optforge.rules", "optforge.transforms")


def packages(nodes: Iterable[ast.AST]) -> dict[str, str]:
    """What the file's names stand for that come from optforge: the package itself, or what is imported from it."""
    found: dict[str, str] = {}
    for statement in nodes:
        if isinstance(statement, ast.Import):
            found |= {n.asname or n.name: "optforge" for n in statement.names if n.name == "optforge"}
        elif isinstance(statement, ast.ImportFrom) and statement.module in HOMES:
            found |= {n.asname or n.name: f"{statement.module}.{n.name}" for n in statement.names}
    return found


class TopLevel:
    """A file's top level, looked through once: its statements, in order, and what its names stand for.

    Attributes
    ----------
    statements : list of ast.stmt
    aliases, packages : dict
        As of `imports` and `packages`.
    """

    def __init__(self, tree: ast.Module):
        self.statements = list(top_level(tree.body))
        importing = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        self.aliases, self.packages = imports(importing), packages(importing)

    @functools.cached_property
    def bindings(self) -> dict[str, list[ast.stmt]]:
        """The statements that bind each name, in order."""
        found: dict[str, list[ast.stmt]] = {}
        for statement in self.statements:
            for name in dict.fromkeys(bound(statement)):
                found.setdefault(name, []).append(statement)
        return found


def kind_of(node: ast.FunctionDef, aliases: Mapping[str, str]) -> str:
    """What a function is made into by its decorators: "rule", "transform" or nothing."""
    return next(filter(None, (decorated(decorator, aliases) for decorator in node.decorator_list)), "")


def decorated(decorator: ast.expr, aliases: Mapping[str, str]) -> str:
    """What a decorator makes, however the file names it: "rule", "transform" or nothing."""
    name = ""
    if isinstance(decorator, ast.Attribute) and isinstance(decorator.value, ast.Name):
        name = decorator.attr
    elif isinstance(decorator, ast.Name):
        name = aliases.get(decorator.id, decorator.id)
    return name if name in ("rule", "transform") else ""


def shadowed(node: ast.FunctionDef, top: TopLevel, reporter: Reporter) -> None:
    """Refuse a module-level definition that takes the name of a function that the rule calls."""
    called = {n.func.id: n for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    for name in (name for name in called if name in IMPORTABLE):
        for statement in top.bindings.get(name, ()):
            if not isinstance(statement, (ast.Import, ast.ImportFrom)):
                message = f"{name!r} is the language's own function here, but line {statement.lineno} redefines it"
                reporter.error(called[name], message, "rename yours; a rule cannot call helper functions")
