"""Compile hostile files, each in a process of its own that a limit of time and of memory ends; run by test_hostile_sizes.

    python hostile_runner.py CASES.json

CASES is a list of files, each with the name asked for in it and what is done: "show", "generate", "numpy". Each gives a line of JSON: what its commands ended with,
seconds of the processor, MiB at the most, and what was written on standard error.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from optforge import Optimizer, cli
from optforge.core.diagnostics import OptforgeError
from optforge.emit.text import environment
from optforge.library.rule import Rule

SECONDS, PATIENCE = 5, 120  # of the processor; until it counts as waiting for ever
MEBIBYTES = 500


def commands(path: str, name: str, wanted: list[str], out: str) -> tuple[list[int], list[float]]:
    """The exit codes of what reads a rule file, and its times."""
    codes, times = [], [time.process_time()]
    rule, emitted = f"{path}:{name}", ["--target", "c", "--target", "cuda", "--out", out]
    for arguments in [["show", rule]] * ("show" in wanted) + [["generate", rule, *emitted]] * ("generate" in wanted):
        try:
            cli.main(arguments)
        except SystemExit as end:
            codes.append(end.code)
        times.append(time.process_time())
    if "numpy" not in wanted:
        return codes, [after - before for before, after in itertools.pairwise(times)]
    try:
        Optimizer([np.ones(3, np.float32)], Rule.from_file(path, name), target="numpy")
        codes.append(0)
    except OptforgeError as problem:
        codes.append(problem.exit_code)
    except ValueError:  # the defaults of the rule do not do
        codes.append(2)
    times.append(time.process_time())
    return codes, [after - before for before, after in itertools.pairwise(times)]


def confined(path: str, name: str, wanted: list[str]) -> None:
    """All of it, in this process, which does nothing else."""
    resource.setrlimit(resource.RLIMIT_CPU, (3 * SECONDS, 3 * SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (2 * MEBIBYTES << 20, 2 * MEBIBYTES << 20))
    warnings.simplefilter("ignore")
    said = os.open(f"{path}.err", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    os.dup2(said, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    codes: list[int] = []
    times: list[float] = []
    try:
        with tempfile.TemporaryDirectory() as out:
            codes, times = commands(path, name, wanted, out)
    except BaseException as problem:
        os.write(2, f"Traceback: {type(problem).__name__}: {problem}"[:2_000].encode(errors="replace"))
    sys.stderr.flush()
    Path(f"{path}.codes").write_text(json.dumps([codes, times]))
    os._exit(0)


def run(path: str, name: str, wanted: list[str]) -> dict[str, object]:
    """What came of a file."""
    child = os.fork()
    if child == 0:
        confined(path, name, wanted)
    deadline = time.monotonic() + PATIENCE
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    left = Path(f"{path}.codes")
    codes, times = json.loads(left.read_text()) if left.exists() else ([], [])
    return {
        "status": status,
        "codes": codes,
        "seconds": times,
        "mebibytes": usage.ru_maxrss / 1024,
        "said": Path(f"{path}.err").read_text(errors="replace")[:4_000],
    }


def main() -> None:
    """A line for each case."""
    environment()
    for arguments in (["show", "adam"], ["generate", "adam", "--target", "c", "--target", "cuda", "--check"]):
        with contextlib.suppress(SystemExit):
            cli.main(arguments)
    gc.freeze()  # what all have in common stays common
    for path, name, wanted in json.loads(Path(sys.argv[1]).read_text()):
        print("\n@", json.dumps(run(path, name, wanted)), flush=True)


if __name__ == "__main__":
    main()
