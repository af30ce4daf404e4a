"""Compiling and the cache of compiled kernels: what is found, refused, rebuilt, shared and left behind."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amount import FULL
from conftest import require
from optforge import Optimizer, Rule, rule, rules
from optforge.core.diagnostics import EnvironmentProblem
from optforge.engines.c import compile as compiler
from optforge.engines.c import inputs as nativeinputs

ROOT = os.geteuid() == 0
TINY = {"tiny.h": "int tiny(void);\n", "tiny.c": '#include "tiny.h"\nint tiny(void) { return 42; }\n'}
# The library of TINY, in a process of its own.
BUILD = f"from optforge.engines.c.compile import library\nprint(library({TINY!r}))\n"


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and a directory for temporary files that only this test uses."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("OPTFORGE_CACHE_DIR", str(directory))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiler, "PRIVATE", {})
    return directory


class Wrapper:
    """A C compiler that is a shell script: it notes each compilation, and does `lines` before the real one, which is
    not to optimise but in the long run."""

    def __init__(self, directory: Path, lines: str = "", name: str = "cc.sh", real: str | None = None):
        self.path, self.log = directory / name, directory / f"{name}.log"
        self.log.write_text("")
        real = real or shutil.which("cc") or shutil.which("gcc") or require("clang")
        noting = f'case "$*" in *-shared*|*-c) echo "$*" >> \'{self.log}\';; esac\n'
        self.path.write_text(f'#!/bin/sh\n{noting}{lines}\nexec {real} "$@" {"" if FULL else "-O0"}\n')
        self.path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        """The arguments of each compilation so far."""
        return self.log.read_text().splitlines()


@pytest.fixture
def wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wrapper:
    """The compiler of this test."""
    wrapper = Wrapper(tmp_path)
    monkeypatch.setenv("CC", str(wrapper.path))
    return wrapper


def works(path: Path) -> bool:
    """Whether the library of TINY does what it should."""
    return ctypes.CDLL(str(path)).tiny() == 42


def names(directory: Path) -> list[str]:
    """The kinds of files in a cache, sorted."""
    return sorted(path.suffix for path in directory.iterdir())


WHOLE = [".lock", ".sha256", ".so"]


def compiled(call: str) -> str:
    """The source file of a compilation."""
    (source,) = (word for word in call.split() if word.endswith(".c"))
    return source


# ── what is compiled, and when ──────────────────────────────────────────────────────────────────────────────────────


def test_a_library_is_compiled_once(own: Path, wrapper: Wrapper) -> None:
    first = compiler.library(TINY)
    before = first.stat()
    assert compiler.library(dict(reversed(TINY.items()))) == first
    assert len(wrapper.calls) == 1
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert works(first)
    assert first.parent == own
    assert first.name.startswith("tiny-")
    assert names(own) == WHOLE
    assert not list((own.parent / "tmp").iterdir())


def test_the_runtime_is_compiled_once_for_all_rules(own: Path, wrapper: Wrapper) -> None:
    def step(name: str) -> None:
        p = np.ones(3)
        Optimizer([p], name).step([p.copy()])

    nativeinputs.compiled()  # what looks at arrays is not of a rule
    start = len(wrapper.calls)
    step("sgd")
    assert [compiled(call) for call in wrapper.calls[start:]] == ["optforge.c", "sgd.c"]
    step("momentum")
    (runtime,) = own.glob("optforge-*.o")
    assert [compiled(call) for call in wrapper.calls[start + 2 :]] == ["momentum.c"]
    runtime.write_bytes(flipped(runtime.read_bytes()))
    step("nesterov")
    assert [compiled(call) for call in wrapper.calls[start + 3 :]] == ["optforge.c", "nesterov.c"]
    files = rules.sgd.generate()
    first, calls = compiler.library(files), len(wrapper.calls)
    assert compiler.library(files | {"optforge.c": files["optforge.c"] + "\n"}) != first
    assert [compiled(call) for call in wrapper.calls[calls:]] == ["optforge.c", "sgd.c"]
    assert len(list(own.glob("optforge-*.o"))) == 2


def test_the_key(own: Path, wrapper: Wrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [compiler.library(TINY)]
    paths.append(compiler.library(TINY | {"tiny.c": TINY["tiny.c"] + "\n"}))
    paths.append(compiler.library(TINY | {"more.h": ""}))
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-DMORE"))
    paths.append(compiler.library(TINY))
    monkeypatch.setattr(compiler, "OPTIONAL_FLAGS", ())
    paths.append(compiler.library(TINY))
    monkeypatch.setattr(compiler, "cpu", lambda: "another processor")
    paths.append(compiler.library(TINY))
    monkeypatch.setenv("CC", f"{wrapper.path} -DFLAG")
    paths.append(compiler.library(TINY))
    assert len(set(paths)) == len(paths) == len(wrapper.calls)


STEP = """
import sys, numpy as np, optforge as of
of.Optimizer([np.ones(4, np.float32)], of.rules.adam, target="c").step([np.ones(4, np.float32)])
print("jinja2" in sys.modules)
"""


def test_what_is_compiled_is_not_emitted_again(own: Path, wrapper: Wrapper) -> None:
    """The text of a kernel is made where it is not in the cache: it would take longer than all else of the start."""
    made = [subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True).stdout for _ in range(2)]
    assert made == ["True\n", "False\n"]


def test_another_generator(own: Path, wrapper: Wrapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is emitted anew when any file of the generator has changed."""
    templates = shutil.copytree(compiler.TEMPLATES, tmp_path / "templates")
    monkeypatch.setattr(compiler, "TEMPLATES", templates)
    keys = set()
    for change in (lambda path: None, lambda path: path.write_text(path.read_text() + "\n"), os.utime, Path.unlink):
        change(templates / "loops.c.j2")
        keys.add(compiler.generator.__wrapped__())
    assert len(keys) == 4


