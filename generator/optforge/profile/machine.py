"""The machine that is measured: processor, cores, caches, what else it is doing."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..engines.c.compile import find

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
USUAL_CACHES = {"L1": 32 << 10, "L2": 1 << 20, "L3": 16 << 20}  # where the system does not tell
CALM = 0.1  # cores that others may keep busy beside a measurement


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The name of the processor."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def caches(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """Bytes of each level of cache that holds data, as one core sees it."""
    found: dict[str, int] = {}
    for index in sorted(root.glob("index*")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
            if kind != "Instruction":
                found[f"L{int(level)}"] = int(size[:-1]) * UNITS[size[-1]] if size[-1] in UNITS else int(size)
    return dict(sorted(found.items())) or dict(USUAL_CACHES)


def available() -> int:
    """Bytes of memory that may be taken without any harm."""
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def dividers(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """The cores whose dividers this process may use: threads of one core share it."""
    siblings = set()
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(cores()):
        try:
            siblings.add((root / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip())
        except OSError:
            siblings.add(str(cpu))
    return max(len(siblings), 1)


@dataclass(frozen=True)
class Moment:
    """Seconds since some start: of the clock, of what others used of all processors, of what the host took away."""

    clock: float
    others: float
    stolen: float

    @classmethod
    def now(cls) -> Moment:
        """This moment; NaN where the system does not tell."""
        clock = time.perf_counter()
        try:
            with open("/proc/stat", encoding="ascii") as file:
                fields = [*map(int, file.readline().split()[1:]), *[0] * 8]
        except (OSError, ValueError):
            return cls(clock, math.nan, math.nan)
        own, tick = os.times(), os.sysconf("SC_CLK_TCK")
        used = sum(fields[k] for k in (0, 1, 2, 5, 6)) / tick
        return cls(clock, used - own.user - own.system, fields[7] / tick)

    def busy(self, since: Moment) -> float:
        """Cores that others kept busy since an earlier moment, what the host took away among them."""
        took = self.clock - since.clock
        taken = self.others - since.others + self.stolen - since.stolen
        return max(taken / took, 0.0) if took > 0 else 0.0


def describe(isa: str) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "processor": processor(),
        "cores": cores(),
        "dividers": dividers(),
        "caches": caches(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": platform.platform(),
        "load": os.getloadavg()[0],
        "isa": isa,
        "compiler": find().version.partition("\n")[0],
        "environment": {n: v for n, v in os.environ.items() if n.startswith(("OMP_", "GOMP_", "OPTFORGE_ISA"))},
        "versions": {"optforge": __version__, "numpy": np.__version__, "python": platform.python_version()},
    }


def contended(threads: int, busy: float, own: Mapping[str, Any]) -> bool:
    """Whether others needed the cores that these threads ran on."""
    return not busy + threads <= own["cores"] + CALM
