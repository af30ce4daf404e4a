"""The self-test of emitted kernels: it passes where the bits are kept, and finds builds that do not keep them."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import optforge as of
from amount import FULL, LEVEL
from compiling import objects
from conftest import COMPILERS, require
from embedding import WAYS, emitted, run, write
from native import OPTIMISED, STRICT, of_runtime
from optforge import exp, norm, rule, scalar, sqrt, tanh
from optforge.core.dtypes import DTYPES
from optforge.engines.golden import golden

OK, SELFTEST, ASSERT, SCALAR = 0, 18, 100, 7


@rule
def library_functions(p, g, m=0.0, *, t, lr=0.5):
    """Its bits are those of the math library."""
    m = tanh(m) + exp(-abs(g))
    p = p - lr / t**0.5 * m
    return p, m


@rule
def picky(p, g, *, t, lr=0.1, beta=0.9):
    """It takes its defaults, but none that are cut to three bits."""
    assert beta == 0.9 and lr == 0.1
    p = p - lr / t * g
    return p


@rule
def broken(p, g, *, lr=0.1):
    """It does not take its own defaults."""
    assert lr > 1
    p = p - lr * g
    return p


@rule
def late(p, g, *, t, lr=0.1):
    """It has no value at the third step."""
    p = p - lr / (t - 3) * g
    return p


@rule
def everything(p, g, prev="g", top="lr", first="p", s: scalar = 1.0, *, t, lr=0.25, mu=0.9):
    """State of each kind, scalars of each kind, a total over the tensor."""
    s = mu * s + norm(g) / t
    prev = mu**t * prev + g
    top = abs(top) + first
    p = p - lr * prev / (sqrt(top**2 + 1) + s)
    return p, prev, top, first, s


RULES: Mapping[str, Any] = {
    **{name: of.rules[name] for name in of.rules},
    "clipped": of.transforms.clip_by_global_norm() >> of.rules.adamw,
    "everything": everything,
    "library": library_functions,
    "picky": picky,
}


def built(
    directory: Path,
    rules: Mapping[str, Any],
    compiler: str = "gcc",
    flags: Sequence[str] = (LEVEL,),
    way: str = "split",
    changed: Mapping[str, str] | None = None,
    runtime: Sequence[str] = (),
) -> Mapping[str, int]:
    """What the self-tests of rules say that are built so, the runtime by flags of its own if there are."""
    files = emitted(way, rules)
    for old, new in (changed or {}).items():
        assert any(old in text for text in files.values()), old
        files = {name: text.replace(old, new) for name, text in files.items()}
    write(directory, files)
    sources = [name for name in files if name.endswith(".c")]
    # Linked plainly: start-up code of fast mathematics would change this process.
    strict = STRICT[:1] if changed else STRICT  # what is changed may warn
    own = runtime or of_runtime(compiler, flags)
    made = objects([require(compiler), *strict, *flags, "-fPIC"], [n for n in sources if n != "optforge.c"], directory)
    made += objects([compiler, *strict, *own, "-fPIC"], [n for n in sources if n == "optforge.c"], directory)
    linking = [flag for flag in flags if flag == "-fopenmp"]
    run([compiler, *linking, "-shared", *made, "-o", "library.so", "-lm"], directory)
    library = ctypes.CDLL(str(directory / "library.so"))
    return {prefix: getattr(library, f"{prefix}_selftest")() for prefix in rules}


HOW = [(compiler, flags) for compiler in COMPILERS for flags in (("-O0", "-fopenmp"), ("-O3", "-march=native"))]
FEW = [("gcc", ("-O0", "-fopenmp")), ("clang", ("-O1", "-march=native"))]


@pytest.mark.parametrize(("compiler", "flags"), HOW if FULL else FEW)
def test_it_passes(compiler: str, flags: Sequence[str], tmp_path: Path) -> None:
    if compiler == "clang":  # whose OpenMP is a package of its own
        flags = [flag for flag in flags if flag != "-fopenmp"]
    assert set(built(tmp_path, RULES, compiler, flags).values()) == {OK}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_there_in_every_way(way: str, tmp_path: Path) -> None:
    assert built(tmp_path, {"adamw": of.rules.adamw, "lamb": of.rules.lamb}, way=way) == {"adamw": OK, "lamb": OK}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="-mfma")
def test_contraction_is_found(tmp_path: Path) -> None:
    """clang's -ffp-contract=fast, which a file can neither see nor switch off."""
    rules = {name: RULES[name] for name in ("adamw", "lamb", "momentum", "rmsprop")}
    flags = ("-O2", "-mfma", "-ffp-contract=fast")  # of the rules, which are contracted here
    assert set(built(tmp_path, rules, "clang", flags, runtime=("-O2",)).values()) == {SELFTEST}


