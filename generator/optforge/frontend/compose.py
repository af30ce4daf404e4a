"""Definitions put together: transforms, in the order in which they see the gradient, and the rule behind them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..core import bounds
from ..core.diagnostics import Text, UsageError, nearest
from ..core.ir import State
from ..core.names import spelled
from .parse import Definition


@dataclass(frozen=True)
class Composition:
    """A rule with its transforms, most often none; or transforms alone, until a rule comes behind them.

    `settings` are defaults and options other than those of the signatures.
    """

    parts: tuple[Definition, ...]
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def last(self) -> Definition:
        """The rule, or the last transform."""
        return self.parts[-1]

    @property
    def in_order(self) -> tuple[Definition, ...]:
        """The parts in the order in which they are declared: the rule comes first."""
        return (self.last, *self.parts[:-1])

    @property
    def name(self) -> str:
        """The names of the parts."""
        return "_".join(part.name for part in self.parts)

    @property
    def doc(self) -> str:
        """The rule's docstring; of a composition, one that says what it is made of."""
        if len(self.parts) == 1:
            return self.last.doc
        summaries = [f"{part.name}: {part.doc.partition(chr(10))[0]}".rstrip(" :") for part in self.parts]
        return "\n".join([f"{' >> '.join(part.name for part in self.parts)}.", "", *summaries])

    @property
    def text(self) -> Text:
        """The text that the last part stands in."""
        return self.last.text

    @property
    def formulas(self) -> str:
        """The authors' own lines, under their names where there are several parts."""
        if len(self.parts) == 1:
            return self.last.formulas
        return "\n".join(f"# {part.name}\n{part.formulas}" for part in self.parts)

    @property
    def hash(self) -> str:
        """SHA-256 over the parsed forms of the parts."""
        if len(self.parts) == 1:
            return self.last.hash
        return hashlib.sha256(" ".join(part.hash for part in self.parts).encode()).hexdigest()

    @property
    def state(self) -> tuple[State, ...]:
        """The state of all parts."""
        return tuple(state for part in self.in_order for state in part.state)

    @functools.cached_property
    def hyperparameters(self) -> dict[str, float]:
        """Names with their defaults."""
        own = {name: value for part in self.in_order for name, value in part.hyperparameters.items()}
        return {name: float(self.settings.get(name, value)) for name, value in own.items()}  # type: ignore[arg-type]

    @functools.cached_property
    def options(self) -> dict[str, bool | str]:
        """Static options with their defaults."""
        own = {name: value for part in self.in_order for name, value in part.options.items()}
        return {name: self.settings.get(name, value) for name, value in own.items()}  # type: ignore[misc]

    @property
    def time(self) -> bool:
        """Whether a part reads the step count."""
        return any(part.time for part in self.parts)


def compose(first: Composition, second: Composition) -> Composition:
    """`first` before `second`, checked.

    Raises
    ------
    UsageError
        A name means two things, a transform takes a hyperparameter from the rule that it has not, or it is all too
        large.
    """
    together = Composition((*first.parts, *second.parts), {**first.settings, **second.settings})
    check_size(together)
    owner: dict[str, str] = {}
    for part in together.parts:
        for name in [*(state.name for state in part.state), *part.hyperparameters, *part.options]:
            if name in owner:
                again = f"{owner[name]!r} and {part.name!r} both have {name!r}"
                if owner[name] == part.name:
                    again = f"{part.name!r} is there twice, and so is its {name!r}"
                raise UsageError(f"{again}; in a composition every name is one thing")
            owner[name] = part.name
    if together.last.kind == "rule":
        check_borrowed(together)
    return together


def check_size(together: Composition) -> None:
    """Raise UsageError where the parts together are larger than a rule can be."""
    parts = together.parts
    for number, most, what in (
        (len(parts), bounds.PARTS, "parts"),
        (len(spelled(together.name)), bounds.COMPOSED_NAME, "characters in its name, {0}"),
        (sum(part.nodes for part in parts), bounds.NODES, "nodes of syntax"),
        (sum(len(part.reductions) for part in parts), bounds.REDUCTIONS, "reductions"),
        (sum(len(part.state) for part in parts), bounds.STATES, "states"),
        (sum(len(part.hyperparameters) for part in parts), bounds.HYPERPARAMETERS, "hyperparameters"),
        (sum(len(part.options) for part in parts), bounds.OPTIONS, "static options"),
    ):
        if number > most:
            name = f"{together.name[:60]}…" if len(together.name) > 60 else together.name
            raise UsageError(
                f"the composition is too large: it has {number:,} {what.format(name)}, of at most {most:,}"
            )


def check_borrowed(together: Composition) -> None:
    """Raise UsageError where a transform takes a hyperparameter that no other part has."""
    for part in together.parts:
        for name in part.borrowed:
            if name not in together.hyperparameters:
                known = together.hyperparameters
                listed = f"; it has {', '.join(together.last.hyperparameters) or 'none'}"
                raise UsageError(
                    f"transform {part.name!r} takes {name!r} from its rule, and rule {together.last.name!r} has no "
                    f"hyperparameter {name!r}{nearest(name, known) or listed}"
                )
