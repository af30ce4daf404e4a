"""An exception from outside, such as the KeyboardInterrupt of Ctrl-C, at any place of a step."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import optforge as of
from amount import FULL
from optforge.core.diagnostics import InterruptedStep
from optimizing import TARGETS, bits, everything, nadam

PACKAGE = str(Path(of.__file__).parent)
HOST_TARGETS = [target for target in TARGETS if target != "cuda"]


class Interruption(BaseException):
    """What a handler raises."""


def arrays(dtypes: str, size: int, seed: int) -> list[Any]:
    """An array of each dtype."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(size).astype({"f": np.float32, "d": np.float64}[d]) for d in dtypes]


def made(target: str, dtypes: str, size: int, **how: Any) -> of.Optimizer:
    """An optimizer with all kinds of state, and a schedule."""
    schedule = of.schedules.cosine(0.01, steps=50, warmup=7)
    return of.Optimizer(arrays(dtypes, size, 0), nadam, lr=schedule, target=target, threads=1, **how)


def plain(target: str, dtypes: str, size: int, **how: Any) -> of.Optimizer:
    """An optimizer whose usual steps are the shortest way."""
    return of.Optimizer(arrays(dtypes, size, 0), "adam", target=target, threads=1, **how)


MAKERS = [made, plain]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers of POSIX")
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtypes", ["f", "fdf"])
@pytest.mark.parametrize("target", HOST_TARGETS)
def test_a_signal_finds_a_step_done_or_not_begun(target: str, dtypes: str, make: Callable[..., of.Optimizer]) -> None:
    size, last = (20_000, 20) if target == "c" else (500, 20)
    grads = [arrays(dtypes, size, 1 + k) for k in range(3)]
    opt, other = make(target, dtypes, size), make(target, dtypes, size)
    steps = [everything(other)]
    for t in range(last):
        other.step(grads[t % 3])
        steps.append(everything(other))
    begin = opt.state_dict()
    params = [array.copy() for array in opt.params]
    delays = random.Random(0)
    before = signal.signal(signal.SIGALRM, interrupt)
    hits = 0
    try:
        for tries in range(5000):  # where a machine is busy few signals come in time
            if tries >= 60 and hits > 20:
                break
            try:
                signal.setitimer(signal.ITIMER_REAL, delays.uniform(2e-5, 2e-3))
                for t in range(opt.t, last):
                    opt.step(grads[t % 3])
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interruption:
                hits += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert everything(opt) == steps[opt.t]
            if opt.t == last:
                opt.load_state_dict(begin)
                for own, old in zip(opt.params, params, strict=True):
                    own[...] = old
    finally:
        signal.signal(signal.SIGALRM, before)
    assert hits > 20


def interrupt(*_: object) -> None:
    raise Interruption


def finalizes(frame: FrameType | None) -> bool:
    """Whether an object is being finalized: Python itself takes what is raised there, and nobody sees it."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def instructions(function: Callable[[], Any], at: int) -> int:
    """Call a function, and raise an Interruption at an instruction of the package; how many it had."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE) or finalizes(frame):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            count += 1
            if count == at:
                raise Interruption
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


OFTEN = 40 if FULL else 8  # at how many places a step is interrupted, and at how many of the last
HOWS: list[dict[str, Any]] = [{}, {"zero_grads": True}, {"skip_nonfinite": True}]


def cases() -> Iterator[Any]:
    for target in TARGETS:
        for make in MAKERS:
            for dtypes in ("f", "fd") if target == "c" else ("fd",):
                for how in HOWS if (target, make) == ("c", made) else HOWS[1:2]:
                    name = "-".join([target, make.__name__, dtypes, *how])
                    yield pytest.param(target, make, dtypes, how, id=name)