def halves() -> Rule:
    @rule
    def mine(p, g, *, lr=0.5, twice=False):
        d = lr * g
        if twice:
            d = 2 * d
        p = p - d
        return p

    return mine


def quarters() -> Rule:
    @rule
    def mine(p, g, *, lr=0.5, twice=False):
        d = lr * g * 0.5
        if twice:
            d = 3 * d
        p = p - d
        return p

    return mine


def test_kernels_of_one_name(own: Path, wrapper: Wrapper) -> None:
    """They are told apart by all that they compute."""

    def stepped(made: Rule, **given: Any) -> float:
        p = np.ones(3, np.float32)
        Optimizer([p], made, target="c", **given).step([np.full(3, 2.0, np.float32)])
        return float(p[0])

    assert [stepped(halves()), stepped(halves(), twice=True)] == [0.0, -1.0]
    assert [stepped(quarters()), stepped(quarters(), twice=True)] == [0.5, -0.5]


def test_another_version_of_the_compiler(own: Path, wrapper: Wrapper) -> None:
    first = compiler.library(TINY)
    os.utime(wrapper.path, ns=(0, 0))  # another file, whatever it says of itself
    compiler.identify.cache_clear()  # a new process
    second = compiler.library(TINY)
    text = wrapper.path.read_text()
    os.utime(wrapper.path, ns=(0, 0))
    status = wrapper.path.stat()
    said = '[ "$1" = --version ] && echo version 2 && exit'
    wrapper.path.write_text(text.replace("#!/bin/sh\n", f"#!/bin/sh\n{said}\n"))
    assert wrapper.path.stat().st_size != status.st_size
    compiler.identify.cache_clear()
    third = compiler.library(TINY)
    assert len({first, second, third}) == len(wrapper.calls) == 3


