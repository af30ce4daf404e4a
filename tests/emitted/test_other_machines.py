"""The same bits on other machines: aarch64, WebAssembly and Windows, each run here by an emulator of its own.

What is run: the self-test of every rule, and the battery of tests/runtime, whose hashes are those of this machine.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import optforge as of
from amount import FULL
from conftest import missing, require
from embedding import WARNINGS, battery, headers, run, write

pytestmark = pytest.mark.skipif(not FULL, reason="takes long; set OPTFORGE_TEST_FULL=1")

RULES = {
    **{name: of.rules[name] for name in of.rules},
    "clipped": of.transforms.clip_by_global_norm() >> of.rules.adamw,
}
STORED = {
    "low": (of.rules.adamw, {"store": dict.fromkeys("pgmv", "bf16"), "master": "f32", "rounding": "stochastic"}),
    "halved": (of.rules.momentum, {"store": {"p": "f16", "g": "f16"}, "master": "f32"}),
}


@dataclass(frozen=True)
class Machine:
    """A compiler, its flags, what runs its programs, and with what environment."""

    compiler: str
    flags: Sequence[str]
    linking: Sequence[str]
    program: str
    runner: Sequence[str]
    isa: Sequence[str]
    warnings: Sequence[str] = WARNINGS
    posix: bool = True  # has POSIX threads
    environment: Sequence[tuple[str, str]] = ()


MACHINES = {
    "aarch64": Machine("aarch64-linux-gnu-gcc", (), ("-static",), "main", ("qemu-aarch64",), ("neon",)),
    # Debian's emscripten expects Debian's nodejs; SINGLE_FILE because later ones have a fetch() that reads no files.
    "wasm": Machine(
        "emcc",
        ("-msimd128",),
        ("-sSINGLE_FILE=1", "-sENVIRONMENT=node", "-sALLOW_MEMORY_GROWTH=1"),
        "main.js",
        ("node",),
        ("plain",),
        posix=False,
        environment=(("NODE_PATH", "/usr/share/nodejs"),),
    ),
    "windows": Machine(
        "x86_64-w64-mingw32-gcc-posix",
        (),
        ("-static",),
        "main.exe",
        ("wine",),
        ("x86-64", "x86-64-v3", "x86-64-v4"),
        environment=(("WINEDEBUG", "-all"),),
    ),
}


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What wine takes for a disk of its own, which is large."""
    directory = tmp_path_factory.mktemp("wine")
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest, windows: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine whose compiler and emulator are here."""
    own = MACHINES[request.param]
    require(own.compiler)
    require(own.runner[0])
    for name, value in own.environment:
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WINEPREFIX", str(windows))
    return own


def sources() -> dict[str, str]:
    """All rules for both types, two that are stored in 16 bits, and a program that prints what their self-tests say."""
    files: dict[str, str] = {}
    for prefix, rule in RULES.items():
        files |= rule.generate("c", prefix=prefix)
    for prefix, (rule, how) in STORED.items():
        files |= rule.generate("c", prefix=prefix, **how)
    calls = "".join(f'    printf("{prefix} %d\\n", {prefix}_selftest());\n' for prefix in (*RULES, *STORED))
    main = f'#include <stdio.h>\nint main(void) {{\n    printf("%s\\n", optforge_isa());\n{calls}    return 0;\n}}\n'
    return {**files, "main.c": headers(files) + main}


@pytest.mark.parametrize("optimisation", ["-O2", "-O3"])
def test_self_tests(machine: Machine, optimisation: str, tmp_path: Path) -> None:
    """Golden hashes in the emitted text are of this machine."""
    files = sources()
    write(tmp_path, files)
    names = [name for name in files if name.endswith(".c")]
    run([machine.compiler, "-std=c99", optimisation, *machine.warnings, *machine.flags, "-c", *names], tmp_path)
    objects = [name.replace(".c", ".o") for name in names]
    run(
        [machine.compiler, optimisation, *machine.flags, *machine.linking, *objects, "-o", machine.program, "-lm"],
        tmp_path,
    )
    isa, *lines = run([*machine.runner, tmp_path / machine.program], tmp_path).split("\n")
    assert isa.strip() in machine.isa
    assert [line.split() for line in lines if line] == [[prefix, "0"] for prefix in (*RULES, *STORED)]


def test_a_self_test_would_find_a_change(machine: Machine, tmp_path: Path) -> None:
    files = sources()
    changed = files["adamw.c"].replace("beta1 * m +", "beta1 * m -")
    assert changed != files["adamw.c"]
    main = '#include "adamw.h"\n#include <stdio.h>\nint main(void) { printf("%d\\n", adamw_selftest()); return 0; }\n'
    own = {name: files[name] for name in ("adamw.h", "optforge.h", "optforge.c")}
    write(tmp_path, {**own, "adamw.c": changed, "main.c": main})
    names = ("adamw.c", "optforge.c", "main.c")
    run([machine.compiler, "-O2", *machine.flags, *machine.linking, *names, "-o", machine.program, "-lm"], tmp_path)
    assert run([*machine.runner, tmp_path / machine.program], tmp_path).split() == ["18"]


def test_the_battery(machine: Machine, tmp_path: Path) -> None:
    """Threads as the machine has them: one, a pool in reverse, and threads that are running already."""
    require("gcc")
    here = run([battery(tmp_path / "here"), "threads=1", "few"], tmp_path)
    assert len(set(here.splitlines())) == 96
    program = battery(
        tmp_path / "there",
        machine.flags,
        compiler=machine.compiler,
        linking=machine.linking,
        threads=("-pthread",) if machine.posix else (),
        program=machine.program,
    )
    for words in (["threads=1"], ["threads=3", "pool=reverse"], *([["threads=3", "shares"]] if machine.posix else [])):
        assert run([*machine.runner, program, *words, "few"], tmp_path).replace("\r", "") == here, words


def test_vectors(machine: Machine, tmp_path: Path) -> None:
    """A loop over floats is one of vectors, with plain -O2, and nothing is contracted."""
    files = of.rules.adamw.generate("c", dtypes=["f32"])
    write(tmp_path, files)
    text = run([machine.compiler, "-O2", *machine.flags, "-S", "adamw.c", "-o", "-"], tmp_path)
    found = {
        "aarch64-linux-gnu-gcc": r"fsqrt\tv\d+\.4s",
        "emcc": r"f32x4\.sqrt",
        "x86_64-w64-mingw32-gcc-posix": r"vsqrtps\t%ymm\d+",
    }[machine.compiler]
    assert re.search(found, text)
    assert not re.search(r"\bv?f(n?ma(dd|dd\d+|la)|mls|nmadd|nmsub|msub)\w*\b|relaxed_", text)


def test_windows_keeps_vectors_off_the_stack(tmp_path: Path) -> None:
    """Windows aligns the stack to 16 bytes: an aligned move of 32 to it fails. Debian's gcc makes none, others might."""
    compiler, objdump = require("x86_64-w64-mingw32-gcc"), require("x86_64-w64-mingw32-objdump")
    files = sources()
    write(tmp_path, files)
    for name in (name for name in files if name.endswith(".c") and name != "main.c"):
        run([compiler, "-O2", "-c", name, "-o", "own.o"], tmp_path)
        text = run([objdump, "-d", "--no-show-raw-insn", "own.o"], tmp_path)
        assert re.search(r"%ymm\d", text)
        found = [line for line in text.splitlines() if re.search(r"vmov(ap[sd]|dqa\d*)\s.*\(%r[sb]p.*", line)]
        assert not [line for line in found if re.search("[yz]mm", line)], name


