"""Find a rule in a file. The file is parsed and never executed."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

from .diagnostics import Diagnostic, Reporter, RuleError, Text, UsageError, nearest
from .module import bound, imports, is_rule, top_level
from .parse import NESTING_HINT, Definition, define


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