@pytest.mark.parametrize(
    ("prefix", "old", "new"),
    [
        ("adamw", "beta1 * m +", "beta1 * m -"),
        ("adamw", "sqrtf(v / one_minus_beta2_pow_t) + eps", "sqrtf(v / one_minus_beta2_pow_t + eps)"),
        ("lamb", "lr * trust", "lr"),
        ("novograd", "    *optforge_double(tensor,", "    if (0) *optforge_double(tensor,"),
        ("sgd", "p = p - lr * g;", "p = p - lr * (g + 1e-38f - 1e-38f);"),
        ("momentum", "lanes[j] + lanes[j + h]", "lanes[j] - lanes[j + h]"),
    ],
)
def test_a_change_is_found(prefix: str, old: str, new: str, tmp_path: Path) -> None:
    assert built(tmp_path, {prefix: RULES[prefix]}, changed={old: new})[prefix] == SELFTEST


def test_each_instruction_set_is_tested(tmp_path: Path) -> None:
    """A mistake in the code of one set, which this machine may not take for its steps."""
    if platform.machine() != "x86_64":
        pytest.skip("has one set")
    flags = Path("/proc/cpuinfo").read_text().split()
    for name, needed in (("v3", "avx2"), ("v4", "avx512f")):
        if needed in flags:
            old = f"void name##_{name} parameters {{ call; }}"
            new = f"void name##_{name} parameters {{ call; call; }}"
            assert built(tmp_path / name, {"adamw": of.rules.adamw}, changed={old: new}) == {"adamw": SELFTEST}


def test_rules_that_do_not_take_their_defaults(tmp_path: Path) -> None:
    assert built(tmp_path, {"broken": broken, "late": late}) == {"broken": ASSERT, "late": SCALAR}
    assert [golden(own.kernel(), DTYPES["f32"]) for own in (broken, late, library_functions)] == [0, 0, 0]


def test_a_program_that_flushes(tmp_path: Path) -> None:
    """The bits of the thread are cleared and restored."""
    require("gcc")
    files = emitted("split", {"adamw": of.rules.adamw})
    program = (
        '#include "adamw.h"\n#include <stdio.h>\n'
        "int main(void) { volatile double least = 1e-310; const int status = adamw_selftest();\n"
        '    printf("%d %d\\n", status, least * 0.5 == 0.0); return 0; }\n'
    )
    write(tmp_path, {**files, "main.c": program})
    made = objects(["gcc", *OPTIMISED], ["adamw.c", "optforge.c", "main.c"], tmp_path)
    run(["gcc", "-O2", "-ffast-math", *made, "-o", "main", "-lm"], tmp_path)
    flushes = "1" if platform.machine() == "x86_64" else "0"
    assert run([tmp_path / "main"], tmp_path).split() == ["0", flushes]


def test_it_is_the_same_whoever_emits() -> None:
    """Nothing of it depends on the platform's pow, which is asked for exact powers alone."""
    found = {name: golden(of.rules[name].kernel(), DTYPES["f64"]) for name in of.rules}
    assert all(found.values())
    assert len(set(found.values())) == len(found)
