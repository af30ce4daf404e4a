"""Rules by name, and settings as text: `adam`, `FILE.py:NAME`, `clip_by_global_norm:adam`, `lr=1e-3`."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..core.diagnostics import RuleError, UsageError, nearest
from ..core.scalars import check_hyperparameters
from ..engines.arrays import kind
from ..frontend.compose import Composition, compose
from ..frontend.files import parse_file
from .rule import BUILT_IN, TRANSFORMS, Rule, rule_of

TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def named(name: str) -> Rule:
    """The rule that `adam`, `FILE.py:NAME` or a composition such as `clip_by_global_norm:adam` means.

    Raises
    ------
    RuleError
        Its text was refused.
    UsageError
        There is none.
    """
    parts = pieces(name)
    if len(parts) == 1 and parts[0] in BUILT_IN:
        rule = BUILT_IN[parts[0]]
        rule.definition  # noqa: B018 - errors appear here
        return rule
    found = [definition(part, last=k == len(parts)) for k, part in enumerate(parts, 1)]
    for own, part in zip(found[:-1], parts, strict=False):
        if own.last.kind == "rule":
            raise UsageError(f"{name!r}: {part} is a rule, and a rule is last in a composition")
    return rule_of(functools.reduce(compose, found), name)


def named_rule(rule: Rule | str) -> Rule:
    """A rule, or the built-in one of this name."""
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str):
        hint = f": write @rule (from optforge import rule) above {rule.__name__}" if inspect.isfunction(rule) else ""
        raise TypeError(f"a rule is made by @rule, or is the name of a built-in one, not {kind(rule)}{hint}")
    if ":" in rule:
        return named(rule)
    if rule not in BUILT_IN:
        listed = f"; there are {', '.join(BUILT_IN)}"
        raise UsageError(f"there is no rule {rule!r}{nearest(rule, BUILT_IN) or listed}")
    return BUILT_IN[rule]


def pieces(name: str) -> list[str]:
    """The parts of a composition: `FILE.py:NAME` is one of them."""
    parts: list[str] = []
    for word in name.split(":"):
        if parts and parts[-1].endswith(".py"):
            parts[-1] += f":{word}"
        else:
            parts.append(word)
    return parts


def definition(part: str, last: bool) -> Composition:
    """One part of a composition."""
    path, colon, own = part.rpartition(":")
    if colon:
        if not own.isidentifier():
            raise UsageError(f"{part!r}: {own!r} is not the name of a rule; write {path}:NAME")
        return parse_file(Path(path), own, BUILT_IN, TRANSFORMS)
    if part.endswith(".py"):
        raise UsageError(f"{part!r} names a file; write {part}:NAME for the rule NAME in it")
    for built_in in (BUILT_IN, TRANSFORMS):
        if part in built_in:
            return built_in[part].definition
    if not part.isidentifier():
        raise UsageError(f"{part!r}: rules are read from files whose names end in .py")
    what = "rule" if last else "transform"
    hint = nearest(part, [*BUILT_IN, *TRANSFORMS]) or "; `optforge list` shows the rules and transforms"
    raise UsageError(f"there is no {what} {part!r}{hint}")


def parse_settings(given: Iterable[str], selected: Sequence[Rule]) -> dict[str, dict[str, object]]:
    """What --set means for each rule, by rule name.

    The settings of a rule come in the order in which it declares them; of a name that is given twice the last counts.

    Raises
    ------
    UsageError
        None of the rules has the name, the value is none for it, or the values break an assert of a rule.
    """
    texts: dict[str, str] = {}
    for item in given:
        name, equals, text = (part.strip() for part in item.partition("="))
        if not (name and equals):
            raise UsageError(f"--set {item}: write NAME=VALUE")
        texts[name] = text
    known = list(dict.fromkeys(name for rule in selected for name in settable(rule)))
    for name, text in texts.items():
        if name not in known:
            whose = f"rule {selected[0].name!r} has no" if len(selected) == 1 else "none of the rules has"
            listed = f"there are {', '.join(known)}" if known else "there is nothing to set"
            raise UsageError(f"--set {name}={text}: {whose} {name!r}{nearest(name, known) or f'; {listed}'}")
    return {rule.name: settings_of(rule, texts) for rule in selected}


def settable(rule: Rule) -> list[str]:
    """What --set can give a rule: its hyperparameters and static options."""
    return [*rule.hyperparameters, *rule.options]


def settings_of(rule: Rule, texts: Mapping[str, str]) -> dict[str, object]:
    """The settings of one rule, from texts by name, of which some may be for other rules."""
    chosen = {name: value(rule, name, texts[name]) for name in settable(rule) if name in texts}
    if chosen:
        try:
            check_hyperparameters(rule.kernel(**chosen), rule.settings(chosen)[0])
        except RuleError:
            raise
        except ValueError as problem:
            raise UsageError(f"--set: {problem}") from problem
    return chosen


def value(rule: Rule, name: str, text: str) -> object:
    """The value of a hyperparameter or an option, from its text."""
    if name in rule.options:
        accepted = rule.accepts(name)
        if not isinstance(rule.options[name], str):
            if text.lower() not in (*TRUE, *FALSE):
                raise UsageError(f"--set {name}={text}: {name!r} is true or false")
            return text.lower() in TRUE
        if text not in accepted:
            listed = " or ".join(map(str, accepted))
            raise UsageError(f"--set {name}={text}: {name!r} is {listed}{nearest(text, map(str, accepted))}")
        return text
    try:
        number = float(text)
    except ValueError:
        raise UsageError(f"--set {name}={text}: {text!r} is not a number") from None
    if math.isnan(number):
        raise UsageError(f"--set {name}={text}: a hyperparameter cannot be NaN")
    if math.isinf(number) and "inf" not in text.lower():
        raise UsageError(f"--set {name}={text}: the number is beyond the range of a double")
    return number
