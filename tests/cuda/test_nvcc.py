"""nvcc as the CUDA target starts it: the flags it is given by the environment, and what it says when it fails; no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import require
from optforge.core.diagnostics import EnvironmentProblem
from optforge.engines.cuda import nvcc

VARIABLES = ("NVCC", *nvcc.ADDED)
FILES = {"k.cu": 'extern "C" __global__ void scale(float *x) { x[0] = __fmul_rn(x[0], 0.5f); }\n'}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def stand_in(directory: Path, script: str) -> str:
    """A program that answers --version as nvcc does, and else does what the script says, with OUT as the output."""
    program = directory / "nvcc"
    program.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo release 13.0; exit; }\n'
        f'while [ "$1" != -o ]; do shift; done; OUT=$2\n{script}\n'
    )
    program.chmod(0o755)
    return str(program)


# ── flags from the environment ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("variable", nvcc.ADDED)
def test_flags_that_nvcc_takes_from_the_environment_are_part_of_the_key(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVCC", stand_in(tmp_path, f'echo "flags: ${variable}" > "$OUT"'))
    monkeypatch.setenv(variable, "-ccbin g++-12 -lineinfo")
    assert nvcc.cubin(FILES, (9, 0)).read_text() == "flags: -ccbin g++-12 -lineinfo\n"
    monkeypatch.delenv(variable)
    assert nvcc.cubin(FILES, (9, 0)).read_text() == "flags: \n"


def test_a_library_and_a_cubin_of_one_source_are_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", stand_in(tmp_path, 'echo "$KIND" > "$OUT"'))
    for kind in ("cubin", "library"):
        monkeypatch.setenv("KIND", kind)
        made = nvcc.cubin(FILES, (9, 0)) if kind == "cubin" else nvcc.library(FILES, "k.cu", (9, 0))
        assert made.read_text() == f"{kind}\n"
        assert made.suffix == (".cubin" if kind == "cubin" else ".so")


@pytest.mark.parametrize(
    ("flags", "named", "why"),
    [
        ("-lineinfo --use_fast_math", "--use_fast_math", "subnormal numbers"),
        ("-use_fast_math", "-use_fast_math", "subnormal numbers"),
        ("--ftz=true", "--ftz=true", "subnormal numbers"),
        ("-ftz true -g", "-ftz true", "subnormal numbers"),
        ("-arch=sm_80", "-arch=sm_80", "an architecture"),
        ("--gpu-architecture sm_80", "--gpu-architecture", "an architecture"),
        ("-gencode arch=compute_80,code=sm_80", "-gencode", "an architecture"),
        ("--gpu-code=sm_80", "--gpu-code=sm_80", "an architecture"),
        ("-optf flags.txt", "-optf", "a file of flags"),
    ],
)
@pytest.mark.parametrize("variable", VARIABLES)
def test_flags_that_are_refused(
    variable: str, flags: str, named: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = stand_in(tmp_path, 'touch "$OUT"')
    monkeypatch.setenv("NVCC", program)
    monkeypatch.setenv(variable, f"{program} {flags}" if variable == "NVCC" else flags)
    with pytest.raises(EnvironmentProblem) as caught:
        nvcc.cubin(FILES, (9, 0))
    said = str(caught.value)
    assert said.startswith(f"the variable {variable} has {named}, which ") and why in said and "take it out" in said


@pytest.mark.parametrize(
    "flags", ["-ftz=false", "-ftz false", "-G -lineinfo", "-fmad=true -prec-div=false", "-Dftz=true"]
)
def test_flags_that_are_taken(flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", f"{stand_in(tmp_path, 'touch $OUT')} {flags}")
    monkeypatch.setenv("NVCC_APPEND_FLAGS", flags)
    assert nvcc.cubin(FILES, (9, 0)).exists()


# ── what it says ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "gcc: No such file or directory\nnvcc fatal   : Failed to preprocess host compiler properties.",
            "install g++",
        ),
        ("nvcc fatal   : Cannot find compiler 'cl.exe' in PATH", "finds no C++ compiler"),
        ("host_config.h:137:2: error: #error -- unsupported GNU version! gcc versions later than 15", "an older g++"),
        ("host_config.h:151:2: error: #error -- unsupported clang version! clang version must be", "this clang"),
    ],
)
def test_a_compiler_of_the_host_that_will_not_do(
    said: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "said").write_text(said)
    monkeypatch.setenv("NVCC", stand_in(tmp_path, f"cat {tmp_path / 'said'} >&2; exit 1"))
    with pytest.raises(EnvironmentProblem) as caught:
        nvcc.cubin(FILES, (9, 0))
    told = str(caught.value)
    assert words in told and "NVCC_APPEND_FLAGS='-ccbin " in told and told.endswith(said)


def test_nvcc_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one: debugging flags of the environment reach it, and a compiler of the host that is not there is told."""
    require("nvcc")
    plain = nvcc.cubin(FILES, (9, 0)).read_bytes()
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    assert nvcc.cubin(FILES, (9, 0)).read_bytes() != plain
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-ccbin /nothing/there")
    with pytest.raises(EnvironmentProblem, match="finds no C\\+\\+ compiler of the host"):
        nvcc.cubin(FILES, (9, 0))
