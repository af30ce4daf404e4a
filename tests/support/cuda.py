"""Emitted CUDA compiled for the CPU and called through ctypes: what a C++ engine sees of it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import optforge as of
from data import Guarded, same
from emulation import compile_emulated
from optforge.emit import layout

NORMS = ("grad_norm", "clipped_grad_norm", "param_norm", "update_norm", "max_update_ratio")
TYPES = {
    "uint64_t": ctypes.c_uint64,
    "uint32_t": ctypes.c_uint32,
    "int32_t": ctypes.c_int32,
    "size_t": ctypes.c_size_t,
    "double": ctypes.c_double,
    "int": ctypes.c_int,
}

Arrays = Mapping[str, Any]


def fields(name: str) -> tuple[tuple[str, Any], ...]:
    """Members of a struct of the runtime."""
    return tuple((own, TYPES.get(kind, ctypes.c_void_p)) for kind, own in layout.members(name))


class Plan(ctypes.Structure):
    """optforge_cuda_plan."""

    _fields_ = fields("optforge_cuda_plan")


class Control(ctypes.Structure):
    """optforge_cuda_control."""

    _fields_ = fields("optforge_cuda_control")


class Stats(ctypes.Structure):
    """optforge_stats."""

    _fields_ = (
        *((name, ctypes.c_double) for name in NORMS),
        *((name, ctypes.c_uint64) for name in ("nan", "inf", "skipped")),
    )


class Options(ctypes.Structure):
    """optforge_cuda_options."""

    _fields_ = fields("optforge_cuda_options")


def order(threads: str = "ascending", blocks: str = "ascending") -> None:
    """In which order the emulation runs the threads of a block, and the blocks, from now on."""
    os.environ["OPTFORGE_EMULATION_THREADS"] = threads
    os.environ["OPTFORGE_EMULATION_BLOCKS"] = blocks


class Cuda:
    """The functions of one emitted rule, compiled for the CPU."""

    def __init__(self, rule: of.Rule, directory: Path, options: Mapping[str, Any] | None = None, **how: Any):
        files = rule.generate("cuda", prefix="k", **how, **(options or {}))
        self.loaded = ctypes.CDLL(str(compile_emulated(files, directory)))
        self.rule, self.kernel = rule, rule.kernel(**(options or {}))
        self.state = [state.name for state in self.kernel.state]
        self.scalars = {state.name for state in self.kernel.state if state.scalar}
        self.phases = len(self.kernel.phases) + 1
        hypers = [(name, ctypes.c_double) for name, _ in self.kernel.hyperparameters] or [("_", ctypes.c_double)]
        self.Hyper: Any = type("Hyper", (ctypes.Structure,), {"_fields_": hypers})
        pointers = [(name, ctypes.c_void_p) for name in ("p", "g", *self.state)]
        self.size = "n_" if "n" in self.state else "n"
        self.Tensor: Any = type("Tensor", (ctypes.Structure,), {"_fields_": [(self.size, ctypes.c_size_t), *pointers]})

    def call(self, name: str, *arguments: Any, result: Any = ctypes.c_int) -> Any:
        """What a function gives."""
        function = getattr(self.loaded, f"k_cuda_{name}")
        function.restype = result
        return function(*arguments)

    def hyper(self, *rows: Mapping[str, float]) -> Any:
        """Structs of hyperparameters, for a group each, with the defaults of the library."""
        made = (self.Hyper * max(len(rows), 1))()
        for k in range(len(made)):
            self.call("hyper_init", ctypes.byref(made[k]), result=None)
            for name, value in (rows[k] if rows else {}).items():
                setattr(made[k], name, value)
        return made

    def workspace(self, sizes: Sequence[int], groups: int = 1, count: int | None = None) -> Any:
        """Exactly as much as tensors of these sizes need, between guards, at a multiple of 16 bytes, full of NaN."""
        elements, own = ctypes.c_uint64(sum(sizes)), ctypes.c_size_t(len(sizes) if count is None else count)
        size = self.call("workspace_size", elements, own, ctypes.c_size_t(groups), result=ctypes.c_size_t)
        guarded = Guarded([size // 8], np.float64)
        if guarded.arrays[0].ctypes.data % 16:
            guarded = Guarded([size // 8], np.float64, offset=1)
        guarded.arrays[0][:] = np.nan
        return guarded

    def options(self, workspace: Any = None, **values: Any) -> Options:
        """Options with the defaults of the library."""
        options = Options()
        self.call("options_init", ctypes.byref(options), result=None)
        if workspace is not None:
            options.workspace, options.workspace_size = workspace.ctypes.data, workspace.nbytes
        for name, value in values.items():
            setattr(options, name, value)
        return options

    def tensors(self, arrays: Sequence[Arrays]) -> Any:
        """Structs over arrays by name: p, g and the state."""
        table = (self.Tensor * max(len(arrays), 1))()
        for row, own in zip(table, arrays, strict=False):
            setattr(row, self.size, own["p"].size)
            for name in ("p", "g", *self.state):
                setattr(row, name, own[name].ctypes.data)
        return table

    def plan(self, arrays: Sequence[Arrays], options: Options, dtype: Any = None) -> tuple[int, Plan]:
        """A plan over arrays, and the status of making it."""
        itemsize = np.dtype(dtype or arrays[0]["p"].dtype).itemsize
        plan = Plan()
        suffix = {4: "f32", 8: "f64"}[itemsize]
        count = ctypes.c_size_t(len(arrays))
        status = self.call(
            f"plan_{suffix}", ctypes.byref(plan), self.tensors(arrays), count, ctypes.byref(options), None
        )
        return status, plan

    def step(self, t: int, plan: Plan, options: Options | None, *rows: Mapping[str, float]) -> int:
        """One step; its status."""
        asked = None if options is None else ctypes.byref(options)
        return int(self.call("step", self.hyper(*rows), ctypes.c_uint64(t), ctypes.byref(plan), asked, None))

    def rows(
        self, t: int, number: int, begins: int, plan: Plan, options: Options | None, *rows: Mapping[str, float]
    ) -> int:
        """The scalars of steps to come; the status."""
        asked = None if options is None else ctypes.byref(options)
        given = ctypes.byref(plan), self.hyper(*rows), ctypes.c_uint64(t), ctypes.c_size_t(number), begins, asked
        return int(self.call("rows", *given, None))

    @staticmethod
    def control(plan: Plan) -> Control:
        """What the device knows of its steps."""
        return Control.from_address(plan.control)


class Memory:
    """Arrays of tensors between guards, at odd offsets or aligned, beside an optimizer of the reference."""

    def __init__(
        self,
        cuda: Cuda,
        dtype: Any,
        sizes: Sequence[int],
        aligned: bool = False,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
        **how: Any,
    ):
        self.cuda, self.dtype, self.sizes = cuda, dtype, sizes
        self.rng = np.random.default_rng(seed)
        self.memory = {}
        for k, name in enumerate(("p", "g", *cuda.state)):
            own = name in cuda.scalars
            lengths = [1] * len(sizes) if own else sizes
            self.memory[name] = Guarded(lengths, np.float64 if own else dtype, offset=0 if aligned else k)
        self.tensors = [{name: memory.arrays[k] for name, memory in self.memory.items()} for k in range(len(sizes))]
        self.beside: list[Any] = []
        if aligned:
            self.align()
        for tensor in self.tensors:
            tensor["p"][:] = self.rng.standard_normal(tensor["p"].size)
        self.reference = of.Optimizer(
            [tensor["p"].copy() for tensor in self.tensors], cuda.rule, target="numpy", **(settings or {}), **how
        )

    def align(self) -> None:
        """Move the arrays to multiples of 16 bytes, between guards of their own."""
        for tensor in self.tensors:
            for name, array in tensor.items():
                own = np.full(array.size + 24, -12345.678, array.dtype)
                start = (-own.ctypes.data % 16 + 16) // own.itemsize
                tensor[name] = own[start : start + array.size]
                tensor[name][:] = 0
                self.beside += [own[:start], own[start + array.size :]]

    def begin(self, grads: Sequence[Any]) -> None:
        """Put gradients into their place."""
        for tensor, g in zip(self.tensors, grads, strict=True):
            tensor["g"][:] = g

    def check(self, where: str = "") -> None:
        """Compare every bit with the reference."""
        for k, tensor in enumerate(self.tensors):
            assert same(tensor["p"], self.reference.params[k]), f"p of size {self.sizes[k]}: {where}"
            for name in self.cuda.state:
                own = self.reference.state[name][k]
                own = np.array([own]) if name in self.cuda.scalars else own
                assert same(tensor[name], own), f"{name} of size {self.sizes[k]}: {where}"
        assert all(memory.intact() for memory in self.memory.values()), where
        assert all((guard == guard.dtype.type(-12345.678)).all() for guard in self.beside), where


def agree(told: Stats, each: Any, expected: Any, where: str = "") -> None:
    """Statistics against those of the reference, every bit."""
    for name, _ in Stats._fields_:
        assert same(float(getattr(told, name)), float(expected[name])), f"{name}: {where}"
        own = np.array([getattr(one, name) for one in each], np.float64)
        assert same(own, expected.per_tensor[name].astype(np.float64)), f"{name} of each tensor: {where}"
