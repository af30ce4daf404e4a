"""Find rules, transforms and compositions of them in a file. The file is parsed and never executed."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ..core.bounds import FILE_BYTES, NESTING, enumerated
from ..core.diagnostics import Diagnostic, Reporter, RuleError, Text, UsageError, nearest, printable
from ..core.reading import read_regular
from .compose import Composition, compose
from .literals import literal
from .parse import NESTING_HINT, Definition, define, nesting
from .settings import configure
from .toplevel import TopLevel, kind_of


def read(path: Path) -> Text:
    """The text of a rule file."""
    try:
        data = read_regular(path, FILE_BYTES)
    except OSError as problem:
        raise UsageError(f"{printable(str(path))}: {(problem.strerror or str(problem)).lower()}") from None
    except ValueError as problem:  # a NUL byte in its name
        raise UsageError(f"{printable(str(path))}: {problem}") from None
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


def parse_file(path: Path, name: str, rules: Mapping[str, Declared], transforms: Mapping[str, Declared]) -> Composition:
    """The rule, transform or composition of this name at the top level of a file, which may use those built in.

    Raises
    ------
    RuleError
        The file or the rule was refused.
    UsageError
        There is no such file, or no such rule in it.
    """
    text = read(path)
    return Module(text, syntax(text), rules, transforms).named(name)


def declared(path: Path) -> list[str]:
    """The names of the functions under @rule and @transform in a file, unchecked.

    Raises
    ------
    RuleError, UsageError
        It cannot be read, or is no Python.
    """
    top = TopLevel(syntax(read(path)))
    return list(
        dict.fromkeys(s.name for s in top.statements if isinstance(s, ast.FunctionDef) and kind_of(s, top.aliases))
    )


class Declared(Protocol):
    """A rule or transform that is there already."""

    @property
    def definition(self) -> Composition:
        """Its checked text."""


A_RULE_IS = "a rule is a function under @rule (from optforge import rule)"


class Module:
    """A file's top level, in which names are looked up as far as they are rules or transforms."""

    def __init__(self, text: Text, tree: ast.Module, rules: Mapping[str, Declared], transforms: Mapping[str, Declared]):
        self.text, self.top = text, TopLevel(tree)
        self.rules, self.transforms = rules, transforms
        self.aliases, self.packages = self.top.aliases, self.top.packages
        self.resolved: dict[str, Composition] = {}
        self.open: list[str] = []
        self.depth = 0

    def named(self, name: str) -> Composition:
        """What a name is bound to.

        Raises
        ------
        RuleError, UsageError
            It is bound to something else, or not at all.
        """
        if name not in self.resolved:
            self.resolved[name] = self.looked_up(name)
        return self.resolved[name]

    def looked_up(self, name: str) -> Composition:
        """What a name is bound to, which is not known yet."""
        found = self.binding(name)
        if found is None:
            functions = [s for s in self.top.statements if isinstance(s, ast.FunctionDef)]
            rules = list(dict.fromkeys(s.name for s in functions if kind_of(s, self.aliases)))
            there = f"; its rules are: {enumerated(rules)}" if rules else "; it holds no rules"
            raise UsageError(f"{self.text.file} has no rule {name!r}{nearest(name, rules) or there}")
        if isinstance(found, ast.FunctionDef):
            kind = kind_of(found, self.aliases)
            if not kind:
                raise self.refused(found, f"{name!r} is not decorated with @rule", A_RULE_IS)
            return Composition((define(kind, found, self.text, self.top),))
        if isinstance(found, (ast.Assign, ast.AnnAssign)) and found.value is not None and name not in self.open:
            depth, _ = nesting(found.value)
            self.depth += depth + 1
            if self.depth > NESTING:
                raise self.refused(found, "nested too deeply", "use names for what is built in, or less of them")
            self.open.append(name)
            composition = self.value(found.value, name)
            self.open.remove(name)
            self.depth -= depth + 1
            return composition
        raise self.refused(
            found, f"{name!r} is not a rule", "a rule is a function under @rule (from optforge import rule)"
        )

    def binding(self, name: str) -> ast.stmt | None:
        """The last statement that binds a name."""
        bindings = self.top.bindings.get(name)
        return bindings[-1] if bindings else None

    def refused(self, node: ast.AST, message: str, hint: str = "") -> RuleError:
        """An error at a node."""
        reporter = Reporter(self.text)
        reporter.error(node, message, hint)
        return RuleError(reporter.diagnostics.values())

    def value(self, node: ast.expr, name: str) -> Composition:
        """The rule, transform or composition that an expression stands for."""
        match node:
            case ast.BinOp(left=left, op=ast.RShift(), right=right):
                first, second = self.value(left, name), self.value(right, name)
                if first.last.kind == "rule":
                    raise self.refused(left, "a rule is last in a composition", "write transform >> rule")
                try:
                    return compose(first, second)
                except UsageError as problem:
                    raise self.refused(node, str(problem)) from None
            case ast.Call(func=function, args=[], keywords=keywords):
                return self.configured(function, keywords, name)
            case ast.Name(id=own) if isinstance(self.binding(own), (ast.FunctionDef, ast.Assign, ast.AnnAssign)):
                return self.named(own)
        path = self.dotted(node)
        if path[:1] == ["rules"] and len(path) == 2:
            found = built_in(self.rules, path[1])
        else:
            path = path[1:] if path[:1] == ["transforms"] else path
            found = built_in(self.transforms, path[0]) if len(path) == 1 else None
        if found is None:
            hint = (
                "a composition is transform(setting=1.0) >> rule, of transforms and rules of this file or of optforge"
            )
            raise self.refused(node, f"{name!r} is not a rule, nor a composition of transforms and a rule", hint)
        return found

    def configured(self, function: ast.expr, keywords: list[ast.keyword], name: str) -> Composition:
        """A transform with settings."""
        transform = self.value(function, name)
        if transform.last.kind == "rule":
            raise self.refused(function, "a rule takes no settings here", "give them to the Optimizer, or with --set")
        given: dict[str, object] = {}
        for keyword in keywords:
            value = keyword.value
            if keyword.arg is None:
                raise self.refused(value, "settings are written out", "transform(setting=1.0)")
            if isinstance(value, ast.Constant) and isinstance(value.value, (bool, str)):
                given[keyword.arg] = value.value
            else:
                reporter = Reporter(self.text)
                given[keyword.arg] = literal(value, reporter, f"the setting {keyword.arg!r}")
                reporter.check()
        try:
            return configure(transform, given)
        except (TypeError, ValueError) as problem:
            raise self.refused(function, str(problem)) from None

    def dotted(self, node: ast.expr) -> list[str]:
        """A name of optforge, without the package's own name; empty for anything else."""
        match node:
            case ast.Name(id=name) if name in self.packages:
                return self.packages[name].split(".")[1:]
            case ast.Attribute(value=value, attr=name):
                return [*self.dotted(value), name] if self.known(value) else []
            case ast.Subscript(value=value, slice=ast.Constant(value=str(name))):
                return [*self.dotted(value), name]
        return []

    def known(self, node: ast.expr) -> bool:
        """Whether an expression begins with a name imported from optforge."""
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id in self.packages


def built_in(known: Mapping[str, Declared], name: str) -> Composition | None:
    """What is built in under a name."""
    return known[name].definition if name in known else None


def parse_function(kind: str, text: Text, name: str, line: int) -> Definition:
    """The rule or transform whose function, or its first decorator, starts at this line."""
    tree = syntax(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            if first == line and getattr(node, "name", "<lambda>") == name:
                if isinstance(node, ast.FunctionDef):
                    return define(kind, node, text, TopLevel(tree))
                reporter = Reporter(text)
                reporter.error(node, f"{name!r} is not a plain function", f"a {kind} is a `def` under @{kind}")
                reporter.check()
    message = f"the text of {kind} {name!r} is not here"
    hint = "the file has changed since it was imported; start again"
    raise RuleError([Diagnostic(line, 1, message, hint, text=text)])
