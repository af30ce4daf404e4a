"""How parameters are put together: a list, tuple or dict of arrays, or a list of groups of such."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from ..engines.arrays import is_array, kind


@dataclass(frozen=True)
class Branch:
    """A list, tuple or dict of arrays: which of them it is, and its keys in order."""

    kind: type
    keys: tuple[Any, ...]

    def build(self, values: Iterable[Any]) -> Any:
        """Values, one for each array, in this structure."""
        return dict(zip(self.keys, values, strict=True)) if self.kind is dict else self.kind(values)

    def flatten(self, tree: Any, name: str, like: str) -> list[Any]:
        """The values of a tree of this structure, in order.

        Raises
        ------
        TypeError, ValueError
            It has another structure; `name` and `like` are what it and `params` are called.
        """
        if self.kind is dict:
            if not isinstance(tree, Mapping):
                raise TypeError(f"{like} is a dict, so {name} must be one with the same keys, not {kind(tree)}")
            for key in tree:
                if key not in self.keys:
                    raise ValueError(f"{name} has the key {key!r}, which {like} has not")
            for key in self.keys:
                if key not in tree:
                    raise ValueError(f"{name} lacks the key {key!r}; None leaves a tensor alone")
            return [tree[key] for key in self.keys]
        if not is_collection(tree):
            raise TypeError(f"{name} must be a list or tuple of arrays like {like}, not {kind(tree)}")
        values = list(tree)
        if len(values) != len(self.keys):
            raise ValueError(f"{name} has {len(values)} arrays, {like} has {len(self.keys)}")
        return values

    def fits(self, tree: Any) -> bool:
        """Whether a saved tree has this structure."""
        if isinstance(tree, Mapping):
            return set(tree) == set(self.keys)
        return isinstance(tree, (list, tuple)) and list(range(len(tree))) == list(self.keys)


@dataclass(frozen=True)
class Structure:
    """The structure of `params`: one branch, or a list of them where there are groups."""

    branches: tuple[Branch, ...]
    grouped: bool

    @property
    def paths(self) -> list[tuple[int, str]]:
        """The group of each array, and what leads to it, such as "[1]['w']"."""
        return [
            (group, f"[{group}][{key!r}]" if self.grouped else f"[{key!r}]")
            for group, branch in enumerate(self.branches)
            for key in branch.keys
        ]

    @property
    def listed(self) -> bool:
        """Whether a plain list of arrays has this structure."""
        return not self.grouped and self.branches[0].kind is not dict

    def build(self, values: Iterable[Any]) -> Any:
        """Values, one for each array, in this structure."""
        rest = iter(values)
        built = [branch.build([next(rest) for _ in branch.keys]) for branch in self.branches]
        return built if self.grouped else built[0]

    def flatten(self, tree: Any, name: str) -> list[Any]:
        """The values of a tree of this structure, in order.

        Raises
        ------
        TypeError, ValueError
            It has another structure; `name` is what it is called.
        """
        if not self.grouped:
            return self.branches[0].flatten(tree, name, "params")
        if not is_collection(tree):
            raise TypeError(f"params has groups, so {name} must be a list with an entry for each, not {kind(tree)}")
        parts = list(tree)
        if len(parts) != len(self.branches):
            raise ValueError(f"{name} has {len(parts)} entries, params has {len(self.branches)} groups")
        pairs = enumerate(zip(self.branches, parts, strict=True))
        return [v for k, (branch, part) in pairs for v in branch.flatten(part, f"{name}[{k}]", f"params[{k}]")]

    def saved(self, tree: Any) -> list[Any] | None:
        """The values of a saved tree, in order; None where it has another structure."""
        parts = tree if self.grouped else [tree]
        if not isinstance(parts, (list, tuple)) or len(parts) != len(self.branches):
            return None
        pairs = list(zip(self.branches, parts, strict=True))
        if not all(branch.fits(part) for branch, part in pairs):
            return None
        return [part[key] for branch, part in pairs for key in branch.keys]


def is_collection(thing: Any) -> bool:
    """Whether a thing is a collection of arrays in order."""
    if type(thing) is list or type(thing) is tuple:  # usual, and asked at every step
        return True
    return isinstance(thing, Iterable) and not isinstance(thing, (Mapping, Set, str)) and not is_array(thing)


def structured(params: Any) -> tuple[Structure, list[Any], list[dict[str, Any]]]:
    """The structure of parameters, the arrays in order, and the settings of each group (one without, if none is given).

    Raises
    ------
    TypeError, ValueError
        They are no such collection, or there are none.
    """
    entries = collected(params, "params")
    given = list(entries.values() if isinstance(entries, dict) else entries)
    grouped = not isinstance(entries, dict) and any(isinstance(entry, Mapping) for entry in given)
    if not grouped:
        return Structure((branch(entries),), False), given, [{}]
    branches: list[Branch] = []
    arrays: list[Any] = []
    settings: list[dict[str, Any]] = []
    for k, entry in enumerate(given):
        if not isinstance(entry, Mapping):
            raise TypeError(f"params has groups, so params[{k}] must be one as well, not {kind(entry)}")
        if "params" not in entry:
            raise ValueError(f"groups[{k}] has no 'params': a group is {{'params': …, hyperparameters}}")
        own = collected(entry["params"], f"groups[{k}]['params']")
        branches.append(branch(own))
        arrays += own.values() if isinstance(own, dict) else own
        settings.append({name: value for name, value in entry.items() if name != "params"})
    return Structure(tuple(branches), True), arrays, settings


def branch(collection: Any) -> Branch:
    """The structure of a list, tuple or dict."""
    return Branch(type(collection), tuple(collection if isinstance(collection, dict) else range(len(collection))))


def collected(params: Any, name: str) -> Any:
    """The parameters as a list, tuple or dict of our own, which its owner does not change."""
    if isinstance(params, Mapping):
        params = dict(params)
    elif is_collection(params):
        params = tuple(params) if isinstance(params, tuple) else list(params)
    else:
        raise TypeError(f"{name} must be a list, tuple or dict of arrays, not {kind(params)}")
    if not params:
        raise ValueError(f"{name} is empty: there is nothing to optimize")
    first = next(iter(params.values() if isinstance(params, dict) else params))
    if isinstance(first, tuple) and len(first) == 2 and isinstance(first[0], str):
        what = f"{name} has pairs of a name and an array, as named_parameters() gives them"
        raise TypeError(f"{what}: pass dict({name}) of them, or parameters(), which has no names")
    return params
