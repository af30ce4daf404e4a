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
from optforge.library.named import named_rule
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
    "state of 8 bits": ("f32", "f32", "q8", None, "nearest"),
    "master split, state of 8 bits": ("bf16", "bf16", "q8", "split", "nearest"),
    "state of 8 bits, stochastic": ("bf16", "bf16", "q8", None, "stochastic"),
}


def made(rule: Any, way: str, target: str, **more: Any) -> of.Optimizer:
    p, _, state, master, rounding = WAYS[way]
    rule = of.rules[rule] if isinstance(rule, str) else rule
    names = [own.name for own in rule.kernel().array_state]
    store = {name: "uq8" if state == "q8" and name == "v" else state for name in names}
    store |= {"p": "bf16"} if p == "bf16" else {}
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
    "p in blocks": (
        lambda: of.Optimizer([np.ones(3, np.float32)], "adam", store={"p": "q8"}),
        TypeError,
        "params.* is float32, and store says that p is q8",
    ),
    "g in blocks": (
        lambda: of.rules.adam.generate(store={"g": "uq8"}),
        ValueError,
        "uq8 is for state, and g is none: it is f32, f64, bf16 or f16",
    ),
    "codes": (lambda: of.Optimizer([np.ones(3, np.uint8)], "adam"), TypeError, "is uint8; it must be float32"),
    "blocks of doubles": (lambda: of.Optimizer([np.ones(3)], "adam", store={"m": "q8"}), ValueError, "is f64"),
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


# ── state of 8 bits ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("target", [COMPILED, "numpy"])
def test_codes_and_scales_as_users_see_them(target: str) -> None:
    """Codes of a parameter's shape, and a scale for each 256 elements in their order; both are live."""
    w = np.zeros((3, 100), np.float32)
    opt = of.Optimizer([w], "adam", target=target, store={"m": "q8", "v": "uq8"}, beta1=0.5, lam=1.0)
    (m,), (scales,) = opt.state["m"], opt.state["m_absmax"]
    assert (m.dtype, m.shape, scales.dtype, scales.shape) == (np.uint8, (3, 100), np.float32, (2,))
    assert (m == 127).all() and not scales.any()
    g = np.zeros((3, 100), np.float32)
    g[0, :3], g[2, 99] = (1.0, -2.0, 1e-7), -4.0
    opt.step([g])
    assert scales.tolist() == [1.0, 2.0]
    assert [*m[0, 1:4], m[2, 99]] == [0, 127, 127, 0]
    assert FORMATS["q8"].load(m.reshape(-1), scales)[[0, 1, 299]] == pytest.approx([0.5, -1, -2], rel=0.01)
    scales[...] = 0
    opt.step([np.zeros((3, 100), np.float32)])
    assert (m == 127).all()


def test_a_block_with_a_nan_is_nan_until_state_is_set() -> None:
    """The others go on, as do those of the same tensor."""
    for target in (COMPILED, "numpy"):
        w = np.zeros(600, np.float32)
        opt = of.Optimizer([w], "momentum", target=target, store={"m": "q8"})
        g = np.ones(600, np.float32)
        g[300] = np.inf
        opt.step([g])
        (scales,) = opt.state["m_absmax"]
        assert np.isnan(scales).tolist() == [False, True, False]
        opt.step([np.ones(600, np.float32)])
        assert np.isnan(w).tolist() == [256 <= k < 512 for k in range(600)]


@pytest.mark.parametrize("target", [COMPILED, "numpy"])
def test_state_that_begins_as_something_else_is_in_blocks_from_the_first(target: str) -> None:
    @of.rule
    def following(p, g, s="p", c=0.3, h="lr", *, lr=0.1):
        s = 0.5 * s + lr * g
        c = c + 0.0 * g
        h = h + 0.0 * g
        p = p - s - c - h
        return p, s, c, h

    start = np.random.default_rng(3).standard_normal(700).astype(np.float32)
    own = of.Optimizer([start.copy()], following, target=target, store={"s": "q8", "c": "uq8", "h": "q8"})
    codes, scales = FORMATS["q8"].store(start)
    assert own.state["s"][0].tobytes() == codes.tobytes()
    assert own.state["s_absmax"][0].tobytes() == scales.tobytes()
    assert (own.state["c"][0] == 255).all() and (own.state["c_absmax"][0] == np.float32(0.3)).all()
    own.step([np.zeros(700, np.float32)])
    assert (own.state["h_absmax"][0] == np.float32(0.1)).all()


def test_state_dicts_and_checkpoints_of_other_blocks(tmp_path: Path) -> None:
    """Codes tell by nothing how they are meant; what wrote them does."""

    def make(**store: str) -> of.Optimizer:
        return of.Optimizer([np.ones(300, np.float32)], "adamw", target="numpy", store=store)

    opt = make(m="q8", v="uq8")
    opt.step([np.ones(300, np.float32)])
    opt.save(tmp_path / "saved")
    others = (make(m="uq8", v="uq8"), make(), make(m="q8"), make(m="bf16", v="bf16"))
    for other in others:
        with pytest.raises(ValueError, match="its state in blocks of 8 bits is m=q8, v=uq8, here"):
            other.load_state_dict(opt.state_dict())
        with pytest.raises(ValueError, match="its state in blocks of 8 bits is m=q8, v=uq8, here"):
            other.load(tmp_path / "saved")
        assert other.t == 0
    with pytest.raises(ValueError, match="in blocks of 8 bits is none, here m=q8"):
        make(m="q8").load_state_dict(make().state_dict())
    damaged = opt.state_dict()
    damaged["state"]["m_absmax"] = [np.ones(1, np.float32)]
    with pytest.raises(ValueError, match=r"m_absmax.*of shape \(1,\), here float32 of shape \(2,\)"):
        make(m="q8", v="uq8").load_state_dict(damaged)
    again = make(v="uq8", m="q8")
    again.load(tmp_path / "saved")
    assert everything(again) == everything(opt)


def test_a_state_with_the_name_of_scales() -> None:
    @of.rule
    def named(p, g, m=0.0, m_absmax=0.0, *, lr=0.1):
        m = m + g
        m_absmax = m_absmax + g
        p = p - lr * m * m_absmax
        return p, m, m_absmax

    with pytest.raises(ValueError, match="scales is called 'm_absmax', and so is a state of the rule: rename that"):
        of.Optimizer([np.ones(3, np.float32)], named, store={"m": "q8"})


def test_more_arrays_than_blocks_have_room_for(tmp_path: Path) -> None:
    states = [f"s{k}" for k in range(33)]
    text = f"from optforge import rule\n\n@rule\ndef many(p, g, {', '.join(f'{name}=0.0' for name in states)}):\n"
    text += "".join(f"    {name} = {name} + g\n" for name in states)
    (tmp_path / "own.py").write_text(f"{text}    p = p - s0\n    return p, {', '.join(states)}\n")
    many = named_rule(f"{tmp_path / 'own.py'}:many")
    with pytest.raises(ValueError, match="more than 32 arrays of 16 and 8 bits have no room"):
        of.Optimizer([np.ones(3, np.float32)], many, target="numpy", store=dict.fromkeys(states, "q8"))
    store = dict.fromkeys(states[:32], "uq8")
    both = [of.Optimizer([np.ones(700, np.float32)], many, target=own, store=store) for own in (COMPILED, "numpy")]
    for opt in both:
        opt.step([np.linspace(-1, 1, 700, dtype=np.float32)], stats=True)
    assert everything(both[0]) == everything(both[1])
