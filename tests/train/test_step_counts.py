"""A tensor's own count of steps: gradients that come late, are missing and return."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from conftest import require_torch
from optforge import Optimizer, rule
from optforge.train import tensorfile
from optimizing import TARGETS, Judge, bits, everything, nadam
from rules_of_others import pytorch

STEPS = 50
HOST_TARGETS = [target for target in TARGETS if target != "cuda"]
SHAPES = [(40, 3), (7,), (), (300,), (1,)]


def pattern(seed: int, tensors: int = len(SHAPES)) -> np.ndarray:
    """For each step, which tensors have a gradient: some come late, one is frozen for a while, all miss some."""
    rng = np.random.default_rng(seed)
    late = rng.permutation(tensors) * 4
    there = rng.random((STEPS, tensors)) < rng.uniform(0.3, 1.0, tensors)
    there &= np.arange(STEPS)[:, None] >= late
    there[20:30, 0] = False
    there[35] = False
    return there


def arrays(seed: int, dtype: Any = np.float32, shapes: Any = SHAPES) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def gradients(seed: int, there: Any, dtype: Any = np.float32, shapes: Any = SHAPES) -> list[Any]:
    return [g if here else None for g, here in zip(arrays(seed, dtype, shapes), there, strict=True)]


ADAM = {"lr": 0.02, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1}
BETAS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
THEIRS: dict[str, tuple[Any, dict[str, Any], str, dict[str, Any]]] = {
    "adamw": ("adamw", ADAM, "AdamW", BETAS),
    "adam": (pytorch.torch_adam, ADAM, "Adam", BETAS),
    "nadam": (
        pytorch.torch_nadam,
        {**ADAM, "momentum_decay": 0.03},
        "NAdam",
        {**BETAS, "momentum_decay": 0.03},
    ),
    "adagrad": (
        pytorch.torch_adagrad,
        {"lr": 0.05, "lr_decay": 0.1, "eps": 1e-6, "weight_decay": 0.1},
        "Adagrad",
        {"lr": 0.05, "lr_decay": 0.1, "eps": 1e-6, "weight_decay": 0.1},
    ),
    "adadelta": (
        pytorch.torch_adadelta,
        {"lr": 0.7, "rho": 0.8, "eps": 1e-4, "weight_decay": 0.1},
        "Adadelta",
        {"lr": 0.7, "rho": 0.8, "eps": 1e-4, "weight_decay": 0.1},
    ),
    "rmsprop": (
        pytorch.torch_rmsprop,
        {"lr": 0.02, "alpha": 0.9, "eps": 1e-4, "weight_decay": 0.1, "with_momentum": False},
        "RMSprop",
        {"lr": 0.02, "alpha": 0.9, "eps": 1e-4, "weight_decay": 0.1},
    ),
}


@pytest.mark.parametrize("target", HOST_TARGETS)
@pytest.mark.parametrize("name", THEIRS)
def test_steps_agree_with_those_of_pytorch(name: str, target: str) -> None:
    """The usual loop of PyTorch, over its tensors, whose gradients are new at each step."""
    torch = require_torch()
    made, settings, kind, given = THEIRS[name]
    own, theirs = ([torch.nn.Parameter(torch.from_numpy(p)) for p in arrays(1)] for _ in range(2))
    opt, other = Optimizer(own, made, target=target, **settings), getattr(torch.optim, kind)(theirs, **given)
    moved = np.zeros(len(SHAPES))
    for number, there in enumerate(pattern(7)):
        before = [p.detach().numpy().copy() for p in theirs]
        for params in (own, theirs):
            for p, g in zip(params, gradients(100 + number, there), strict=True):
                p.grad = None if g is None else torch.from_numpy(np.asarray(g).copy())
        opt.step([p.grad for p in own])
        other.step()
        after = [p.detach().numpy() for p in theirs]
        moved = np.maximum(moved, [np.max(np.abs(a - b)) for a, b in zip(after, before, strict=True)])
        for k, (p, q, m) in enumerate(zip(own, after, moved, strict=True)):
            allowed = 32 * np.finfo(np.float32).eps * (np.abs(q) + m)
            assert np.all(np.abs(p.detach().numpy() - q) <= allowed), f"tensor {k}, step {number}"
    assert opt.t == STEPS
    if name == "adamw":
        steps = {k: int(entry["step"]) for k, entry in other.state_dict()["state"].items()}
        assert {k: int(entry["step"]) for k, entry in of.to_torch(opt)["state"].items()} == steps
        assert len(set(steps.values())) > 1
        twin = Optimizer([p.detach().clone() for p in own], made, target=target)
        of.from_torch(twin, other.state_dict())
        assert twin.state_dict()["steps"] == [steps[k] for k in range(len(SHAPES))]
        assert twin.t == max(steps.values())


LARGE = [(301, 403), (150_001,), (3,), (), (50_001,)]


@pytest.mark.skipif("c" not in TARGETS, reason="compares the target c with the reference")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_targets_and_threads_agree_in_every_bit_over_a_checkpoint(seed: int, tmp_path: Path) -> None:
    shapes = LARGE if seed == 0 else SHAPES
    dtype = np.float64 if seed == 1 else np.float32
    start = arrays(seed, dtype, shapes)
    opts = {
        (target, threads): Optimizer([p.copy() for p in start], nadam, target=target, threads=threads, lr=0.02)
        for target, threads in (("numpy", None), ("c", 1), ("c", 3))
    }
    judge = Judge([p.copy() for p in start], nadam, lr=0.02) if seed == 1 else None
    there = pattern(seed)
    last = 24 if seed == 0 else STEPS
    for number in range(last):
        if number == last // 2:
            saved = opts["c", 1]
            saved.save(tmp_path / "half")
            opts["c", 1] = Optimizer.load(tmp_path / "half", rule=nadam, target="numpy")
            opts["c", 3].load_state_dict(saved.state_dict())
            opts["numpy", None] = copy.deepcopy(opts["numpy", None])
        given = gradients(100 + number, there[number], dtype, shapes)
        for opt in opts.values():
            opt.step([None if g is None else g.copy() for g in given])
        found = {key: everything(opt) for key, opt in opts.items()}
        assert found["c", 1] == found["numpy", None], number
        assert found["c", 3] == found["numpy", None], number
        if judge:
            judge.step(given)
            assert judge.agrees(opts["numpy", None])
    steps = opts["c", 3].state_dict()["steps"]
    assert steps == there[:last].sum(axis=0).tolist()
    assert opts["c", 3].t == last


@rule
def counting(p, g, *, t, lr=1.0):
    """Adds the tensor's own t."""
    p = p + lr * t * (0 * g + 1)
    return p


