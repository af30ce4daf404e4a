"""The tests of optforge.jax with JAX on a GPU, where its arrays are of their own accord; gpu.py runs each part.

    python tests/gpu_jax.py PART

Exit codes: 0 shown, 1 something else was found, 3 this machine cannot show it; a line says which.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# A file of tests, and which of them: nvcc takes seconds for the kernels of each rule and dtype.
PARTS = {
    "bits": ("test_jax.py", "bits_of_the_reference and float32 and not eager"),
    "double": ("test_jax.py", "bits_of_the_reference and float64 and not eager"),
    "narrow": ("test_jax.py", "(narrow and adamw) or masters or (stored and composition) or dtypes or seed_alone"),
    "rest": ("test_jax.py", "schedules or hyperparameter or loss_scale or donat or nothing or vmap or empty or files"),
    "device": ("test_jax_cuda.py", ""),
    "optax": ("test_jax_optax.py", "float32 and (adam or adamw or sgd or rmsprop or lion or lamb)"),
}


class Outcomes:
    """Counts what became of tests."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("passed", "failed", "skipped"), 0)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test once: its call, or what kept it from being called."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1


def absent(part: str) -> str:
    """Why a part cannot be shown on a GPU here; empty where it can."""
    if part == "optax" and importlib.util.find_spec("optax") is None:
        return "optax is not installed"
    try:
        import jax
    except ImportError as problem:
        return f"JAX cannot be imported: {problem}"
    try:
        return "" if jax.default_backend() == "gpu" and jax.devices("cuda") else f"JAX {jax.__version__} has no GPU"
    except RuntimeError as problem:
        return f"JAX {jax.__version__} has no GPU: {' '.join(str(problem).split())}"


def main(names: list[str]) -> int:
    """The command."""
    if len(names) != 1 or names[0] not in PARTS:
        print(f"usage: gpu_jax.py PART, one of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # other processes use the device too
    reason = absent(names[0])
    if reason:
        print(f"skipped: {reason}")
        return 3
    import pytest

    file, chosen = PARTS[names[0]]
    outcomes = Outcomes()
    options = ["-q", "--tb=short", "-W", "ignore", "-p", "no:cacheprovider", "--maxfail=5", "-k", chosen]
    code = pytest.main([*options, str(HERE / "doors" / file)], plugins=[outcomes])
    said = ", ".join(f"{number} {what}" for what, number in outcomes.counts.items())
    if code != 0 or not outcomes.counts["passed"]:
        print(f"pytest ended with {int(code)}: {said}")
        return 1
    print(f"shown: {said} with JAX's arrays on the GPU")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
