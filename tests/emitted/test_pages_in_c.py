"""The C and C++ of README and docs: compiled as they stand there, run, and compared in bits with the reference."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from compiling import objects, run
from conftest import require
from data import same
from native import OPTIMISED
from optforge.core.formats import Wanted
from optforge.emit.c import rule_view
from optforge.emit.project import project
from optforge.library.rule import Rule
from pages import PAGES, README, blocks, python_blocks

ENGINES = PAGES / "engines.md"
FLAGS = ("-std=c99", "-O0", "-fPIC", "-Wall", "-Wextra", "-Werror", "-D_POSIX_C_SOURCE=200809L")
N, COUNT = 1500, 12


def data(*shape: int) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """A parameter, a gradient and two states that are not 0, which state_init shall make so."""
    rng = np.random.default_rng(3)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(4)]


def pointers(*arrays: np.ndarray[Any, Any]) -> list[ctypes.c_void_p]:
    """Where arrays are."""
    return [ctypes.c_void_p(array.ctypes.data) for array in arrays]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The blocks of C, each in a function, beside the kernels."""
    gcc = require("gcc")
    directory = tmp_path_factory.mktemp("pages")
    first, phase, lists = blocks(ENGINES, "c")
    (readme,) = (text for text in blocks(README, "c") if text.startswith("#include"))
    (rule,) = (text for text in python_blocks(README) if "def rms_decay" in text)
    (directory / "rms_decay.py").write_text(rule)
    rms_decay = Rule.from_file(directory / "rms_decay.py", "rms_decay")
    include, _, first = first.partition("\n")
    own, _, readme = readme.partition("\n")
    text = f"""
        {include}
        #include "sgd.h"
        {own}
        #include <stdio.h>
        #include <stdlib.h>

        int first(size_t n, float *weights, const float *gradients, float *m, float *v, uint64_t t);
        int first(size_t n, float *weights, const float *gradients, float *m, float *v, uint64_t t)
        {{
            {first}
            return status;
        }}

        int phase(uint64_t t, const adam_tensor_f32 *tensors, size_t count, size_t elements, double *norm);
        int phase(uint64_t t, const adam_tensor_f32 *tensors, size_t count, size_t elements, double *norm)
        {{
            adam_stats stats;
            adam_hyper hyper;
            adam_hyper_init(&hyper);
            {phase}
            free(options.workspace);
            *norm = stats.grad_norm;
            return status * 100 + (int)t;
        }}

        int lists(uint64_t t, const adam_tensor_f32 *matrices, const sgd_tensor_f32 *biases);
        int lists(uint64_t t, const adam_tensor_f32 *matrices, const sgd_tensor_f32 *biases)
        {{
            adam_hyper hyper;
            sgd_hyper plain;
            optforge_options options;
            adam_hyper_init(&hyper);
            sgd_hyper_init(&plain);
            optforge_options_init(&options);
            options.workspace = malloc(1 << 20);
            {lists}
            free(options.workspace);
            return status;
        }}

        int readme(size_t n, float *weights, const float *gradients, float *v, uint64_t t);
        int readme(size_t n, float *weights, const float *gradients, float *v, uint64_t t)
        {{
            {readme}
            return status;
        }}
        """
    files = {**of.rules.adam.generate("c"), **of.rules.sgd.generate("c"), **rms_decay.generate("c"), "page.c": text}
    for name, own in files.items():
        (directory / name).write_text(own)
    sources = sorted(name for name in files if name.endswith(".c") and name != "page.c")
    made = objects([gcc, *FLAGS], ["page.c"], directory) + objects([gcc, *OPTIMISED], sources, directory)
    run([gcc, "-shared", *made, "-lm", "-o", "page.so"], directory)
    return ctypes.CDLL(str(directory / "page.so"))


def test_a_step(library: ctypes.CDLL) -> None:
    p, g, m, v = data(N)
    expected = of.Optimizer([p.copy()], "adam", lr=3e-4, target="numpy")
    assert library.first(ctypes.c_size_t(N), *pointers(p, g, m, v), ctypes.c_uint64(1)) == 0
    expected.step([g])
    assert same(p, expected.params[0])
    assert same(v, expected.state["v"][0])


