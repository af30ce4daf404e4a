"""Everything that only a machine with a GPU can show, in two parts of less than five and a half minutes each.

    python tests/gpu.py [--correct] [--fast] [--quick] [--steps NAME,…] [--limit SECONDS] [--out DIR]

--correct compares bits and runs the sanitizers, --fast measures; without either it does one after the other. It needs
Python >= 3.11, the CUDA toolkit, PyCUDA, and what optforge itself and its tests need; no network. PyTorch is tested and
measured too where there is one with CUDA, and JAX tested. A step that fails does not stop the others.

It writes correct.json and fast.json into DIR, anew whenever a step begins or ends, so that a run that is cut off tells
as well, and beside them what failed steps said. Exit codes: 0 all was shown, 1 a step failed, 2 a mistake in the
arguments, 3 something is missing on this machine (a GPU, for one), 4 nothing failed, but time was up before the end.

Without a GPU test_gpu_script.py runs it on the emulation.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import traceback
import xml.etree.ElementTree as xml
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PLACES = [HERE, HERE / "support"]  # of what the parts import
if importlib.util.find_spec("optforge") is None:  # not installed: the sources will do
    PLACES.append(ROOT / "generator")
sys.path[:0] = map(str, PLACES)
os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, PLACES), *filter(None, [os.environ.get("PYTHONPATH")])])

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cuda"], "pytest")
MODULES = tuple(re.split(r"[^\w-]", requirement)[0] for requirement in NEEDED)  # all are imported by these names
# Files of tests that are written for every target, and which of their tests are taken: nvcc takes seconds for a kernel.
USUAL = "adam or global_norm or skip"
SUITE = {
    "bits/bits": USUAL,
    "bits/transforms": USUAL,
    "train/checkpoints": USUAL,
    "bits/formats_optimizer": "adamw or lamb or stochastic or own_step or dtypes",
    "train/optimizer": "",
    "bits/statistics": USUAL,
    "train/groups": USUAL,
    "language/compositions": USUAL,
    "language/reductions": USUAL,
    "train/optimizer_resuming": USUAL,
    "train/schedule_hook": USUAL,
}
COUNTED = ("tests", "failures", "errors", "skipped")
MANY = 0  # the compute mode of a device that several processes may use at once
MOST_TOGETHER = 16  # processes on one device
CANNOT = 3  # exit code of a part that nothing can be shown of on this machine
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")  # of compute-sanitizer, the most telling first
SANITIZED = 97  # exit code of a program in which the sanitizer found something
TORCH = ("threads", "parameters", "dictionary", "moving", "thread", "streams", "devices")  # parts of gpu_torch.py
JAX = ("bits", "device", "narrow", "double", "rest", "optax")  # parts of gpu_jax.py
TRAFFIC = ("dram__throughput.avg.pct_of_peak_sustained_elapsed", "dram__bytes.sum", "gpu__time_duration.sum")
EMULATED = "optforge emulation"  # the device's name there

LIMIT = 330.0  # seconds of each half
TAIL = 4000  # characters of what a failed step said, in JSON; all of it is in the log
HALVES = {
    "correct": ("graph", "bits", "sanitizer", "torch", "jax", "suite"),
    "fast": ("benchmark", "traffic"),
}


# ── what is missing ─────────────────────────────────────────────────────────────────────────────────────────────────


def missing() -> list[str]:
    """What this machine lacks, a line each."""
    lines = [f"Python module {name}: not installed" for name in MODULES if importlib.util.find_spec(name) is None]
    cuda: Any = None
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as problem:
        lines.append(f"NVIDIA's driver: {problem}")
    if cuda is not None:
        count = ctypes.c_int()
        status = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
        if status:
            lines.append(f"CUDA device: the driver does not start (status {status})")
        elif count.value == 0:
            lines.append("CUDA device: the driver knows none")
        elif not lines:
            lines += beyond_modules("driver", lambda: importlib.import_module("pycuda.driver"))
    if importlib.util.find_spec("optforge") is None:
        lines.append("optforge: neither installed nor in ../generator")
    elif not any("Python module" in line for line in lines):
        from optforge.engines.cuda import nvcc

        lines += beyond_modules("nvcc", nvcc.find)
    return lines


def beyond_modules(name: str, find: Callable[[], Any]) -> list[str]:
    """The line that says why something cannot be had, if so."""
    try:
        find()
    except Exception as problem:
        return [f"{name}: {problem}"]
    return []


# ── processes ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Failure(Exception):
    """A step did not show what it should."""


class Cut(Exception):
    """Time was up before a step was done."""


RUNNING: set[subprocess.Popen[str]] = set()


def run(command: Sequence[str], limit: float, variables: Any = None, fine: Sequence[int] = (0,)) -> str:
    """What a command says on standard output, within a limit of seconds.

    Raises
    ------
    Failure
        It ended with another code than those that are fine, or not at all.
    """
    env = {**os.environ, **(variables or {})}
    out, err = subprocess.PIPE, subprocess.PIPE
    process = subprocess.Popen(
        command, stdout=out, stderr=err, text=True, errors="replace", env=env, start_new_session=True
    )
    RUNNING.add(process)
    try:
        said, beside = process.communicate(timeout=max(limit, 0.1))
    except subprocess.TimeoutExpired:
        end(process)
        said, beside = process.communicate()
        raise Failure(f"$ {shlex.join(command)}\nnot done after {limit:.0f} s\n{said}{beside}") from None
    finally:
        RUNNING.discard(process)
    if process.returncode not in fine:
        raise Failure(f"$ {shlex.join(command)}\nexit code {process.returncode}\n{said}{beside}")
    return said + (beside if process.returncode else "")


def end(process: subprocess.Popen[str]) -> None:
    """End a process, and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def together(compute_mode: int) -> int:
    """How many processes use the device at a time: one where it is for one alone."""
    return max(1, min(MOST_TOGETHER, os.cpu_count() or 1)) if compute_mode == MANY else 1


