"""What emitted CUDA refuses, each found before any work is enqueued: nothing is written then."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from conftest import require
from cuda import Cuda, Options, Plan
from emulation import compile_emulated
from optforge import scalar
from optforge.emit import layout

LEAF, CHUNK = 1024, 32768


@of.rule
def guarded(p, g, m=0.0, seen: scalar = 0.0, *, lr=0.1, scale=2.0, floor=1.0):
    """An assertion, a scalar that may have no value, array and scalar state."""
    assert lr >= 0
    m = m + lr / floor * g
    seen = seen + 1
    p = p - scale * m
    return p, m, seen


class Small:
    """Two tensors, a plan over them, and all of their memory."""

    def __init__(self, cuda: Cuda):
        self.cuda = cuda
        self.block = np.zeros(4 * (CHUNK + 64), np.float32)
        self.tensors = []
        for n, start in ((CHUNK + 5, 0), (3, CHUNK + 32)):
            arrays = {
                name: self.block[k * (CHUNK + 64) + start : k * (CHUNK + 64) + start + n]
                for k, name in enumerate(("p", "g", "m"))
            }
            self.tensors.append({**arrays, "seen": np.zeros(1)})
        self.sizes = [tensor["p"].size for tensor in self.tensors]
        self.space = cuda.workspace(self.sizes)
        self.workspace = self.space.arrays[0]
        self.workspace[:] = 7.0
        status, self.plan = cuda.plan(self.tensors, self.options())
        assert status == 0
        for tensor in self.tensors:
            tensor["p"][:], tensor["g"][:] = 1.0, 1.0
        self.before = self.everything()

    def options(self, **values: Any) -> Options:
        return self.cuda.options(self.workspace, **values)

    def everything(self) -> list[bytes]:
        return [self.block.tobytes(), self.workspace.tobytes(), *(t["seen"].tobytes() for t in self.tensors)]

    def says(self, status: int) -> str:
        """What a status means, of a call that wrote nothing."""
        assert self.everything() == self.before and self.space.intact()
        return str(self.cuda.call("strerror", status, result=ctypes.c_char_p).decode())

    def planned(self, options: Options | None = None, tensors: Any = None, count: int | None = None) -> str:
        """The text of the status of a plan, which is not made."""
        plan, own = Plan(count=99), options or self.options()
        given = self.cuda.tensors(self.tensors) if tensors is None else tensors
        number = ctypes.c_size_t(len(self.tensors) if count is None else count)
        status = self.cuda.call("plan_f32", ctypes.byref(plan), given, number, ctypes.byref(own), None)
        assert bytes(plan) == bytes(Plan(count=99))
        return self.says(status)

    def stepped(self, t: int = 1, options: Options | None = None, **hyper: float) -> str:
        """The text of the status of a step that is not done."""
        return self.says(self.cuda.step(t, self.plan, options or self.options(), hyper))


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Cuda:
    require("g++")
    return Cuda(guarded, tmp_path_factory.mktemp("refusals"), dtypes="f32")


@pytest.fixture
def small(cuda: Cuda) -> Small:
    return Small(cuda)


NULL, WORKSPACE = "a pointer is NULL", "the workspace is too small, or not aligned to 16 bytes"


@pytest.mark.parametrize("name", ["p", "g", "m", "seen"])
def test_arrays(name: str, small: Small) -> None:
    def changed(k: int, address: int | None) -> str:
        table = small.cuda.tensors(small.tensors)
        setattr(table[k], name, address)
        return small.planned(tensors=table)

    for k in (0, 1):
        own = small.tensors[k]
        assert changed(k, None) == NULL
        for off in (1, 2) if name != "seen" else (1, 2, 4):
            assert changed(k, own[name].ctypes.data + off) == "an array is not aligned to its elements"
        for other in {"p", "g", "m"} - {name}:
            last = own[other][-1:].ctypes.data
            for place in (own[other].ctypes.data, last - last % 8 if name == "seen" else last):
                if name == "seen" and place % 8:
                    place -= 4
                assert changed(k, place) == "two arrays of a tensor overlap", (k, other)


def test_sizes(small: Small) -> None:
    table = small.cuda.tensors(small.tensors)
    for n in (2**42, 2**62, 2**64 - 1):
        table[0].n = n
        assert small.planned(tensors=table) == "a tensor has more elements than memory can hold"


def test_missing_arguments(small: Small) -> None:
    cuda, plan, options = small.cuda, ctypes.byref(small.plan), ctypes.byref(small.options())
    table, two, one = cuda.tensors(small.tensors), ctypes.c_size_t(2), ctypes.c_uint64(1)
    hyper = cuda.hyper()
    assert small.says(cuda.call("plan_f32", None, table, two, options, None)) == NULL
    assert small.says(cuda.call("plan_f32", ctypes.byref(Plan()), None, two, options, None)) == NULL
    assert small.says(cuda.call("plan_f32", ctypes.byref(Plan()), table, two, None, None)) == NULL
    assert small.planned(cuda.options()) == NULL
    assert small.says(cuda.call("step", None, one, plan, options, None)) == NULL
    assert small.says(cuda.call("step", hyper, one, None, options, None)) == NULL
    assert small.says(cuda.call("rows", plan, None, one, ctypes.c_size_t(1), 1, options, None)) == NULL
    assert small.says(cuda.call("rows", None, hyper, one, ctypes.c_size_t(1), 1, options, None)) == NULL
    assert small.says(cuda.call("launch", None, options, None)) == NULL
    assert small.says(cuda.call("phases", None, options, 0, 1, None)) == NULL
    assert small.says(cuda.call("state_init", None, hyper, None)) == NULL
    for first, last in ((-1, 1), (cuda.phases, cuda.phases), (1, 0), (cuda.phases + 3, 99), (0, cuda.phases + 1)):
        said = small.says(cuda.call("phases", plan, options, first, last, None))
        assert said == "the phases to be done are not among those of a step"
    number = ctypes.c_size_t(5)
    for where, phase in ((None, 0), (plan, -1), (plan, cuda.phases - 1), (plan, 99)):
        found = cuda.call("partials", where, phase, ctypes.byref(number), result=ctypes.c_void_p)
        assert (found, number.value) == (None, 0)


def test_workspaces(small: Small) -> None:
    for size in (0, 16, small.workspace.nbytes // 2):
        assert small.planned(small.options(workspace_size=size)) == WORKSPACE
    for off in (1, 4, 8):
        options = small.options()
        options.workspace += off
        assert small.planned(options) == WORKSPACE
    more = small.cuda.options(small.workspace, groups=50)
    assert small.planned(more) == WORKSPACE


def test_the_workspace_is_as_large_as_is_said(cuda: Cuda) -> None:
    """Every list fits, and one that needs all of it does not fit into less."""
    rng, tight = np.random.default_rng(0), 0
    for count in (1, 2, 3, 17):
        for groups in (0, 1, 5):
            sizes = [int(n) for n in rng.choice([0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 1], count)]
            table = (cuda.Tensor * count)()
            seen = np.zeros(count)
            for k, n in enumerate(sizes):
                table[k] = cuda.Tensor(n, 1 << 44, 1 << 45, 1 << 46, seen.ctypes.data + 8 * k)
            space = cuda.workspace(sizes, max(groups, 1))
            options = cuda.options(space.arrays[0], groups=groups)
            arguments = table, ctypes.c_size_t(count), ctypes.byref(options), None
            assert cuda.call("plan_f32", ctypes.byref(Plan()), *arguments) == 0
            assert space.intact()
            options.workspace_size -= 16
            tight += cuda.call("plan_f32", ctypes.byref(Plan()), *arguments) != 0
    assert tight


def test_groups(small: Small) -> None:
    table = np.array([0, 2], np.uintp)
    space = small.cuda.workspace(small.sizes, 2).arrays[0]
    options = small.cuda.options(space, groups=2, group=table.ctypes.data)
    assert small.planned(options) == "a tensor's group is none of the groups"
    options = small.cuda.options(space, group=(table - 1).astype(np.uintp).ctypes.data)
    table[:] = 1, 0
    options = small.cuda.options(space, group=table.ctypes.data)
    assert small.planned(options) == "a tensor's group is none of the groups"
    table[:] = 2**64 - 1, 0
    assert small.planned(options) == "a tensor's group is none of the groups"


PART = "a part is not in its tensor, cuts a leaf, or does not follow another with its scalar state"


@pytest.mark.parametrize(
    ("size", "parts", "said"),
    {
        "no such tensor": (CHUNK + 5, [(2, 0), (1, 0)], "a tensor's number is none of the tensors"),
        "it begins inside a leaf": (CHUNK + 6, [(0, 1), (1, 0)], PART),
        "it ends behind the tensor": (CHUNK + 5, [(0, LEAF), (1, 0)], PART),
        "it begins behind the tensor": (CHUNK + 5, [(0, 0), (1, LEAF)], PART),
        "it ends inside a leaf": (CHUNK + 6, [(0, 0), (1, 0)], PART),
    }.values(),
)
def test_parts(size: int, parts: Any, said: str, small: Small) -> None:
    sizes = np.array([size, 3], np.uintp)
    number, part = (np.array([own[k] for own in parts], np.uintp) for k in (0, 1))
    options = small.options(tensors=2, sizes=sizes.ctypes.data, number=number.ctypes.data, part=part.ctypes.data)
    assert small.planned(options) == said
    options.part = None
    assert small.planned(options) == NULL
    options.part, options.number = part.ctypes.data, None
    assert small.planned(options) == NULL


def test_parts_with_one_scalar_state_are_neighbours(small: Small) -> None:
    """Else it would advance twice; those of tensors in any order are, and parts that have their own."""
    own, sizes = small.tensors[0], np.full(3, 2 * LEAF, np.uintp)
    seen = np.zeros(6)
    for order, numbers, said in (
        ("neighbours", (0, 0, 1, 1, 2, 2), ""),
        ("tensors in another order", (2, 2, 0, 0, 1, 1), ""),
        ("parts of two in turn", (0, 1, 0, 1, 2, 2), PART),
        ("one behind all", (2, 0, 1, 1, 0, 2), PART),
        ("their own", (0, 1, 0, 1, 2, 2), ""),
    ):
        table, number = (small.cuda.Tensor * 6)(), np.array(numbers, np.uintp)
        part = np.array([LEAF * (k in numbers[:at]) for at, k in enumerate(numbers)], np.uintp)
        for at, k in enumerate(numbers):
            state = seen[at if order == "their own" else k :]
            table[at] = small.cuda.Tensor(LEAF, 1 << 44, 1 << 45, 1 << 46, state.ctypes.data)
        space = small.cuda.workspace([2 * LEAF] * 3, count=6).arrays[0]
        options = small.cuda.options(space, tensors=3, sizes=sizes.ctypes.data, number=number.ctypes.data)
        options.part = part.ctypes.data
        if said:
            assert small.planned(options, table, 6) == said, order
        else:
            given = ctypes.byref(Plan()), table, ctypes.c_size_t(6), ctypes.byref(options), None
            assert small.cuda.call("plan_f32", *given) == 0, order
    assert own["seen"].size == 1


def test_a_plan_beside_another_has_parts_of_the_same_tensors(small: Small) -> None:
    sizes, number, part = (np.array(values, np.uintp) for values in ([*small.sizes], [0, 1], [0, 0]))
    addresses = {"sizes": sizes.ctypes.data, "number": number.ctypes.data, "part": part.ctypes.data}
    space, plan = small.cuda.workspace(small.sizes).arrays[0], Plan()
    options = small.cuda.options(space, tensors=2, **addresses)
    given = small.cuda.tensors(small.tensors), ctypes.c_size_t(2)
    assert small.cuda.call("plan_f32", ctypes.byref(plan), *given, ctypes.byref(options), None) == 0
    beside = {"beside": ctypes.addressof(plan)}
    assert small.planned(small.options(**beside)) == NULL
    assert small.planned(small.options(**beside, **addresses, tensors=3)) == "a tensor's number is none of the tensors"
    sizes[0] += CHUNK
    assert small.planned(small.options(**beside, **addresses, tensors=2)) == PART
    sizes[0] -= CHUNK
    second, other = Plan(), small.cuda.workspace(small.sizes).arrays[0]
    options = small.cuda.options(other, **beside, **addresses, tensors=2)
    assert small.cuda.call("plan_f32", ctypes.byref(second), *given, ctypes.byref(options), None) == 0
    said = small.says(small.cuda.step(1, second, None))  # which the other plan begins
    assert said == "the phases to be done are not among those of a step"


def test_options_of_another_version(small: Small) -> None:
    options = small.options()
    options.size -= 8
    said, asked, plan = small.planned(options), ctypes.byref(options), ctypes.byref(small.plan)
    assert said.startswith("the options are of another version")
    assert small.stepped(options=options) == said
    assert small.says(small.cuda.rows(1, 1, 1, small.plan, options)) == said
    assert small.says(small.cuda.call("launch", plan, asked, None)) == said
    assert small.says(small.cuda.call("phases", plan, asked, 0, 1, None)) == said


def test_gradients(small: Small) -> None:
    """Addresses of gradients alone."""
    plan, own = ctypes.byref(small.plan), (ctypes.c_void_p * 2)(small.block.ctypes.data, small.block.ctypes.data + 2)
    assert small.says(small.cuda.call("gradients", plan, own, None)) == "an array is not aligned to its elements"
    assert small.says(small.cuda.call("gradients", plan, None, None)) == NULL
    assert small.says(small.cuda.call("gradients", None, own, None)) == NULL


def test_a_graph_captures_launch_alone(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the first one: kernels are loaded when a plan is made."""
    monkeypatch.setenv("OPTFORGE_EMULATION_CAPTURING", "1")
    said = "the host hands something over, so a CUDA graph can capture launch alone"
    assert small.stepped() == said
    assert small.says(small.cuda.rows(1, 1, 1, small.plan, None)) == said
    assert small.planned() == said
    own = (ctypes.c_void_p * 2)(*(tensor["g"].ctypes.data for tensor in small.tensors))
    assert small.says(small.cuda.call("gradients", ctypes.byref(small.plan), own, None)) == said
    assert small.cuda.call("launch", ctypes.byref(small.plan), None, None) == 0


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, np.nan, np.inf, -np.inf, 1e-320, 5e-324])
def test_grad_scale(value: float, small: Small) -> None:
    assert small.stepped(options=small.options(grad_scale=value)) == (
        "grad_scale is not a positive number with a finite inverse"
    )


