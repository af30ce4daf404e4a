"""The handler that XLA calls, called by a stand-in for XLA, under the sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import optforge as of
from conftest import require, require_jax
from optforge.emit import layout
from places import TESTS

jax = require_jax()

SANITIZERS = ("thread", "address,undefined")


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_shares_on_threads_of_others(sanitizer: str, tmp_path: Path) -> None:
    gcc = require("gcc")
    for name, text in of.rules.adamw.generate("c", ["f32"]).items():
        (tmp_path / name).write_text(text)
    own = TESTS / "runtime" / "xla.c"
    (tmp_path / "xla.c").write_text(own.read_text())
    for name in ("xla-handler.c", "xla-call.h"):
        (tmp_path / name).write_text(layout.runtime_file(name))
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    (tmp_path / "xla-c-api.h").write_text(header.read_text())
    (tmp_path / "xla-kernels.h").write_text(
        '#include "adamw.h"\nstatic const char rule_name[] = "adamw";\n'
        "static const optforge_kernel *const kernels[] = {&adamw_kernel_f32};\n"
    )
    flags = [
        "-std=c99",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-g",
        "-O1",
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=all",
    ]
    command = [gcc, *flags, "xla.c", "adamw.c", "optforge.c", "-o", "xla", "-lm", "-lpthread"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    said = {}
    for arguments in ("1", "2", "4", "0", "4 refused", "1 told", "4 told"):
        run = subprocess.run([tmp_path / "xla", *arguments.split()], capture_output=True, text=True)
        assert (run.returncode, run.stderr) == (0, ""), arguments
        said[arguments] = run.stdout.split()
    assert len({bits for bits, _, _ in said.values()}) == 1
    assert [arguments for arguments, (_, told, _) in said.items() if told == "1"] == ["1 told", "4 told"]
    assert [arguments for arguments, (_, _, helped) in said.items() if helped == "1"] == ["2", "4", "4 told"]
