"""What is taken for a number, and what is not: texts and truth values are not."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import optforge as of
from conftest import require_torch

G = [np.ones(2)]


def made(**settings: Any) -> of.Optimizer:
    return of.Optimizer([np.ones(2)], "sgd", target="numpy", **settings)


def assign(value: Any) -> None:
    made().lr = value


def in_a_group(value: Any) -> None:
    made().groups[0]["lr"] = value


WAYS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "Optimizer": ("'lr'", lambda value: made(lr=value)),
    "group": (r"^groups\[0\]: .*'lr'", lambda v: of.Optimizer([{"params": [np.ones(2)], "lr": v}], "sgd")),
    "assignment": ("'lr'", assign),
    "assignment to a group": ("'lr'", in_a_group),
    "schedule": ("'lr'", lambda value: made(lr=lambda t: value)),
    "generate": ("'lr'", lambda value: of.rules.sgd.generate(lr=value)),
    "rule": ("'lr'", lambda value: of.rules.sgd(np.ones(2), np.ones(2), lr=value)),
    "transform": ("'max_norm'", lambda value: of.clip_by_norm(max_norm=value)),
    "grad_scale": ("^grad_scale", lambda value: made().step(G, grad_scale=value)),
}
TEXTS = ["1e-3", b"1e-3", bytearray(b"1"), "1", True, False, np.True_, np.str_("2.0"), np.array(True), np.array("1")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", TEXTS, ids=repr)
def test_no_number(way: str, value: Any) -> None:
    name, function = WAYS[way]
    with pytest.raises((TypeError, ValueError), match=name):
        function(value)


@pytest.mark.parametrize("way", WAYS)
def test_a_truth_value_of_pytorch(way: str) -> None:
    torch = require_torch()
    name, function = WAYS[way]
    with pytest.raises((TypeError, ValueError), match=name):
        function(torch.tensor(True))
    function(torch.tensor(0.5))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "value",
    [1, 0.5, np.float32(0.5), np.int8(1), np.array(0.5), np.float16(0.5), Fraction(1, 2), Decimal("0.5")],
    ids=repr,
)
def test_numbers(way: str, value: Any) -> None:
    WAYS[way][1](value)


def test_the_errors_are_there_by_name() -> None:
    for name in ("UsageError", "ScalarError", "RuleError", "EnvironmentProblem", "InterruptedStep", "OptforgeError"):
        assert name in of.__all__
        assert issubclass(getattr(of, name), Exception)
    with pytest.raises(of.UsageError):
        of.Optimizer([np.ones(2)], "adamm")
