"""Compile CUDA for one device with nvcc, and keep it in the user's cache."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...core.diagnostics import EnvironmentProblem
from ..c.compile import ROOM, Compiler, cached, digest, run

FLAGS = ("-std=c++17", "-O3")
CUBIN, SHARED = ("-cubin",), ("-shared", "-Xcompiler=-fPIC")
PLACES = ("CUDA_HOME", "CUDA_PATH")  # variables that name a toolkit
USUAL = "/usr/local/cuda/bin/nvcc"
ADVICE = "install the CUDA toolkit, put its nvcc on PATH, or set NVCC to it"
SECONDS = 600  # that a compilation may take
ADDED = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")  # variables from which nvcc itself takes flags
FLUSHES = "makes subnormal numbers zero, so the kernels would have other bits"
FIGHTS = "names an architecture, and the kernels are compiled for the device that runs them"
HIDES = "names a file of flags, which the cache of compiled kernels knows nothing of"
REFUSED = {
    **dict.fromkeys(("use_fast_math", "ftz"), FLUSHES),
    **dict.fromkeys(("arch", "gpu-architecture", "code", "gpu-code", "gencode", "generate-code"), FIGHTS),
    **dict.fromkeys(("optf", "options-file"), HIDES),
}
CCBIN = "or name one by NVCC_APPEND_FLAGS='-ccbin /path/to/g++'"
# What nvcc says where the compiler of the host is at fault, and what helps.
HOST = {
    "Failed to preprocess host compiler properties": f"finds no C++ compiler of the host: install g++, {CCBIN}",
    "annot find compiler": f"finds no C++ compiler of the host: install it, {CCBIN}",
    "unsupported GNU version": f"is too old for this g++: install an older g++ beside it, {CCBIN}",
    "unsupported clang version": f"does not take this clang: install a version that it names, {CCBIN}",
}


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
            check("NVCC", wanted[1:])
            command = (os.path.abspath(program), *wanted[1:])
            try:
                answer = run([*command, "--version"])
            except OSError as problem:
                raise EnvironmentProblem(f"{program} does not start: {problem.strerror}; {ADVICE}") from None
            return Compiler(command, (answer.stdout + answer.stderr).decode(errors="replace"))
    what = f"there is no {wanted[0]!r}, which the variable NVCC names" if wanted else "there is no nvcc"
    raise EnvironmentProblem(f'target "cuda" compiles its kernels with nvcc, and {what}; {ADVICE}')


def check(variable: str, words: Sequence[str]) -> None:
    """Refuse flags under which the kernels would not be what they are meant to be.

    Raises
    ------
    EnvironmentProblem
        One of the words of a variable is such a flag.
    """
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, has_value, value = word.partition("=")
        option = name.removeprefix("-").removeprefix("-")
        if option == name or option not in REFUSED:
            continue
        if option == "ftz":
            if (value or following) == "false":
                continue
            word = word if has_value else f"{word} {following}"
        raise EnvironmentProblem(f"the variable {variable} has {word}, which {REFUSED[option]}: take it out")


def cubin(files: Mapping[str, str], capability: tuple[int, int]) -> Path:
    """The cubin of CUDA sources, of which one is a `.cu`, as `compiled` has it."""
    return compiled(files, next(name for name in files if name.endswith(".cu")), capability, CUBIN, ".cubin")


def library(files: Mapping[str, str], source: str, capability: tuple[int, int]) -> Path:
    """The shared library of a source that launches kernels and includes the other files, as `compiled` has it."""
    return compiled(files, source, capability, SHARED, ".so")


def compiled(
    files: Mapping[str, str], source: str, capability: tuple[int, int], kind: Sequence[str], ending: str
) -> Path:
    """What nvcc makes of a source for a device of this compute capability, made now or taken from the cache.

    Raises
    ------
    EnvironmentProblem
        There is no nvcc, it fails, it does not know the device, the environment gives it flags that cannot be, or
        others can write to the cache.
    """
    compiler = find()
    added = [os.environ.get(name, "") for name in ADDED]
    for name, text in zip(ADDED, added, strict=True):
        check(name, text.split())  # as nvcc does, which knows no quotes there
    architecture = f"sm_{capability[0]}{capability[1]}"
    parts = [*compiler.command, compiler.version, *kind, *FLAGS, architecture, *added]
    key = digest(part.encode() for part in [*parts, *(text for item in sorted(files.items()) for text in item)])

    def build(directory: Path) -> Path:
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")
        built = directory / f"kernel{ending}"
        command = [*compiler.command, *kind, *FLAGS, f"-arch={architecture}", "-o", str(built), source]
        answer = run(command, directory, SECONDS)
        if answer.returncode == 0 and built.exists():
            return built
        (directory / "room").write_bytes(bytes(ROOM))  # raises where the disk is full, which nvcc says in its own words
        said = (answer.stderr or answer.stdout).decode(errors="replace").strip()
        if "Unsupported gpu architecture" in said or "not defined for option" in said:
            raise EnvironmentProblem(
                f"nvcc does not know the device's architecture {architecture}: the device is too old for this CUDA "
                f"toolkit, or too new; {compiler.command[0]} said: {said}"
            )
        for words, problem in HOST.items():
            if words in said:
                raise EnvironmentProblem(f"nvcc {problem}; {compiler.command[0]} said: {said}")
        raise EnvironmentProblem(f"nvcc failed:\n$ {shlex.join(command)}\n{said}")

    return cached(source[: -len(".cu")], ending, key, build)
