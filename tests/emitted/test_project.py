"""The project that is emitted: its README's commands, and CMake projects that take it, with the generator and without."""

from __future__ import annotations

import functools
import re
import shutil
import sys
from pathlib import Path

import pytest

from amount import FULL, LEVEL
from cli_runner import optforge, optforge_here
from compiling import objects
from conftest import require
from embedding import WARNINGS, run, write
from native import OPTIMISED
from places import GENERATOR

RULE = '''from optforge import rule


@rule
def halved(p, g, m=0.0, *, lr=0.5):
    """A rule of one's own."""
    m = m / 2 + g
    p = p - lr * m
    return p, m
'''
RULES = ("adamw", "clip_by_global_norm:lamb", "my_rule.py:halved")

# Ten lines take three rules.
TAKING = """cmake_minimum_required(VERSION 3.16)
project(engine C)
{how}
optforge_add_rules(rules RULES adamw clip_by_global_norm:lamb FILES my_rule.py:halved DTYPES f32)
add_executable(engine engine.c)
target_link_libraries(engine PRIVATE rules)
"""
ENGINE = """#include "adamw.h"
#include "clip_by_global_norm_lamb.h"
#include "halved.h"
#include <stdio.h>

int main(void)
{
    static float p[100], g[100], m[100], v[100];
    const adamw_tensor_f32 first = {100, p, g, m, v};
    const halved_tensor_f32 second = {100, p, g, m};
    adamw_hyper hyper;
    halved_hyper other;

    for (int i = 0; i < 100; i++) {
        p[i] = (float)(i % 7) / 8;
        g[i] = (float)(i % 5) * 1e-20f;
    }
    adamw_hyper_init(&hyper);
    halved_hyper_init(&other);
    if (adamw_step_f32(&hyper, 1, &first, 1) != adamw_OK || halved_step_f32(&other, 2, &second, 1) != halved_OK)
        return 1;
    if (adamw_selftest() != adamw_OK || clip_by_global_norm_lamb_selftest() != 0 || halved_selftest() != 0)
        return 2;
    for (int i = 0; i < 100; i++)
        printf("%a %a\\n", (double)p[i], (double)v[i]);
    return 0;
}
"""


