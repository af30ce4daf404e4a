"""Rules and settings as the command line names them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from . import rules
from .diagnostics import UsageError, nearest
from .language import Rule

TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def named(name: str) -> Rule:
    """The rule that `adam` or `FILE.py:NAME` means.

    Raises
    ------
    RuleError
        Its text was refused.
    UsageError
        There is none.
    """
    path, colon, own = name.rpartition(":")
    if colon and path.endswith(".py"):
        if not own.isidentifier():
            raise UsageError(f"{name!r}: {own!r} is no name; write {path}:NAME")
        return Rule.from_file(path, own)
    if name in rules:  # type: ignore[operator]  # the package stands as a mapping
        rule: Rule = rules[name]  # type: ignore[index]
        rule.definition  # noqa: B018 - errors appear here
        return rule
    if colon:
        raise UsageError(f"{name!r}: compositions of transforms and rules are not supported yet")
    if name.endswith(".py"):
        raise UsageError(f"{name!r} names a file; write {name}:NAME for the rule NAME in it")
    raise UsageError(f"there is no rule {name!r}{nearest(name, rules)}; see `optforge list`")  # type: ignore[arg-type]


def select(given: Sequence[str], every: bool) -> list[Rule]:
    """The rules that the command line asks for, each once."""
    wanted = [*given, *(rules if every else ())]  # type: ignore[misc]
    if not wanted:
        raise UsageError("no rule is given; name some, or say --all")
    found: dict[str, Rule] = {}
    for name in dict.fromkeys(wanted):
        rule = named(name)
        if rule.name in found and found[rule.name].hash != rule.hash:
            raise UsageError(f"two different rules are called {rule.name!r}; emit them one at a time, with --prefix")
        found[rule.name] = rule
    return list(found.values())


def emit(
    selected: Sequence[Rule],
    targets: Sequence[str],
    dtypes: Sequence[str],
    settings: Sequence[str],
    prefix: str | None,
) -> dict[str, str]:
    """The files of rules: name to text."""
    if prefix is not None and len(selected) > 1:
        raise UsageError("--prefix names the files of one rule; give one rule")
    chosen = parse_settings(settings, selected)
    files: dict[str, str] = {}
    for rule in selected:
        for target in dict.fromkeys(targets):
            files |= rule.generate(target, dtypes, prefix, **chosen[rule.name])
    return files


def parse_settings(given: Iterable[str], selected: Sequence[Rule]) -> dict[str, dict[str, object]]:
    """What --set means for each rule, by rule name; a name that none of them has is an error."""
    chosen: dict[str, dict[str, object]] = {rule.name: {} for rule in selected}
    for item in given:
        name, equals, text = item.partition("=")
        name = name.strip()
        if not equals:
            raise UsageError(f"--set {item}: write NAME=VALUE")
        holders = [rule for rule in selected if name in rule.hyperparameters or name in rule.options]
        if not holders:
            known = [key for rule in selected for key in (*rule.hyperparameters, *rule.options)]
            listed = ", ".join(dict.fromkeys(known)) or "none"
            raise UsageError(f"--set {item}: no such name{nearest(name, known)} (there are {listed})")
        for rule in holders:
            chosen[rule.name][name] = value(rule, name, text.strip())
    for rule in selected:
        rule.settings(chosen[rule.name])
    return chosen


def value(rule: Rule, name: str, text: str) -> object:
    """The value of a hyperparameter or an option, from its text."""
    if name in rule.options:
        if isinstance(rule.options[name], str):
            return text
        if text.lower() in (*TRUE, *FALSE):
            return text.lower() in TRUE
        raise UsageError(f"--set {name}={text}: it is true or false")
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--set {name}={text}: {text!r} is not a number") from None
