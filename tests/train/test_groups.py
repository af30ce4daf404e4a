"""Parameter groups: each has the bits of an optimizer with its hyperparameters, and all take one step together."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from amount import LEVEL
from conftest import require
from native import Library, Work, code, compile_shared
from optforge import Optimizer
from optimizing import TARGETS, bits, brittle, everything, large, nadam, small

RULES: dict[str, of.Rule] = {
    "nadam": nadam,
    "adam": of.rules.adam,
    "lamb": of.rules.lamb,
    "novograd": of.rules.novograd,
    "clipped": of.clip_by_global_norm >> of.rules.adamw,
}
SETTINGS: dict[str, list[dict[str, float]]] = {
    "nadam": [{"lr": 0.03, "floor": 3e-4}, {"beta": 0.5}, {"floor": 0.02, "psi": 0.3}],
    "adam": [{"lr": 0.3}, {"beta1": 0.5, "eps": 1e-3}, {}],
    "lamb": [{"weight_decay": 0.3}, {"lr": 0.1}, {"beta2": 0.5}],
    "novograd": [{"lr": 0.2}, {}, {"weight_decay": 0.25}],
    "clipped": [{"max_norm": 0.5}, {"max_norm": 3.0, "lr": 0.1}, {"weight_decay": 0.4}],
}
COMMON = {"lr": 0.05}
CUTS = (2, 3)  # which of six tensors the groups have: two, one, three


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def cut(arrays: list[Any], cuts: tuple[int, ...] = CUTS) -> list[Any]:
    """A list, a tuple and a dict."""
    first, second = cuts
    return [arrays[:first], tuple(arrays[first:second]), {f"w{k}": a for k, a in enumerate(arrays[second:])}]


def groups_of(arrays: list[Any], settings: list[dict[str, Any]], cuts: tuple[int, ...] = CUTS) -> list[Any]:
    return [{"params": part, **own} for part, own in zip(cut(arrays, cuts), settings, strict=True)]


def flat(tree: list[Any]) -> list[Any]:
    return [a for part in tree for a in (part.values() if isinstance(part, dict) else part)]


# ── bits ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", RULES)
def test_a_group_has_the_bits_of_an_optimizer_with_its_hyperparameters(name: str, target: str) -> None:
    """Norms over all tensors depend on the gradients alone here, so that an optimizer of all tensors can be compared."""
    rule, settings = RULES[name], SETTINGS[name]
    opt = Optimizer(groups_of(small(1), settings), rule, target=target, **COMMON)
    alone = [Optimizer(small(1), rule, target=target, **{**COMMON, **own}) for own in settings]
    missing: list[set[int]] = [set(), {0, 1}, {2}, {0, 1, 2}, {3, 4, 5, 2}, set()]
    for seed, without in enumerate(missing, 2):
        grads: list[Any] = [None if k in without else g for k, g in enumerate(small(seed))]
        told = opt.step(cut(grads), stats=True)
        each = [one.step(grads, stats=True) for one in alone]
        assert told is not None
        for k, one in enumerate(each):
            assert one is not None
            assert bits(told.grad_norm) == bits(one.grad_norm)
            begin, end = (0, *CUTS, 6)[k : k + 2]
            for field in ("grad_norm", "update_norm", "param_norm"):
                assert bits(told.per_tensor[field][begin:end]) == bits(one.per_tensor[field][begin:end])
            assert bits(flat(opt.params)[begin:end]) == bits(alone[k].params[begin:end])
            for state in opt.state:
                assert bits(flat(opt.state[state])[begin:end]) == bits(alone[k].state[state][begin:end])
    assert opt.t == len(missing)
    assert len({tuple(sorted(one.state_dict()["hyperparameters"].items())) for one in alone}) == 3


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", ["nadam", "clipped"])
def test_threads_share_groups(name: str, threads: int) -> None:
    """Plain steps too, in which nothing is added up that the rule does not need."""
    made = [
        Optimizer(groups_of(large(1), SETTINGS[name], (1, 3)), RULES[name], target=target, threads=threads)
        for target in (TARGETS[0], "numpy")
    ]
    for seed, how in ((2, {}), (3, {"stats": True}), (4, {}), (4, {"grad_scale": 3.7})):
        for opt in made:
            opt.step(cut(large(seed), (1, 3)), **how)
        assert everything(made[0]) == everything(made[1])


def test_one_group_is_like_no_groups(target: str) -> None:
    opt = Optimizer([{"params": small(1), "lr": 0.3}], nadam, target=target)
    plain = Optimizer(small(1), nadam, target=target, lr=0.3)
    for seed in (2, 3):
        opt.step([small(seed)])
        plain.step(small(seed))
    assert bits(opt.params[0]) == bits(plain.params)
    assert opt.groups[0]["lr"] == opt.lr == 0.3


def test_more_groups_than_tensors_with_gradients(target: str) -> None:
    """Groups without a gradient take no part, not even with a scalar that has no value."""
    params = [np.ones(3) for _ in range(5)]
    opt = Optimizer([{"params": [p], "lr": 0.1 * (k + 1)} for k, p in enumerate(params)], brittle, target=target)
    opt.groups[2]["divisor"] = opt.groups[3]["divisor"] = 0.0
    opt.step([[np.ones(3)], [None], [None], [None], [np.ones(3)]])
    assert [bool(np.all(p == 1)) for p in params] == [False, True, True, True, False]
    twin = Optimizer([np.ones(3)], brittle, target=target, lr=0.5)
    twin.step([np.ones(3)])
    assert bits(params[4]) == bits(twin.params[0])


def test_skipped_steps_and_zeroed_gradients(target: str) -> None:
    opt = Optimizer(groups_of(small(1), SETTINGS["nadam"]), nadam, target=target, skip_nonfinite=True, zero_grads=True)
    grads = small(2)
    grads[4][7] = np.inf
    before = everything(opt)
    told = opt.step(cut(grads), stats=True)
    assert told is not None and told.skipped
    assert everything(opt) == before
    assert not any(np.any(g) for g in grads)


# ── structure ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_everything_has_the_structure_of_the_groups() -> None:
    arrays = small(1)
    opt = Optimizer(iter(groups_of(arrays, SETTINGS["nadam"])), nadam, target="numpy")
    assert [type(part) for part in opt.params] == [list, tuple, dict]
    assert all(own is a for own, a in zip(flat(opt.params), arrays, strict=True))
    opt.step(tuple(cut(small(2))))
    for tree in (opt.state["m"], opt.state["mu"], opt.state_dict()["started"]):
        assert [type(part) for part in tree] == [list, tuple, dict]
        assert list(tree[2]) == ["w0", "w1", "w2"]
    told = opt.step(cut(small(3)), stats=True)
    assert told is not None and told.per_tensor.grad_norm.shape == (6,)


WRONG_GRADIENTS: list[tuple[Callable[[list[Any]], Any], type[Exception], str]] = [
    (lambda g: small(2), ValueError, "^grads has 6 entries, params has 3 groups$"),
    (lambda g: g[:2], ValueError, "^grads has 2 entries, params has 3 groups$"),
    (lambda g: {"a": 1}, TypeError, "^params has groups, so grads must be a list with an entry for each, not a dict$"),
    (lambda g: None, TypeError, "^params has groups, so grads must be a list with an entry for each, not a NoneType$"),
    (lambda g: [g[0], None, g[2]], TypeError, r"^grads\[1\] must be a list or tuple of arrays like params\[1\], not a"),
    (lambda g: [g[0][:1], *g[1:]], ValueError, r"^grads\[0\] has 1 arrays, params\[0\] has 2$"),
    (lambda g: [*g[:2], []], TypeError, r"^params\[2\] is a dict, so grads\[2\] must be one with the same keys, not"),
    (lambda g: [*g[:2], {**g[2], "x": 1}], ValueError, r"^grads\[2\] has the key 'x', which params\[2\] has not$"),
    (
        lambda g: [*g[:2], {"w0": g[2]["w0"]}],
        ValueError,
        r"^grads\[2\] lacks the key 'w1'; None leaves a tensor alone$",
    ),
    (lambda g: [[g[0][0].T, g[0][1]], *g[1:]], ValueError, r"^grads\[0\]\[0\] is not C-contiguous"),
    (lambda g: [*g[:2], {**g[2], "w1": np.ones(3)}], ValueError, r"^grads\[2\]\['w1'\] has the shape"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG_GRADIENTS)
def test_gradients_of_another_structure(
    change: Callable[[list[Any]], Any], error: type[Exception], message: str
) -> None:
    opt = Optimizer(groups_of(small(1), SETTINGS["nadam"]), nadam, target="numpy")
    before = everything(opt)
    with pytest.raises(error, match=message):
        opt.step(change(cut(small(2))))
    assert everything(opt) == before


W = np.ones(3)
REFUSED: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([{"params": [W]}, W], {}, TypeError, r"^params has groups, so params\[1\] must be one as well, not an ndarray$"),
    ([W, {"params": [W]}], {}, TypeError, r"^params has groups, so params\[0\] must be one as well, not an ndarray$"),
    ([{"params": [W]}, {"lr": 0.1}], {}, ValueError, r"^groups\[1\] has no 'params': a group is "),
    ([{"params": [W]}, {"params": []}], {}, ValueError, r"^groups\[1\]\['params'\] is empty: there is nothing to opt"),
    (
        [{"params": W}],
        {},
        TypeError,
        r"^groups\[0\]\['params'\] must be a list, tuple or dict of arrays, not an ndarray",
    ),
    ([{"params": [3]}], {}, TypeError, r"^params\[0\]\[0\] is an int; it must be a NumPy array"),
    ([{"params": {"w": W}}, {"params": [W]}], {}, ValueError, r"^params\[0\]\['w'\] and params\[1\]\[0\] overlap in"),
    ([{"params": [W]}, {"params": [W[1:]]}], {}, ValueError, r"^params\[0\]\[0\] and params\[1\]\[0\] overlap in mem"),
    ([{"params": [W], "lrr": 1}], {}, TypeError, r"^groups\[0\]: rule 'nadam' has no hyperparameter 'lrr'; did you m"),
    ([{"params": [W], "t": 1}], {}, TypeError, r"^groups\[0\]: rule 'nadam' has no hyperparameter 't'"),
    ([{"params": [W], 3: 1}], {}, TypeError, r"^groups\[0\] has the key 3, which is no name$"),
    ([{"params": [W], "lr": "x"}], {}, TypeError, r"^groups\[0\]: hyperparameter 'lr' is a number, not 'x'$"),
    ([{"params": [W], "lr": np.nan}], {}, ValueError, r"^groups\[0\]: hyperparameter 'lr' is NaN$"),
    ([{"params": [W]}], {"lr": np.nan}, ValueError, r"^hyperparameter 'lr' is NaN$"),
    (
        [{"params": [W]}, {"params": [W.copy()], "beta": 1.0}],
        {},
        ValueError,
        r"^groups\[1\]: rule 'nadam' needs 0 <= beta < 1; given are beta=1\.0$",
    ),
    (
        [{"params": [W], "nesterov": True}, {"params": [W.copy()], "nesterov": False}],
        {},
        ValueError,
        r"^groups\[0\]: option 'nesterov' is fixed in the kernel, which all groups share: give it to the Optimizer itself",
    ),
    (
        [{"params": [W]}, {"params": [W.copy()], "nesterov": True}],
        {},
        ValueError,
        r"^groups\[1\]: option 'nesterov' is",
    ),
]


@pytest.mark.parametrize(("params", "settings", "error", "message"), REFUSED)
def test_what_is_no_group_is_refused(
    params: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as refusal:
        Optimizer(params, nadam, target="numpy", **settings)
    assert "\n" not in str(refusal.value)
    assert W.tolist() == [1, 1, 1]


# ── hyperparameters ─────────────────────────────────────────────────────────────────────────────────────────────────


def pair(target: str = "numpy", rule: of.Rule = nadam, **settings: Any) -> Optimizer:
    """Two groups of a tensor each."""
    first, second = np.ones(3), np.ones(3)
    return Optimizer([{"params": [first], "lr": 0.5}, {"params": [second]}], rule, target=target, **settings)


def test_hyperparameters_of_groups_are_read_and_set(target: str) -> None:
    opt = pair(target, lr=0.25)
    assert [group["lr"] for group in opt.groups] == [0.5, 0.25]
    assert list(opt.groups[1]) == ["params", "lr", "beta", "psi", "floor"]
    assert dict(opt.groups[1]) == {"params": opt.params[1], "lr": 0.25, "beta": 0.9, "psi": 0.004, "floor": 1e-3}
    assert opt.groups[0]["params"] is opt.params[0]
    opt.groups[1]["lr"] = np.float32(0.125)
    assert type(opt.groups[1]["lr"]) is float
    opt.groups[1].update(beta=0.5)
    alone = [Optimizer([np.ones(3)], nadam, target=target, **own) for own in ({"lr": 0.5}, {"lr": 0.125, "beta": 0.5})]
    for _ in range(2):
        opt.step([[np.ones(3)], [np.ones(3)]])
        for one in alone:
            one.step([np.ones(3)])
    assert bits([part[0] for part in opt.params]) == bits([one.params[0] for one in alone])


def test_the_optimizer_speaks_for_all_groups(target: str) -> None:
    opt = pair(target, lr=0.25)
    assert opt.beta == 0.9
    with pytest.raises(
        ValueError, match=r"^'lr' differs between the groups \(0\.5, 0\.25\); read opt\.groups\[k\]\['lr'\]"
    ):
        opt.lr  # noqa: B018
    opt.lr = 2
    assert opt.lr == 2.0
    assert [group["lr"] for group in opt.groups] == [2.0, 2.0]
    opt.groups[0]["beta"] = 0.75
    shown = "nadam of 2 tensor(s) in 2 groups, t=0, lr=2.0, beta=[0.75, 0.9], psi=0.004, floor=0.001, nesterov=True"
    assert repr(opt) == f"<Optimizer {shown}, average='slow'>"
    assert repr(opt.groups[0]) == "{'params': …, 'lr': 2.0, 'beta': 0.75, 'psi': 0.004, 'floor': 0.001}"


def test_state_that_starts_as_a_hyperparameter_starts_as_the_group_has_it() -> None:
    opt = pair(lr=0.25)
    assert opt.state["rate"] == [[0.5], [0.25]]
    opt.groups[0]["lr"] = 2.0
    opt.step([[np.ones(3)], [np.ones(3)]])
    assert opt.state["rate"] == [[2.0], [0.25]]


def test_one_implicit_group() -> None:
    opt = Optimizer([np.ones(3)], nadam, target="numpy", lr=0.5)
    (group,) = opt.groups
    assert group["params"] is opt.params
    group["lr"] = 0.25
    assert opt.lr == group["lr"] == 0.25


SETTINGS_REFUSED: list[tuple[str, Any, type[Exception], str]] = [
    ("lr", np.nan, ValueError, r"^groups\[1\]: hyperparameter 'lr' is NaN$"),
    ("lr", None, TypeError, r"^groups\[1\]: hyperparameter 'lr' is a number, not None$"),
    ("beta", 1.5, ValueError, r"^groups\[1\]: rule 'nadam' needs 0 <= beta < 1; given are beta=1\.5$"),
    (
        "betta",
        0.5,
        ValueError,
        r"^'betta' is not a hyperparameter; did you mean 'beta'\? \(there are lr, beta, psi, flo",
    ),
    ("nesterov", False, ValueError, "^'nesterov' of a group was fixed when the Optimizer was made; make another one$"),
    ("params", [W], ValueError, "^'params' of a group was fixed when the Optimizer was made; make another one$"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), SETTINGS_REFUSED)
def test_what_a_group_does_not_take(name: str, value: Any, error: type[Exception], message: str) -> None:
    opt = pair()
    before = everything(opt)
    with pytest.raises(error, match=message):
        opt.groups[1][name] = value
    assert everything(opt) == before
    with pytest.raises(TypeError, match="a group keeps all its hyperparameters"):
        del opt.groups[1][name]
    with pytest.raises(KeyError):
        opt.groups[1]["other"]


def test_a_value_that_one_group_refuses_is_set_in_none(target: str) -> None:
    opt = pair(target, rule=bounded)
    opt.groups[1]["most"] = 0.125
    before = everything(opt)
    with pytest.raises(
        ValueError, match=r"^groups\[1\]: rule 'bounded' needs lr <= most; given are lr=0\.25, most=0\.125"
    ):
        opt.lr = 0.25
    assert everything(opt) == before


@of.rule
def bounded(p, g, *, lr=0.1, most=1.0):
    """A bound on a hyperparameter that is another one."""
    assert lr <= most
    p = p - lr * g
    return p


def test_errors_name_the_group_and_come_before_the_first_write(target: str) -> None:
    opt = pair(target, rule=brittle)
    opt.groups[1]["divisor"] = 0.0
    before = everything(opt)
    with pytest.raises(of.OptforgeError, match=r"^groups\[1\]: the scalar 'one' has no value at t=1: division by zero"):
        opt.step([[np.ones(3)], [np.ones(3)]])
    assert everything(opt) == before
    opt.groups[1]["divisor"] = 1.0
    for _ in range(3):
        opt.step([[None], [np.ones(3)]])
    before = everything(opt)
    with pytest.raises(
        of.OptforgeError, match=r"^params\[1\]\[0\]: the scalar 'rate' has no value at t=4: division by"
    ):
        opt.step([[np.ones(3)], [np.ones(3)]])
    assert everything(opt) == before


# ── state dicts ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_state_dict_resumes_groups() -> None:
    whole = Optimizer(groups_of(small(1), SETTINGS["nadam"]), nadam, target="c")
    whole.step(cut([*small(2)[:5], None]))
    saved, params = whole.state_dict(), [a.copy() for a in flat(whole.params)]
    assert [group["floor"] for group in saved["groups"]] == [3e-4, 1e-3, 0.02]
    assert "hyperparameters" not in saved
    resumed = Optimizer(groups_of(params, [{}, {}, {}]), nadam, target="numpy")
    resumed.load_state_dict(saved)
    for opt in (whole, resumed):
        opt.step(cut(small(3)))
        opt.step(cut(small(4)))
    assert everything(whole) == everything(resumed)


def test_state_dicts_of_other_groups_are_refused() -> None:
    three = Optimizer(groups_of(small(1), SETTINGS["nadam"]), nadam, target="numpy")
    two, none = pair(), Optimizer([np.ones(3)], nadam, target="numpy")
    before = everything(three)
    with pytest.raises(ValueError, match=r"^it is of parameters without groups, here are some$"):
        three.load_state_dict(none.state_dict())
    with pytest.raises(ValueError, match=r"^it is of parameters in groups, here are none$"):
        none.load_state_dict(three.state_dict())
    with pytest.raises(
        ValueError, match=r"^it has 2 groups, here are 3 groups; its 'started' does not have the struct"
    ):
        three.load_state_dict(two.state_dict())
    saved = three.state_dict()
    saved["groups"][1]["beta"], saved["groups"][2] = 3.0, {"lr": 0.1}
    with pytest.raises(ValueError, match=r"^groups\[2\]: its hyperparameters are \['lr'\], here "):
        three.load_state_dict(saved)
    saved["groups"][2] = saved["groups"][0]
    with pytest.raises(ValueError, match=r"^groups\[1\]: rule 'nadam' needs 0 <= beta < 1; given are beta=3\.0$"):
        three.load_state_dict(saved)
    assert everything(three) == before


# ── the emitted C ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def adam(tmp_path_factory: pytest.TempPathFactory) -> Library:
    flags = (LEVEL, "-fopenmp", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
    made = compile_shared(of.rules.adam.generate(), tmp_path_factory.mktemp("groups"), require("gcc"), flags)
    return Library(made, "adam", list(of.rules.adam.hyperparameters), ["m", "v"])


class Step:
    """Three tensors of two groups, and what a step over them needs."""

    def __init__(self, adam: Library):
        self.adam = adam
        rng = np.random.default_rng(3)
        sizes = (33, 70_000, 5)
        self.arrays = [
            {name: rng.standard_normal(n).astype("f4") * (name in "pg") for name in ("p", "g", "m", "v")} for n in sizes
        ]
        self.hyper = (adam.Hyper * 2)(adam.hyper(lr=0.1), adam.hyper(lr=0.5, beta1=0.25))
        self.group = (ctypes.c_size_t * 3)(1, 0, 1)
        self.lists = adam.lists("f32", self.hyper, 1, adam.tensors(self.arrays), 3, groups=2)
        self.lists[0].group = ctypes.addressof(self.group)
        self.options = adam.options(skip_nonfinite=1)  # so that there is a workspace
        arguments = [self.lists, ctypes.c_size_t(1), ctypes.byref(self.options)]
        size = adam.runtime("workspace_size", ctypes.c_size_t)(*arguments)
        self.workspace = np.zeros(size // 8)
        self.options.workspace, self.options.workspace_size = self.workspace.ctypes.data, size

    def __call__(self, t: int = 1) -> int:
        self.lists[0].t = t
        arguments = [self.lists, ctypes.c_size_t(1), ctypes.byref(self.options)]
        checked = int(self.adam.runtime("check")(*arguments))
        status = int(self.adam.runtime("step_lists")(*arguments))
        assert checked == status
        return status


def test_the_emitted_function_steps_all_groups(adam: Library) -> None:
    step = Step(adam)
    params = [own["p"].copy() for own in step.arrays]
    groups = [{"params": [params[1]], "lr": 0.1}, {"params": [params[0], params[2]], "lr": 0.5, "beta1": 0.25}]
    opt = Optimizer(groups, "adam", target="numpy")
    for t in (1, 2):
        assert step(t) == 0
        opt.step([[step.arrays[1]["g"]], [step.arrays[0]["g"], step.arrays[2]["g"]]])
        assert bits([own["p"] for own in step.arrays]) == bits(params)


def too_small(step: Step) -> None:
    step.options.workspace_size = 8 * 3


def out_of_range(step: Step) -> None:
    step.group[2] = 2


def without_workspace(step: Step) -> None:
    step.options.workspace = None


def not_a_number(step: Step) -> None:
    step.hyper[1].eps = np.nan


def against_an_assert(step: Step) -> None:
    step.hyper[1].beta1 = 1.0


def no_groups(step: Step) -> None:
    step.lists[0].groups = 0


def too_many(step: Step) -> None:
    step.lists[0].groups = 2**60


def far_too_many(step: Step) -> None:
    step.lists[0].groups = 2**61  # as many doubles as there are bytes


@pytest.mark.parametrize(
    ("spoil", "status"),
    [
        (out_of_range, "ERROR_GROUP"),
        (no_groups, "ERROR_GROUP"),
        (too_small, "ERROR_WORKSPACE"),
        (too_many, "ERROR_WORKSPACE"),
        (far_too_many, "ERROR_WORKSPACE"),
        (without_workspace, "ERROR_NULL"),
        (not_a_number, "ERROR_NAN"),
        (against_an_assert, "ERROR_ASSERT"),
    ],
)
def test_mistakes_are_found_before_the_first_write(spoil: Callable[[Step], None], status: str, adam: Library) -> None:
    step = Step(adam)
    before = bits(step.arrays)
    spoil(step)
    assert step() == code(status)
    assert bits(step.arrays) == before


def test_scalars_behind_totals_are_of_each_group(tmp_path: Path) -> None:
    """A step in phases, shared by three in turn, has the bits of a whole one."""
    rule = RULES["clipped"]
    made = compile_shared(rule.generate(prefix="k", dtypes="f64"), tmp_path, require("gcc"), ("-O2",))
    kernel = Library(made, "k", list(rule.hyperparameters), list(rule.state))
    results = []
    for phased in (False, True):
        rng = np.random.default_rng(4)
        arrays = [{name: rng.standard_normal(40) * (name in "pg") for name in ("p", "g", "m", "v")} for _ in range(4)]
        hyper = (kernel.Hyper * 2)(kernel.hyper(max_norm=0.5), kernel.hyper(max_norm=2.0, lr=0.1))
        group = (ctypes.c_size_t * 4)(0, 1, 1, 0)
        size = kernel.call("workspace_size", ctypes.c_size_t)(ctypes.c_uint64(160), ctypes.c_size_t(4))
        options = kernel.options(workspace := np.full(size // 8, np.nan))
        lists = kernel.lists("f64", hyper, 1, kernel.tensors(arrays), 4, groups=2, group=ctypes.addressof(group))
        arguments = [lists, ctypes.c_size_t(1), ctypes.byref(options)]
        if phased:
            work = Work()
            assert kernel.runtime("begin")(ctypes.byref(work), *arguments) == 0
            assert work.phases == len(rule.kernel().phases)
            for phase in range(work.phases):
                for ith in range(3):
                    shared = [ctypes.c_int(phase), ctypes.c_size_t(ith), ctypes.c_size_t(3)]
                    kernel.runtime("share", None)(ctypes.byref(work), *shared)
                assert kernel.runtime("fold")(ctypes.byref(work), ctypes.c_int(phase)) == 0
        else:
            assert kernel.runtime("step_lists")(*arguments) == 0
        assert workspace.nbytes == size
        results.append(bits(arrays))
        params = [own["p"] for own in arrays]
    assert results[0] == results[1]
    rng = np.random.default_rng(4)
    start = [{name: rng.standard_normal(40) * (name in "pg") for name in ("p", "g", "m", "v")} for _ in range(4)]
    own = [own["p"] for own in start]
    groups = [{"params": [own[0], own[3]], "max_norm": 0.5}, {"params": own[1:3], "max_norm": 2.0, "lr": 0.1}]
    grads = [own["g"] for own in start]
    Optimizer(groups, rule, target="numpy").step([[grads[0], grads[3]], grads[1:3]])
    assert bits(own) == bits(params)
