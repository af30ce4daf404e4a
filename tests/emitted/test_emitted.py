"""The emitted files: committed ones are current, and engines can use them alone."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from amount import FULL, LEVEL, some
from compiling import objects, run
from conftest import COMPILERS, require
from native import OPTIMISED, STRICT
from optforge import exp, log, maximum, minimum, rule, scalar, sign, sqrt, tanh, where
from optforge.cli.generate import emit, select
from optforge.cli.write import differences, write_all
from optforge.core.formats import Wanted
from optforge.emit import layout, project
from optforge.emit import python_package as pypackage
from optforge.emit import text as render
from places import ROOT

x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="looks for x86 instructions")


@rule
def engine(p, g, m=0.0, v="floor", mu: scalar = 1.0, *, t, lr=0.02, beta=0.9, floor=1e-3, signed=False):
    """A rule with a static option, a scalar state and a `where`."""
    assert 0 <= beta < 1
    mu = mu * beta
    d = where(g > 0, 1, -1) if signed else g
    m = beta * m + (1 - beta) * d
    v = where(v > g**2, beta * v, g**2)
    p = p - lr / (1 - mu) * m / (sqrt(v) + floor / t)
    return p, m, v, mu


PROGRAM = r"""
#include "engine.h"
#include <stdio.h>

