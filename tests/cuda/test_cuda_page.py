"""The Python of the page on CUDA, run as it stands there on the emulated device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import require
from pages import PAGES, python_blocks
from places import GENERATOR

BEFORE = """
import numpy as np
import optforge as of
parameters = [np.ones(1000, np.float32)]
gradients = [np.full(1000, 0.5, np.float32)]
"""
BEHIND = """
same = [np.ones(1000, np.float32)]
of.Optimizer(same, "adamw", target="numpy", lr=3e-4).step(gradients)
assert np.array_equal(parameters[0], same[0])
"""


@pytest.mark.skipif(not os.environ.get("OPTFORGE_TEST_FULL"), reason="takes long; set OPTFORGE_TEST_FULL=1")
def test_the_page_runs(emulated_cuda: dict[str, str], tmp_path: Path) -> None:
    require("pycuda")
    (block,) = python_blocks(PAGES / "cuda.md")
    (tmp_path / "page.py").write_text(BEFORE + block + BEHIND)
    environment = {**os.environ, **emulated_cuda, "OPTFORGE_CACHE_DIR": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(GENERATOR), emulated_cuda.get("PYTHONPATH")]))
    (tmp_path / "cache").mkdir(mode=0o700)
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
