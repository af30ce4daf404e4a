"""Hyperparameters and static options as they are given, checked against what a rule declares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ..core.diagnostics import nearest
from .compose import Composition
from .options import choose

ELSEWHERE = {  # names that other libraries have, and ours
    "alpha": ("rho",),
    "beta_1": ("beta1",),
    "beta_2": ("beta2",),
    "betas": ("beta1", "beta2"),
    "b1": ("beta1",),
    "b2": ("beta2",),
    "epsilon": ("eps",),
    "learning_rate": ("lr",),
}


def settings(composition: Composition, given: Mapping[str, object]) -> tuple[dict[str, float], dict[str, bool | str]]:
    """All hyperparameters and options, with the given ones in place of the defaults.

    Raises
    ------
    TypeError
        A name is not the rule's, or a value is no number.
    ValueError
        NaN, or an option that takes other values.
    """
    known = [*composition.hyperparameters, *composition.options]
    for name in given:
        if name not in known:
            listed = f"; it has {', '.join(known)}" if known else "; it has none"
            if {*ELSEWHERE.get(name, ("",))} <= {*known}:
                listed = f"; write {', '.join(f'{own}=…' for own in ELSEWHERE[name])}"
                raise TypeError(f"{composition.last.kind} {composition.name!r} has no hyperparameter {name!r}{listed}")
            what = f"{composition.last.kind} {composition.name!r}"
            raise TypeError(f"{what} has no hyperparameter {name!r}{nearest(name, known) or listed}")
    options = choose(composition, {name: value for name, value in given.items() if name in composition.options})
    hyperparameters = dict(composition.hyperparameters)
    for name, value in given.items():
        if name in hyperparameters:
            hyperparameters[name] = real(name, value)
    return hyperparameters, options


def check_seed(seed: object) -> None:
    """Raise where this is no seed of stochastic rounding.

    Raises
    ------
    TypeError, ValueError
        It is no whole number, or has more than 64 bits.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed is a whole number, not {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is a whole number from 0 to 2^64 - 1, not {seed}")


def configure(composition: Composition, given: Mapping[str, object]) -> Composition:
    """The composition with other defaults and options; errors as of `settings`."""
    hyperparameters, options = settings(composition, given)
    every = {**hyperparameters, **options}
    return replace(composition, settings={**composition.settings, **{name: every[name] for name in given}})


def double(value: object) -> float:
    """A number as a double: of Python, of NumPy, or an array of one; what float() would make of a text is none.

    Raises
    ------
    TypeError, ValueError, OverflowError
        It is no number, or is beyond the range of a double.
    """
    dtype = getattr(value, "dtype", None)
    other = getattr(dtype, "kind", "") in tuple("bSUmM") or str(dtype) == "torch.bool"
    if other or isinstance(value, (bool, str, bytes, bytearray, memoryview)):
        raise TypeError(f"{value!r} is no number")
    return float(value)  # type: ignore[arg-type]


def real(name: str, value: object, where: str = "") -> float:
    """A hyperparameter's value as a double; NaN is refused, in a message that begins with `where`."""
    try:
        number = double(value)
    except (TypeError, ValueError):
        raise TypeError(f"{where}hyperparameter {name!r} is a number, not {value!r}") from None
    except OverflowError:
        raise ValueError(f"{where}hyperparameter {name!r} is beyond the range of a double") from None
    if number != number:
        raise ValueError(f"{where}hyperparameter {name!r} is NaN")
    return number
