"""The Optimizer: structures of arrays, the bits of steps, hyperparameters, gradients that come and go."""

from __future__ import annotations

import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

import optforge as of
from conftest import require_torch
from optforge import Optimizer, rule
from optforge.core.diagnostics import EnvironmentProblem
from optforge.engines import arrays
from optforge.engines.c.engine import CTarget
from optimizing import (
    SETTINGS,
    TARGETS,
    Exporter,
    FakeTensor,
    Judge,
    bits,
    brittle,
    everything,
    large,
    nadam,
    small,
)

KEYS = ["weights", "bias", 7, ("a", 1), "", "last"]


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ── structures ──────────────────────────────────────────────────────────────────────────────────────────────────────


def keyed(arrays: Iterable[Any]) -> dict[Any, Any]:
    return dict(zip(KEYS, arrays, strict=True))


# What is passed, and what is kept of it.
SHAPED: dict[str, tuple[Callable[[list[Any]], Any], Callable[[list[Any]], Any]]] = {
    "list": (list, list),
    "tuple": (tuple, tuple),
    "dict": (keyed, keyed),
    "ordered dict": (lambda arrays: OrderedDict(keyed(arrays)), keyed),
    "mapping": (lambda arrays: MappingProxyType(keyed(arrays)), keyed),
    "generator": (lambda arrays: (one for one in arrays), list),
    "dict values": (lambda arrays: keyed(arrays).values(), list),
}


@pytest.mark.parametrize("shape", SHAPED)
def test_state_has_the_structure_of_the_parameters(shape: str) -> None:
    shaped, kept = SHAPED[shape]
    arrays = small(1)
    opt = Optimizer(shaped(arrays), nadam, target="numpy", **SETTINGS)
    opt.step(shaped(small(2)))
    assert list(opt.state) == ["m", "slow", "first", "scale", "mu", "rate"]
    assert type(opt.params) is type(kept(arrays))
    assert bits(opt.params) == bits(kept(arrays))
    for name, tree in opt.state.items():
        assert type(tree) is type(kept(arrays))
        if isinstance(tree, dict):
            assert list(tree) == KEYS
        for value, own in zip(tree.values() if isinstance(tree, dict) else tree, arrays, strict=True):
            if name in ("mu", "rate"):
                assert type(value) is float
            else:
                assert type(value) is np.ndarray
                assert (value.shape, value.dtype) == (own.shape, own.dtype)


@pytest.mark.parametrize("shape", SHAPED)
def test_every_structure_gives_the_same_bits(shape: str, target: str) -> None:
    shaped, _ = SHAPED[shape]
    arrays = small(1)
    opt = Optimizer(shaped(arrays), nadam, target=target, **SETTINGS)
    judge = Judge(small(1), nadam, **SETTINGS)
    for seed in (2, 3, 4):
        opt.step(shaped(small(seed)))
        judge.step(small(seed))
    assert bits(arrays) == bits(judge.params)


def test_gradients_of_a_dict_go_by_their_keys(target: str) -> None:
    params, judged = small(1), small(1)
    opt = Optimizer(keyed(params), nadam, target=target, **SETTINGS)
    judge = Judge(judged, nadam, **SETTINGS)
    opt.step(dict(reversed(keyed(small(2)).items())))
    judge.step(small(2))
    assert bits(params) == bits(judged)


def test_lists_and_tuples_of_gradients_are_alike() -> None:
    opt = Optimizer(small(1), "sgd", target="numpy", lr=0.3)
    judge = Judge(small(1), of.rules.sgd, lr=0.3)
    for grads in (small(2), tuple(small(2)), iter(small(2))):
        opt.step(grads)
        judge.step(small(2))
        assert judge.agrees(opt)


def test_the_optimizer_keeps_a_collection_of_its_own() -> None:
    params = {"w": np.ones(2)}
    opt = Optimizer(params, "sgd", target="numpy")
    params["late"] = np.ones(2)
    with pytest.raises(ValueError, match="'late', which params has not"):
        opt.step({"w": np.ones(2), "late": np.ones(2)})
    del params["late"], params["w"]
    opt.step({"w": np.ones(2)})
    assert opt.params["w"].tolist() == [0.99, 0.99]
    listed = [np.ones(2)]
    opt = Optimizer(listed, "sgd", target="numpy")
    listed.append(np.ones(2))
    opt.step([np.ones(2)])
    assert bits(opt.params) == bits(listed[:1])


