"""What a step tells, skips, unscales and zeroes: statistics, skip_nonfinite, grad_scale, zero_grads, and resuming."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

import optforge as of
from data import same
from optforge import global_norm, norm, scalar, sqrt
from optimizing import TARGETS, bits, everything, nadam
from oracles import _phase
from oracles import _tree as tree
from stepping import Beside, mixed, spread

CLIPPED = of.clip_by_global_norm(max_norm=3.0)
SIZES = (40_000, 5, 0, 33, 32_769)
NONFINITE = (np.nan, np.inf, -np.inf)


@of.rule
def follower(p, g, first="g", slow="p", rate="lr", seen: scalar = 0.0, size: scalar = "lr", *, t, lr=0.25, beta=0.5):
    """State of every beginning, and scalar state fed by reductions of the first phase and of the last."""
    first = first + beta * (g - first)
    slow = slow + beta * (p - slow)
    rate = rate + 0.0625 * norm(first)
    p = p - lr * first / (1 + sqrt(rate))
    size = size + norm(p) + seen
    seen = seen + 1
    return p, first, slow, rate, seen, size


@of.rule
def plain(p, g, *, lr=1.0):
    """The smallest rule."""
    p = p - lr * g
    return p


RULES: dict[str, Any] = {
    "adam": of.rules.adam,  # a look at the gradients comes first
    "lamb": of.rules.lamb,  # the first pass writes
    "novograd": of.rules.novograd,  # scalar state
    "clipped": CLIPPED >> of.rules.adam,  # the first pass counts
    "nadam": nadam,
    "follower": CLIPPED >> follower,
}


def start(seed: int = 0, sizes: tuple[int, ...] = SIZES) -> tuple[np.random.Generator, list[Any]]:
    rng = np.random.default_rng(seed)
    return rng, [rng.standard_normal(n).astype(d) for n, d in zip(sizes, mixed(sizes), strict=True)]


def fresh(rng: np.random.Generator, sizes: tuple[int, ...] = SIZES) -> list[Any]:
    return [spread(rng, n, d) for n, d in zip(sizes, mixed(sizes), strict=True)]


# ── skipping ────────────────────────────────────────────────────────────────────────────────────────────────────────

PLACES = [(0, k) for k in (0, 1023, 1024, 32_767, 32_768, 33_791, 39_999)] + [(1, 0), (1, 4), (3, 32), (4, 32_768)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", RULES)
def test_a_nonfinite_gradient_anywhere_skips_the_step(name: str, target: str) -> None:
    """Nothing changes, the first step of the tensors included, and later steps are as if there had been none."""
    rng, params = start()
    skipping = of.Optimizer(
        [p.copy() for p in params], RULES[name], target=target, skip_nonfinite=True, zero_grads=True
    )
    judge = of.Optimizer([p.copy() for p in params], RULES[name], target=target)
    places = iter([*PLACES, *PLACES])
    for t in range(3):
        before = everything(skipping)
        for k in range(4 if t == 0 else 3):
            grads = fresh(rng)
            place, index = next(places)
            value = NONFINITE[(t + k) % 3]
            grads[place][index] = value
            if t == 1 and place:
                grads[0] = None
            expected = tree.global_norm([g for g in grads if g is not None])
            told = skipping.step(grads, stats=True)
            assert everything(skipping) == before, (place, index)
            assert told.skipped
            assert told["skipped"]
            assert (told.nan, told.inf) == (int(np.isnan(value)), int(np.isinf(value)))
            assert told.per_tensor.nan[place] + told.per_tensor.inf[place] == 1
            assert told.per_tensor.skipped.tolist() == [g is not None for g in grads]
            assert same(told.grad_norm, expected)
            assert (told.update_norm, told.max_update_ratio) == (0.0, 0.0)
            assert math.isnan(told.clipped_grad_norm)
            assert math.isnan(told.param_norm)
            assert all(g is None or g.tobytes() == bytes(g.nbytes) for g in grads), "zeroed all the same"
        grads = fresh(rng)
        if t == 1:
            grads[3] = None
        told = judge.step([None if g is None else g.copy() for g in grads], stats=True)
        assert repr(skipping.step(grads, stats=True)) == repr(told)
        assert everything(skipping) == everything(judge)
        assert skipping.t == t + 1


@pytest.mark.parametrize("target", TARGETS)
def test_a_skipped_first_step_leaves_the_state_unbegun(target: str) -> None:
    """State that starts as the parameter, the gradient or a hyperparameter starts at the first step that counts."""
    p, g = np.ones(3), np.full(3, 2.0)
    opt = of.Optimizer([p], follower, target=target, skip_nonfinite=True)
    p[:] = 5.0
    opt.lr = 0.125
    before = everything(opt)
    assert opt.step([np.array([1.0, np.inf, 1.0])]) is None
    assert everything(opt) == before, "the state is that of the parameter as it was given"
    assert opt.state_dict()["started"] == [False]
    p[:] = 7.0
    opt.lr = 0.5
    opt.step([g])
    assert opt.state_dict()["started"] == [True]
    assert np.asarray(opt.state["first"][0]).tolist() == [2.0] * 3
    assert np.asarray(opt.state["slow"][0]).tolist() == [7.0] * 3
    # size starts as lr too, and gains norm(p).
    assert opt.state["size"][0] == 0.5 + tree.norm(p)


@pytest.mark.parametrize("target", TARGETS)
def test_the_gradient_counts_as_it_is_after_unscaling(target: str) -> None:
    p, q = np.zeros(40, np.float32), np.zeros(3)
    opt = of.Optimizer([p, q], plain, target=target, skip_nonfinite=True)
    g, h = np.zeros(40, np.float32), np.zeros(3)
    g[33] = h[1] = 1e30
    told = opt.step([g, h], grad_scale=1e-10, stats=True)
    assert (told.skipped, told.nan, told.inf, opt.t) == (True, 0, 1, 0)
    assert told.per_tensor.inf.tolist() == [1, 0]
    g[33] = 0.0
    assert not opt.step([g, h], grad_scale=1e-10, stats=True).skipped
    assert q[1] == -1e40 or q[1] == -(1e30 * (1 / 1e-10))
    g[33] = np.inf
    told = opt.step([g, h], grad_scale=1e300, stats=True)  # the factor is 0 in float32, and infinity times 0 is NaN
    assert (told.skipped, told.nan, told.inf) == (True, 1, 0)


@pytest.mark.parametrize("target", TARGETS)
def test_without_skipping_nan_goes_through(target: str) -> None:
    p = np.ones(40, np.float32)
    g = np.zeros(40, np.float32)
    g[[1, 2, 35]] = np.nan, -np.inf, np.nan
    told = of.Optimizer([p], plain, target=target).step([g], stats=True)
    assert (told.skipped, told.nan, told.inf) == (False, 2, 1)
    assert math.isnan(told.grad_norm)
    assert math.isnan(told.max_update_ratio)
    assert np.isnan(p).sum() == 2
    assert p[2] == np.inf
    assert (p == 1).sum() == 37


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("skip", [False, True])
def test_large_gradients_are_finite(target: str, skip: bool) -> None:
    """Squares of float32 do not overflow; of float64 they may, and the norm alone is infinite then."""
    p, q = np.zeros(2000, np.float32), np.zeros(2000)
    opt = of.Optimizer([p, q], plain, target=target, skip_nonfinite=skip)
    g, h = np.full(2000, 1e30, np.float32), np.zeros(2000)
    told = opt.step([g, h], stats=True)
    assert told.grad_norm == pytest.approx(float(g[0]) * math.sqrt(2000), rel=1e-15)
    assert (told.nan, told.inf, told.skipped) == (0, 0, False)
    h[1500] = 1e200
    told = opt.step([g, h], stats=True)
    assert (told.grad_norm, told.nan, told.inf, told.skipped, opt.t) == (math.inf, 0, 0, False, 2)
    assert q[1500] == -1e200


@pytest.mark.parametrize("target", TARGETS)
def test_statistics_do_not_change_a_step(target: str) -> None:
    """With and without them, in turn, and with and without looking for NaN."""
    for name, rule in RULES.items():
        rng, params = start(3, (2000, 33, 7))
        steps = [fresh(rng, (2000, 33, 7)) for _ in range(4)]
        results = []
        for asked, skip in ((0, False), (0b1111, False), (0b0101, True), (0b1010, False)):
            opt = of.Optimizer([p.copy() for p in params], rule, target=target, skip_nonfinite=skip)
            for k, grads in enumerate(steps):
                told = opt.step(grads, stats=bool(asked >> k & 1))
                assert (told is not None) == bool(asked >> k & 1)
            results.append(everything(opt))
        assert results[1:] == results[:1] * 3, name


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_tell_the_same(threads: int) -> None:
    """Chunks are added up in one order, whoever did them."""
    for name in ("adam", "lamb", "novograd", "clipped"):
        rng, params = start(4, (300_001, 7, 100_000))
        grads = fresh(rng, (300_001, 7, 100_000))
        told = {}
        for number in (1, threads):
            opt = of.Optimizer([p.copy() for p in params], RULES[name], threads=number, skip_nonfinite=True)
            told[number] = [repr(opt.step(grads, stats=True, grad_scale=s)) for s in (1.0, 2.5)], everything(opt)
        assert told[1] == told[threads], name


# ── what the statistics are ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("target", TARGETS)
def test_each_statistic_is_what_it_is_called(target: str) -> None:
    """Powers of two, so that every norm is known."""
    p, g = np.full(64, 2.0, np.float32), np.full(64, 8.0, np.float32)  # norms 16 and 64
    q, h = np.full(16, 32.0), np.zeros(16)  # norm 128
    p[0] = p[0]
    opt = of.Optimizer([p, q], of.clip_by_norm >> of.rules.sgd, target=target, lr=0.5, max_norm=16.0)
    told = opt.step([g, h], grad_scale=0.5, stats=True)
    # Unscaled: 16 each, norm 128; clipped to 2 each, norm 16; a step of 1 each, norm 8; p is 1 each, norm 8.
    assert told.per_tensor.grad_norm.tolist() == [128.0, 0.0]
    assert told.per_tensor.clipped_grad_norm.tolist() == [16.0, 0.0]
    assert told.per_tensor.update_norm.tolist() == [8.0, 0.0]
    assert told.per_tensor.param_norm.tolist() == [8.0, 128.0]
    assert told.per_tensor.max_update_ratio.tolist() == [1.0, 0.0]
    assert (told.grad_norm, told.clipped_grad_norm, told.update_norm) == (128.0, 16.0, 8.0)
    assert told.param_norm == math.sqrt(64.0 + 128.0**2)
    assert told.max_update_ratio == 1.0
    assert told["grad_norm"] == told.grad_norm
    assert told.per_tensor["update_norm"] is not None
    with pytest.raises(AttributeError, match="no statistic 'norm'"):
        told.per_tensor.norm  # noqa: B018
    assert "grad_norm=128.0" in repr(told)


@pytest.mark.parametrize("target", TARGETS)
def test_an_update_from_zero_is_an_infinite_ratio(target: str) -> None:
    p, g = np.full(3, 1.0), np.full(3, 1.0)
    told = of.Optimizer([p, np.ones(2)], plain, target=target).step([g, np.ones(2)], stats=True)
    assert told.param_norm == 0.0
    assert told.max_update_ratio == math.inf
    q = [np.array([1.0, 0.0]), np.array([1.0])]
    told = of.Optimizer(q, plain, target=target).step([np.array([np.nan, 0.0]), np.array([1.0])], stats=True)
    assert math.isnan(told.max_update_ratio)


@pytest.mark.parametrize(("skip", "zero"), [(True, False), (False, True)])
@pytest.mark.parametrize(
    ("chain", "name"),
    [
        ([("clip_by_global_norm", {"max_norm": 3.0})], "lamb"),
        ([("centralize", {})], "novograd"),
        ([], "adam"),
        ([], "lars"),
        ([], "sgd"),
    ],
    ids=lambda value: value if isinstance(value, str) else ">>".join(name for name, _ in value) or "alone",
)
def test_bad_and_good_steps_against_the_oracle(chain: Any, name: str, skip: bool, zero: bool) -> None:
    sizes = (33_000, 5, 0, 1025, 1)
    hyper = {"lr": 0.3}
    beside = Beside(chain, name, hyper, sizes, skip_nonfinite=skip, zero_grads=zero)
    beside.step(beside.gradients())
    grads = beside.gradients()
    grads[0][32_999], grads[1][0], grads[3] = np.inf, np.nan, None
    if not skip:
        grads[0][32_999], grads[1][0] = 1e10, -1e10
    assert beside.step(grads, grad_scale=3.7).skipped is skip
    beside.step(beside.gradients(), grad_scale=1 / 3)
    for g in grads:
        if g is not None:
            g[...] = np.nan
    if not skip:
        beside.step(grads)


# ── nothing to do ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", RULES)
def test_steps_without_elements(name: str, target: str) -> None:
    """No gradient at all leaves everything alone but t; empty tensors have norms of 0."""
    opt = of.Optimizer([np.ones(3), np.ones(2, np.float32)], RULES[name], target=target, skip_nonfinite=True)
    before = bits({**opt.state_dict(), "t": 0, "p": opt.params})
    told = opt.step([None, None], stats=True)
    assert bits({**opt.state_dict(), "t": 0, "p": opt.params}) == before
    assert opt.t == 1
    assert [told[n] for n in (*_phase.NORMS, *_phase.COUNTS)] == [0.0] * 5 + [0, 0, False]
    assert np.isnan(told.per_tensor.grad_norm).all()
    assert np.isnan(told.per_tensor.max_update_ratio).all()
    assert told.per_tensor.nan.tolist() == told.per_tensor.skipped.tolist() == [0, 0]
    empty = [np.zeros((0, 3)), np.zeros(0, np.float32)]
    opt = of.Optimizer(empty, RULES[name], target=target, skip_nonfinite=True, zero_grads=True)
    told = opt.step([np.zeros((0, 3)), np.zeros(0, np.float32)], grad_scale=2.0, stats=True)
    assert opt.t == 1
    assert [told[n] for n in (*_phase.NORMS, *_phase.COUNTS)] == [0.0] * 5 + [0, 0, False]
    assert told.per_tensor.param_norm.tolist() == [0.0, 0.0]


def test_no_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="params is empty"):
        of.Optimizer([], "lamb", target="numpy")


# ── grad_scale ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, math.inf, -math.inf, 1e-320, 10**400])
def test_a_grad_scale_without_inverse_is_refused(value: Any, target: str) -> None:
    opt = of.Optimizer([np.ones(3)], "adam", target=target, zero_grads=True)
    before, g = everything(opt), np.ones(3)
    with pytest.raises(ValueError, match="grad_scale is a positive number with a finite inverse"):
        opt.step([g], grad_scale=value)
    assert everything(opt) == before
    assert g.tolist() == [1.0] * 3


@pytest.mark.parametrize("value", ["x", [], np.ones(2), 1j])
def test_a_grad_scale_is_a_number(value: Any) -> None:
    opt = of.Optimizer([np.ones(3)], "adam", target="numpy")
    before = everything(opt)
    with pytest.raises(TypeError, match=re.escape("grad_scale is a number, not")):
        opt.step([np.ones(3)], grad_scale=value)
    assert everything(opt) == before


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("value", [3.7, 65536.0, 1 / 3, 1e30, 7, np.float32(0.1), 2.0**-140])
def test_unscaling_multiplies_by_the_rounded_inverse(value: Any, target: str) -> None:
    """Before anything else: the same bits as a multiplication by hand; None is no unscaling."""
    rng, params = start(5, (1500, 40))
    grads = fresh(rng, (1500, 40))
    with np.errstate(over="ignore"):  # the inverse of the last one is infinite in float32
        by_hand = [g * g.dtype.type(1 / float(value)) for g in grads]
    results = []
    for given, how in ((grads, {"grad_scale": value}), (by_hand, {"grad_scale": None}), (by_hand, {})):
        opt = of.Optimizer([p.copy() for p in params], RULES["follower"], target=target)
        told = [repr(opt.step(given, stats=True, **how)) for _ in range(2)]
        results.append((told, everything(opt)))
    assert results[0] == results[1] == results[2]


# ── zero_grads ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_are_zeroed_behind_the_step(target: str) -> None:
    for name, rule in RULES.items():
        rng, params = start(6)
        zeroing = of.Optimizer([p.copy() for p in params], rule, target=target, zero_grads=True)
        judge = of.Optimizer([p.copy() for p in params], rule, target=target)
        kept = fresh(rng)
        for _ in range(3):  # the same arrays again and again, as an engine does
            for g, new in zip(kept, fresh(rng), strict=True):
                g[...] = -np.abs(new)
            judge.step([g.copy() for g in kept])
            zeroing.step(kept)
            assert all(g.tobytes() == bytes(g.nbytes) for g in kept), name
        assert everything(zeroing) == everything(judge), name


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_that_cannot_be_zeroed_are_refused(target: str) -> None:
    p, q = np.ones(4), np.ones(4)
    opt = of.Optimizer([p, q], "adam", target=target, zero_grads=True)
    before = everything(opt)
    shared = np.ones(6)
    fixed = np.ones(4)
    fixed.flags.writeable = False
    writable = np.ones(4)
    with pytest.raises(ValueError, match=re.escape("grads[1]")):
        opt.step([writable, fixed])
    with pytest.raises(ValueError, match=r"grads\[0\].*grads\[1\]|grads\[1\].*grads\[0\]"):
        opt.step([shared[:4], shared[2:]])
    with pytest.raises(ValueError, match=r"grads\[0\].*grads\[1\]|grads\[1\].*grads\[0\]"):
        opt.step([writable, writable])
    assert everything(opt) == before
    assert (shared == 1).all() and (writable == 1).all() and (fixed == 1).all()
    reading = of.Optimizer([p, q], "adam", target=target)
    reading.step([fixed, fixed])
    reading.step([shared[:4], shared[2:]])


@pytest.mark.parametrize("name", ["skip_nonfinite", "zero_grads"])
@pytest.mark.parametrize("value", [1, "yes", None])
def test_switches_are_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} is True or False"):
        of.Optimizer([np.ones(3)], "adam", target="numpy", **{name: value})


def test_switches_are_attributes_that_cannot_be_set() -> None:
    opt = of.Optimizer([np.ones(3)], "adam", target="numpy", skip_nonfinite=np.True_, zero_grads=True)
    assert opt.skip_nonfinite is True
    assert opt.zero_grads is True
    with pytest.raises(AttributeError):
        opt.skip_nonfinite = False


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["novograd", "clipped"])
def test_an_error_behind_nothing_written_zeroes_nothing(name: str, target: str) -> None:
    """A gradient of another shape is found first."""
    opt = of.Optimizer([np.ones(3), np.ones(2)], RULES[name], target=target, zero_grads=True)
    g = np.ones(3)
    with pytest.raises(ValueError, match=re.escape("grads[1]")):
        opt.step([g, np.ones(3)])
    assert g.tolist() == [1.0] * 3
    assert opt.t == 0


# ── resuming ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("first", "then"), [("c", "c"), ("c", "numpy"), ("numpy", "c")])
@pytest.mark.parametrize("name", ["novograd", "follower", "clipped", "lamb"])
def test_runs_resume_exactly(name: str, first: str, then: str) -> None:
    """Half way, with a tensor that has had no gradient yet, and behind a skipped step."""
    rng, params = start(7, (2000, 33, 40))
    steps = [fresh(rng, (2000, 33, 40)) for _ in range(5)]
    for k in range(3):
        steps[k][1] = None
    steps[2][0] = steps[2][0].copy()
    steps[2][0][1024] = np.inf
    how: dict[str, Any] = {"skip_nonfinite": True, "lr": 0.03}
    whole = of.Optimizer([p.copy() for p in params], RULES[name], target=first, **how)
    for grads in steps:
        whole.step(grads, grad_scale=0.7)
    before = of.Optimizer([p.copy() for p in params], RULES[name], target=first, **how)
    for grads in steps[:3]:
        before.step(grads, grad_scale=0.7)
    saved = before.state_dict()
    after = of.Optimizer([p.copy() for p in before.params], RULES[name], target=then, skip_nonfinite=True)
    after.load_state_dict(saved)
    for grads in steps[3:]:
        before.step(grads, grad_scale=0.7)  # what was saved are copies
        after.step(grads, grad_scale=0.7)
    assert everything(after) == everything(whole) == everything(before)
    assert after.t == 4


@of.transform
def halve(g, *, share=0.5):
    """A transform that a state behind it can tell."""
    g = g * (share * global_norm(g) / global_norm(g))
    return g


@pytest.mark.parametrize("target", TARGETS)
def test_state_that_starts_as_the_gradient_sees_the_transformed_one(target: str) -> None:
    p = [np.ones(3), np.ones(4, np.float32)]
    opt = of.Optimizer(p, halve >> follower, target=target)
    opt.step([np.full(3, 8.0), None], grad_scale=2.0)
    assert np.asarray(opt.state["first"][0]).tolist() == [2.0] * 3
    opt.step([np.full(3, 4.0), np.full(4, 16.0, np.float32)])
    assert np.asarray(opt.state["first"][0]).tolist() == [2.0] * 3
    assert np.asarray(opt.state["first"][1]).tolist() == [8.0] * 4


def test_first_steps_of_lists_of_several_dtypes_keep_their_flags() -> None:
    """What tells the kernel which tensors begin lives as long as the plan, for each dtype."""
    params = [np.ones(3, np.float32), np.ones(3, np.float64), np.ones(2, np.float32)]
    first = of.Optimizer([p.copy() for p in params], "sgd")
    assert not first._inputs.take([np.ones_like(p) for p in params], None)
    first._prepare()
    first._plan.set(first._how)
    kept = {flags.ctypes.data: flags.tolist() for flags in first._plan.flags}
    given = [int(first._plan.library.ffi.cast("size_t", own.starting)) for own in first._plan.own]
    assert [kept[address] for address in given] == [[1, 1], [1]]
