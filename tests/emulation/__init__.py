"""Emitted .cu files compiled for the CPU, and a driver library that lets PyCUDA load and launch them without a GPU."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent
# A plain access is checked for alignment too: the header itself answers what the instrumentation calls.
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fno-gnu-unique", "-fsanitize=alignment",
         "-fno-sanitize-recover=alignment", "-Wno-attributes")  # fmt: skip
# __global__ after the preprocessor.
KERNEL = re.compile(r"__attribute__\(\(noinline, used\)\)\s+(?:static\s+)?void\s+(\w+)\s*\(")


def compile_emulated(files: Mapping[str, str], directory: Path, flags: Sequence[str] = ()) -> Path:
    """A shared library of .cu files for the CPU; `files` may hold headers too."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    return build([directory / name for name in files if name.endswith(".cu")], directory / "kernel.so", flags)


def build(sources: Sequence[Path], library: Path, flags: Sequence[str] = ()) -> Path:
    """Each file is preprocessed, which shows its kernels, and compiled with an object that describes each of them."""
    objects = []
    for number, source in enumerate(sources):
        text = run(["g++", "-E", "-x", "c++", f"-I{HERE}", *FLAGS, *flags, str(source)])
        for name in dict.fromkeys(KERNEL.findall(text)):
            text += f'static const emulation::Kernel emulation_of_{name}("{name}", {name});\n'
        preprocessed = library.with_suffix(f".{number}.ii")
        preprocessed.write_text(text, encoding="utf-8")
        objects.append(str(library.with_suffix(f".{number}.o")))
        run(["g++", *FLAGS, *flags, "-c", str(preprocessed), "-o", objects[-1]])
    sanitizers = [flag for flag in flags if flag.startswith("-fsanitize=")]
    run(["g++", "-shared", *sanitizers, *objects, "-o", str(library)])
    return library


def run(command: Sequence[str]) -> str:
    """What a command that must succeed prints."""
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{answer.stderr}")
    return answer.stdout
