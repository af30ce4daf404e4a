"""What `optforge generate` is asked for: rules by name, and the files of them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ..core.diagnostics import UsageError, nearest
from ..core.dtypes import DTYPES
from ..core.formats import Wanted
from ..core.names import check_prefix
from ..library import named, targets
from ..library.named import parse_settings
from ..library.rule import BUILT_IN, Rule
from .companions import COMPANIONS, Companion


def rule(name: str) -> Rule:
    """The rule of this name."""
    if name in COMPANIONS:
        raise UsageError(f"{name!r} is no rule; `optforge generate {name}` writes {name}.h")
    return named.named(name)


def select(given: Sequence[str], every: bool) -> list[Rule | Companion]:
    """The rules, and what is emitted beside them, that the command line asks for, each once."""
    wanted = [*given, *([*BUILT_IN, *COMPANIONS] if every else ())]
    if not wanted:
        raise UsageError("no rule is given; name some, or say --all")
    found: dict[str, Rule | Companion] = {}
    for name in dict.fromkeys(wanted):
        rule = COMPANIONS.get(name) or named.named(name)
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
    from ..emit.layout import bundle

    check_prefix(name, "bundle")
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
    from ..emit.c import rule_view
    from ..emit.project import project
    from ..emit.python_package import package

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
