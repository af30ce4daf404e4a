"""A profile: kernels against the limits of the machine, measured in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..emit import layout
from ..engines.memory import memory
from . import counters, kernels, machine, objects
from .kernels import Compiled, Tensors, Timed
from .limits import WORKS
from .measure import BLOCK_SECONDS, FEWEST, LEAST, SETTLE_SECONDS, Rounds, turns
from .models import LEVELS, Model
from .statistics import estimate

LAPS = 3  # over all cases, each with arrays of its own: where they lie matters
SHORT = 40.0  # seconds that all laps may take, however few were asked for
HASTE = 5.0  # seconds below which there is one lap
HUGE = 48 << 20  # elements beyond which one lap has to do
OVERTIME = 1.3  # of the time, after which there is no further lap
PHASE_STEPS = 9  # of which each phase is timed
ROOM = 0.6  # of the memory that is available, which arrays may take
BUSY_SECONDS = 0.15


@dataclass(frozen=True)
class Case:
    """One row of a profile.

    Attributes
    ----------
    own : Compiled
    kind : int
        How arrays are stored, by its place among the ways.
    work : str
        "step", or "phase": unscale, scan for what is not finite, step, statistics.
    model : Model
    threads : int
    isa : str
    cold : bool
        Whether the caches are emptied before each step.
    """

    own: Compiled
    kind: int
    work: str
    model: Model
    threads: int
    isa: str
    cold: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from the others, for people too."""
        store = self.own.needs[self.kind].storage.suffix
        cache = "cold" if self.cold else "warm"
        return (self.own.rule.name, store, self.work, self.model.name, self.threads, self.isa, cache)

    @property
    def label(self) -> str:
        """For the progress bar."""
        rule, store, work, size, threads, *_ = self.key
        return f"{rule} {store} {work} {size}, {threads} thread{'s' * (threads > 1)}"

    @property
    def weight(self) -> float:
        """Its share of the time: what is larger than the caches takes longer."""
        return 1 + min(self.model.elements / 2**25, 4) + self.cold


@dataclass
class Wanted:
    """What a profile is of."""

    compiled: Sequence[Compiled]
    sizes: Sequence[str]
    threads: Sequence[int] | None
    isas: Sequence[str] | None
    seconds: float


@dataclass
class Measured:
    """What was measured of a case."""

    case: Case
    rounds: Rounds
    laps: int = 0  # each with arrays of its own
    phases: list[list[float]] = field(default_factory=list)  # seconds of the phases of some steps
    streams: list[list[float]] = field(default_factory=list)  # and of their streams
    counters: dict[str, float] = field(default_factory=dict)


