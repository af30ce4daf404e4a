"""Compile C into a shared library, and keep it in the user's cache."""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import hashlib
import os
import platform
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...core.bounds import CACHED_BYTES, COMPILER_SAYS, COMPILER_SECONDS
from ...core.diagnostics import EnvironmentProblem
from ...core.reading import read_regular
from ...core.version import __version__
from ...emit.text import PACKAGE, TEMPLATES

CANDIDATES = ("cc", "gcc", "clang")
FLAGS = ("-std=c99", "-O2", "-fPIC")
# Wanted, but a compiler may lack them: each is dropped in turn until the source compiles.
OPTIONAL_FLAGS = ("-fopenmp",)
RUNTIME = ("optforge.c", "optforge.h")  # compiled once for all rules
LOCK_SECONDS = 600
UNFINISHED = ".part"
ROOM = 1 << 20  # bytes that a compilation may take
PIPE = 1 << 20  # bytes that are taken out of a pipe at once
SEAL = 64  # bytes
ADVICE = 'install gcc or clang, set CC to one, or use target="numpy", which needs none'


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
    return identify(os.environ.get("CC", ""), os.environ.get("PATH", os.defpath))


@functools.cache
def identify(cc: str, path: str) -> Compiler:
    """The compiler under these environment variables."""
    try:
        named = shlex.split(cc)
    except ValueError as problem:
        raise EnvironmentProblem(f"the variable CC is not a command: {cc} ({problem}); {ADVICE}") from None
    for command in [named] if named else [[candidate] for candidate in CANDIDATES]:
        program = shutil.which(command[0], path=path)
        if program is None:
            continue
        # Compilers run in a directory of their own.
        started = (os.path.abspath(program), *command[1:])
        try:
            answer = run([*started, "--version"])
        except OSError as problem:
            message = f"the C compiler {program} does not start: {problem.strerror}; {ADVICE}"
            raise EnvironmentProblem(message) from None
        status = os.stat(program)
        version = answer.stdout + answer.stderr
        return Compiler(started, f"{version.decode(errors='replace')}{status.st_size} {status.st_mtime_ns}")
    if named:
        raise EnvironmentProblem(f"there is no C compiler {named[0]!r}, which the variable CC names; {ADVICE}")
    raise EnvironmentProblem(f"there is no C compiler (looked for {', '.join(CANDIDATES)}); {ADVICE}")


def run(
    command: Sequence[str], directory: Path | None = None, seconds: int = COMPILER_SECONDS
) -> subprocess.CompletedProcess[bytes]:
    """Run a compiler; what it writes on its way stays in the directory, and of what it says the beginning is kept.

    Raises
    ------
    EnvironmentProblem
        It does not end.
    OSError
        It does not start.
    """
    environment = {**os.environ, "TMPDIR": str(directory)} if directory else None
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,  # with all that it starts
    )
    with process:
        try:
            said = heard(process, time.monotonic() + seconds)
        except BaseException as problem:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(problem, TimeoutError):
                message = f"the compiler had not ended after {seconds} s, and was stopped:\n$ {shlex.join(command)}"
                raise EnvironmentProblem(message) from None
            raise
    return subprocess.CompletedProcess(command, process.returncode, *said)


