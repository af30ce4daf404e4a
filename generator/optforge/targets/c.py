"""The C target: emits C, and runs it compiled, through cffi."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from ..scalars import check_hyperparameters

if TYPE_CHECKING:
    from ..language import Rule
    from ..tensor import Tensor

__all__ = ["CEngine", "CTarget", "engine", "render"]

ENDINGS = (".h", ".c")  # of the files that it emits

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
            tensor.scalars_at(self.kernel, named, t)
        text = self.ffi.string(self.strerror(status)).decode()
        raise RuntimeError(f"rule {self.kernel.name!r}: {text} (status {status})")


@dataclass(frozen=True)
class Library:
    """The emitted functions of a loaded library, by the suffix of their dtype."""

    ffi: Any
    strerror: Any
    hyper_init: Any
    steps: dict[str, Any]
    checks: dict[str, Any]


def load(path: Path, prefix: str) -> Library:
    """A compiled library, whose functions begin with a prefix."""
    import cffi

    ffi = cffi.FFI()
    arguments = "const void *hyper, uint64_t t, const void *tensors, size_t count"
    declarations = [f"const char *{prefix}_strerror(int status);", f"void {prefix}_hyper_init(void *hyper);"]
    for suffix in DTYPES:
        declarations.append(f"int {prefix}_step_threads_{suffix}({arguments}, int threads);")
        declarations.append(f"int {prefix}_check_{suffix}({arguments});")
    ffi.cdef("\n".join(declarations))
    try:
        # Never unloaded, not even when the interpreter ends: OpenMP would go with it, from under its waiting threads.
        loaded = ffi.dlopen(str(path), os.RTLD_NOW | os.RTLD_NODELETE)
        return Library(
            ffi,
            getattr(loaded, f"{prefix}_strerror"),
            getattr(loaded, f"{prefix}_hyper_init"),
            {suffix: getattr(loaded, f"{prefix}_step_threads_{suffix}") for suffix in DTYPES},
            {suffix: getattr(loaded, f"{prefix}_check_{suffix}") for suffix in DTYPES},
        )
    except (OSError, AttributeError) as problem:
        raise EnvironmentProblem(f"the compiled kernel {path} cannot be loaded: {problem}") from None


class CEngine:
    """A kernel compiled and loaded.

    Parameters
    ----------
    kernels : Path, optional
        A directory with the emitted `.h` and `.c` to compile instead of freshly emitted ones.

    Raises
    ------
    EnvironmentProblem
        It cannot be compiled or loaded, or the directory lacks the files or has them of another rule.
    """

    def __init__(self, rule: Rule, kernel: Kernel, kernels: Path | None = None):
        self.kernel = kernel
        prefix = rule.name if rule.name.isascii() else "rule"  # cffi reads ASCII alone
        if kernels is not None:
            files = committed(kernels, prefix, rule, kernel)
        else:
            files = render(rule, kernel, prefix=None if prefix == rule.name else prefix)
        self.library = load(library(files), prefix)

    def defaults(self) -> dict[str, float]:
        """The defaults of the hyperparameters as the compiled files have them."""
        names = [name for name, _ in self.kernel.hyperparameters]
        values = np.zeros(max(len(names), 1))
        self.library.hyper_init(self.library.ffi.from_buffer(values))
        return dict(zip(names, values.tolist(), strict=False))

    def plan(self, tensors: Sequence[Tensor], gradients: Sequence[Array]) -> Plan:
        """Prepare steps over these arrays."""
        grouped: dict[str, list[list[int]]] = {}
        for tensor, gradient in zip(tensors, gradients, strict=True):
            row = [tensor.p.size, tensor.addresses["p"], address(gradient)]
            row += [tensor.addresses[state.name] for state in self.kernel.state]
            grouped.setdefault(BY_NUMPY[tensor.p.dtype].suffix, []).append(row)
        own, calls = self.library, []
        for suffix, rows in grouped.items():
            table = np.array(rows, dtype=np.uintp)
            pointer = own.ffi.cast("const void *", address(table))
            calls.append(Call(own.steps[suffix], own.checks[suffix], pointer, len(rows), table))
        return Plan(own.ffi, own.strerror, self.kernel, tuple(calls), tensors, gradients)


def committed(directory: Path, prefix: str, rule: Rule, kernel: Kernel) -> dict[str, str]:
    """The emitted files of a kernel in a directory.

    Their comment must name the rule's hash and give this kernel's options: others may lay out memory in other ways.
    """
    advice = f"make it with: optforge generate {rule.origin} --out {directory}"
    if prefix != rule.name:
        advice += f" --prefix {prefix}"
    try:
        files = {file: (directory / file).read_text(encoding="utf-8") for file in (f"{prefix}.h", f"{prefix}.c")}
    except OSError as problem:
        raise EnvironmentProblem(f"{problem.filename}: {problem.strerror}; {advice}") from None
    for file, text in files.items():
        if f"\n * Rule hash: {rule.hash}\n" not in text:
            raise EnvironmentProblem(f"{directory / file} is of another version of rule {rule.name!r}; {advice}")
        if rule.options and not has_options(text, rule, kernel):
            raise EnvironmentProblem(f"{directory / file} is of other options than are asked for; {advice}")
    return files


def has_options(text: str, rule: Rule, kernel: Kernel) -> bool:
    """Whether the options in the comment of an emitted file give this kernel."""
    line = re.search(r"^ \* Options: (.*)\.$", text, re.MULTILINE)
    pairs = [pair.partition("=")[::2] for pair in line[1].split(", ")] if line else []
    words: dict[str, bool | str] = {"True": True, "False": False}
    try:
        emitted = rule.kernel(**{name: words.get(value, value) for name, value in pairs})
    except (TypeError, ValueError):
        return False
    return replace(emitted, hyperparameters=()) == replace(kernel, hyperparameters=())


@dataclass(frozen=True)
class CTarget:
    """The C target over emitted files that are already there: pass it as `target` to `Optimizer`."""

    kernels: Path

    def __call__(self, rule: Rule, kernel: Kernel) -> CEngine:
        """The engine of a rule."""
        return CEngine(rule, kernel, self.kernels)


engine = CEngine
