"""What a machine with a GPU is asked to show: each part is a process of its own, which gpu.py starts.

    python tests/gpu_parts.py PART [--quick]

PART is one of about, exercise, bits, graph, traffic. A part says what it found on its last line, and ends with an exit code
other than 0 where something else was found than should be.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import optforge as of
from data import same
from gpu import EMULATED, HERE, MODULES, run
from optforge.engines.cuda import nvcc
from optforge.engines.cuda.device import DeviceSpace, device, driver
from optforge.engines.cuda.engine import compiled
from oracles import oracle
from stepping import spread

CHUNK, TILE = 32768, 4096  # a node of the summation tree, and four leaves
SIZES = (0, 1, 3, 31, 33, 1023, 1025, TILE - 1, TILE, TILE + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1028)
QUICK_SIZES = (0, 1, 33, TILE - 1, TILE + 1, CHUNK + 1)
GRAPH_SIZES = (7, TILE + 1, 0, CHUNK, CHUNK + 5, 3)
GRAPH_STEPS, GRAPH_BAD_STEP = 6, 3
TRAFFIC_ELEMENTS = 1 << 28  # enough that no cache holds a part of them that counts
NORMS = ("grad_norm", "clipped_grad_norm", "param_norm", "update_norm", "max_update_ratio")


class Wrong(Exception):
    """Something else was found than should be."""


def about(quick: bool) -> None:
    """Print what the results depend on."""

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
            for name in (*NORMS, "nan", "inf", "skipped"):
                self.compare(float(told[name]), float(said[name]), f"{name}, {where}")
                if name != "skipped":
                    each = (tell.per_tensor[name].astype(float) for tell in (told, said))
                    self.compare(*each, f"{name} of tensors, {where}")

    def compare(self, own: Any, expected: Any, where: str) -> None:
        """All arrays of two structures, by their bits, in whatever groups they are."""
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


def exercise(quick: bool) -> None:
    """Steps of every kind: with and without sums, of both types, aligned or not, skipped, zeroing, in groups."""

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


def bits(quick: bool) -> None:
    """Every rule and every transform, and a kernel that is tuned otherwise; compilers first, all at a time."""
    rules = {name: of.rules[name] for name in sorted(of.rules)}
    transformed = {name: of.transforms[name] >> of.rules.adam for name in sorted(of.transforms)}
    settings = {name: oracle(name).SETTINGS[0] for name in rules}
    compile_together((rule, settings.get(name, {})) for name, rule in (rules | transformed).items())
    for count, (name, rule) in enumerate(rules.items()):
        twin = Twin(rule, sizes_for(quick), bool(count % 2), settings[name], zero_grads=True)
        for stats in (True, False, True):
            twin.step(stats=stats)
    for count, rule in enumerate(transformed.values()):
        twin = Twin(rule, sizes_for(quick), bool(count % 2), skip_nonfinite=True)
        for bad in (None, float("nan"), None):
            twin.step(bad=bad)
    flags = [f"-DOPTFORGE_CUDA_{what}" for what in ("MIN_BLOCKS=4", "READ=__ldcs", "WRITE=__stcs")]
    with mock.patch.dict(os.environ, NVCC=shlex.join([*nvcc.find().command, *flags])):
        twin = Twin(of.rules.adam, sizes_for(quick), True)
        for stats in (False, True, False):
            twin.step(stats=stats)
    number = len(rules) + len(transformed) + 1
    print(f"{number} kernels have the bits of the reference, at {len(sizes_for(quick))} sizes")


def compile_together(wanted: Iterable[tuple[of.Rule, Mapping[str, Any]]]) -> None:
    """Have nvcc compile rules with their options into the cache, several at a time, before the first is used."""
    capability = device(0).capability

    def build(item: tuple[of.Rule, Mapping[str, Any]]) -> None:
        rule, settings = item
        compiled(
            rule, rule.kernel(**{name: value for name, value in settings.items() if name in rule.options}), capability
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build, wanted))


def traffic(quick: bool) -> None:
    """A few steps over one large tensor, plain and with statistics, for a profiler to look at."""
    space, n = DeviceSpace(0), 1 << 16 if quick else TRAFFIC_ELEMENTS
    chunk = np.random.default_rng(1).standard_normal(min(n, 1 << 20)).astype(np.float32)
    arrays = []
    for _ in range(2):
        arrays.append(space.made((n,), np.dtype(np.float32), space.device.allocate(4 * n)))
        with space.device:
            for start in range(0, n, chunk.size):
                space.device.drv.memcpy_htod(int(arrays[-1].ptr) + 4 * start, chunk)
    optimizer = of.Optimizer(arrays[:1], "adamw", target="cuda")
    for stats in (False, True):
        for _ in range(2):
            optimizer.step(arrays[1:], stats=stats)
    print(f"{optimizer.t} steps over {n} elements")


def graph(quick: bool) -> None:
    """A program of C++ around an emitted file, which captures a step and replays it, beside the C kernel."""
    rule = of.clip_by_global_norm >> of.rules.adam
    rng = np.random.default_rng(3)
    params = [rng.standard_normal(n).astype(np.float32) for n in GRAPH_SIZES]
    grads = [[spread(rng, n, np.float32, 4.0) for n in GRAPH_SIZES] for _ in range(GRAPH_STEPS)]
    grads[GRAPH_BAD_STEP - 1][1][7] = np.nan
    hardware = driver().Device(0)  # without a context, which the program could not have beside this process everywhere
    compilers = () if hardware.name() == EMULATED else ("cc", "gcc", "clang")  # what a few steps there are not worth
    target = "c" if any(map(shutil.which, compilers)) else "numpy"
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
                raise Wrong(f"the program ends with {status}")
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
        raise Wrong(f"other bits: {np.flatnonzero(ours.view('u4') != theirs.view('u4'))[:9]}")
    if not same(np.frombuffer(made[12 * elements :][: 8 * len(NORMS)]), np.array([told[name] for name in NORMS])):
        raise Wrong("other statistics")
    print(f"{GRAPH_STEPS} steps, one of them skipped, have the bits of the target {target!r}: {said}")


PARTS: dict[str, Callable[[bool], None]] = {
    "about": about,
    "exercise": exercise,
    "bits": bits,
    "graph": graph,
    "traffic": traffic,
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="One part of what gpu.py shows.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller sizes")
    arguments = parser.parse_args()
    PARTS[arguments.part](arguments.quick)


if __name__ == "__main__":
    main()
