"""What the tests of the runtime share: emitted files in each of the ways to take them, compiled, and run."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cffi
import numpy as np

import optforge as of
from optforge import layout
from optforge.crule import rule_text

FULL = bool(os.environ.get("OPTFORGE_TEST_FULL"))
SOURCES = Path(__file__).with_name("runtime")
WARNINGS = tuple("-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wcast-qual -Wdouble-promotion -Werror".split())
WAYS = ("split", "single", "bundle")

# By the prefix of its files: rules of one and two passes, of scalar state, with totals over a tensor and over all.
RULES = {
    "adamw": of.rules.adamw,
    "lamb": of.rules.lamb,
    "novograd": of.rules.novograd,
    "clipped": of.transforms.clip_by_global_norm(max_norm=0.5) >> of.rules.momentum,
}


def emitted(way: str, rules: Mapping[str, Any] = RULES, bundle: str = "engine") -> dict[str, str]:
    """The files of some rules, whose names are their prefixes, taken in one of the ways."""
    texts = [rule_text(rule, rule.kernel(**rule.definition.settings), None, prefix) for prefix, rule in rules.items()]
    if way == "bundle":
        return layout.bundle(bundle, texts)
    files: dict[str, str] = layout.runtime() if way == "split" else {}
    for text in texts:
        files |= layout.split(text) if way == "split" else layout.single(text)
    return files


def headers(files: Iterable[str]) -> str:
    """A header that includes the headers among some files."""
    return "".join(f'#include "{name}"\n' for name in sorted(files) if name.endswith(".h"))


def write(directory: Path, files: Mapping[str, str]) -> Path:
    """Write files into a directory, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def run(command: Sequence[str | Path], directory: Path, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints, which must succeed."""
    every = None if environment is None else {**os.environ, **environment}
    answer = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, env=every, timeout=900)
    assert answer.returncode == 0, f"{' '.join(map(str, command))}\n{answer.stdout[-2000:]}\n{answer.stderr[-6000:]}"
    return answer.stdout


def battery(
    directory: Path,
    flags: Sequence[str] = (),
    way: str = "split",
    compiler: str = "gcc",
    linking: Sequence[str] = (),
    changed: Mapping[str, str] | None = None,
) -> Path:
    """The program of tests/runtime/battery.c with the rules in one of the ways.

    Its tensors are too small for many threads, so that the runtime is one that wakes them for fewer elements. Words of
    the runtime that are `changed` are others.
    """
    files = emitted(way)
    for old, new in {"THREAD_SIZE = 65536": "THREAD_SIZE = 1024", **(changed or {})}.items():
        assert any(old in text for text in files.values()), old
        files = {name: text.replace(old, new) for name, text in files.items()}
    rules = " ".join(f"CALL({prefix})" for prefix in RULES)
    write(directory, {**files, "emitted.h": headers(files) + f"#define RULES(CALL) {rules}\n"})
    sources = [name for name in files if name.endswith(".c")]
    command = [compiler, "-std=gnu99", "-O2", "-pthread", *flags, "-I."]
    for source in sources:
        run([*command, "-c", source], directory)
    run([*command, "-c", SOURCES / "battery.c"], directory)
    objects = [name.replace(".c", ".o") for name in [*sources, "battery.c"]]
    run([*command, *linking, *objects, "-o", "battery", "-lm"], directory)
    return directory / "battery"


def shared(directory: Path, files: Mapping[str, str], sources: Iterable[Path] = (), flags: Sequence[str] = ()) -> Path:
    """A shared library of emitted files and others."""
    write(directory, files)
    every = [*(name for name in files if name.endswith(".c")), *map(str, sources)]
    run(
        ["gcc", "-std=c99", "-O2", *WARNINGS, *flags, "-I.", "-fPIC", "-shared", *every, "-o", "library.so", "-lm"],
        directory,
    )
    return directory / "library.so"


def declarations() -> str:
    """The types and calls of the runtime, as cffi takes them."""
    parts = layout.runtime_parts()
    sets = 3 if os.uname().machine == "x86_64" else 1
    text = re.sub(r"/\*.*?\*/", "", f"{parts.types}\n{parts.calls}", flags=re.S)
    text = re.sub(r"^#ifdef __cplusplus\n.*?^#endif\n", "", text + "\n", flags=re.S | re.M)
    text = re.sub(r"^ *#.*\n", "", text, flags=re.M).replace("OPTFORGE_API", "")
    return re.sub(r"\[OPTFORGE_SETS\]", f"[{sets}]", text)


class Library:
    """The runtime and some kernels, loaded through cffi."""

    def __init__(self, path: Path, extra: str = ""):
        self.ffi = cffi.FFI()
        self.ffi.cdef(declarations() + extra)
        self.calls = self.ffi.dlopen(str(path))

    def kernel(self, prefix: str, dtype: str) -> Any:
        """The table of a rule."""
        return self.ffi.addressof(self.calls, f"{prefix}_kernel_{dtype}")

    def options(self, **values: Any) -> Any:
        """Options, defaults filled in."""
        options = self.ffi.new("optforge_options *")
        self.calls.optforge_options_init(options)
        for name, value in values.items():
            setattr(options, name, value)
        return options

    def pointer(self, array: np.ndarray | None, of: str = "void *") -> Any:
        """Where an array is."""
        return self.ffi.NULL if array is None else self.ffi.cast(of, array.ctypes.data)

    def table(self, tensors: Sequence[Sequence[np.ndarray]], sizes: Sequence[int] | None = None) -> np.ndarray:
        """Structs over the arrays of tensors: p, g and the state."""
        rows = [[own[0].size, *(array.ctypes.data for array in own)] for own in tensors]
        for row, size in zip(rows, sizes or (), strict=False):
            row[0] = size
        return np.array(rows, np.uintp)

    def text(self, status: int) -> str:
        """What a status means."""
        return str(self.ffi.string(self.calls.optforge_strerror(status)).decode())