def test_files_and_directories_are_for_their_owner_alone(own: Path) -> None:
    mask = os.umask(0)
    try:
        path = compiler.library(TINY)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert path.stat().st_uid == os.geteuid()


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o720])
@pytest.mark.parametrize("filled", [False, True])
def test_a_cache_that_others_can_write_to_is_refused(own: Path, mode: int, filled: bool) -> None:
    if filled:
        compiler.library(TINY)
    own.mkdir(exist_ok=True)
    own.chmod(mode)
    with pytest.raises(EnvironmentProblem, match=r"can be written by others.*chmod go-w .*OPTFORGE_CACHE_DIR"):
        compiler.library(TINY)
    assert names(own) == (WHOLE if filled else [])
    own.chmod(0o755)
    assert works(compiler.library(TINY))


def test_a_cache_of_another_user_is_refused(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own.mkdir(mode=0o700)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(EnvironmentProblem, match=r"belongs to another user.*OPTFORGE_CACHE_DIR"):
        compiler.library(TINY)
    assert not list(own.iterdir())


def test_the_usual_place(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPTFORGE_CACHE_DIR")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name, **_: tmp_path / "usual" / name)
    path = compiler.library(TINY)
    assert path.parent == tmp_path / "usual" / "optforge"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_relative_place(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    monkeypatch.setenv("OPTFORGE_CACHE_DIR", ".")
    path = compiler.library(TINY)
    assert path.parent == tmp_path / "a"
    monkeypatch.chdir(tmp_path)
    assert works(path)


def test_there_is_no_home(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPTFORGE_CACHE_DIR")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, **__: Path("~/.cache/optforge"))
    with pytest.warns(RuntimeWarning, match="no home directory"):
        assert works(compiler.library(TINY))
    assert not (tmp_path / "~").exists()


# ── libraries that are not loaded ───────────────────────────────────────────────────────────────────────────────────


def flipped(data: bytes) -> bytes:
    """The data with one bit changed, in its middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("part", ["so", "sha256"])
@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: data[:20], lambda data: b"", flipped, lambda data: b"\xff\xfe", None],
    ids=["one byte short", "short", "empty", "bit flipped", "other bytes", "missing"],
)
def test_a_damaged_library_is_rebuilt(own: Path, wrapper: Wrapper, part: str, damage: object) -> None:
    path = compiler.library(TINY)
    place = path.with_suffix(f".{part}")
    good = place.read_bytes()
    if damage is None:
        place.unlink()
    else:
        place.write_bytes(damage(good))  # type: ignore[operator]
    assert compiler.library(TINY) == path
    assert len(wrapper.calls) == 2
    assert compiler.library(TINY) == path
    assert len(wrapper.calls) == 2
    assert works(path)
    assert names(own) == WHOLE


def test_a_library_sealed_for_another_key_is_rebuilt(own: Path, wrapper: Wrapper) -> None:
    path = compiler.library(TINY)
    other = compiler.library(TINY | {"tiny.c": TINY["tiny.c"].replace("42", "43")})
    for suffix in (".so", ".sha256"):
        shutil.copyfile(other.with_suffix(suffix), path.with_suffix(suffix))
    assert compiler.library(TINY) == path
    assert len(wrapper.calls) == 3
    assert works(path)


def test_an_optimizer_does_not_load_a_damaged_kernel(own: Path, wrapper: Wrapper) -> None:
    def stepped() -> np.ndarray:
        p = np.linspace(-1, 1, 100, dtype=np.float32)
        Optimizer([p], "adam", lr=0.1).step([p * 2])
        return p

    code = "import sys; import numpy as np; from optforge import Optimizer; p = np.linspace(-1, 1, 100, dtype='f4');"
    code += "Optimizer([p], 'adam', lr=0.1).step([p * 2]); sys.stdout.buffer.write(p.tobytes())"
    first = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
    (path,) = own.glob("adam-*.so")
    path.write_bytes(path.read_bytes()[:5000])
    nativeinputs.compiled()  # in this process too
    assert [compiled(call) for call in wrapper.calls] == ["optforge.c", "adam.c", "inputs.c"]
    assert stepped().tobytes() == first
    assert [compiled(call) for call in wrapper.calls[3:]] == ["adam.c"]


# ── compilers ───────────────────────────────────────────────────────────────────────────────────────────────────────


def script(path: Path, text: str) -> Path:
    """An executable file."""
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_there_is_no_compiler(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentProblem) as problem:
        compiler.library(TINY)
    for word in ("cc, gcc, clang", "install", "CC", 'target="numpy"'):
        assert word in str(problem.value)
    assert "\n" not in str(problem.value)
    assert not own.exists()
    p = np.ones(3)
    with pytest.raises(EnvironmentProblem, match="there is no C compiler"):
        Optimizer([p], "sgd")
    Optimizer([p], "sgd", target="numpy", lr=1.0).step([p.copy()])
    assert not p.any()


def test_path_is_not_set(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("cc", path=os.defpath):
        pytest.skip("no compiler is in the usual places")
    monkeypatch.delenv("PATH")
    assert compiler.find().command[0].startswith("/")


@pytest.mark.parametrize(
    ("cc", "words"),
    [
        ("/nowhere/mycc", ["'/nowhere/mycc'", "CC"]),
        ("mycc -O3", ["'mycc'", "CC"]),
        ("{dir}", ["there is no C compiler"]),
        ("{dir}/plain", ["there is no C compiler", "plain"]),
        ("{dir}/noexec", ["does not start", "noexec"]),
        ("gcc '-DX", ["CC", "gcc '-DX"]),
        ("{dir}/failing", ["failed", "{dir}/failing", "-shared", "out of order"]),
        ("{dir}/idle", ["failed", "{dir}/idle", "it said nothing", "exit status 0"]),
        ("{dir}/dying", ["failed", "{dir}/dying", "it said nothing", "exit status -9"]),
    ],
)
def test_cc_is_no_working_compiler(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cc: str, words: list[str]
) -> None:
    (tmp_path / "plain").write_text("no program")
    script(tmp_path / "noexec", "\x7fELF, but not really")
    script(tmp_path / "failing", "#!/bin/sh\necho out of order >&2\nexit 3\n")
    script(tmp_path / "idle", "#!/bin/sh\n")
    script(tmp_path / "dying", "#!/bin/sh\nkill -9 $$\n")
    monkeypatch.setenv("CC", cc.format(dir=tmp_path))
    with pytest.raises(EnvironmentProblem) as problem:
        compiler.library(TINY)
    for word in words:
        assert word.format(dir=tmp_path) in str(problem.value)
    assert "set CC" in str(problem.value) or "Set CC" in str(problem.value)
    if own.exists():
        assert names(own) == [".lock"]
    assert not list((tmp_path / "tmp").iterdir())


def test_a_compiler_that_waits_for_input(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(Wrapper(tmp_path, "cat > /dev/null").path))
    with subprocess.Popen([sys.executable, "-c", BUILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.wait(timeout=60) == 0  # its own input has not ended
        assert process.stdout is not None
        assert works(Path(process.stdout.read().decode().strip()))


@pytest.mark.parametrize("arguments", ["-DONE -DTWO='a b'", "-g"])
def test_cc_with_arguments(own: Path, wrapper: Wrapper, monkeypatch: pytest.MonkeyPatch, arguments: str) -> None:
    monkeypatch.setenv("CC", f"{wrapper.path} {arguments}")
    assert works(compiler.library(TINY))
    assert wrapper.calls[0].startswith(arguments.replace("'", ""))


def test_cc_is_a_launcher(own: Path, wrapper: Wrapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = script(tmp_path / "launcher", '#!/bin/sh\nexec "$@"\n')
    monkeypatch.setenv("CC", f"'{launcher}' {wrapper.path} -g")
    assert works(compiler.library(TINY))
    assert len(wrapper.calls) == 1


@pytest.mark.parametrize("form", ["./sub dir/cc", "cc"])
def test_a_relative_compiler(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    (tmp_path / "sub dir").mkdir()
    wrapper = Wrapper(tmp_path / "sub dir", name="cc")
    monkeypatch.chdir(tmp_path)
    if form == "cc":
        monkeypatch.setenv("PATH", f"sub dir{os.pathsep}{os.environ['PATH']}")
    else:
        monkeypatch.setenv("CC", f"'{form}'")
    assert works(compiler.library(TINY))
    assert len(wrapper.calls) == 1


@pytest.mark.parametrize(
    ("unknown", "kept"),
    [
        (["-fopenmp"], []),
        ([], ["-fopenmp"]),
    ],
    ids=str,
)
def test_a_compiler_that_lacks_flags(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unknown: list[str], kept: list[str]
) -> None:
    refuse = "".join(f'case "$*" in *{flag}*) echo unknown: {flag} >&2; exit 1;; esac\n' for flag in unknown)
    wrapper = Wrapper(tmp_path, refuse)
    monkeypatch.setenv("CC", str(wrapper.path))
    probe = subprocess.run(
        [str(wrapper.path), *kept, *compiler.FLAGS, "-shared", "-x", "c", "-", "-o", str(tmp_path / "probe.so")],
        input=b"int tiny(void) { return 42; }",
        check=False,
    )
    if probe.returncode:
        pytest.skip(f"the compiler of this machine does not know {kept}")
    path = compiler.library(TINY)
    assert works(path)
    last = wrapper.calls[-1].split()
    assert [flag for flag in compiler.OPTIONAL_FLAGS if flag in last] == kept
    calls = len(wrapper.calls)
    assert compiler.library(TINY) == path
    assert len(wrapper.calls) == calls
    p, q = np.linspace(-1, 1, 50), np.linspace(-1, 1, 50)  # the runtime and a rule, without a warning
    for array, target in ((p, "c"), (q, "numpy")):
        Optimizer([array], "sgd", target=target, lr=0.1).step([np.cos(array)])
    assert p.tobytes() == q.tobytes()


def test_no_library_is_for_one_processor_alone(own: Path, wrapper: Wrapper) -> None:
    """Instruction sets are chosen when a step runs."""
    p = np.ones(3)
    Optimizer([p], "sgd").step([p.copy()])
    assert len(wrapper.calls) == 2
    assert not [call for call in wrapper.calls if "-m" in call.replace("-lm", "")]


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_a_step_with_each_compiler(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("CC", str(Wrapper(tmp_path, real=require(name)).path))
    p, q = np.linspace(-1, 1, 50), np.linspace(-1, 1, 50)
    for array, target in ((p, "c"), (q, "numpy")):
        Optimizer([array], "sgd", target=target, lr=0.1).step([np.cos(array)])
    assert p.tobytes() == q.tobytes()
    assert names(own) == sorted([*WHOLE, ".lock", ".o", ".sha256"])  # the rule's, and the runtime's


def test_changed_variables_are_noticed(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for directory in (one, two):
        directory.mkdir()
        Wrapper(directory, name="cc")
    usual = os.environ["PATH"]
    found = [compiler.library(TINY)]
    for directory in (one, two):
        monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{usual}")
        assert compiler.find().command == (str(directory / "cc"),)
        found.append(compiler.library(TINY))
    monkeypatch.setenv("CC", "/nowhere/cc")
    with pytest.raises(EnvironmentProblem, match="/nowhere/cc"):
        compiler.library(TINY)
    monkeypatch.setenv("CC", str(one / "cc"))
    assert compiler.library(TINY) == found[1]
    monkeypatch.setenv("CC", " ")
    assert compiler.library(TINY) == found[2]
    assert len(set(found)) == 3
    # The same for the place of the cache.
    monkeypatch.setenv("OPTFORGE_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert compiler.library(TINY).parent == tmp_path / "elsewhere"


# ── caches that cannot be used ──────────────────────────────────────────────────────────────────────────────────────


def unusable(where: str, tmp_path: Path) -> Path:
    """A directory in which nothing can be made."""
    (tmp_path / "file").write_text("")
    if where == "read-only":
        if ROOT:  # who may write everywhere but here
            if not Path("/proc/sys").is_dir():
                pytest.skip("there is no /proc here")
            return Path("/proc/sys")
        (tmp_path / "closed").mkdir(mode=0o500)
        return tmp_path / "closed"
    return {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "below"}[where]


@pytest.mark.parametrize("where", ["read-only", "a file", "below a file"])
def test_an_unusable_cache(
    own: Path, wrapper: Wrapper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    directory = unusable(where, tmp_path)
    monkeypatch.setenv("OPTFORGE_CACHE_DIR", str(directory))
    with pytest.warns(RuntimeWarning, match=r"cache cannot be used \(.*this process alone.*OPTFORGE_CACHE_DIR") as said:
        path = compiler.library(TINY)
    assert str(directory) in str(said[0].message)
    assert works(path)
    assert path.is_relative_to(tmp_path / "tmp")
    assert compiler.library(TINY) == path  # compiled and warned of once
    assert len(wrapper.calls) == 1
    shutil.rmtree(path.parent)
    with pytest.warns(RuntimeWarning, match="cache cannot be used"):
        assert works(compiler.library(TINY))


def test_a_read_only_cache_serves_what_it_has(own: Path, wrapper: Wrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compiler.library(TINY)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(compiler, "locked", refuse)
    own.chmod(0o500)
    assert compiler.library(TINY) == path
    with pytest.warns(RuntimeWarning, match="Read-only file system"):
        compiler.library(TINY | {"tiny.c": TINY["tiny.c"] + "\n"})


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("os.fsync", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        ("os.replace", OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))),
        ("optforge.engines.c.compile.locked", NotImplementedError("the file system has no locks")),
    ],
)
def test_a_cache_that_fails_on_the_way(
    own: Path, wrapper: Wrapper, monkeypatch: pytest.MonkeyPatch, place: str, problem: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise problem

    monkeypatch.setattr(place, fail)
    with pytest.warns(RuntimeWarning, match=getattr(problem, "strerror", None) or str(problem)):
        path = compiler.library(TINY)
    assert works(path)
    assert not list(own.glob("*.part"))
    monkeypatch.undo()


@pytest.mark.parametrize("kilobytes", [4, 12, 20, 28])
def test_a_full_disk(tmp_path: Path, kilobytes: int) -> None:
    """A real one: a file system of so many kilobytes, too small for the files of a compilation."""
    mount = f"mount -t tmpfs -o size={kilobytes}k,mode=700 none {tmp_path}/small"
    (tmp_path / "small").mkdir()
    enter = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-e", "-c"]
    with contextlib.suppress(OSError):
        if subprocess.run([*enter, mount], capture_output=True, check=False).returncode == 0:
            break_out = f"{mount}\nexec '{sys.executable}' -c \"$0\"\n"
            code = "import ctypes, os\n" + BUILD + f"print(ctypes.CDLL(str(library({TINY!r}))).tiny())\n"
            code += f"print(*sorted(name.rpartition('.')[2] for name in os.listdir({str(tmp_path / 'small')!r})))\n"
            environment = {**os.environ, "OPTFORGE_CACHE_DIR": str(tmp_path / "small")}
            done = subprocess.run(
                [*enter, break_out, code], env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            assert "RuntimeWarning: optforge's cache cannot be used" in done.stderr
            assert done.stdout.splitlines()[1:] == ["42", "lock"]
            assert not list((tmp_path / "tmp").iterdir())  # its own library went with the process
            return
    pytest.skip("this user may not mount a small file system")


def test_there_is_no_place_at_all(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTFORGE_CACHE_DIR", str(unusable("below a file", tmp_path)))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file" / "tmp"))
    with pytest.raises(EnvironmentProblem, match=r"cannot be compiled: .*TMPDIR"):
        compiler.library(TINY)


def test_a_child_leaves_the_private_library_of_its_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code = "import os, sys, warnings\nwarnings.simplefilter('ignore')\n" + BUILD
    code += f"path = library({TINY!r})\nif os.fork() == 0:\n    sys.exit()\nos.wait()\nprint(path.exists())\n"
    environment = {**os.environ, "OPTFORGE_CACHE_DIR": str(tmp_path / "file")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    path, still = done.stdout.split()
    assert still == "True"
    assert not Path(path).parent.exists()


# ── processes and threads at once ───────────────────────────────────────────────────────────────────────────────────


def test_sixteen_processes_compile_once(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = Wrapper(tmp_path, "sleep 0.2")
    monkeypatch.setenv("CC", str(wrapper.path))
    code = BUILD + f"import ctypes\nassert ctypes.CDLL(str(library({TINY!r}))).tiny() == 42\n"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(16)
    ]
    said = [process.communicate() for process in started]
    assert [(process.returncode, err) for process, (_, err) in zip(started, said, strict=True)] == [(0, "")] * 16
    assert len({out for out, _ in said}) == 1
    assert len(wrapper.calls) == 1
    assert names(own) == WHOLE
    assert not list((tmp_path / "tmp").iterdir())


def test_threads_compile_once(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = Wrapper(tmp_path, "sleep 0.2")
    monkeypatch.setenv("CC", str(wrapper.path))
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: compiler.library(TINY), range(8)))
    assert len(paths) == len(wrapper.calls) == 1


@contextlib.contextmanager
def in_the_middle_of_compiling(tmp_path: Path, wrapper: Wrapper) -> Iterator[subprocess.Popen[str]]:
    """A process whose compiler has begun, and will not end by itself."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "STALL": str(tmp_path / "stalled")},
        start_new_session=True,
    )
    try:
        while not (tmp_path / "stalled").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


STALLING = 'case "$STALL:$*" in :*) ;; *-shared*) echo half > kernel.so; : > "$STALL"; sleep 600;; esac'


def test_a_process_killed_while_it_compiles(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = Wrapper(tmp_path, STALLING)
    monkeypatch.setenv("CC", str(wrapper.path))
    with in_the_middle_of_compiling(tmp_path, wrapper) as process:
        assert names(own) == [".lock", ".part"]
        process.kill()  # its compiler lives on
        process.wait()
        # The lock is free: this would wait for ever.
        path = compiler.library(TINY)
        assert works(path)
        assert names(own) == WHOLE
    assert len(wrapper.calls) == 2
    assert compiler.library(TINY) == path
    assert names(own) == WHOLE
    assert not list((tmp_path / "tmp").iterdir())


def test_an_interrupted_process_leaves_nothing(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = Wrapper(tmp_path, STALLING)
    monkeypatch.setenv("CC", str(wrapper.path))
    with in_the_middle_of_compiling(tmp_path, wrapper) as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert "KeyboardInterrupt" in process.communicate()[1]
    assert names(own) == [".lock"]
    assert works(compiler.library(TINY))


def test_a_lock_that_is_never_released(own: Path, wrapper: Wrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compiler.library(TINY)
    path.unlink()
    monkeypatch.setattr(compiler, "LOCK_SECONDS", 0.1)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(EnvironmentProblem, match=r"another process has held .*\.lock"):
            compiler.library(TINY)
    assert compiler.library(TINY) == path


# ── what never ends, and what cannot be loaded ──────────────────────────────────────────────────────────────────────


def ended(process: int) -> bool:
    """Whether a process is no more, or is only waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("when", ["", "--version"])
@pytest.mark.parametrize(
    "lines",
    [
        "sleep 1000",
        "sleep 1000 & wait",
        "exec yes",
        "while :; do :; done",
        "exec 1>&- 2>&-; sleep 1000",
        "trap '' TERM INT; sleep 1000",
    ],
)
def test_a_compiler_that_does_not_end_is_stopped(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, when: str
) -> None:
    started = tmp_path / "started"
    only = f"*{when}*" if when else "*-shared*"
    wrapper = Wrapper(tmp_path, f"case \"$*\" in {only}) echo $$ >> '{started}'\n{lines};; esac")
    monkeypatch.setenv("CC", str(wrapper.path))
    monkeypatch.setattr(compiler.run, "__defaults__", (None, 1))
    with pytest.raises(
        EnvironmentProblem, match=r"^the compiler had not ended after 1 s, and was stopped:\n\$ .*cc.sh"
    ):
        compiler.library(TINY)
    (process,) = map(int, started.read_text().split())
    deadline = time.monotonic() + 20
    while not ended(process):
        assert time.monotonic() < deadline
    assert not own.exists() or names(own) == [".lock"]


def test_the_limit_of_a_compiler() -> None:
    assert compiler.run.__defaults__ == (None, 120)


def test_a_compiler_that_leaves_others_behind(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold its pipes open, and the library is there."""
    monkeypatch.setenv("CC", str(Wrapper(tmp_path, "sleep 100 &").path))
    before = time.monotonic()
    assert works(compiler.library(TINY))
    assert time.monotonic() - before < 60


def test_a_compiler_that_says_much(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(Wrapper(tmp_path, "yes first | head -c 20000000 >&2\necho last >&2; exit 1").path))
    with pytest.raises(EnvironmentProblem, match="first") as problem:
        compiler.library(TINY)
    assert len(str(problem.value)) < 70_000


@pytest.mark.parametrize("part", ["so", "sha256", "lock"])
@pytest.mark.parametrize("kind", ["fifo", "zero", "directory"])
def test_an_entry_that_is_no_file(own: Path, part: str, kind: str, tmp_path: Path) -> None:
    """Ours alone could have put it there; it is replaced, or the library is compiled for the process alone."""
    path = compiler.library(TINY)
    entry = path.with_suffix(f".{part}")
    entry.unlink()
    if kind == "fifo":
        os.mkfifo(entry)
    elif kind == "zero":
        entry.symlink_to("/dev/zero")
    else:
        entry.mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() == str(path):
        assert works(path)
    else:
        assert "compiled for this process alone" in done.stderr


NOEXEC = "nothing there can be loaded, its file system is mounted noexec"


def mounted_noexec(monkeypatch: pytest.MonkeyPatch, *directories: Path) -> None:
    """Have the system say of directories that nothing there can be executed."""
    statvfs = os.statvfs

    def told(path: os.PathLike[str]) -> object:
        status = statvfs(path)
        if not any(Path(path).is_relative_to(directory) for directory in directories):
            return status
        return os.statvfs_result([*status[:8], status.f_flag | os.ST_NOEXEC, *status[9:]])

    monkeypatch.setattr(os, "statvfs", told)


def test_a_cache_on_a_file_system_without_execution(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted_noexec(monkeypatch, own)
    with pytest.warns(RuntimeWarning, match=f"{own}: {NOEXEC}.*compiled for this process alone"):
        path = compiler.library(TINY)
    assert works(path)
    assert own not in path.parents
    assert compiler.cached("tiny", ".cubin", "0" * 64, lambda place: made(place / "x")).parent == own  # is only read


def made(path: Path) -> Path:
    """A file."""
    path.write_bytes(b"x")
    return path


def test_no_place_is_with_execution(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted_noexec(monkeypatch, own, tmp_path)
    with pytest.raises(EnvironmentProblem, match=f"cannot be compiled: .*: {NOEXEC}; .*set TMPDIR"):
        compiler.library(TINY)


MOUNTING = """
mount -t tmpfs -o noexec tmpfs "$1" || exit 77
OPTFORGE_CACHE_DIR="$1/cache" exec "$2" -c 'import numpy as np; from optforge import Optimizer
p = np.ones(3); Optimizer([p], "sgd", lr=1.0).step([p.copy()]); assert not p.any()'
"""


def test_a_file_system_that_is_really_mounted_so(tmp_path: Path, wrapper: Wrapper) -> None:
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    command = ["unshare", "-m", "sh", "-c", MOUNTING, "sh", str(mounted), sys.executable]
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert "compiled for this process alone" in done.stderr
