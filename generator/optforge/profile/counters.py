"""What the processor counts while a kernel runs, by `perf stat`, where the machine gives it."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from functools import cache

from .kernels import Timed

EVENTS = ("cycles", "instructions", "cache-misses", "branch-misses")
SECONDS = 0.2


def parse(text: str) -> dict[str, float]:
    """The counts in what `perf stat -x,` says; those that are not supported or not counted are left out."""
    found = {}
    for line in text.splitlines():
        fields = line.split(",")
        name = fields[2].partition(":")[0] if len(fields) > 2 else ""
        if name in EVENTS:
            try:
                found[name] = float(fields[0])
            except ValueError:  # <not supported>, <not counted>
                continue
    return found


def attached(seconds: float) -> dict[str, float]:
    """What this process does in so many seconds; empty where there is no perf, or it may not look."""
    program = shutil.which("perf")
    if program is None:
        return {}
    command = [program, "stat", "-x,", "-e", ",".join(EVENTS), "-p", str(os.getpid()), "--", "sleep", str(seconds)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20 + seconds)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return parse(answer.stderr) if answer.returncode == 0 else {}


@cache
def available() -> bool:
    """Whether the machine counts anything."""
    return "cycles" in attached(0.01)


def of_steps(steps: Timed, elements: int) -> dict[str, float]:
    """Counts per element of a kernel's steps; empty where nothing counts."""
    if not available():
        return {}
    runner = threading.Thread(target=lambda: steps.run(1, 1 << 20, 3 * SECONDS))
    runner.start()
    counted = attached(SECONDS)
    runner.join()
    # What is counted in a second, by the steps that are done in one.
    return {name: value / SECONDS * steps.took / elements for name, value in counted.items()}
