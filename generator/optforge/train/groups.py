"""Parameter groups: what each is given, and how it is read and set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NoReturn

from ..core.diagnostics import nearest
from ..core.tracebacks import SHORT
from ..library.rule import Rule
from .optimizer_like import OptimizerLike


class Group(MutableMapping[str, Any]):
    """A parameter group: its "params", and its hyperparameters by name, which can be set.

    Setting one is like setting it on the optimizer, for this group alone: `opt.groups[1]["lr"] = 1e-4`.
    """

    def __init__(self, optimizer: OptimizerLike, number: int):
        self._optimizer, self._number = optimizer, number

    def _values(self) -> dict[str, float]:
        return self._optimizer._hyper.of(self._number)

    def __getitem__(self, name: str) -> Any:
        if name == "params":
            params = self._optimizer.params
            return params[self._number] if self._optimizer._structure.grouped else params
        return self._values()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        known = self._optimizer._hyper.names
        if name not in known:
            if name == "params" or name in self._optimizer._options:
                raise ValueError(f"{name!r} of a group was fixed when the Optimizer was made; make another one")
            listed = f"there are {', '.join(known)}" if known else "there are none"
            raise ValueError(f"{name!r} is not a hyperparameter{nearest(str(name), known)} ({listed})")
        with SHORT:
            self._optimizer._assign([self._number], name, value)

    def __delitem__(self, name: str) -> NoReturn:
        raise TypeError(f"a group keeps all its hyperparameters, and so {name!r}")

    def __iter__(self) -> Iterator[str]:
        return iter(["params", *self._optimizer._hyper.names])

    def __len__(self) -> int:
        return 1 + len(self._optimizer._hyper.names)

    def __repr__(self) -> str:
        shown = [f"{name!r}: {value!r}" for name, value in self._values().items()]
        return "{" + ", ".join(["'params': …", *shown]) + "}"


def settle(
    rule: Rule, common: Mapping[str, Any], own: Sequence[Mapping[str, Any]], grouped: bool
) -> tuple[list[dict[str, Any]], dict[str, bool | str]]:
    """The hyperparameters of each group, numbers or functions of t, and the static options, from what was given.

    Raises
    ------
    TypeError, ValueError
        A name is not the rule's, a value does not do, or a group has a static option.
    """
    values, options = chosen(rule, common)
    if not grouped:
        return [values], options
    hyperparameters = {name: value for name, value in common.items() if name not in options}
    rows = []
    for k, given in enumerate(own):
        for name in given:
            if not isinstance(name, str):
                raise TypeError(f"groups[{k}] has the key {name!r}, which is no name")
            if name in options:
                reason = "is fixed in the kernel, which all groups share: give it to the Optimizer itself"
                raise ValueError(f"groups[{k}]: option {name!r} {reason}")
        with within(f"groups[{k}]: "):
            rows.append(chosen(rule, {**hyperparameters, **given})[0])
    return rows, options


def chosen(rule: Rule, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bool | str]]:
    """All hyperparameters and options of a rule, with the given ones in place of the defaults."""
    functions = {name: value for name, value in given.items() if callable(value) and name in rule.hyperparameters}
    values, options = rule.settings({name: value for name, value in given.items() if name not in functions})
    return {**values, **functions}, options


@contextlib.contextmanager
def within(where: str) -> Iterator[None]:
    """Errors begin with where they are."""
    try:
        yield
    except (TypeError, ValueError) as problem:
        raise type(problem)(f"{where}{problem}") from None