def test_hyperparameters(small: Small) -> None:
    assert small.stepped(t=0) == "t counts the steps from 1"
    for name in ("lr", "scale", "floor"):
        assert small.stepped(**{name: np.nan}) == "a hyperparameter is NaN"
    assert small.stepped(lr=-1.0) == "the hyperparameters break: lr >= 0"
    assert small.stepped(floor=0.0).startswith("a scalar has no value")
    assert small.stepped(lr=np.inf, floor=-0.0).startswith("a scalar has no value")


def test_rows(small: Small) -> None:
    """One bad row of any group is found before the first is handed over."""
    most = layout.constant("OPTFORGE_CUDA_ROWS")
    for number in (0, most + 1, 2**64 - 1):
        status = small.cuda.rows(1, number, 1, small.plan, None)
        assert small.says(status) == "the device came to a step whose scalars it was not given"
    assert small.says(small.cuda.rows(2**64 - 3, 9, 1, small.plan, None)) == "t counts the steps from 1"
    late = np.array([2], np.uint64)
    status, plan = small.cuda.plan(small.tensors, small.options(late=late.ctypes.data))
    assert status == 0
    small.before = small.everything()
    assert small.says(small.cuda.step(2, plan, None)) == "t counts the steps from 1"
    assert small.cuda.step(3, plan, None) == 0


