"""The demonstration, in short."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import optforge as of
from optforge import Optimizer, ReduceLROnPlateau
from optforge.cli.write import write_all
from optforge.train import checkpoint

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def short_run(rules: list[str], directory: Path, kernels: Path | None = None) -> tuple[list[int | None], str]:
    """Where each rule first differs, and what was printed."""
    from optforge.cli.demo import run

    printed = io.StringIO()
    console = Console(file=printed, width=200)
    results = run(rules, epochs=1, seed=1, picture=directory / "demo.png", kernels=kernels, console=console)
    return [result.first_difference for result in results], printed.getvalue()


def test_trajectories_are_bit_identical(tmp_path: Path) -> None:
    differs, printed = short_run(["sgd", "adam"], tmp_path)
    assert differs == [None, None]
    assert "sgd: bit-identical" in printed
    assert "adam: bit-identical" in printed
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its place cannot be is said before training; what happens later names the picture."""
    demo = importlib.import_module("optforge.cli.demo")  # the command has the same name
    from optforge.core import atomic
    from optforge.train import pictures

    with monkeypatch.context() as changed:
        changed.setattr(demo, "train", lambda *_, **__: pytest.fail("it trains"))
        changed.setattr(pictures.os, "access", lambda path, mode: False)
        with pytest.raises(PermissionError, match="where the plot is to go, may not be written"):
            short_run(["sgd"], tmp_path)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(atomic, "synchronise", full)
    with pytest.raises(OSError, match=r"No space left on device; .*'.*/demo\.png'$") as raised:
        short_run(["sgd"], tmp_path)
    assert raised.value.filename == str(tmp_path / "demo.png")


def test_a_changed_default_shows(tmp_path: Path) -> None:
    """One default of an emitted kernel, changed by hand."""
    files = of.rules["adagrad"].generate()
    kept = "adagrad_defaults[] = {0.01, 1e-6};"
    assert kept in files["adagrad.c"]
    files["adagrad.c"] = files["adagrad.c"].replace(kept, kept.replace("1e-6", "2e-6"))
    list(write_all(tmp_path, files))
    differs, _ = short_run(["adagrad"], tmp_path, kernels=tmp_path)
    assert differs == [1]


def test_a_changed_constant_shows(tmp_path: Path) -> None:
    """One constant of an emitted kernel, changed by hand."""
    files = of.rules["adagrad"].generate()
    kept = "p = p - lr / sqrtf(acc + eps) * g;"
    assert kept in files["adagrad.c"]
    files["adagrad.c"] = files["adagrad.c"].replace(kept, "p = p - lr / sqrtf(acc + eps) * g * 1.0000001f;")
    list(write_all(tmp_path, files))
    differs, printed = short_run(["adagrad"], tmp_path, kernels=tmp_path)
    assert differs == [1]
    assert "differs" in printed


def short_training(directory: Path, **arguments: object) -> tuple[Any, str]:
    """The outcome of the training that is resumed, and what was printed."""
    from optforge.cli.demo_training import run

    printed = io.StringIO()
    console = Console(file=printed, width=200)
    outcome = run(seed=1, picture=directory / "new" / "training.png", console=console, **arguments)
    return outcome, printed.getvalue()


def test_a_resumed_training_ends_in_the_same_bits(tmp_path: Path) -> None:
    outcome, printed = short_training(tmp_path, epochs=3)
    assert outcome.passed
    assert outcome.differences == {"c": (), "numpy": ()}
    assert len(outcome.losses) == 3
    assert outcome.losses[-1] < outcome.losses[0]
    assert printed.count("ends in the same bits") == 2
    assert "resumed after epoch 1 of 3" in printed
    assert (tmp_path / "new" / "training.png").read_bytes().startswith(b"\x89PNG")
    again, _ = short_training(tmp_path, epochs=3)
    assert again == outcome


def test_one_epoch_is_made_two(tmp_path: Path) -> None:
    outcome, printed = short_training(tmp_path, epochs=1)
    assert outcome.passed
    assert "resumed after epoch 1 of 2" in printed


def test_what_is_not_restored_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of the state, or the plateau, that a resumed training does not take over."""
    load = ReduceLROnPlateau.load_state_dict
    with monkeypatch.context() as changed:
        changed.setattr(ReduceLROnPlateau, "load_state_dict", lambda self, saved: load(self, saved | {"best": 1e-9}))
        outcome, printed = short_training(tmp_path, epochs=2)
    assert not outcome.passed
    assert outcome.differences == {"c": ("plateau",), "numpy": ("plateau",)}
    assert "differs in plateau" in printed

    def load_nearly(self: Optimizer, *arguments: Any, **named: Any) -> None:
        checkpoint.load(self, *arguments, **named)
        self.state["m"][-1].view("u4")[0] ^= 1 << 20

    monkeypatch.setattr(Optimizer, "load", load_nearly)
    outcome, _ = short_training(tmp_path, epochs=2)
    assert not outcome.passed
    assert "state m" in outcome.differences["c"]
    assert "parameters" in outcome.differences["numpy"]
