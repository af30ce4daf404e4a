"""A rule's own text over another library's arrays: how people would write the rule there themselves."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from ...core.ir import State
from ...frontend.compose import Composition
from ...frontend.plain_python import compiled, square
from .side import NoPeer

GLOBAL = ("global_norm", "global_sum")


class Text:
    """A rule's text, with the functions of a library.

    Parameters
    ----------
    composition : Composition
    functions : mapping of str to callable
        What the names of the language mean, for scalars and arrays alike.
    builtins : mapping, optional
        What else Python's names mean: torch.compile looks for some of them.
    like : callable
        An array like the first argument that holds the second, a number.

    Raises
    ------
    NoPeer
        It reduces over all tensors at once, which it sees one at a time.
    """

    def __init__(
        self,
        composition: Composition,
        functions: Mapping[str, Callable[..., Any]],
        like: Callable[[Any, Any], Any],
        builtins: Mapping[str, Any] = MappingProxyType({"AssertionError": AssertionError}),
    ):
        self.composition, self.like = composition, like
        self.parts: list[tuple[Any, Any]] = []
        for part in composition.parts:
            if any(part.aliases.get(call.func.id, call.func.id) in GLOBAL for call in part.reductions):  # type: ignore[attr-defined]
                raise NoPeer(f"{part.name} reduces over all tensors together")
            names: dict[str, Any] = {
                **functions,
                "square of": square,
                "__builtins__": dict(builtins),
            }
            names |= {alias: functions[name] for alias, name in part.aliases.items() if name in functions}
            self.parts.append((part, types.FunctionType(compiled(part), names)))

    def start(self, state: State, p: Any, g: Any, known: Mapping[str, Any]) -> Any:
        """What a state starts as."""
        if state.initial in ("p", "g"):
            return self.like(p, 0) + (p if state.initial == "p" else g)
        value = known[state.initial] if isinstance(state.initial, str) else state.initial
        return float(value) if state.scalar else self.like(p, float(value))

    def step(
        self, p: Any, g: Any, state: dict[str, Any], settings: Mapping[str, Any], t: Any
    ) -> tuple[Any, dict[str, Any]]:
        """New values of a tensor's parameter and state."""
        known: dict[str, Any] = {**settings, "t": t, "p": p, "g": g}
        for part, run in self.parts:
            for own in part.state:
                known[own.name] = state[own.name] if own.name in state else self.start(own, p, known["g"], known)
            keywords = [*part.hyperparameters, *part.borrowed, *part.options, *(["t"] if part.time else [])]
            taken = [*part.takes, *(own.name for own in part.state)]
            values = run(*(known[name] for name in taken), **{name: known[name] for name in keywords})
            returned = [*part.changes, *(own.name for own in part.state)]
            known |= zip(returned, values if isinstance(values, tuple) else (values,), strict=True)
        return known["p"], {own.name: known[own.name] for own in self.composition.state}
