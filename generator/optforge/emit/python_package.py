"""A rule as a Python package of its own: a wheel with the compiled kernel, without a compiler where it is installed."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ..core.diagnostics import UsageError
from ..core.dtypes import DTYPES
from ..core.version import __version__
from . import layout
from .c import RuleView, view_text
from .rule import Rule
from .text import TEMPLATES, fold, render_template

if TYPE_CHECKING:
    from ..core.ir import Kernel

ROOM = "python"
BY_SUFFIX = {dtype.suffix: np.dtype(dtype.numpy).name for dtype in DTYPES.values()}
PLACES = {"calls.c": "csrc/calls.c", "__init__.py": "src/{}/__init__.py"}  # the others lie at the top


def package(rule: Rule, view: RuleView, kernel: Kernel, command: str) -> dict[str, str]:
    """The files of a package.

    What ends with .j2 under `templates/python` is filled in, what else is there is taken as it is.

    Raises
    ------
    UsageError
        The name of the rule is none for a wheel.
    """
    name = view.prefix
    if name == "calls":
        raise UsageError("csrc/calls.c is a file of the package: give the rule another name with --prefix")
    if not name.isascii():
        raise UsageError(f"a wheel has a name of ASCII letters, and {name!r} is none: give one with --prefix")
    files = {f"csrc/{file}": text for file, text in {**layout.runtime(), **layout.split(view_text(view))}.items()}
    files[f"src/{name}/py.typed"] = ""
    context = {
        "version": __version__,
        "distribution": name.strip("_").replace("_", "-") or "rule",
        "summary": json.dumps(view.summary, ensure_ascii=False),
        "command": command,
        "docstring": docstring(f"{rule.name}: {rule.doc.strip() or 'an update rule.'}"),
        "r": view,
        "numpy": BY_SUFFIX[view.dtypes[0].suffix],
        "dtypes": listed(BY_SUFFIX[d.suffix] for d in view.dtypes),
        "hyper_names": listed(own for own, _ in kernel.hyperparameters),
        "state_names": listed(state.name for state in kernel.state),
        "scalar_names": listed(state.name for state in kernel.scalar_state),
        "names": [own for own, _ in kernel.hyperparameters],
        "defaults": [(own, number(value)) for own, value in kernel.hyperparameters],
    }
    for path in sorted((TEMPLATES / ROOM).iterdir()):
        own = path.name.removesuffix(".j2")
        filled = path.suffix == ".j2"
        text = render_template(f"{ROOM}/{path.name}", context) if filled else path.read_text(encoding="utf-8")
        files[PLACES.get(own, own).format(name)] = fold(text, everywhere=True) if own.endswith(".c") else text
    return files


def docstring(text: str) -> str:
    """A text as a docstring."""
    plain = not any(mark in text for mark in ('"""', "\\"))
    return f'"""{textwrap.dedent(text)}\n"""' if plain else repr(text)


def listed(names: Iterable[str]) -> str:
    """Names as a tuple in Python's text."""
    texts = [json.dumps(name, ensure_ascii=False) for name in names]
    return f"({', '.join(texts)}{',' * (len(texts) == 1)})"


def number(value: float) -> str:
    """A double as Python writes it."""
    return repr(value) if value - value == 0 else f'float("{value}")'