int main(void)
{
    enum { N = 37, M = 5 };
    static REAL p[2][N], g[2][N], m[2][N], v[2][N];
    double mu[2];
    engine_hyper hyper;
    engine_tensor_SUFFIX tensors[2] = {{N, p[0], g[0], m[0], v[0], &mu[0]}, {M, p[1], g[1], m[1], v[1], &mu[1]}};

    engine_hyper_init(&hyper);
    hyper.lr = 0.05;
    for (size_t k = 0; k < 2; k++) {
        for (size_t i = 0; i < tensors[k].n; i++)
            p[k][i] = (REAL)((double)(7 * i % 11) / 8.0 - 0.5);
        engine_state_init_SUFFIX(&tensors[k], &hyper);
    }
    for (unsigned t = 1; t <= 3; t++) {
        int status;
        for (size_t k = 0; k < 2; k++)
            for (size_t i = 0; i < tensors[k].n; i++)
                g[k][i] = (REAL)((double)((5 * i + 3 * t) % 13) / 16.0 - 0.375);
        status = engine_step_SUFFIX(&hyper, t, tensors, 2);
        if (status != engine_OK) {
            printf("%s\n", engine_strerror(status));
            return 1;
        }
    }
    for (size_t k = 0; k < 2; k++) {
        for (size_t i = 0; i < tensors[k].n; i++)
            printf("%a %a %a\n", (double)p[k][i], (double)m[k][i], (double)v[k][i]);
        printf("%a\n", mu[k]);
    }
    return 0;
}
"""


def expected(dtype: Any, **settings: Any) -> list[float]:
    """What the program prints, computed by the rule as plain Python."""
    printed = []
    for n in (37, 5):
        i = np.arange(n)
        p: Any = ((7 * i % 11) / 8.0 - 0.5).astype(dtype)
        state: Any = []
        for t in (1, 2, 3):
            g = (((5 * i + 3 * t) % 13) / 16.0 - 0.375).astype(dtype)
            p, *state = engine.function(p, g, *state, t=t, **settings)
        m, v, mu = state
        printed += [float(x) for row in zip(p, m, v, strict=True) for x in row] + [mu]
    return printed


REALS = [("f32", "float", np.float32), ("f64", "double", np.float64)]
PROGRAMS = [(compiler, *real, signed) for compiler in COMPILERS for real in REALS for signed in (False, True)]


@pytest.mark.parametrize(("compiler", "suffix", "real", "dtype", "signed"), PROGRAMS if FULL else PROGRAMS[1:-1:5])
def test_a_c_program_has_the_bits_of_the_function(
    compiler: str, suffix: str, real: str, dtype: Any, signed: bool, tmp_path: Path
) -> None:
    """Three steps on the emitted files alone."""
    list(write_all(tmp_path, engine.generate(dtypes=[suffix], signed=signed)))
    (tmp_path / "main.c").write_text(PROGRAM.replace("REAL", real).replace("SUFFIX", suffix))
    made = objects([require(compiler), *OPTIMISED], ["main.c", "engine.c", "optforge.c"], tmp_path)
    run([compiler, *made, "-lm", "-o", "main"], tmp_path)
    printed = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout.split()
    assert [float.fromhex(x) for x in printed] == expected(dtype, lr=0.05, signed=signed)


def test_committed_files_are_current() -> None:
    files = emit(select([], True), ["c", "cuda"], Wanted(), [], None)
    assert differences(ROOT / "build", files, {"c", "cuda"}) == []
    assert {path.name for path in (ROOT / "build").iterdir()} == set(files)


# But for what JAX and the profile compile for themselves.
EMITTED = {
    path for path in render.TEMPLATES.rglob("*.*") if not path.name.startswith("xla-") and path.parent.name != "profile"
}


@pytest.mark.parametrize("template", some(sorted(str(path.relative_to(render.TEMPLATES)) for path in EMITTED), 3))
def test_a_changed_template_is_noticed(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tmp_path / "templates"
    shutil.copytree(render.TEMPLATES, changed)
    text = (changed / template).read_text()
    other = re.sub(r"double|->|#include|#ifndef|optforge|include|int |for \(size_t", "float", text, count=1)
    assert other != text
    layout_of = {"project": "project", "runtime/optforge.hpp": "project", "rule.hpp.j2": "project", "python": "python"}
    laid_out = layout_of.get(template, layout_of.get(template.partition("/")[0]))

    def files() -> dict[str, str]:
        if laid_out is None:
            return emit(select(["lamb", "plateau"], False), ["c", "cuda"], Wanted(), [], None)
        return emit(select(["adam"], False), ["c"], Wanted(["f32"]), [], None, layout=laid_out)

    before = files()
    (changed / template).write_text(other)
    cached = (render.environment, layout.runtime_file, layout.runtime_parts)
    for module in (render, layout, project, pypackage):
        monkeypatch.setattr(module, "TEMPLATES", changed)
    for each in cached:
        each.cache_clear()
    try:
        assert files() != before
    finally:
        monkeypatch.undo()
        for each in cached:
            each.cache_clear()


@rule
def noop(p, g):
    return p


@rule
def choosing(p, g, prev=0.0, step=0.01, *, t, lr=0.1, up=1.2, down=0.5, low=1e-6, high=50.0):
    """Rprop, with a choice by a scalar."""
    s = g * prev
    step = where(s > 0, minimum(step * up, high), where(s < 0, maximum(step * down, low), step))
    prev = where(s < 0, 0, g)
    p = (p - sign(prev) * step) if t > 1 else (p - lr * g / (sqrt(abs(g)) + 1))
    return p, prev, step


@rule
def transcendental(p, g, m=0.0, *, lr=0.1):
    m = tanh(m) + exp(-abs(g)) * where(g > p, log(abs(g) + 1), m)
    p = p - lr * m
    return p, m


@rule
def bare(p, g, n=0.0):
    n = n + g
    p = p - n
    return p, n


@pytest.mark.parametrize("compiler", COMPILERS if FULL else COMPILERS[:1])
def test_emitted_files_compile_alone_and_together(compiler: str, tmp_path: Path) -> None:
    """As C99 and C11 with all warnings, as C++ (header and source), and all rules in one program."""
    path = require(compiler)
    rules = list(of.rules)
    for name in [*rules]:
        list(write_all(tmp_path, of.rules[name].generate()))
    list(write_all(tmp_path, engine.generate()))
    list(write_all(tmp_path, engine.generate(prefix="other", signed=True)))
    own = [noop, bare, choosing, transcendental]
    for each in own:
        list(write_all(tmp_path, each.generate()))
    names = [*rules, "engine", "other", *(each.name for each in own)]
    sources = [*names, "optforge"]

    made = objects([path, *OPTIMISED], (f"{name}.c" for name in sources), tmp_path)
    how = ("-O2", "-c") if FULL else ("-fsyntax-only",)
    cpp = ("-std=c++11", "-Wall", "-Wextra", "-Werror")
    run([path, "-std=c11", *STRICT[1:], *how, *(f"{name}.c" for name in sources)], tmp_path)
    run([path, "-x", "c++", *cpp, *how, *(f"{name}.c" for name in sources)], tmp_path)
    includes = "".join(f'#include "{name}.h"\n' for name in names)
    (tmp_path / "all.cpp").write_text(
        includes + includes + "int main() { adam_hyper h; adam_hyper_init(&h); return h.lr != 1e-3; }\n"
    )
    (tmp_path / "unity.c").write_text("".join(f'#include "{name}.c"\n' for name in sources))
    run([path, *STRICT, LEVEL, "-c", "unity.c"], tmp_path)
    if compiler == "gcc":  # clang's C++ library is a package of its own
        run([path, *cpp, "all.cpp", *made, "-lstdc++", "-lm", "-o", "all"], tmp_path)
        assert subprocess.run([tmp_path / "all"], check=False).returncode == 0


def test_a_rule_without_hyperparameters_needs_no_struct(tmp_path: Path) -> None:
    text = bare.generate(dtypes="f32")
    assert "Renamed for C: the number of elements is n_." in text["bare.h"]
    list(write_all(tmp_path, text))
    (tmp_path / "main.c").write_text(
        '#include "bare.h"\nint main(void)\n{\n    float p[] = {3}, g[] = {1}, n[] = {0};\n'
        "    bare_tensor_f32 x = {1, p, g, n};\n    return bare_step_f32(NULL, 1, &x, 1) || p[0] != 2.0f;\n}\n"
    )
    made = objects([require("gcc"), *OPTIMISED], ["main.c", "bare.c", "optforge.c"], tmp_path)
    run(["gcc", *made, "-lm", "-o", "main"], tmp_path)
    subprocess.run([tmp_path / "main"], check=True)


def test_only_prefixed_symbols_are_visible(tmp_path: Path) -> None:
    """Of the rule's file and of the runtime's; and what they need is little: no memory is allocated, nothing printed."""
    list(write_all(tmp_path, of.rules["adamw"].generate(prefix="own")))
    needed = {}
    for name in ("own", "optforge"):
        made = objects([require("gcc"), *STRICT, "-O2", "-fopenmp", "-fPIC"], [f"{name}.c"], tmp_path)
        symbols = run(["nm", "-g", *made], tmp_path)
        words = [line.split()[-2:] for line in symbols.splitlines()]
        defined = [symbol for kind, symbol in words if kind not in ("U", "w")]
        assert defined
        assert all(symbol.startswith(f"{name}_") for symbol in defined), defined
        needed[name] = {symbol for kind, symbol in words if kind in ("U", "w")}
    compilers = {"_GLOBAL_OFFSET_TABLE_", "__stack_chk_fail", "memset", "memcpy"}
    calls = set(re.findall(r"\b(optforge_\w+)\(", layout.runtime_parts().calls))
    assert needed["own"] <= compilers | calls | {"pow", "sqrt", "sqrtf"}
    needed["optforge"] -= {name for name in needed["optforge"] if name.startswith(("GOMP_", "omp_"))}
    machine = {"__cpu_model", "__cpu_indicator_init", "getenv"}
    assert needed["optforge"] <= compilers | machine | {"strcmp", "sqrt"}


def functions(assembly: str) -> dict[str, str]:
    """The instructions of each function in the text that a compiler writes."""
    found: dict[str, str] = {}
    name = ""
    for line in assembly.splitlines():
        if label := re.match(r"(\w+):", line):
            name = label[1]
        elif line.startswith("\t") and not line.startswith("\t."):
            found[name] = found.get(name, "") + line + "\n"
    return found


def assembled(compiler: str, directory: Path, source: str, *flags: str) -> str:
    command = [require(compiler), "-std=gnu11", *flags, "-S", source, "-o", "-"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stdout


@x86
def test_no_contraction_where_the_machine_could(tmp_path: Path) -> None:
    """With FMA at hand, as AVX-512 has it, the compiler does not fuse a multiplication with an addition."""
    names = [*of.rules] if FULL else ["adam", "lamb"]
    for name in names:
        list(write_all(tmp_path, of.rules[name].generate()))
    for name in [*names, "optforge"]:
        for compiler, level in (("gcc", "-O2"), ("gcc", "-O3"), ("clang", "-O3")):
            if compiler == "clang" and shutil.which("clang") is None:
                continue
            if (name, compiler, level) == ("optforge", "gcc", "-O3") and not FULL:  # whose bits test_compilers compares
                continue
            if (name, compiler) == ("optforge", "clang") and not FULL:  # which contracts at every level but -O0
                level = "-O1"
            assembly = assembled(compiler, tmp_path, f"{name}.c", level, "-mfma", "-mavx2")
            assert ("vmul" if level == "-O1" else "vmulp") in assembly
            assert not re.search(r"vfn?m(add|sub)", assembly)


# Of each instruction set: its packed registers, which are the widest, or as wide as a compiler likes them.
REGISTERS = {"v1": ("xmm",), "v3": ("ymm",), "v4": ("ymm", "zmm")}


def vectorised(code: str, operation: str, registers: tuple[str, ...]) -> bool:
    return any(re.search(rf"\bv?{operation}\b[^\n]*%{register}", code) for register in registers)


@x86
@pytest.mark.parametrize("compiler", COMPILERS)
def test_element_loops_are_vectorised_at_o2(compiler: str, tmp_path: Path) -> None:
    """Plain -O2, no other flag: packed square roots and divisions, for each instruction set; sums as well."""
    list(write_all(tmp_path, of.rules["adam"].generate()))
    adam = functions(assembled(compiler, tmp_path, "adam.c", "-O2"))
    runtime = functions(assembled(compiler, tmp_path, "optforge.c", "-O2"))
    for own, registers in REGISTERS.items():
        for suffix, kind in (("f32", "ps"), ("f64", "pd")):
            for operation in ("sqrt", "div", "mul", "add"):
                code = adam[f"adam_plain_0_{suffix}_{own}"]
                assert vectorised(code, operation + kind, registers), (own, suffix, operation)
            code = runtime[f"optforge_squares_{suffix}_{own}"]
            assert vectorised(code, "mulpd", registers), (own, suffix)
            assert vectorised(code, "addpd", registers), (own, suffix)


@x86
@pytest.mark.parametrize("compiler", COMPILERS)
def test_choices_are_vectorised_at_o2(compiler: str, tmp_path: Path) -> None:
    """Also where, minimum, maximum, sign, and a choice by a scalar between computations."""
    list(write_all(tmp_path, choosing.generate()))
    found = functions(assembled(compiler, tmp_path, "choosing.c", "-O2"))
    for own, registers in REGISTERS.items():
        assert vectorised(found[f"choosing_plain_0_f32_{own}"], "mulps", registers), own
        assert vectorised(found[f"choosing_plain_0_f64_{own}"], "mulpd", registers), own


@rule
def of_long_names(p, g, first_gradient="g", start="p", momentum=0.0, steps: scalar = 0, gain: scalar = "lr", *, lr=0.1):
    momentum = 0.5 * momentum + first_gradient + start
    steps = steps + 1
    gain = gain / steps
    p = p - gain * momentum
    return p, first_gradient, start, momentum, steps, gain


@pytest.mark.parametrize(
    "stored",
    [
        Wanted(),
        Wanted(None, {"first_gradient": "bf16", "start": "bf16", "momentum": "q8"}, rounding="stochastic", suffix="s"),
        Wanted(["f32"], {"p": "bf16", "g": "bf16", "momentum": "q8"}, "split"),
    ],
)
@pytest.mark.parametrize("target", ["c", "cuda"])
def test_every_line_fits_the_page(target: str, stored: Wanted) -> None:
    """Also what the head of a file lists, but for the command that emits it again, which is there to be copied."""
    for file, text in of_long_names.emit(target, stored, "own", {"lr": 0.015625}, single=False).items():
        long = [line for line in text.split("\n") if len(line) > 110]
        assert [line for line in long if not line.startswith(" * Re-create: optforge generate ")] == [], file


def test_the_struct_of_a_tensor_says_how_many_scales_it_has() -> None:
    text = of.rules.adamw.emit("c", Wanted(None, {"m": "q8", "v": "uq8"}), None, {}, single=False)["adamw.h"]
    assert "m_absmax v_absmax: a float for 256 elements" in text


@pytest.mark.parametrize("target", ["c", "cuda"])
def test_text_is_tidy(target: str) -> None:
    for name in of.rules:
        for file, text in of.rules[name].generate(target).items():
            lines = text.split("\n")
            assert text.endswith("\n")
            assert not text.endswith("\n\n")
            assert all(line == line.rstrip() for line in lines), file
            assert "\n\n\n" not in text, file
            assert "\t" not in text
            assert max(map(len, lines)) <= 110, file
