"""Compile CUDA for one device with nvcc, and keep it in the user's cache."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from .compiler import ROOM, Compiler, cached, digest, run
from .diagnostics import EnvironmentProblem

FLAGS = ("-cubin", "-std=c++17", "-O3")
PLACES = ("CUDA_HOME", "CUDA_PATH")  # variables that name a toolkit
USUAL = "/usr/local/cuda/bin/nvcc"
ADVICE = "install the CUDA toolkit, put its nvcc on PATH, or set NVCC to it"


def find() -> Compiler:
    """The nvcc of $NVCC, of PATH, of $CUDA_HOME or of /usr/local/cuda.

    Raises
    ------
    EnvironmentProblem
        There is none.
    """
    toolkits = tuple(os.environ.get(name, "") for name in PLACES)
    return identify(os.environ.get("NVCC", ""), os.environ.get("PATH", os.defpath), toolkits)


@functools.cache
def identify(named: str, path: str, toolkits: tuple[str, ...]) -> Compiler:
    """The nvcc under these environment variables."""
    try:
        wanted = shlex.split(named)
    except ValueError as problem:
        raise EnvironmentProblem(f"the variable NVCC is not a command: {named} ({problem}); {ADVICE}") from None
    places = [str(Path(toolkit) / "bin" / "nvcc") for toolkit in toolkits if toolkit]
    for candidate in wanted[:1] or ["nvcc", *places, USUAL]:
        program = shutil.which(candidate, path=path)
        if program is not None:
            command = (os.path.abspath(program), *wanted[1:])
            try:
                answer = run([*command, "--version"])
            except OSError as problem:
                raise EnvironmentProblem(f"{program} does not start: {problem.strerror}; {ADVICE}") from None
            return Compiler(command, (answer.stdout + answer.stderr).decode(errors="replace"))
    what = f"there is no {wanted[0]!r}, which the variable NVCC names" if wanted else "there is no nvcc"
    raise EnvironmentProblem(f'target "cuda" compiles its kernels with nvcc, and {what}; {ADVICE}')


def cubin(files: Mapping[str, str], capability: tuple[int, int]) -> Path:
    """The cubin of CUDA sources for a device of this compute capability, compiled now or taken from the cache.

    Raises
    ------
    EnvironmentProblem
        There is no nvcc, it fails, it does not know the device, or others can write to the cache.
    """
    compiler = find()
    architecture = f"sm_{capability[0]}{capability[1]}"
    parts = [*compiler.command, compiler.version, *FLAGS, architecture]
    key = digest(part.encode() for part in [*parts, *(text for item in sorted(files.items()) for text in item)])
    source = next(name for name in files if name.endswith(".cu"))

    def build(directory: Path) -> Path:
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")
        built = directory / "kernel.cubin"
        command = [*compiler.command, *FLAGS, f"-arch={architecture}", "-o", str(built), source]
        answer = run(command, directory)
        if answer.returncode == 0 and built.exists():
            return built
        (directory / "room").write_bytes(bytes(ROOM))  # raises where the disk is full, which nvcc says in its own words
        said = (answer.stderr or answer.stdout).decode(errors="replace").strip()
        if "Unsupported gpu architecture" in said or "not defined for option" in said:
            raise EnvironmentProblem(
                f"nvcc does not know the device's architecture {architecture}: the device is too old for this CUDA "
                f"toolkit, or too new; {compiler.command[0]} said: {said}"
            )
        raise EnvironmentProblem(f"nvcc failed:\n$ {shlex.join(command)}\n{said}")

    return cached(source[: -len(".cu")], ".cubin", key, build)
