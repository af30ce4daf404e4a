"""The page on JAX, run as it stands there."""

from __future__ import annotations

import linecache
from pathlib import Path
from typing import Any

import pytest

from conftest import require_jax
from pages import PAGES, python_blocks

jax = require_jax()
pytest.importorskip("optax")
PAGE = PAGES / "jax.md"


def test_the_page_runs(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    for k, text in enumerate(python_blocks(PAGE)):
        path = str(tmp_path / f"jax-{k}.py")
        Path(path).write_text(text)
        linecache.checkcache(path)
        exec(compile(text, path, "exec"), names)
        if k == 1:  # a hundred steps in place, from a loss of 1
            assert float(names["loss"](names["params"], names["x"], names["y"])) < 0.05
    assert names["lion"].generate("c")
    assert float(names["state"].state["acc"]["w"][0, 0]) == pytest.approx(0.1)
