"""The rules of papers and other libraries compile without a warning, and every way to run them has the same bits."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from amount import FULL, some
from conftest import require
from data import DTYPES, same, special
from native import STRICT, quick
from others import SIZES, STEPS, ULP, agree, spread, start
from rules_of_others import CASES, COLLECTED, MODULES, RULES, label, module_of, settings, variants

WARNINGS = (*STRICT[1:], "-Wdouble-promotion")
COMPILERS = {
    "gcc": ("gcc", "-std=c99", *WARNINGS),
    "g++": ("g++", "-x", "c++", "-std=c++11", *WARNINGS),
    "clang": ("clang", "-std=c99", *WARNINGS, "-Wno-double-promotion"),  # of NAN, which is a float
}
each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=[label(*case) for case in CASES])


def test_there_are_enough() -> None:
    assert len(RULES) == sum(map(len, COLLECTED.values())) >= 75
    assert len({label(*case) for case in CASES}) == len(CASES)


def test_choices_of_options_have_every_pair_of_values() -> None:
    for rule in (RULES["timm_lamb"], RULES["keras_adam"], RULES["apex_novograd"]):
        chosen, names = variants(rule), list(rule.options)
        assert chosen[0] == dict(rule.options)
        for k, a in enumerate(names):
            for b in names[:k]:
                values = {(options[a], options[b]) for options in chosen}
                assert len(values) == len(rule.accepts(a)) * len(rule.accepts(b))


def test_settings_are_not_the_defaults() -> None:
    for name, rule in RULES.items():
        told = {key for key, value in settings(name).items() if value == rule.hyperparameters[key]}
        assert told <= {"learning_rate_power"}, name


# ── C ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C of every case, and a file for each module that includes those of its rules."""
    directory = tmp_path_factory.mktemp("emitted")
    sources: dict[str, list[str]] = {module: [] for module in MODULES}
    for name, options in CASES:
        prefix = label(name, options)
        for file, text in RULES[name].generate("c", prefix=prefix, **options).items():
            (directory / file).write_text(text, encoding="utf-8")
        sources[module_of(name)].append(f"{prefix}.c")
    for module, files in sources.items():
        (directory / f"all_{module}.c").write_text("".join(f'#include "{file}"\n' for file in files), encoding="utf-8")
    return directory


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_c_compiles_without_a_warning(compiler: str, module: str, emitted: Path) -> None:
    """The long run optimises, so that what a compiler finds on the way is seen too."""
    path, *flags = COMPILERS[compiler]
    how = ("-O2", "-c", "-o", "/dev/null") if FULL else ("-fsyntax-only",)
    command = [require(path), *flags, *how, f"all_{module}.c"]
    answer = subprocess.run(command, cwd=emitted, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[:5000]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels are compiled as they are for users in the long run, and otherwise by gcc without optimisation."""
    with pytest.MonkeyPatch.context() as patch:
        if not FULL:
            patch.setenv("CC", quick(require("gcc"), tmp_path_factory.mktemp("compiler")))
        yield


@pytest.mark.parametrize(
    ("name", "options"),
    chosen := some(CASES, 3),
    ids=[label(*case) for case in chosen],
)
def test_c_has_the_bits_of_the_reference(name: str, options: dict[str, Any], compiler: None) -> None:
    """Tensors of both dtypes together, with defaults and other settings; the last gradients are NaN, huge and tiny."""
    for hyper in ({}, settings(name)):
        rng = np.random.default_rng(len(name))
        first = [p for dtype in DTYPES for p in start(rng, dtype)] + [rng.standard_normal(21).astype(d) for d in DTYPES]
        beside = {
            target: of.Optimizer([p.copy() for p in first], RULES[name], target=target, **hyper, **options)
            for target in TARGETS
        }
        own, reference = beside.values()
        for t in range(1, STEPS + 1):
            grads = [spread(rng, p.size, p.dtype) for p in first]
            if t == STEPS and name not in ULP:
                grads[-2:] = [rng.permutation(special(dtype)) for dtype in DTYPES]
            before = arrays(reference)
            own.step([g.copy() for g in grads])
            reference.step([g.copy() for g in grads])
            for key, expected in arrays(reference).items():
                where = f"{key[0]} of {first[key[1]].dtype}, size {first[key[1]].size}, step {t}"
                assert agree(name, live(own, *key), expected, before[key]), where
                if np.ndim(expected):
                    live(own, *key)[...] = expected


TARGETS = ("c", "numpy")


def live(optimizer: of.Optimizer, array: str, tensor: int) -> Any:
    """An array of an optimizer, or a scalar state's value."""
    return (optimizer.params if array == "p" else optimizer.state[array])[tensor]


def arrays(optimizer: of.Optimizer) -> dict[tuple[str, int], Any]:
    """Copies of the parameters and of the state, by name and number of the tensor."""
    names, numbers = ("p", *optimizer.state), range(len(optimizer.params))
    return {(name, k): np.copy(live(optimizer, name, k)) for name in names for k in numbers}


# ── plain Python ────────────────────────────────────────────────────────────────────────────────────────────────────


@each_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_python_has_the_bits_of_the_reference(name: str, options: dict[str, Any], dtype: Any) -> None:
    """One tensor, which for a rule that sums over all of them is all of them, with defaults and other settings."""
    rule = RULES[name]
    scalars = {state.name for state in rule.definition.state if state.scalar}
    for size, hyper in ((33, {}), *((size, settings(name)) for size in SIZES)):
        rng = np.random.default_rng(size)
        (p,) = start(rng, dtype, [size])
        optimizer = of.Optimizer([p.copy()], rule, target="numpy", **hyper, **options)
        state: list[Any] = []
        for t in range(1, STEPS + 1):
            g = spread(rng, size, dtype)
            time = {"t": t} if rule.definition.time else {}
            returned = rule.function(p, g, *state, **time, **hyper, **options)
            p, *state = returned if isinstance(returned, tuple) else (returned,)
            optimizer.step([g])
            assert same(optimizer.params[0], p), f"p of size {size}, step {t}"
            for key, value in zip(rule.state, state, strict=True):
                if key in optimizer.state:
                    value = float(value) if key in scalars else np.broadcast_to(np.asarray(value, dtype), p.shape)
                    assert same(optimizer.state[key][0], value), f"{key} of size {size}, step {t}"
