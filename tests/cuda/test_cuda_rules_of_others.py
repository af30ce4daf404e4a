"""The rules of papers and other libraries in CUDA: nvcc takes them without a warning, and the emulation has all bits.

A dozen of them at every run, and all of them, with every two values of two options, in the long run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_cuda_compiled import STRICT
from test_cuda_native import Steps

from amount import FULL, some
from conftest import require
from cuda import Cuda, Memory, order
from data import DTYPES
from emulation import run
from others import SIZES, STEPS, ULP, agree, spread
from rules_of_others import CASES, RULES, label, settings, variants

ARCHITECTURES = f"arch=compute_75,code=[{'sm_75,sm_90,sm_120' if FULL else 'sm_90'}]"
# Scalars of every kind before and behind reductions, options, state of every kind, transforms.
FEW = (
    *("torch_radam", "torch_asgd", "amsgrad", "ademamix", "sophia", "keras_adam", "ftrl_proximal"),
    *("swats", "adafactor", "prodigy", "powersign", "agc_nag"),
)
COMPILED = ("ademamix", "prodigy")


@pytest.mark.parametrize("names", [(name,) for name in RULES] if FULL else [COMPILED], ids="-".join)
def test_nvcc_compiles_without_a_warning(names: Sequence[str], tmp_path: Path) -> None:
    """The rule for three architectures in the long run, and what its options make of it for one; otherwise all together."""
    nvcc = require("nvcc")
    for k in range(max(len(variants(RULES[name])) for name in names) if FULL else 1):
        source = write(tmp_path, {name: variants(RULES[name])[k] for name in names})
        where = ["-gencode", ARCHITECTURES] if k == 0 else ["-gencode", "arch=compute_75,code=compute_75"]
        run([nvcc, *STRICT, *where, "--threads", "2", "-c", "-o", str(source.with_suffix(".o")), str(source)])


def write(directory: Path, rules: Mapping[str, Mapping[str, Any]]) -> Path:
    """The files of rules under a choice of their options; a source that includes the rules' own."""
    own = []
    for name, options in rules.items():
        files = RULES[name].generate("cuda", prefix=label(name, options), **options)
        for file, text in files.items():
            (directory / file).write_text(text, encoding="utf-8")
        own.append(f"{label(name, options)}.cu")
    path = directory / "all.cu"
    path.write_text("".join(f'#include "{name}"\n' for name in own), encoding="utf-8")
    return path


class Compared(Memory):
    """Arrays which are compared as the contract promises for the rule, and take the reference's values then."""

    def __init__(self, name: str, cuda: Cuda, *given: Any, **how: Any):
        super().__init__(cuda, *given, **how)
        self.name = name
        self.before = [{key: array.copy() for key, array in tensor.items()} for tensor in self.tensors]

    def begin(self, grads: Any) -> None:
        self.before = [{key: array.copy() for key, array in tensor.items()} for tensor in self.tensors]
        super().begin(grads)

    def check(self, where: str = "") -> None:
        if self.name not in ULP:
            super().check(where)
            return
        for k, tensor in enumerate(self.tensors):
            for key in ("p", *self.cuda.state):
                expected = self.reference.params[k] if key == "p" else self.reference.state[key][k]
                assert agree(self.name, tensor[key], expected, self.before[k][key]), f"{key}: {where}"
                tensor[key][...] = expected
        assert all(memory.intact() for memory in self.memory.values()), where


@pytest.mark.parametrize("name", RULES if FULL else some(FEW, 3))
def test_the_emulation_has_the_bits_of_the_reference(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("g++")
    monkeypatch.setenv("OPTFORGE_EMULATION_THREADS", "")
    monkeypatch.setenv("OPTFORGE_EMULATION_BLOCKS", "")
    for k, options in enumerate(variants(RULES[name])[: None if FULL else 1]):
        cuda = Cuda(RULES[name], tmp_path / str(k), options)
        for dtype in DTYPES:
            order("random:3", "descending")
            memory = Compared(name, cuda, dtype, SIZES, settings={**settings(name), **options})
            steps = Steps(cuda, memory, grad_scale=1.0)
            for t in range(1, STEPS + 1):
                grads = [spread(memory.rng, size, dtype) for size in SIZES]
                steps.step(grads, observe=t % 2 == 0 and name not in ULP, where=label(name, options))


def test_the_few_are_rules() -> None:
    assert set(FEW) | set(COMPILED) <= {name for name, _ in CASES}
