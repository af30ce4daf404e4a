"""How much a file may ask for. No real rule comes near; what is beyond is refused, so that nothing takes for ever."""

from __future__ import annotations

# A file of rules, and all its text that a rule is made of.
FILE_BYTES = 1 << 19
NESTING = 100  # levels of a syntax tree; a chain of `and`, or of comparisons, counts each term
NAME_LENGTH = 100  # characters, of any name, and as it is spelled in C

# A rule with its transforms.
PARTS = 32  # transforms, and the rule behind them
COMPOSED_NAME = 200  # characters of the name that they have together
NODES = 10_000  # of the syntax trees
STATES = 160
HYPERPARAMETERS = 200
OPTIONS = 40
OPTION_STRINGS = 100  # that one option is compared with
ASSERTS = 100
REDUCTIONS = 32
SCALARS = 432  # that the loops over elements, and scalars behind them, read: OPTFORGE_CUDA_NEWS, and C takes some more

# What is tried to find the best of many, or said when things are wrong.
CHECKED_NODES = 200_000  # nodes of a rule times the choices of its options under which it is checked
ERRORS = 50  # after which a rule is not read on
CANDIDATES = 60  # names among which the one that was meant is looked for
COMPARED_LENGTH = 24  # characters of such a name
LISTED = 20  # names in a hint

# Files that are not rules.
EMITTED_BYTES = 1 << 26  # an emitted file, as it stands in a directory
COMPARED_BYTES = 1 << 21  # of which a difference is shown
CACHED_BYTES = 1 << 28  # a compiled kernel
HEADER_BYTES = 1 << 25  # of a checkpoint: all but its arrays
COMPILER_SECONDS = 120
COMPILER_SAYS = 1 << 16  # bytes that are kept of what a compiler says


def enumerated(names: list[str]) -> str:
    """Names in a row, of many the first."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
