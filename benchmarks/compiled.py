"""What nvcc makes of emitted CUDA, by its own report and the machine code: no GPU is needed.

    python benchmarks/compiled.py [--rule adamw] [--store ARRAY=FORMAT,…] [--master f32|split] [--arch 90,120]

For each pass: registers, blocks of 256 threads that have room on a multiprocessor, spilled bytes, and for every four
elements of a thread the instructions and the FP64 operations among them, along the shortest way through the loop that
reads and writes vectors. Below it are the launches of a step. It needs nvcc, and nvdisasm beside it or on PATH for what
is counted in the machine code. Exit codes: 0 shown, 2 a mistake in the arguments, 3 there is no nvcc.
"""

from __future__ import annotations

import argparse
import heapq
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
from optforge.emit.cuda import passes_of
from optforge.engines.cuda import nvcc

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


def table(files: Mapping[str, str], source: str, architecture: int) -> list[str]:
    """Rows of a table in Markdown, one for each kernel that passes over memory."""
    said, code = compiled(files, source, architecture)
    sections = dict(SECTION.findall(code))
    rows = []
    for name, stores, loads, registers in sorted(REPORT.findall(said)):
        if name.endswith(("_begin", "_fold", "_finish", "_attempt")):
            continue
        way = loop(blocks(sections.get(name, "")))
        rows_of = at_once(files[source], name)
        doubles = sum(bool(DOUBLE.search(own)) for own in way)
        counted = [f"{len(way) / rows_of:.0f}", f"{doubles / rows_of:.0f}"] if way else ["", ""]
        own = [f"sm_{architecture}", f"`{name}`", registers, str(room(int(registers), architecture)),
               str(int(stores) + int(loads)), *counted]  # fmt: skip
        rows.append(f"| {' | '.join(own)} |")
    return rows


def launches(rule: of.Rule) -> list[str]:
    """How many kernels a step launches: its begin, a pass and what adds up behind it, and the end."""
    kernel = rule.kernel()
    passes = passes_of(kernel)
    lines = []
    for title, observe, skip in (("plain", False, False), ("skip", False, True), ("statistics", True, False)):
        number = 1 + bool(observe or kernel.state_stores)
        for own in passes:
            looks = observe or (skip and own.number == 0)
            if not own.optional or skip:
                number += 1 + bool(own.all_sums if looks else own.sums)
        lines.append(f"{title} {number}")
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
        lines = ["| | kernel | registers | blocks | spilled bytes | instructions per 4 | FP64 per 4 |"]
        lines += ["|---|---|--:|--:|--:|--:|--:|"]
        for architecture in arguments.arch.split(","):
            lines += table(files, f"{rule.name}.cu", int(architecture))
    except (KeyError, UsageError, ValueError) as problem:
        print(f"compiled.py: {problem}", file=sys.stderr)
        return 2
    except EnvironmentProblem as problem:
        print(f"compiled.py: {problem}", file=sys.stderr)
        return 3
    print(*lines, "", f"Launches of a step: {', '.join(launches(rule))}.", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
