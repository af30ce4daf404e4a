"""Arrays that are given another form, or another owner's view of them, between the steps of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import optforge as of
from conftest import require_torch
from optimizing import TARGETS, everything

Change = Callable[[Any], None]


def made(target: str, **how: Any) -> tuple[of.Optimizer, list[Any]]:
    """An optimizer that has done two steps with the same gradients."""
    grads = [np.full((2, 4), 0.5, np.float32), np.full(4, 0.25)]
    opt = of.Optimizer([np.ones((2, 4), np.float32), np.ones(4)], "adam", target=target, **how)
    opt.step(grads)
    opt.step(grads)
    return opt, grads


def as_integers(array: Any) -> None:
    array.dtype = np.int32


def as_halves(array: Any) -> None:
    array.dtype = np.float16


def as_doubles(array: Any) -> None:
    array.dtype = np.float64


def flat(array: Any) -> None:
    array.shape = (8,)


def read_only(array: Any) -> None:
    array.setflags(write=False)


CHANGES: dict[str, tuple[Change, type[Exception], str]] = {
    "integers": (as_integers, TypeError, r"^grads\[0\] is int32; it must be"),
    "halves": (as_halves, ValueError, r"^grads\[0\] has the shape \(2, 8\), its parameter \(2, 4\)"),
    "doubles": (as_doubles, TypeError, r"^grads\[0\] is float64, its parameter float32"),
    "flat": (flat, ValueError, r"^grads\[0\] has the shape \(8,\), its parameter \(2, 4\)"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, of what is done here
def test_a_gradient_of_another_form_is_refused(target: str, name: str) -> None:
    change, error, message = CHANGES[name]
    opt, grads = made(target)
    before = everything(opt)
    change(grads[0])
    for _ in range(2):
        with pytest.raises(error, match=message):
            opt.step(grads)
        assert everything(opt) == before


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_parameter_of_another_form_is_refused(target: str) -> None:
    for change, error, message in (
        (read_only, ValueError, r"^params\[0\] is read-only"),
        (as_integers, TypeError, r"^params\[0\] is int32"),
        (flat, ValueError, r"^params\[0\] has become float32 of shape \(8,\)"),
    ):
        opt, grads = made(target)
        before, values = opt.state_dict(), opt.params[0].tobytes()
        change(opt.params[0])
        for given in (grads, grads, [g.copy() for g in grads]):
            with pytest.raises(error, match=message):
                opt.step(given)
            assert opt.params[0].tobytes() == values
            assert opt.t == before["t"]
    opt, grads = made(target)
    read_only(opt.params[0])
    with pytest.raises(ValueError, match="read-only"):
        opt.step(grads)
    opt.params[0].setflags(write=True)
    opt.step(grads)
    assert opt.t == 3


@pytest.mark.parametrize("target", TARGETS)
def test_a_gradient_that_is_zeroed_is_refused_once_it_is_read_only(target: str) -> None:
    opt, grads = made(target, zero_grads=True)
    read_only(grads[1])
    with pytest.raises(ValueError, match=r"^grads\[1\] is read-only"):
        opt.step(grads)
    opt, grads = made(target)
    read_only(grads[1])
    opt.step(grads)
    assert opt.t == 3


@pytest.mark.parametrize("target", TARGETS)
def test_no_parameter_can_be_resized_and_a_gradient_is_looked_at_anew(target: str) -> None:
    opt, grads = made(target)
    for array in opt.params:
        with pytest.raises(ValueError, match="resize"):
            array.resize((100_000,), refcheck=False)
    opt.step(grads)
    assert opt.t == 3
    if target != "cuda":  # where gradients are kept
        before = everything(opt)
        grads[1].resize((100_000,), refcheck=False)
        with pytest.raises(ValueError, match=r"^grads\[1\] has the shape \(100000,\), its parameter \(4,\)"):
            opt.step(grads)
        assert everything(opt) == before
        grads[1].resize((4,), refcheck=False)
        opt.step(grads)
        assert opt.t == 4


# ── PyTorch's count of versions ─────────────────────────────────────────────────────────────────────────────────────


def graph(torch: Any, w: Any) -> Any:
    """A loss whose backward pass needs the weights."""
    return (w * w * torch.ones(4)).sum()


@pytest.mark.parametrize("target", TARGETS)
def test_a_backward_pass_through_old_weights_is_an_error_as_with_pytorch(target: str) -> None:
    torch = require_torch()
    for ours in (False, True):
        w = torch.ones(4, requires_grad=True)
        if ours:
            opt = of.Optimizer([w], "sgd", lr=0.5, target=target)
        else:
            other = torch.optim.SGD([w], lr=0.5)
        for _ in range(2):  # the first step is another way through the optimizer
            w.grad = None
            loss = graph(torch, w)
            loss.backward(retain_graph=True)
            if ours:
                opt.step([w.grad])
            else:
                other.step()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
    with torch.no_grad():
        frozen = torch.ones(4)
        of.Optimizer([frozen], "sgd", lr=0.5, target=target).step([torch.ones(4)])
    assert frozen._version == 1


@pytest.mark.parametrize("target", TARGETS)
def test_versions_count_what_is_written(target: str) -> None:
    torch = require_torch()
    w, idle, g = torch.ones(4), torch.ones(3), torch.ones(4)
    opt = of.Optimizer([w, idle], "sgd", lr=0.5, target=target, skip_nonfinite=target != "cuda")
    grads = [g, None]
    for k in range(1, 4):
        opt.step(grads)
        assert (w._version, idle._version, g._version) == (k, 0, 0)
    saved = opt.state_dict()
    if target != "cuda":
        g[0] = torch.nan
        before = g._version
        opt.step(grads)
        assert (w._version, g._version, opt.t) == (3, before, 3)
    opt.load_state_dict(saved)
    assert w._version > 3
    zeroing = of.Optimizer([torch.ones(4)], "sgd", target=target, zero_grads=True)
    g = torch.ones(4)
    zeroing.step([g])
    assert g._version == 1
    with torch.inference_mode():
        own = torch.ones(4)
        of.Optimizer([own], "sgd", lr=0.5, target=target).step([torch.ones(4)])
    assert own.tolist() == [0.5] * 4
