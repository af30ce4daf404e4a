"""Checkpoints: a resumed run has the same bits, damage and misfits are named, and no save ever loses the last one."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optforge as of
from amount import FULL, some
from optforge import Optimizer
from optforge.core import atomic
from optforge.train import tensorfile
from optimizing import SETTINGS, TARGETS, FakeTensor, bits, everything, nadam, small
from oracles import names, oracle

TRANSFORMS: list[tuple[str, dict[str, Any]]] = [
    ("clip_by_global_norm", {"max_norm": 2.0}),
    ("clip_by_norm", {"max_norm": 0.7}),
    ("clip_by_value", {"max_value": 0.4}),
    ("add_weight_decay", {"weight_decay": 0.3}),
    ("decoupled_weight_decay", {"weight_decay": 0.7}),
    ("centralize", {}),
]
KEYS = ["w", 7, ("a", 1), "", "é", None]


def keyed(arrays: list[Any]) -> dict[Any, Any]:
    return dict(zip(KEYS, arrays, strict=True))


def grouped(arrays: list[Any]) -> list[Any]:
    return [arrays[:2], dict(zip("abc", arrays[2:5], strict=True)), tuple(arrays[5:])]


def as_groups(arrays: list[Any]) -> list[Any]:
    return [{"params": part, "lr": 0.01 * (k + 1)} for k, part in enumerate(grouped(arrays))]


def gradients(seed: int) -> list[Any]:
    """The last tensor gets its first gradient at seed 5."""
    grads: list[Any] = small(seed)
    if seed < 5:
        grads[5] = None
    return grads


def everything_of(opt: Optimizer) -> Any:
    """All that a step or an assignment may change, without a warning of functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return everything(opt)


# ── resuming ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("first", "second"), list(itertools.product(TARGETS, TARGETS)))
@pytest.mark.parametrize(
    ("params", "grads"), [(list, list), (tuple, tuple), (keyed, keyed), (as_groups, grouped)], ids=str
)
def test_a_resumed_run_has_the_same_bits(first: str, second: str, params: Any, grads: Any, tmp_path: Path) -> None:
    """In place, and as a new optimizer; on the same target, and on the other."""
    whole = Optimizer(params(small(1)), nadam, target=first, nesterov=False, **SETTINGS)
    for seed in (2, 3):
        whole.step(grads(gradients(seed)))
    whole.beta = 0.125
    path = tmp_path / "run.safetensors"
    whole.save(path)
    own = small(9)
    resumed = Optimizer(params(own), nadam, target=second, nesterov=False)
    resumed.step(grads(small(8)))
    resumed.load(path)
    fresh = Optimizer.load(path, rule=nadam, target=second)
    assert everything(whole) == everything(resumed) == everything(fresh)
    assert resumed.target == fresh.target == second
    for seed in (4, 5, 6):
        for opt in (whole, resumed, fresh):
            opt.step(grads(gradients(seed)))
    assert everything(whole) == everything(resumed) == everything(fresh)
    assert whole.t == 5
    flat = list(own)
    assert all(a is b for a, b in zip(flat_of(resumed), flat, strict=True))


def flat_of(opt: Optimizer) -> list[Any]:
    return [tensor.owner for tensor in opt._tensors]


def resumes(rule: of.Rule, path: Path, settings: dict[str, float], targets: tuple[str, str]) -> None:
    """Whether a run that is saved after two steps goes on with the same bits."""
    whole = Optimizer(small(1), rule, target=targets[0], **settings)
    for seed in (2, 3):
        whole.step(gradients(seed))
    whole.save(path)
    resumed = Optimizer.load(path, target=targets[1])
    assert resumed.rule.hash == rule.hash
    for seed in (5, 6):
        for opt in (whole, resumed):
            opt.step(gradients(seed))
    assert everything(whole) == everything(resumed)


