"""What a profile holds a kernel against: bytes and divisions, counted by hand here; the emitted limits; sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest

import optforge as of
from conftest import require
from optforge.core.diagnostics import UsageError
from optforge.core.formats import Wanted
from optforge.profile import counters, kernels, models, objects
from optforge.profile.limits import Needs, needs

CACHES = {"L1": 32 << 10, "L2": 1 << 20, "L3": 32 << 20}


def of_rule(rule: of.Rule, wanted: Wanted) -> Needs:
    kernel, storages = rule.stored(wanted, rule.definition.settings)
    return needs(kernel, storages[-1])


# Arrays read and written, by the formulas: bytes of a step and of the phase, divisions and roots.
COUNTED = {
    "sgd": (3 * 4, 4 * 4, 0, 0),  # p g | p
    "momentum": (5 * 4, 6 * 4, 0, 0),  # p g m | p m
    "adagrad": (5 * 4, 6 * 4, 1, 1),
    "rmsprop": (5 * 4, 6 * 4, 1, 1),
    "adadelta": (7 * 4, 8 * 4, 1, 2),
    "adamw": (7 * 4, 8 * 4, 2, 1),
    # The norms of p and of the step: p g m v | m v, then p m v | p; the step is computed in both.
    "lamb": (10 * 4, 11 * 4, 6, 2),
}


@pytest.mark.parametrize("name", COUNTED)
def test_what_a_rule_needs(name: str) -> None:
    own = of_rule(of.rules[name], Wanted(["f32"]))
    assert (own.bytes("step"), own.bytes("phase"), own.divisions, own.roots) == COUNTED[name]


def test_a_norm_of_gradients_is_the_scan() -> None:
    """Clipping reads the gradients once, which finds what is not finite in passing."""
    own = of_rule(of.clip_by_global_norm >> of.rules.adamw, Wanted(["f32"]))
    assert own.bytes("step") == own.bytes("phase") == 32
    assert [part.bytes for part in own.of("step")] == [4, 28]
    assert (own.sums("step"), of_rule(of.rules.adamw, Wanted(["f32"])).sums("step")) == (1, 0)
    assert own.sums("phase") > 2


@pytest.mark.parametrize(
    ("wanted", "bytes", "resident"),
    [
        (Wanted(["f64"]), 56, 32),
        (Wanted(store={"p": "bf16", "g": "bf16"}), 22, 12),
        (Wanted(store=dict.fromkeys("pgmv", "bf16")), 14, 8),
        (Wanted(store={"p": "bf16", "g": "bf16"}, master="split"), 26, 14),
        (Wanted(store={"p": "bf16", "g": "bf16"}, master="f32"), 4 + 2 + 8 + (2 + 4) + 8, 16),
    ],
)
def test_formats_count_as_they_are_stored(wanted: Wanted, bytes: int, resident: int) -> None:
    own = of_rule(of.rules.adamw, wanted)
    assert (own.bytes("step"), own.resident) == (bytes, resident)


@pytest.fixture(scope="module")
def lamb() -> kernels.Compiled:
    require("gcc")
    wanted = Wanted(["f32", "f64"], {"p": "bf16", "g": "bf16"}, "f32")
    return kernels.compiled(of.clip_by_global_norm >> of.rules.lamb, wanted, {})


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("threads", [1, 3])
def test_streams_change_nothing(lamb: kernels.Compiled, kind: int, threads: int) -> None:
    """Every array holds what it held, but p where it is only written, as it is rounded from its master."""
    tensors = kernels.Tensors(models.Model("x", [(70_001,), (0,), (31,), (4096,)]), lamb.needs[kind], lamb.kernel)
    every = [*tensors.grads, *(a for own in tensors.state for a in own.values())]
    every += tensors.params if not lamb.needs[kind].storage.master else []
    before = [a.tobytes() for a in every]
    for work in ("step", "phase"):
        streams = kernels.streams(lamb, kind, tensors, threads, work)
        streams.run(1, 2)
        streams.free()
    assert [a.tobytes() for a in every] == before


def test_the_kernel_that_is_timed_is_the_kernel(lamb: kernels.Compiled) -> None:
    """Steps from C have the bits of the Optimizer's."""
    model = models.Model("x", [(1000,), (5,)])
    tensors = kernels.Tensors(model, lamb.needs[0], lamb.kernel)
    params = [p.copy() for p in tensors.params]
    opt = of.Optimizer(params, of.clip_by_global_norm >> of.rules.lamb)
    steps = kernels.kernel_steps(lamb, 0, tensors, 1, False)
    for _ in range(3):  # one to begin with, and two that tell how long one takes
        opt.step(tensors.grads)
    assert [p.tobytes() for p in params] == [p.tobytes() for p in tensors.params]
    times = kernels.phase_times(lamb, steps, 2)
    opt.step(tensors.grads)
    assert len(times) == len(lamb.needs[0].of("step")) == 3 and all(t >= 0 for t in times)
    assert [p.tobytes() for p in params] == [p.tobytes() for p in tensors.params]
    steps.free()


