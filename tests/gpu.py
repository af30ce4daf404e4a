"""Everything that only a machine with a GPU can show, in one run: tests, sanitizers, bits, PyTorch, CUDA graphs, speed.

    python tests/gpu.py [--out DIR] [--quick] [--steps requirements,suite,sanitizer,bits,torch,graph,benchmark]

It needs Python >= 3.11, the CUDA toolkit, PyCUDA, and what optforge itself and its tests need; no network. PyTorch is
tested and measured too where there is one with CUDA. It prints a summary and writes gpu.json into DIR, after each step
anew. A step that fails, or takes too long, does not stop the others. Exit codes: 0 all passed, 1 a step failed, 2 a
mistake in the arguments, 3 something is missing on the machine.

Without a GPU test_gpu_script.py runs it on the emulation.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
import xml.etree.ElementTree as xml
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
if importlib.util.find_spec("optforge") is None:  # not installed: the sources will do
    sys.path.insert(0, str(ROOT / "generator"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "generator"), os.environ.get("PYTHONPATH")]))

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cuda"], "pytest")
MODULES = tuple(re.split(r"[^\w-]", requirement)[0] for requirement in NEEDED)  # all are imported by these names
SUITE = ("bits", "statistics", "optimizer", "optimizer_refusals", "optimizer_resuming", "reductions", "transforms", "groups",
         "checkpoints", "compositions", "schedule_hook")  # fmt: skip
QUICK_TESTS = "adam or global_norm or skip"  # of the suite
COUNTED = ("tests", "failures", "errors", "skipped")
MOST_TOGETHER = 8  # files of tests
MANY = 0  # the compute mode of a device that several processes may use at once
CANNOT = 3  # exit code of a part that nothing can be shown of on this machine
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZED = 97  # exit code of a program in which the sanitizer found something
EMULATED = "optforge emulation"  # the device's name there

CHUNK, TILE = 32768, 4096  # a node of the summation tree, and four leaves
SIZES = (0, 1, 3, 31, 33, 1023, 1025, TILE - 1, TILE, TILE + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1028)
QUICK_SIZES = (0, 1, 33, TILE - 1, TILE + 1, CHUNK + 1)
GRAPH_SIZES = (7, TILE + 1, 0, CHUNK, CHUNK + 5, 3)
GRAPH_STEPS, GRAPH_BAD_STEP = 6, 3

TAIL = 4000  # characters of what a failed step said


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


# ── steps: each is a program of its own, so that a crash or a hang ends it alone ────────────────────────────────────


class Failure(Exception):
    """A step did not show what it should."""


class Run:
    """The steps of one run, and what they found."""

    def __init__(self, out: Path, quick: bool):
        self.out, self.quick = out, quick
        self.found: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "quick": quick,
            "steps": {},
        }

    def step(self, name: str, do: Callable[[], dict[str, Any]]) -> None:
        """Do a step, whatever becomes of it."""
        print(f"── {name} ", flush=True)
        start = time.monotonic()
        entry: dict[str, Any]
        try:
            entry = {"status": "passed", **do()}
        except subprocess.TimeoutExpired as problem:
            entry = {"status": "failed", "problem": f"not done after {problem.timeout:.0f} s"}
        except Failure as problem:
            entry = {"status": "failed", "problem": str(problem)[-TAIL:]}
        except Exception:  # a mistake of this script: the others go on
            entry = {"status": "failed", "problem": traceback.format_exc()[-TAIL:]}
        entry["seconds"] = round(time.monotonic() - start, 1)
        self.found["steps"][name] = entry
        (self.out / "gpu.json").write_text(json.dumps(self.found, indent=2) + "\n", encoding="utf-8")
        if "problem" in entry:
            print(entry["problem"])
        print(f"{entry['status']} in {entry['seconds']} s", flush=True)

    def part(self, name: str, limit: float, *before: str) -> str:
        """Another process of this script, which does one part."""
        how = ["--quick"] if self.quick else []
        return run([*before, sys.executable, str(HERE / "gpu.py"), "--part", name, "--out", str(self.out), *how], limit)

    def requirements(self) -> dict[str, Any]:
        """Device and versions."""
        self.found |= json.loads(self.part("about", 120).splitlines()[-1])
        return {}

    def emulated(self) -> bool:
        """Whether there is no GPU really."""
        return bool(self.found.get("device") == EMULATED)

    def suite(self) -> dict[str, Any]:
        """The tests that are written for every target, on this one: file by file, several at a time."""
        names = SUITE[:: 3 if self.quick else 1]
        with ThreadPoolExecutor(together(self.found.get("compute_mode", MANY))) as pool:  # it is nvcc that takes long
            files = dict(zip(names, pool.map(self.test_file, names), strict=True))
        counts = {kind: sum(entry.get(kind, 0) for entry in files.values()) for kind in COUNTED}
        print(", ".join(f"{number} {kind}" for kind, number in counts.items()))
        wrong = [f"test_{name}.py: {entry['said']}" for name, entry in files.items() if "said" in entry]
        if wrong:
            raise Failure("\n".join([str(counts), *wrong]))
        return {"counts": counts, "files": files}

    def test_file(self, name: str) -> dict[str, Any]:
        """The counts of one file of tests, and what was said if it is not all right."""
        report = self.out / f"test_{name}.xml"
        report.unlink(missing_ok=True)
        options = ["-q", "--tb=short", "-W", "ignore::optforge.PerformanceWarning", f"--junitxml={report}"]
        if self.quick:
            options += ["-k", QUICK_TESTS, "--maxfail=5"]
        command = [sys.executable, "-m", "pytest", *options, str(next(HERE.glob(f"*/test_{name}.py")))]
        try:
            said = run(command, 1800, {"OPTFORGE_TEST_TARGETS": "cuda"}, fine=range(6))
        except (Failure, subprocess.TimeoutExpired) as problem:
            return {"said": str(problem)[-TAIL:]}
        if not report.exists():
            return {"said": said[-TAIL:]}
        suite = next(xml.parse(report).getroot().iter("testsuite"))
        counts = {kind: int(suite.get(kind, 0)) for kind in COUNTED}
        wrong = counts["failures"] or counts["errors"] or not counts["tests"]
        return {**counts, "said": said[-TAIL:]} if wrong else counts

    def sanitizer(self) -> dict[str, Any]:
        """Representative steps under each tool of compute-sanitizer, or alone where there is none."""
        program = find_sanitizer()
        self.part("exercise", 900)
        if program is None:
            print("compute-sanitizer: not found; the steps ran without it")
            return {"status": "passed without compute-sanitizer", "tools": {}}
        found: dict[str, str] = {}
        for tool in TOOLS:
            try:
                self.part("exercise", 1800, program, "--tool", tool, "--error-exitcode", str(SANITIZED))
                found[tool] = "clean"
            except (Failure, subprocess.TimeoutExpired) as problem:
                found[tool] = str(problem)[-TAIL:]
            print(f"{tool}: {found[tool]}", flush=True)
        if any(said != "clean" for said in found.values()):
            raise Failure(json.dumps(found, indent=1))
        return {"tools": found}

    def bits(self) -> dict[str, Any]:
        """Every rule and every transform beside the reference."""
        said = self.part("bits", 1800)
        print(said.splitlines()[-1])
        return {"compared": said.splitlines()[-1]}

    def torch(self) -> dict[str, Any]:
        """Steps in threads, and PyTorch's tensors: each part in a process, whose end counts as well."""
        from gpu_torch import PARTS as parts

        found: dict[str, str] = {}
        failed = []
        for name in parts:
            try:
                said = run([sys.executable, str(HERE / "gpu_torch.py"), name], 600, fine=(0, CANNOT))
                found[name] = next(line for line in said.splitlines() if line.startswith(("shown: ", "skipped: ")))
            except (Failure, subprocess.TimeoutExpired) as problem:
                found[name] = str(problem)[-TAIL:]
                failed.append(name)
            print(f"{name}: {found[name]}", flush=True)
        if failed:
            raise Failure(json.dumps(found, indent=1))
        skipped = [name for name, said in found.items() if said.startswith("skipped: ")]
        return {"status": f"passed, but skipped {', '.join(skipped)}" if skipped else "passed", "parts": found}

    def graph(self) -> dict[str, Any]:
        """The emitted C++ launchers in a CUDA graph."""
        said = self.part("graph", 300)
        print(said.splitlines()[-1])
        return {"compared": said.splitlines()[-1]}

    def benchmark(self) -> dict[str, Any]:
        """What it costs; figures of an emulation mean nothing."""
        report = self.out / "benchmark.json"
        sizes = "tiny" if self.emulated() else "small" if self.quick else "full"
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--sizes", sizes, "--json", str(report)]
        try:
            print(run(command, 3600))
        finally:
            measured = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
            self.found["benchmark"] = measured
        return {"sizes": sizes}


