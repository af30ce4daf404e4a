"""Emitted C compiled and called through ctypes: what an engine sees, without the package's own loader."""

from __future__ import annotations

import ctypes
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cffi
import numpy as np

from amount import FULL
from compiling import objects, run
from optforge.emit import layout

STRICT = (
    "-std=c99",
    *("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Wcast-qual", "-Wdouble-promotion"),
    "-Werror",
)
OPTIMISED = (*STRICT, "-O2", "-fPIC")  # as most tests compile, which so have the same objects


def of_runtime(compiler: str, flags: Sequence[str]) -> Sequence[str]:
    """The flags of the runtime beside rules that have `flags`: it takes longer to compile than all of them.

    In the normal run -O3 is for one way, gcc's with -march=native. Otherwise it is -O2 of gcc and -O1 of clang, the
    least that contract where they may.
    """
    gcc = Path(compiler).name == "gcc"
    if FULL or (gcc and "-march=native" in flags):
        return flags
    return [("-O2" if gcc else "-O1") if flag == "-O3" else flag for flag in flags]


def compile_shared(
    files: Mapping[str, str],
    directory: Path,
    compiler: str,
    flags: Sequence[str],
    runtime: Sequence[str] | None = None,
) -> Path:
    """A shared library of emitted files, the runtime's by flags of its own if there are; any warning is an error."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    made = []
    for name in files:
        if name.endswith(".c"):
            own = flags if name != "optforge.c" else runtime or of_runtime(compiler, flags)
            made += objects([compiler, *STRICT, *own, "-fPIC"], [name], directory)
    # Linked plainly: some flags would add start-up code that changes the arithmetic of the whole process.
    linking = [flag for flag in flags if flag in ("-fopenmp", "-flto")]
    run([compiler, *linking, "-fPIC", "-shared", "-o", "kernel.so", *made, "-lm"], directory)
    return directory / "kernel.so"


def quick(compiler: str, directory: Path, *flags: str) -> str:
    """A script to be the compiler of a test, which optimises in the long run alone: what is compiled is then linked."""
    script = directory / "quick-compiler"
    words = shlex.join([*flags, *([] if FULL else ["-O0"])])
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(compiler)} "$@" {words}\n', encoding="utf-8")
    script.chmod(0o755)
    return str(script)


# ── the structs of the header ───────────────────────────────────────────────────────────────────────────────────────


def _declared() -> cffi.FFI:
    """The runtime's types as cffi reads them in its header."""
    ffi, names = cffi.FFI(), ("stats", "parallel", "options", "list", "work")
    text = layout.structs(*(f"optforge_{name}" for name in names))
    for name, number in re.findall(r"\b(OPTFORGE_\w+) = (\d+)\b", layout.runtime_parts().types):
        text = re.sub(rf"\b{name}\b", number, text)
    ffi.cdef(f"typedef struct optforge_kernel optforge_kernel;\n{text}")
    return ffi


DECLARED = _declared()
C: dict[str, Any] = {
    "double": ctypes.c_double,
    "int": ctypes.c_int,
    "short": ctypes.c_short,
    "size_t": ctypes.c_size_t,
    "uint64_t": ctypes.c_uint64,
}


def _field(kind: Any) -> Any:
    """The type of a field, for ctypes."""
    if kind.kind == "array":
        return _field(kind.item) * kind.length
    if kind.kind in ("pointer", "function"):
        return ctypes.c_void_p
    return C[kind.cname]


def _struct(name: str) -> Any:
    """A struct of the header, for ctypes."""
    fields = [(own, _field(field.type)) for own, field in DECLARED.typeof(f"optforge_{name}").fields]
    made = type(name.title(), (ctypes.Structure,), {"_fields_": fields})
    assert ctypes.sizeof(made) == DECLARED.sizeof(f"optforge_{name}")
    return made


Stats: Any = _struct("stats")
Options: Any = _struct("options")
List: Any = _struct("list")
Work: Any = _struct("work")


def instruction_sets() -> dict[str, bool]:
    """Those that emitted files have code for on this machine's architecture, and whether it has them."""
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.exists():
        return {}
    flags = set(info.read_text().split())
    needed = {"x86-64": [], "x86-64-v3": ["avx2"], "x86-64-v4": ["avx512f", "avx512vl", "avx512bw", "avx512dq"]}
    return {name: flags.issuperset(own) for name, own in needed.items()}


def code(name: str) -> int:
    """The number of a status by its name behind OPTFORGE_."""
    found = re.search(rf"\bOPTFORGE_{name} = (-?\d+)", layout.runtime_parts().types)
    assert found is not None, name
    return int(found[1])


