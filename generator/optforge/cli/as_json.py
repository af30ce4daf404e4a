"""What `optforge list` and `optforge show` say, for programs: the same as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ..core.dtypes import F32
from ..core.formats import Storage, Wanted
from ..core.ir import Kernel
from ..library.rule import BUILT_IN, TRANSFORMS, Rule
from .companions import COMPANIONS
from .describe import computed


def text(value: object) -> str:
    """JSON that every parser takes, in ASCII, so that any terminal and pipe does too."""
    return json.dumps(value, indent=2, allow_nan=False)


def number(value: float | str) -> float | str:
    """A number; one that is not finite as text, for which JSON has no other place."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def listed() -> dict[str, Any]:
    """The built-in rules, the transforms, and what else is emitted."""
    return {
        "rules": [
            {
                "name": rule.name,
                "summary": summary(rule.doc),
                "state": list(rule.state),
                "hyperparameters": {name: number(value) for name, value in rule.hyperparameters.items()},
                "options": dict(rule.options),
                "bytes_per_element": F32.bytes * sum(rule.kernel().moved),
            }
            for rule in (BUILT_IN[name] for name in BUILT_IN)
        ],
        "transforms": [
            {
                "name": own.name,
                "summary": summary(own.doc),
                "hyperparameters": {name: number(value) for name, value in own.hyperparameters.items()},
                "options": dict(own.options),
            }
            for own in (TRANSFORMS[name] for name in TRANSFORMS)
        ],
        "companions": [{"name": name, "summary": summary(own.doc)} for name, own in COMPANIONS.items()],
    }


def described(rule: Rule, settings: Mapping[str, object], wanted: Wanted) -> dict[str, Any]:
    """A rule: declarations, passes over memory and the bytes that they move, with arrays stored as is wanted."""
    kernel, storages = rule.stored(wanted, settings)
    hyperparameters, options = rule.settings(settings)
    return {
        "name": rule.name,
        "origin": rule.origin,
        "doc": rule.doc.strip(),
        "formulas": rule.definition.formulas,
        "hyperparameters": {name: number(value) for name, value in hyperparameters.items()},
        "options": {name: {"value": value, "accepts": list(rule.accepts(name))} for name, value in options.items()},
        "state": [
            {"name": own.name, "per": "tensor" if own.scalar else "element", "initial": number(own.initial)}
            for own in kernel.state
        ],
        "scalars": [
            {"per": scope, "behind_phase": phase, "formulas": lines} for scope, phase, lines in computed(kernel)
        ],
        "storages": [stored(kernel, own) for own in storages],
        "hash": rule.hash,
    }


def stored(kernel: Kernel, storage: Storage) -> dict[str, Any]:
    """One way to store arrays: their formats, and what each pass reads, writes and moves per element."""
    usual = [phase for phase in kernel.phases if not phase.optional]
    passes = [(list(phase.loads), [name for name, _ in phase.stores]) for phase in usual]
    moved = [storage.moved(*own) for own in passes]
    return {
        "suffix": storage.suffix,
        "formats": {name: storage[name].name for name in kernel.arrays},
        "master": storage.master or None,
        "rounding": "stochastic" if storage.stochastic else "nearest",
        "phases": [
            {"reads": reads, "writes": writes, "bytes_per_element": size}
            for (reads, writes), size in zip(passes, moved, strict=True)
        ],
        "bytes_per_element": sum(moved),
    }


def summary(doc: str) -> str:
    """The first line of a docstring."""
    return doc.strip().partition("\n")[0]