def test_the_last_of_many_groups_is_looked_at(cuda: Cuda) -> None:
    tensors = [{name: np.ones(1, np.float32) for name in ("p", "g", "m")} | {"seen": np.zeros(1)} for _ in range(40)]
    space = cuda.workspace([1] * 40, groups=40)
    group = np.arange(40, dtype=np.uintp)
    status, plan = cuda.plan(tensors, cuda.options(space.arrays[0], groups=40, group=group.ctypes.data))
    assert status == 0
    before = space.arrays[0].tobytes()
    rows = cuda.hyper(*({"lr": float(k)} for k in range(39)), {"lr": -1.0})
    said = cuda.call("step", rows, ctypes.c_uint64(1), ctypes.byref(plan), None, None)
    assert cuda.call("strerror", said, result=ctypes.c_char_p) == b"the hyperparameters break: lr >= 0"
    assert space.arrays[0].tobytes() == before and all((tensor["p"] == 1).all() for tensor in tensors)


@pytest.mark.parametrize("call", ["cudaLaunchKernel:719", "cudaMemcpyAsync:1", "cudaMemsetAsync:1"])
def test_calls_that_fail(call: str, small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller learns that one did, and asks CUDA which; a plan that failed is not made."""
    monkeypatch.setenv("OPTFORGE_EMULATION_REFUSE", call)
    cuda, plan = small.cuda, Plan(count=99)
    table, options = cuda.tensors(small.tensors), small.options()
    status = cuda.call("plan_f32", ctypes.byref(plan), table, ctypes.c_size_t(2), ctypes.byref(options), None)
    assert cuda.call("strerror", status, result=ctypes.c_char_p).startswith(b"a CUDA call failed")
    assert bytes(plan) == bytes(Plan(count=99))
    if call.startswith("cudaLaunch"):
        assert cuda.step(1, small.plan, options) == status
        assert (small.tensors[0]["p"] == 1).all()
    assert cuda.loaded.cudaGetLastError() == int(call.split(":")[1])


def test_all_that_is_right_is_done(small: Small) -> None:
    """The tensors that the tests above begin with are not refused for another reason."""
    assert small.cuda.step(1, small.plan, None) == 0
    assert all((tensor["p"] == 1 - 2 * np.float32(0.1)).all() and tensor["seen"] == 1 for tensor in small.tensors)
    assert small.space.intact()


def test_two_emitted_files_are_in_one_program(tmp_path: Path) -> None:
    files = {**guarded.generate("cuda", "f32", prefix="a"), **guarded.generate("cuda", "f32", prefix="b")}
    library = ctypes.CDLL(str(compile_emulated(files, tmp_path, ["-O0"])))
    library.a_cuda_strerror.restype = library.b_cuda_strerror.restype = ctypes.c_char_p
    assert library.a_cuda_strerror(0) == library.b_cuda_strerror(0) == b"done"
