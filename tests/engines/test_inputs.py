"""The arrays of steps: new gradients each time, and what can become of arrays between one step and the next.

Under AddressSanitizer, which finds whatever a step reads or writes of memory that was given back:

    CC="gcc -fsanitize=address" OPTFORGE_CACHE_DIR=$(mktemp -d) ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \\
        LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)" pytest tests/engines/test_inputs.py
"""

from __future__ import annotations

import array
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import optforge as of
from conftest import require_torch
from optforge.engines.c import inputs as nativeinputs
from optimizing import TARGETS, Exporter, FakeTensor, bits, everything

pytestmark = pytest.mark.skipif("c" not in TARGETS, reason="is about arrays of the host")
SHAPE = (33, 17)  # more bytes than NumPy keeps for arrays to come
WAYS = ["compiled", "python", "reference"]


@pytest.fixture(params=WAYS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The C target with arrays that the compiled code knows, and with none; the reference."""
    if request.param == "python":
        monkeypatch.setattr(nativeinputs, "known_of_torch", dict)
        only = {name: nativeinputs.known_of_numpy()[name] for name in ("none", "item", "clear")}
        monkeypatch.setattr(nativeinputs, "known_of_numpy", lambda: only)
    return "numpy" if request.param == "reference" else "c"


def values(seed: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(dtype)


def tensors(torch: Any, count: int = 2) -> list[Any]:
    return [torch.nn.Parameter(torch.from_numpy(values(k))) for k in range(count)]


def host(p: Any) -> Any:
    """The elements of a parameter."""
    return p.detach().numpy() if hasattr(p, "detach") else p


class Pair:
    """An optimizer over arrays of some library, and one over arrays of NumPy, with the same gradients."""

    def __init__(self, params: list[Any], target: str, **how: Any):
        self.opt = of.Optimizer(params, "adamw", target=target, lr=0.1, **how)
        self.own = [host(p).copy() for p in params]
        self.plain = of.Optimizer(self.own, "adamw", target="numpy", lr=0.1)

    def step(self, grads: list[Any], elements: list[Any]) -> None:
        """A step with gradients that have these elements."""
        self.opt.step(grads)
        self.plain.step([None if g is None else np.array(g, self.own[k].dtype) for k, g in enumerate(elements)])
        self.agree()

    def agree(self) -> None:
        for p, own in zip(self.opt.params, self.own, strict=True):
            assert host(p).tobytes() == own.tobytes()

    def refuse(self, grads: list[Any], error: type[Exception], message: str) -> None:
        """These are refused, twice, and nothing is changed."""
        before = everything(self.plain)
        for _ in range(2):
            with pytest.raises(error, match=message):
                self.opt.step(grads)
            self.agree()
        assert self.opt.t == self.plain.t
        assert everything(self.plain) == before


# ── new gradients ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_gradients_of_pytorch_are_new_each_time_and_not_kept(target: str) -> None:
    torch = require_torch()
    params = tensors(torch, 3)
    pair = Pair(params, target)
    for step in range(6):
        for p in params:
            p.grad = None
        loss = sum(
            ((p * torch.from_numpy(values(10 * step + k))) ** 2).sum() for k, p in enumerate(params) if k != step
        )
        loss.backward()
        grads = [p.grad for p in params]
        given = [None if g is None else weakref.ref(g) for g in grads]
        pair.step(grads, [None if g is None else g.numpy().copy() for g in grads])
        del grads, loss
        for p in params:
            p.grad = None
        gc.collect()
        assert all(g is None or g() is None for g in given)


@pytest.mark.parametrize("kind", ["ndarray", "subclass", "array.array", "memoryview", "DLPack", "tensor", "view"])
def test_gradients_of_any_library_are_new_each_time(target: str, kind: str) -> None:
    make: dict[str, Callable[[Any], Any]] = {
        "ndarray": lambda a: a,
        "subclass": lambda a: a.view(np.recarray),
        "array.array": lambda a: memoryview(array.array("f", a.tobytes())).cast("B").cast("f", a.shape),
        "memoryview": memoryview,
        "DLPack": Exporter,
        "tensor": FakeTensor,
        "view": lambda a: np.concatenate([a, a])[len(a) :],
    }
    pair = Pair([values(0), values(1)], target)
    for step in range(4):
        given = [values(10 + step), values(20 + step)]
        pair.step(
            [make[kind](given[0].copy()), make[kind](given[1].copy()) if step % 2 else None],
            [given[0], given[1] if step % 2 else None],
        )


def test_libraries_may_be_mixed_and_exchanged(target: str) -> None:
    torch = require_torch()
    pair = Pair([values(0), torch.nn.Parameter(torch.from_numpy(values(1))), values(2, np.float64)], target)
    for step in range(6):
        given = [values(step), values(10 + step), values(20 + step, np.float64)]
        makers = [torch.from_numpy, np.array, memoryview, Exporter]
        pair.step([makers[(step + k) % 4](g.copy()) for k, g in enumerate(given)], given)


# ── between steps ───────────────────────────────────────────────────────────────────────────────────────────────────


def resized(torch: Any, t: Any) -> None:
    t.resize_(7, 3)


def halved(torch: Any, t: Any) -> None:
    t.data = t.data[:16]


def turned(torch: Any, t: Any) -> None:
    t.t_()


def strided(torch: Any, t: Any) -> None:
    t.data = torch.zeros(SHAPE[1], SHAPE[0]).t()


def doubled(torch: Any, t: Any) -> None:
    t.data = t.data.double()


def as_integers(torch: Any, t: Any) -> None:
    t.data = t.data.view(torch.int32)


def freed(torch: Any, t: Any) -> None:
    t.untyped_storage().resize_(0)


CHANGES: dict[str, tuple[Callable[[Any, Any], None], type[Exception], str]] = {
    "resized": (resized, ValueError, r"has the shape \(7, 3\)|float32 of shape \(7, 3\)"),
    "halved": (halved, ValueError, r"shape \(16, 17\)"),
    "turned": (turned, ValueError, "not C-contiguous"),
    "strided": (strided, ValueError, "not C-contiguous"),
    "doubled": (doubled, (TypeError, ValueError), "float64"),  # type: ignore[dict-item]
    "integers": (as_integers, TypeError, "is int32; it must be"),
    "freed": (freed, ValueError, "has no memory"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("which", ["grads", "params"])
def test_a_tensor_that_has_become_another_is_refused(target: str, which: str, name: str) -> None:
    torch = require_torch()
    change, error, message = CHANGES[name]
    params, grads = ([torch.tensor(values(seed + k)) for k in range(2)] for seed in (0, 10))
    opt = of.Optimizer(params, "adam", target=target)
    for _ in range(3):
        opt.step(grads)
    try:
        with torch.no_grad():
            change(torch, grads[1] if which == "grads" else params[1])
    except RuntimeError as refusal:  # PyTorch frees nothing that there is an array of NumPy of
        if name == "freed" and "not resizable" in str(refusal):
            return
        raise
    before = bits(opt.state_dict()), params[0].numpy().tobytes()
    for _ in range(2):
        with pytest.raises(error, match=rf"^{which}\[1\].*({message})"):
            opt.step(grads)
        assert (bits(opt.state_dict()), params[0].numpy().tobytes()) == before


def test_parameters_that_move_are_followed_and_their_old_memory_is_left(target: str) -> None:
    torch = require_torch()
    params = tensors(torch)
    pair = Pair(params, target)
    for step in range(6):
        given = [values(10 + step), values(20 + step)]
        old = params[step % 2].data
        params[step % 2].data = old.clone()
        left = old.numpy().copy()
        pair.step([torch.from_numpy(g.copy()) for g in given], given)
        assert old.numpy().tobytes() == left.tobytes()
        del old
    # What is now the parameter's memory is no gradient's.
    pair.refuse([params[0].data, torch.from_numpy(values(1))], ValueError, r"^grads\[0\] and params\[0\] overlap")


def test_a_gradient_moves_at_the_same_object(target: str) -> None:
    torch = require_torch()
    pair = Pair(tensors(torch), target)
    g, h = torch.from_numpy(values(5)), torch.from_numpy(values(6))
    for step in range(5):
        g.data = torch.from_numpy(values(30 + step))
        pair.step([g, h], [values(30 + step), values(6)])
    h[...] = 1.0
    pair.step([g, h], [values(34), np.ones(SHAPE)])


def test_a_gradient_that_its_caller_frees_is_not_read_again(target: str) -> None:
    pair = Pair([values(0), values(1)], target)
    for step in range(5):
        given = [values(10 + step), values(20 + step)]
        grads = [np.array(g) for g in given]
        gone = [weakref.ref(g) for g in grads]
        pair.step(grads, given)
        grads[0] = None
        assert gone[0]() is None
        pair.step(grads, [None, given[1]])
        del grads
        assert gone[1]() is None


def test_a_gradient_may_be_that_of_two_parameters_unless_it_is_zeroed(target: str) -> None:
    torch = require_torch()
    for make in (np.array, torch.tensor):
        pair = Pair([values(0), values(1)], target)
        for step in range(3):
            g = make(values(10 + step))
            pair.step([g, g], [values(10 + step)] * 2)
        zeroing = of.Optimizer([values(0), values(1)], "adam", target=target, zero_grads=True)
        apart = [make(values(2)), make(values(3))]
        zeroing.step(apart)
        assert not apart[0].any()
        whole = make(np.zeros((2, *SHAPE), np.float32))
        for grads in ([g, g], [whole[0], whole.reshape(-1)[8 : 8 + whole[0].reshape(-1).shape[0]].reshape(SHAPE)]):
            before = everything(zeroing)
            with pytest.raises(ValueError, match=r"^grads\[0\] and grads\[1\] overlap in memory"):
                zeroing.step(grads)
            assert everything(zeroing) == before
        zeroing.step([whole[0], whole[1]])
        assert zeroing.t == 2


def test_a_gradient_in_memory_that_is_written_is_refused(target: str) -> None:
    torch = require_torch()
    whole = np.zeros(3 * 600, np.float32)
    pair = Pair([whole[600:1200], np.ones(600, np.float32)], target)
    good = np.ones(600, np.float32)
    pair.step([good, good], [good, good])
    state = pair.opt.state["m"][1]
    for make in (np.asarray, torch.from_numpy):
        for g in (whole[600:1200], whole[1:601], whole[1199:1799]):
            pair.refuse([good, make(g)], ValueError, r"^grads\[1\] and params\[0\] overlap in memory")
        pair.refuse([make(state), good], ValueError, r"^grads\[0\] and state\['m'\]\[1\] overlap in memory")
        pair.step([make(whole[:600].copy()), make(good.copy())], [whole[:600], good])
        pair.step([make(whole[:600]), make(whole[1200:])], [whole[:600], whole[1200:]])


def test_a_longer_gradient_where_a_shorter_one_was_is_looked_at(target: str) -> None:
    torch = require_torch()
    whole = torch.zeros(300)
    pair = Pair([whole[150:250]], target)
    for g in (whole[100:150].view(torch.bfloat16), whole[:100], whole[100:150].view(torch.bfloat16)):
        pair.step([g], [g.float().numpy()])
    pair.refuse([whole[100:200]], ValueError, r"^grads\[0\] and params\[0\] overlap in memory")


def test_what_pytorch_alone_has(target: str) -> None:
    torch = require_torch()
    pair = Pair([np.zeros(1, np.float32), values(1)], target)
    good = values(2)
    # Views whose sign is the other one: autograd gives such a gradient of one element.
    x, y = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    (torch.conj(torch.complex(x, y)) * torch.tensor([2 - 3j])).sum().abs().backward()
    assert y.grad.is_neg()
    pair.step([x.grad, good], [x.grad.detach().numpy(), good])
    pair.refuse([y.grad, good], TypeError, r"^grads\[0\] does not share its memory with NumPy.*negative bit")
    negated = torch.complex(torch.ones(2 * 33 * 17), torch.ones(2 * 33 * 17)).conj().imag.as_strided(SHAPE, (17, 1))
    assert negated.is_neg() and negated.is_contiguous()
    pair.refuse([None, negated], TypeError, r"^grads\[1\] does not share its memory with NumPy.*negative bit")
    pair.refuse([None, torch.eye(*SHAPE).to_sparse()], TypeError, r"^grads\[1\]")
    pair.refuse([None, torch.zeros(SHAPE, device="meta")], TypeError, r"^grads\[1\]")
    pair.refuse([None, torch.zeros(SHAPE, dtype=torch.float64)], TypeError, r"^grads\[1\] is float64, its parameter")
    pair.refuse([None, torch.zeros(SHAPE, dtype=torch.int32)], TypeError, r"^grads\[1\] is int32")
    pair.step([None, torch.from_numpy(good).requires_grad_()], [None, good])
    pair.step([torch.zeros(1), torch.nn.Parameter(torch.from_numpy(good))], [np.zeros(1), good])

    class Other(torch.Tensor):  # type: ignore[misc, name-defined]
        pass

    pair.step([None, torch.from_numpy(good).as_subclass(Other)], [None, good])


def test_what_numpy_alone_has(target: str) -> None:
    pair = Pair([values(0), np.zeros((), np.float32), np.zeros((0, 3))], target)
    good, none = values(2), np.zeros((0, 3))
    pair.step([good, np.float32(0.5), none], [good, 0.5, none])
    pair.step([good, np.array(0.25, np.float32), None], [good, 0.25, None])
    for wrong, error, message in (
        (good.astype(">f4"), TypeError, ">f4|float32"),
        (good.astype(np.int16), TypeError, "int16"),
        (np.asfortranarray(good), ValueError, "not C-contiguous"),
        (good[None], ValueError, r"the shape \(1, 33, 17\)"),
        (
            np.frombuffer(bytearray(4 * 33 * 17 + 1), np.uint8)[1:].view(np.float32).reshape(SHAPE),
            ValueError,
            "aligned",
        ),
        (np.broadcast_to(np.float32(1), SHAPE), ValueError, "not C-contiguous"),
    ):
        pair.refuse([wrong, None, none], error, rf"^grads\[0\].*({message})")
    fixed = values(3)
    fixed.setflags(write=False)
    pair.step([fixed, None, None], [fixed, None, None])
    zeroing = of.Optimizer([values(0)], "adam", target=target, zero_grads=True)
    with pytest.raises(ValueError, match=r"^grads\[0\] is read-only"):
        zeroing.step([fixed])


def test_what_was_found_before_an_error_is_not_relied_on(target: str) -> None:
    """The first gradient is a new one in a step that the second makes an error."""
    pair = Pair([values(0), values(1)], target)
    pair.step([values(2), values(3)], [values(2), values(3)])
    other = values(4)
    pair.refuse([other, values(5, np.float64)], TypeError, r"^grads\[1\] is float64")
    pair.step([other, values(3)], [values(4), values(3)])
    pair.refuse([None, values(5, np.float64)], TypeError, r"^grads\[1\] is float64")
    pair.step([None, values(3)], [None, values(3)])


def test_pytorch_may_be_loaded_later(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = require_torch()
    modules = dict(nativeinputs.sys.modules)
    del modules["torch"]
    with monkeypatch.context() as patch:
        patch.setattr(nativeinputs, "sys", type("sys", (), {"modules": modules}))
        pair = Pair([values(0)], "c")
        pair.step([torch.from_numpy(values(1))], [values(1)])
        assert not pair.opt._inputs.knows_torch
    for step in range(2):
        pair.step([torch.from_numpy(values(step))], [values(step)])
    assert pair.opt._inputs.knows_torch
    assert pair.opt._inputs.look.gradients.tolist() == [nativeinputs.FOUND]


def test_a_gradient_of_other_16_bits_is_not_taken_for_the_parameters() -> None:
    """Half precision and bfloat16 have the same size; what a gradient is says its dtype."""
    torch = require_torch()
    for own, other in ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)):
        params, judge = [torch.ones(40, dtype=own)], [torch.ones(40, dtype=own)]
        gradient = torch.full((40,), 0.25, dtype=other)
        of.Optimizer(params, "sgd", lr=0.5, target="c").step([gradient])
        of.Optimizer(judge, "sgd", lr=0.5, target="numpy").step([gradient])
        assert params[0][0] == judge[0][0] == 0.875


def test_where_pytorch_keeps_what_belongs_to_a_tensor_is_found() -> None:
    """What is found is fetched ahead, or a sign; a step is right without it."""
    torch = require_torch()
    found = nativeinputs.offsets_in_torch()
    assert set(found) == {*nativeinputs.OFFSETS, "negative"}
    assert all(found[name] % 8 == 0 for name in nativeinputs.OFFSETS)
    with torch.inference_mode():  # where tensors have no versions
        assert nativeinputs.offsets_in_torch() == found


def without_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where PyTorch does not show where it keeps what belongs to a tensor."""
    known = {name: own for name, own in nativeinputs.known_of_torch().items() if name not in nativeinputs.OFFSETS}
    monkeypatch.setattr(nativeinputs, "known_of_torch", lambda: known)


@pytest.mark.parametrize("offsets", [None, {}], ids=["seen", "asked"])
def test_signs_are_those_that_views_have(offsets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contiguous views of one element and of many, of imaginary parts of conjugates, beside others without a change."""
    torch = require_torch()
    from optforge.torch import Optimizer

    if offsets is not None:
        without_offsets(monkeypatch)
    params = [torch.nn.Parameter(torch.ones(n)) for n in (1, 3, 3)]
    opt = Optimizer(params, "SGD", lr=1.0)
    for negated in ([], [0, 1], [1, 2], []):
        for k, p in enumerate(params):
            p.grad = torch.ones(p.shape)
            if k in negated:
                p.grad = torch.complex(torch.ones(6), torch.ones(6)).conj().imag.as_strided(p.shape, (1,))
        opt.step()
    assert [p.tolist() for p in params] == [[-1], [1] * 3, [-1] * 3]


def test_a_parameter_of_the_other_sign_is_refused() -> None:
    torch = require_torch()
    from optforge.torch import Optimizer

    p = torch.nn.Parameter(torch.ones(3))
    opt = Optimizer([p], "SGD", lr=1.0)
    p.grad = torch.ones(3)
    opt.step()
    p.data = torch._neg_view(p.data)
    with pytest.raises(ValueError, match=r"other sign than in memory: .*resolve_neg"):
        opt.step()
    with pytest.raises(ValueError, match=r"other sign than in memory: .*resolve_neg"):
        Optimizer([p], "SGD", lr=1.0)
    p.data = p.data.resolve_neg()
    opt.step()
    assert p.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("offsets", [None, {}], ids=["fetched", "not fetched"])
@pytest.mark.parametrize("count", [1, 17, 40, 1100])
def test_few_and_many_tensors(count: int, offsets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = require_torch()
    if offsets is not None:
        without_offsets(monkeypatch)
    params = [torch.zeros(2 + k % 3) for k in range(count)]
    opt = of.Optimizer(params, "sgd", lr=0.5, target="c")
    for _ in range(2):
        before = [p._version for p in params]
        opt.step([torch.full_like(p, k) for k, p in enumerate(params)])
        assert [p._version for p in params] == [version + 1 for version in before]
    assert all((p == -k).all() for k, p in enumerate(params))
