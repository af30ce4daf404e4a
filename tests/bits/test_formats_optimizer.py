"""Arrays of bfloat16 and float16 in the Optimizer: the compiled kernel, the reference, and what they are for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from amount import some
from conftest import require_torch
from optforge.core.formats import FORMATS, draw
from optforge.core.functions import Array
from optimizing import TARGETS

SIZES = (1, 33, 1030, 40_000)
COMPILED = TARGETS[0]  # beside which the reference takes the same steps


def stored(format: str, values: Array) -> Array:
    """Values in a format, as an array that the Optimizer takes."""
    return FORMATS[format].store(np.asarray(values, np.float32))


def tensors(format: str, seed: int) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [stored(format, rng.standard_normal(size)) for size in SIZES]


def raw(tree: Any) -> list[bytes]:
    """The bits of a list of arrays or numbers."""
    return [np.asarray(value).tobytes() for value in tree]


def everything(opt: of.Optimizer) -> dict[str, list[bytes]]:
    return {"p": raw(opt.params), **{name: raw(tree) for name, tree in opt.state.items()}}


# p and g, the state, the master, the rounding
WAYS: dict[str, tuple[str, str, str, str | None, str]] = {
    "p g bf16": ("bf16", "bf16", "f32", None, "nearest"),
    "p g bf16, stochastic": ("bf16", "bf16", "f32", None, "stochastic"),
    "all bf16": ("bf16", "bf16", "bf16", None, "nearest"),
    "all bf16, stochastic": ("bf16", "bf16", "bf16", None, "stochastic"),
    "all f16": ("f16", "f16", "f16", None, "nearest"),
    "all f16, stochastic": ("f16", "f16", "f16", None, "stochastic"),
    "state bf16": ("f32", "f32", "bf16", None, "stochastic"),
    "g f16": ("f32", "f16", "f32", None, "nearest"),
    "master f32": ("bf16", "bf16", "f32", "f32", "nearest"),
    "master f32, state bf16": ("bf16", "bf16", "bf16", "f32", "stochastic"),
    "master f32 of f16": ("f16", "f16", "f32", "f32", "nearest"),
    "master split": ("bf16", "bf16", "f32", "split", "nearest"),
}


def made(rule: Any, way: str, target: str, **more: Any) -> of.Optimizer:
    p, _, state, master, rounding = WAYS[way]
    rule = of.rules[rule] if isinstance(rule, str) else rule
    store = {own.name: state for own in rule.kernel().array_state} | ({"p": "bf16"} if p == "bf16" else {})
    settings = {"store": store, "master": master, "rounding": rounding, "seed": 11, **more}
    return of.Optimizer(tensors(p, 1), rule, target=target, **settings)


EVERY = [(rule, way) for rule in ("sgd", "adamw", "lamb", "novograd", "clipped") for way in WAYS]


@pytest.mark.parametrize(("rule", "way"), some(EVERY, 4, lambda case: case[0] == "adamw"))
def test_the_compiled_kernel_has_the_bits_of_the_reference(rule: str, way: str, tmp_path: Path) -> None:
    chosen: Any = of.clip_by_global_norm(max_norm=0.5) >> of.rules.adamw if rule == "clipped" else rule
    both = [made(chosen, way, target, threads=3) for target in (COMPILED, "numpy")]
    for k in range(1, 5):
        told = []
        for opt in both:
            grads: list[Any] = tensors(WAYS[way][1], 10 + k)
            if k == 2:
                grads[1] = None
            told.append(opt.step(grads, stats=True, grad_scale=4.0 if k == 3 else None))
        for name in ("grad_norm", "clipped_grad_norm", "param_norm", "update_norm", "max_update_ratio"):
            assert getattr(told[0], name) == getattr(told[1], name), name
        assert everything(both[0]) == everything(both[1])
    both[0].save(tmp_path / "one")
    again = of.Optimizer.load(tmp_path / "one", rule=chosen, target="numpy")
    resumed = made(chosen, way, COMPILED, threads=1)
    resumed.load_state_dict(pickle.loads(pickle.dumps(both[1].state_dict())))
    for own, p in zip(resumed.params, both[1].params, strict=True):
        own[...] = p
    every = [*both, again, resumed, copy.deepcopy(both[0]), pickle.loads(pickle.dumps(both[1]))]
    for opt in every:
        opt.step(tensors(WAYS[way][1], 20))
        assert everything(opt) == everything(every[0])


def test_statistics_are_of_what_is_stored() -> None:
    w = stored("bf16", [1.0, 2.0, -3.0])
    opt = of.Optimizer([w], "sgd", target=COMPILED, lr=1e-3, store={"p": "bf16"})
    told = opt.step([np.ones(3, np.float32)], stats=True)
    assert told is not None
    assert told.update_norm == 0.0  # less than half of what p can tell apart
    assert told.param_norm == np.sqrt(14.0)


@pytest.mark.parametrize("master", ["f32", "split"])
def test_small_steps_are_not_lost_beside_a_master(master: str) -> None:
    w = stored("bf16", np.ones(40))
    exact = np.ones(40, np.float32)
    opt = of.Optimizer([w], "sgd", target=COMPILED, lr=1e-4, store={"p": "bf16"}, master=master)
    judge = of.Optimizer([exact], "sgd", lr=1e-4)
    for _ in range(100):
        g = np.ones(40, np.float32)
        opt.step([g])
        judge.step([g])
    (beside,) = opt.state["p_master" if master == "f32" else "p_low"]
    whole = beside if master == "f32" else (w.astype(np.int64) << 16) + np.asarray(beside).view(np.int16)
    bits = np.asarray(whole).view(np.uint32) if master == "f32" else whole.astype(np.uint32)
    assert (bits == exact.view(np.uint32)).all()
    assert (w == stored("bf16", exact)).all()


def test_stochastic_rounding_moves_on_average_as_far_as_the_step() -> None:
    count, steps, lr = 20_000, 60, 1e-4
    w = stored("bf16", np.ones(count))
    opt = of.Optimizer([w], "sgd", lr=lr, store={"p": "bf16"}, rounding="stochastic", seed=5)
    for _ in range(steps):
        opt.step([np.ones(count, np.float32)])
    moved = 1.0 - FORMATS["bf16"].load(w).astype(np.float64)
    # A step down from 1 is rounded within 2^-8, so that its variance is at most lr·2^-8.
    assert abs(moved.mean() - steps * lr) < 5 * np.sqrt(steps * lr * 2.0**-8 / count)
    assert moved.std() > 0


def test_another_seed_another_rounding() -> None:
    def run(seed: int) -> bytes:
        w = stored("bf16", np.linspace(-2, 2, 500))
        opt = of.Optimizer([w], "adam", target=COMPILED, store={"p": "bf16"}, rounding="stochastic", seed=seed)
        opt.step([np.ones(500, np.float32)])
        return w.tobytes()

    assert run(1) == run(1) != run(2)


def test_the_bits_are_of_the_tensor_and_its_own_step() -> None:
    """A gradient that comes late finds the draws of the tensor's own first step."""

    def run(late: bool) -> bytes:
        w, other = stored("bf16", np.linspace(-2, 2, 500)), stored("bf16", np.ones(3))
        opt = of.Optimizer([other, w], "sgd", target=COMPILED, store={"p": "bf16"}, rounding="stochastic")
        if late:
            opt.step([np.ones(3, np.float32), None])
        opt.step([None if late else np.ones(3, np.float32), np.full(500, 1e-2, np.float32)])
        return w.tobytes()

    assert run(True) == run(False)


