"""Emitted CUDA through nvcc, without a GPU: architectures, warnings, registers, and how the PTX rounds.

Rules, all of them in the long run, are in one file, which nvcc reads once; its assembler then makes machine code for each architecture. The PTX
that it assembles is the same for all of them, for nothing emitted asks for one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import optforge as of
from amount import FULL
from conftest import require
from emulation import run
from optforge import (
    abs,
    exp,
    global_sum,
    log,
    max_abs,
    maximum,
    mean,
    minimum,
    norm,
    scalar,
    sign,
    sqrt,
    sum,
    tanh,
    where,
)

ARCHITECTURES = (90, 75, 120, 80, 86, 89, 100)
WHOLE = (75, 80, 86, 90, 100, 120) if FULL else (90,)  # take all rules; the others, what is peculiar
PECULIAR = ("elements", "clipped") if FULL else ("clipped",)
HOST = "-O3" if FULL else "-O1"  # the host's part, which is compiled for its warnings
WARNINGS = "-Wall,-Wextra,-Wconversion,-Wshadow,-Wcast-qual,-Wdouble-promotion,-Werror"
STRICT = ("-std=c++17", "-Werror", "all-warnings", "-Xcompiler", WARNINGS)


@of.rule
def elements(p, g, m=0.0, slow="p", first="g", scale="lr", *, t, lr=0.1, floor=1e-3):
    """Every function of elements."""
    assert lr > 0
    m = where(g > m, tanh(m), maximum(exp(-abs(g)), minimum(m, 0.5))) + where(g != g, 1.5, sign(p) * log(1 + abs(m)))
    first = first - 0.125 * (first - g) ** 2
    slow = slow + sqrt(abs(first)) * (p - slow) ** -1 * lr**t
    scale = where(p >= slow, scale, where(p == 0, -scale, scale / floor)) ** 0.5
    p = p - lr * where(m <= scale, m, first)
    return p, m, slow, first, scale


@of.rule
def scalars(p, g, m=0.0, seen: scalar = 1.0, rate: scalar = "lr", *, t, lr=0.1, beta=0.9):
    """Every function of scalars, before reductions and behind them, and every reduction."""
    centred = g - mean(g)
    most = max_abs(centred)
    a = exp(-most) + log(1 + norm(m)) ** 1.5 + tanh(sum(abs(p))) + most % 0.75 if most > 0 else sign(most - lr)
    rate = maximum(rate * beta**t, minimum(sqrt(a), abs(lr - a))) ** seen
    m = beta * m + (1 - beta) * centred / (1 + global_sum(m * p) ** 2)
    seen = seen * 0.5 + max_abs(m) ** beta
    p = p - (rate if rate < 1 and not a > 2 else 0.5) * m
    return p, m, seen, rate


@of.rule
def rectified(p, g, m=0.0, v=0.0, *, t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8):
    """Functions of scalars on the host, in asserts too, as RAdam has them."""
    assert maximum(lr, 0) >= 0 and minimum(beta1, beta2) >= 0 and sign(eps) > 0 and (lr + eps) ** 2 >= 0
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / (1 - beta2**t)
    factor = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * maximum(length, 1))
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    step = lr * sqrt(maximum(factor, 0)) * (1 - beta1) ** 2 if length > 5 else lr * minimum(1, abs(sign(t - 3)))
    p = p - step * m / (sqrt(v) + eps)
    return p, m, v


# One pass and two, with scalar state and without; they have the templates that all others have.
BUILT_IN = list(of.rules) if FULL else ["adadelta", "novograd"]
RULES: dict[str, of.Rule] = {
    **{name: of.rules[name] for name in BUILT_IN},
    "elements": elements,
    "scalars": scalars,
    "rectified": rectified,
    "clipped": of.clip_by_global_norm >> of.rules.lamb,
}


# Arrays stored otherwise than they are computed with: narrow ones to nearest and at random, and both masters.
BF16 = dict.fromkeys("pgmv", "bf16")
STORED: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw_narrow": ("adamw", {"store": {"p": "bf16", "g": "bf16"}}),
    "adamw_split": ("adamw", {"store": {"p": "bf16", "g": "bf16"}, "master": "split"}),
    "lamb_random": ("lamb", {"store": BF16, "rounding": "stochastic"}),
    "adam_half": ("adam", {"store": dict.fromkeys("pgmv", "f16"), "master": "f32", "rounding": "stochastic"}),
}


@dataclass(frozen=True)
class Built:
    """The PTX of all rules, and what the assembler makes of it for each architecture."""

    ptx: str
    assembled: Mapping[int, Future[str]]


def write(directory: Path, rules: Mapping[str, of.Rule]) -> Path:
    """A file that includes all of these rules' own."""
    made: dict[str, str] = {}
    for name, rule in rules.items():
        made |= rule.generate("cuda", prefix=name, **STORED.get(name, ("", {}))[1])
    for name, text in made.items():
        (directory / name).write_text(text, encoding="utf-8")
    path = directory / "all.cu"
    path.write_text("".join(f'#include "{name}"\n' for name in made if name.endswith(".cu")), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    nvcc, ptxas = require("nvcc"), require("ptxas")
    directory = tmp_path_factory.mktemp("built")
    source = write(directory, RULES | {name: of.rules[rule] for name, (rule, _) in STORED.items()})
    # The host's part is compiled as well; -keep leaves the PTX.
    whole = ["-gencode", "arch=compute_75,code=compute_75", "-c", "-keep", "-keep-dir", str(directory)]
    run([nvcc, *STRICT, HOST, *whole, "-o", str(directory / "all.o"), str(source)])
    ptx, few = directory / "all.ptx", directory / "few.ptx"
    source = write(directory, {name: RULES[name] for name in PECULIAR})
    run([nvcc, *STRICT, "-arch=compute_75", "-ptx", "-o", str(few), str(source)])

    def assemble(architecture: int) -> str:
        command = [
            "--warning-as-error",
            "-v",
            f"-arch=sm_{architecture}",
            "-o",
            str(directory / f"{architecture}.cubin"),
        ]
        return run([ptxas, *command, str(ptx if architecture in WHOLE else few)], errors=True)

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        yield Built(ptx.read_text(), {own: pool.submit(assemble, own) for own in ARCHITECTURES})


# ── what the PTX rounds ─────────────────────────────────────────────────────────────────────────────────────────────

FUNCTION = re.compile(r"^[^\n]*\.(?:entry|func)\b[^{;]*?(\w+)\s*\([^{;]*\{(.*?)^\}", re.DOTALL | re.MULTILINE)
INSTRUCTION = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z]\w*(?:\.\w+)*)[\s;]", re.MULTILINE)
UNROUNDED = re.compile(r"(add|sub|mul|div|sqrt|rcp)\.(?!rn\.f(?:32|64)$)(\w+\.)*f(32|64)")
INEXACT = re.compile(
    r"(fma|mad)\.(\w+\.)*f(32|64)|.*\.(approx|ftz|full)\b.*|(ex2|lg2|sin|cos|tanh|rsqrt)\..*|.*\.f16.*|wmma.*"
)


