"""Names that C, C++, CUDA and their headers claim, as the compilers of this machine tell them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import optforge as of
from compiling import run
from conftest import require
from native import STRICT
from optforge.core.diagnostics import UsageError
from optforge.core.names import HEADERS, KEYWORDS, claimed
from optforge.emit.text import comment_text

C = """assert complex ctype errno fenv float inttypes iso646 limits locale math setjmp signal stdarg stdbool stddef stdint
stdio stdlib string time wchar wctype unistd pthread""".split()
CPP = """algorithm array atomic chrono cmath cstddef cstdint cstdio cstdlib cstring functional limits map memory mutex new
numeric random stdexcept string thread tuple type_traits utility vector""".split()
CUDA = ("cuda_runtime", "cuda", "cuda_fp16", "cuda_bf16")

COMMANDS = {
    "gcc": ("-fopenmp", "-dM", "-E"),
    "gcc -std=c99": ("-fopenmp", "-dM", "-E"),
    "gcc -D_GNU_SOURCE": ("-fopenmp", "-dM", "-E"),
    "g++": ("-fopenmp", "-dM", "-E"),
    "clang": ("-dM", "-E"),
    "clang++": ("-dM", "-E"),
    "nvcc": ("-E", "-Xcompiler", "-dM"),
}


def source(tool: str, directory: Path) -> Path:
    """A file that includes all headers in use, and those that an engine may include before them."""
    headers = [f"{name}.h" for name in C]
    if tool in ("g++", "clang++", "nvcc"):
        headers = [h for h in headers if h != "complex.h"] + CPP
    headers += ["omp.h"] * (tool in ("gcc", "g++")) + [f"{name}.h" for name in CUDA if tool == "nvcc"]
    path = directory / {"nvcc": "all.cu", "g++": "all.cpp", "clang++": "all.cpp"}.get(tool, "all.c")
    path.write_text("".join(f"#include <{header}>\n" for header in headers))
    return path


def answer(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_macro_of_the_headers_is_claimed(command: str, tmp_path: Path) -> None:
    """What is missing goes into macros.txt."""
    tool, *flags = command.split()
    text = answer([require(tool), *flags, *COMMANDS[command], str(source(tool, tmp_path))])
    macros = set(re.findall(r"^#define (\w+)(?= |$)", text, re.MULTILINE))
    assert len(macros) > 1000
    assert sorted(name for name in macros if not claimed(name)) == []


@pytest.mark.parametrize("tool", ["gcc", "g++", "nvcc"])
def test_no_file_hides_a_header_of_the_system(tool: str, tmp_path: Path) -> None:
    included = re.findall(r"(\S+)\.h\b", answer([require(tool), "-M", str(source(tool, tmp_path))]))
    plain = {
        Path(name).name
        for name in included
        if re.fullmatch(r"/usr/include|.*/cuda[^/]*/.*include", str(Path(name).parent))
    }
    assert len(plain) > 15
    assert sorted(name for name in plain if name.isidentifier() and name not in HEADERS) == []


def test_a_rule_of_the_name_of_a_header(tmp_path: Path) -> None:
    path = tmp_path / "rules.py"
    path.write_text(
        "from optforge import rule\n\n@rule\ndef math(p, g, *, lr=0.1):\n    p = p - lr * g\n    return p\n"
    )
    rule = of.Rule.from_file(path, "math")
    files = rule.generate("c")
    assert sorted(files) == ["math_.c", "math_.h", "optforge.c", "optforge.h"]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    run([require("gcc"), *STRICT, "-I.", "-c", "math_.c"], tmp_path)
    assert sorted(rule.generate("cuda")) == ["math_.cu", "math_.cuh", "optforge.cu", "optforge.cuh", "optforge.h"]
    with pytest.raises(UsageError, match="hides another header"):
        rule.generate("c", prefix="string")
    import numpy as np

    p = np.ones(3, np.float32)
    of.Optimizer([p], rule).step([np.ones(3, np.float32)])
    assert p.tolist() == [np.float32(1) - np.float32(0.1)] * 3


CLAIMED = """MAXFLOAT RAND_MAX BYTE_ORDER LITTLE_ENDIAN SNAN M_PIf FD_SETSIZE EXIT_SUCCESS NZERO P_tmpdir TIME_UTC CUDART_CB
cudaStreamDefault _T_SIZE_ _SIZE_T_ linux PRId64 SIGINT si_value""".split()


@pytest.mark.parametrize("tool", ["gcc", "g++", "clang"])
def test_claimed_names_everywhere(tool: str, tmp_path: Path) -> None:
    """As hyperparameters, state and locals, behind all headers that an engine may have."""
    states, locals_ = CLAIMED[::2], CLAIMED[1::2]
    lines = [f"    {name} = {name} + lr * g" for name in states]
    lines += [f"    {name} = {before} * 2" for name, before in zip(locals_, ["g", *locals_], strict=False)]
    text = (
        "from optforge import rule\n\n@rule\n"
        f"def own(p, g, {', '.join(f'{name}=0.0' for name in states)}, *, lr=0.1):\n"
        + "\n".join([*lines, f"    p = p - {locals_[-1]} * {states[-1]}", f"    return p, {', '.join(states)}\n"])
    )
    (tmp_path / "rules.py").write_text(text)
    for name, emitted in of.Rule.from_file(tmp_path / "rules.py", "own").generate("c").items():
        headers = source(tool, tmp_path).read_text() if name.endswith(".c") else ""
        (tmp_path / name).write_text(headers + emitted, encoding="utf-8")
    language = ["-x", "c++", "-std=gnu++11"] if tool == "g++" else ["-std=gnu11"]
    flags = [*language, "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", "-fsyntax-only"]
    run([require(tool), *flags, "own.c", "optforge.c"], tmp_path)


def test_a_comment_has_no_trigraph() -> None:
    for text in ("a ???/", "??/", "?????", "what??!"):
        assert "??" not in comment_text(text)
        assert comment_text(text).replace(" ", "") == text.replace(" ", "")


def test_an_underscore_frees_every_claimed_name() -> None:
    families = ["M_PIf", "M_1", "cudaStreamDefault", "cuInit", "PRId64", "FLT_MAX", "_Bool", "__LINE__", "__x", "_A"]
    assert [name for name in [*KEYWORDS, *families] if claimed(f"{name}_")] == []
    assert all(map(claimed, families))
