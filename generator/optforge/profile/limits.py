"""What bounds a kernel: the bytes that its phases must move, and the divisions and roots that it must do.

Both limits are measured and not looked up: for each phase a loop is emitted that reads and writes the same streams and
computes nothing, and one that does the rule's divisions and roots on data in the nearest cache and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.blocks import SCALES
from ..core.formats import Storage
from ..core.ir import Kernel, Phase, Type
from ..emit.text import render_template

WORKS = ("step", "phase")
FREE = frozenset({"ref", "load", "round", "const"})  # which take no operation of their own
DIVIDER = ("div", "sqrt")


@dataclass(frozen=True)
class Stream:
    """An array that a phase reads, writes or both: its place in a tensor's struct, and bytes per element."""

    name: str
    place: int
    bytes: int
    reads: bool
    writes: bool

    @property
    def moved(self) -> int:
        """Bytes moved per element."""
        return self.bytes * (self.reads + self.writes)


@dataclass(frozen=True)
class Pass:
    """A phase as a profile sees it: its streams, and how many operations it does for an element.

    `sums` are the totals that formulas ask for, and those that the statistics do.
    """

    streams: tuple[Stream, ...]
    operations: Mapping[str, int]
    sums: tuple[int, int]
    optional: bool

    @property
    def bytes(self) -> int:
        """Bytes that it must move per element."""
        return sum(stream.moved for stream in self.streams)


@dataclass(frozen=True)
class Needs:
    """What a kernel needs for each element, with arrays stored in one way."""

    storage: Storage
    names: tuple[str, ...]
    passes: tuple[Pass, ...]

    def of(self, work: str) -> tuple[Pass, ...]:
        """The passes of a plain step, or of the whole phase: the scan of the gradients too, where there is one."""
        return tuple(own for own in self.passes if work == "phase" or not own.optional)

    def bytes(self, work: str) -> int:
        """Bytes that must be moved per element."""
        return sum(own.bytes for own in self.of(work))

    def operations(self, work: str) -> Counter[str]:
        """Arithmetic operations per element, by name."""
        total: Counter[str] = Counter()
        for own in self.of(work):
            total.update(own.operations)
        return total

    def sums(self, work: str) -> int:
        """Totals that are added up for each element."""
        return sum(own.sums[0] + (own.sums[1] if work == "phase" else 0) for own in self.of(work))

    @property
    def divisions(self) -> int:
        """Divisions per element of a step."""
        return self.operations("step")["div"]

    @property
    def roots(self) -> int:
        """Square roots per element of a step."""
        return self.operations("step")["sqrt"]

    @property
    def resident(self) -> int:
        """Bytes per element of all arrays."""
        beside = self.storage.beside.format.bytes if self.storage.beside else 0
        return beside + sum(own.bytes for _, own in self.storage.formats)


def needs(kernel: Kernel, storage: Storage) -> Needs:
    """What a kernel needs, with arrays stored so."""
    names = ["p", "g", *(state.name for state in kernel.state)]
    if storage.beside is not None and storage.beside.name not in names:
        names.append(storage.beside.name)
    names += [name + SCALES for name in storage.scaled if name + SCALES not in names]  # too few bytes to be a stream
    passes = tuple(
        Pass(tuple(streams(phase, storage, names)), operations(phase), sums(phase), phase.optional)
        for phase in kernel.phases
    )
    return Needs(storage, tuple(names), passes)


def streams(phase: Phase, storage: Storage, names: Sequence[str]) -> list[Stream]:
    """The streams of a phase, in the order of the tensor's struct."""
    loads, stores = set(phase.loads), {name for name, _ in phase.stores}
    found = []
    for place, name in enumerate(names):
        reads, writes, bytes = name in loads, name in stores, 0
        if storage.beside is not None and name == storage.beside.name:
            reads, writes, bytes = "p" in loads, "p" in stores, storage.beside.format.bytes
        elif name in dict(storage.formats):
            bytes = storage[name].bytes
            # A master of floats has all of p, which is then not read itself.
            reads = reads and not (name == "p" and storage.master == "f32")
        if bytes and (reads or writes):
            found.append(Stream(name, place, bytes, reads, writes))
    return found


def sums(phase: Phase) -> tuple[int, int]:
    """How many totals a phase adds up: those that formulas ask for, and those that the statistics do."""
    observed = sum(reduction.observed for reduction in phase.reductions)
    return len(phase.reductions) - observed, observed


def operations(phase: Phase) -> Counter[str]:
    """What a phase computes for each element, by the name of the operation."""
    total: Counter[str] = Counter()
    for let in phase.lets:
        for expr in let.expr.walk():
            if expr.type in (Type.ELEMENT, Type.MASK) and expr.op not in FREE:
                total[expr.op] += 1
    return total


def source(prefix: str, every: Sequence[Needs]) -> str:
    """The C of both limits of a rule, for each way in which its arrays are stored."""
    shown = [
        {
            "suffix": own.storage.suffix,
            "real": own.storage.real.c,
            "root": f"sqrt{own.storage.real.math}",
            "passes": [
                [
                    {"name": f"a{s.place}", "place": s.place, "bits": 8 * s.bytes, "writes": s.writes, "reads": s.reads}
                    for s in part.streams
                ]
                for part in own.passes
            ],
            "divisions": own.divisions,
            "roots": own.roots,
        }
        for own in every
    ]
    return render_template("profile/limits.c.j2", {"prefix": prefix, "kinds": shown})
