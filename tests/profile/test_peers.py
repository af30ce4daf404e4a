"""Others compute the same before they are timed; one that does not is not timed, and the exit code is 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import optforge as of
from amount import FULL
from optforge.profile import machine, models, peers
from optforge.profile.peers import loops, side

# Each is compiled; the long run has all.
RULES = [*of.rules] if FULL else ["nesterov", "lamb"]
MODEL = models.Model("some", [(33, 7), (1000,), (1,)])


def stand_in(rule: of.Rule) -> Any:
    """What peers look at of a compiled kernel."""

    class Own:
        pass

    own = Own()
    own.rule = rule  # type: ignore[attr-defined]
    return own


def problem(rule: of.Rule, threads: int | None = None, **settings: Any) -> side.Problem:
    return peers.problem(stand_in(rule), settings, MODEL, threads or machine.cores())


def apart(rule: of.Rule, name: str, **settings: Any) -> dict[str, float]:
    made = problem(rule, **settings)
    ours = loops.Ours(made)
    side.first_steps(ours)
    return {other.name: side.agree(made, ours, other) for other in peers.PEERS[name].sides(made)}


@pytest.mark.parametrize("name", RULES)
def test_numpy_agrees(name: str) -> None:
    [off] = apart(of.rules[name], "numpy").values()
    assert off <= 1


@pytest.mark.parametrize("name", RULES)
def test_pytorch_agrees(name: str) -> None:
    """Its own optimizers, or the rule's text on its tensors; the latter have no step that is fused."""
    pytest.importorskip("torch")
    found = apart(of.rules[name], "torch")
    own = {"adam": 3, "adamw": 3, "sgd": 3, "momentum": 3, "nesterov": 3, "adagrad": 3, "rmsprop": 2, "adadelta": 2}
    assert len(found) == own.get(name, 1) and all(off <= 1 for off in found.values())


def test_pytorch_clips_as_we_do() -> None:
    pytest.importorskip("torch")
    rule = of.clip_by_global_norm(max_norm=0.01) >> of.rules.adamw
    assert [*apart(rule, "torch")] == ["torch fused", "torch foreach", "torch for-loop"]


def test_a_rule_of_the_same_name_is_no_built_in(tmp_path: Any) -> None:
    """It is its formula that counts."""
    pytest.importorskip("torch")
    (tmp_path / "own.py").write_text(
        "from optforge import rule\n@rule\ndef adamw(p, g, *, lr=0.1):\n    p = p - lr * g * g\n    return p\n"
    )
    assert [*apart(of.Rule.from_file(tmp_path / "own.py", "adamw"), "torch")] == ["torch, the rule's text"]


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "adadelta", "adagrad", "momentum"] if FULL else ["adamw"])
def test_optax_agrees(name: str) -> None:
    pytest.importorskip("optax")
    assert all(off <= 1 for off in apart(of.rules[name], "optax").values())


@pytest.mark.parametrize("name", [*loops.LOOPS] if FULL else ["adamw"])
def test_numba_agrees(name: str) -> None:
    pytest.importorskip("numba")
    assert all(off <= 1 for off in apart(of.rules[name], "numba").values())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda p: np.multiply(p, np.float32(1.0001), out=p),
        lambda p: p.__setitem__(..., np.where(np.arange(p.size).reshape(p.shape) == p.size - 1, np.nan, p)),
        lambda p: p.__setitem__(..., 0),
    ],
)
def test_something_else_is_not_timed(wrong: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A note, which the command ends with exit code 1 for, and no figures."""
    step = loops.Plain.step

    def other(self: loops.Plain) -> None:
        step(self)
        wrong(self.arrays[1])

    monkeypatch.setattr(loops.Plain, "step", other)
    monkeypatch.setattr(peers, "turns", lambda *_: pytest.fail("it is timed"))
    plan = peers.Plan(stand_in(of.rules.adamw), {}, MODEL, 1, 1.0)
    notes: list[str] = []
    assert not [*peers.compare(plan, {"numpy": peers.PEERS["numpy"]}, 0.1, notes.append, {"cores": 2})]
    assert notes and notes[0].startswith(peers.DIFFER) and "it was not timed" in notes[0]


def test_what_rounding_explains() -> None:
    """Four units in the last place, or a ten-thousandth of the farthest move; no more, and no NaN."""
    made = problem(of.rules.sgd)
    own = [p - np.float32(0.01) for p in made.params]

    def with_error(relative: float, absolute: float) -> float:
        return side.difference(made, own, [(p * (1 + relative) + absolute).astype(np.float32) for p in own])

    assert side.difference(made, own, own) == 0
    assert with_error(0, 0.5e-6) < 1 < with_error(0, 2e-6)
    assert side.difference(made, own, [np.full_like(p, np.nan) for p in own]) == np.inf


def test_renewed_gradients_are_other_objects() -> None:
    """Those of NumPy over the same memory, those of PyTorch over other memory where they are small."""
    made = problem(of.rules.sgd)
    ours = loops.Ours(made)
    before = ours.grads
    ours.renew()
    assert all(a is not b and np.shares_memory(a, b) for a, b in zip(before, ours.grads, strict=True) if a.size)
    torch = pytest.importorskip("torch")
    from optforge.profile.peers import pytorch

    tensors = pytorch.Ours(made)
    first = [p.grad for p in tensors.tensors]
    tensors.renew()
    second = [p.grad for p in tensors.tensors]
    assert all(a is not b and torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[1].data_ptr() != second[1].data_ptr()


def test_conditions_that_jax_cannot_trace() -> None:
    pytest.importorskip("jax")
    with pytest.raises(side.NoPeer, match="when it traces"):
        peers.PEERS["optax"].sides(problem(of.rules.lamb))


def test_threads_that_a_library_does_not_take() -> None:
    pytest.importorskip("jax")
    with pytest.raises(side.NoPeer, match="all"):
        peers.PEERS["optax"].sides(problem(of.rules.adamw, machine.cores() + 1))


@pytest.mark.parametrize("rule", [of.rules.adamw, of.clip_by_global_norm(max_norm=0.01) >> of.rules.adamw])
def test_phases_agree(rule: of.Rule) -> None:
    """Unscaled, clipped and stepped; every side spends its gradients and gets them again."""
    pytest.importorskip("torch")
    from optforge.profile.peers import phase

    made = problem(rule)
    notes: list[str] = []
    found = peers.agreeing(made, phase.Ours(made), [("torch", phase.sides)], notes.append)
    assert [*found] == ["torch fused", "torch fused, folded", "torch foreach"] and not notes
