"""Emitted .cu files on the CPU: compiled against the header beside this file, loaded by PyCUDA through a driver of our own.

Both are for machines without a GPU, and prove indexing, argument passing and bits. What they emulate, and the
environment variables that set the order of threads and blocks, stand at the top of cuda_runtime.h and libcuda.cpp.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from support.compiling import stored

HERE = Path(__file__).parent
# Plain accesses are checked for alignment too; the machine itself answers what the instrumentation calls.
MACHINE, RUNTIME = HERE / "machine.cpp", HERE / "cuda_runtime.cpp"  # a part of every library
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fno-gnu-unique", "-fno-sanitize-recover=alignment",
         "-fsanitize=alignment")  # fmt: skip
PREPROCESS = ("g++", "-E", "-x", "c++", f"-I{HERE}", "-include", "cuda_runtime.h")  # nvcc too includes it unasked
# What the preprocessor makes of __global__.
KERNEL = re.compile(r"__attribute__\(\(noinline, used\)\)\s+(?:static\s+)?void\s+(\w+)\s*\(")


def compile_emulated(files: Mapping[str, str], directory: Path, flags: Sequence[str] = ()) -> Path:
    """A shared library of .cu files for the CPU; `files` may hold headers too."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    sources = [directory / name for name in files if name.endswith(".cu")]
    return link_emulated(sources, directory / "kernel.so", flags)


def link_emulated(sources: Sequence[Path], library: Path, flags: Sequence[str] = ()) -> Path:
    """The library of sources that are files already."""
    sanitizers = [flag for flag in flags if flag.startswith("-fsanitize=")]
    objects = [str(compiled(source, flags)) for source in sources]
    objects += [str(compiled(source, sanitizers)) for source in (MACHINE, RUNTIME)]
    run(["g++", "-shared", "-Wl,-Bsymbolic,-z,lazy", *sanitizers, *objects, "-o", str(library)])
    return library


def compiled(source: Path, flags: Sequence[str]) -> Path:
    """The object of a source, in which its name stands without the directory, so that the same text gives the same."""
    preprocessed = run([*PREPROCESS, *FLAGS, *flags, source.name], source.parent)
    names = dict.fromkeys(KERNEL.findall(preprocessed))
    described = [f'static const emulation::Kernel emulation_of_{name}("{name}", {name});\n' for name in names]
    command = ["g++", *FLAGS, *(flag for flag in flags if not flag.startswith("-I"))]
    text = "".join([preprocessed, *described])

    def make(made: Path) -> None:
        unit = made.with_suffix(".ii")
        unit.write_text(text, encoding="utf-8")
        run([*command, "-c", str(unit), "-o", str(made)])
        unit.unlink()

    return stored([*command, text], make)


def build_driver(directory: Path) -> Path:
    """The emulated libcuda.so.1 in a directory, with every entry point that the installed PyCUDA is linked to."""
    library, stubs = directory / "libcuda.so.1", directory / "stubs.cpp"
    preprocessed = run(["g++", "-E", str(HERE / "libcuda.cpp")])
    missing = pycuda_entry_points() - set(re.findall(r"\bcu[A-Z]\w+", preprocessed))
    lines = [f'extern "C" int {name}() {{ return 801; }}  // CUDA_ERROR_NOT_SUPPORTED\n' for name in sorted(missing)]
    stubs.write_text("".join(lines), encoding="utf-8")
    machine = str(compiled(MACHINE, []))
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1"]
    command = ["g++", *options, str(HERE / "libcuda.cpp"), str(stubs), machine]
    made = stored([*options, preprocessed, *lines, machine], lambda made: run([*command, "-o", str(made)]))
    return Path(shutil.copy(made, library))


def pycuda_entry_points() -> set[str]:
    """The driver's functions that PyCUDA wants; none where it is not installed."""
    package = importlib.util.find_spec("pycuda")
    places = (package.submodule_search_locations or []) if package else []
    extensions = [path for place in places for path in Path(place).glob("_driver*.so")]
    return {name for path in extensions for name in re.findall(r"\bU (cu[A-Z]\w+)", run(["nm", "-D", str(path)]))}


def write_nvcc(directory: Path) -> Path:
    """An executable nvcc in a directory, which makes a library for the emulation where a cubin is asked for."""
    script = directory / "nvcc"
    command = shlex.join([sys.executable, str(HERE / "nvcc.py")])
    script.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return script


def environment(directory: Path) -> dict[str, str]:
    """The environment of a process that finds the emulated driver and nvcc of a directory before any real ones."""
    before = os.environ.get("LD_LIBRARY_PATH")
    return {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join([str(directory), *([before] if before else [])]),
        "NVCC": str(directory / "nvcc"),
        "PATH": os.pathsep.join([str(directory), os.environ["PATH"]]),
    }


def run(command: Sequence[str], directory: Path | None = None, *, errors: bool = False) -> str:
    """What a command that must succeed prints; with `errors`, on standard error."""
    answer = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{answer.stderr}")
    return answer.stderr if errors else answer.stdout
