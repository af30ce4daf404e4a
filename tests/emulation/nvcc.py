"""An nvcc that makes a library for the CPU, which the emulated driver loads where it is given a cubin.

It takes the options of `nvcc -cubin -std=c++17 -arch=sm_90 -O3 -o OUT IN.cu`; those without a meaning here are ignored.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from emulation import PREPROCESS, link_emulated, run
from support.amount import LEVEL

VERSION = """nvcc: NVIDIA (R) Cuda compiler driver
Emulated for the CPU: not a compiler of NVIDIA's
Cuda compilation tools, release 13.0, V13.0.0"""
MEANINGFUL = ("-I", "-D", "-U", "-include")
WITH_VALUE = (*MEANINGFUL, "-o", "-output-file", "-x", "-arch", "-code", "-gencode", "-std", "-Werror", "-Xcompiler", "-Xptxas",
              "-ccbin", "-maxrregcount", "-diag-suppress", "-compiler-options")  # fmt: skip


def main(arguments: list[str]) -> None:
    """Compile what the arguments say."""
    if "--version" in arguments or "-V" in arguments:
        print(VERSION)
        return
    sources: list[Path] = []
    flags: list[str] = []
    output: Path | None = None
    rest = iter(arguments)
    for argument in rest:
        option = argument.replace("--", "-", 1) if argument.startswith("--") else argument
        value = next(rest, "") if option in WITH_VALUE else ""
        if option == "-" or not option.startswith("-"):
            sources.append(Path("/dev/stdin" if option == "-" else argument))
        elif option in ("-o", "-output-file"):
            output = Path(value)
        elif option in ("-ptx", "-fatbin"):
            sys.exit(f"nvcc of the emulation: {option} cannot be made for a CPU")
        elif option.startswith(MEANINGFUL):
            flags += [option, value] if value else [option]
    try:
        if "-E" in arguments or "--preprocess" in arguments:
            print(*(run([*PREPROCESS, "-P", *flags, str(source)]) for source in sources))
        else:
            link_emulated(sources, output or Path(sources[0].stem + ".cubin"), [LEVEL, *flags])
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
