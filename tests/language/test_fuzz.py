"""Random rules against the oracle of tests/fuzzing; and that oracle, the author and the shrinker themselves."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fuzz
from amount import FULL
from conftest import require
from data import DTYPES, gradients, same
from fuzzing.author import Author
from fuzzing.oracle import Optimizer
from fuzzing.shrink import shrink, size
from oracles import begin, names, oracle
from places import GENERATOR

RULES = GENERATOR / "optforge" / "rules"


def fuzzed(*arguments: str) -> None:
    """A run of the fuzzer, in a process of its own, that finds nothing."""
    command = [sys.executable, str(Path(fuzz.__file__)), "--quiet", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, f"{answer.stdout}\n{answer.stderr[-3000:]}"


def test_numpy() -> None:
    fuzzed("--n", "200" if FULL else "80", "--seed", "3", "--target", "numpy")


def test_c() -> None:
    require("gcc")
    require("clang")
    fuzzed("--n", "60" if FULL else "28", "--seed", "1")


def test_cuda() -> None:
    require("g++")
    require("pycuda")
    fuzzed("--n", "6" if FULL else "3", "--seed", "2", "--target", "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", names())
def test_the_oracle_agrees_with_those_that_were_written_from_the_papers(name: str, dtype: Any) -> None:
    text = (RULES / f"{name}.py").read_text(encoding="utf-8")
    hyper = oracle(name).SETTINGS[0]
    rng = np.random.default_rng(4)
    p = rng.standard_normal(1100).astype(dtype)
    own = Optimizer(text, [name], {}, [hyper], [p], [0])
    state = begin(name, p)
    for t in range(1, 4):
        g = gradients(rng, p.size, dtype)
        own.step([g])
        p, state = oracle(name).step(p, g, state, t, **hyper)
        assert same(own.tensors[0].p, p), t
        for key, value in state.items():
            assert same(own.tensors[0].states[key], value), key


def test_a_rule_is_the_same_whatever_is_run_beside_it() -> None:
    first = Author(5, 17).case()
    Author(5, 3).case()
    assert Author(5, 17).case() == first == json.loads(json.dumps(first))
    assert Author(6, 17).case() != first


def test_a_failure_becomes_small() -> None:
    """What is looked for here is a norm in the text and a second tensor of two elements or more."""

    def fails(case: Any) -> bool:
        compile(case["text"], "case", "exec")
        called = {node.func.id for node in ast.walk(ast.parse(case["text"])) if isinstance(node, ast.Call)}  # type: ignore[attr-defined]
        return "norm" in called and sum(tensor["size"] > 1 for tensor in case["tensors"]) > 1

    number = next(k for k in range(1000) if fails(Author(0, k).case()))
    case = Author(0, number).case()
    small = shrink(case, fails)
    assert fails(small) and size(small) < size(case)
    assert [tensor["size"] for tensor in small["tensors"]] == [2, 2]
    assert len(small["steps"]) == 1 and len(small["chain"]) <= 2
    parts = [node for node in ast.parse(small["text"]).body if isinstance(node, ast.FunctionDef)]
    assert sum(len(node.body) for node in parts) <= 4
