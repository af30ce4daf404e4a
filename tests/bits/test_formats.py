"""Every rule over arrays in every format has the bits of the oracle: on all instruction sets, threads and parts."""

from __future__ import annotations

import pytest

from amount import FULL
from conftest import require
from native import instruction_sets
from storing import CASES, Kernels, execute

SETS = [name for name, available in instruction_sets().items() if available] or ["plain"]
SHARES = (1, 2, 3, 7)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    require("gcc")
    return Kernels(tmp_path_factory.mktemp("formats"))


def isas(kernels: Kernels) -> list[str]:
    if SETS != ["plain"]:
        return SETS
    return [kernels.library.ffi.string(kernels.library.calls.optforge_isa()).decode()]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_rule_in_every_format(case: tuple[str, str], kernels: Kernels) -> None:
    """On each instruction set; threads and parts take turns over the cases, but where the long run is asked for."""
    turn = CASES.index(case)
    for number, isa in enumerate(isas(kernels)):
        kernels.use(isa)
        for shares in SHARES if FULL else (SHARES[(turn + number) % 4],):
            execute(kernels, case, "tame", shares=shares)
        if FULL or number == turn % len(SETS):
            execute(kernels, case, "tame", stats=False)
            execute(kernels, case, "tame", cut=1024, shares=3, stats=turn % 2 == 0)
        execute(kernels, case, "wild", stats=turn % 2 == 1)
        if FULL or turn % 16 == 0:
            execute(kernels, case, "large", shares=7)