def test_a_refused_step_is_an_error(lamb: kernels.Compiled) -> None:
    tensors = kernels.Tensors(models.one("x", 10), lamb.needs[0], lamb.kernel)
    tensors.table[0, 2] = tensors.table[0, 1]  # the gradient is the parameter
    with pytest.raises(RuntimeError, match="overlap"):
        kernels.kernel_steps(lamb, 0, tensors, 1, False)


def test_instruction_sets(lamb: kernels.Compiled) -> None:
    assert lamb.isa in lamb.sets()
    assert not lamb.use("x86-64-v9")


def test_networks() -> None:
    """The numbers of parameters that are published, and of tensors."""
    assert (len(models.gpt2()), models.Model("", models.gpt2()).elements) == (148, 124_439_808)
    assert (len(models.resnet50()), models.Model("", models.resnet50()).elements) == (161, 25_557_032)
    assert models.Model("", models.NETWORKS["many"]()).elements == 640_000


def test_sizes() -> None:
    found = models.models(["4096", "64k", "16M", "l2", "memory", "lenet"], CACHES, 16)
    assert [model.elements for model in found[:3]] == [4096, 65536, 16 << 20]
    assert found[3].elements * 16 < CACHES["L2"] < 3 * found[3].elements * 16
    assert found[4].elements * 16 >= 4 * CACHES["L3"]
    assert [model.name for model in found] == ["4096", "64k", "16M", "L2", "memory", "lenet"]
    assert [model.name for model in models.models(["L2", "L1"], {"L1": 1 << 15}, 16)] == ["L1"]
    assert math.log2(models.models(["1G"], CACHES, 16)[0].elements) == 30


@pytest.mark.parametrize("wrong", ["0", "-3", "3.5", "12q", "L4", "resnet5", "9999999G", ""])
def test_no_sizes(wrong: str) -> None:
    with pytest.raises(UsageError, match="--sizes"):
        models.models([wrong], CACHES, 16)


def test_random_gradients_are_no_subnormals() -> None:
    """Narrow formats too: what is timed is what training meets."""
    kernel, storages = of.rules.adamw.stored(Wanted(store={"p": "bf16", "g": "bf16"}), {})
    tensors = kernels.Tensors(models.one("x", 5000), needs(kernel, storages[0]), kernel, 1024.0)
    values = storages[0]["g"].load(tensors.grads[0])
    assert 0.9 < np.std(values) / (1e-3 * 1024) < 1.1


def test_counters() -> None:
    """What perf says where it counts, and where it does not."""
    lines = [
        "1234,,cycles:u,200,100.00,,",
        "<not supported>,,cache-misses:u,0,100.00,,",
        "4321,,instructions,9,9,3.5,x",
    ]
    assert counters.parse("\n".join(lines)) == {"cycles": 1234.0, "instructions": 4321.0}
    assert counters.parse("Error: no access\n") == counters.parse("") == {}


CODE = """
vdivps %ymm1,%ymm0,%ymm0
vmulps (%rax),%ymm2,%ymm3
vsqrtps %ymm0,%ymm0
vmovaps %ymm3,0x40(%rsp)
vdivss %xmm1,%xmm0,%xmm0
vmulss %xmm1,%xmm0,%xmm0
sqrtss %xmm1,%xmm0
ret
"""


def test_what_the_compiler_made(lamb: kernels.Compiled) -> None:
    """Vectors and spills by the instructions; and of a compiled kernel, where there is objdump."""
    found = objects.read(CODE.split("\n"))
    assert (found.vector, found.scalar, found.width, found.spills) == (3, 3, 32, 1) and found.vectorised
    alone = objects.read(["divss %xmm1,%xmm0", "mulps %xmm1,%xmm0"])
    assert alone.unvectorised == ("div",) and not alone.vectorised
    assert objects.read([".1"]) == objects.Code(0, 0, 0, 0, ())
    require("objdump")
    if lamb.isa.startswith("x86-64"):
        own = objects.of_pass(lamb.path, "clip_by_global_norm_lamb", 1, "f32", lamb.isa)
        assert own is not None and own.vectorised and own.width in (16, 32, 64)
