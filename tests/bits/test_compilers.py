"""The emitted C has the same bits with every compiler and optimisation, alone or with OpenMP."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from amount import FULL, some
from conftest import COMPILERS, require
from data import DTYPES, Guarded, gradients, same, special_pairs
from native import Library, code, compile_shared, instruction_sets
from oracles import begin, names, oracle

FLAGS = {
    "O0": ("-O0",),
    "O2": ("-O2",),
    "O3": ("-O3",),
    "native": ("-O3", "-march=native"),
    "lto": ("-O2", "-flto", "-funroll-loops"),
    "openmp": ("-O2", "-fopenmp"),
    "unsafe": ("-O3", "-funsafe-math-optimizations", "-freciprocal-math"),
    "almost fast": ("-O2", "-ffast-math", "-fno-finite-math-only"),
    "contracting": ("-O3", "-mavx2", "-mfma", "-ffp-contract=fast"),
}
# What `unsafe` lets a compiler do to the runtime is a part of what `almost fast` does.
RUNTIME = {} if FULL else {"unsafe": FLAGS["almost fast"]}
SETS = instruction_sets()
SIZES = (*range(70), 127, 128, 129, 1023, 1024, 1025, 5000)


# The runtime is the same for all rules: every way is taken by one of them, and some by the others. -O3 alone, which
# three others have too, is for the long run.
WAYS = [
    (name, compiler, flags)
    for name in names()
    for compiler in COMPILERS
    for flags in FLAGS
    if (FULL or flags != "O3")
    and not (compiler == "clang" and flags in ("openmp", "lto"))  # which are packages of their own
    and not (flags == "contracting" and (compiler == "clang" or platform.machine() != "x86_64"))
]


@pytest.mark.parametrize(
    ("name", "compiler", "flags"),
    some(WAYS, 12, lambda way: way[0] == "adam" or (way[0] == "lamb" and way[2] == "native")),
)
def test_compilers_and_flags_do_not_change_bits(name: str, compiler: str, flags: str, tmp_path: Path) -> None:
    path = require(compiler)
    rule = of.rules[name]
    built = compile_shared(rule.generate(), tmp_path, path, FLAGS[flags], RUNTIME.get(flags))
    library = Library(built, name, list(rule.hyperparameters), list(rule.state))
    for dtype in DTYPES:
        for hyper in (oracle(name).SETTINGS[0], oracle(name).HYPERPARAMETERS):
            check(library, name, dtype, hyper)


def check(library: Library, name: str, dtype: Any, hyper: dict[str, float]) -> None:
    """Three steps over tensors of all sizes, special values included, with each instruction set, against the oracle."""
    rng = np.random.default_rng(3)
    edges, edge_gradients = special_pairs(dtype)
    sizes = [*SIZES, edges.size]
    scalars = getattr(oracle(name), "SCALAR_STATE", ())
    names_of_arrays = ["p", "g", *(state for state in oracle(name).STATE if state not in scalars)]
    first = [rng.standard_normal(n).astype(dtype) for n in sizes]
    first[-1][:] = edges
    guards, copies = [], {}
    for chosen in [has for has, there in SETS.items() if there] or [""]:
        memory = {array: Guarded(sizes, dtype, offset=k) for k, array in enumerate(names_of_arrays)}
        tensors = [{array: memory[array].arrays[k] for array in names_of_arrays} for k in range(len(sizes))]
        for tensor, p in zip(tensors, first, strict=True):
            tensor["p"][:] = p
            tensor |= {state: np.zeros(1) for state in scalars}
            for state, value in oracle(name).STATE.items():
                tensor[state][:] = value
        copies[chosen] = tensors
        guards += memory.values()
    expected = [(p.copy(), begin(name, p)) for p in first]
    struct = library.hyper(**hyper)
    for t in range(1, 4):
        grads = [gradients(rng, n, dtype) for n in sizes[:-1]] + [np.roll(edge_gradients, 5 * t)]
        expected = [oracle(name).step(p, g, state, t, **hyper) for (p, state), g in zip(expected, grads, strict=True)]
        for chosen, tensors in copies.items():
            for tensor, g in zip(tensors, grads, strict=True):
                tensor["g"][:] = g
            if chosen:
                assert library.runtime("use")(chosen.encode()) == 0
                assert library.runtime("isa", ctypes.c_char_p)().decode() == chosen
            assert library.step(struct, t, tensors) == 0
            for k, tensor in enumerate(tensors):
                where = f"size {sizes[k]}, step {t}, {chosen}"
                assert same(tensor["p"], expected[k][0]), f"p of {where}"
                for s, values in expected[k][1].items():
                    assert same(tensor[s][0] if s in scalars else tensor[s], values), f"{s} of {where}"
    assert all(own.intact() for own in guards)


@pytest.mark.skipif(not SETS, reason="there is one instruction set")
def test_an_instruction_set_that_the_machine_lacks_is_refused(tmp_path: Path) -> None:
    built = compile_shared(of.rules["sgd"].generate(), tmp_path, require("gcc"), ("-O2",))
    library = Library(built, "sgd", list(of.rules["sgd"].hyperparameters), [])
    use, isa = library.runtime("use"), library.runtime("isa", ctypes.c_char_p)
    best = [name for name, there in SETS.items() if there][-1]
    assert isa().decode() == os.environ.get("OPTFORGE_ISA", best)
    for name, there in (SETS | {"x86-64-v9": False, "": False, "neon": False}).items():
        before = isa()
        assert use(name.encode()) == (code("OK") if there else code("ERROR_ISA"))
        assert isa() == (name.encode() if there else before)
    assert use(None) == code("ERROR_NULL")


@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast", "-ffinite-math-only"])
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


def test_scalar_state_is_checked(tmp_path: Path) -> None:
    """It is there, aligned, and apart from the arrays and from other scalar state."""

    @of.rule
    def counted(p, g, m=0.0, k: of.scalar = 0.0, mu: of.scalar = 1.0, *, lr=0.1):
        k = k + 1
        mu = mu * 0.9
        m = mu * m + g / k
        p = p - lr * m
        return p, m, k, mu

    built = compile_shared(counted.generate(), tmp_path, require("gcc"), ("-O2",))
    library = Library(built, "counted", ["lr"], ["m", "k", "mu"], ["k", "mu"])
    text = library.call("strerror", ctypes.c_char_p)
    arrays = {name: np.ones(8) for name in ("p", "g", "m")} | {name: np.ones(1) for name in ("k", "mu")}
    before = {name: array.copy() for name, array in arrays.items()}

    def status(**addresses: int | None) -> str:
        table = library.tensors([arrays])
        for name, address in addresses.items():
            setattr(table[0], name, address)
        return str(text(library.call("step_f64")(ctypes.byref(library.hyper()), 1, table, 1)).decode())

    assert status(k=None) == "a pointer is NULL"
    assert status(k=arrays["mu"].ctypes.data) == "two arrays of a tensor overlap"
    assert status(mu=arrays["m"].ctypes.data + 56) == "two arrays of a tensor overlap"
    assert status(mu=arrays["mu"].ctypes.data + 4) == "an array is not aligned to its elements"
    assert all(same(arrays[name], old) for name, old in before.items())
    assert status() == "done"
    assert status(n=0, p=None, g=None, m=None) == "done"
    assert arrays["k"][0] == 3
