"""What nvcc makes of emitted CUDA, by its own report and the machine code: no GPU is needed.

    python benchmarks/compiled.py [--rule adamw] [--store ARRAY=FORMAT,…] [--master f32|split] [--arch 90,120]

For each pass: registers, blocks of 256 threads that have room on a multiprocessor, spilled bytes, and for every four
elements of a thread the instructions and the FP64 operations among them, along the shortest way through the loop that
reads and writes vectors. Below it are the launches of a step, and what steps over some models can be expected to take:
an estimate, which nothing here measures (see `estimate`). It needs nvcc, and nvdisasm beside it or on PATH for what is
counted in the machine code. Exit codes: 0 shown, 2 a mistake in the arguments, 3 there is no nvcc.
"""

from __future__ import annotations

import argparse
import heapq
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import optforge as of
from optforge.core.diagnostics import EnvironmentProblem, UsageError
from optforge.core.formats import Wanted, parse_store
from optforge.core.summation import LEAF
from optforge.emit.cuda import passes_of
from optforge.engines.cuda import nvcc
from optforge.profile.models import Model, gpt2, many, resnet50

REGISTERS, GRANULE, WARPS = 65536, 256, 8  # of a multiprocessor, given out to a warp at a time; warps of a block
THREADS = {90: 2048, 100: 2048, 80: 2048}  # of a multiprocessor; of others 1,536, or 1,024 of 75
REPORT = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)
SECTION = re.compile(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|^\t\.section|\Z)", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"^\s*(?:(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;)", re.MULTILINE)
ENDS = re.compile(r"\b(BRA(?!\.DIV)|EXIT|RET)\b")  # BRA.DIV is for a warp whose threads are apart
TARGET = re.compile(r"\bBRA\b.*?`?\(?(\.L_x_\d+)\)?")
DOUBLE = re.compile(r"\b(DADD|DMUL|DFMA|DSETP|DMNMX)\b")
MEMORY = re.compile(r"\b(LDG?|STG?)\.E\b")  # of the device; pointers from tables are generic
ELEMENTWISE = re.compile(r"\b(LDG?|STG?)\.E(\.(U16|U8|S16|CONSTANT))*\s")  # of 4 bytes or fewer: what is no vector


@dataclass(frozen=True)
class Machine:
    """A GPU as its maker describes it: multiprocessors, their clock, bytes and FP64 operations per second."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    doubles: int  # operations of a multiprocessor at each tick


MACHINES = {90: Machine("H100 SXM", 132, 1.755e9, 3.35e12, 64), 120: Machine("RTX 5090", 170, 2.41e9, 1.79e12, 2)}
COPY = 0.92  # of the bandwidth that a maker names, which the best copy reaches
LAUNCH = 2.5e-6  # from the end of a kernel to the first work of the next in its stream
CHAIN = 3e-6  # of a warp: its leaf, the tensor, addresses, elements, each read behind the other, and what it does then
ISSUE = 4  # instructions that a multiprocessor begins at each tick
STEPS = ("plain", False, False), ("skip", False, True), ("statistics", True, False), ("skip and statistics", True, True)
MODELS = (many(10_000), Model("10^6 elements", [(1_000_000,)]), Model("ResNet-50", resnet50()))
MODELS += (Model("GPT-2", gpt2()), Model("10^9 elements", [(1_000_000_000,)]))


@dataclass(frozen=True)
class Figures:
    """What the compiler made of a pass; the last two are unknown where nobody reads the machine code."""

    architecture: int
    kernel: str
    registers: int
    blocks: int
    spilled: int
    instructions: float | None
    doubles: float | None

    def row(self) -> str:
        """A row of the table."""
        counted = ["" if own is None else f"{own:.0f}" for own in (self.instructions, self.doubles)]
        own = [f"sm_{self.architecture}", f"`{self.kernel}`", self.registers, self.blocks, self.spilled, *counted]
        return f"| {' | '.join(map(str, own))} |"


@dataclass
class Block:
    """Instructions without a label or a branch among them, and the numbers of the blocks that may come behind."""

    code: list[str]
    next: list[int]


def blocks(text: str) -> list[Block]:
    """The machine code of a kernel as blocks."""
    found, places, current = [Block([], [])], {}, 0
    for label, code in CODE.findall(text):
        if label:
            if found[current].code:
                found.append(Block([], []))
            current = len(found) - 1
            places[label] = current
        else:
            found[current].code.append(code)
            if ENDS.search(code):
                found.append(Block([], []))
                current = len(found) - 1
    for number, block in enumerate(found):
        last = block.code[-1] if block.code else ""
        target = TARGET.search(last)
        if ENDS.search(last) and target and target[1] in places:
            block.next.append(places[target[1]])
        ends = ENDS.search(last)
        if (not ends or last.startswith("@")) and number + 1 < len(found):
            block.next.append(number + 1)
    return found


def loop(found: Sequence[Block]) -> list[str]:
    """The instructions of the largest loop with vectors of memory, along its shortest way through vectors."""
    best, largest = [], 0
    for latch, block in enumerate(found):
        for head in (place for place in block.next if place <= latch):
            own = [code for each in found[head : latch + 1] for code in each.code]
            if len(own) > largest and any(MEMORY.search(code) and not ELEMENTWISE.search(code) for code in own):
                best, largest = shortest(found, head, latch), len(own)
    return best


def shortest(found: Sequence[Block], head: int, latch: int) -> list[str]:
    """The fewest instructions from the head of a loop to its end; single elements are only read in the last row."""

    def cost(block: Block) -> int:
        return len(block.code) + 1000 * any(ELEMENTWISE.search(code) for code in block.code)

    waiting: list[tuple[int, int, tuple[int, ...]]] = [(cost(found[head]), head, (head,))]
    seen: set[int] = set()
    while waiting:
        spent, at, way = heapq.heappop(waiting)
        if at in seen:
            continue
        seen.add(at)
        if at == latch:
            every = [code for number in way for code in found[number].code]
            return [code for code in every if not ELEMENTWISE.search(code) and not code.startswith("NOP")]
        for place in found[at].next:
            if head <= place <= latch:
                heapq.heappush(waiting, (spent + cost(found[place]), place, (*way, place)))
    return []


def at_once(text: str, kernel: str) -> int:
    """How many rows a pass reads before it uses one, as its emitted text says."""
    if "_scan_" in kernel or "_look_" in kernel:
        return 4
    own = max((name for name in re.findall(r"struct \w+?_cuda_(\w+) : optforge_cuda_pass_of", text)
               if f"_cuda_{name}_" in kernel), key=len, default="")  # fmt: skip
    said = re.search(rf"struct \w+_cuda_{own} : optforge_cuda_pass_of.*?enum \{{[^}}]*AT_ONCE = (\d+)", text, re.DOTALL)
    return int(said[1]) if own and said and "};" not in said[0].split("enum")[0] else 1


def compiled(files: Mapping[str, str], source: str, architecture: int) -> tuple[str, str]:
    """What the compiler reports of a file, and its machine code; empty without nvdisasm."""
    compiler = nvcc.find()
    with tempfile.TemporaryDirectory() as scratch:
        for name, text in files.items():
            Path(scratch, name).write_text(text, encoding="utf-8")
        command = [*compiler.command, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
        answer = subprocess.run([*command, "-o", "out.cubin", source], cwd=scratch, capture_output=True, text=True)
        if answer.returncode:
            raise EnvironmentProblem(answer.stderr)
        places = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(compiler.command[0]).resolve().parent)])
        program = shutil.which("nvdisasm", path=places)
        if program is None:
            return answer.stderr, ""
        code = subprocess.run([program, "-c", "out.cubin"], cwd=scratch, capture_output=True, text=True, check=True)
        return answer.stderr, code.stdout


def room(registers: int, architecture: int) -> int:
    """Blocks of 256 threads that a multiprocessor has registers and threads for."""
    own = -(-registers * 32 // GRANULE) * GRANULE * WARPS
    threads = THREADS.get(architecture, 1024 if architecture == 75 else 1536)
    return min(REGISTERS // own, threads // (32 * WARPS))


def figures(files: Mapping[str, str], source: str, architecture: int) -> list[Figures]:
    """What there is to tell of each kernel that passes over memory."""
    said, code = compiled(files, source, architecture)
    sections = dict(SECTION.findall(code))
    found = []
    for name, stores, loads, registers in sorted(REPORT.findall(said)):
        if name.endswith(("_begin", "_fold", "_finish", "_attempt")):
            continue
        way, rows = loop(blocks(sections.get(name, ""))), at_once(files[source], name)
        doubles = sum(bool(DOUBLE.search(own)) for own in way)
        counted = (len(way) / rows, doubles / rows) if way else (None, None)
        spilled = int(stores) + int(loads)
        found.append(Figures(architecture, name, int(registers), room(int(registers), architecture), spilled, *counted))
    return found


def launches(rule: of.Rule, observe: bool, skip: bool) -> list[str]:
    """The kernels of a step: its begin, each pass and what adds up behind it, and the end."""
    kernel = rule.kernel()
    found = ["begin"]
    for own in passes_of(kernel):
        looks = observe or (skip and own.number == 0)
        if not own.optional or skip:
            found.append(own.observed if observe or (looks and not own.optional) else own.plain)
            found += ["fold"] if (own.all_sums if looks else own.sums) else []
    return found + (["finish"] if observe or kernel.state_stores else [])


def estimate(own: Figures, bytes_per_element: float, model: Model) -> float:
    """Seconds that a pass takes, at least.

    The longest of four: to move its bytes, to begin its instructions, to do its FP64 operations, and to wait for memory
    as often as warps come after each other, which matters where leaves are few or small.
    """
    machine = MACHINES[own.architecture]
    sizes = [math.prod(shape) for shape in model.shapes]
    rows = sum(sizes) / 128  # of a warp: four elements of each thread
    ticks = machine.multiprocessors * machine.clock
    warps = machine.multiprocessors * own.blocks * WARPS
    return max(
        sum(sizes) * bytes_per_element / (COPY * machine.bandwidth),
        (own.instructions or 0) * rows / (ISSUE * ticks),
        (own.doubles or 0) * rows * 32 / (machine.doubles * ticks),
        math.ceil(sum(-(-n // LEAF) for n in sizes) / warps) * CHAIN,
    )


def estimates(rule: of.Rule, found: Sequence[Figures]) -> list[str]:
    """A table of what steps over float32 arrays can be expected to take, beside what moving the bytes takes alone."""
    lines = [f"| | {' | '.join(model.label for model in MODELS)} |", f"|---|{'--:|' * len(MODELS)}"]
    for architecture in [own for own in dict.fromkeys(own.architecture for own in found) if own in MACHINES]:
        machine = MACHINES[architecture]
        by_name = {own.kernel.partition("_cuda_")[2].removesuffix("_f32"): own for own in found
                   if own.architecture == architecture}  # fmt: skip
        moved = {}
        for own, phase in zip(passes_of(rule.kernel()), rule.kernel().phases, strict=True):
            moved |= dict.fromkeys((own.plain, own.observed), 4 * (len(phase.loads) + len(phase.stores)))
        for title, observe, skip in STEPS:
            names = launches(rule, observe, skip)
            cells = []
            for model in MODELS:
                passes = sum(estimate(by_name[name], moved[name], model) for name in names if name in moved)
                waits = LAUNCH * len(names) + CHAIN * (len(names) - sum(name in moved for name in names))
                floor = model.elements * sum(moved.get(name, 0) for name in names) / (COPY * machine.bandwidth)
                cells.append(f"{1e6 * (passes + waits):,.0f} ({1e6 * floor:,.0f})")
            lines.append(f"| {machine.name}, {title} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Registers, spills and instructions of emitted CUDA.")
    parser.add_argument("--rule", default="adamw", help="one that is built in (adamw)")
    parser.add_argument("--store", action="append", metavar="ARRAY=FORMAT,…", help="how arrays are stored")
    parser.add_argument("--master", choices=("f32", "split"), help="what p is rounded from")
    parser.add_argument("--rounding", choices=("nearest", "stochastic"), default="nearest")
    parser.add_argument("--arch", default="90,120", metavar="N,…", help="compute capabilities without a dot (90,120)")
    arguments = parser.parse_args()
    try:
        rule = of.rules[arguments.rule]
        wanted = Wanted(None, parse_store(arguments.store), arguments.master, arguments.rounding)
        files = rule.emit("cuda", Wanted("f32") if not wanted.own else wanted, None, {})
        found = [own for architecture in arguments.arch.split(",")
                 for own in figures(files, f"{rule.name}.cu", int(architecture))]  # fmt: skip
        lines = ["| | kernel | registers | blocks | spilled bytes | instructions per 4 | FP64 per 4 |"]
        lines += ["|---|---|--:|--:|--:|--:|--:|", *(own.row() for own in found)]
        counts = [f"{title} {len(launches(rule, observe, skip))}" for title, observe, skip in STEPS]
        lines += ["", f"Launches of a step: {', '.join(counts)}."]
        if not wanted.own:
            lines += ["", "A step in µs, as estimated (and what moving its bytes takes):", "", *estimates(rule, found)]
    except (KeyError, UsageError, ValueError) as problem:
        print(f"compiled.py: {problem}", file=sys.stderr)
        return 2
    except EnvironmentProblem as problem:
        print(f"compiled.py: {problem}", file=sys.stderr)
        return 3
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
