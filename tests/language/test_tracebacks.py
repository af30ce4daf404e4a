"""What a user sees of a mistake, and of a rule: short tracebacks, its own signature and text."""

from __future__ import annotations

import inspect
import pydoc
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from optimizing import brittle, nadam

PACKAGE = str(Path(of.__file__).parent)


@of.rule
def broken(p, g, *, lr=0.1):
    p = p - lr * gg  # noqa: F821
    return p


def made(**how: Any) -> of.Optimizer:
    return of.Optimizer([np.ones(2)], "adam", target="numpy", **how)


def assign() -> None:
    made().lr = "1"


def assign_to_a_group() -> None:
    made().groups[0]["beta1"] = 2.0


MISTAKES: dict[str, Callable[[], object]] = {
    "name of a rule": lambda: of.Optimizer([np.ones(2)], "adamm"),
    "text of a rule": lambda: of.Optimizer([np.ones(2)], broken),
    "text of a rule, emitted": lambda: broken.generate(),
    "text of a rule, read": lambda: broken.hash,
    "array": lambda: of.Optimizer([np.ones(2, int)], "adam"),
    "hyperparameter": lambda: made(lrr=1.0),
    "value": lambda: made(lr="1"),
    "assert": lambda: made(beta1=2.0),
    "assignment": assign,
    "assignment to a group": assign_to_a_group,
    "gradient": lambda: made().step([np.ones(3)]),
    "structure": lambda: made().step({}),
    "scalar": lambda: of.Optimizer([np.ones(2)], brittle, divisor=0.0, target="numpy").step([np.ones(2)]),
    "state dict": lambda: made().load_state_dict({}),
    "group": lambda: made().add_group({"params": []}),
    "file": lambda: of.Rule.from_file("nowhere.py", "rule"),
    "call": lambda: of.rules.adam(np.ones(2), np.ones(2), t=1, lr="1"),
    "target": lambda: of.rules.adam.generate("fortran"),
    "setting": lambda: of.clip_by_norm(max_norm="1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_the_user_s_line(name: str) -> None:
    with pytest.raises((of.OptforgeError, TypeError, ValueError)) as refusal:
        MISTAKES[name]()
    frames = traceback.extract_tb(refusal.value.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
    assert len(own) <= 3, own
    assert refusal.value.__cause__ is None
    shown = "".join(traceback.format_exception(refusal.value))
    assert shown.count("Traceback") == 1


def test_the_user_s_own_errors_stay_whole(tmp_path: Path) -> None:
    def schedule(t: int) -> float:
        return 1 / (t - 1)

    with pytest.raises(ValueError, match="division by zero") as refusal:
        made(lr=schedule)
    assert isinstance(refusal.value.__cause__, ZeroDivisionError)

    class Companion:
        def state_dict(self) -> Any:
            raise TypeError("no state")

        def load_state_dict(self, saved: Any) -> None:
            pass

    with pytest.raises(TypeError, match="no state") as failure:
        made().save(tmp_path / "run", companion=Companion())
    assert traceback.extract_tb(failure.value.__traceback__)[-1].filename == __file__


def test_everything_is_shown_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTFORGE_DEBUG", "1")
    with pytest.raises(TypeError) as refusal:
        made(lr="1")
    assert len(traceback.extract_tb(refusal.value.__traceback__)) > 4


# ── signatures ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rule_has_its_own_signature() -> None:
    adam = "(p, g, m=0.0, v=0.0, *, t, lr=0.001, beta1=0.9, beta2=0.999, eps=1e-06, lam=0.99999999)"
    for thing in (of.rules.adam, of.rules.adam.function):
        assert str(inspect.signature(thing)) == adam
    signature = inspect.signature(nadam)
    assert list(signature.parameters) == [*inspect.signature(nadam.function).parameters]
    assert signature.parameters["slow"].default == "p"
    assert signature.parameters["nesterov"].default is True
    bound = signature.bind(np.ones(2), np.ones(2), t=1, lr=0.5)
    assert nadam(*bound.args, **bound.kwargs)[0].shape == (2,)
    clipped = inspect.signature(of.clip_by_norm(max_norm=3.0) >> of.rules.sgd)
    assert str(clipped) == "(p, g, *, lr=0.01, max_norm=3.0)"
    assert str(inspect.signature(of.clip_by_norm)) == "(g, *, max_norm=1.0)"


def test_help_shows_a_rule_s_own_parameters() -> None:
    text = pydoc.render_doc(of.rules.adam, renderer=pydoc.plaintext)
    assert "adam(p, g, m=0.0, v=0.0, *, t, lr=0.001" in text
    assert "Kingma" in text
    assert "An update rule" in pydoc.render_doc(of.Rule, renderer=pydoc.plaintext)
    assert "An update rule" in (of.Rule.__doc__ or "")
    assert "A change of the gradient" in (of.Transform.__doc__ or "")


def test_a_broken_rule_can_be_looked_at() -> None:
    inspect.signature(broken)
    assert pydoc.render_doc(broken, renderer=pydoc.plaintext)
    assert not hasattr(broken, "__signature__")
