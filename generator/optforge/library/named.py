"""Rules and settings as the command line names them."""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

from . import rules, targets, transforms
from .companions import COMPANIONS, Companion
from .compose import Composition, compose
from .diagnostics import RuleError, UsageError, nearest
from .dtypes import DTYPES
from .finding import parse_file
from .formats import Wanted
from .language import Rule, Transform, rule_of
from .names import check_prefix
from .scalars import check_hyperparameters

BUILT_IN = cast("Mapping[str, Rule]", rules)  # the packages stand as mappings
TRANSFORMS = cast("Mapping[str, Transform]", transforms)
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
    if name in COMPANIONS:
        raise UsageError(f"{name!r} is no rule; `optforge generate {name}` writes {name}.h")
    if len(parts) == 1 and parts[0] in BUILT_IN:
        rule = BUILT_IN[parts[0]]
        rule.definition  # noqa: B018 - errors appear here
        return rule
    found = [definition(part, last=k == len(parts)) for k, part in enumerate(parts, 1)]
    for own, part in zip(found[:-1], parts, strict=False):
        if own.last.kind == "rule":
            raise UsageError(f"{name!r}: {part} is a rule, and a rule is last in a composition")
    return rule_of(functools.reduce(compose, found), name)


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
        return parse_file(Path(path), own)
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


def select(given: Sequence[str], every: bool) -> list[Rule | Companion]:
    """The rules, and what is emitted beside them, that the command line asks for, each once."""
    wanted = [*given, *([*BUILT_IN, *COMPANIONS] if every else ())]
    if not wanted:
        raise UsageError("no rule is given; name some, or say --all")
    found: dict[str, Rule | Companion] = {}
    for name in dict.fromkeys(wanted):
        rule = COMPANIONS.get(name) or named(name)
        if rule.name in found and found[rule.name].hash != rule.hash:
            raise UsageError(f"two different rules are called {rule.name!r}; emit them one at a time, with --prefix")
        found.setdefault(rule.name, rule)
    return list(found.values())


def emit(
    selected: Sequence[Rule | Companion],
    wanted: Sequence[str],
    stored: Wanted,
    settings: Sequence[str],
    prefix: str | None,
    single: bool = False,
    bundle: str | None = None,
    layout: str | None = None,
) -> dict[str, str]:
    """The files, for each of the targets that are wanted: name to text.

    `single` files need no others; a `bundle` is one pair of this name for all rules; a `layout` is "project" or
    "python".
    """
    if prefix is not None and len(selected) > 1:
        raise UsageError("--prefix names the files of one rule; give one rule")
    if layout is not None:
        if single or bundle is not None:
            raise UsageError("--layout says where all files go: leave --single and --bundle out")
        return laid_out(layout, selected, wanted, stored, settings, prefix)
    if bundle is not None:
        return bundled(bundle, selected, wanted, stored, settings, prefix, single)
    chosen = parse_settings(settings, [rule for rule in selected if isinstance(rule, Rule)])
    files: dict[str, str] = {}
    for target in dict.fromkeys(wanted):
        targets.renderer(target)  # raises where there is none
        for item in selected:
            if isinstance(item, Rule):
                files |= item.emit(target, stored, prefix, chosen[item.name], single)
            else:
                files |= item.emit(target, prefix)
    if not files:
        raise UsageError(f"{selected[0].name!r} is C for the host: emit it with --target c")
    return files


def bundled(
    name: str,
    selected: Sequence[Rule | Companion],
    wanted: Sequence[str],
    stored: Wanted,
    settings: Sequence[str],
    prefix: str | None,
    single: bool,
) -> dict[str, str]:
    """The pair of files of a bundle."""
    from .layout import bundle

    check_prefix(name)
    if [*dict.fromkeys(wanted)] != ["c"]:
        raise UsageError("--bundle is of C: leave --target out")
    if single or prefix is not None:
        raise UsageError("--bundle makes one pair of files of all rules: leave --single and --prefix out")
    rules = [item for item in selected if isinstance(item, Rule)]
    chosen = parse_settings(settings, rules)
    texts = [rule.text(stored, chosen[rule.name], (f"--bundle {name}",)) for rule in rules]
    if name in (text.prefix for text in texts):
        raise UsageError(f"the bundle {name!r} is called like one of its rules: give it another name")
    if not texts:
        raise UsageError("a bundle is of rules, and none was given")
    return bundle(name, texts)


LAYOUTS = ("project", "python")


def laid_out(
    name: str,
    selected: Sequence[Rule | Companion],
    wanted: Sequence[str],
    stored: Wanted,
    settings: Sequence[str],
    prefix: str | None,
) -> dict[str, str]:
    """The files of a project, or of a Python package."""
    from .crule import rule_view
    from .project import project
    from .pypackage import package

    if name not in LAYOUTS:
        listed = f"; there are {', '.join(LAYOUTS)}"
        raise UsageError(f"there is no layout {name!r}{nearest(name, LAYOUTS) or listed}")
    if [*dict.fromkeys(wanted)] != ["c"]:
        raise UsageError("--layout is of C: leave --target out")
    if stored.own:
        raise UsageError("--layout is of arrays of float and double: leave --store, --master and --rounding out")
    rules = [item for item in selected if isinstance(item, Rule)]
    others = [item for item in selected if not isinstance(item, Rule)]
    if not rules:
        raise UsageError(f"a {name} is of rules, and none was given")
    chosen = parse_settings(settings, rules)
    every = [{**rule.definition.settings, **chosen[rule.name]} for rule in rules]
    kernels = [rule.kernel(**own) for rule, own in zip(rules, every, strict=True)]
    storages = [stored.storages(kernel) for kernel in kernels]
    views = [rule_view(rule, kernels[k], storages[k], prefix, every[k]) for k, rule in enumerate(rules)]
    flags = [f"--dtype {own.suffix}" for own in storages[0]] if len(storages[0]) < len(DTYPES) else []
    flags += [f"--set {shlex.quote(setting)}" for setting in settings]
    flags += [f"--prefix {prefix}"] if prefix is not None else []
    origins = [shlex.quote(item.origin if isinstance(item, Rule) else item.name) for item in selected]
    command = " ".join(["optforge generate", *origins, *flags, f"--layout {name} --out DIR"])
    if name == "project":
        return project(views, kernels, {k: v for item in others for k, v in item.emit("c", None).items()}, command)
    if len(selected) > 1:
        raise UsageError("--layout python is a package of one rule: give one")
    return package(rules[0], views[0], kernels[0], command)


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
