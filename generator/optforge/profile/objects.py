"""What the compiler made of a kernel, read from the compiled library with objdump: vectors or not, and spills."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

SECONDS = 20
ENDINGS = {"x86-64": "v1", "x86-64-v3": "v3", "x86-64-v4": "v4", "neon": "v1", "plain": "v1"}
X86 = re.compile(r"^v?(div|sqrt|mul|add|sub|fmadd\w*|fmsub\w*|fnmadd\w*)([ps])([sd])$")
ARM = re.compile(r"^f(div|sqrt|mul|add|sub)$")
REGISTERS = (("zmm", 64), ("ymm", 32), ("xmm", 16))


@dataclass(frozen=True)
class Code:
    """The machine code of a pass.

    `vector` and `scalar` count its arithmetic instructions, the latter of the few elements at the end of a tensor;
    `width` is the bytes of its widest vectors, `spills` how often one is kept on the stack, `unvectorised` names what
    is done for one element at a time alone.
    """

    vector: int
    scalar: int
    width: int
    spills: int
    unvectorised: tuple[str, ...]

    @property
    def vectorised(self) -> bool:
        """Whether the elements are computed many at a time."""
        return self.vector > 0 and not self.unvectorised

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "vectorised": self.vectorised}


def of_pass(library: Path, prefix: str, number: int, suffix: str, isa: str) -> Code | None:
    """The code of a pass in an instruction set; None where there is no objdump, or it finds no such function."""
    functions = disassembled(library)
    ending = f"_{number}_{suffix}_{ENDINGS.get(isa, 'v1')}"
    wanted = [name for name in functions if name.startswith(f"{prefix}_plain") and name.split(".")[0].endswith(ending)]
    return read(functions[wanted[0]]) if wanted else None


@cache
def disassembled(library: Path) -> dict[str, list[str]]:
    """The instructions of each function; none where there is no objdump."""
    program = shutil.which("objdump")
    if program is None:
        return {}
    try:
        answer = subprocess.run(
            [program, "-d", "--no-show-raw-insn", str(library)], capture_output=True, text=True, timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found: dict[str, list[str]] = {}
    name = ""
    for line in answer.stdout.splitlines():
        if header := re.match(r"^[0-9a-f]+ <(.+)>:$", line):
            name = header[1]
            found[name] = []
        elif name and (instruction := re.match(r"^\s+[0-9a-f]+:\s+(.+)$", line)):
            found[name].append(instruction[1])
    return found


def read(instructions: list[str]) -> Code:
    """What a function's instructions do."""
    vector: Counter[str] = Counter()
    scalar: Counter[str] = Counter()
    width = spills = 0
    for text in instructions:
        mnemonic, _, operands = text.partition(" ")
        if match := X86.match(mnemonic):
            (vector if match[2] == "p" else scalar)[match[1]] += 1
            if match[2] == "p":
                width = max(width, next((size for name, size in REGISTERS if name in operands), 0))
        elif ARM.match(mnemonic):
            packed = re.search(r"\bv\d+\.\d+[sd]", operands)
            (vector if packed else scalar)[mnemonic[1:]] += 1
            width = max(width, 16 if packed else 0)
        elif "mov" in mnemonic and re.search(r"%[xyz]mm\d+,\S*\(%rsp\)$", operands):
            spills += 1
    alone = tuple(sorted(name for name in scalar if not vector[name]))
    return Code(vector.total(), scalar.total(), width, spills, alone)
