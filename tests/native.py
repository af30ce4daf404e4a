"""Emitted C compiled and called through ctypes: what an engine sees, without the package's own loader."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror")


def compile_shared(files: Mapping[str, str], directory: Path, compiler: str, flags: Sequence[str]) -> Path:
    """A shared library of emitted files; any warning is an error."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    sources = [name for name in files if name.endswith(".c")]
    objects = [f"{name}.o" for name in sources]
    # Linked plainly: some flags would add start-up code that changes the arithmetic of the whole process.
    linking = [flag for flag in flags if flag in ("-fopenmp", "-flto")]
    for source, built in zip(sources, objects, strict=True):
        run([compiler, *STRICT, *flags, "-fPIC", "-c", source, "-o", built], directory)
    run([compiler, *linking, "-fPIC", "-shared", "-o", "kernel.so", *objects, "-lm"], directory)
    return directory / "kernel.so"


def run(command: Sequence[str], directory: Path) -> None:
    """A command that must succeed."""
    answer = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, f"{' '.join(command)}\n{answer.stderr}"


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
        options = Options(grad_scale=1.0, threads=threads, workspace_size=ctypes.sizeof(workspace))
        options.workspace = ctypes.cast(workspace, ctypes.c_void_p)
        return int(self.call(f"step_with_{suffix}")(*arguments, ctypes.byref(options)))


class Options(ctypes.Structure):
    """NAME_options."""

    _fields_ = (
        ("grad_scale", ctypes.c_double),
        ("skip_nonfinite", ctypes.c_int),
        ("zero_grads", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("checked", ctypes.c_int),
        ("workspace", ctypes.c_void_p),
        ("workspace_size", ctypes.c_size_t),
        ("stats", ctypes.c_void_p),
        ("tensor_stats", ctypes.c_void_p),
        ("starting", ctypes.c_void_p),
        ("whole", ctypes.c_void_p),
        ("group", ctypes.c_void_p),
        ("groups", ctypes.c_size_t),
        ("applied", ctypes.c_void_p),
    )