# The square of a float is exact in double, so that nothing is lost where it is added at once.
SQUARE = re.compile(r"^\s*fma\.rn\.f64\s+%\w+, (%\w+), \1, %\w+;$", re.MULTILINE)


def functions(ptx: str) -> dict[str, list[str]]:
    """Instructions of each function, but for those that add the square of a float."""
    found = {}
    for name, body in FUNCTION.findall(ptx):
        rest, squares = SQUARE.subn("", body)
        assert not squares or "f32" in name or not name.endswith("f64"), name
        found[name] = INSTRUCTION.findall(rest)
    return found


def inexact(ptx: str) -> set[tuple[str, str]]:
    """Instructions that may round otherwise than is written, outside of what calls CUDA's library and of the library."""
    return {
        (name, own)
        for name, instructions in functions(ptx).items()
        for own in instructions
        if (UNROUNDED.fullmatch(own) or INEXACT.fullmatch(own)) and "_library_" not in name and "_cuda_" in name
    }


def test_what_is_looked_for() -> None:
    """The check sees what nvcc makes of plain operators, and what flags do to operations that round as written."""
    for text in (
        "add.f32",
        "mul.f64",
        "sub.ftz.f32",
        "add.rn.ftz.f32",
        "div.full.f32",
        "add.rz.f64",
        "sqrt.approx.f32",
        "div.approx.f32",
    ):
        assert UNROUNDED.fullmatch(text) or INEXACT.fullmatch(text), text
    for text in (
        "fma.rn.f32",
        "mad.rn.f64",
        "ex2.approx.ftz.f32",
        "cvt.ftz.f64.f32",
        "setp.lt.ftz.f32",
        "add.rn.ftz.f32",
    ):
        assert INEXACT.fullmatch(text), text
    for text in (
        "add.rn.f32",
        "sub.rn.f64",
        "mul.wide.u32",
        "add.s64",
        "mad.lo.s32",
        "div.rn.f64",
        "cvt.rn.f32.f64",
        "selp.f32",
    ):
        assert not UNROUNDED.fullmatch(text) and not INEXACT.fullmatch(text), text


def test_every_operation_is_rounded_as_it_is_written(built: Built) -> None:
    found = functions(built.ptx)
    assert sum_of(found, "ret") + sum_of(found, "ret.uni") == len(
        re.findall(r"^\s+(?:@!?%\w+\s+)?ret\b", built.ptx, re.MULTILINE)
    )
    for name in (*RULES, *STORED):
        own = {kernel for kernel in found if kernel.startswith(f"{name}_cuda_")}
        assert {
            f"{name}_cuda_begin",
            f"{name}_cuda_fold",
            f"{name}_cuda_finish",
        } <= own
    assert sum_of(found, "add.rn.f32") > 100 and sum_of(found, "mul.rn.f64") > 100 and sum_of(found, "div.rn.f32") > 10
    assert not inexact(built.ptx)


def sum_of(found: Mapping[str, list[str]], instruction: str) -> int:
    """How often an instruction stands in functions."""
    return len([own for instructions in found.values() for own in instructions if own == instruction])