class Library:
    """The functions of one emitted rule."""

    def __init__(
        self,
        path: Path,
        prefix: str,
        hyperparameters: Sequence[str],
        state: Sequence[str],
        scalar_state: Sequence[str] = (),
    ):
        self.loaded, self.prefix = ctypes.CDLL(str(path)), prefix
        self.names, self.state, self.scalar_state = hyperparameters, state, scalar_state
        double = ctypes.c_double
        self.Hyper: Any = type(
            "Hyper", (ctypes.Structure,), {"_fields_": [(n, double) for n in hyperparameters or "_"]}
        )
        fields = [("n", ctypes.c_size_t), *((name, ctypes.c_void_p) for name in ("p", "g", *state))]
        self.Tensor: Any = type("Tensor", (ctypes.Structure,), {"_fields_": fields})

    def call(self, name: str, result: Any = ctypes.c_int) -> Any:
        """A function by its name without the prefix."""
        function = getattr(self.loaded, f"{self.prefix}_{name}")
        function.restype = result
        return function

    def runtime(self, name: str, result: Any = ctypes.c_int) -> Any:
        """A function of the runtime by its name without the prefix."""
        function = getattr(self.loaded, f"optforge_{name}")
        function.restype = result
        return function

    def kernel(self, suffix: str) -> int:
        """The address of the table of a dtype."""
        return ctypes.addressof(ctypes.c_char.in_dll(self.loaded, f"{self.prefix}_kernel_{suffix}"))

    def options(self, workspace: Any = None, **values: Any) -> Any:
        """Options with the defaults of the library, and an array as their workspace."""
        options = Options()
        self.call("options_init", None)(ctypes.byref(options))
        assert options.size == ctypes.sizeof(Options)
        assert options.grad_scale == 1.0
        assert bytes(options)[16:] == bytes(ctypes.sizeof(Options) - 16)
        if workspace is not None:
            options.workspace, options.workspace_size = workspace.ctypes.data, workspace.nbytes
            options.kept = workspace  # alive with the options
        for name, value in values.items():
            setattr(options, name, value)
        return options

    def lists(self, suffix: str, hyper: Any, t: int, table: Any, count: int, **values: Any) -> Any:
        """A list of tensors, alone in an array of lists, which keeps alive what it points to."""
        lists = (List * 1)()
        own = lists[0]
        own.kernel, own.t, own.count = self.kernel(suffix), t, count
        own.hyper, own.tensors = (ctypes.addressof(memory) for memory in (hyper, table))
        lists.kept = [hyper, table]
        for name, value in values.items():
            setattr(own, name, value)
        return lists

    def hyper(self, **values: float) -> Any:
        """The struct of hyperparameters, defaults filled in by the library."""
        hyper = self.Hyper()
        self.call("hyper_init", None)(ctypes.byref(hyper))
        for name, value in values.items():
            setattr(hyper, name, value)
        return hyper

    def tensors(self, arrays: Sequence[Mapping[str, np.ndarray]]) -> Any:
        """Structs over arrays by name: p, g and the state."""
        table = (self.Tensor * max(len(arrays), 1))()
        for row, own in zip(table, arrays, strict=False):
            row.n = own["p"].size
            for name in ("p", "g", *self.state):
                setattr(row, name, own[name].ctypes.data)
        return table

    def step(self, hyper: Any, t: int, arrays: Sequence[Mapping[str, np.ndarray]], threads: int | None = None) -> int:
        """One step; its status. What a rule without reductions is given for a workspace it does not take."""
        suffix = {4: "f32", 8: "f64"}[arrays[0]["p"].itemsize] if arrays else "f32"
        table = self.tensors(arrays)
        size = self.call("workspace_size", ctypes.c_size_t)
        elements = sum(own["p"].size for own in arrays)
        workspace = (ctypes.c_double * (size(ctypes.c_uint64(elements), ctypes.c_size_t(len(arrays))) // 8))()
        arguments = [ctypes.byref(hyper), ctypes.c_uint64(t), table, ctypes.c_size_t(len(arrays))]
        if threads is None:
            return int(self.call(f"step_{suffix}")(*arguments, workspace))
        options = self.options(threads=threads, workspace_size=ctypes.sizeof(workspace))
        options.workspace = ctypes.cast(workspace, ctypes.c_void_p)
        return int(self.call(f"step_with_{suffix}")(*arguments, ctypes.byref(options)))


def defaults(text: str) -> dict[str, float]:
    """The defaults of the hyperparameters that an emitted file has."""
    tables = [re.search(rf"_{name}\[\] = \{{(.*?)\}};", text, re.DOTALL) for name in ("hypers", "defaults")]
    names, values = (table[1].split(",") for table in tables if table is not None)
    return {name.strip().strip('"'): float(value) for name, value in zip(names, values, strict=False)}