def test_the_draw_as_it_is_documented() -> None:
    """In plain integers: the words stirred one after the other, then two rounds for each element."""
    mask = 2**64 - 1
    key = 0
    for word in (7, 3, 2, 1, 5):
        x = ((key ^ word) + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        key = x ^ (x >> 31)
    expected = []
    for index in range(40, 50):
        y = (index * 0x9E3779B9 + key) & 0xFFFFFFFF
        y = (((y ^ (y >> 16)) * 0x7FEB352D) & 0xFFFFFFFF) ^ (key >> 32)
        y = ((y ^ (y >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        expected.append(y ^ (y >> 16))
    assert draw(7, 3, 2, 1, (5 << 32) + 40, 10).tolist() == expected


def test_tensors_of_pytorch() -> None:
    torch = require_torch()
    both = []
    for target in ("c", "numpy"):
        generator = torch.Generator().manual_seed(0)
        w = torch.nn.Parameter(torch.randn(40, 30, generator=generator).to(torch.bfloat16))
        opt = of.Optimizer([w], "adamw", target=target, master="split")
        for _ in range(3):
            loss = (w.float() ** 2).sum()
            w.grad = None
            loss.backward()
            opt.step([w.grad])
        both.append(w.detach().view(torch.int16).numpy().tobytes())
    assert both[0] == both[1]
    half = torch.ones(8, dtype=torch.float16)
    of.Optimizer([half], "sgd", lr=0.5).step([torch.ones(8, dtype=torch.bfloat16)])
    assert half.tolist() == [0.5] * 8


@pytest.mark.parametrize("target", [COMPILED, "numpy"])
def test_zeroed_gradients_are_apart_by_the_size_that_they_have(target: str) -> None:
    """Gradients of half the size lie close together, and those of twice the size overlap where they do."""
    together = np.ones(16, np.float16)
    opt = of.Optimizer([np.ones(8, np.float32), np.ones(8, np.float32)], "sgd", target=target, zero_grads=True)
    opt.step([together[:8], together[8:]])
    assert not together.any()
    wide = np.ones(12, np.float32)
    opt = of.Optimizer([np.ones(8, np.float16), np.ones(8, np.float16)], "sgd", target=target, zero_grads=True)
    with pytest.raises(ValueError, match=r"^grads\[0\] and grads\[1\] overlap in memory"):
        opt.step([wide[:8], wide[4:]])
    assert wide.all()


def test_parameters_of_several_dtypes() -> None:
    both = []
    for target in (COMPILED, "numpy"):
        kept = [np.ones(5, np.float32), stored("f16", np.ones(9)), np.ones(2)]
        opt = of.Optimizer(kept, "adam", target=target)
        for _ in range(3):
            told = opt.step([np.full(own.shape, 0.25, own.dtype) for own in kept], stats=True)
        assert told is not None
        both.append((everything(opt), told.param_norm))
    assert both[0] == both[1]


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "format": (lambda: of.Optimizer([np.ones(3)], "adam", store={"m": "bf17"}), ValueError, "did you mean 'bf16'"),
    "array": (lambda: of.Optimizer([np.ones(3)], "adam", store={"q": "bf16"}), ValueError, "no array 'q'"),
    "no dict": (lambda: of.Optimizer([np.ones(3)], "adam", store="bf16"), TypeError, "store is a dict"),  # type: ignore[arg-type]
    "double": (lambda: of.Optimizer([np.ones(3)], "adam", store={"m": "bf16"}), ValueError, "is f64"),
    "p": (
        lambda: of.Optimizer([np.ones(3, np.float32)], "adam", store={"p": "bf16"}),
        TypeError,
        "is float32, and store says",
    ),
    "master": (lambda: of.Optimizer([np.ones(3, np.float32)], "adam", master="f32"), ValueError, "p is f32"),
    "master name": (lambda: of.Optimizer([np.ones(3, np.float32)], "adam", master="x"), ValueError, "master is"),
    "split of f16": (lambda: of.Optimizer([np.ones(3, np.float16)], "adam", master="split"), ValueError, "is f16"),
    "rounding": (lambda: of.Optimizer([np.ones(3)], "adam", rounding="up"), ValueError, "rounding is"),
    "seed": (lambda: of.Optimizer([np.ones(3)], "adam", seed=-1), ValueError, "seed is a whole number from 0 to"),
    "seed 0.5": (lambda: of.Optimizer([np.ones(3)], "adam", seed=0.5), TypeError, "seed is a whole number"),  # type: ignore[arg-type]
    "scalar": (lambda: of.Optimizer([np.ones(3)], "novograd", store={"v": "bf16"}), ValueError, "one double per"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_go_together(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_a_group_that_is_stored_otherwise() -> None:
    opt = of.Optimizer([np.ones(3, np.float32)], "adam", target="numpy")
    with pytest.raises(ValueError, match=r"^groups\[1\]: its parameters are stored otherwise"):
        opt.add_group({"params": [np.ones(3, np.float16)]})
    assert len(opt.groups) == 1