def test_the_functions_of_the_library_are_kept_apart(built: Built) -> None:
    """exp and the like are off in the last bits: not inlined, so that what is inexact has their names."""
    bodies = dict(FUNCTION.findall(built.ptx))
    words = {name.split("_library_")[1].rstrip("0123456789") for name in bodies if "_library_" in name}
    assert any("exp" in word for word in words) and any("pow" in word for word in words), words
    callers = {name for name, body in bodies.items() if "_library_" in body}
    assert callers and not [name for name in callers if name.startswith(tuple(f"{own}_cuda_" for own in BUILT_IN))]


@pytest.mark.parametrize("flags", [("-O3", "-fmad=true", "-prec-div=false", "-prec-sqrt=false"), ("-G",)], ids=" ".join)
def test_flags_change_no_rounding(flags: Sequence[str], tmp_path: Path) -> None:
    nvcc = require("nvcc")
    source = write(tmp_path, {"elements": elements, "scalars": scalars})
    ptx = tmp_path / "all.ptx"
    run([nvcc, *STRICT, *flags, "-arch=compute_90", "-ptx", "-o", str(ptx), str(source)])
    assert {"elements_cuda_elements_f32", "scalars_cuda_fold"} <= set(functions(ptx.read_text()))
    assert not inexact(ptx.read_text())


def test_fast_math_flushes_to_zero_and_no_more(tmp_path: Path) -> None:
    """Division and roots stay exact, and nothing is fused; that subnormal floats become 0 no source can prevent."""
    nvcc = require("nvcc")
    source = write(tmp_path, {name: RULES[name] for name in (("clipped", "novograd") if FULL else ("novograd",))})
    ptx = tmp_path / "all.ptx"
    run([nvcc, *STRICT, "--use_fast_math", "-arch=compute_90", "-ptx", "-o", str(ptx), str(source)])
    changed = {own for _, own in inexact(ptx.read_text())}
    assert changed and {own.replace(".ftz", "") for own in changed} <= {
        *(f"{word}.rn.f32" for word in ("add", "sub", "mul", "div", "sqrt")),
        *("cvt.rn.f32.f64", "cvt.f64.f32", "abs.f32", "neg.f32", "min.f32", "cvt.rzi.s32.f32"),  # exact but for that
        *(
            f"setp.{word}.f32"
            for word in ("nan", "num", "eq", "neu", "lt", "le", "gt", "ge", "equ", "ltu", "leu", "gtu", "geu")
        ),
    }
    assert not any("f64" in own and "f32" not in own for own in changed)


# ── what the assembler makes of it ──────────────────────────────────────────────────────────────────────────────────

KERNEL = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_rule_is_assembled(architecture: int, built: Built) -> None:
    said = built.assembled[architecture].result()
    kernels = KERNEL.findall(said)
    assert (
        len(kernels) == said.count("Compiling entry function") > 10 * len(RULES if architecture in WHOLE else PECULIAR)
    )
    built_in = tuple(f"{name}_cuda_" for name in (*BUILT_IN, *STORED))
    spilled = [name for name, *spills, _ in kernels if name.startswith(built_in) and spills != ["0", "0"]]
    assert not spilled


def test_debugging(tmp_path: Path) -> None:
    """Unoptimised, with debugging information: no warning either."""
    nvcc = require("nvcc")
    source = write(tmp_path, {"scalars": scalars})
    command = [nvcc, *STRICT, "-O0", "-G", "-g", "-Xptxas", "-O0", "-arch=sm_90", "-cubin"]
    run([*command, "-o", str(tmp_path / "all.cubin"), str(source)])


@pytest.mark.parametrize("standard", ["c++11", "c++14", "c++20"] if FULL else ["c++11"])
def test_standards(standard: str, tmp_path: Path) -> None:
    nvcc = require("nvcc")
    source = write(tmp_path, {"scalars": scalars})
    command = [nvcc, f"-std={standard}", *STRICT[1:], "-O1", "-gencode", "arch=compute_75,code=compute_75", "-c"]
    run([*command, "-o", str(tmp_path / "all.o"), str(source)])


def test_the_most_blocks_that_may_be_asked_for(tmp_path: Path) -> None:
    """All that a multiprocessor has room for; passes that leave registers for one more are not told of a ninth."""
    nvcc = require("nvcc")
    for name, text in of.rules.sgd.generate("cuda", "f32").items():
        (tmp_path / name).write_text(text)
    command = [nvcc, *STRICT, "-DOPTFORGE_CUDA_MIN_BLOCKS=8", "-arch=sm_80", "-cubin"]
    run([*command, "-o", str(tmp_path / "sgd.cubin"), str(tmp_path / "sgd.cu")])


def test_a_long_prefix(tmp_path: Path) -> None:
    """Lines that would be too long are folded, and macros are still whole."""
    nvcc = require("nvcc")
    source = write(tmp_path, {"prefix" * 15: of.rules.sgd})
    run([nvcc, *STRICT, "-arch=sm_90", "-cubin", "-o", str(tmp_path / "all.cubin"), str(source)])
