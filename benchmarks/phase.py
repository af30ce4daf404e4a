"""Steps and whole phases against PyTorch and the limits of the machine: the profile of the rules that README.md lists.

    python benchmarks/phase.py [--quick] [options of optforge profile]

Everything is `optforge profile`'s; this only says of what. Exit codes are its own.
"""

from __future__ import annotations

import sys

from optforge.cli import main

RULES = ["clip_by_global_norm:adamw", "adamw", "rmsprop", "adadelta"]
NETWORKS = ["--sizes", "mlp,lenet,resnet20,many,resnet50,gpt2"]
FULL = [*RULES, "--against", "torch", *NETWORKS, "--threads", "all", "--seconds", "600"]
QUICK = [
    "clip_by_global_norm:adamw",
    "--against",
    "torch",
    "--sizes",
    "mlp,many",
    "--threads",
    "all",
    "--seconds",
    "20",
]

if __name__ == "__main__":
    given = sys.argv[1:]
    usual = QUICK if "--quick" in given else FULL
    main(["profile", *usual, *(word for word in given if word != "--quick")])
