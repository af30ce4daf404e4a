"""What the tests of the runtime share: emitted files in each of the ways to take them, compiled, and run."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cffi
import numpy as np

import optforge as of
from compiling import objects
from native import STRICT
from optforge.core.formats import Wanted
from optforge.emit import layout
from optforge.emit.c import rule_text
from places import TESTS

SOURCES = TESTS / "runtime"
WARNINGS = STRICT[1:]
WAYS = ("split", "single", "bundle")

# By the prefix of its files: rules of one and two passes, of scalar state, with totals over a tensor and over all.
RULES = {
    "adamw": of.rules.adamw,
    "lamb": of.rules.lamb,
    "novograd": of.rules.novograd,
    "clipped": of.transforms.clip_by_global_norm(max_norm=0.5) >> of.rules.momentum,
}


def emitted(way: str, rules: Mapping[str, Any] = RULES, bundle: str = "engine") -> dict[str, str]:
    """The files of some rules, whose names are their prefixes, taken in one of the ways."""
    texts = [
        rule_text(rule, *rule.stored(Wanted(), rule.definition.settings), prefix) for prefix, rule in rules.items()
    ]
    if way == "bundle":
        return layout.bundle(bundle, texts)
    files: dict[str, str] = layout.runtime() if way == "split" else {}
    for text in texts:
        files |= layout.split(text) if way == "split" else layout.single(text)
    return files


def headers(files: Iterable[str]) -> str:
    """A header that includes the headers among some files."""
    return "".join(f'#include "{name}"\n' for name in sorted(files) if name.endswith(".h"))


def write(directory: Path, files: Mapping[str, str]) -> Path:
    """Write files into a directory, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def run(command: Sequence[str | Path], directory: Path, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints, which must succeed."""
    every = None if environment is None else {**os.environ, **environment}
    answer = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, env=every, timeout=900)
    assert answer.returncode == 0, f"{' '.join(map(str, command))}\n{answer.stdout[-2000:]}\n{answer.stderr[-6000:]}"
    return answer.stdout


def battery(
    directory: Path,
    flags: Sequence[str] = (),
    way: str = "split",
    compiler: str = "gcc",
    linking: Sequence[str] = (),
    changed: Mapping[str, str] | None = None,
    threads: Sequence[str] = ("-pthread",),
    program: str = "battery",
    rules: Mapping[str, Any] = RULES,
) -> Path:
    """The program of tests/runtime/battery.c with the rules in one of the ways.

    Its tensors are too small for many threads, so that the runtime is one that wakes them for fewer elements. Words of
    the runtime that are `changed` are others. `threads` are what a compiler wants to have POSIX ones.
    """
    files = emitted(way, rules)
    for old, new in {"THREAD_SIZE = 65536": "THREAD_SIZE = 1024", **(changed or {})}.items():
        assert any(old in text for text in files.values()), old
        files = {name: text.replace(old, new) for name, text in files.items()}
    calls = " ".join(f"CALL({prefix})" for prefix in rules)
    write(directory, {**files, "emitted.h": headers(files) + f"#define RULES(CALL) {calls}\n"})
    sources, own = [name for name in files if name.endswith(".c")], SOURCES / "battery.c"
    command = usual = [compiler, "-std=gnu99", "-O2", *threads, *flags, "-I."]
    if (way, compiler) == ("split", "gcc") and flags in ([], ["-fopenmp"], ()):  # as others compile the same files
        usual = compiler_of(flags)
    made = [*objects(usual, sources, directory), *objects(command, [own], directory)]
    run([*command, *linking, *made, "-o", program, "-lm"], directory)
    return directory / program


def shared(directory: Path, files: Mapping[str, str], sources: Iterable[Path] = (), flags: Sequence[str] = ()) -> Path:
    """A shared library of emitted files and others."""
    write(directory, files)
    every = [*(name for name in files if name.endswith(".c")), *sources]
    return linked(directory, every, "library.so", flags, ["-shared"])


def linked(
    directory: Path, sources: Iterable[str | Path], name: str, flags: Sequence[str] = (), linking: Sequence[str] = ()
) -> Path:
    """What gcc links of sources of C99, without a warning."""
    command = compiler_of(flags)
    run([*command, *linking, *objects(command, sources, directory), "-o", name, "-lm"], directory)
    return directory / name


def compiler_of(flags: Sequence[str]) -> list[str]:
    """The command by which most tests compile, which so have the same objects."""
    return ["gcc", *STRICT, "-O2", *flags, "-fPIC", "-I."]


def declarations() -> str:
    """The types and calls of the runtime, as cffi takes them."""
    parts = layout.runtime_parts()
    sets = 3 if os.uname().machine == "x86_64" else 1
    text = re.sub(r"/\*.*?\*/", "", f"{parts.types}\n{parts.calls}", flags=re.S)
    text = re.sub(r"^#ifdef __cplusplus\n.*?^#endif\n", "", text + "\n", flags=re.S | re.M)
    text = re.sub(r"^ *#.*\n", "", text, flags=re.M)
    text = re.sub(r"\bOPTFORGE_(API|BEGIN_C|END_C)\b", "", text)
    return re.sub(r"\[OPTFORGE_SETS\]", f"[{sets}]", text)


class Library:
    """The runtime and some kernels, loaded through cffi."""

    def __init__(self, path: Path, extra: str = ""):
        self.ffi = cffi.FFI()
        self.ffi.cdef(declarations() + extra)
        # Never unloaded: OpenMP would go with it, from under its waiting threads.
        self.calls = self.ffi.dlopen(str(path), os.RTLD_NOW | os.RTLD_NODELETE)

    def kernel(self, prefix: str, dtype: str) -> Any:
        """The table of a rule."""
        return self.ffi.addressof(self.calls, f"{prefix}_kernel_{dtype}")

    def options(self, **values: Any) -> Any:
        """Options, defaults filled in."""
        options = self.ffi.new("optforge_options *")
        self.calls.optforge_options_init(options)
        for name, value in values.items():
            setattr(options, name, value)
        return options

    def pointer(self, array: np.ndarray | None, of: str = "void *") -> Any:
        """Where an array is."""
        return self.ffi.NULL if array is None else self.ffi.cast(of, array.ctypes.data)

    def table(self, tensors: Sequence[Sequence[np.ndarray]], sizes: Sequence[int] | None = None) -> np.ndarray:
        """Structs over the arrays of tensors: p, g and the state."""
        rows = [[own[0].size, *(array.ctypes.data for array in own)] for own in tensors]
        for row, size in zip(rows, sizes or (), strict=False):
            row[0] = size
        return np.array(rows, np.uintp)

    def text(self, status: int) -> str:
        """What a status means."""
        return str(self.ffi.string(self.calls.optforge_strerror(status)).decode())


# ---- steps over lists

NORMS = ("grad_norm", "clipped_grad_norm", "param_norm", "update_norm", "max_update_ratio")


@dataclass
class Part:
    """A list of tensors of one kernel, for optforge_list; each tensor is its arrays: p, g and the state."""

    kernel: Any
    tensors: list[list[np.ndarray]]
    t: int = 1
    hyper: Sequence[float] = ()  # of all groups; empty: the defaults
    sizes: Sequence[int] | None = None
    rows: dict[str, np.ndarray] = field(default_factory=dict)  # group, steps, number, part, starting, stream
    groups: int = 0


@dataclass
class Outcome:
    """What a step leaves, but for the arrays."""

    status: int
    stats: np.ndarray | None
    each: np.ndarray | None


STATS = np.dtype([*((name, np.float64) for name in NORMS), *((name, np.uint64) for name in ("nan", "inf", "skipped"))])


def lists_of(library: Library, parts: Sequence[Part]) -> tuple[Any, list[Any]]:
    """Lists, and what keeps their memory alive."""
    lists = library.ffi.new("optforge_list[]", max(1, len(parts)))
    kept: list[Any] = []
    for own, part in zip(lists, parts, strict=False):
        table = library.table(part.tensors)
        hyper = np.array(part.hyper or library.ffi.unpack(part.kernel.hyper_defaults, part.kernel.hypers) or [0.0])
        own.kernel, own.t, own.count, own.groups = part.kernel, part.t, len(part.tensors), part.groups
        own.hyper, own.tensors = library.pointer(hyper), library.pointer(table)
        kept += [table, hyper]
        for name, values in part.rows.items():
            kind = {"starting": np.uint8, "steps": np.uint64, "stream": np.uint64}.get(name, np.uintp)
            array = np.array(values, kind)
            kinds = {"starting": "unsigned char *", "steps": "uint64_t *", "stream": "uint64_t *"}
            setattr(own, name, library.pointer(array, kinds.get(name, "size_t *")))
            kept.append(array)
    return lists, kept


def step(
    library: Library, *parts: Part, stats: bool = False, count: int | None = None, shares: int = 0, **options: Any
) -> Outcome:
    """One step over lists, in a workspace of exactly the size that is asked for, filled with NaN.

    With `shares` it is done as if by so many threads, one behind the other.
    """
    lists, kept = lists_of(library, parts)
    sizes = options.pop("sizes", None)
    o = library.options(**options)
    if sizes is not None:
        kept.append(np.array(sizes, np.uintp))
        o.sizes, o.tensors = library.pointer(kept[-1], "size_t *"), len(sizes)
    number = count or (len(sizes) if sizes is not None else sum(len(part.tensors) for part in parts))
    total, each = np.full(1, 7, STATS), np.full(max(1, number), 7, STATS)
    if stats:
        o.stats, o.tensor_stats = (library.pointer(array, "optforge_stats *") for array in (total, each))
    size = library.calls.optforge_workspace_size(lists, len(parts), o)
    workspace = np.full(size // 8, np.nan)
    if size:
        o.workspace, o.workspace_size = library.pointer(workspace), size
    if shares:
        status = shared_step(library, lists, len(parts), o, shares)
    else:
        status = library.calls.optforge_step_lists(lists, len(parts), o)
    return Outcome(status, total[0] if stats else None, each[:number] if stats else None)


def shared_step(library: Library, lists: Any, number: int, options: Any, shares: int) -> int:
    """A step whose threads are the caller's: each takes its share of a phase, the last one first."""
    work = library.ffi.new("optforge_work *")
    status = library.calls.optforge_begin(work, lists, number, options)
    for phase in range(work.phases if status == 0 else 0):
        for k in reversed(range(shares)):
            library.calls.optforge_share(work, phase, k, shares)
        status = library.calls.optforge_fold(work, phase)
    return int(status)


def arrays(sizes: Sequence[int], dtype: Any, seed: int, states: int = 0, scalars: int = 0) -> list[list[np.ndarray]]:
    """Tensors of some sizes: p, g, states that are positive, scalar states."""
    random = np.random.default_rng(seed)
    made = []
    for n in sizes:
        own = [random.standard_normal(n).astype(dtype) for _ in range(2)]
        own += [np.abs(random.standard_normal(n)).astype(dtype) for _ in range(states)]
        own += [np.abs(random.standard_normal(1)) for _ in range(scalars)]
        made.append(own)
    return made


def same(a: Any, b: Any) -> bool:
    """Whether two nests of arrays have the same bits, any NaN like any other."""
    if isinstance(a, np.ndarray):
        if a.dtype.names:
            return all(same(a[name], b[name]) for name in a.dtype.names)
        return bool(a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))
    if isinstance(a, np.void):
        return same(np.array([a]), np.array([b]))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b or (a != a and b != b))


def fields(kernel: Any) -> tuple[int, int]:
    """How many arrays of state and scalar states a kernel has."""
    states = sum(kernel.formats[k] != 3 for k in range(2, kernel.arrays))
    return states, kernel.arrays - 2 - states


def tensors_of(kernel: Any, sizes: Sequence[int], seed: int) -> list[list[np.ndarray]]:
    """Tensors that a kernel takes."""
    dtype = {1: np.float32, 2: np.float64}[kernel.formats[0]]
    made = arrays(sizes, dtype, seed, *fields(kernel))
    order = sorted(range(2, kernel.arrays), key=lambda k: kernel.formats[k] == 3)
    return [[own[0], own[1], *(own[2 + order.index(k)] for k in range(2, kernel.arrays))] for own in made]
