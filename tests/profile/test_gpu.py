"""Profiles of a GPU, on the emulation, whose times mean nothing: that they run, and that the streams change nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import optforge as of
from amount import FULL
from cli_runner import GENERATOR
from conftest import require
from optforge import cli
from optforge.core.diagnostics import UsageError
from optforge.core.formats import Wanted
from optforge.profile import cuda, document, models


def command(*words: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    words = ("-m", "optforge", "profile", *words)
    every = {**env, "PYTHONPATH": str(GENERATOR)}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=cwd, env=every)


@pytest.mark.skipif(not FULL, reason="the long run compiles for the emulation")
def test_profile(emulated_cuda: dict[str, str], tmp_path: Path) -> None:
    require("pycuda")
    files = ("--json", "run.json", "--html", "run.html")
    sizes = ("--sizes", "5000,mlp", "--seconds", "1")
    answer = command("lamb", "--target", "cuda", *sizes, *files, cwd=tmp_path, env=emulated_cuda)
    assert answer.returncode == 0, answer.stderr
    made = document.read(tmp_path / "run.json")
    works = [(size, work) for size in ("5000", "mlp") for work in ("step", "phase")]
    assert [(row["size"]["name"], row["work"]) for row in made["rows"]] == works
    for row in made["rows"]:
        assert row["isa"].startswith("sm_") and row["bytes"] == (40 if row["work"] == "step" else 44)
        assert row["traffic_ns"] > 0 and {*row["rounds"]["low"]} == {"kernel", "traffic", "copy"}
    assert "lamb, f32: step 40, phase 44 bytes per element" in answer.stdout
    assert made["machine"]["gpu"]["name"] in (tmp_path / "run.html").read_text("utf-8")


def test_without_a_gpu(tmp_path: Path) -> None:
    answer = command("adamw", "--target", "cuda", cwd=tmp_path, env=dict(os.environ))
    if answer.returncode == 0:
        pytest.skip("there is a GPU here")
    assert answer.returncode == 3 and 'target "cuda" needs' in answer.stderr and "Traceback" not in answer.stderr


def test_streams_change_nothing(emulated_cuda: dict[str, str], tmp_path: Path) -> None:
    """As those of C: they read and write what the kernel does, and all arrays hold what they held."""
    require("pycuda")
    program = """
import numpy as np, optforge as of
from optforge.core.formats import Wanted
from optforge.profile import cuda, models
gpu = cuda.Gpu()
for dtype in ("f32", "f64"):
    [own] = cuda.needed(of.rules.lamb, Wanted([dtype]), {})
    plan = cuda.Plan(of.rules.lamb, {}, own, models.Model("x", [(1030,), (7,)]), "phase")
    arrays = {name: gpu.arrays([1030, 7], own.storage.real.numpy, 1.0) for name in own.names}
    before = [np.asarray(a).tobytes() for every in arrays.values() for a in every]
    cuda.traffic(gpu, plan, arrays)()
    assert [np.asarray(a).tobytes() for every in arrays.values() for a in every] == before
print("the same")
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=emulated_cuda)
    assert answer.stdout == "the same\n", answer.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--against", "numpy"), "--against is for --target c"),
        (("--threads", "2"), "--threads is for --target c"),
        (("--isa", "x86-64"), "--isa is for --target c"),
        (("--target", "tpu"), "--target tpu: kernels run on c or cuda"),
    ],
)
def test_mistakes(words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["profile", "adamw", "--target", "cuda", *words])
    assert end.value.code == 2 and says in capsys.readouterr().err


def test_formats_that_a_gpu_has_not() -> None:
    own = cuda.needed(of.rules.adamw, Wanted(store={"p": "bf16", "g": "bf16"}), {})
    with pytest.raises(UsageError, match="on a GPU arrays are stored"):
        cuda.plans([(of.rules.adamw, own, {})], lambda _: [models.one("x", 10)], 1 << 30, print)


def test_the_streams_compile(tmp_path: Path) -> None:
    """With nvcc, for the oldest and the newest architecture; loads and stores have 16 bytes."""
    nvcc = require("nvcc")
    from optforge.emit.text import render_template

    [own] = cuda.needed(of.rules.adamw, Wanted(["f32"]), {})
    streams = [
        [{"name": f"a{s.place}", "place": s.place, "reads": s.reads, "writes": s.writes} for s in part.streams]
        for part in own.of("step")
    ]
    shown = {"passes": streams, "vector": "uint4", "word": "unsigned", "lanes": 4, "parts": "xyzw"}
    (tmp_path / "streams.cu").write_text(render_template("profile/streams.cu.j2", shown))
    command = [nvcc, "-ptx", "-arch=sm_75", "-Werror", "all-warnings", "-o", "streams.ptx", "streams.cu"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    text = (tmp_path / "streams.ptx").read_text()
    if "ld.global" not in text:
        pytest.skip("nvcc is a stand-in here")
    assert len(re.findall(r"ld\.global\S*\.v4\.u32", text)) >= 4 and len(re.findall(r"st\.global\.v4\.u32", text)) >= 3
