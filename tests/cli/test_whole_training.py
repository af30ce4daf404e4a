"""The whole training that the documentation shows, run as it stands there, stopped, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optimizing import bits
from pages import PAGES, python_blocks

pytest.importorskip("matplotlib")
PAGE = PAGES / "checkpoints.md"


def whole_training() -> str:
    """Its text."""
    (text,) = (block for block in python_blocks(PAGE) if "Progress" in block)
    return text


def run(text: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a text in a directory; what it has bound."""
    directory.mkdir(exist_ok=True)
    monkeypatch.chdir(directory)
    names: dict[str, Any] = {}
    exec(text, names)
    return names


def test_the_whole_training_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = whole_training()
    assert "< 20:" in text
    straight = run(text, tmp_path / "straight", monkeypatch)
    run(text.replace("< 20:", "< 8:"), tmp_path / "stopped", monkeypatch)
    resumed = run(text, tmp_path / "stopped", monkeypatch)
    assert straight["opt"].t == resumed["opt"].t == 20 * 64
    assert bits([straight["weights"], straight["bias"]]) == bits([resumed["weights"], resumed["bias"]])
    rates = [[group["lr"] for group in names["opt"].groups] for names in (straight, resumed)]
    assert rates[0] == rates[1]
    assert rates[0][0] < 1e-2  # the plateau has done something
    assert straight["plateau"].state_dict() == resumed["plateau"].state_dict()
    logs = [(tmp_path / name / "run.csv").read_text().splitlines() for name in ("straight", "stopped")]
    assert len(logs[0]) == len(logs[1]) == 1 + 1 + 20  # the head, step 1 and a row for each epoch
    assert (tmp_path / "stopped" / "run.png").exists()