def test_parameters_are_updated_in_place(target: str) -> None:
    params = small(1)
    before = [p.ctypes.data for p in params]
    opt = Optimizer(params, "sgd", target=target, lr=0.5)
    opt.step(small(2))
    assert [p.ctypes.data for p in params] == before
    expected = [p - p.dtype.type(0.5) * g for p, g in zip(small(1), small(2), strict=True)]
    assert [p.tobytes() for p in params] == [e.tobytes() for e in expected]


def test_state_arrays_are_live(target: str) -> None:
    opt = Optimizer(small(1), nadam, target=target, **SETTINGS)
    m = opt.state["m"][0]
    opt.step(small(2))
    if target == "cuda":
        pytest.skip("what an array on a device can do is PyCUDA's to say")
    assert np.any(m != 0)
    assert bits(m) == bits(opt.state["m"][0])
    before = m.copy()
    m[...] = 0
    opt.step([small(3)[0], *[None] * 5])
    other = Optimizer(small(1), nadam, target=target, **SETTINGS)
    other.step(small(2))
    other.step([small(3)[0], *[None] * 5])
    assert np.any(m != 0)
    assert bits(m) != bits(other.state["m"][0])
    assert bits(before) != bits(m)


def test_state_that_the_options_leave_out_is_absent() -> None:
    opt = Optimizer(small(1), nadam, target="numpy", average="off")
    assert "slow" not in opt.state
    assert opt.average == "off"
    assert opt.nesterov is True


def test_a_rule_may_have_no_hyperparameters_and_no_state(target: str) -> None:
    w = np.arange(5.0)
    opt = Optimizer([w], plain, target=target)
    opt.step([np.ones(5)])
    assert w.tolist() == [-1, 0, 1, 2, 3]
    assert opt.state == {}
    assert repr(opt) == "<Optimizer plain of 1 tensor(s), t=1>"


@rule
def plain(p, g):
    """Nothing to set."""
    p = p - g
    return p


# ── bits ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [{}, {"nesterov": False, "average": "off"}], ids=["default", "other options"])
def test_steps_have_the_bits_of_plain_python(target: str, options: dict[str, Any]) -> None:
    opt = Optimizer(small(1), nadam, target=target, **SETTINGS, **options)
    judge = Judge(small(1), nadam, **SETTINGS, **options)
    for seed in range(2, 8):
        opt.step(small(seed))
        judge.step(small(seed))
        assert judge.agrees(opt)


@pytest.mark.parametrize("threads", [None, 1, 2, 3, 7])
def test_any_number_of_threads_gives_the_bits_of_the_reference(threads: int | None) -> None:
    reference = Optimizer(large(1), nadam, target="numpy", **SETTINGS)
    opt = Optimizer(large(1), nadam, threads=threads, **SETTINGS)
    assert opt.threads == threads
    for seed in (2, 3, 4):
        grads = large(seed)
        if seed == 3:
            grads[1] = None
        opt.step(grads)
        reference.step(grads)
    assert everything(opt) == everything(reference)


def test_more_threads_than_a_machine_has_are_harmless() -> None:
    opt = Optimizer(small(1), "adam", threads=2**40, lr=0.1)
    reference = Optimizer(small(1), "adam", target="numpy", lr=0.1)
    for each in (opt, reference):
        each.step(small(2))
    assert opt.threads == 2**40
    assert everything(opt) == everything(reference)