def cmake(*arguments: str | Path, cwd: Path) -> str:
    return run(["cmake", *map(str, arguments)], cwd, {"PYTHONPATH": str(GENERATOR)})


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    require("gcc")
    require("g++")
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of three rules, and where it is from."""
    directory = write(tmp_path_factory.mktemp("emitted"), {"my_rule.py": RULE})
    optforge("generate", *RULES, "--dtype", "f32", "--layout", "project", "--out", "project", cwd=directory)
    return directory / "project"


@pytest.fixture
def project(emitted: Path, tmp_path: Path) -> Path:
    """A copy of it, to build in."""
    return Path(shutil.copytree(emitted, tmp_path / "project"))


def commands(readme: Path) -> list[str]:
    """The commands that a README shows, without comments."""
    return [line.strip().partition("  #")[0] for line in readme.read_text().splitlines() if line.startswith("    ")]


def test_the_commands_of_its_readme(project: Path) -> None:
    shown = commands(project / "README.md")
    assert [command.split()[0] for command in shown] == ["cc", *["cmake"] * 2, "ctest", "cmake", "optforge"]
    for command in shown[:-1]:
        run(["sh", "-c", command if FULL else command.replace("=Release", "=Debug")], project)
    rules = "adamw clip_by_global_norm:lamb my_rule.py:halved"
    assert shown[-1] == f"optforge generate {rules} --dtype f32 --layout project --out DIR"
    assert {path.name for path in (project / "where/lib/cmake/optforge").iterdir()} >= {"optforgeConfig.cmake"}


@pytest.mark.parametrize("name", ["example.c", "example.cpp", "bench.c"])
def test_its_programs_build_as_they_say(project: Path, name: str) -> None:
    """By the commands in their heads, without a warning, and they run."""
    text = (project / name).read_text().partition("*/")[0].replace(" \\\n *", "")
    shown = re.findall(r"^ \*(?: Build:|       ) (c(?:c|\+\+) .*?)(?:    \(.*)?$", text, re.M)
    assert shown
    for command in shown:
        run(["sh", "-c", command.replace("-O2", " ".join([LEVEL, *WARNINGS]), 1)], project)
    if name == "bench.c":
        lines = run([project / "bench_c", "1000"], project).splitlines()
        assert {line.split()[0] for line in lines[1:]} == {"adamw", "clip_by_global_norm_lamb", "halved"}


def test_pkg_config(project: Path, tmp_path: Path) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed")
    cmake("-B", "build", cwd=project)
    cmake("--build", "build", "--target", "optforge", cwd=project)
    for target in ("example_c", "example_cpp", "bench_c"):  # which are installed nowhere
        cmake("--build", "build", "--target", target, cwd=project)
    cmake("--install", "build", "--prefix", tmp_path / "first", cwd=project)
    where = shutil.move(tmp_path / "first", tmp_path / "moved")
    write(tmp_path, {"engine.c": ENGINE})
    flags = f"$(PKG_CONFIG_PATH={where}/lib/pkgconfig pkg-config --cflags --libs optforge)"
    run(["sh", "-c", f"cc engine.c {flags} -o engine"], tmp_path)
    run([tmp_path / "engine"], tmp_path)


WAYS = {
    "subdirectory": "add_subdirectory({project} optforge)",
    "fetched": "include(FetchContent)\nFetchContent_Declare(optforge SOURCE_DIR {project})\n"
    "FetchContent_MakeAvailable(optforge)",
    "found": "find_package(optforge REQUIRED)",
    "included": "include({project}/optforge.cmake)",
}


def taken(directory: Path, emitted: Path, way: str, *settings: str, text: str = TAKING) -> str:
    """What the engine prints that takes the project in one of the ways."""
    how = WAYS[way].format(project=emitted.as_posix())
    optimised = "-Ofast" if FULL else "-O1"
    write(
        directory, {"CMakeLists.txt": text.format(how=how, optimised=optimised), "engine.c": ENGINE, "my_rule.py": RULE}
    )
    more = [f"-DCMAKE_PREFIX_PATH={installed(emitted)}"] if way == "found" else []
    cmake("-B", "build", *more, *settings, cwd=directory)
    cmake("--build", "build", cwd=directory)
    return run([directory / "build/engine"], directory)


@functools.cache
def installed(emitted: Path, *settings: str) -> Path:
    """Where the project is installed; its sources are gone."""
    copy = shutil.copytree(emitted, emitted.parent / "copy")
    where = emitted.parent / "_".join(["installed", *settings])
    cmake("-B", "build", *settings, cwd=copy)
    cmake("--build", "build", "--target", "optforge", cwd=copy)
    cmake("--install", "build", "--prefix", where, cwd=copy)
    shutil.rmtree(copy)
    return where


FOUND = """cmake_minimum_required(VERSION 3.16)
project(engine {language})
find_package(optforge REQUIRED)
add_executable(engine engine.{ending})
target_link_libraries(engine PRIVATE optforge::optforge)
"""


@pytest.mark.parametrize(("language", "ending"), [("C", "c"), ("CXX", "cpp")])
def test_an_installed_package_with_openmp(emitted: Path, tmp_path: Path, language: str, ending: str) -> None:
    """Whoever finds it links with its threads, in a project of either language."""
    where = installed(emitted, "-DOPTFORGE_OPENMP=ON")
    write(tmp_path, {"CMakeLists.txt": FOUND.format(language=language, ending=ending), f"engine.{ending}": ENGINE})
    cmake("-B", "build", f"-DCMAKE_PREFIX_PATH={where}", cwd=tmp_path)
    cmake("--build", "build", cwd=tmp_path)
    assert run([tmp_path / "build/engine"], tmp_path)
    assert "gomp" in run(["ldd", "build/engine"], tmp_path)


WITHOUT = "-DOPTFORGE_GENERATE=OFF"


def with_generator() -> str:
    return f"-DOPTFORGE_GENERATOR={sys.executable};-P;-m;optforge"


@pytest.fixture(scope="module")
def printed(emitted: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What an engine prints that is compiled by hand."""
    directory = write(tmp_path_factory.mktemp("hand"), {"engine.c": ENGINE})
    sources = [emitted / f"{name}.c" for name in ("adamw", "clip_by_global_norm_lamb", "halved", "optforge")]
    made = objects(["cc", *OPTIMISED, f"-I{emitted}"], ["engine.c", *sources], directory)
    run(["cc", *made, "-o", "engine", "-lm"], directory)
    return run([directory / "engine"], directory)


@pytest.mark.parametrize("way", WAYS)
def test_a_project_without_the_generator(way: str, emitted: Path, printed: str, tmp_path: Path) -> None:
    assert taken(tmp_path, emitted, way, WITHOUT) == printed
    assert not list((tmp_path / "build").glob("**/halved.h"))


def test_a_project_with_the_generator(emitted: Path, printed: str, tmp_path: Path) -> None:
    """It emits anew when a rule's file changes."""
    bare = write(tmp_path / "bare", {name: (emitted / name).read_text() for name in ("optforge.cmake",)})
    engine = tmp_path / "engine"
    assert taken(engine, bare, "included", with_generator()) == printed
    [text] = [path.read_text() for path in (engine / "build").glob("rules/halved.c")]
    (engine / "my_rule.py").write_text(RULE.replace("m / 2", "m / 4"))
    cmake("--build", "build", cwd=engine)
    [changed] = [path.read_text() for path in (engine / "build").glob("rules/halved.c")]
    assert "m / 4.0f" in changed and "m / 4.0f" not in text


FAST = """cmake_minimum_required(VERSION 3.16)
project(engine C)
set(CMAKE_C_FLAGS "{optimised} -ffast-math -ffp-contract=fast -funsafe-math-optimizations -march=native")
add_compile_options(-ffast-math -ffinite-math-only)
{how}
optforge_add_rules(rules RULES adamw clip_by_global_norm:lamb FILES my_rule.py:halved DTYPES f32)
add_executable(engine engine.c)
target_link_libraries(engine PRIVATE rules)
"""


