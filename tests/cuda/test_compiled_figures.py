"""The script that shows what nvcc makes of emitted CUDA."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

import optforge as of
from conftest import require
from places import TESTS

SPEC = importlib.util.spec_from_file_location("compiled", TESTS.parent / "benchmarks" / "compiled.py")
assert SPEC is not None and SPEC.loader is not None
compiled = importlib.util.module_from_spec(SPEC)  # beside it are others, of names that tests have too
sys.modules["compiled"] = compiled
SPEC.loader.exec_module(compiled)

LISTING = """.text.one:
        /*0000*/                   LDG.E R4, desc[UR6][R4.64+0x10] ;
.L_x_1:
        /*0010*/              @!P0 BRA `(.L_x_3) ;
        /*0020*/                   BRA.DIV UR4, `(.L_x_9) ;
        /*0030*/                   LD.E.128 R8, desc[UR6][R28.64] ;
        /*0040*/                   BRA `(.L_x_4) ;
.L_x_3:
        /*0050*/               @P2 LD.E R8, desc[UR6][R28.64] ;
.L_x_4:
        /*0060*/                   DFMA R8, R8, R8, R12 ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_9:
        /*0090*/                   BRA `(.L_x_4) ;
"""


def test_the_way_through_vectors() -> None:
    (section,) = compiled.SECTION.findall(LISTING)
    assert section[0] == "one"
    way = compiled.loop(compiled.blocks(section[1]))
    assert [code.split()[0] for code in way] == ["@!P0", "BRA.DIV", "LD.E.128", "BRA", "DFMA", "@P1"]


@pytest.mark.parametrize(("registers", "architecture", "blocks"), [(64, 90, 4), (65, 90, 3), (32, 90, 8), (32, 120, 6)])
def test_blocks_that_have_room(registers: int, architecture: int, blocks: int) -> None:
    assert compiled.room(registers, architecture) == blocks


def test_launches() -> None:
    counts = {
        rule: [len(compiled.launches(of.rules[rule], *how)) for _, *how in compiled.STEPS] for rule in ("adamw", "lamb")
    }
    assert counts == {"adamw": [2, 4, 4, 6], "lamb": [4, 6, 6, 8]}
    assert compiled.launches(of.rules.adamw, True, True) == [
        *("begin", "scan", "fold", "elements_observed", "fold", "finish")
    ]


def test_the_longest_of_what_a_pass_waits_for() -> None:
    """Bytes over much memory, FP64 where it is slow and asked for, and one chain of reads over few leaves."""
    model = compiled.Model("much", [(1 << 30,)])
    own = compiled.Figures(90, "a", 64, 4, 0, 228.0, 0.0)
    assert compiled.estimate(own, 28, model) == pytest.approx((1 << 30) * 28 / (0.92 * 3.35e12))
    slow = compiled.Figures(120, "a", 64, 4, 0, 228.0, 96.0)
    assert compiled.estimate(slow, 28, model) > 1.5 * (1 << 30) * 28 / (0.92 * 1.79e12)
    assert compiled.estimate(own, 28, compiled.Model("little", [(64,)])) == compiled.CHAIN


def test_a_table() -> None:
    require("nvcc")
    command = [sys.executable, str(TESTS.parent / "benchmarks" / "compiled.py"), "--rule", "sgd", "--arch", "90"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "| sm_90 | `sgd_cuda_elements_f32` | " in answer.stdout and "Launches of a step: plain 2" in answer.stdout
    assert subprocess.run([*command[:3], "sdg"], capture_output=True).returncode == 2
