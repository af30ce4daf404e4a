"""The engines of examples/: each trains with its own optimizer and with an emitted kernel, and says how they agree.

docs/engines-proof.md tells of them; what it says of glue and of bounds is held here.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from amount import FULL
from conftest import missing, require
from places import ROOT

EXAMPLES = ROOT / "examples"
PAGE = ROOT / "docs" / "engines-proof.md"
DIGITS = EXAMPLES / "digits.txt"
SOURCES = {
    "tiny-dnn": "train.cpp",
    "dlib": "train.cpp",
    "flat-trainer": "train.c",
    "graph-op": "graph.c",
    "zero": "shards.c",
}
full = pytest.mark.skipif(not FULL, reason="takes long; set OPTFORGE_TEST_FULL=1")


def output(*command: str | Path) -> list[str]:
    """The lines that a command prints, which must succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, env=environment)
    assert answer.returncode == 0, f"{answer.stdout[-2000:]}\n{answer.stderr[-4000:]}"
    return answer.stdout.splitlines()


def make(name: str, directory: Path, program: str, *settings: str) -> Path:
    """A program of an example, built by its own Makefile."""
    require("make")
    directory.mkdir(exist_ok=True)
    optforge = f"{shlex.quote(sys.executable)} -P -m optforge"
    output("make", "-C", EXAMPLES / name, f"OPTFORGE={optforge}", f"BUILD={directory}", *settings)
    return directory / program


def require_header(package: str, header: str) -> None:
    """A library of C++, by one of its headers."""
    text = f"#if !__has_include(<{header}>)\n#error\n#endif\n"
    command = [require("g++"), "-E", "-x", "c++", "-"]
    if subprocess.run(command, input=text, text=True, capture_output=True, check=False).returncode:
        missing(package)


# ---- glue


def glue(path: Path) -> int:
    """Lines between the marks, without blank ones and comments."""
    lines, inside = 0, False
    for line in path.read_text().splitlines():
        text = line.strip()
        if re.fullmatch(r"(/\*|//|#) glue: (begin|end)( \*/)?", text):
            assert inside == ("end" in text), path
            inside = not inside
        elif inside and text and not re.match(r"//|/\*|\*|#(?! *include)", text):
            lines += 1
    assert not inside
    return lines


def test_the_page_tells_each_ones_glue() -> None:
    """A row of its table is: program, lines in the source, lines in the Makefile, and more."""
    rows = re.findall(r"^\| `examples/([\w-]+)` \| (\d+) \| (\d+) \|", PAGE.read_text(), re.M)
    found = [
        (name, glue(EXAMPLES / name / source), glue(EXAMPLES / name / "Makefile")) for name, source in SOURCES.items()
    ]
    assert [(name, int(own), int(build)) for name, own, build in rows] == found


def test_glue_is_marked(tmp_path: Path) -> None:
    path = tmp_path / "some.c"
    path.write_text("a;\n/* glue: begin */\n#include <b>\n\n// why\nb;\n  /* glue: end */\nc;\n")
    assert glue(path) == 2
    path.write_text("/* glue: begin */\na;\n")
    with pytest.raises(AssertionError):
        glue(path)


# ---- a trainer with flat buffers


@full
@pytest.mark.parametrize("flags", ["-O2", "-O3 -march=native -fno-math-errno"])
def test_flat_trainer(tmp_path: Path, flags: str) -> None:
    """Where the compiler leaves arithmetic as it is written all bits agree, over a whole training."""
    require("gcc")
    train = make("flat-trainer", tmp_path, "train", "CC=gcc", f"CFLAGS={flags}")
    own = output(train, DIGITS, "own")
    assert float(own[0].split()[-1]) > 1 > 0.1 > float(own[19].split()[-1])
    assert output(train, DIGITS, "optforge") == own
    apart = output(train, DIGITS, "check")
    assert apart == [*own[:20], "apart p 0.000 m 0.000 v 0.000", own[20]]


@full
def test_flat_trainer_of_fast_math(tmp_path: Path) -> None:
    """As its Makefile has it: the engine's own loop is rewritten, and each step is as near as the page says."""
    require("gcc")
    train = make("flat-trainer", tmp_path, "train", "CC=gcc")
    (apart,) = (line.split() for line in output(train, DIGITS, "check") if line.startswith("apart"))
    bounds = re.search(r"p within (\d+), m within (\d+), v within (\d+) units", PAGE.read_text())
    assert bounds is not None
    assert all(float(found) <= float(bound) for found, bound in zip(apart[2::2], bounds.groups(), strict=True))
    losses = [float(output(train, DIGITS, how)[19].split()[-1]) for how in ("own", "optforge")]
    assert abs(losses[0] - losses[1]) < 1e-3 * losses[0]


# ---- nodes of a graph, on the engine's own threads


def test_graph_op(tmp_path: Path) -> None:
    require("gcc")
    graph = make("graph-op", tmp_path, "graph", "CC=gcc")
    own = output(graph, "own", "1")
    for threads in ("1", "2", "3", "7") if FULL else ("3",):
        assert output(graph, "optforge", threads) == own


@full
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
@pytest.mark.parametrize(
    ("name", "program", "words"), [("graph-op", "graph", ("optforge", "3")), ("zero", "shards", ("3",))]
)
def test_sanitized(tmp_path: Path, name: str, program: str, words: tuple[str, ...], sanitizer: str) -> None:
    """Threads of engines, with all of the emitted code seen by the sanitizer too: no race, nothing beyond an end."""
    require("gcc")
    flags = f"CFLAGS=-O2 -g -fsanitize={sanitizer} -fno-sanitize-recover=all"
    built = [make(name, tmp_path / k, program, "CC=gcc", *own) for k, own in (("plain", ()), ("own", (flags,)))]
    assert output(built[1], *words) == output(built[0], *words)


# ---- shards


@full
def test_zero(tmp_path: Path) -> None:
    """Any number of ranks prints the same; the norm that is added up in another order is another in its last digits."""
    require("gcc")
    shards = make("zero", tmp_path, "shards", "CC=gcc")
    own, one = output(shards, "own"), output(shards, "1")
    for ranks in range(2, 9):
        assert output(shards, str(ranks)) == one
    assert own[-1] == one[-1] and own[2] == one[2] == "step 3 skipped"
    for k in (0, 1, 3):
        a, b = (float.fromhex(lines[k].split()[-1]) for lines in (own, one))
        assert abs(a - b) <= 1e-11 * b


# ---- engines of others


@full
def test_tiny_dnn(tmp_path: Path) -> None:
    require_header("tiny-dnn", "tiny_dnn/config.h")
    train = make("tiny-dnn", tmp_path, "train", "CC=gcc", "CXX=g++")
    own = output(train, DIGITS, "own")
    assert output(train, DIGITS, "optforge") == own
    assert int(own[-2].split()[1]) > 450


@full
def test_dlib(tmp_path: Path) -> None:
    """The rule that writes steps has all bits; what is added by a delta is within two units of 2^-24."""
    require_header("dlib", "dlib/dnn.h")
    train = make("dlib", tmp_path, "train", "CC=gcc", "CXX=g++")
    own = output(train, DIGITS, "own")
    assert output(train, DIGITS, "optforge") == own
    assert int(own[-2].split()[1]) > 450
    checked = output(train, DIGITS, "check")
    assert checked[:-1] == own
    words = checked[-1].split()
    assert int(words[1]) == 600 and int(words[5]) == 0 and float(words[-1]) <= 2
    assert len(output(train, DIGITS, "delta")) == len(own)
