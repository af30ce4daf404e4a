"""The rooms of the package: imports go downwards only, and in no circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import optforge

PACKAGE = Path(optforge.__file__).parent

# From the ground up. What is not in a room is the front: names that people import, brought together from below.
ROOMS = (
    *(
        "core",
        "rules",
        "transforms",
        "frontend",
        "emit",
        "engines",
        "library",
        "train",
        "jax",
        "torch",
        "",
        "profile",
        "cli",
    ),
)
LIBRARIES = ("rules", "transforms")  # texts in the rule language, which import from the front as anybody's do
TEXTS = {("torch", "rules")}  # such a text in another room


def module(path):
    """The name of a module within the package, as a tuple."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


PATHS = {module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(name):
    return name[0] if name and name[0] in ROOMS else ""


def imports(name):
    """The modules of the package that a module imports, wherever in its text it does."""
    package = name if PATHS[name].name == "__init__.py" else name[:-1]
    for node in ast.walk(ast.parse(PATHS[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            own = tuple(node.module.split(".")) if node.module else ()
            base = ("optforge", *package[: len(package) - node.level + 1], *own) if node.level else own
            targets = [(*base, alias.name) for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "optforge":
                yield target[1:] if target[1:] in PATHS else target[1:-1]


EDGES = {
    name: {found for found in imports(name) if found != name and found in PATHS}
    for name in PATHS
    if not (room(name) in LIBRARIES and len(name) > 1) and name not in TEXTS
}


def test_every_room_is_known():
    there = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert there == {*ROOMS} - {""}


@pytest.mark.parametrize("name", EDGES, ids=lambda name: ".".join(name) or "optforge")
def test_imports_go_downwards(name):
    if name == ("__main__",):
        return  # which is the command line
    above = {".".join(found) for found in EDGES[name] if ROOMS.index(room(found)) > ROOMS.index(room(name))}
    assert not above


def test_no_imports_in_a_circle():
    # A package that imports its own modules is no circle where they do not use what it brings together.
    try:
        TopologicalSorter(EDGES).prepare()
    except CycleError as found:
        pytest.fail(" → ".join(".".join(name) or "optforge" for name in found.args[1]))


def test_a_first_line_tells_what_each_module_is_for():
    for path in PATHS.values():
        if path.parent.name not in LIBRARIES:
            first = path.read_text("utf-8").split("\n", 1)[0]
            assert first.startswith('"""') and len(first) > 20, path