def heard(process: subprocess.Popen[bytes], deadline: float) -> list[bytes]:
    """What a process says until it ends, on standard output and on standard error.

    Raises
    ------
    TimeoutError
        It does not end in time.
    """
    assert process.stdout is not None and process.stderr is not None
    said = {process.stdout.fileno(): b"", process.stderr.fileno(): b""}
    with selectors.DefaultSelector() as selector:
        for handle in said:
            selector.register(handle, selectors.EVENT_READ)
        ended = False
        while not ended:
            left = deadline - time.monotonic()
            if left < 0:
                raise TimeoutError
            # Others may hold the pipes open when it has ended: what it said itself is in them by then.
            ended = process.poll() is not None
            for key, _ in selector.select(0 if ended else min(left, 0.1)):
                piece = os.read(key.fd, PIPE)
                said[key.fd] += piece[: COMPILER_SAYS - len(said[key.fd])]
                if not piece:
                    selector.unregister(key.fd)
            if not selector.get_map():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(left, 0.1))
    return list(said.values())


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
        There is no compiler, it fails, or others can write to the cache.
    """
    return promised(stem_of(files), texts(files), lambda: files)


def promised(stem: str, identity: Iterable[bytes], files: Callable[[], Mapping[str, str]]) -> Path:
    """The shared library of C sources that are made only where they are not compiled yet.

    Parameters
    ----------
    stem : str
        What the file is called in the cache.
    identity : iterable of bytes
        What the text of the sources is made of: as long as it is the same, they are.
    files : callable
        Makes the sources: file names with their text.

    Raises
    ------
    EnvironmentProblem
        As of `library`.
    """
    compiler = find()
    own = [*compiler.command, compiler.version, *FLAGS, *OPTIONAL_FLAGS, cpu(), sys.platform]
    parts = [part.encode() for part in own]

    def build(work: Path) -> Path:
        given, linked = files(), []
        if RUNTIME[0] in given:
            runtime = {name: given[name] for name in RUNTIME}
            key = digest([*parts, *texts(runtime)])
            linked = [cached("optforge", ".o", key, lambda work: compile_files(compiler, runtime, work, ("-c",)))]
        rest = {name: text for name, text in given.items() if name != RUNTIME[0]}
        return compile_files(compiler, rest, work, ("-shared", *map(str, linked), "-lm"))

    return cached(stem, ".so", digest([*parts, *identity]), build)


def texts(files: Mapping[str, str]) -> list[bytes]:
    """Names and texts of files, in order."""
    return [part.encode() for item in sorted(files.items()) for part in item]


def stem_of(files: Mapping[str, str]) -> str:
    """The name of the `.c` among files that is not the runtime's."""
    return next(name for name in files if name.endswith(".c") and name != RUNTIME[0])[:-2]


@functools.cache
def generator() -> bytes:
    """Which generator this is: its version, and size and time of each of its files."""
    found = []
    for place in (PACKAGE, TEMPLATES):
        for directory, inner, names in os.walk(place):
            inner[:] = sorted(set(inner) - {"__pycache__"})
            for path in (os.path.join(directory, name) for name in sorted(names)):
                found.append((path, (status := os.stat(path)).st_size, status.st_mtime_ns))
    return repr((__version__, found)).encode()


def cached(stem: str, ending: str, key: str, build: Callable[[Path], Path]) -> Path:
    """A compiled file of this key, taken from the cache or built now, in a directory that `build` is given.

    Raises
    ------
    EnvironmentProblem
        It cannot be built, or others can write to the cache.
    """
    readable = stem if stem.isascii() and len(stem) < 64 else "rule"
    try:
        directory = cache_directory()
        check_executable(directory, ending)
        target = directory / f"{readable}-{key[:32]}{ending}"
        if intact(target, key):
            return target
        with locked(target.with_suffix(".lock")):
            if not intact(target, key):
                for left in directory.glob(f"{target.stem}.*{UNFINISHED}"):  # by a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                with tempfile.TemporaryDirectory(UNFINISHED, f"{target.stem}.", directory) as work:
                    publish(build(Path(work)), target, key)
        return target
    except (OSError, NotImplementedError) as problem:  # the latter where the file system has no locks
        return private(build, ending, key, problem)


def digest(parts: Iterable[bytes]) -> str:
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
    directory = Path(named).absolute() if named else platformdirs.user_cache_path("optforge", appauthor=False)
    if not directory.is_absolute():
        raise FileNotFoundError(errno.ENOENT, "there is no home directory", str(directory))
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if os.name == "posix" and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        foreign = status.st_uid != os.geteuid()
        what = "belongs to another user" if foreign else "can be written by others"
        mend = "" if foreign else f"chmod go-w {shlex.quote(str(directory))}, or "
        raise EnvironmentProblem(
            f"the cache {directory} {what}, so any code could be in it, and is not used: {mend}set "
            "OPTFORGE_CACHE_DIR to a directory of your own"
        )
    return directory


