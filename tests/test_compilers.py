"""The emitted C has the same bits with every compiler and optimisation, alone or with OpenMP."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from conftest import COMPILERS, require
from data import DTYPES, Guarded, gradients, same, special_pairs
from native import Library, compile_shared
from oracles import names, oracle

FLAGS = {
    "O0": ("-O0",),
    "O2": ("-O2",),
    "O3": ("-O3",),
    "native": ("-O3", "-march=native"),
    "lto": ("-O2", "-flto", "-funroll-loops"),
    "openmp": ("-O2", "-fopenmp"),
}
SIZES = (*range(70), 127, 128, 129, 1023, 1024, 1025, 5000)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("name", names())
def test_compilers_and_flags_do_not_change_bits(name: str, compiler: str, flags: str, tmp_path: Path) -> None:
    path = require(compiler)
    if flags in ("openmp", "lto") and compiler == "clang":
        pytest.skip("clang's OpenMP and LTO are packages of their own")
    rule = of.rules[name]
    built = compile_shared(rule.generate(), tmp_path, path, FLAGS[flags])
    library = Library(built, name, list(rule.hyperparameters), list(rule.state))
    for dtype in DTYPES:
        for hyper in (oracle(name).SETTINGS[0], oracle(name).HYPERPARAMETERS):
            check(library, name, dtype, hyper)


def check(library: Library, name: str, dtype: Any, hyper: dict[str, float]) -> None:
    """Three steps over tensors of all sizes, special values included, against the oracle."""
    rng = np.random.default_rng(3)
    edges, edge_gradients = special_pairs(dtype)
    sizes = [*SIZES, edges.size]
    names_of_arrays = ["p", "g", *oracle(name).STATE]
    memory = {array: Guarded(sizes, dtype, offset=k) for k, array in enumerate(names_of_arrays)}
    tensors = [{array: memory[array].arrays[k] for array in names_of_arrays} for k in range(len(sizes))]
    for tensor in tensors:
        tensor["p"][:] = rng.standard_normal(tensor["p"].size)
        for state, value in oracle(name).STATE.items():
            tensor[state][:] = value
    tensors[-1]["p"][:] = edges
    expected = [(tensor["p"].copy(), {s: tensor[s].copy() for s in oracle(name).STATE}) for tensor in tensors]
    struct = library.hyper(**hyper)
    for t in range(1, 4):
        for tensor in tensors[:-1]:
            tensor["g"][:] = gradients(rng, tensor["g"].size, dtype)
        tensors[-1]["g"][:] = np.roll(edge_gradients, 5 * t)
        assert library.step(struct, t, tensors) == 0
        for k, tensor in enumerate(tensors):
            p, state = expected[k]
            expected[k] = oracle(name).step(p, tensor["g"], state, t, **hyper)
            assert same(tensor["p"], expected[k][0]), f"p of size {sizes[k]}, step {t}"
            assert all(same(tensor[s], values) for s, values in expected[k][1].items()), f"state of size {sizes[k]}"
    assert all(own.intact() for own in memory.values())


@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast"])
def test_flags_that_change_bits_are_refused(flag: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="without -ffast-math"):
        compile_shared(of.rules["sgd"].generate(), tmp_path, require("gcc"), (flag,))


def test_status_codes(tmp_path: Path) -> None:
    """Each mistake is found before the first write, and has a text."""
    rule = of.rules["adam"]
    built = compile_shared(rule.generate(), tmp_path, require("gcc"), ("-O2",))
    library = Library(built, "adam", list(rule.hyperparameters), list(rule.state))
    text = library.call("strerror", ctypes.c_char_p)

    def arrays(**changed: Any) -> dict[str, Any]:
        own = {name: np.ones(40, np.float32) for name in ("p", "g", "m", "v")}
        return {**own, **changed}

    def status(tensors: list[dict[str, Any]], t: int = 1, **hyper: float) -> str:
        before = [{k: v.copy() for k, v in tensor.items()} for tensor in tensors]
        code = library.step(library.hyper(**hyper), t, tensors)
        if code:
            assert all(same(tensor[k], v) for tensor, old in zip(tensors, before, strict=True) for k, v in old.items())
        return str(text(code).decode())

    shared = np.ones(60, np.float32)
    raw = np.zeros(41 * 4 + 1, np.uint8)
    good = arrays()
    assert status([arrays()]) == "done"
    assert status([]) == "done"
    assert status([arrays(**{k: np.zeros(0, np.float32) for k in good})]) == "done"
    assert status([good, arrays(m=shared[:40], v=shared[20:])]) == "two arrays of a tensor overlap"
    assert status([good, arrays(g=raw[1:161].view(np.float32))]) == "an array is not aligned to its elements"
    assert status([good], t=0) == "t counts the steps from 1"
    assert status([good], lr=float("nan")) == "a hyperparameter is NaN"
    assert status([good], beta1=1.0) == "the hyperparameters break: 0 <= beta1 < 1 and 0 <= beta2 < 1 and eps > 0"
    assert status([good], lam=0.0, t=1) == "done"
    assert text(12345).decode() == "unknown status"
    table = library.tensors([arrays()])
    table[0].m = None
    byref = ctypes.byref
    assert text(library.call("step_f32")(byref(library.hyper()), 1, table, 1)).decode() == "a pointer is NULL"
    assert text(library.call("step_f32")(None, 1, table, 1)).decode() == "a pointer is NULL"
    assert text(library.call("step_f32")(byref(library.hyper()), 1, None, 1)).decode() == "a pointer is NULL"
    table = library.tensors([arrays()])
    table[0].n = 2**63
    assert "more elements" in text(library.call("step_f32")(byref(library.hyper()), 1, table, 1)).decode()
