"""The C++ headers: optimizers that own their state, against the calls of C."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

import optforge as of
from amount import FULL, LEVEL
from compiling import objects
from conftest import require
from embedding import SOURCES, WARNINGS, run, write
from native import STRICT
from optforge import rule, scalar
from optforge.core.formats import Wanted
from optforge.emit.c import rule_view
from optforge.emit.project import project

DRIVERS = {"g++": "gcc", "clang++": "clang"}


@rule
def started(p, g, first="g", s: scalar = 1.0, *, lr=0.5):
    """State that starts as the gradient, and a scalar."""
    first = first + 0
    s = s / 2 + 1
    p = p - lr * first
    return p, first, s


@rule
def plain(p, g):
    p = p - g
    return p


RULES = {
    "adamw": of.rules.adamw,
    "lamb": of.rules.lamb,
    "clipped": of.transforms.clip_by_global_norm(max_norm=0.5) >> of.rules.momentum,
    "started": started,
    "plain": plain,
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a project."""
    require("gcc")
    kernels = [own.kernel(**own.definition.settings) for own in RULES.values()]
    storages = [Wanted().storages(kernel) for kernel in kernels]
    views = [rule_view(own, kernels[k], storages[k], prefix) for k, (prefix, own) in enumerate(RULES.items())]
    directory = write(tmp_path_factory.mktemp("project"), project(views, kernels, {}, "a command"))
    return directory


def compiled_c(directory: Path, flags: Sequence[str] = ()) -> list[str]:
    """The objects of its files that are C."""
    return objects(["gcc", *STRICT, LEVEL, *flags, "-fPIC"], [f"{name}.c" for name in [*RULES, "optforge"]], directory)


def compiled(directory: Path, out: Path, driver: str, standard: str, flags: Sequence[str] = ()) -> Path:
    """The program of tests/runtime/optimizers.cpp."""
    require(DRIVERS[driver])
    command = [driver, f"-std={standard}", "-O0", *WARNINGS, *flags, f"-I{directory}", "-pthread"]
    run([*command, SOURCES / "optimizers.cpp", *compiled_c(directory), "-o", out, "-lm"], directory)
    return out


WITHOUT = ("-fno-exceptions", "-fno-rtti")
STANDARDS = ("c++11", "c++14", "c++17", "c++20")
EVERY = [(driver, standard, flags) for driver in DRIVERS for standard in STANDARDS for flags in ((), WITHOUT)]
# And g++ with c++11, sanitized.
FEW = [("g++", "c++20", WITHOUT), ("clang++", "c++20", ()), ("clang++", "c++11", WITHOUT)]


@pytest.mark.parametrize(("driver", "standard", "flags"), EVERY if FULL else FEW)
def test_optimizers(driver: str, standard: str, flags: Sequence[str], built: Path, tmp_path: Path) -> None:
    assert run([compiled(built, tmp_path / "program", driver, standard, flags)], tmp_path) == "good\n"


def test_optimizers_sanitized(built: Path, tmp_path: Path) -> None:
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
    assert run([compiled(built, tmp_path / "program", "g++", "c++11", flags)], tmp_path) == "good\n"


def test_units_with_exceptions_and_without_are_one_program(built: Path, tmp_path: Path) -> None:
    unit = (
        '#include "optforge_rules.hpp"\n'
        "int NAME(float *p, const float *g)\n{\n"
        "    const optforge::Tensor<float> own[] = {{optforge::span<float>(p, 3), optforge::span<const float>(g, 3)}};\n"
        "    optforge::Optimizer<optforge::rules::plain<float>> optimizer(own);\n\n"
        "    return optimizer.step().status;\n}\n"
    )
    main = (
        "int one(float *, const float *);\nint two(float *, const float *);\n"
        "int main()\n{\n    float p[3] = {1, 2, 3};\n    const float g[3] = {1, 1, 1};\n\n"
        "    return one(p, g) != 0 || two(p, g) != 0 || p[2] != 1;\n}\n"
    )
    write(tmp_path, {"one.cpp": unit.replace("NAME", "one"), "two.cpp": unit.replace("NAME", "two"), "main.cpp": main})
    for name, flags in (("one", ["-std=c++11"]), ("two", ["-std=c++20", "-fno-exceptions"]), ("main", [])):
        run(["g++", "-O0", *flags, f"-I{built}", "-c", f"{name}.cpp"], tmp_path)
    units = [f"{name}.o" for name in ("one", "two", "main")]
    run(["g++", *units, *compiled_c(built), "-o", "program", "-lm"], tmp_path)
    run([tmp_path / "program"], tmp_path)


@pytest.mark.parametrize("sanitized", [False, pytest.param(True, marks=pytest.mark.skipif(not FULL, reason="long"))])
def test_wrong_calls_at_random(sanitized: bool, built: Path, tmp_path: Path) -> None:
    """Each is one exception with a text, and nothing is written before it."""
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"] if sanitized else []
    command = ["g++", "-std=c++11", LEVEL, *WARNINGS, *flags, f"-I{built}", SOURCES / "wrong.cpp"]
    command += compiled_c(built, flags)
    run([*command, "-o", "wrong", "-lm"], tmp_path)
    number = "1000000" if sanitized else "20000"
    lines = run(
        [tmp_path / "wrong", number, "1"], tmp_path, {"ASAN_OPTIONS": "allocator_may_return_null=1"}
    ).splitlines()
    counts = {int(line.split()[0]): int(line.split()[1]) for line in lines}
    assert sum(counts.values()) == int(number) and counts[0] > int(number) // 10
    assert set(counts) >= {0, 1, 2, 3, 4, 6, 8, 9, 13, 14, 17, 19, 20, 100}
