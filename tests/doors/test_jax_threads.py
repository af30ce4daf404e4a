"""The handlers that XLA calls, called by stand-ins for XLA: with its threads under the sanitizers, and on a late device."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import optforge as of
from conftest import require, require_jax
from emulation import link_emulated
from optforge.core import formats
from optforge.core.dtypes import DTYPES
from places import TESTS

jax = require_jax()

from optforge.jax import xla  # noqa: E402

SANITIZERS = ("thread", "address,undefined")
FLAGS = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-g", "-O1")


def lay_out(platform: str, stand_in: str, directory: Path) -> None:
    """Write a stand-in, and the handler of AdamW with all that it includes."""
    kernel = of.rules.adamw.kernel()
    files = xla.sources(xla.PLATFORMS[platform], of.rules.adamw, (), [formats.plain(DTYPES["f32"], kernel.arrays)])
    for own in (TESTS / stand_in, TESTS / "runtime" / "xla-frame.h"):
        files[own.name] = own.read_text(encoding="utf-8")
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")


def on_threads(directory: Path, flags: Sequence[str]) -> Path:
    """The stand-in for XLA on the CPU."""
    lay_out("cpu", "runtime/xla.c", directory)
    sources = ["xla.c", "adamw.c", "optforge.c", "-o", "xla", "-lm", "-lpthread"]
    built = subprocess.run([require("gcc"), *FLAGS, *flags, *sources], cwd=directory, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return directory / "xla"


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_shares_on_threads_of_others(sanitizer: str, tmp_path: Path) -> None:
    program = on_threads(tmp_path, [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"])
    said = {}
    for arguments in ("1", "2", "4", "0", "4 refused", "1 told", "4 told"):
        run = subprocess.run([program, *arguments.split()], capture_output=True, text=True)
        assert (run.returncode, run.stderr) == (0, ""), arguments
        said[arguments] = run.stdout.split()
    assert len({bits for bits, _, _ in said.values()}) == 1
    assert [arguments for arguments, (_, told, _) in said.items() if told == "1"] == ["1 told", "4 told"]
    assert [arguments for arguments, (_, _, helped) in said.items() if helped == "1"] == ["2", "4", "4 told"]


LATER = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).run(int(sys.argv[2]), int(sys.argv[3])))"


def test_a_gpu_that_comes_late_has_the_bits_of_the_cpu(tmp_path: Path) -> None:
    """Nothing of a call is read when it is over, and nothing of a step before its turn in the stream."""
    require("g++")
    directories = tmp_path / "cpu", tmp_path / "gpu"
    for directory in directories:
        directory.mkdir()
    program = on_threads(directories[0], [])
    lay_out("cuda", "emulation/xla_later.cu", directories[1])
    flags = ["-O1", f"-I{directories[1]}"]
    library = link_emulated([directories[1] / "xla_later.cu"], directories[1] / "later.so", flags)
    expected = subprocess.run([program, "1"], capture_output=True, text=True, check=True).stdout.split()[0]
    for every, told in ((0, 0), (1, 0), (0, 1), (1, 1)):
        command = [sys.executable, "-c", LATER, str(library), str(every), str(told)]
        run = subprocess.run(command, capture_output=True, text=True)
        assert (run.returncode, run.stderr) == (0, ""), (every, told)
        assert run.stdout.split() == [expected, str(told), "0"] * 2