def test_tensors_start_at_their_first_gradient(target: str) -> None:
    opt = Optimizer(small(1), nadam, target=target, **SETTINGS)
    judge = Judge(small(1), nadam, **SETTINGS)
    schedule = [(0, 1, 2), (0, 1), (), (3, 1), (0, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5), (5,)]
    for seed, present in enumerate(schedule):
        grads = [g if k in present else None for k, g in enumerate(small(seed + 10))]
        before = everything(opt)
        opt.step(grads)
        judge.step(grads)
        assert judge.agrees(opt)
        after = everything(opt)
        for k in set(range(6)) - set(present):
            assert after["params"][k] == before["params"][k]
            assert after["started"][k] == before["started"][k]
            assert all(after["state"][name][k] == before["state"][name][k] for name in after["state"])
    assert opt.t == len(schedule)


def test_scalar_state_advances_once_per_tensor_and_applied_step() -> None:
    opt = Optimizer(large(1), brittle, threads=7)
    opt.step(large(2))
    opt.step([None, *large(2)[1:]])
    assert opt.state["left"] == [2.0, 1.0, 1.0, 1.0, 1.0]


def test_state_starts_with_the_hyperparameters_of_that_step(target: str) -> None:
    opt = Optimizer([np.ones(2), np.ones(2)], nadam, target=target, lr=0.5, floor=0.25)
    opt.step([np.ones(2), None])
    opt.lr, opt.floor = 0.125, 0.0625
    opt.step([None, np.zeros(2)])
    assert opt.state["rate"] == [0.5, 0.125]
    assert np.asarray(opt.state["scale"][1]).tolist() == [0.9 * 0.0625, 0.9 * 0.0625]


def test_a_state_beyond_float32_starts_as_infinity(target: str) -> None:
    opt = Optimizer([np.ones(2, np.float32)], nadam, target=target, floor=1e300)
    opt.step([np.ones(2, np.float32)])
    assert np.isinf(opt.state["scale"][0]).all()


def test_the_special_values_of_arithmetic_are_the_same(target: str) -> None:
    values = np.array([np.inf, -np.inf, np.nan, -0.0, 0.0, 1e-45, -1e-39, 3e38, 1.0], np.float32)
    judge = Judge([np.repeat(values, 9)], of.rules.adam, lr=0.3, eps=1e-30)
    opt = Optimizer([np.repeat(values, 9)], "adam", target=target, lr=0.3, eps=1e-30)
    for _ in range(3):
        opt.step([np.tile(values, 9)])
        judge.step([np.tile(values, 9)])
    own, judged = opt.params[0], judge.params[0]
    assert np.isnan(own).tolist() == np.isnan(judged).tolist()
    assert own[~np.isnan(own)].tobytes() == judged[~np.isnan(judged)].tobytes()


# ── time and hyperparameters ────────────────────────────────────────────────────────────────────────────────────────


def test_time_counts_steps_and_can_be_set(target: str) -> None:
    opt = Optimizer(small(1), nadam, target=target, **SETTINGS)
    judge = Judge(small(1), nadam, **SETTINGS)
    assert opt.t == 0
    for k, seed in enumerate((2, 3, 4, 5)):
        if k == 2:
            opt.t = np.int32(40)
            judge.t, judge.steps = 40, [40] * len(judge.params)
            assert type(opt.t) is int
        opt.step(small(seed))
        judge.step(small(seed))
        assert judge.agrees(opt)
    assert opt.t == 42


def test_a_hyperparameter_holds_from_the_next_step(target: str) -> None:
    opt = Optimizer(small(1), nadam, target=target, **SETTINGS)
    judge = Judge(small(1), nadam, **SETTINGS)
    for lr in (0.03, 0.5, np.float32(0.1), 3, np.array(0.25), Fraction(1, 8), -1.0):
        opt.lr = lr
        judge.settings = {**SETTINGS, "lr": float(lr)}
        assert type(opt.lr) is float
        assert opt.lr == float(lr)
        opt.step(small(3))
        judge.step(small(3))
        assert judge.agrees(opt)
    assert (opt.beta, opt.psi, opt.floor) == (0.7, 0.3, 3e-4)


def test_hyperparameters_left_out_are_the_defaults() -> None:
    opt = Optimizer(small(1), "adam", target="numpy", beta2=0.5)
    assert {name: getattr(opt, name) for name in of.rules.adam.hyperparameters} == {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.5,
        "eps": 1e-6,
        "lam": 1 - 1e-8,
    }


