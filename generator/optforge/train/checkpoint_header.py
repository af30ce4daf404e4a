"""The form of a checkpoint's header: somebody may have made one up, with the right checksum."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ..core.formats import FORMATS, GIVEN, MASTERS, ROUNDINGS
from ..core.functions import Array
from .structure import Branch, Structure

KINDS: dict[str, type] = {"list": list, "tuple": tuple, "dict": dict}
KEY_LENGTH = 10_000  # characters of a key of params, as text, and of other text
LONGEST_SHAPE = 64
DTYPES = {dtype.name for dtype in GIVEN}


def is_text(value: Any) -> bool:
    """Whether a value is text of a usual length."""
    return isinstance(value, str) and len(value) <= KEY_LENGTH


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a number."""
    return is_whole(value) or isinstance(value, float)


def is_list(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is a list of such."""
    return lambda value: isinstance(value, list) and all(map(of, value))


def is_table(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is a dict of such."""
    return lambda value: isinstance(value, dict) and all(map(is_text, value)) and all(map(of, value.values()))


def is_record(fields: Mapping[str, Callable[[Any], bool]]) -> Callable[[Any], bool]:
    """Whether a value is a dict with these entries."""
    return lambda value: (
        isinstance(value, dict) and all(name in value and check(value[name]) for name, check in fields.items())
    )


FIELDS: dict[str, Callable[[Any], bool]] = {
    "format": is_whole,
    "rule": is_text,
    "origin": is_text,
    "hash": is_text,
    "options": is_table(lambda value: isinstance(value, bool) or is_text(value)),
    "t": is_whole,
    "grouped": lambda value: isinstance(value, bool),
    "branches": is_list(
        is_record({"kind": lambda value: isinstance(value, str) and value in KINDS, "keys": is_list(is_text)})
    ),
    "tensors": is_list(
        is_record(
            {
                "path": is_text,
                "shape": lambda value: (
                    is_list(lambda size: is_whole(size) and size >= 0)(value) and len(value) <= LONGEST_SHAPE
                ),
                "dtype": lambda value: isinstance(value, str) and value in DTYPES,
                "started": lambda value: isinstance(value, bool),
            }
        )
    ),
    "hyperparameters": is_list(is_table(is_number)),
    "schedules": is_list(is_table(lambda value: value is None or isinstance(value, dict))),
    "companions": lambda value: isinstance(value, dict),
}


STORED = is_record(
    {
        "store": is_table(lambda value: isinstance(value, str) and value in FORMATS),
        "master": lambda value: value in ("", *MASTERS),
        "rounding": lambda value: value in ROUNDINGS,
        "seed": lambda value: is_whole(value) and 0 <= value < 2**64,
    }
)


def malformed(header: Any, arrays: Mapping[str, Array]) -> str:
    """What is wrong with the form of a header, and with the arrays of the parameters; empty where nothing is."""
    if not isinstance(header, dict):
        return "its header is no dict"
    for name, check in FIELDS.items():
        if name not in header:
            return f"its header lacks {name!r}"
        if not check(header[name]):
            return f"{name!r} in its header is not what it should be"
    if header["format"] != 1 and not all(is_whole(tensor.get("steps")) for tensor in header["tensors"]):
        return "'tensors' in its header is not what it should be"
    if "stored" in header and not STORED(header["stored"]):
        return "'stored' in its header is not what it should be"
    number = len(header["branches"])
    if (number != 1 and not header["grouped"]) or len(header["hyperparameters"]) != number:
        return "its header has not as many groups everywhere"
    if header["schedules"] and len(header["schedules"]) != number:
        return "its header has not as many groups everywhere"
    try:
        paths = [path for _, path in structure_of(header).paths]
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return "a key of its parameters is none"
    if not paths or paths != [tensor["path"] for tensor in header["tensors"]]:
        return "its header has not the same parameters everywhere"
    for tensor in header["tensors"]:
        own = arrays.get(f"params{tensor['path']}")
        if own is None:
            return f"it has no array of params{tensor['path']}"
        if own.shape != tuple(tensor["shape"]) or str(own.dtype) != tensor["dtype"]:
            return f"the array of params{tensor['path']} is not as its header says"
    return ""


def structure_of(header: Mapping[str, Any]) -> Structure:
    """The structure of the parameters of a checkpoint.

    Raises
    ------
    ValueError, TypeError, SyntaxError, MemoryError, RecursionError
        A key is none.
    """
    branches = []
    for described in header["branches"]:
        kind = KINDS[described["kind"]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of text that Python has second thoughts about
            keys = tuple(map(ast.literal_eval, described["keys"]))
        if len(set(keys)) != len(keys) or (kind is not dict and keys != tuple(range(len(keys)))):
            raise ValueError("a key is there twice, or out of order")
        branches.append(Branch(kind, keys))
    return Structure(tuple(branches), header["grouped"])