def shares(elements: int, threads: int) -> int:
    """The threads that a kernel makes use of: it decides by its work."""
    return min(threads, 1 + elements // layout.constant("OPTFORGE_THREAD_SIZE", "optforge.c"))


def cases(wanted: Wanted, models: Callable[[int], Sequence[Model]], note: Callable[[str], None]) -> list[Case]:
    """All rows, in the order in which they are shown."""
    every, most = machine.cores(), machine.available()
    found: list[Case] = []
    for own in wanted.compiled:
        best = own.isa
        for kind, needed in enumerate(own.needs):
            for model in models(needed.resident):
                if needed.resident * model.elements > ROOM * most:
                    note(f"{model.label} was left out: its arrays need more memory than is available")
                    continue
                alone = len(model.shapes) == 1
                usual = [1, every] if alone else [every]
                threads = sorted({shares(model.elements, n) for n in wanted.threads or usual})
                for work in WORKS:
                    listed = threads if work == "step" or wanted.threads else threads[-1:]
                    for isa in wanted.isas or [best]:
                        found += [Case(own, kind, work, model, n, isa) for n in listed]
                if not wanted.isas and model.name == "L2":
                    found += [Case(own, kind, "step", model, 1, isa) for isa in own.sets() if isa != best]
                if alone and model.name in LEVELS[:-1] and kind == 0:
                    found.append(Case(own, kind, "step", model, 1, best, cold=True))
    return [*{case.key: case for case in found}.values()]


def measure(
    wanted: Wanted, every: Sequence[Case], progress: Callable[[str, float], None]
) -> tuple[list[Measured], list[dict[str, Any]]]:
    """Measure all cases in some laps; and the machine's bandwidth at each level of cache."""
    found = {case.key: Measured(case, Rounds([])) for case in every}
    total = sum(case.weight for case in every)
    laps = LAPS if wanted.seconds >= HASTE else 1
    per_lap = 0.9 * wanted.seconds / laps
    block = min(BLOCK_SECONDS, per_lap / total / FEWEST)
    bandwidths = list(bandwidth(wanted.compiled[0], wanted.threads or [1, machine.cores()], progress))
    evict = evicting() if any(case.cold for case in every) else None
    start = time.perf_counter()
    for lap in range(laps):
        for case in every:
            if lap and time.perf_counter() - start > max(OVERTIME * wanted.seconds, SHORT):
                continue
            progress(f"{case.label}, lap {lap + 1} of {laps}", case.weight / total / laps)
            if case.model.elements > HUGE and lap:
                continue
            own = found[case.key]
            seconds = per_lap * case.weight / total * (laps if case.model.elements > HUGE else 1)
            one_lap(case, own, seconds, block, evict)
    for case in every:
        case.own.use(wanted.compiled[0].isa)
    return [*found.values()], bandwidths


def evicting() -> Any:
    """Memory whose writing empties the caches."""
    return np.frombuffer(memory(2 * max(machine.caches().values())), np.uint8)


def one_lap(case: Case, found: Measured, seconds: float, block: float, evict: Any) -> None:
    """Rounds of one case, with arrays of its own."""
    own, phase = case.own, case.work == "phase"
    before = own.isa
    if not own.use(case.isa):
        raise ValueError(case.isa)
    try:
        scale = kernels.LOSS_SCALE if phase else 1.0
        tensors = Tensors(case.model, own.needs[case.kind], own.kernel, scale)
        cold = evict if case.cold else None
        steps = kernels.kernel_steps(own, case.kind, tensors, case.threads, phase, cold)
        contenders: list[Timed] = [steps]
        contenders.append(kernels.streams(own, case.kind, tensors, case.threads, case.work, cold))
        if (divider := kernels.divider(own, case.kind)) is not None:
            contenders.append(divider)
        block *= 5 if case.cold else 1
        settle = SETTLE_SECONDS if case.threads > 1 else 0.0
        fewest = 3 if case.cold else FEWEST
        rounds = turns(contenders, seconds, block, settle, fewest)
        if not found.rounds.names:
            found.rounds = rounds
        else:
            found.rounds.add(rounds)
        found.laps += 1
        steps.check()
        if not case.cold and not found.counters:
            found.counters = counters.of_steps(steps, case.model.elements)
        if not case.cold and len(own.needs[case.kind].of(case.work)) > 1:
            by_phase(case, found, steps, tensors)
        for contender in contenders:
            contender.free()
    finally:
        own.use(before)


def by_phase(case: Case, found: Measured, steps: Timed, tensors: Tensors) -> None:
    """Time the phases of some steps, and the streams of each."""
    own, number = case.own, len(case.own.needs[case.kind].of(case.work))
    times = [kernels.phase_times(own, steps, case.threads) for _ in range(PHASE_STEPS)]
    found.phases += [step for step in times if len(step) == number]
    alone = []
    for k in range(number):
        contender = kernels.streams(own, case.kind, tensors, case.threads, case.work, None, k)
        alone.append(contender.run(1, PHASE_STEPS).tolist())
        contender.free()
    found.streams += [list(step) for step in zip(*alone, strict=False)]


def bandwidth(
    own: Compiled, threads_of: Sequence[int], progress: Callable[[str, float], None]
) -> Iterator[dict[str, Any]]:
    """Bytes per second of reading, copying and a triad, out of each level of cache and out of memory."""
    known = machine.caches()
    last = max(known.values())
    sizes = {level: room * (5 if level != "L3" else 3) // 8 for level, room in known.items()}
    sizes["memory"] = min(4 * last, machine.available() // 4)
    for threads in sorted(set(threads_of)):
        for level, room in sizes.items():
            progress(f"memory bandwidth, {level}, {threads} thread{'s' * (threads > 1)}", 0.0)
            # The last level is shared by all, the nearer ones are each core's own.
            n = max(room // 24 // (threads if level in ("L3", "memory") else 1) // 64 * 64, 64)
            data = np.frombuffer(memory(3 * 8 * n * threads), np.float64)
            contenders = [kernels.bandwidth(own, kind, threads, n, data) for kind in kernels.BANDWIDTHS]
            rounds = turns(contenders, BUSY_SECONDS, 0.01, SETTLE_SECONDS if threads > 1 else 0.0, 3)
            row: dict[str, Any] = {"level": level, "threads": threads, "bytes": 24 * n * threads}
            for kind, (_, moved) in kernels.BANDWIDTHS.items():
                repeats = own.calls.profile_bandwidth_repeats(contenders[0].context)
                row[kind] = 8 * moved * n * threads * repeats / min(rounds.low(kind))
            yield row
            for contender in contenders:
                contender.free()


# ── what it means ───────────────────────────────────────────────────────────────────────────────────────────────────


def row(own: Measured, about: dict[str, Any]) -> dict[str, Any]:
    """A row of the document: what was measured of a case, and what follows."""
    case, rounds = own.case, own.rounds
    needed, n = case.own.needs[case.kind], case.model.elements
    rule, store, work, size, threads, isa, cache = case.key
    calm = [k for k, busy in enumerate(rounds.busy) if not machine.contended(threads, busy, about)]
    contended = len(calm) < LEAST
    used = range(len(rounds.blocks)) if contended else calm
    nanoseconds = 1e9 / n

    def of(name: str) -> list[float]:
        low = rounds.low(name)
        # The divider of one core is timed, and each core has its own.
        scale = n / (min(threads, about["dividers"]) * kernels.DIVIDED) if name == "divider" else 1.0
        return [low[k] * scale for k in used]

    step, traffic = of("kernel"), of("traffic")
    divider = of("divider") if "divider" in rounds.names else [0.0] * len(step)
    limit = [max(a, b) for a, b in zip(traffic, divider, strict=True)]
    share = estimate([b / a for a, b in zip(step, limit, strict=True)])
    taken = estimate([a * nanoseconds for a in step])
    moved = needed.bytes(work)
    operations = needed.operations(work)
    code = [objects.of_pass(case.own.path, prefix(case.own), k, store, isa) for k in range(len(needed.of("step")))]
    return {
        "rule": rule,
        "hash": case.own.rule.hash,
        "store": store,
        "work": work,
        "size": {"name": size, "tensors": len(case.model.shapes), "elements": n},
        "threads": threads,
        "isa": isa,
        "cache": cache,
        "level": "memory" if case.cold else level(needed.resident * n, about["caches"]),
        "bytes": moved,
        "sums": needed.sums(work),
        "operations": dict(operations),
        "ns": vars(taken),
        "traffic_ns": float(np.median(traffic)) * nanoseconds,
        "divider_ns": float(np.median(divider)) * nanoseconds,
        "share": vars(share),
        "gbs": moved / taken.value,
        "contended": contended,
        "phases": phases(own, needed.of(work), nanoseconds),
        "counters": own.counters,
        "code": [own_code.as_dict() for own_code in code if own_code is not None],
        "rounds": {"laps": own.laps, **rounds.as_dict()},
    }


def level(size: int, caches: dict[str, int]) -> str:
    """The nearest level of cache that holds so many bytes, or "memory"."""
    return next((name for name, room in caches.items() if size <= room), "memory")


def prefix(own: Compiled) -> str:
    """What the names of emitted functions begin with."""
    from ..core.names import file_of

    return file_of(own.rule.name) if own.rule.name.isascii() else "rule"


def phases(own: Measured, passes: Sequence[Any], nanoseconds: float) -> list[dict[str, Any]]:
    """Each phase: bytes, time, and that of its streams alone."""
    if not own.phases or not own.streams:
        return []
    times = np.percentile(np.array(own.phases), 25, axis=0) * nanoseconds
    streams = np.percentile(np.array(own.streams), 25, axis=0) * nanoseconds
    return [
        {
            "bytes": part.bytes,
            "ns": float(taken),
            "traffic_ns": float(least),
            "gbs": part.bytes / float(taken),
            "reads": [s.name for s in part.streams if s.reads],
            "writes": [s.name for s in part.streams if s.writes],
        }
        for part, taken, least in zip(passes, times, streams, strict=True)
    ]