# ---- and this machine's own checkers


def test_valgrind(tmp_path: Path) -> None:
    """No read of what was never written, and none beyond an end."""
    require("gcc")
    valgrind = require("valgrind")
    program = battery(tmp_path, ["-g"])
    here = run([program, "threads=1", "few"], tmp_path)
    for words in (["threads=1"], ["threads=3", "shares"]):
        assert run([valgrind, "-q", "--error-exitcode=9", program, *words, "few"], tmp_path) == here


@pytest.mark.parametrize("barrier", [True, False])
def test_no_races_in_openmp(barrier: bool, tmp_path: Path) -> None:
    """clang's ThreadSanitizer knows of its OpenMP by Archer, which says that it is there; without a barrier it finds one."""
    clang = Path(require("clang")).resolve()
    archer = clang.parent.parent / "lib" / "libarcher.so"
    if not archer.exists():
        missing("archer")
    flags = ["-fopenmp", "-fsanitize=thread", "-g"]
    changed = {} if barrier else {"#pragma omp barrier": ""}
    program = battery(tmp_path / "tsan", flags, compiler="clang", changed=changed)
    environment = {
        **os.environ,
        "OMP_TOOL_LIBRARIES": str(archer),
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1 exitcode=66",
        "ARCHER_OPTIONS": "verbose=1",
    }
    answer = subprocess.run(
        [program, "threads=3", "few"], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    if barrier:
        archers, *lines = answer.stdout.splitlines()
        assert archers == "Archer detected OpenMP application with TSan, supplying OpenMP synchronization semantics"
        plain = battery(tmp_path / "plain")
        expected = run([plain, "threads=1", "few"], tmp_path).splitlines()
        assert (answer.returncode, lines) == (0, expected), answer.stderr
    else:
        assert answer.returncode == 66 and "data race" in answer.stderr, answer.stderr
