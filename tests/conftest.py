"""What all tests share: a cache of their own, and the compilers of this machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from compiling import STORE
from emulation import build_driver, environment, write_nvcc

REQUIRED = os.environ.get("OPTFORGE_TEST_REQUIRE", "").split()
COMPILERS = ("gcc", "clang")


@pytest.fixture(scope="session", autouse=True)
def cache() -> Iterator[Path]:
    """Kernels of a test run are compiled once, and not into the user's cache."""
    directory = STORE / "kernels"
    directory.mkdir(mode=0o700, exist_ok=True)
    before = os.environ.get("OPTFORGE_CACHE_DIR")
    os.environ["OPTFORGE_CACHE_DIR"] = str(directory)
    yield directory
    if before is None:
        del os.environ["OPTFORGE_CACHE_DIR"]
    else:
        os.environ["OPTFORGE_CACHE_DIR"] = before


@pytest.fixture(scope="session")
def emulated_cuda(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which the driver and nvcc are emulated."""
    require("g++")
    directory = tmp_path_factory.mktemp("emulated_cuda")
    build_driver(directory)
    write_nvcc(directory)
    return environment(directory)


def require(tool: str) -> str:
    """Where a compiler, PyCUDA or PyTorch is; the test is skipped without it, or fails where it is required."""
    path = shutil.which(tool)
    if tool in ("pycuda", "torch") and (package := importlib.util.find_spec(tool)):
        path = package.origin
    if path is None:
        missing(tool)
    return path


def require_torch() -> Any:
    """PyTorch, which tests take as an oracle; the test is skipped without it, or fails where it is required."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own, at the import
            import torch
    except ImportError:
        missing("torch")
    return torch


def require_jax(*also: str) -> Any:
    """JAX, and what else is needed beside it (optax); the test is skipped without, or fails where it is required."""
    for name in ("jax", *also):
        if importlib.util.find_spec(name) is None:
            missing(name)
    import jax

    return jax


def missing(what: str) -> NoReturn:
    """Skip the test that needs what is not here, or fail where OPTFORGE_TEST_REQUIRE lists it."""
    if what in REQUIRED:
        pytest.fail(f"{what} is required here and is not installed")
    pytest.skip(f"{what} is not installed", allow_module_level=True)
