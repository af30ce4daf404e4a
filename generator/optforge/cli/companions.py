"""What is emitted beside the rules: files for engines that no rule needs, but a training run does."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from ..core.dtypes import F64
from ..core.names import check_prefix
from ..emit.text import fold, render_template, status_lines


@dataclass(frozen=True)
class Companion:
    """One header that stands alone, under a name as rules have.

    Attributes
    ----------
    name : str
        On the command line, and of the file.
    doc : str
        What it does, in a line.
    text : callable
        Its text, from the prefix of its names and the command that makes it again.
    """

    name: str
    doc: str
    text: Callable[[str, str], str]

    @property
    def hash(self) -> str:
        """What tells it from a rule of the same name."""
        return f"companion {self.name}"

    def emit(self, target: str, prefix: str | None) -> dict[str, str]:
        """File name to text; nothing for other targets than "c", since it runs on the host whatever runs the steps.

        Raises
        ------
        UsageError
            The prefix is no C identifier.
        """
        check_prefix(prefix)
        own = self.name if prefix is None else prefix
        command = f"optforge generate {self.name}{'' if prefix is None else f' --prefix {prefix}'}"
        return {f"{own}.h": self.text(own, command)} if target == "c" else {}


PLATEAU_STATUSES = (
    ("OK", 0, "done"),
    ("ERROR_NULL", 1, "a pointer is NULL"),
    ("ERROR_SIZE", 2, "a struct was not initialised, or is of another version"),
    ("ERROR_CHOICE", 3, "mode, counting or threshold_mode is none of its values"),
    ("ERROR_FACTOR", 4, "factor is not between 0 and 1"),
    ("ERROR_THRESHOLD", 5, "threshold is not a number from 0, below 1 where it is relative"),
    ("ERROR_MIN_LR", 6, "min_lr is not a number from 0"),
    ("ERROR_EPS", 7, "eps is not a number from 0"),
    ("ERROR_LR", 8, "the learning rate is not finite"),
    ("ERROR_METRIC", 9, "the metric is NaN, or infinitely good"),
    ("REDUCED", -1, "the learning rate was reduced"),
)


def plateau(prefix: str, command: str) -> str:
    """The header that does what ReduceLROnPlateau does."""
    from ..train.plateau import EPS, ReduceLROnPlateau

    given = {name: own.default for name, own in inspect.signature(ReduceLROnPlateau).parameters.items()}
    numbers = {name: F64.constant(given[name]) for name in ("factor", "threshold", "min_lr")}
    counts = {name: given[name] for name in ("patience", "cooldown")}
    context = {
        "prefix": prefix,
        "command": command,
        "statuses": status_lines(prefix, PLATEAU_STATUSES),
        "default": numbers | counts,
        "eps": {counting: F64.constant(eps) for counting, eps in EPS.items()},
    }
    return fold(render_template("plateau.h.j2", context))


COMPANIONS = {
    made.name: made
    for made in (Companion("plateau", "Reduces a learning rate when a metric stops improving: one C header.", plateau),)
}
