"""What the shell offers when a command is completed: names of rules, those in files, and the values of options."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path

from ..core.diagnostics import OptforgeError

ASKED = "_OPTFORGE_COMPLETE"  # the variable in which a shell says that it completes
BEFORE = "_OPTFORGE_COMPLETE_BEFORE"
BREAKS = (":", "=")


def prepare(environment: MutableMapping[str, str]) -> None:
    """Undo what bash does to `clip_by_norm:adam`: it hands over three words, and replaces the last of them alone.

    What stands before that one in the word goes into a variable, where `names` finds it.
    """
    if environment.get(ASKED) != "complete_bash":
        return
    words = environment.get("COMP_WORDS", "").split("\n")
    at = int(environment.get("COMP_CWORD", "0"))
    joined: list[str] = []
    for word in words[:at]:
        glued = joined and (word in BREAKS or joined[-1].endswith(BREAKS))
        joined[-1:] = [joined[-1] + word] if glued else [*joined[-1:], word]
    current = words[at] if at < len(words) else ""
    before = ""
    if current in BREAKS or (joined and joined[-1].endswith(BREAKS)):
        before = joined.pop()
        before, current = (before + current, "") if current in BREAKS else (before, current)
    words = [*joined, current]
    environment.update({"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(joined)), BEFORE: before})


def names(incomplete: str) -> list[str]:
    """The rules, transforms and files that a word may become."""
    before = os.environ.get(BEFORE, "")
    offered = beginning(before + incomplete)
    while len(offered) == 1 and offered[0].endswith((":", "/")) and (further := beginning(offered[0])):
        offered = further  # a shell puts a space behind what is offered alone
    return [name.removeprefix(before) for name in offered]


def beginning(word: str) -> list[str]:
    """What begins with a word."""
    return [name for name in spelled(word) if name.startswith(word)]


def spelled(word: str) -> Iterator[str]:
    """What may stand where `word` stands: `adam`, `clip_by_norm:`, `FILE.py:`, `FILE.py:NAME`."""
    from ..library.rule import BUILT_IN, TRANSFORMS

    parts, colon, last = word.rpartition(":")
    if parts.endswith(".py"):
        yield from (f"{parts}:{name}" for name in rules_of(Path(parts.rpartition(":")[2])))
        return
    yield from (f"{parts}{colon}{name}" for name in BUILT_IN)
    yield from (f"{parts}{colon}{name}:" for name in TRANSFORMS)
    for path in files(last):
        yield f"{parts}{colon}{path}"


def rules_of(path: Path) -> list[str]:
    """The rules and transforms of a file, which is read and never executed; none where it cannot be."""
    from ..frontend.files import declared

    try:
        return declared(path)
    except OptforgeError:
        return []


def files(begun: str) -> Iterator[str]:
    """The Python files and directories whose paths begin so."""
    directory, slash, name = begun.rpartition("/")
    try:
        found = sorted(Path(directory or ("/" if slash else ".")).iterdir())
    except OSError:
        return
    for path in found:
        if path.name.startswith(name) and (name or not path.name.startswith(".")):
            if path.is_dir():
                yield f"{directory}{slash}{path.name}/"
            elif path.suffix == ".py":
                yield f"{directory}{slash}{path.name}:"


def one_of(*values: str) -> Callable[[str], list[str]]:
    """Completion of an option that takes one of these values."""

    def offered(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return offered
