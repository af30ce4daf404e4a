"""The demonstration, in short."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

import optforge as of
from optforge.write import write_all

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def short_run(rules: list[str], directory: Path, kernels: Path | None = None) -> tuple[list[int | None], str]:
    """Where each rule first differs, and what was printed."""
    from optforge.demo import run

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


def test_a_changed_default_shows(tmp_path: Path) -> None:
    """One default of an emitted kernel, changed by hand."""
    files = of.rules["adagrad"].generate()
    assert "h->eps = 1e-6;" in files["adagrad.c"]
    files["adagrad.c"] = files["adagrad.c"].replace("h->eps = 1e-6;", "h->eps = 2e-6;")
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