@pytest.mark.parametrize(("target", "make", "dtypes", "how"), list(cases()))
@pytest.mark.parametrize("first", [True, False])
def test_no_instruction_leaves_half_a_step(
    target: str, make: Callable[..., of.Optimizer], dtypes: str, how: dict[str, Any], first: bool
) -> None:
    opt, other = (make(target, dtypes, 5, **how) for _ in range(2))
    grads = [arrays(dtypes, 5, 1), arrays(dtypes, 5, 2)]
    gradients = [arrays(dtypes, 5, 1), arrays(dtypes, 5, 2)]

    def refill() -> None:
        for own, old in zip([*grads[0], *grads[1]], [*gradients[0], *gradients[1]], strict=True):
            own[...] = old

    if not first:
        opt.step(grads[0])
        other.step([g.copy() for g in gradients[0]])
    refill()
    before, saved = everything(opt), opt.state_dict()
    params = [array.copy() for array in opt.params]
    other.step([g.copy() for g in grads[1]])
    after = everything(other)
    opt.step(grads[1])  # what is made once is there from here on
    assert everything(opt) == after

    def back() -> None:
        opt.load_state_dict(saved)
        for own, old in zip(opt.params, params, strict=True):
            own[...] = old
        refill()
        assert everything(opt) == before

    back()
    number = instructions(lambda: opt.step(grads[1], stats=True), 0)
    assert everything(opt) == after
    # Some of all, and those around the end, where the step is done and the caller does not know it yet.
    places = sorted({*range(1, number + 1, number // OFTEN + 1), *range(max(number - OFTEN, 1), number + 1)})
    outcomes = set()
    for at in places:
        back()
        with contextlib.suppress(Interruption):
            instructions(lambda: opt.step(grads[1], stats=True), at)
        if target == "cuda" and is_unfinished(opt):
            outcomes.add("half")
            continue
        found = everything(opt)
        assert found in (before, after), at
        zeroed = bits(grads[1]) == bits([np.zeros_like(g) for g in grads[1]])
        assert zeroed == (how == {"zero_grads": True} and found == after)
        outcomes.add("before" if found == before else "after")
        if found == before:
            opt.step(grads[1])
            assert everything(opt) == after, at
    assert outcomes == {"before", "after"} | ({"half"} if target == "cuda" else set())


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("target", HOST_TARGETS)
def test_no_instruction_parts_a_tensors_count_from_its_elements(target: str, make: Callable[..., of.Optimizer]) -> None:
    """One tensor comes late, another is missing: the step has other tensors than the one before."""
    opt, other = (make(target, "fdf", 5) for _ in range(2))
    first, second, third = arrays("fdf", 5, 1)
    given = [[first, second, None], [first, None, third]]
    begin, params = opt.state_dict(), [array.copy() for array in opt.params]
    outcomes = []
    for grads in given:
        other.step(grads)
        outcomes.append(everything(other))
    assert [bits(opt.state_dict())["steps"] for opt in (opt, other)] == [[0, 0, 0], [2, 1, 1]]

    def back() -> None:
        opt.load_state_dict(begin)
        for own, old in zip(opt.params, params, strict=True):
            own[...] = old
        opt.step(given[0])
        assert everything(opt) == outcomes[0]

    back()
    number = instructions(lambda: opt.step(given[1]), 0)
    found = set()
    for at in sorted({*range(1, number + 1, number // OFTEN + 1), *range(max(number - OFTEN, 1), number + 1)}):
        back()
        with contextlib.suppress(Interruption):
            instructions(lambda: opt.step(given[1]), at)
        found.add(outcomes.index(everything(opt)))
        if everything(opt) == outcomes[0]:
            opt.step(given[1])
            assert everything(opt) == outcomes[1], at
    assert found == {0, 1}


def is_unfinished(opt: of.Optimizer) -> bool:
    """Whether an optimizer says that it was interrupted, everywhere where it has to."""
    try:
        opt.state_dict()
    except InterruptedStep:
        for function in (lambda: opt.t, lambda: opt.save("nowhere"), lambda: opt.step([None] * len(opt.params))):
            with pytest.raises(InterruptedStep, match="load_state_dict"):
                function()
        assert "t=?" in repr(opt)
        return True
    return False


@pytest.mark.parametrize("target", TARGETS)
def test_an_interrupted_load_is_said_until_there_is_a_whole_one(target: str) -> None:
    opt = made(target, "fd", 5)
    opt.step(arrays("fd", 5, 1))
    saved, wanted = opt.state_dict(), everything(opt)
    opt.step(arrays("fd", 5, 2))
    number = instructions(lambda: opt.load_state_dict(saved), 0)
    half = 0
    for at in range(number, 1, -(number // 50 + 1)):
        try:
            instructions(lambda: opt.load_state_dict(saved), at)
        except Interruption:
            half += is_unfinished(opt)
    assert half > 0
    opt.load_state_dict(saved)
    assert bits(opt.state_dict()) == {key: value for key, value in wanted.items() if key != "params"}
