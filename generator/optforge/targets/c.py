"""The C target: emits C, and runs it compiled, through cffi."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import address
from ..compiler import library
from ..csource import render
from ..diagnostics import EnvironmentProblem
from ..dtypes import BY_NUMPY, DTYPES
from ..functions import Array
from ..ir import Kernel
from ..scalars import Scalars, check_hyperparameters

if TYPE_CHECKING:
    from ..optimizer import Tensor
    from ..rule import Rule

__all__ = ["CEngine", "CTarget", "engine", "render"]

forked = False  # OpenMP's threads do not survive a fork: a child runs its steps on one


def _after_fork() -> None:
    global forked
    forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class Call:
    """One call of the emitted functions: all tensors of a dtype."""

    step: Any
    check: Any
    tensors: Any
    count: int
    rows: Array


@dataclass(frozen=True)
class Plan:
    """A prepared step: pointers and sizes as the emitted functions take them."""

    ffi: Any
    strerror: Any
    kernel: Kernel
    calls: tuple[Call, ...]
    tensors: Sequence[Tensor]
    gradients: Sequence[Array]  # kept alive with the plan

    def step(self, hyperparameters: Any, t: int, threads: int) -> None:
        """One step in place, on up to so many threads; 0 leaves the number to OpenMP.

        Raises
        ------
        ScalarError
            A scalar of the rule has no value; nothing was written.
        """
        if forked:
            threads = 1
        hyper = self.ffi.from_buffer(hyperparameters)
        if len(self.calls) > 1:  # nothing may be written where a later call would be refused
            for call in self.calls:
                self.check(call.check(hyper, t, call.tensors, call.count), hyperparameters, t)
        for call in self.calls:
            status = call.step(hyper, t, call.tensors, call.count, threads)
            if status:
                self.check(status, hyperparameters, t)

    def check(self, status: int, hyperparameters: Array, t: int) -> None:
        """Raise what a status says."""
        if status == 0:
            return
        named = dict(zip((name for name, _ in self.kernel.hyperparameters), hyperparameters.tolist(), strict=False))
        check_hyperparameters(self.kernel, named)
        for tensor in self.tensors:
            scalars = Scalars(named, t, {name: float(value[0]) for name, value in tensor.scalars.items()})
            scalars.run((*self.kernel.step_scalars, *self.kernel.tensor_scalars))
        text = self.ffi.string(self.strerror(status)).decode()
        raise RuntimeError(f"rule {self.kernel.name!r}: {text} (status {status})")


class CEngine:
    """A kernel compiled and loaded.

    Parameters
    ----------
    kernels : Path, optional
        A directory with the emitted `.h` and `.c` to compile instead of freshly emitted ones.

    Raises
    ------
    EnvironmentProblem
        It cannot be compiled or loaded, or the directory lacks the files.
    """

    def __init__(self, rule: Rule, kernel: Kernel, kernels: Path | None = None):
        import cffi

        self.kernel = kernel
        prefix = rule.name if rule.name.isascii() else "rule"
        if kernels is None:
            files = render(rule, kernel, prefix=prefix)
        else:
            files = committed(kernels, prefix)
        self.ffi = cffi.FFI()
        arguments = "const void *hyper, uint64_t t, const void *tensors, size_t count"
        for suffix in DTYPES:
            self.ffi.cdef(f"int {prefix}_step_threads_{suffix}({arguments}, int threads);")
            self.ffi.cdef(f"int {prefix}_check_{suffix}({arguments});")
        self.ffi.cdef(f"const char *{prefix}_strerror(int status);")
        path = library(files)
        try:
            loaded = self.ffi.dlopen(str(path))
            self.strerror = getattr(loaded, f"{prefix}_strerror")
            self.steps = {suffix: getattr(loaded, f"{prefix}_step_threads_{suffix}") for suffix in DTYPES}
            self.checks = {suffix: getattr(loaded, f"{prefix}_check_{suffix}") for suffix in DTYPES}
        except (OSError, AttributeError) as problem:
            raise EnvironmentProblem(f"the compiled kernel {path} cannot be loaded: {problem}") from None

    def plan(self, tensors: Sequence[Tensor], gradients: Sequence[Array]) -> Plan:
        """Prepare steps over these arrays."""
        grouped: dict[str, list[list[int]]] = {}
        for tensor, gradient in zip(tensors, gradients, strict=True):
            row = [tensor.p.size, address(tensor.p), address(gradient)]
            for state in self.kernel.state:
                row.append(address((tensor.scalars if state.scalar else tensor.arrays)[state.name]))
            grouped.setdefault(BY_NUMPY[tensor.p.dtype].suffix, []).append(row)
        calls = []
        for suffix, rows in grouped.items():
            table = np.array(rows, dtype=np.uintp)
            pointer = self.ffi.cast("const void *", address(table))
            calls.append(Call(self.steps[suffix], self.checks[suffix], pointer, len(rows), table))
        return Plan(self.ffi, self.strerror, self.kernel, tuple(calls), tensors, gradients)


def committed(directory: Path, name: str) -> dict[str, str]:
    """The emitted files of a rule in a directory."""
    try:
        return {file: (directory / file).read_text(encoding="utf-8") for file in (f"{name}.h", f"{name}.c")}
    except OSError as problem:
        advice = f"optforge generate {name} --out {directory}"
        raise EnvironmentProblem(f"{problem.filename}: {problem.strerror}; make it with: {advice}") from None


@dataclass(frozen=True)
class CTarget:
    """The C target over emitted files that are already there: pass it as `target` to `Optimizer`."""

    kernels: Path

    def __call__(self, rule: Rule, kernel: Kernel) -> CEngine:
        """The engine of a rule."""
        return CEngine(rule, kernel, self.kernels)


engine = CEngine
