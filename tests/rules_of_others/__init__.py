"""Rules of papers and of other libraries, written as their users would write them.

Every rule of every module here, and every composition bound to a name there, is in `RULES` by that name.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from typing import Any

import optforge as of

MODULES = tuple(sorted(found.name for found in pkgutil.iter_modules(__path__)))


def collect() -> dict[str, dict[str, of.Rule]]:
    """The rules of each module."""
    found = {}
    for module in MODULES:
        names = vars(importlib.import_module(f"{__name__}.{module}"))
        found[module] = {name: own for name, own in names.items() if isinstance(own, of.Rule)}
    return found


COLLECTED = collect()
RULES = {name: rule for rules in COLLECTED.values() for name, rule in rules.items()}


def module_of(name: str) -> str:
    """The module that has a rule."""
    return next(module for module, rules in COLLECTED.items() if name in rules)


def variants(rule: of.Rule) -> list[dict[str, Any]]:
    """Choices of a rule's static options in which any two options have every pair of their values, the defaults first."""
    names = list(rule.options)
    left = [dict(zip(names, values, strict=True)) for values in itertools.product(*map(rule.accepts, names))]
    chosen, seen = [], set()
    best = dict(rule.options)
    while True:
        chosen.append(best)
        seen |= pairs(best)
        best = max(left, key=lambda options: len(pairs(options) - seen))
        if not pairs(best) - seen:
            return chosen


def pairs(options: dict[str, Any]) -> set[Any]:
    """The pairs of values in a choice of options, and the values themselves."""
    return {frozenset(some) for size in (1, 2) for some in itertools.combinations(options.items(), size)}


def label(name: str, options: dict[str, Any]) -> str:
    """A name of C for a rule under a choice of its options, which tells the choices apart."""
    changed = {key: value for key, value in options.items() if value != RULES[name].options[key]}
    words = [
        key if value is True else f"no_{key}" if value is False else f"{key}_{value}" for key, value in changed.items()
    ]
    return "_".join([name, *words])


CASES = [(name, options) for name, rule in RULES.items() for options in variants(rule)]

# Hyperparameters far from the defaults, under which what comes late comes within a few steps.
SETTINGS: dict[str, dict[str, float]] = {
    "accsgd": {"kappa": 20.0, "xi": 3.0},
    "adabound": {"gamma": 0.3, "final_lr": 0.05},
    "adamod": {"beta3": 0.6},
    "adai": {"eps": 0.01},
    "addsign": {"decay_steps": 4.0},
    "ademamix": {"T": 4.0},
    "agc_nag": {"eps": 0.5, "clip_factor": 0.1},
    "dadapt_adam": {"d0": 0.01, "growth_rate": 1.5},
    "dadapt_sgd": {"d0": 0.01, "growth_rate": 1.5},
    "dog": {"reps_rel": 0.01},
    "dowg": {"eps": 0.01},
    "fromage": {"lr": 0.3, "p_bound": 1.001},
    "irprop": {"delta_max": 0.15, "delta_min": 0.04},
    "keras_ftrl": {"learning_rate_power": -0.5, "initial_accumulator_value": 0.3},
    "laprop": {"ε": 1e-3},
    "lookahead_adam": {"k": 2.0},
    "noam_adam": {"warmup": 3.0, "factor": 5.0},
    "polyak_sgd": {"start": 2.0},
    "powersign": {"decay_steps": 4.0},
    "prodigy": {"d0": 0.01, "growth_rate": 1.5},
    "ranger": {"k": 3.0},
    "centralized_ranger": {"k": 3.0},
    "schedule_free_adamw": {"warmup_steps": 3.0, "r": 0.5},
    "schedule_free_sgd": {"warmup_steps": 3.0, "r": 0.5},
    "sophia": {"k": 3.0, "rho": 0.2, "bs": 2.0},
    "swats": {"tolerance": 0.02},
    "torch_adafactor": {"eps1": 1e-2, "eps2": 1.01, "d": 1.1},
    "torch_adagrad": {"eps": 1e-3},
    "torch_asgd": {"t0": 2.0, "lambd": 0.3},
    "torch_rprop": {"lr": 0.03, "step_size_max": 0.04, "step_size_min": 0.005},
}


def settings(name: str) -> dict[str, float]:
    """Hyperparameters for tests: those of the table, and the others moved away from their defaults."""
    own = SETTINGS.get(name, {})
    return {key: own.get(key, moved(key, value)) for key, value in RULES[name].hyperparameters.items()}


def moved(key: str, value: float) -> float:
    """Another value than a default, of its sign, and below 1 where it is."""
    if value == 0:
        return 0.03
    if value < 1e-2 and ("lr" in key or "learning_rate" in key or key == "α"):
        return 0.02
    return value * 0.83 if value < 1 else value * 1.3