def intact(target: Path, key: str) -> bool:
    """Whether the library is there, whole, and of this key."""
    try:
        seal = read_regular(target.with_suffix(".sha256"), SEAL)
        return seal == digest([key.encode(), read_regular(target, CACHED_BYTES)]).encode()
    except OSError:
        return False


def publish(built: Path, target: Path, key: str) -> None:
    """Move a library into the cache, and then its seal, each complete or not at all."""
    seal = built.with_suffix(".sha256")
    seal.write_text(digest([key.encode(), built.read_bytes()]))
    for path, place in ((built, target), (seal, target.with_suffix(".sha256"))):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(path, place)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system takes back when its holder dies."""
    import filelock

    path.touch(mode=0o600)  # where this fails nobody holds the lock, and there is nothing to wait for
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


def check_executable(directory: Path, ending: str) -> None:
    """Raise OSError where libraries cannot be loaded from a directory."""
    if ending == ".so" and os.statvfs(directory).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise PermissionError(
            errno.EACCES, "nothing there can be loaded, its file system is mounted noexec", str(directory)
        )


def private(build: Callable[[Path], Path], ending: str, key: str, problem: Exception) -> Path:
    """A file for this process alone, with a warning: what is done where the cache cannot be used.

    Raises
    ------
    EnvironmentProblem
        It cannot be compiled, or there is no place for temporary files either.
    """
    if key in PRIVATE and PRIVATE[key].exists():
        return PRIVATE[key]
    try:
        work = Path(tempfile.mkdtemp(prefix="optforge-"))
        atexit.register(discard, work, os.getpid())
        check_executable(work, ending)
        PRIVATE[key] = build(work)
    except OSError as also:
        message = (
            f"the kernel cannot be compiled: {described(also)}; free some space, or set TMPDIR to another directory"
        )
        raise EnvironmentProblem(message) from None
    message = (
        f"optforge's cache cannot be used ({described(problem)}): the kernel was compiled for this process alone; "
        "OPTFORGE_CACHE_DIR can name another directory"
    )
    warnings.warn(message, RuntimeWarning, stacklevel=4)
    return PRIVATE[key]


PRIVATE: dict[str, Path] = {}


def discard(directory: Path, process: int) -> None:
    """Remove a directory when the process that made it ends, not when its children do."""
    if os.getpid() == process:
        shutil.rmtree(directory, ignore_errors=True)


def described(problem: Exception) -> str:
    """What an error of the system is, and where."""
    place, text = getattr(problem, "filename", None), getattr(problem, "strerror", None) or str(problem)
    return f"{place}: {text}" if place else text


def compile_files(compiler: Compiler, files: Mapping[str, str], directory: Path, own: Sequence[str]) -> Path:
    """Compile in a directory, `own` flags behind the sources; optional ones that the compiler lacks are left out.

    Raises
    ------
    EnvironmentProblem
        The compiler fails.
    OSError
        The directory cannot be written, or the disk is full.
    """
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    sources = [name for name in files if name.endswith(".c")]
    built = directory / "kernel.so"
    for dropped in ((), *((flag,) for flag in OPTIONAL_FLAGS), OPTIONAL_FLAGS):
        flags = [flag for flag in OPTIONAL_FLAGS if flag not in dropped]
        command = [*compiler.command, *FLAGS, *flags, "-o", str(built), *sources, *own]
        answer = run(command, directory)
        if answer.returncode == 0 and built.exists():
            return built
    # A compiler that finds the disk full says so in words of its own: here it is an OSError.
    (directory / "room").write_bytes(bytes(ROOM))
    said = answer.stderr.decode(errors="replace").strip() or f"it said nothing; exit status {answer.returncode}"
    raise EnvironmentProblem(
        f"the C compiler {compiler.command[0]} failed:\n$ {shlex.join(command)}\n{said}\n"
        "Set CC to a compiler that works."
    )
