"""Transforms before rules: bits of parameters, state and statistics against oracles composed by hand."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from amount import some
from conftest import require
from data import same
from native import defaults
from optimizing import TARGETS
from oracles import names, oracle
from stepping import SIZES, Beside, composed

TRANSFORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "threshold": ("clip_by_global_norm", {"max_norm": 20.0, "form": "threshold"}),
    "pytorch": ("clip_by_global_norm", {"max_norm": 21.5, "form": "pytorch"}),
    "lasagne": ("clip_by_global_norm", {"max_norm": 19.3, "form": "lasagne"}),
    "clip_by_norm": ("clip_by_norm", {"max_norm": 2.3}),
    "clip_by_value": ("clip_by_value", {"max_value": 0.37}),
    "add_weight_decay": ("add_weight_decay", {"weight_decay": 0.3}),
    "decoupled_weight_decay": ("decoupled_weight_decay", {"weight_decay": 0.7}),
    "centralize": ("centralize", {}),
}
CHAINS: list[tuple[tuple[str, ...], str]] = [
    (("threshold", "add_weight_decay"), "sgd"),
    (("add_weight_decay", "threshold"), "sgd"),
    (("centralize", "clip_by_norm"), "novograd"),
    (("clip_by_value", "pytorch"), "lamb"),
    (("centralize", "clip_by_norm", "decoupled_weight_decay"), "adam"),
    (("decoupled_weight_decay", "clip_by_value", "centralize"), "momentum"),
    (("clip_by_value", "centralize", "lasagne"), "lars"),
    (("clip_by_value", "threshold", "centralize"), "novograd"),
]


def fits(transform: str, rule: str) -> bool:
    """Whether no name of theirs clashes."""
    return not TRANSFORMS[transform][1].keys() & oracle(rule).HYPERPARAMETERS.keys()


PAIRS = some([(t, r) for t, r in itertools.product(TRANSFORMS, names()) if fits(t, r)], 3)


Compiled = dict[tuple[tuple[str, ...], str], Future[None]]


def compiling(pool: ThreadPoolExecutor, wanted: list[tuple[tuple[str, ...], str]]) -> Compiled:
    """Fill the cache with kernels, while tests are already running."""

    def one(case: tuple[tuple[str, ...], str]) -> None:
        chain, rule = case
        of.Optimizer([np.zeros(1)], composed([TRANSFORMS[t] for t in chain], rule))

    return {case: pool.submit(one, case) for case in wanted}


@pytest.fixture(scope="module")
def chains() -> Iterator[Compiled]:
    """The kernels of all chains."""
    with ThreadPoolExecutor(2) as pool:
        yield compiling(pool, CHAINS)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    """The kernels of all pairs, from a compiler that is quick and does not optimise.

    Which code a compiler makes of a kernel is not the question here, and there are many kernels.
    """
    before = os.environ.get("CC")
    script = tmp_path_factory.mktemp("quick") / "cc"
    script.write_text(f'#!/bin/sh\nexec {require("gcc")} "$@" -O0\n')
    script.chmod(0o755)
    os.environ["CC"] = str(script)
    pool = ThreadPoolExecutor(2)
    try:
        yield compiling(pool, [((t,), r) for t, r in PAIRS])
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["CC"]
        else:
            os.environ["CC"] = before


def check(chain: tuple[str, ...], rule: str, sizes: Sequence[int] = SIZES, **arguments: Any) -> None:
    """Steps of which the first clips and the second does not, one without some gradients, one unscaled."""
    beside = Beside([TRANSFORMS[t] for t in chain], rule, oracle(rule).SETTINGS[0], sizes, **arguments)
    beside.step(beside.gradients())
    grads = beside.gradients(1e-3)
    for k in (0, 4, len(sizes) - 2):
        grads[k] = None
    beside.step(grads)
    beside.step([None if g is None else g * g.dtype.type(3.7) for g in beside.gradients()], grad_scale=3.7)


def test_all_transforms_are_here() -> None:
    assert {name for name, _ in TRANSFORMS.values()} == set(of.transforms)
    forms = {settings["form"] for name, settings in TRANSFORMS.values() if name == "clip_by_global_norm"}
    assert forms == set((of.clip_by_global_norm >> of.rules.sgd).accepts("form"))


@pytest.mark.parametrize(
    ("chain", "rule"), CHAINS, ids=lambda value: value if isinstance(value, str) else ">>".join(value)
)
def test_chains(chain: tuple[str, ...], rule: str, chains: Compiled) -> None:
    """Several transforms, compiled as usual, all in one dtype and mixed."""
    chains[chain, rule].result()
    check(chain, rule)
    sizes = (33, 32769, 0, 2000, 1)
    for dtype in (np.float32, np.float64):
        beside = Beside([TRANSFORMS[t] for t in chain], rule, oracle(rule).SETTINGS[1], sizes, [dtype] * len(sizes))
        beside.step(beside.gradients())
        beside.step([None if k == 1 else g for k, g in enumerate(beside.gradients(0.1))], grad_scale=1 / 1024)


def test_the_order_matters() -> None:
    """Decay behind the clipping is not clipped."""
    results = []
    for chain in (("threshold", "add_weight_decay"), ("add_weight_decay", "threshold")):
        beside = Beside([TRANSFORMS[t] for t in chain], "sgd", {"lr": 0.1}, (5000,), [np.float64])
        beside.step(beside.gradients(100.0))
        results.append(beside)
    assert not same(results[0].params[0], results[1].params[0])


@pytest.mark.parametrize("target", TARGETS)
def test_the_threshold_is_reached_by_equality(target: str) -> None:
    """A norm of exactly max_norm is scaled by 1, which changes nothing, not even a NaN elsewhere."""
    for norm, expected in ((5.0, [3.0, 4.0]), (2.5, [1.5, 2.0]), (10.0, [3.0, 4.0])):
        g = np.array([3.0, 4.0])
        p = np.zeros(2)
        optimizer = of.Optimizer([p], of.clip_by_norm >> of.rules.sgd, target=target, lr=-1.0, max_norm=norm)
        told = optimizer.step([g], stats=True)
        assert p.tolist() == expected
        assert (told.grad_norm, told.clipped_grad_norm) == (5.0, min(norm, 5.0))


@pytest.mark.parametrize("target", TARGETS)
def test_clipping_by_value_keeps_nan(target: str) -> None:
    p, g = np.zeros(5, np.float32), np.array([np.nan, np.inf, -np.inf, 0.25, -0.0], np.float32)
    of.Optimizer([p], of.clip_by_value >> of.rules.sgd, target=target, lr=-1.0, max_value=0.5).step([g])
    assert same(p, np.array([np.nan, 0.5, -0.5, 0.25, 0.0], np.float32))


def test_defaults_of_a_configured_transform() -> None:
    """A setting is the composition's default, and its attribute; the transform itself keeps its own."""
    clip = of.clip_by_global_norm(max_norm=2.5, form="pytorch")
    made = clip >> of.rules.adam
    assert made.hyperparameters["max_norm"] == 2.5
    assert made.options == {"form": "pytorch"}
    assert of.clip_by_global_norm.hyperparameters == {"max_norm": 50.0}
    optimizer = of.Optimizer([np.zeros(3)], made, target="numpy")
    assert (optimizer.max_norm, optimizer.form) == (2.5, "pytorch")
    assert of.Optimizer([np.zeros(3)], made, target="numpy", max_norm=9.0, form="lasagne").form == "lasagne"
    again = clip(max_norm=7.0) >> of.rules.adam
    assert (again.hyperparameters["max_norm"], again.options["form"]) == (7.0, "pytorch")
    assert again.name == made.name == "clip_by_global_norm_adam"
    assert list(again.state) == ["m", "v"]
    assert list(again.hyperparameters) == [*of.rules.adam.hyperparameters, "max_norm"]


