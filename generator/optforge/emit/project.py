"""Rules as a project of their own: sources, C++ headers, a CMake package, examples, a benchmark, a README."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..core.diagnostics import UsageError
from ..core.names import claimed
from ..core.version import __version__
from . import layout
from .c import RuleView, view_text
from .text import TEMPLATES, WIDTH, comment_text, fold, render_template

if TYPE_CHECKING:
    from ..core.ir import Kernel

ROOM = "project"


def project(
    views: Sequence[RuleView], kernels: Sequence[Kernel], others: Mapping[str, str], command: str
) -> dict[str, str]:
    """The files of a project of some rules, with other headers that are emitted.

    What ends with .j2 under `templates/project` is filled in, what else is there is taken as it is.

    Raises
    ------
    UsageError
        A rule is called like one of the files.
    """
    files = {**layout.runtime(), **others} | {"optforge.hpp": layout.runtime_file("optforge.hpp")}
    for view in views:
        files |= layout.split(view_text(view))
        files[f"{view.prefix}.hpp"] = wrapper(view)
    context = {**shown(views, kernels[0]), "headers": [*others], "command": command}
    for path in sorted((TEMPLATES / ROOM).iterdir()):
        name = path.name.removesuffix(".j2")
        filled = path.suffix == ".j2"
        text = render_template(f"{ROOM}/{path.name}", context) if filled else path.read_text(encoding="utf-8")
        if name in files:
            raise UsageError(f"a rule would write {name}, which a project has already: give it another name")
        files[name] = fold(text, everywhere=True) if name.endswith((".c", ".cpp", ".hpp")) else text
    return files


def wrapper(view: RuleView) -> str:
    """The C++ header of a rule."""
    text = render_template("rule.hpp.j2", {"r": view, "own": class_of(view), "summary": comment_text(view.summary)})
    return fold(text, everywhere=True)


def class_of(view: RuleView) -> str:
    """The name of a rule's class in C++, where a struct may be called what a prefix may not."""
    return f"{view.prefix}_" if claimed(view.prefix) else view.prefix


def shown(views: Sequence[RuleView], kernel: Kernel) -> dict[str, Any]:
    """What the templates show; the examples are of the first rule, which has this kernel."""
    first = views[0]
    dtype = first.dtypes[0]
    scalar = {state.name for state in kernel.scalar_state}
    names = [f"state_{k}" for k in range(len(kernel.state))]
    wrapped = textwrap.wrap(" ".join([*(f"{view.prefix}.c" for view in views), "optforge.c"]), WIDTH - 40)
    own = list(zip(names, kernel.state, strict=True))
    return {
        "version": __version__,
        "rules": views,
        "prefixes": [view.prefix for view in views],
        "sources": (" \\\n *" + " " * 14).join(wrapped),
        "first": first,
        "r": first,
        "d": dtype,
        "own": class_of(first),
        "arrays": [name for name, state in own if state.name not in scalar],
        "scalars": [name for name, state in own if state.name in scalar],
        "fields": ", ".join(["x", "gradient", *(f"&{n}" if s.name in scalar else n for n, s in own)]),
        "hyper": hyper(first, kernel),
    }


def hyper(view: RuleView, kernel: Kernel) -> dict[str, str] | None:
    """The hyperparameter that the C++ example changes: its field and its name; None where there is none like it."""
    names = [name for name, _ in kernel.hyperparameters]
    if "lr" not in names:
        return None
    fields = [own for line in view.hyper_fields for own in line.removeprefix("double ").partition(";")[0].split(", ")]
    field = fields[names.index("lr")]
    return {"field": field, "name": '"lr"'}
