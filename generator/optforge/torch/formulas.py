"""What groups and state dicts call the hyperparameters and the state of a rule: as PyTorch, which may have it too."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from ..core.diagnostics import UsageError, nearest
from ..frontend.compose import Composition, compose
from ..frontend.settings import ELSEWHERE, double
from ..library.named import definition, named_rule, pieces
from ..library.rule import BUILT_IN, TRANSFORMS, Rule, rule_of
from ..train.interop import PYTORCH
from . import rules

Key = str | tuple[str, int]  # of a parameter group: a name, or a name and a place in the tuple there

RUN = ("foreach", "fused", "capturable", "differentiable")  # how PyTorch is to run a step, which changes no formula


@dataclass(frozen=True)
class Formula:
    """A rule, and what PyTorch's users call what belongs to it.

    Attributes
    ----------
    rule : Rule
    name : str
        What messages call it.
    keys : mapping of str to Key
        Where a parameter group has each hyperparameter.
    state : mapping of str to str
        What each state is called in a parameter's state.
    defaults : mapping of str to Any
        What a parameter group has where nothing else is given, by key: numbers, tuples of them, and static options.
    needed : mapping of str to str
        Static options that are on where a hyperparameter is not 0 in any group.
    steps : bool
        Whether a state dict has the count of steps.
    missing : mapping of str to Any
        What groups of PyTorch do not have, and what it is there.
    others : mapping of str to Any
        What groups of PyTorch have beside it, and have to have, where the formula is this one.
    later : frozenset of str
        State that an option brings, which begins anew where a hyperparameter turns that on.
    """

    rule: Rule
    name: str
    keys: Mapping[str, Key]
    state: Mapping[str, str]
    defaults: Mapping[str, Any]
    needed: Mapping[str, str] = field(default_factory=dict)
    steps: bool = True
    missing: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    later: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for own in fields(self):  # what is given may be a view of a mapping, which cannot be pickled
            if isinstance(getattr(self, own.name), Mapping):
                object.__setattr__(self, own.name, dict(getattr(self, own.name)))

    @property
    def flat(self) -> dict[str, tuple[str, int]]:
        """The hyperparameters that stand in a tuple."""
        return {name: key for name, key in self.keys.items() if isinstance(key, tuple)}

    @functools.cached_property
    def options(self) -> tuple[str, ...]:
        """The static options that parameter groups have."""
        return tuple(name for name in self.rule.options if name not in self.needed)

    def take(self, given: Mapping[str, Any], defaults: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """What a group has, with what is given in place of the defaults; other names are left as they are.

        Raises
        ------
        TypeError, ValueError
            A name is like one that there is, or a tuple has another length.
        """
        taken, flat = dict(defaults), self.flat
        for name, value in given.items():
            if name in flat:
                key, place = flat[name]
                if key in given:
                    raise TypeError(f"{where}{name} and {key} are both given: {key} has {name} in it")
                taken[key] = tuple(value if k == place else own for k, own in enumerate(taken[key]))
            elif isinstance(defaults.get(name), tuple):
                if not isinstance(value, (tuple, list)) or len(value) != len(defaults[name]):
                    names = ", ".join(own for own, key in flat.items() if key[0] == name)
                    raise ValueError(f"{where}{name} is a tuple of {names}, not {value!r}")
                taken[name] = tuple(value)
            else:
                taken[name] = value
        return taken

    def check_names(self, given: Mapping[str, Any], where: str = "", others: bool = False) -> None:
        """Raise TypeError where a name is none of the rule's, or, where others may be, is like one of those."""
        known = [*self.defaults, *self.flat]
        for name in given:
            if name in known or name in RUN:
                continue
            like = nearest(str(name), known) or elsewhere(str(name), known, self.name)
            if like or not others:
                listed = f" (there are {', '.join(self.defaults)})"
                raise TypeError(f"{where}{name!r} is not a hyperparameter of {self.name}{like}{listed}")

    def row(self, group: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """The hyperparameters that a group has, by their names in the rule."""
        row = {}
        for name, key in self.keys.items():
            try:
                value = group[key[0]][key[1]] if isinstance(key, tuple) else group[key]
            except (KeyError, IndexError, TypeError):
                lacks = f"no {key[0]!r} with {name} at place {key[1]}" if isinstance(key, tuple) else f"no {key!r}"
                raise ValueError(f"{where}it has {lacks}, which {self.name} needs") from None
            row[name] = number(value, f"{where}{name}")
        return row

    def chosen(self, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The static options of groups, which all of them share.

        Raises
        ------
        ValueError
            They differ.
        """
        first, options = groups[0] if groups else self.defaults, {}
        for k, group in enumerate(groups):
            for name, value in self.others.items():
                if group.get(name, value) != value:
                    also = f"; {BY_LOWER[self.name]!r} has it" if self.name in BY_LOWER else ""
                    raise ValueError(f"param_groups[{k}]: {self.name} has no {name} (given is {group[name]!r}){also}")
        for name in self.options:
            options[name] = first.get(name, self.defaults[name])
            for group in groups:
                if group.get(name, self.defaults[name]) != options[name]:
                    reason = "one kernel steps all groups: give those that differ an Optimizer of their own"
                    raise ValueError(f"{name!r} differs between the parameter groups; {reason}")
        for name, hyperparameter in self.needed.items():
            options[name] = any(self.row(group)[hyperparameter] != 0 for group in groups)
        return options


def elsewhere(name: str, known: Sequence[str], rule: str) -> str:
    """What to write for a name that another library has, or a transform; empty where nobody has it."""
    ours = ELSEWHERE.get(name, ())
    if ours and set(ours) <= set(known):
        return f"; write {', '.join(f'{own}=…' for own in ours)}"
    for transform in TRANSFORMS:
        if name in TRANSFORMS[transform].hyperparameters:
            return f"; {transform}:{rule} has it"
    return ""


def number(value: Any, name: str) -> float:
    """A hyperparameter as a number; PyTorch's may be tensors of one element.

    Raises
    ------
    TypeError, ValueError
        It is none, or is NaN.
    """
    if type(value) is float and value == value:
        return value
    if callable(value):
        raise TypeError(
            f"{name} is a function of t: schedules stand in param_groups as numbers, which a scheduler of "
            "torch.optim.lr_scheduler changes; LambdaLR takes functions"
        )
    if hasattr(value, "numel"):
        if value.numel() != 1:
            raise ValueError(f"{name} is a tensor of {value.numel()} elements; it is one number")
        value = value.item()
    if isinstance(value, bool):
        raise TypeError(f"{name} is a number, not {value!r}")
    try:
        made = double(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name} is a number, not {value!r}") from None
    if made != made:
        raise ValueError(f"{name} is NaN")
    return made


# ── which formula ───────────────────────────────────────────────────────────────────────────────────────────────────

BETAS: Mapping[str, Key] = MappingProxyType({"beta1": ("betas", 0), "beta2": ("betas", 1)})
ETAS: Mapping[str, Key] = MappingProxyType(
    {
        "etaminus": ("etas", 0),
        "etaplus": ("etas", 1),
        "step_size_min": ("step_sizes", 0),
        "step_size_max": ("step_sizes", 1),
    }
)
WITH_MOMENTUM: Mapping[str, str] = MappingProxyType({"with_momentum": "momentum"})

# The optimizers of torch.optim: their rules here, and what is not told from these.
OF_TORCH: dict[str, tuple[Rule, dict[str, Any]]] = {
    "Adadelta": (rules.adadelta, {}),
    "Adagrad": (rules.adagrad, {"state": {"sum_": "sum"}}),
    "Adam": (rules.adam, {"keys": BETAS, "later": {"max_exp_avg_sq"}}),
    "AdamW": (
        rules.adam,
        {
            "keys": BETAS,
            "later": {"max_exp_avg_sq"},
            "defaults": {"weight_decay": 0.01, "decoupled_weight_decay": True},
        },
    ),
    "Adamax": (rules.adamax, {"keys": BETAS}),
    "ASGD": (rules.asgd, {}),
    "NAdam": (rules.nadam, {"keys": BETAS}),
    "RAdam": (rules.radam, {"keys": BETAS}),
    "RMSprop": (rules.rmsprop, {"needed": WITH_MOMENTUM, "later": {"grad_avg", "momentum_buffer"}}),
    "Rprop": (rules.rprop, {"keys": ETAS}),
    "SGD": (rules.sgd, {"needed": WITH_MOMENTUM, "later": {"momentum_buffer"}, "steps": False}),
}
BY_LOWER = {name.lower(): name for name in OF_TORCH}


def formula(rule: Rule | str, settings: Mapping[str, Any]) -> Formula:
    """The formula of a rule or a name, of a built-in one with settings that only PyTorch's has, too.

    Raises
    ------
    TypeError, ValueError
        There is none.
    """
    if isinstance(rule, type) and rule.__name__ in OF_TORCH:
        raise TypeError(f"the rule is a name: {rule.__name__!r}, not {rule}")
    if not isinstance(rule, str):
        return of_rule(named_rule(rule))
    *before, last = pieces(rule)
    if last in OF_TORCH:
        return of_torch(last, before)
    same = BY_LOWER.get(last)
    if same in OF_TORCH and last in PYTORCH and not PYTORCH[last].fixed:
        # The built-in rule is that formula, but for some of its settings: those of the user decide.
        theirs, own = of_torch(same, before), BUILT_IN[last].hyperparameters
        more = {*theirs.defaults, *theirs.flat} - {*made(BUILT_IN[last], BETAS, {}, {}).defaults, *own}
        if more & settings.keys():
            shared = {name: value for name, value in own.items() if name in theirs.defaults}
            return replace(theirs, defaults={**theirs.defaults, **shared})
    if last.isidentifier() and last not in BUILT_IN and last not in TRANSFORMS:
        like = nearest(last, [*OF_TORCH, *BUILT_IN]) or f"; there are {', '.join([*BUILT_IN, *OF_TORCH])}"
        if last.lower() in BY_LOWER:
            like = f"; did you mean {BY_LOWER[last.lower()]!r}?"
        raise UsageError(f"there is no rule {last!r}{like}")
    return of_rule(named_rule(rule))


def of_torch(name: str, before: Sequence[str] = ()) -> Formula:
    """The formula of an optimizer of PyTorch, with transforms before it."""
    rule, more = OF_TORCH[name]
    if before:
        parts: list[Composition] = [definition(part, last=False) for part in before]
        for part, text in zip(parts, before, strict=True):
            if part.last.kind == "rule":
                raise UsageError(f"{text} is a rule, and a rule is last in a composition")
        rule = rule_of(functools.reduce(compose, [*parts, rule.definition]), ":".join([*before, name]))
    own = made(rule, more.get("keys", {}), more.get("state", {}), more.get("needed", {}))
    defaults = {**own.defaults, **more.get("defaults", {})}
    later = frozenset(more.get("later", ()))
    return replace(own, name=":".join([*before, name]), defaults=defaults, steps=more.get("steps", True), later=later)


def of_rule(rule: Rule) -> Formula:
    """The formula of any rule: its own names, but for those that PyTorch has for the last part of it."""
    last = rule.definition.last.name
    known = PYTORCH.get(last)
    if known is None or Rule(last, lambda: Composition((rule.definition.last,))).hash != BUILT_IN[last].hash:
        names = [name for name in rule.hyperparameters if re.fullmatch(r"beta[1-9]", name)]
        wanted = [f"beta{k}" for k in range(1, len(names) + 1)]
        keys = {name: ("betas", k) for k, name in enumerate(wanted)} if len(names) > 1 and names == wanted else {}
        return made(rule, keys, {}, {})
    own = made(rule, known.hyperparameters, known.state, {})
    others = {name: value for name, value in known.others.items() if name not in own.defaults}
    defaults = {**own.defaults, **others}
    return replace(own, defaults=defaults, steps=known.steps, missing=known.fixed, others=others)


def made(rule: Rule, keys: Mapping[str, Key], state: Mapping[str, str], needed: Mapping[str, str]) -> Formula:
    """A formula with a rule's own names, but for some."""
    all_keys: dict[str, Key] = {name: keys.get(name, name) for name in rule.hyperparameters}
    tuples = {key[0] for key in all_keys.values() if isinstance(key, tuple)}
    for name in (*rule.hyperparameters, *rule.options):
        if name in ("param_names", *RUN) or name in tuples:
            raise UsageError(f"parameter groups of PyTorch use the name {name!r} of rule {rule.name!r}; choose another")
    defaults: dict[str, Any] = {}
    for name, value in rule.hyperparameters.items():
        key = all_keys[name]
        if isinstance(key, tuple):
            defaults[key[0]] = (*defaults.get(key[0], ()), value)
        else:
            defaults[key] = value
    defaults |= {name: value for name, value in rule.options.items() if name not in needed}
    names = {name: state.get(name, name) for name in rule.state}
    return Formula(rule, rule.name, all_keys, names, defaults, needed)