def test_infinity_is_a_value(target: str) -> None:
    w = np.ones(2)
    opt = Optimizer([w], "sgd", target=target, lr=np.inf)
    opt.step([np.ones(2)])
    assert w.tolist() == [-np.inf, -np.inf]


def test_hyperparameters_are_listed_and_shown() -> None:
    opt = Optimizer({"w": np.ones(1)}, nadam, target="numpy", lr=0.5, average="off")
    assert {"lr", "beta", "psi", "floor", "nesterov", "average", "t", "step"} <= set(dir(opt))
    assert repr(opt) == (
        "<Optimizer nadam of 1 tensor(s), t=0, lr=0.5, beta=0.9, psi=0.004, floor=0.001, nesterov=True, average='off'>"
    )


def test_a_hyperparameter_may_have_any_name(target: str) -> None:
    w = np.ones(2, np.float32)
    opt = Optimizer([w], double, target=target, self=0.5, auto=0.25, n=3.0)
    opt.step([np.ones(2, np.float32)])
    opt.self = 0.25
    opt.step([np.ones(2, np.float32)])
    assert (opt.self, opt.auto, opt.n) == (0.25, 0.25, 3.0)
    assert w.tolist() == [1 - 0.5 * 0.25 - 3.0 - 0.25 * 0.25 - 3.0] * 2


@rule
def double(p, g, *, self=1.0, auto=1.0, n=1.0):
    """Names that Python, C and the templates use themselves."""
    p = p - self * auto * g - n
    return p


def test_other_hyperparameters_need_no_other_library(cache: Path) -> None:
    Optimizer(small(1), double, auto=0.5)
    (library,) = cache.glob("double-*.so")
    Optimizer(small(1), double, auto=2.0, n=0.5)
    assert [*cache.glob("double-*.so")] == [library]


# ── gradients ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_compiled_code_looks_at_arrays(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(given: Any, label: str, *rest: Any, **more: Any) -> Any:
        seen.append(label)
        return real(given, label, *rest, **more)

    real = arrays.gradient
    monkeypatch.setattr(arrays, "gradient", spy)
    opt = Optimizer(small(1), nadam, target=target, **SETTINGS)
    judge = Judge(small(1), nadam, **SETTINGS)
    grads = small(2)
    every = [f"grads[{k}]" for k in range(6)]
    for given, new in [
        (grads, True),
        (list(grads), False),
        (tuple(grads), False),
        (iter(grads), False),
        (small(2), True),
    ]:
        seen.clear()
        opt.step(given)
        judge.step(grads)
        assert seen == (every if target == "numpy" or (target == "cuda" and new) else [])
        assert judge.agrees(opt)


def test_gradients_may_change_in_place_and_in_the_list(target: str) -> None:
    opt = Optimizer(small(1), nadam, target=target, **SETTINGS)
    judge = Judge(small(1), nadam, **SETTINGS)

    def both() -> None:
        opt.step(grads)
        judge.step(grads)
        assert judge.agrees(opt)

    grads: list[Any] = small(2)
    both()
    grads[0] *= 3
    both()
    grads[1] = small(4)[1]
    both()
    grads[4] = None
    both()
    both()
    grads[4] = small(5)[4]
    both()
    grads[:] = small(6)
    both()
    grads[0], grads[3] = None, None
    both()
    grads[0] = np.asarray(np.asfortranarray(small(7)[0]).T.T, order="C")
    both()


def test_a_gradient_may_be_shared_and_read_only(target: str) -> None:
    shared = np.arange(3.0)
    shared.setflags(write=False)
    params = [np.ones(3), np.ones(3)]
    Optimizer(params, "sgd", target=target, lr=0.5).step([shared, shared])
    assert params[0].tolist() == params[1].tolist() == [1.0, 0.5, 0.0]


def test_a_numpy_scalar_is_the_gradient_of_a_scalar(target: str) -> None:
    w = np.array(1.0, np.float32)
    opt = Optimizer([w], "sgd", target=target, lr=0.5)
    for _ in range(2):
        opt.step([2 * w])
    assert w.tolist() == 0.0


