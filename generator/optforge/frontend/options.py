"""The static options of a rule: what each accepts, and every choice of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from ..core.diagnostics import UsageError
from .compose import Composition

Options = Mapping[str, bool | str]

MOST_CONFIGURATIONS = 64


def choices(composition: Composition) -> dict[str, tuple[bool | str, ...]]:
    """The values that each static option accepts: both truth values, or the strings it is compared with."""
    found: dict[str, dict[bool | str, None]] = {
        name: dict.fromkeys([default, not default] if isinstance(default, bool) else [default])
        for name, default in composition.options.items()
    }
    for part in composition.parts:
        for name, strings in part.compared.items():
            if isinstance(composition.options[name], str):
                found[name].update(dict.fromkeys(strings))
    return {name: tuple(values) for name, values in found.items()}


def choose(composition: Composition, chosen: Mapping[str, object]) -> dict[str, bool | str]:
    """All options with the chosen values, checked."""
    options = dict(composition.options)
    accepted = choices(composition) if chosen else {}
    for name, value in chosen.items():
        allowed = accepted[name]
        if getattr(getattr(value, "dtype", None), "kind", "") == "b":  # NumPy's truth values
            value = bool(value)
        if type(value) is not type(options[name]) or value not in allowed:
            listed = " or ".join(map(repr, allowed))
            raise UsageError(f"option {name!r} of rule {composition.name!r} takes {listed}, not {value!r}")
        assert isinstance(value, (bool, str))
        options[name] = value
    return options


def configurations(composition: Composition) -> Iterator[Options]:
    """Every choice of the options, or, where these are too many, the default and each single change of it."""
    values = choices(composition)
    total = 1
    for allowed in values.values():
        total *= len(allowed)
    if total <= MOST_CONFIGURATIONS:
        for combination in itertools.product(*values.values()):
            yield dict(zip(values, combination, strict=True))
    else:
        yield composition.options
        for name, allowed in values.items():
            for value in allowed[1:]:
                yield {**composition.options, name: value}