def added(opt: Optimizer, there: list[int], lr: float = 1.0) -> list[float]:
    """What a step adds to each parameter: its t, or nothing."""
    before = [float(p[0]) for p in opt.params]
    opt.step([np.ones(2) if here else None for here in there])
    return [float(p[0]) - old for p, old in zip(opt.params, before, strict=True)]


@pytest.mark.parametrize("target", HOST_TARGETS)
def test_what_counts(target: str) -> None:
    opt = Optimizer([np.zeros(2) for _ in range(3)], counting, target=target, skip_nonfinite=True)
    assert added(opt, [1, 1, 0]) == [1, 1, 0]
    assert added(opt, [1, 0, 0]) == [2, 0, 0]
    assert added(opt, [1, 1, 1]) == [3, 2, 1]
    assert (opt.t, opt.state_dict()["steps"]) == (3, [3, 2, 1])
    assert added(opt, [0, 0, 0]) == [0, 0, 0]
    assert (opt.t, opt.state_dict()["steps"]) == (4, [3, 2, 1])
    before = everything(opt)
    assert opt.step([np.full(2, np.nan), None, np.ones(2)], stats=True).skipped
    assert everything(opt) == before
    assert added(opt, [0, 1, 1]) == [0, 3, 2]
    saved = opt.state_dict()
    opt.t = 10
    assert opt.state_dict()["steps"] == [10] * 3
    assert added(opt, [1, 0, 1]) == [11, 0, 11]
    opt.t = 0
    assert added(opt, [0, 1, 1]) == [0, 1, 1]
    opt.load_state_dict(saved)
    assert (opt.t, opt.state_dict()["steps"]) == (5, [3, 3, 2])
    assert added(opt, [1, 1, 1]) == [4, 4, 3]
    # A schedule is a function of the optimizer's count.
    opt.lr = float
    assert added(opt, [1, 1, 1]) == [5 * 7, 5 * 7, 4 * 7]
    opt.lr = 1.0
    opt.add_group({"params": [np.zeros(2)]})
    opt.step([[np.ones(2)] * 3, [np.ones(2)]])
    assert opt.params[1][0][0] == 1
    assert opt.state_dict()["steps"] == [[6, 6, 5], [1]]
    assert bits(copy.deepcopy(opt).state_dict()) == bits(opt.state_dict())


@pytest.mark.parametrize("target", HOST_TARGETS)
def test_a_scalar_that_has_no_value_is_that_of_the_tensor(target: str) -> None:
    @rule
    def third(p, g, *, t):
        p = p - 1 / (3 - t) * g
        return p

    opt = Optimizer([np.ones(2), np.ones(2)], third, target=target)
    opt.step([None, np.ones(2)])
    opt.step([np.ones(2), np.ones(2)])
    before = everything(opt)
    with pytest.raises(ArithmeticError, match="division by zero"):
        opt.step([np.ones(2), np.ones(2)])
    assert everything(opt) == before
    opt.step([np.ones(2), None])
    assert opt.state_dict()["steps"] == [2, 2]


def test_files_and_state_dicts_of_before_have_one_count_for_all(tmp_path: Path) -> None:
    opt = Optimizer(arrays(1), nadam, target="numpy")
    for number, there in enumerate(pattern(3)[:10]):
        opt.step(gradients(number, there))
    old = opt.state_dict()
    del old["steps"]
    wanted = [10 if started else 0 for started in old["started"]]
    assert 0 in wanted
    twin = Optimizer(arrays(1), nadam, target="numpy")
    twin.load_state_dict(old)
    assert twin.state_dict()["steps"] == wanted

    opt.save(tmp_path / "new")
    header, saved = tensorfile.read(tmp_path / "new")
    assert (header["format"], [one["steps"] for one in header["tensors"]]) == (2, opt.state_dict()["steps"])
    for one in header["tensors"]:
        del one["steps"]
    tensorfile.write(tmp_path / "none", header, saved)
    with pytest.raises(ValueError, match="'tensors' in its header is not what it should be"):
        Optimizer.load(tmp_path / "none", rule=nadam)
    tensorfile.write(tmp_path / "old", {**header, "format": 1}, saved)
    loaded = Optimizer.load(tmp_path / "old", rule=nadam, target="numpy")
    assert bits(loaded.state_dict()) == bits(twin.state_dict())


@pytest.mark.skipif("cuda" not in TARGETS, reason="is about CUDA")
def test_one_count_on_a_device() -> None:
    opt = Optimizer([np.ones(2), np.ones(2)], "adam", target="cuda")
    opt.step([np.ones(2), None])
    with pytest.raises(ValueError, match=r"^params\[1\] had no gradient in 1 of the steps before"):
        opt.step([np.ones(2), np.ones(2)])
    opt.step([np.ones(2), None])
    assert opt.t == 2