def find_tool(name: str) -> str | None:
    """A program of the toolkit: of PATH, of the toolkit whose nvcc is used, or of /usr/local/cuda."""
    from optforge.engines.cuda import nvcc

    own = Path(nvcc.find().command[0])
    places = [os.environ.get("PATH", os.defpath), own.parent, own.resolve().parent, "/usr/local/cuda/bin"]
    return shutil.which(name, path=os.pathsep.join(map(str, places)))


# ── a run: steps, each in a process of its own, so that a crash or a hang ends it alone ─────────────────────────────


def test_file(name: str) -> Path:
    """The file of tests that is called ROOM/NAME."""
    room, _, own = name.partition("/")
    return HERE / room / f"test_{own}.py"


class Run:
    """One half: its steps, and what they found, which is written whenever one begins or ends."""

    def __init__(self, half: str, out: Path, quick: bool, limit: float, scratch: Path):
        self.half, self.out, self.quick, self.scratch = half, out, quick, scratch
        self.until = time.monotonic() + limit
        self.lock = threading.Lock()
        self.log: list[str] = []
        self.steps: dict[str, dict[str, Any]] = {}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.found: dict[str, Any] = {"date": now, "half": half, "quick": quick, "limit_s": limit, "steps": self.steps}

    def left(self) -> float:
        """Seconds until time is up."""
        return self.until - time.monotonic()

    def write(self, **found: Any) -> None:
        """Keep what is known by now."""
        with self.lock:
            self.found |= found
            file = self.out / f"{self.half}.json"
            file.with_suffix(".new").write_text(json.dumps(self.found, indent=2) + "\n", encoding="utf-8")
            file.with_suffix(".new").replace(file)
            if self.log:
                (self.out / f"{self.half}.log").write_text("\n".join(self.log) + "\n", encoding="utf-8")

    def step(self, name: str, do: Callable[[], dict[str, Any]]) -> bool:
        """Do a step, whatever becomes of it; whether it passed."""
        start = time.monotonic()
        self.steps[name] = {"status": "running"}
        self.write()
        entry: dict[str, Any]
        try:
            if self.left() <= 0:
                raise Cut("not begun")
            entry = {"status": "passed", **do()}
        except Cut as problem:
            entry = {"status": "cut", "problem": str(problem)}
        except Failure as problem:
            cut = self.left() <= 0
            self.log.append(f"── {name}\n{problem}")
            entry = {"status": "cut" if cut else "failed", "problem": str(problem)[-TAIL:]}
        except Exception:  # a mistake of this script: the others go on
            self.log.append(f"── {name}\n{traceback.format_exc()}")
            entry = {"status": "failed", "problem": traceback.format_exc()[-TAIL:]}
        entry["seconds"] = round(time.monotonic() - start, 1)
        self.steps[name] = entry
        self.write()
        said = entry.get("problem", entry.get("said", ""))
        print(f"{name}: {entry['status']} in {entry['seconds']} s{f': {said[-500:]}' if said else ''}", flush=True)
        return bool(entry["status"] == "passed")

    def part(self, name: str, limit: float, *before: str) -> str:
        """What gpu_parts.py says of one part."""
        how = ["--quick"] if self.quick else []
        return self.command([*before, sys.executable, str(HERE / "gpu_parts.py"), name, *how], limit)

    def command(self, command: Sequence[str], limit: float, variables: Any = None, fine: Sequence[int] = (0,)) -> str:
        """What a command says, which may take as long as there is time."""
        return run(command, min(limit, self.left()), variables, fine)

    def told(self, name: str, limit: float) -> dict[str, Any]:
        """The last line of a part."""
        return {"said": self.part(name, limit).splitlines()[-1]}

    def requirements(self) -> dict[str, Any]:
        """Device and versions."""
        self.write(**json.loads(self.part("about", 60).splitlines()[-1]))
        return {}

    def emulated(self) -> bool:
        """Whether there is no GPU really."""
        return bool(self.found.get("device") == EMULATED)

    # ── correct ─────────────────────────────────────────────────────────────────────────────────────────────────

    def correct(self, wanted: Sequence[str]) -> None:
        """Graphs first, which show most in least time; then the rest side by side, what takes longest first."""
        if "graph" in wanted:
            self.step("graph", lambda: self.told("graph", 120))
        jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = []
        if "sanitizer" in wanted:
            tools = TOOLS if find_tool("compute-sanitizer") else TOOLS[:1]
            jobs += [(f"sanitizer {tool}", lambda tool=tool: self.sanitizer(tool)) for tool in tools[:2]]
        if "bits" in wanted:
            jobs.append(("bits", lambda: self.told("bits", 300)))
        if "suite" in wanted:
            names = list(SUITE)[:: 5 if self.quick else 1]
            jobs += [(f"suite {name}", lambda name=name: self.suite(name)) for name in names]
        if "torch" in wanted:
            jobs += [(f"torch {name}", lambda name=name: self.other("gpu_torch.py", name, 200)) for name in TORCH]
        if "jax" in wanted:
            names = JAX[:: 3 if self.quick else 1]
            jobs += [(f"jax {name}", lambda name=name: self.other("gpu_jax.py", name, 300)) for name in names]
        if "sanitizer" in wanted and not self.quick:
            jobs += [(f"sanitizer {tool}", lambda tool=tool: self.sanitizer(tool)) for tool in tools[2:]]
        with ThreadPoolExecutor(together(self.found.get("compute_mode", MANY))) as pool:
            list(pool.map(lambda job: self.step(*job), jobs))

    def suite(self, name: str) -> dict[str, Any]:
        """The counts of one file of tests."""
        report = self.scratch / f"{name.replace('/', '-')}.xml"
        options = ["-q", "--tb=short", "-W", "ignore::optforge.PerformanceWarning", f"--junitxml={report}"]
        options += ["-p", "no:cacheprovider", "--maxfail=5"]
        options += ["-k", SUITE[name]] if SUITE[name] else []
        command = [sys.executable, "-m", "pytest", *options, str(test_file(name))]
        said = self.command(command, 300, {"OPTFORGE_TEST_TARGETS": "cuda"}, fine=range(6))
        if not report.exists():
            raise Failure(said)
        suite = next(xml.parse(report).getroot().iter("testsuite"))
        counts = {kind: int(suite.get(kind, 0)) for kind in COUNTED}
        if counts["failures"] or counts["errors"] or not counts["tests"]:
            raise Failure(f"{counts}\n{said}")
        return {**counts, "said": ", ".join(f"{number} {kind}" for kind, number in counts.items())}

    def sanitizer(self, tool: str) -> dict[str, Any]:
        """Representative steps under a tool of compute-sanitizer, or alone where there is none."""
        program = find_tool("compute-sanitizer")
        how = [] if program is None else [program, "--tool", tool, "--error-exitcode", str(SANITIZED)]
        self.part("exercise", 300, *how)
        if program is None:
            return {"status": "passed without compute-sanitizer", "said": "compute-sanitizer is not found"}
        return {"said": "clean"}

    def other(self, script: str, name: str, limit: float) -> dict[str, Any]:
        """A part that is about another library, in a process whose end counts as well."""
        said = self.command([sys.executable, str(HERE / script), name], limit, fine=(0, CANNOT))
        line = next((line for line in said.splitlines() if line.startswith(("shown: ", "skipped: "))), None)
        if line is None:
            raise Failure(said)
        word, _, rest = line.partition(": ")
        return {"status": "skipped" if word == "skipped" else "passed", "said": rest}

    # ── fast ────────────────────────────────────────────────────────────────────────────────────────────────────

    def fast(self, wanted: Sequence[str]) -> None:
        """What it costs, one after the other, for nothing may run beside; figures of an emulation mean nothing."""
        if "benchmark" in wanted:
            self.step("benchmark", self.benchmark)
        if "traffic" in wanted:
            self.step("traffic", self.traffic)

    def benchmark(self) -> dict[str, Any]:
        """benchmarks/gpu.py, whose figures are kept even if it is cut off."""
        report = self.scratch / "benchmark.json"
        sizes = "tiny" if self.emulated() else "small" if self.quick else "brief"
        limit = max(self.left() - (0 if self.quick else 30), 1)  # what is behind it needs some time too
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--sizes", sizes, "--json", str(report)]
        command += ["--limit", f"{max(limit - 20, 1):.0f}"]
        try:
            print(self.command(command, limit, fine=(0, 4)))
        finally:
            measured = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
            self.write(benchmark=measured)
        if measured.get("not_begun"):
            raise Cut(f"not begun: {', '.join(measured['not_begun'])}")
        return {"sizes": sizes}

    def traffic(self) -> dict[str, Any]:
        """How much of the memory's bandwidth each kernel takes, as a profiler counts it."""
        program = find_tool("ncu")
        if program is None:
            self.part("traffic", 100)
            return {"status": "passed without ncu", "said": "ncu is not found"}
        profile = [program, "--clock-control", "none", "--metrics", ",".join(TRAFFIC), "--csv", "--page", "raw"]
        profile += ["--kernel-name", "regex:k_cuda_(elements|fold|look|scan|begin|finish).*"]
        return {"rows": [line for line in self.part("traffic", 100, *profile).splitlines() if line.startswith('"')]}


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────


