"""Emitted files in any mixture in one program, and what their objects export, need and may write to."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import optforge as of
from amount import FULL, LEVEL
from compiling import objects
from conftest import COMPILERS, missing, require
from embedding import WARNINGS, WAYS, emitted, headers, run, write

CLIPPED = of.transforms.clip_by_global_norm >> of.rules.momentum
STANDARDS = ("c99", "c++11")
LATER = ("c11", "c17", "c2x", "c++14", "c++17", "c++20", "c++2b")

MAIN = """
#include <stdio.h>
#include <stdlib.h>

#define STEP(rule, states)                                                                       \\
    do {                                                                                         \\
        float p[40], g[40], m[40], v[40];                                                        \\
        double sums[512];                                                                        \\
        rule##_hyper h;                                                                          \\
        rule##_options o;                                                                        \\
        rule##_tensor_f32 t = {40, p, g, states};                                                \\
        (void)v;                                                                                 \\
        for (size_t i = 0; i < 40; i++) {                                                        \\
            p[i] = (float)i - 20.5f;                                                             \\
            g[i] = 3.0f - (float)i;                                                              \\
        }                                                                                        \\
        rule##_hyper_init(&h);                                                                   \\
        rule##_options_init(&o);                                                                 \\
        o.workspace = sums;                                                                      \\
        o.workspace_size = sizeof sums;                                                          \\
        if (rule##_workspace_size(40, 1) > sizeof sums)                                          \\
            return 1;                                                                            \\
        rule##_state_init_f32(&t);                                                               \\
        if (rule##_step_with_f32(&h, 1, &t, 1, &o) != rule##_OK)                                 \\
            return 1;                                                                            \\
        printf("%s %.9g\\n", rule##_kernel_f32.name, (double)p[3]);                               \\
    } while (0)
#define TWO m, v
#define ONE m

int main(void)
{
"""


def require_openmp() -> None:
    """OpenMP of clang, by its header."""
    command = ["clang", "-fopenmp", "-fsyntax-only", "-x", "c", "-include", "omp.h", "/dev/null"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        missing("libomp")


def program(rules: Mapping[str, str]) -> str:
    """A program that steps rules; the prefix of each, and the names of its states."""
    return MAIN + "".join(f"    STEP({prefix}, {states});\n" for prefix, states in rules.items()) + "    return 0;\n}\n"


def mixture() -> dict[str, str]:
    """Two single files, a bundle, another, and two rules with the runtime beside them."""
    return {
        **emitted("single", {"one": of.rules.adam, "two": CLIPPED}),
        **emitted("bundle", {"three": of.rules.adam, "four": of.rules.lamb}, "engine"),
        **emitted("bundle", {"five": CLIPPED}, "other"),
        **emitted("split", {"six": of.rules.adam, "seven": CLIPPED}),
    }


STATES = {"one": "TWO", "two": "ONE", "three": "TWO", "four": "TWO", "five": "ONE", "six": "TWO", "seven": "ONE"}


def check_printed(text: str) -> None:
    """What the program of a mixture prints: the same rule has moved by the same."""
    found: dict[str, set[str]] = {}
    lines = text.splitlines()
    assert len(lines) == len(STATES)
    for line in lines:
        name, value = line.split()
        found.setdefault(name, set()).add(value)
    assert {name: len(values) for name, values in found.items()} == {"adam": 1, "lamb": 1, CLIPPED.name: 1}


# gcc has C++ in one translation unit below.
MIXED = [(compiler, standard) for standard in (*STANDARDS, *LATER) for compiler in COMPILERS]


@pytest.mark.parametrize(
    ("compiler", "standard"), MIXED if FULL else [("gcc", "c99"), ("clang", "c99"), ("clang", "c++11")]
)
def test_any_mixture_is_one_program(compiler: str, standard: str, tmp_path: Path) -> None:
    """In C the files one by one; in C++ the same text, its headers in one file."""
    require(compiler)
    files = mixture()
    write(tmp_path, {**files, "main.c": headers(files) + program(STATES)})
    language = ["-x", "c++"] if standard.startswith("c++") else []
    sources = [name for name in [*files, "main.c"] if name.endswith(".c")]
    made = objects([compiler, f"-std={standard}", LEVEL, *WARNINGS, *language], sources, tmp_path)
    driver = {"gcc": "g++", "clang": "clang++"}[compiler]
    run([driver, *made, "-o", "program", "-lm"], tmp_path)
    check_printed(run([tmp_path / "program"], tmp_path))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_later_standards_have_nothing_to_say(compiler: str, tmp_path: Path) -> None:
    """Each warns of more than the one before."""
    require(compiler)
    write(tmp_path, of.rules.adam.generate())
    for language, standard in (("c", "c2x"), ("c++", "c++2b")):
        command = [compiler, "-x", language, f"-std={standard}", "-fsyntax-only", *WARNINGS]
        run([*command, "adam.c", "optforge.c"], tmp_path)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_objects_of_c_in_a_program_of_cpp(compiler: str, tmp_path: Path) -> None:
    require(compiler)
    files = mixture()
    write(tmp_path, {**files, "main.cpp": headers(files) + program(STATES)})
    sources = [name for name in files if name.endswith(".c")]
    made = objects([compiler, "-std=c99", LEVEL, *WARNINGS], sources, tmp_path)
    driver = {"gcc": "g++", "clang": "clang++"}[compiler]
    run([driver, "-std=c++11", *WARNINGS, "main.cpp", *made, "-o", "program", "-lm"], tmp_path)
    check_printed(run([tmp_path / "program"], tmp_path))


# Every two of compiler, way and language.
UNITS = [(compiler, way, language) for compiler in COMPILERS for way in WAYS for language in ("c", "c++")]
PAIRS = [unit for k, unit in enumerate(UNITS) if (k % 2 + k // 2) % 2 == 0]


@pytest.mark.parametrize(("compiler", "way", "language"), UNITS if FULL else PAIRS)
def test_one_translation_unit(compiler: str, way: str, language: str, tmp_path: Path) -> None:
    """All sources of one way included in one file, in any order, which is no matter of the compiler."""
    require(compiler)
    rules = {"one": of.rules.adam, "two": CLIPPED, "six": of.rules.adam}
    files = emitted(way, rules)
    sources = [name for name in files if name.endswith(".c")]
    standard = "-std=c99" if language == "c" else "-std=c++11"
    orders = [sources, sources[::-1]] if len(sources) > 1 and (FULL or compiler == "gcc") else [sources]
    for number, order in enumerate(orders):
        unit = "".join(f'#include "{name}"\n' for name in order)
        place = write(
            tmp_path / str(number), {**files, "unit.c": unit + program({name: STATES[name] for name in rules})}
        )
        command = [compiler, standard, LEVEL, *WARNINGS, "-x", language, "unit.c", "-o", "program", "-lm"]
        run(command, place)
        lines = run([place / "program"], place).splitlines()
        assert len(lines) == 3 and lines[0] == lines[2]


@pytest.mark.parametrize("compiler", COMPILERS)
def test_headers_may_be_included_again(compiler: str, tmp_path: Path) -> None:
    require(compiler)
    files = mixture()
    text = headers(files)
    backwards = "\n".join(text.splitlines()[::-1])
    write(tmp_path, {**files, "unit.c": f"{text}{text}{backwards}\nint nothing;\n"})
    run([compiler, "-std=c99", *WARNINGS, "-c", "unit.c"], tmp_path)


def test_each_header_stands_alone(tmp_path: Path) -> None:
    require("gcc")
    files = mixture()
    write(tmp_path, files)
    for name in files:
        if name.endswith(".h"):
            run(["gcc", "-std=c99", *WARNINGS, "-fsyntax-only", "-include", name, "-x", "c", "/dev/null"], tmp_path)


def symbols(path: Path) -> list[tuple[str, str]]:
    """The letters and names of nm."""
    found = []
    for line in run(["nm", path], path.parent).splitlines():
        letter, name = line.split()[-2:]
        found.append((letter, name))
    return found


FLAGS = (["-fPIC"], ["-fopenmp"], ["-O0"])
OPTIMISED = "-O2" if FULL else "-O1"
SYMBOLS = [(way, compiler, flags) for way in WAYS for compiler in COMPILERS for flags in FLAGS]
NEEDED = {"memcpy", "memset", "strcmp", "getenv", "pow", "sqrt", "sqrtf", "_GLOBAL_OFFSET_TABLE_", "__stack_chk_fail"}


FEW = [("split", "gcc", ["-fopenmp"]), ("single", "clang", ["-O0"]), ("bundle", "gcc", ["-fPIC"])]


@pytest.mark.parametrize(("way", "compiler", "flags"), SYMBOLS if FULL else FEW)
def test_symbols(way: str, compiler: str, flags: list[str], tmp_path: Path) -> None:
    """Names of its own alone are exported; nothing is needed that allocates, prints, or has state; nothing is written to."""
    require(compiler)
    require("nm")
    if compiler == "clang" and "-fopenmp" in flags:
        require_openmp()
    rules = {"one": of.rules.adam, "two": CLIPPED, "four": of.rules.lamb}
    files = emitted(way, rules)
    write(tmp_path, files)
    prefixes = {"split": ["optforge", *rules], "single": [*rules], "bundle": ["engine", *rules]}[way]
    own = re.compile(rf"({'|'.join(prefixes)})_\w+")
    chosen = 0
    for source in (name for name in files if name.endswith(".c")):
        run([compiler, "-std=c99", OPTIMISED, *flags, "-c", source, "-o", "own.o"], tmp_path)
        for letter, name in symbols(tmp_path / "own.o"):
            if letter == "U":
                openmp = name.startswith(("omp_get_", "GOMP_", "__kmpc_")) and "-fopenmp" in flags
                cpu = name in ("__cpu_model", "__cpu_indicator_init")
                assert own.fullmatch(name) or name in NEEDED or openmp or cpu, (source, name)
            elif letter in "TRDBCVWG":
                assert own.fullmatch(name), (source, name)
                file = source.removesuffix(".c")
                if way != "bundle":
                    assert name.startswith(f"{file}_"), (source, name)
            if letter in "dDbBCsS":
                lines = run(["objdump", "-t", "own.o"], tmp_path).splitlines()
                [section] = {line.split()[-3] for line in lines if line.split()[-1:] == [name]}
                if not section.startswith(".data.rel.ro"):
                    assert re.fullmatch(r"(optforge|engine)_chosen", name), (source, section, name)
                    chosen += 1
    assert chosen == {"split": 1, "single": 3, "bundle": 1}[way]


def test_symbols_can_be_hidden_or_exported(tmp_path: Path) -> None:
    """With hidden visibility a library exports what is declared so."""
    require("gcc")
    exported = '-DONE_API=__attribute__((visibility("default")))'.replace("ONE", "one")
    write(tmp_path, emitted("single", {"one": of.rules.adam}))
    run(["gcc", "-std=gnu99", "-fPIC", "-fvisibility=hidden", "-shared", "one.c", "-o", "hidden.so", "-lm"], tmp_path)
    run(
        ["gcc", "-std=gnu99", "-fPIC", "-fvisibility=hidden", exported, "-shared", "one.c", "-o", "shown.so", "-lm"],
        tmp_path,
    )

    def shown(name: str) -> set[str]:
        lines = run(["nm", "-D", "--defined-only", name], tmp_path).splitlines()
        return {line.split()[-1] for line in lines}

    assert shown("hidden.so") == set()
    assert shown("shown.so") >= {"one_step_f32", "one_step_with_f64", "one_kernel_f32", "one_strerror"}
    assert all(name.startswith("one_") for name in shown("shown.so"))


def test_files_of_different_versions_are_refused(tmp_path: Path) -> None:
    require("gcc")
    files = emitted("single", {"one": of.rules.adam, "two": CLIPPED})
    text: Any = files["two.h"]
    assert "#if OPTFORGE_TYPES != 1" in text
    files["two.h"] = text.replace("OPTFORGE_TYPES != 1", "OPTFORGE_TYPES != 2").replace(
        "define OPTFORGE_TYPES 1", "define OPTFORGE_TYPES 2"
    )
    write(tmp_path, {**files, "unit.c": headers(files)})
    with pytest.raises(AssertionError, match="files emitted by different versions of optforge in one program"):
        run(["gcc", "-c", "unit.c"], tmp_path)
