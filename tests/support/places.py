"""Where the checkout has what tests look at."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
GENERATOR = ROOT / "generator"