# ── arrays of other libraries ───────────────────────────────────────────────────────────────────────────────────────

FOREIGN: dict[str, Callable[[Any], Any]] = {
    "tensor": FakeTensor,
    "DLPack": Exporter,
    "array.array": lambda a: array.array(a.dtype.char, a.reshape(-1).tolist()),
    "memoryview": lambda a: memoryview(a.copy()),
    "subclass": lambda a: a.copy().view(np.recarray),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_arrays_of_other_libraries_are_updated_in_place(kind: str, target: str) -> None:
    wrap = FOREIGN[kind]
    arrays = [a for a in small(1) if a.ndim == 1 or kind != "array.array"]
    judge = Judge([a.copy() for a in arrays], nadam, **SETTINGS)
    params = [wrap(a) for a in arrays]
    opt = Optimizer(params, nadam, target=target, **SETTINGS)
    for seed in (2, 3, 4):
        grads = [g for g in small(seed) if g.ndim == 1 or kind != "array.array"]
        given = [wrap(g) for g in grads]
        for _ in range(2):
            opt.step(given)
            judge.step(grads)
    for own, judged in zip(params, judge.params, strict=True):
        assert np.asarray(getattr(own, "array", own)).tobytes() == judged.tobytes()
    assert target == "cuda" or all(type(m) is np.ndarray for m in opt.state["m"])


def test_a_memory_map_is_updated(tmp_path: Path, target: str) -> None:
    path = tmp_path / "weights"
    np.ones(4, np.float32).tofile(path)
    mapped = np.memmap(path, np.float32, "r+")
    opt = Optimizer([mapped], "adam", target=target, lr=0.5)
    judge = Judge([np.ones(4, np.float32)], of.rules.adam, lr=0.5)
    for each in (opt, judge):
        each.step([np.arange(4, dtype=np.float32)])
    mapped.flush()
    assert path.read_bytes() == judge.params[0].tobytes()
    assert target == "cuda" or type(opt.state["m"][0]) is np.ndarray


@pytest.mark.parametrize("wrap", [FakeTensor, Exporter])
def test_memory_that_moves_is_followed(wrap: Callable[[Any], Any], target: str) -> None:
    params, judge = [wrap(p) for p in small(1)], Judge(small(1), nadam, **SETTINGS)
    grads = [wrap(g) for g in small(2)]
    opt = Optimizer(params, nadam, target=target, **SETTINGS)
    left = []
    for moving in ([], [grads[0]], [params[1]], [params[0], grads[0], grads[4]], [], [params[5]]):
        for each in moving:
            left.append((each.array, each.array.copy()))
            each.array = each.array.copy()
        opt.step(grads)
        judge.step(small(2))
        assert [bits(p.array) for p in params] == bits(judge.params)
    for old, copy in left:  # nothing is written where an array was before
        assert bits(old) == bits(copy)


def test_what_a_parameter_may_not_become(target: str) -> None:
    w = FakeTensor(np.ones(4))
    opt = Optimizer([w, np.ones(2)], "sgd", target=target)
    grads = [np.ones(4), np.ones(2)]
    opt.step(grads)
    fine = w.array
    for bad, message in [
        (np.ones(5), r"^params\[0\] has become float64 of shape \(5,\) since"),
        (np.ones(4, np.float32), r"^params\[0\] has become float32 of shape \(4,\) since"),
        (np.ones(8)[::2], r"^params\[0\] is not C-contiguous"),
        (np.ones((2, 2)), r"^params\[0\] has become float64 of shape \(2, 2\) since"),
    ]:
        w.array = bad
        before = bits(bad), everything(opt)
        with pytest.raises(ValueError, match=message):
            opt.step(grads)
        assert (bits(bad), everything(opt)) == before
    w.array = fine
    opt.step(grads)
    assert fine.tolist() == [0.98] * 4
    w.array = opt.params[1].repeat(4)[:4]
    opt.step(grads)
    memory = np.ones(6)
    w.array = memory[:4]
    other = FakeTensor(np.ones(4))
    pair = Optimizer([w, other], "sgd", target=target)
    pair.step([np.ones(4), np.ones(4)])
    other.array = memory[2:]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^params\[0\] and params\[1\] overlap in memory"):
            pair.step([np.ones(4), np.ones(4)])
    assert memory.tolist() == [0.99] * 4 + [1.0] * 2
    assert pair.t == 1


def test_a_gradient_that_moves_into_a_parameter_is_refused(target: str) -> None:
    w, g = np.ones(4), FakeTensor(np.ones(4))
    opt = Optimizer([w], "sgd", target=target)
    opt.step([g])
    g.array = w
    with pytest.raises(ValueError, match=r"^grads\[0\] and params\[0\] overlap"):
        opt.step([g])
    assert opt.t == 1


def test_pytorch_tensors(target: str) -> None:
    torch = require_torch()
    params = [torch.from_numpy(p).requires_grad_() if p.size else torch.from_numpy(p) for p in small(1)]
    judge = Judge(small(1), nadam, **SETTINGS)
    opt = Optimizer(iter(params), nadam, target=target, **SETTINGS)
    for seed in (2, 3, 4):
        for p, g in zip(params, small(seed), strict=True):
            p.grad = torch.from_numpy(g)
        opt.step([p.grad for p in params])
        judge.step(small(seed))
        with torch.no_grad():
            params[0].data = params[0].data.clone()
    assert [bits(p.detach().numpy()) for p in params] == bits(judge.params)
    with pytest.raises(TypeError, match=r"^params\[0\] is int8; it must be float32, float64, bfloat16 or float16"):
        Optimizer([torch.ones(2, dtype=torch.int8)], nadam, target=target)
    with pytest.raises(TypeError, match=r"^params\[0\] does not share"):
        Optimizer([torch.ones(2, device="meta")], nadam, target=target)
    with pytest.raises(ValueError, match=r"^params\[0\] is not C-contiguous"):
        Optimizer([torch.ones(2, 3).T], nadam, target=target)
    with pytest.raises(TypeError, match=r"^params must be a list"):
        Optimizer(torch.ones(2), nadam, target=target)


# ── emitted files instead of fresh ones ─────────────────────────────────────────────────────────────────────────────


def write(directory: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def test_emitted_files_are_run(tmp_path: Path) -> None:
    kernels = write(tmp_path, nadam.generate("c", nesterov=False, average="off", lr=0.5))
    options = {"nesterov": False, "average": "off"}
    opt = Optimizer(small(1), nadam, target=CTarget(kernels), **SETTINGS, **options)
    judge = Judge(small(1), nadam, **SETTINGS, **options)
    for seed in (2, 3):
        opt.step(small(seed))
        judge.step(small(seed))
    assert judge.agrees(opt)


def test_emitted_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    kernels = write(tmp_path, nadam.generate("c", nesterov=False))
    for options in ({}, {"nesterov": False, "average": "off"}):
        with pytest.raises(EnvironmentProblem, match=r"nadam\.h is of other options than are asked for; make it with"):
            Optimizer(small(1), nadam, target=CTarget(kernels), **options)
    Optimizer(small(1), nadam, target=CTarget(kernels), nesterov=False)
    text = (kernels / "nadam.c").read_text(encoding="utf-8")
    (kernels / "nadam.c").write_text(text.replace(nadam.hash, "0" * 64), encoding="utf-8")
    with pytest.raises(EnvironmentProblem, match=r"nadam\.c is of another version of rule 'nadam'"):
        Optimizer(small(1), nadam, target=CTarget(kernels), nesterov=False)
    (kernels / "nadam.c").unlink()
    with pytest.raises(EnvironmentProblem, match=r"nadam\.c: No such file .*; make it with: optforge generate"):
        Optimizer(small(1), nadam, target=CTarget(kernels), nesterov=False)
    alone = write(tmp_path, of.rules.sgd.generate("c", ["f32"]))
    with pytest.raises(EnvironmentProblem, match=r"sgd-\w+\.so cannot be loaded"):
        Optimizer(small(1), "sgd", target=CTarget(alone))