RULES = list(of.rules)
PAIRS = [
    (transform, settings, rule)
    for (transform, settings), rule in itertools.product(TRANSFORMS, RULES)
    if not settings.keys() & of.rules[rule].hyperparameters.keys()
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("targets", [("c", "c"), ("c", "numpy"), ("numpy", "c"), ("numpy", "numpy")], ids="-".join)
def test_every_rule_resumes(rule: str, targets: tuple[str, str], tmp_path: Path) -> None:
    settings = oracle(rule).SETTINGS[0] if rule in names() else {}
    resumes(of.rules[rule], tmp_path / "run", settings, targets)


@pytest.mark.parametrize(
    ("transform", "settings", "rule"), PAIRS, ids=lambda value: value if type(value) is str else ""
)
def test_every_rule_behind_every_transform_resumes(
    transform: str, settings: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    made = of.transforms[transform] >> of.rules[rule]
    own = oracle(rule).SETTINGS[1] if rule in names() else {}
    resumes(made, tmp_path / "run", {**own, **settings}, ("numpy", "numpy"))


def test_all_transforms_are_here() -> None:
    assert [name for name, _ in TRANSFORMS] == sorted(of.transforms, key=[name for name, _ in TRANSFORMS].index)
    assert set(of.transforms) == {name for name, _ in TRANSFORMS}


def test_a_composition_resumes_on_the_other_target(tmp_path: Path) -> None:
    made = of.clip_by_global_norm(form="pytorch") >> of.rules.lamb
    for targets in (("c", "numpy"), ("numpy", "c")):
        resumes(made, tmp_path / "run", {"max_norm": 0.5}, targets)
    assert Optimizer.load(tmp_path / "run", target="numpy").form == "pytorch"


def test_values_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    opt = Optimizer([np.array([np.nan, np.inf, -0.0])], nadam, target="numpy", lr=np.inf)
    opt.step([np.array([np.nan, 1.0, 0.0])])
    opt.save(tmp_path / "run")
    assert everything(Optimizer.load(tmp_path / "run", rule=nadam, target="numpy")) == everything(opt)


def test_parameters_that_moved_are_found(tmp_path: Path) -> None:
    tensor = FakeTensor(np.ones(3))
    opt = Optimizer([tensor], "adam", target="numpy")
    opt.step([np.ones(3)])
    tensor.move(np.full(3, 5.0))
    opt.save(tmp_path / "run")
    tensor.move(np.full(3, 7.0))
    opt.load(tmp_path / "run")
    assert tensor.array.tolist() == [5.0, 5.0, 5.0]


def test_the_file_is_of_the_safetensors_format(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    opt = Optimizer({"w": np.ones((2, 3), np.float32), "b": np.ones(())}, nadam, target="numpy")
    opt.step({"w": np.ones((2, 3), np.float32), "b": None})
    opt.save(tmp_path / "run.safetensors")
    loaded = load_file(tmp_path / "run.safetensors")
    assert {"params['w']", "params['b']", "state['m']['w']", "state['mu']"} <= set(loaded)
    assert bits(loaded["params['w']"]) == bits(opt.params["w"])
    assert bits(loaded["state['mu']"].tolist()) == bits([opt.state["mu"]["w"], opt.state["mu"]["b"]])


# ── schedules and companions ────────────────────────────────────────────────────────────────────────────────────────


def falling(t: int) -> float:
    return 0.5 / t


def test_a_function_is_kept_where_it_is_loaded(tmp_path: Path) -> None:
    whole = Optimizer(small(1), nadam, target="numpy", lr=falling, psi=0.3)
    whole.step(small(2))
    whole.step(small(3))
    with pytest.warns(UserWarning, match=r"^the schedule of hyperparameter 'lr' is <function falling"):
        whole.save(tmp_path / "run")
    resumed = Optimizer(small(9), nadam, target="numpy", lr=falling, psi=falling)
    resumed.load(tmp_path / "run")
    assert (resumed.lr, resumed.psi) == (falling(2), 0.3)
    for opt in (whole, resumed):
        opt.step(small(4))
    assert everything_of(whole) == everything_of(resumed)
    with pytest.warns(
        UserWarning, match=r"^hyperparameter 'lr' was a function that could not be saved; it is 0\.25 from"
    ):
        fresh = Optimizer.load(tmp_path / "run", rule=nadam, target="numpy")
    fresh.step(small(4))
    assert fresh.lr == falling(2)


class Halving:
    """A schedule that can be saved."""

    def __init__(self, start: float):
        self.start = start

    def __call__(self, t: int) -> float:
        return self.start * 0.5**t

    def to_dict(self) -> dict[str, Any]:
        return {"start": self.start}


def test_a_schedule_that_can_be_saved_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optforge.train import resume

    monkeypatch.setattr(resume, "schedule_of", lambda saved: Halving(**saved))
    groups = [{"params": small(1), "lr": Halving(3.0)}, {"params": small(2)}]
    whole = Optimizer(groups, nadam, target="numpy")
    whole.step([small(3), small(4)])
    whole.save(tmp_path / "run")
    resumed = Optimizer.load(tmp_path / "run", rule=nadam, target="c")
    for opt in (whole, resumed):
        opt.step([small(5), small(6)])
    assert resumed.groups[0]["lr"] == 0.75
    assert bits(whole.params) == bits(resumed.params)
    assert whole.state_dict()["schedules"] == resumed.state_dict()["schedules"] == [{"lr": {"start": 3.0}}, {}]


class Counter:
    """Something with a state of its own."""

    def __init__(self, value: Any = 0):
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        if saved["value"] == "refused":
            raise ValueError("no such value")
        self.value = saved["value"]


def test_companions_are_saved_and_restored(tmp_path: Path) -> None:
    opt = Optimizer(small(1), "adam", target="numpy")
    opt.save(tmp_path / "run", plateau=Counter([1.5, np.inf, "x"]), path=Counter(2))
    plateau, other = Counter(), Counter()
    opt.load(tmp_path / "run", plateau=plateau, path=other)
    assert (plateau.value, other.value) == ([1.5, np.inf, "x"], 2)
    with pytest.warns(UserWarning, match=r"also has the state of 'path': opt\.load\(path, path=…\) restores it$"):
        opt.load(tmp_path / "run", plateau=plateau)


def test_companions_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    opt = Optimizer(small(1), "adam", target="numpy")
    opt.save(tmp_path / "run", first=Counter(5), second=Counter("refused"))
    opt.step(small(2))
    before, first, second = everything(opt), Counter(1), Counter(2)
    with pytest.raises(ValueError, match=r"run does not fit: 'second' refuses its state: no such value$"):
        opt.load(tmp_path / "run", first=first, second=second)
    assert (first.value, second.value) == (1, 2)
    with pytest.raises(ValueError, match=r"run does not fit: it has no 'third'$"):
        opt.load(tmp_path / "run", first=first, third=second)
    assert everything(opt) == before
    with pytest.raises(
        ValueError, match=r"^the state dict of 'plateau' cannot be saved as JSON: plateau\['value'\] is an ndarray$"
    ):
        opt.save(tmp_path / "run", plateau=Counter(np.ones(3)))
    assert (first.value, second.value) == (1, 2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({3: 1}, r"plateau\['value'\] has the key 3, and JSON has text alone as keys; let state_dict\(\) make text"),
        ({"a": [0, {None: 1}]}, r"plateau\['value'\]\['a'\]\[1\] has the key None, and"),
        ({"a": 1, 2: 3}, r"plateau\['value'\] has the key 2, and"),
        ([1, {(1, 2): 3}], r"plateau\['value'\]\[1\] has the key \(1, 2\), and"),
        ([1, (2, {3})], r"plateau\['value'\]\[1\]\[1\] is a set$"),
        (np.bool_(True), r"plateau\['value'\] is a bool"),
    ],
)
def test_companions_that_json_would_change(value: Any, message: str, tmp_path: Path) -> None:
    opt = Optimizer(small(1), "adam", target="numpy")
    with pytest.raises(ValueError, match=rf"^the state dict of 'plateau' cannot be saved as JSON: {message}"):
        opt.save(tmp_path / "run", plateau=Counter(value))
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(ValueError, match=r"^the state dict of 'plateau' cannot be saved as JSON: Circular"):
        opt.save(tmp_path / "run", plateau=Counter(circle))
    assert not list(tmp_path.iterdir())


def test_companions_that_come_back(tmp_path: Path) -> None:
    opt, other = Optimizer(small(1), "adam", target="numpy"), Counter()
    opt.save(tmp_path / "run", other=Counter({"": (1, [True, None]), "x": [-np.inf, np.float64(0.1)]}))
    opt.load(tmp_path / "run", other=other)
    assert other.value == {"": [1, [True, None]], "x": [-np.inf, 0.1]}
    opt.save(tmp_path / "run", other=Counter([np.nan]))
    opt.load(tmp_path / "run", other=other)
    assert np.isnan(other.value[0])


@pytest.mark.parametrize("wrong", [None, 3, types.SimpleNamespace(state_dict=dict)], ids=str)
def test_things_that_are_no_companions(wrong: Any, tmp_path: Path) -> None:
    opt, first = Optimizer(small(1), "adam", target="numpy"), Counter(1)
    with pytest.raises(
        TypeError, match=r"^'second' is saved by its state_dict\(\) and load_state_dict\(\); an? \w+ has no"
    ):
        opt.save(tmp_path / "run", first=first, second=wrong)
    assert not list(tmp_path.iterdir())
    opt.save(tmp_path / "run", first=Counter(5), second=Counter(6))
    opt.step(small(2))
    before = everything(opt)
    with pytest.raises(
        TypeError, match=r"^'second' is saved by its state_dict\(\) and load_state_dict\(\); an? \w+ has no"
    ):
        opt.load(tmp_path / "run", first=first, second=wrong)
    assert first.value == 1
    assert everything(opt) == before


class Living:
    """Its state dict is what it lives on, and it takes only such of its own version, after it has begun to."""

    def __init__(self, version: int, value: Any):
        self.version, self.value = version, value

    def state_dict(self) -> dict[str, Any]:
        return self.__dict__

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.value = saved["value"]
        if saved["version"] != self.version or self.value == "anything":
            raise ValueError(f"no value {self.value!r}")


def test_a_live_state_dict_is_restored_and_the_first_refusal_told(tmp_path: Path) -> None:
    opt = Optimizer(small(1), "adam", target="numpy")
    opt.save(tmp_path / "run", first=Living(1, [5]), second=Living(2, "saved"))
    first, second = Living(1, [1]), Living(1, "mine")
    for own in ("mine", "anything"):  # it refuses what it had, too
        second.value = own
        with pytest.raises(ValueError, match=r"run does not fit: 'second' refuses its state: no value 'saved'$"):
            opt.load(tmp_path / "run", first=first, second=second)
        assert (first.value, second.value) == ([1], own)


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two small tensors."""
    opt = Optimizer({"w": np.ones((2, 3), np.float32), "b": np.ones(())}, nadam, target="numpy", **SETTINGS)
    opt.step({"w": np.ones((2, 3), np.float32), "b": None})
    path = tmp_path_factory.mktemp("saved") / "run"
    opt.save(path)
    return path


def like_saved(**changed: Any) -> Optimizer:
    return Optimizer({"w": np.ones((2, 3), np.float32), "b": np.ones(()), **changed}, nadam, target="numpy")


MISFITS: list[tuple[Callable[[], Optimizer], list[str]]] = [
    (
        lambda: like_saved(w=np.ones((3, 2), "f4")),
        ["its params['w'] is float32 of shape (2, 3), here float32 of shape"],
    ),
    (lambda: like_saved(b=np.ones((), "f4")), ["its params['b'] is float64 of shape (), here float32 of shape ()"]),
    (lambda: like_saved(c=np.ones(())), ["it has no params['c']"]),
    (lambda: Optimizer({"w": np.ones((2, 3), "f4")}, nadam, target="numpy"), ["its params['b'] is not here"]),
    (
        lambda: Optimizer([np.ones((2, 3), "f4")], nadam, target="numpy"),
        ["it has no params[0]", "its params['w'] is not here", "its params['b'] is not here"],
    ),
    (
        lambda: Optimizer([{"params": [np.ones(3)]}], nadam, target="numpy"),
        ["it is of parameters without groups"],
    ),
    (
        lambda: Optimizer({"w": np.ones((2, 3)), "b": np.ones(())}, "adam", target="numpy"),
        ["it is of rule 'nadam', this optimizer of 'adam'", "its options are {", "its params['w'] is float32 of shape"],
    ),
    (
        lambda: Optimizer({"w": np.ones((2, 3), "f4"), "b": np.ones(())}, nadam, target="numpy", average="off"),
        ["its options are {'average': 'slow', 'nesterov': True}, here {'nesterov': True, 'average': 'off'}"],
    ),
    (
        lambda: Optimizer({"w": np.ones((2, 3), "f4"), "b": np.ones(())}, renamed(), target="numpy"),
        ["it is of another version of rule 'nadam' (the hashes differ)", "its options are"],
    ),
]


def renamed() -> of.Rule:
    """Another rule of the same name."""

    @of.rule
    def nadam(p, g, *, lr=0.1):
        """Not that one."""
        p = p - lr * g
        return p

    return nadam


@pytest.mark.parametrize(("make", "wanted"), MISFITS)
def test_all_that_does_not_fit_is_named(make: Callable[[], Optimizer], wanted: list[str], saved: Path) -> None:
    opt = make()
    before = everything(opt)
    with pytest.raises(ValueError, match=r"run does not fit: ") as refusal:
        opt.load(saved)
    for part in wanted:
        assert part in str(refusal.value)
    assert len(str(refusal.value).partition("fit: ")[2].split("; ")) == len(wanted)
    assert everything(opt) == before


def test_every_flipped_byte_is_noticed(saved: Path, tmp_path: Path) -> None:
    """In turn one bit, all bits, and what is a space to JSON as well."""
    whole, path = saved.read_bytes(), tmp_path / "flipped"
    opt = like_saved()
    before = everything(opt)
    for place in range(len(whole)):
        change = (whole[place] ^ 1 << place % 8, whole[place] ^ 0xFF, 0x20 if whole[place] != 0x20 else 0x09)[place % 3]
        path.write_bytes(whole[:place] + bytes([change]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"is damaged or not complete|is no checkpoint of optforge, or is damaged"):
            opt.load(path)
    assert everything(opt) == before


def test_every_truncated_file_is_noticed(saved: Path, tmp_path: Path) -> None:
    whole, path = saved.read_bytes(), tmp_path / "short"
    opt = like_saved()
    before = everything(opt)
    for size in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"is damaged or not complete|is no checkpoint of optforge, or is damaged"):
            opt.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="is damaged or not complete"):
        Optimizer.load(path)
    assert everything(opt) == before


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    opt, path = like_saved(), tmp_path / "other"
    save_file({"params['w']": np.ones(3)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"other is no checkpoint of optforge, or is damaged: it has no checksum$"):
        opt.load(path)
    with pytest.raises(FileNotFoundError):
        opt.load(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        opt.load(tmp_path)
    tensorfile.write(path, {"format": 3}, {})
    with pytest.raises(ValueError, match=r"other is of format 3, and this version of optforge reads 1 and 2$"):
        opt.load(path)


def test_a_rule_that_is_not_built_in_must_be_given(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"run is of rule 'nadam' of optimizing\.py:nadam: give it as rule=$"):
        Optimizer.load(saved)
    with pytest.raises(ValueError, match=r"it is of rule 'nadam', this optimizer of 'sgd'"):
        Optimizer.load(saved, rule="sgd", target="numpy")


def test_what_a_new_optimizer_is_not_made_of(saved: Path, tmp_path: Path) -> None:
    opt = Optimizer(small(1), "adam", target="numpy")
    opt.save(tmp_path / "run", plateau=Counter())
    advice = r": make it over the new optimizer, then opt\.load\(path, plateau=plateau\)$"
    with pytest.raises(TypeError, match=r"^Optimizer\.load takes no 'plateau'" + advice):
        Optimizer.load(tmp_path / "run", plateau=Counter())
    with pytest.raises(TypeError, match=r"^Optimizer\.load takes no 'lr'$"):
        Optimizer.load(tmp_path / "run", lr=0.1)
    with pytest.raises(
        TypeError, match=r"^a rule is made by @rule, or is the name of a built-in one, not a function: write @rule "
    ):
        Optimizer.load(saved, rule=small)


def test_keys_that_cannot_be_written_down(tmp_path: Path) -> None:
    class Key:
        pass

    opt = Optimizer({Key(): np.ones(3)}, "sgd", target="numpy")
    with pytest.raises(
        ValueError, match=r"^a checkpoint takes text, numbers and tuples of them as keys of params, not <"
    ):
        opt.save(tmp_path / "run")
    assert not list(tmp_path.iterdir())


# ── saves that fail ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_save_leaves_one_file_with_the_permissions_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "run"
    opt = Optimizer(small(1), "adam", target="numpy")
    before = os.umask(0o027)
    try:
        opt.save(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o604)
    (tmp_path / "link").symlink_to(path)
    opt.step(small(2))
    opt.save(tmp_path / "link")
    assert path.stat().st_mode & 0o777 == 0o604
    assert (tmp_path / "link").is_symlink()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "run"]
    assert Optimizer.load(path, target="numpy").t == 1


def failing(error: BaseException) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        raise error

    return call


@pytest.mark.parametrize(
    ("owner", "name"),
    [(os, "fsync"), (os, "replace"), (os, "chmod"), (Path, "mkdir"), (tensorfile, "checksum")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_save_that_fails_keeps_the_last_one(
    owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    opt = Optimizer(small(1), "adam", target="numpy")
    opt.save(path)
    before, state = path.read_bytes(), everything(opt)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(OSError(28, "No space left on device")))
        with pytest.raises(
            OSError, match=r"No space left on device; what was there before is as it was: '.*run'"
        ) as raised:
            opt.save(path)
    assert raised.value.errno == 28
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
    assert everything(opt) == state


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    opt = Optimizer(small(1), "adam", target="numpy")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "content").touch()
    with pytest.raises(IsADirectoryError, match=r"it is a directory; .*'.*directory'$"):
        opt.save(tmp_path / "directory")
    with pytest.raises(FileNotFoundError, match=r"No such file or directory; .*'.*none/run'$"):
        opt.save(tmp_path / "none" / "run")
    with pytest.raises(NotADirectoryError):
        opt.save(tmp_path / "directory" / "content" / "run")
    if os.getuid() != 0:
        (tmp_path / "directory").chmod(0o500)
        with pytest.raises(PermissionError):
            opt.save(tmp_path / "directory" / "run")


def test_a_missing_package_is_named(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(of.OptforgeError, match=r"^checkpoints need the package safetensors: "):
        like_saved().load(saved)
    with pytest.raises(of.OptforgeError, match=r"^checkpoints need the package safetensors: "):
        like_saved().save(tmp_path / "run")


# A process that saves over a checkpoint and dies at a point: before the n-th call of what a save is made of, or when
# its file has so many bytes, which is a signal of the system.
DYING = textwrap.dedent("""
    import os, resource, shutil, signal, sys
    from pathlib import Path
    import numpy as np
    import optforge as of
    from optforge.core import atomic
    from optforge.train import tensorfile

    path, point = Path(sys.argv[1]), sys.argv[2]
    opt = of.Optimizer([np.full(5000, 2.0)], "adam", target="numpy")
    opt.t = 2
    tensorfile.library()

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    calls = 0

    def counted(function):
        def call(*arguments, **keywords):
            global calls
            calls += 1
            if calls == int(point):
                die()
            return function(*arguments, **keywords)
        return call

    if point.startswith("size"):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        size = int(point.removeprefix("size"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    else:
        for name in ("open", "fsync", "replace", "chmod", "close", "rmdir", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        atomic.fcntl.flock = counted(atomic.fcntl.flock)
        Path.mkdir = counted(Path.mkdir)
        tensorfile.checksum = counted(tensorfile.checksum)
        import safetensors.numpy
        safetensors.numpy.save_file = counted(safetensors.numpy.save_file)
    opt.save(path)
    print(calls)
""")
POINTS = [*map(str, range(1, 20)), *(f"size{n}" for n in (0, 1, 7, 900, 40_000, 119_999))]


def dying(path: Path, point: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DYING, str(path), point]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[int]]:
    """A checkpoint of step 1, and the steps of the checkpoints that were found at all points."""
    directory = tmp_path_factory.mktemp("deaths")
    path = directory / "run"
    found: set[int] = set()
    return path, found


def test_there_are_no_other_points(deaths: tuple[Path, set[int]], tmp_path: Path) -> None:
    """A whole save makes about as many calls as the points count, so that they cover it."""
    done = dying(tmp_path / "run", "1000")
    assert done.returncode == 0, done.stderr
    assert 17 <= int(done.stdout) <= 19
    assert Optimizer.load(tmp_path / "run", target="numpy").t == 2


@pytest.mark.parametrize("point", some(POINTS, 2))
def test_a_killed_save_leaves_the_old_checkpoint_or_the_new_one(point: str, deaths: tuple[Path, set[int]]) -> None:
    path, found = deaths
    old = Optimizer([np.full(5000, 1.0)], "adam", target="numpy")
    old.t = 1
    old.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["run"], "the last one's remains were not removed"
    done = dying(path, point)
    if done.returncode != 0 or int(done.stdout) >= int(point):
        assert done.returncode in (-signal.SIGKILL, -signal.SIGXFSZ), done.stderr
    loaded = Optimizer.load(path, target="numpy")
    assert loaded.t in (1, 2)
    assert np.all(loaded.params[0] == loaded.t)
    found.add(loaded.t)
    assert len(list(path.parent.iterdir())) <= 2
    if point == POINTS[-1]:
        assert found == {1, 2}


def test_the_remains_of_others_at_work_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run"
    opt = Optimizer(small(1), "adam", target="numpy")
    with atomic.room(path) as (directory, _):
        opt.save(path)
        assert directory.is_dir()
    stale = tmp_path / ".run.01234567.saving"
    stale.mkdir()
    (stale / "run").write_bytes(b"x")
    opt.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_others_may_remove_a_directory_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, mkdir, removed = tmp_path / "run", Path.mkdir, []

    def disturbed(self: Path, mode: int) -> None:
        mkdir(self, mode=mode)
        if len(removed) < 3:
            removed.append(self)
            atomic.discard(tmp_path, atomic.beginning(path), atomic.ENDING)
            assert not self.exists()

    monkeypatch.setattr(Path, "mkdir", disturbed)
    atomic.replace_file(path, lambda new: new.write_bytes(b"new"))  # type: ignore[arg-type, return-value]
    assert len(removed) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["x" * 237, "x" * 238, "x" * 239, "é" * 127 + "x"])
def test_long_names(name: str, tmp_path: Path) -> None:
    opt = Optimizer(small(1), "adam", target="numpy")
    with contextlib.suppress(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(os, "replace", failing(KeyboardInterrupt()))
        opt.save(tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 1
    opt.save(tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert Optimizer.load(tmp_path / name, target="numpy").t == 0


def test_what_the_header_says(saved: Path) -> None:
    data = saved.read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert re.fullmatch("[0-9a-f]{64}", metadata["sha256"])
    header = json.loads(metadata["optforge"])
    assert (header["rule"], header["hash"], header["t"]) == ("nadam", nadam.hash, 1)
    assert header["hyperparameters"] == [{"lr": 0.03, "beta": 0.7, "psi": 0.3, "floor": 3e-4}]
    assert header["tensors"] == [
        {"path": "['w']", "shape": [2, 3], "dtype": "float32", "started": True, "steps": 1},
        {"path": "['b']", "shape": [], "dtype": "float64", "started": False, "steps": 0},
    ]


# ── what others may have made ───────────────────────────────────────────────────────────────────────────────────────


def forge(path: Path, change: Callable[[dict[str, Any]], Any], text: str | None = None) -> None:
    """Change the header of a checkpoint, and make its checksum right."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(path, "numpy") as opened:
        header = json.loads(opened.metadata()["optforge"])
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    made = change(header)
    metadata = {"optforge": json.dumps(header if made is None else made) if text is None else text, "sha256": "0" * 64}
    save_file(arrays, path, metadata=metadata)
    with open(path, "r+b") as file:
        place, digest = tensorfile.checksum(file)
        file.seek(place)
        file.write(digest.encode())


WRONG: list[Any] = [
    None,
    True,
    -1,
    10**400,
    1.5,
    float("nan"),
    "",
    "x",
    "(" * 300,
    [],
    [[]],
    {},
    {"x": []},
    [{}],
    [None],
    [1, 2],
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places in a header, but what belongs to others."""
    found = [path] if path else []
    if isinstance(value, dict):
        found += [place for name, own in value.items() for place in places(own, (*path, name))]
    elif isinstance(value, list):
        found += [place for k, own in enumerate(value) for place in places(own, (*path, k))]
    return found


class Careful(Counter):
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        if not isinstance(saved, dict) or set(saved) != {"value"}:
            raise ValueError("no such state")
        self.value = saved["value"]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that has everything: groups, keys, schedules, scalar state, companions."""
    path = tmp_path_factory.mktemp("full") / "run"
    of_everything().save(path, companion=Careful(5))
    return path


def of_everything() -> Optimizer:
    groups = [
        {"params": {"w": np.ones((2, 3), np.float32), ("a", 1): np.ones(2)}, "lr": of.schedules.step(0.1, every=2)},
        {"params": [np.ones(3)], "lr": 0.5},
    ]
    opt = Optimizer(groups, nadam, target="numpy")
    opt.step([{"w": np.ones((2, 3), np.float32), ("a", 1): np.ones(2)}, [np.ones(3)]])
    return opt


def refused_whole(path: Path, opt: Optimizer, what: object) -> bool:
    """Whether a file is refused, with one error of the documented class and nothing changed, by both kinds of loading."""
    companion, before = Careful(1), everything_of(opt)
    refused = []
    for load in (lambda: opt.load(path, companion=companion), lambda: Optimizer.load(path, rule=nadam, target="numpy")):
        said = "run "
        try:
            load()
            refused.append(False)
        except ValueError as problem:
            said = str(problem)
            refused.append(True)
        assert "run " in said, (what, said)
        assert "\n" not in said, (what, said)
    if refused[0]:
        assert companion.value == 1, what
        assert everything_of(opt) == before, what
    return refused[0]


@pytest.mark.filterwarnings("ignore:.*also has the state of")
@pytest.mark.filterwarnings("ignore:.*was a function that could not be saved")
def test_every_forged_header_is_refused_whole(full: Path, tmp_path: Path) -> None:
    header = tensorfile.read(full)[0]
    path, count, opt = tmp_path / "run", 0, of_everything()
    every = list(itertools.product(places(header), [*WRONG, places]))
    chosen = [every[k] for k in some(range(len(every)), 4)]
    for place, wrong in chosen:
        path.write_bytes(full.read_bytes())

        def change(made: dict[str, Any], place: tuple[Any, ...] = place, wrong: Any = wrong) -> None:
            for part in place[:-1]:
                made = made[part]
            if wrong is places:  # this stands for nothing at all
                del made[place[-1]]
            else:
                made[place[-1]] = wrong

        forge(path, change)
        if refused_whole(path, opt, (place, wrong)):
            count += 1  # and the optimizer is as it was
        else:
            opt = of_everything()
    assert count > len(chosen) / 2
    assert len(chosen) > (1000 if FULL else 250)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        '"x"',
        "[" * 100_000,
        '{"format":1}',
        '{"format":' + "[" * 100_000,
        "1" * 10_000,
        "\ud800",
    ],
    ids=lambda text: text[:12],
)
def test_every_forged_text_is_refused(text: str, full: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_bytes(full.read_bytes())
    try:
        forge(path, lambda header: None, text)
    except UnicodeEncodeError:
        pytest.skip("safetensors does not write such")
    assert refused_whole(path, of_everything(), text)


def test_arrays_that_are_forged_are_refused(full: Path, tmp_path: Path) -> None:
    """Each array in turn is missing, of another shape, or of a dtype that no rule has."""
    from safetensors.numpy import save_file

    header, arrays = tensorfile.read(full)
    path = tmp_path / "run"
    for name in arrays:
        for made in (None, np.ones((7, 7)), np.ones(arrays[name].shape, np.int8), np.ones(0, np.float32)):
            changed = {key: value for key, value in arrays.items() if key != name} | (
                {} if made is None else {name: made}
            )
            save_file(changed, path, metadata={"optforge": json.dumps(header), "sha256": "0" * 64})
            forge(path, lambda _: None)
            assert refused_whole(path, of_everything(), (name, made))


def test_a_warning_that_is_an_error_comes_before_a_change(full: Path, tmp_path: Path) -> None:
    path, opt = tmp_path / "run", of_everything()
    other = of_everything()
    other.groups[1]["lr"] = lambda t: 0.25
    with pytest.warns(UserWarning, match="cannot be saved"):
        other.save(path, companion=Careful(5))
    opt.groups[0]["lr"] = 0.125
    before = everything_of(opt)
    companion = Careful(1)
    for companions, words in (
        ({}, "also has the state of"),
        ({"companion": companion}, "was a function that could not"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match=words):
                opt.load(path, **companions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="was a function that could not"):
            opt.load_state_dict(other_state(other))
    assert companion.value == 1
    assert everything_of(opt) == before


def other_state(opt: Optimizer) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return opt.state_dict()


def test_an_interrupt_while_companions_are_restored_changes_nothing(full: Path) -> None:
    class Interrupted(Counter):
        def load_state_dict(self, saved: dict[str, Any]) -> None:
            raise KeyboardInterrupt

    opt = of_everything()
    before, companion = everything_of(opt), Careful(1)
    path = full.with_name("two")
    opt.save(path, companion=Careful(5), second=Counter(6))
    with pytest.raises(KeyboardInterrupt):
        opt.load(path, companion=companion, second=Interrupted(2))
    assert companion.value == 1
    assert everything_of(opt) == before


def in_time(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A process that might wait for ever."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


LOADING = """
    import sys, optforge as of
    of.Optimizer.load(sys.argv[1], target="numpy")
"""
SAVING = """
    import sys, numpy as np, optforge as of
    of.Optimizer([np.ones(3)], "adam", target="numpy").save(sys.argv[1])
"""


@pytest.mark.parametrize("kind", ["fifo", "zero"])
def test_a_checkpoint_is_a_regular_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    done = in_time(LOADING, path)
    assert done.stderr.endswith(f"[Errno 22] it is no regular file: '{path}'\n")


def test_what_others_put_beside_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    path, precious = tmp_path / "run", tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("precious")
    os.mkfifo(tmp_path / ".run.0123456789abcdef0123456789abcdef.saving")
    (tmp_path / ".run.1123456789abcdef0123456789abcdef.saving").symlink_to(precious)
    (tmp_path / ".run.notes.saving").mkdir()
    before = {file.name for file in tmp_path.iterdir()}
    done = in_time(SAVING, path)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in tmp_path.iterdir()} == before | {"run"}
    assert (precious / "file").read_text() == "precious"


def test_a_link_that_another_user_has_planted_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, precious = tmp_path / "shared", tmp_path / "precious"
    shared.mkdir()
    shared.chmod(0o1777)
    precious.write_text("precious")
    (shared / "run").symlink_to(precious)
    (shared / "below").symlink_to(tmp_path)
    opt, lstat = Optimizer([np.ones(3)], "adam", target="numpy"), Path.lstat
    opt.save(shared / "run")  # our own link
    assert precious.read_bytes() != b"precious"
    precious.write_text("precious")

    def of_another(self: Path) -> os.stat_result:
        status = lstat(self)
        return os.stat_result([*status[:4], status.st_uid + 1, *status[5:]]) if os.path.islink(self) else status

    monkeypatch.setattr(Path, "lstat", of_another)
    for path in (shared / "run", shared / "below" / "precious"):
        with pytest.raises(PermissionError, match="a symbolic link that another user has put into a directory"):
            opt.save(path)
    assert precious.read_text() == "precious"
    assert sorted(file.name for file in shared.iterdir()) == ["below", "run"]


def test_a_link_inside_of_the_room_is_not_followed(tmp_path: Path) -> None:
    path, precious = tmp_path / "run", tmp_path / "precious"
    precious.write_text("precious")
    mkdir = Path.mkdir

    def planted(self: Path, mode: int) -> None:
        mkdir(self, mode=mode)
        assert self.stat().st_mode & 0o777 == 0o700
        (self / "run").symlink_to(precious)

    opt = Optimizer([np.ones(3)], "adam", target="numpy")
    mask = os.umask(0)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "mkdir", planted)
            with pytest.raises(FileExistsError):
                opt.save(path)
        opt.save(path)
    finally:
        os.umask(mask)
    assert precious.read_text() == "precious"
    assert path.stat().st_mode & 0o777 == 0o666


def test_a_header_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = Optimizer([np.ones(3)], "adam", target="numpy")
    opt.save(tmp_path / "run", notes=Counter("x" * 5000))
    monkeypatch.setattr(tensorfile, "HEADER_BYTES", 4000)
    with pytest.raises(ValueError, match=r"run has a header of [0-9,]+ bytes; a checkpoint has at most 4,000$"):
        opt.load(tmp_path / "run")
    with pytest.raises(ValueError, match="a checkpoint of this cannot be read again"):
        opt.save(tmp_path / "other", notes=Counter("x" * 5000))
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
