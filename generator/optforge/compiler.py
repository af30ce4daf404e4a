"""Compile C into a shared library, and keep it in the user's cache."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .diagnostics import EnvironmentProblem

CANDIDATES = ("cc", "gcc", "clang")
FLAGS = ("-std=c99", "-O2", "-fPIC", "-shared")
# Wanted, but a compiler may lack them: each is dropped in turn until the source compiles.
OPTIONAL_FLAGS = ("-fopenmp", "-march=native")
LOCK_SECONDS = 600


@dataclass(frozen=True)
class Compiler:
    """A C compiler: the command, and what it says it is."""

    command: tuple[str, ...]
    version: str


def find() -> Compiler:
    """The compiler of $CC, else the first of cc, gcc and clang.

    Raises
    ------
    EnvironmentProblem
        There is none.
    """
    return identify(os.environ.get("CC", ""), os.environ.get("PATH", ""))


@functools.cache
def identify(cc: str, path: str) -> Compiler:
    """The compiler under these environment variables."""
    wanted = [shlex.split(cc)] if cc.strip() else [[candidate] for candidate in CANDIDATES]
    for command in wanted:
        program = shutil.which(command[0], path=path)
        if program is None:
            continue
        try:
            answer = subprocess.run([program, *command[1:], "--version"], capture_output=True, check=False)
        except OSError as problem:
            raise EnvironmentProblem(f"the C compiler {program} does not start: {problem.strerror}") from None
        stat = os.stat(program)
        version = f"{answer.stdout.decode(errors='replace')}{stat.st_size} {stat.st_mtime_ns}"
        return Compiler((program, *command[1:]), version)
    advice = 'install gcc or clang, set CC to one, or use target="numpy", which needs none'
    if cc.strip():
        raise EnvironmentProblem(f"there is no C compiler {cc!r}, which the variable CC names: {advice}")
    raise EnvironmentProblem(f"there is no C compiler (looked for {', '.join(CANDIDATES)}): {advice}")


def cpu() -> str:
    """What this processor is and can do; a library built for it may not run on another."""
    return identify_cpu()


@functools.cache
def identify_cpu() -> str:
    """Read once per process."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part", "isa")
        first: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() in wanted:
                first.setdefault(name.strip(), value.strip())
            elif first and not line.strip():
                break
        if first:
            return f"{platform.machine()} {first}"
    return f"{platform.machine()} {platform.processor()}"


def library(files: Mapping[str, str]) -> Path:
    """The shared library of C sources, compiled now or taken from the cache.

    Parameters
    ----------
    files : Mapping[str, str]
        File names with their text: headers, and one `.c`.

    Raises
    ------
    EnvironmentProblem
        There is no compiler, it fails, or the cache is not safe to use.
    """
    compiler = find()
    parts = [*compiler.command, compiler.version, *FLAGS, *OPTIONAL_FLAGS, cpu(), sys.platform]
    key = digest(part.encode() for part in [*parts, *(text for item in sorted(files.items()) for text in item)])
    stem = next(name for name in files if name.endswith(".c"))[:-2]
    readable = stem if stem.isascii() and len(stem) < 64 else "rule"
    try:
        directory = cache_directory()
    except OSError as problem:
        return unpublished(compiler, files, f"cannot be made: {problem.strerror or problem}")
    target = directory / f"{readable}-{key[:32]}.so"
    if intact(target, key):
        return target
    try:
        with locked(target.with_suffix(".lock")):
            if not intact(target, key):
                for left in directory.glob(f"{target.stem}.*.part"):  # by a process that was killed
                    left.unlink(missing_ok=True)
                with tempfile.TemporaryDirectory(prefix="optforge-") as work:
                    publish(compile_files(compiler, files, Path(work)), target, key)
    except OSError as problem:
        return unpublished(compiler, files, f"cannot be written: {problem.strerror or problem}")
    return target


def digest(parts: Iterator[bytes]) -> str:
    """SHA-256 over byte strings, each with its length."""
    total = hashlib.sha256()
    for part in parts:
        total.update(b"%d\n" % len(part) + part)
    return total.hexdigest()


def cache_directory() -> Path:
    """The user's cache, made with mode 0700 if it is not there; $OPTFORGE_CACHE_DIR names another.

    Raises
    ------
    EnvironmentProblem
        Others can write to it, and so could have put any code there.
    OSError
        It cannot be made.
    """
    import platformdirs

    named = os.environ.get("OPTFORGE_CACHE_DIR")
    directory = Path(named) if named else platformdirs.user_cache_path("optforge", appauthor=False)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if os.name == "posix" and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        advice = f"chmod 700 {shlex.quote(str(directory))}, or set OPTFORGE_CACHE_DIR to a directory of your own"
        raise EnvironmentProblem(f"the cache {directory} can be written by others and is not used: {advice}")
    return directory


def intact(target: Path, key: str) -> bool:
    """Whether the library is there, whole, and of this key."""
    try:
        seal = target.with_suffix(".sha256").read_text()
        return seal == digest(iter([key.encode(), target.read_bytes()]))
    except (OSError, UnicodeDecodeError):
        return False


def publish(built: Path, target: Path, key: str) -> None:
    """Put a library and its seal into the cache, each complete or not at all."""
    content = built.read_bytes()
    seal = digest(iter([key.encode(), content])).encode()
    for path, data in ((target, content), (target.with_suffix(".sha256"), seal)):
        handle, part = tempfile.mkstemp(prefix=f"{target.stem}.", suffix=".part", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(part, 0o700 if path is target else 0o600)
            os.replace(part, path)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system takes back when its holder dies."""
    import filelock

    lock = filelock.FileLock(path, timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except filelock.Timeout:
        message = f"another process has held {path} for {LOCK_SECONDS} s; end it, or remove the file"
        raise EnvironmentProblem(message) from None
    try:
        yield
    finally:
        lock.release()


def unpublished(compiler: Compiler, files: Mapping[str, str], why: str) -> Path:
    """A library for this process alone, with a warning: what is done where the cache cannot be used."""
    message = f"optforge's cache {why}; the kernel was compiled for this process alone"
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    work = tempfile.TemporaryDirectory(prefix="optforge-")
    KEPT.append(work)
    return compile_files(compiler, files, Path(work.name))


KEPT: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def compile_files(compiler: Compiler, files: Mapping[str, str], directory: Path) -> Path:
    """Compile in a directory; optional flags that the compiler does not know are left out."""
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    sources = [name for name in files if name.endswith(".c")]
    built = directory / "kernel.so"
    failures = []
    for dropped in ((), *((flag,) for flag in OPTIONAL_FLAGS), OPTIONAL_FLAGS):
        flags = [flag for flag in OPTIONAL_FLAGS if flag not in dropped]
        command = [*compiler.command, *FLAGS, *flags, "-o", str(built), *sources, "-lm"]
        answer = subprocess.run(command, cwd=directory, capture_output=True, check=False)
        if answer.returncode == 0 and built.exists():
            return built
        failures.append(f"$ {shlex.join(command)}\n{answer.stderr.decode(errors='replace').strip()}")
    raise EnvironmentProblem(f"the C compiler {compiler.command[0]} failed:\n{failures[-1]}")