def test_a_hyperparameter_changes_between_steps() -> None:
    beside = Beside([TRANSFORMS["clip_by_norm"]], "sgd", {"lr": 0.1}, (70, 5), [np.float32, np.float64])
    beside.step(beside.gradients())
    for optimizer in beside.optimizers.values():
        optimizer.max_norm = 0.01
    beside.chain[0][1]["max_norm"] = 0.01
    beside.step(beside.gradients())


def test_emitted_defaults_are_the_settings(tmp_path: Path) -> None:
    """A committed kernel of a composition is taken, and has the defaults that were chosen."""
    from optforge.engines.c.engine import CTarget

    made = of.clip_by_global_norm(max_norm=2.5) >> of.rules.sgd
    files = made.generate()
    assert defaults(files["clip_by_global_norm_sgd.c"])["max_norm"] == 2.5
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    p, q = np.ones(40), np.ones(40)
    g = np.arange(40.0)
    of.Optimizer([p], made, target=CTarget(tmp_path)).step([g])
    of.Optimizer([q], made, target="numpy").step([g])
    assert same(p, q)


@pytest.mark.parametrize(("transform", "rule"), PAIRS)
def test_every_transform_before_every_rule(transform: str, rule: str, quick: Compiled) -> None:
    """Lists of float32 and float64, of sizes around the borders of lanes, leaves and chunks, half of the large ones."""
    quick[(transform,), rule].result()
    number = PAIRS.index((transform, rule))
    check((transform,), rule, [n for n in SIZES if n < 30_000 or (n > 32_768) == number % 2], seed=number)