STEPS = ("requirements", "suite", "sanitizer", "bits", "torch", "graph", "benchmark")


def together(compute_mode: int) -> int:
    """How many files of tests are run at a time: one where the device is for one process alone."""
    return max(1, min(MOST_TOGETHER, (os.cpu_count() or 1) // 2)) if compute_mode == MANY else 1


def find_sanitizer() -> str | None:
    """The compute-sanitizer of PATH, of the toolkit whose nvcc is used, or of /usr/local/cuda."""
    from optforge.engines.cuda import nvcc

    own = Path(nvcc.find().command[0])
    places = [os.environ.get("PATH", os.defpath), own.parent, own.resolve().parent, "/usr/local/cuda/bin"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(map(str, places)))


def run(command: Sequence[str], limit: float, variables: Any = None, fine: Sequence[int] = (0,)) -> str:
    """What a command says on standard output, within a limit of seconds.

    Raises
    ------
    Failure
        It ended with another code than those that are fine.
    """
    env = {**os.environ, **(variables or {})}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=env, errors="replace")
    if answer.returncode not in fine:
        said = f"{answer.stdout[-TAIL // 2 :]}{answer.stderr[-TAIL // 2 :]}"
        raise Failure(f"$ {shlex.join(command)}\nexit code {answer.returncode}\n{said}")
    return answer.stdout + (answer.stderr if answer.returncode else "")


# ── parts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def about(out: Path, quick: bool) -> None:
    """Print what the results depend on."""
    from optforge.engines.cuda import nvcc
    from optforge.engines.cuda.device import device

    own = device(0)
    hardware = own.drv.Device(0)
    versions = {"python": platform.python_version()}
    for name in ("optforge", *MODULES, "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cuda = own.drv.get_driver_version()
    module = Path("/proc/driver/nvidia/version")
    kernel = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", module.read_text(encoding="utf-8")) if module.exists() else None
    found = {
        "device": own.name,
        "capability": ".".join(map(str, own.capability)),
        "compute_mode": int(hardware.get_attribute(own.drv.device_attribute.COMPUTE_MODE)),
        "memory_gib": round(hardware.total_memory() / 2**30, 1),
        "driver": kernel[1] if kernel else None,
        "cuda_of_driver": f"{cuda // 1000}.{cuda % 1000 // 10}",
        "nvcc": nvcc.find().version.strip().splitlines()[-1],
        "system": platform.platform(),
        "versions": versions,
    }
    print(json.dumps(found))


class Twin:
    """The same steps on the device, over arrays there at chosen offsets, and by the reference on NumPy.

    Parameters
    ----------
    rule : Rule
    sizes : sequence of int
        Tensors of float32 and float64 in turn, in two groups where there is more than one.
    aligned : bool
        Whether arrays begin at multiples of 16 bytes.
    """

    def __init__(self, rule: Any, sizes: Sequence[int], aligned: bool, settings: Any = None, **how: Any):
        import numpy as np

        import optforge as of
        from optforge.engines.cuda.device import DeviceSpace

        self.rng = np.random.default_rng(len(sizes))
        self.sizes, self.aligned = sizes, aligned
        self.dtypes = [(np.float32, np.float64)[k % 2] for k in range(len(sizes))]
        self.space = DeviceSpace(0)
        values = [self.rng.standard_normal(n).astype(d) for n, d in zip(sizes, self.dtypes, strict=True)]
        self.reference = of.Optimizer(
            self.grouped([v.copy() for v in values], True), rule, target="numpy", **(settings or {}), **how
        )
        self.params = [self.place(v) for v in values]
        self.grads = [self.place(v) for v in values]
        self.optimizer = of.Optimizer(self.grouped(self.params, True), rule, target="cuda", **(settings or {}), **how)

    def place(self, values: Any) -> Any:
        """Values in the memory of the device, at the offset of one element if they are not to be aligned."""
        offset = 0 if self.aligned else values.itemsize
        block = self.space.device.allocate(values.nbytes + offset)
        array = self.space.made(values.shape, values.dtype, block, offset)
        self.space.write(array, values)
        return array

    def grouped(self, arrays: Sequence[Any], params: bool = False) -> Any:
        """Arrays in two groups, with another rate in the second."""
        if len(arrays) < 2:
            return list(arrays)
        halves = list(arrays[::2]), list(arrays[1::2])
        return [{"params": halves[0]}, {"params": halves[1], "lr": 3e-3}] if params else list(halves)

    def step(self, bad: float | None = None, absent: int | None = None, stats: bool = True, scale: float = 4.0) -> None:
        """One step on both sides, compared in every bit."""
        from stepping import spread

        values = [spread(self.rng, n, d, scale) for n, d in zip(self.sizes, self.dtypes, strict=True)]
        if bad is not None:
            values[-1][-1] = bad
        for own, given in zip(self.grads, values, strict=True):
            self.space.write(own, given)
        given, wanted = ([None if k == absent else g for k, g in enumerate(arrays)] for arrays in (self.grads, values))
        told = self.optimizer.step(self.grouped(given), grad_scale=scale, stats=stats)
        said = self.reference.step(self.grouped(wanted), grad_scale=scale, stats=stats)
        where = f"{self.optimizer.rule.name}, step {self.reference.t}"
        for own, expected in (
            (self.optimizer.params, self.reference.params),
            (self.optimizer.state, self.reference.state),
        ):
            self.compare(own, expected, where)
        self.compare(self.grads, values, f"gradients, {where}")
        if stats:
            for name in (
                "grad_norm",
                "clipped_grad_norm",
                "param_norm",
                "update_norm",
                "max_update_ratio",
                "nan",
                "inf",
                "skipped",
            ):
                self.compare(float(told[name]), float(said[name]), f"{name}, {where}")
                if name != "skipped":
                    each = (tell.per_tensor[name].astype(float) for tell in (told, said))
                    self.compare(*each, f"{name} of tensors, {where}")

    def compare(self, own: Any, expected: Any, where: str) -> None:
        """All arrays of two structures, by their bits, in whatever groups they are."""
        import numpy as np

        from data import same

        for a, b in zip(flat(own), flat(expected), strict=True):
            if not same(np.asarray(a).reshape(-1), np.asarray(b).reshape(-1)):
                raise AssertionError(f"other bits in an array of {np.size(b)} elements: {where}")


def flat(thing: Any) -> list[Any]:
    """The arrays of a structure, one after the other."""
    if isinstance(thing, Mapping):
        return [array for key in thing for array in flat(thing[key])]
    if isinstance(thing, (list, tuple)):
        return [array for item in thing for array in flat(item)]
    return [thing]


def sizes_for(quick: bool) -> Sequence[int]:
    """Sizes around every boundary."""
    return QUICK_SIZES if quick else SIZES


def exercise(out: Path, quick: bool) -> None:
    """Steps of every kind: with and without sums, of both types, aligned or not, skipped, zeroing, in groups."""
    import optforge as of

    clipped = of.clip_by_global_norm(max_norm=0.5) >> of.rules.adam
    for rule in (clipped, of.rules.lamb, of.rules.novograd):
        for aligned in (True, False):
            twin = Twin(rule, sizes_for(quick), aligned, skip_nonfinite=True, zero_grads=aligned)
            twin.step(stats=False)
            twin.step()
            twin.step(bad=float("nan"))
            twin.step(bad=float("inf"), stats=False)
            twin.step(absent=1)
            plain = Twin(rule, sizes_for(quick), not aligned)
            plain.step(absent=2, stats=False)
            plain.step()
    print("done")


def bits(out: Path, quick: bool) -> None:
    """Every rule, with every transform, and a kernel that is tuned otherwise."""
    from unittest import mock

    import optforge as of
    from optforge.engines.cuda import nvcc
    from oracles import oracle

    count = 0
    for name in sorted(of.rules):
        twin = Twin(of.rules[name], sizes_for(quick), bool(count % 2), {**oracle(name).SETTINGS[0]}, zero_grads=True)
        for stats in (True, False, True):
            twin.step(stats=stats)
        count += 1
    for name in sorted(of.transforms):
        twin = Twin(of.transforms[name] >> of.rules.adam, sizes_for(quick), bool(count % 2), skip_nonfinite=True)
        for bad in (None, float("nan"), None):
            twin.step(bad=bad)
        count += 1
    flags = [f"-DOPTFORGE_CUDA_{what}" for what in ("MIN_BLOCKS=4", "READ=__ldcs", "WRITE=__stcs")]
    command = shlex.join([*nvcc.find().command, *flags])
    with mock.patch.dict(os.environ, NVCC=command):
        twin = Twin(of.rules.adam, sizes_for(quick), True)
        for stats in (False, True, False):
            twin.step(stats=stats)
    print(f"{count + 1} kernels have the bits of the reference, at {len(sizes_for(quick))} sizes")


def graph(out: Path, quick: bool) -> None:
    """A program of C++ around an emitted file, which captures a step and replays it, beside the C kernel."""
    import numpy as np

    import optforge as of
    from data import same
    from optforge.engines.cuda import nvcc
    from optforge.engines.cuda.device import driver
    from stepping import spread

    rule = of.clip_by_global_norm >> of.rules.adam
    rng = np.random.default_rng(3)
    params = [rng.standard_normal(n).astype(np.float32) for n in GRAPH_SIZES]
    grads = [[spread(rng, n, np.float32, 4.0) for n in GRAPH_SIZES] for _ in range(GRAPH_STEPS)]
    grads[GRAPH_BAD_STEP - 1][1][7] = np.nan
    hardware = driver().Device(0)  # without a context, which the program could not have beside this process everywhere
    target = "c" if any(map(shutil.which, ("cc", "gcc", "clang"))) else "numpy"
    expected = of.Optimizer([p.copy() for p in params], rule, target=target, max_norm=1.5, skip_nonfinite=True)
    for given in grads:
        told = expected.step([g.copy() for g in given], grad_scale=4.0, stats=True)

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        files = {
            **rule.generate("cuda", prefix="adam", dtypes=["f32"]),
            "graph.cu": (HERE / "graph.cu").read_text(encoding="utf-8"),
        }
        source, result = place / "in", place / "out"
        source.write_bytes(b"".join(array.tobytes() for arrays in (params, *grads) for array in arrays))
        said = "launched one by one, as the emulation has no graphs"
        if hardware.name() == EMULATED:
            from emulation import compile_emulated

            library = ctypes.CDLL(str(compile_emulated(files, place, ["-DOPTFORGE_NO_GRAPHS"])))
            sizes = (ctypes.c_size_t * len(params))(*GRAPH_SIZES)
            status = library.replay(str(source).encode(), str(result).encode(), GRAPH_STEPS, len(params), sizes)
            if status:
                raise Failure(f"the program ends with {status}")
        else:
            for name, text in files.items():
                (place / name).write_text(text, encoding="utf-8")
            architecture = "".join(map(str, hardware.compute_capability()))
            sources = [str(place / name) for name in files if name.endswith(".cu")]
            program = str(place / "graph")
            run([*nvcc.find().command, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-o", program, *sources], 300)
            words = [str(source), str(result), str(GRAPH_STEPS), *map(str, GRAPH_SIZES)]
            said = ", ".join(run([program, *words], 120).splitlines())
        made = result.read_bytes()
    elements = sum(GRAPH_SIZES)
    ours = np.frombuffer(made[: 12 * elements], np.float32)
    theirs = np.concatenate([a for arrays in (expected.params, *expected.state.values()) for a in arrays])
    if not same(ours, theirs):
        raise Failure(f"other bits: {np.flatnonzero(ours.view('u4') != theirs.view('u4'))[:9]}")
    norms = ("grad_norm", "clipped_grad_norm", "param_norm", "update_norm", "max_update_ratio")
    if not same(np.frombuffer(made[12 * elements :][: 8 * len(norms)]), np.array([told[name] for name in norms])):
        raise Failure("other statistics")
    print(f"{GRAPH_STEPS} steps, one of them skipped, have the bits of the target {target!r}: {said}")


PARTS: dict[str, Callable[[Path, bool], None]] = {"about": about, "exercise": exercise, "bits": bits, "graph": graph}


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────


def chosen(text: str) -> list[str]:
    """Names of steps."""
    names = text.split(",")
    if not set(names) <= set(STEPS):
        raise argparse.ArgumentTypeError(f"steps are {', '.join(STEPS)}")
    return names


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Test and measure optforge on this machine's GPU.")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-results"), metavar="DIR", help="for gpu.json (gpu-results)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer tests, and small sizes")
    parser.add_argument("--steps", type=chosen, default=list(STEPS), metavar="NAME,…", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        PARTS[arguments.part](arguments.out, arguments.quick)
        return 0
    lines = missing()
    if lines:
        print("gpu.py: this machine cannot run it; missing:", *lines, sep="\n  ", file=sys.stderr)
        return 3
    arguments.out.mkdir(parents=True, exist_ok=True)
    job = Run(arguments.out, arguments.quick)
    for name in ["requirements", *(name for name in arguments.steps if name != "requirements")]:
        job.step(name, getattr(job, name))
    print(f"\n{job.found.get('device', 'unknown device')}, driver {job.found.get('driver')}, {job.found['date']}")
    for name, entry in job.found["steps"].items():
        print(f"  {name:13} {entry['status']}, {entry['seconds']} s")
    print(f"written: {arguments.out / 'gpu.json'}")
    return int(any(entry["status"] == "failed" for entry in job.found["steps"].values()))


if __name__ == "__main__":
    sys.exit(main())
