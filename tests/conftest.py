"""What all tests share: a cache of their own, and the compilers of this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

REQUIRED = os.environ.get("OPTFORGE_TEST_REQUIRE", "").split()
COMPILERS = ("gcc", "clang")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Kernels of a test run are compiled once, and not into the user's cache."""
    directory = tmp_path_factory.mktemp("cache")
    directory.chmod(0o700)
    before = os.environ.get("OPTFORGE_CACHE_DIR")
    os.environ["OPTFORGE_CACHE_DIR"] = str(directory)
    yield directory
    if before is None:
        del os.environ["OPTFORGE_CACHE_DIR"]
    else:
        os.environ["OPTFORGE_CACHE_DIR"] = before


def require(compiler: str) -> str:
    """A compiler's path; the test is skipped without it, or fails where it is required."""
    path = shutil.which(compiler)
    if path is None:
        if compiler in REQUIRED:
            pytest.fail(f"{compiler} is required here and is not installed")
        pytest.skip(f"{compiler} is not installed")
    return path