@pytest.mark.parametrize("compiler", ["gcc", "clang"] if FULL else ["gcc"])
def test_inside_a_project_of_fast_mathematics(compiler: str, emitted: Path, printed: str, tmp_path: Path) -> None:
    """Same bits, also where the program flushes subnormal numbers; but what it prints is the program's own."""
    require(compiler)
    found = taken(tmp_path, emitted, "subdirectory", WITHOUT, f"-DCMAKE_C_COMPILER={compiler}", text=FAST)
    assert [line.split()[0] for line in found.splitlines()] == [line.split()[0] for line in printed.splitlines()]


def test_a_project_of_cpp_alone(emitted: Path, tmp_path: Path) -> None:
    """Without a C compiler the files are C++."""
    text = TAKING.replace("project(engine C)", "project(engine CXX)").replace("engine.c", "engine.cpp")
    how = WAYS["included"].format(project=emitted.as_posix())
    write(tmp_path, {"CMakeLists.txt": text.format(how=how), "engine.cpp": ENGINE, "my_rule.py": RULE})
    cmake("-B", "build", WITHOUT, cwd=tmp_path)
    cmake("--build", "build", cwd=tmp_path)
    run([tmp_path / "build/engine"], tmp_path)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("RULES nadam", "there are no emitted files of nadam in"),
        ("FILES other.py:mine", "there are no emitted files of other.py:mine in"),
        ("RULES adamw DIRECTORY nowhere", "nowhere, and optforge is not installed here"),
        ("RULES", "name at least one rule"),
        ("DTYPES f32", "name at least one rule"),
        ("RULES adamw DTYPES f16", "there are no emitted files of adamw (f16) in"),
        ("RULES adamw", "there are no emitted files of adamw (f64) in"),
        ("adamw", "name at least one rule, and nothing else (adamw)"),
    ],
)
def test_mistakes_are_told(call: str, told: str, emitted: Path, tmp_path: Path) -> None:
    text = f"cmake_minimum_required(VERSION 3.16)\nproject(engine C)\ninclude({emitted}/optforge.cmake)\n"
    write(tmp_path, {"CMakeLists.txt": f"{text}optforge_add_rules(rules {call})\n"})
    with pytest.raises(AssertionError) as caught:
        cmake("-B", "build", WITHOUT, cwd=tmp_path)
    assert told in " ".join(str(caught.value).split())


def test_mistakes_of_a_rule_are_told_by_the_generator(emitted: Path, tmp_path: Path) -> None:
    text = f"cmake_minimum_required(VERSION 3.16)\nproject(engine C)\ninclude({emitted}/optforge.cmake)\n"
    write(tmp_path, {"CMakeLists.txt": f"{text}optforge_add_rules(rules FILES my_rule.py:halved)\n"})
    (tmp_path / "my_rule.py").write_text(RULE.replace("m = m / 2 + g", "m += g"))
    with pytest.raises(AssertionError, match=r"(?s)my_rule.py:7:5: error: augmented assignment"):
        cmake("-B", "build", with_generator(), cwd=tmp_path)


def test_what_is_refused(tmp_path: Path) -> None:
    def told(*arguments: str) -> str:
        return optforge_here("generate", *arguments, cwd=tmp_path, code=2)

    assert "there is no layout 'projct'; did you mean 'project'?" in told("adamw", "--layout", "projct")
    assert "leave --single and --bundle out" in told("adamw", "--layout", "project", "--single")
    assert "leave --target out" in told("adamw", "--layout", "project", "--target", "cuda")
    assert "a project is of rules" in told("plateau", "--layout", "project")
    assert "a package of one rule" in told("adamw", "lamb", "--layout", "python")
    assert not [*tmp_path.iterdir()]
    for name in ("example", "bench"):
        said = told("adamw", "--prefix", name, "--layout", "project")
        assert f"a rule would write {name}.c, which a project has already: give it another name" in said
    assert "csrc/calls.c is a file of the package" in told("adamw", "--prefix", "calls", "--layout", "python")
    assert not [*tmp_path.iterdir()]


def test_all_rules_and_check(tmp_path: Path) -> None:
    """What stands beside the rules is there, too; a changed file is found."""
    optforge_here("generate", "--all", "--layout", "project", "--out", "here", cwd=tmp_path)
    assert "plateau.h" in (tmp_path / "here/emitted.cmake").read_text()
    long = [
        (path.name, line)
        for path in (tmp_path / "here").glob("*.[ch]*")
        if path.suffix != ".cmake"
        for line in path.read_text().splitlines()
        if len(line) > 110 and not line.lstrip().startswith(("*", "/*"))
    ]
    assert {name for name, _ in long} <= {"optforge.c", "plateau.h"}
    optforge_here("generate", "--all", "--layout", "project", "--out", "here", "--check", cwd=tmp_path)
    (tmp_path / "here/optforge.hpp").write_text("")
    again = ("generate", "--all", "--layout", "project", "--out", "here", "--check")
    assert "optforge.hpp" in optforge_here(*again, cwd=tmp_path, code=1)