def test_the_step_of_the_readme(library: ctypes.CDLL, tmp_path: Path) -> None:
    p, g, v, _ = data(N)
    (tmp_path / "rms_decay.py").write_text(next(text for text in python_blocks(README) if "def rms_decay" in text))
    rule = Rule.from_file(tmp_path / "rms_decay.py", "rms_decay")
    expected = of.Optimizer([p.copy()], rule, target="numpy")
    assert library.readme(ctypes.c_size_t(N), *pointers(p, g, v), ctypes.c_uint64(1)) == 0
    expected.step([g])
    assert same(p, expected.params[0])
    assert same(v, expected.state["v"][0])


def test_the_whole_phase(library: ctypes.CDLL) -> None:
    p, g, m, v = data(N)
    m[:], v[:] = 0, 0
    expected = of.Optimizer([p.copy()], "adam", target="numpy", zero_grads=True, skip_nonfinite=True)
    stats = expected.step([g.copy()], grad_scale=65536.0, stats=True)
    tensor = (ctypes.c_size_t * 5)(N, *(array.ctypes.data for array in (p, g, m, v)))
    norm = ctypes.c_double()
    arguments = (tensor, ctypes.c_size_t(1), ctypes.c_size_t(N), ctypes.byref(norm))
    assert library.phase(ctypes.c_uint64(1), *arguments) == 2  # t has gone on
    assert same(p, expected.params[0])
    assert norm.value == stats.grad_norm
    assert not g.any()
    g[7] = np.nan
    before = p.copy()
    assert library.phase(ctypes.c_uint64(2), *arguments) == -100 + 2  # skipped, and t has not
    assert same(p, before)


def test_several_lists(library: ctypes.CDLL) -> None:
    p, g, m, v = data(COUNT, 40)
    q, h, _, _ = data(COUNT, 3)
    q, h = q + 1, h - 1
    m[:], v[:] = 0, 0
    adam, sgd = of.Optimizer([*p.copy()], "adam", target="numpy"), of.Optimizer([*q.copy()], "sgd", target="numpy")
    adam.step([*g])
    sgd.step([*h])
    matrices = [x for k in range(COUNT) for x in (40, *(array[k].ctypes.data for array in (p, g, m, v)))]
    biases = [x for k in range(COUNT) for x in (3, q[k].ctypes.data, h[k].ctypes.data)]
    tables = ((ctypes.c_size_t * len(matrices))(*matrices), (ctypes.c_size_t * len(biases))(*biases))
    assert library.lists(ctypes.c_uint64(1), *tables) == 0
    assert all(same(p[k], adam.params[k]) and same(q[k], sgd.params[k]) for k in range(COUNT))


def test_cpp(tmp_path: Path) -> None:
    gcc, gxx = require("gcc"), require("g++")
    (block,) = blocks(ENGINES, "cpp")
    include, _, rest = block.partition("\n")
    rules = [of.rules.adamw, of.rules.sgd]
    kernels = [rule.kernel() for rule in rules]
    storages = [Wanted().storages(kernel) for kernel in kernels]
    views = [rule_view(rule, kernel, own) for rule, kernel, own in zip(rules, kernels, storages, strict=True)]
    for name, text in project(views, kernels, {}, "a command").items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "page.cpp").write_text(f"""
        {include}
        #include "sgd.hpp"
        #include <cstdio>
        #include <vector>

        int main()
        {{
            std::vector<float> weights(100, 1.0f), gradients(100, 0.5f), w(8, 1.0f), g(8, 2.0f);
            std::vector<optforge::Tensor<float>> own = {{{{w, g}}}};
            optforge::Optimizer<optforge::rules::adamw<float>> matrices(own);
            optforge::Optimizer<optforge::rules::sgd<float>> biases(own);
            optforge::Options options;
            {rest}
            std::printf("%.9g %.9g %d", weights[3], w[5], (int)(optimizer.t() + matrices.t() + biases.t()));
            return 0;
        }}
        """)
    sources = ["adamw.c", "sgd.c", "optforge.c"]
    made = objects([gcc, *OPTIMISED], sources, tmp_path)
    run([gxx, "-std=c++11", "-O0", "-Wall", "-Wextra", "-Werror", "page.cpp", *made, "-o", "page"], tmp_path)
    said = subprocess.run([tmp_path / "page"], capture_output=True, text=True, check=True).stdout.split()
    p, w = np.ones(100, np.float32), np.ones(8, np.float32)
    of.Optimizer([p], "adamw", lr=3e-4, target="numpy").step([np.full(100, 0.5, np.float32)])
    for rule in ("adamw", "sgd"):
        of.Optimizer([w], rule, target="numpy").step([np.full(8, 2, np.float32)])
    assert [np.float32(said[0]), np.float32(said[1])] == [p[3], w[5]]
    assert said[2] == "3"