def chosen(text: str) -> list[str]:
    """Names of steps."""
    names, known = text.split(","), [name for half in HALVES.values() for name in half]
    if not set(names) <= set(known):
        raise argparse.ArgumentTypeError(f"steps are {', '.join(known)}")
    return names


def seconds(text: str) -> float:
    """A positive number."""
    number = float(text)
    if not number > 0:
        raise ValueError
    return number


def half(name: str, arguments: argparse.Namespace) -> list[str]:
    """Do one half; what became of its steps."""
    with tempfile.TemporaryDirectory() as scratch:
        job = Run(name, arguments.out, arguments.quick, arguments.limit, Path(scratch))
        print(f"── {name}: {arguments.limit:.0f} s at most", flush=True)
        if job.step("requirements", job.requirements):
            getattr(job, name)([step for step in HALVES[name] if step in arguments.steps])
        spent = arguments.limit - job.left()
        job.write(seconds=round(spent, 1))
    about = job.found
    print(f"\n{about.get('device', 'unknown device')}, driver {about.get('driver')}, {about['date']}, {spent:.0f} s")
    for step, entry in job.steps.items():
        print(f"  {step:26} {entry['status']}, {entry['seconds']} s")
    print(f"written: {arguments.out / f'{name}.json'}", flush=True)
    return [entry["status"] for entry in job.steps.values()]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Test and measure optforge on this machine's GPU.")
    parser.add_argument("--correct", action="store_true", help="bits, graphs, sanitizers, PyTorch, JAX, tests")
    parser.add_argument("--fast", action="store_true", help="times, against a copy and against PyTorch")
    parser.add_argument("--quick", action="store_true", help="fewer tests, and small sizes")
    every = [name for names in HALVES.values() for name in names]
    parser.add_argument("--steps", type=chosen, default=every, metavar="NAME,…", help=f"of {', '.join(every)}")
    parser.add_argument("--limit", type=seconds, default=LIMIT, metavar="SECONDS", help=f"of each half ({LIMIT:.0f})")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), metavar="DIR", help="(gpu-results)")
    arguments = parser.parse_args()
    lines = missing()
    if lines:
        print("gpu.py: this machine cannot run it; missing:", *lines, sep="\n  ", file=sys.stderr)
        return CANNOT
    arguments.out.mkdir(parents=True, exist_ok=True)
    halves = [name for name in HALVES if getattr(arguments, name)] or list(HALVES)
    statuses = [status for name in halves for status in half(name, arguments)]
    return 1 if "failed" in statuses else 4 if "cut" in statuses else 0


def stop(number: int, frame: Any) -> None:
    """End what runs, and this process, when it is told to end."""
    for process in list(RUNNING):
        end(process)
    os._exit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    sys.exit(main())
