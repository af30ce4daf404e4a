"""State dicts of other libraries' optimizers, for rules that share their formula."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import is_array, kind, view
from .diagnostics import UsageError
from .resume import checked

if TYPE_CHECKING:
    from .optimizer import Optimizer

Key = str | tuple[str, int]  # of a parameter group: a name, or a name and a place in the tuple there


@dataclass(frozen=True)
class Counterpart:
    """The optimizer of PyTorch with the formula of a rule: its names for state and hyperparameters, by ours.

    `fixed` are hyperparameters of ours, `others` settings of theirs, for which alone the formulas are the same.
    """

    name: str
    hyperparameters: Mapping[str, Key]
    state: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, float] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    steps: bool = True  # whether its state has the step count


BETAS: Mapping[str, Key] = MappingProxyType(
    {"lr": "lr", "beta1": ("betas", 0), "beta2": ("betas", 1), "eps": "eps"},
)
MOMENTS = MappingProxyType({"m": "exp_avg", "v": "exp_avg_sq"})
ADAM = MappingProxyType({"amsgrad": False, "maximize": False})

PYTORCH: dict[str, Counterpart] = {
    "adam": Counterpart(
        "Adam",
        BETAS,
        MOMENTS,
        fixed={"lam": 1.0},
        others={"weight_decay": 0, **ADAM},
    ),
    "adamw": Counterpart(
        "AdamW",
        {**BETAS, "weight_decay": "weight_decay"},
        MOMENTS,
        others={"decoupled_weight_decay": True, **ADAM},
    ),
    "adadelta": Counterpart(
        "Adadelta",
        {"lr": "lr", "rho": "rho", "eps": "eps"},
        {"acc": "square_avg", "acc_delta": "acc_delta"},
        others={"weight_decay": 0, "maximize": False},
    ),
    "sgd": Counterpart(
        "SGD",
        {"lr": "lr"},
        others={"momentum": 0, "weight_decay": 0, "dampening": 0, "nesterov": False, "maximize": False},
        steps=False,
    ),
}


def to_torch(opt: Optimizer) -> dict[str, Any]:
    """The state dict of the PyTorch optimizer with the same formula: `torch_optimizer.load_state_dict(to_torch(opt))`.

    Adam (for `adam` with lam=1), AdamW, Adadelta and SGD. Parameters are numbered in order, through all groups. The
    values are copies: tensors where PyTorch can be imported, else NumPy arrays.

    Raises
    ------
    ValueError
        No optimizer of PyTorch is known to have the formula of this rule, with these hyperparameters.
    """
    own = counterpart(opt)
    number = converter()
    groups, first = [], 0
    for k, (row, branch) in enumerate(zip(opt._rows(), opt._structure.branches, strict=True)):
        wrong = [f"{name}={row[name]!r}, not {value!r}" for name, value in own.fixed.items() if row[name] != value]
        if wrong:
            raise UsageError(f"{opt._hyper.where(k)}{own.name} of PyTorch is another formula for {', '.join(wrong)}")
        group: dict[str, Any] = dict(own.others)
        for name, key in own.hyperparameters.items():
            if isinstance(key, tuple):
                group[key[0]] = (*group.get(key[0], ()), row[name])
            else:
                group[key] = row[name]
        group["params"] = list(range(first, first + len(branch.keys)))
        first += len(branch.keys)
        groups.append(group)
    state: dict[int, dict[str, Any]] = {}
    for k, tensor in enumerate(opt._tensors):
        if tensor.started and own.state:
            state[k] = {"step": number(np.array(opt.t, np.float32))} if own.steps else {}
            for name, key in own.state.items():
                state[k][key] = number(tensor.arrays[name].reshape(tensor.shape).copy())
    return {"state": state, "param_groups": groups}


def from_torch(opt: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Take over the state dict of the PyTorch optimizer with the same formula: hyperparameters, state and t.

    The parameters are not in it. Schedules end: hyperparameters are the numbers of the state dict.

    Raises
    ------
    TypeError, ValueError
        It does not fit, or is of another formula; the message says all that does not, and nothing was changed.
    """
    own = counterpart(opt)
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise TypeError(
            f"the state dict of an optimizer of PyTorch has 'state' and 'param_groups', not {kind(state_dict)}"
        )
    groups, problems = list(state_dict["param_groups"]), []
    sizes = [len(branch.keys) for branch in opt._structure.branches]
    given = [len(group["params"]) for group in groups]
    if given != sizes:
        raise UsageError(f"it is of groups of {given} tensors, here are {sizes}")
    rows = []
    for k, group in enumerate(groups):
        where = opt._hyper.where(k)
        row = dict(own.fixed)
        for name, key in own.hyperparameters.items():
            try:
                row[name] = group[key[0]][key[1]] if isinstance(key, tuple) else group[key]
            except (KeyError, IndexError, TypeError):
                problems.append(f"{where}it has no {key!r}")
        differing = [f"{name}={group[name]!r}" for name, value in own.others.items() if group.get(name, value) != value]
        if differing:
            problems.append(f"{where}it has another formula: {', '.join(differing)}")
        rows.append(row)
    order = [place for group in groups for place in group["params"]]
    entries = [state_dict["state"].get(place, {}) for place in order]
    entries = [entry if all(entry.get(key) is not None for key in own.state.values()) else {} for entry in entries]
    steps = {float(entry["step"]) for entry in entries if "step" in entry and own.steps}
    if len(steps) > 1:
        problems.append(f"its tensors have taken different numbers of steps ({sorted(steps)}), here is one t for all")
    if problems:
        raise UsageError("; ".join(problems))
    build = opt._structure.build
    state = {
        name: build(
            array(entry[key], f"state[{place}][{key!r}]") if entry else tensor.arrays[name].reshape(tensor.shape)
            for place, entry, tensor in zip(order, entries, opt._tensors, strict=True)
        )
        for name, key in own.state.items()
    }
    saved = {
        "rule": opt.rule.name,
        "hash": opt.rule.hash,
        "options": opt._options,
        **({"groups": rows} if opt._structure.grouped else {"hyperparameters": rows[0]}),
        "t": int(steps.pop()) if steps else opt.t if not own.steps else 0,
        "state": state,
        "started": build(bool(entry) or not own.state for entry in entries),
    }
    checked(opt, saved).apply(opt)


def counterpart(opt: Optimizer) -> Counterpart:
    """The optimizer of PyTorch with the formula of a built-in rule."""
    from .catalogue import BUILT_IN

    name = opt.rule.name
    if name not in PYTORCH or opt.rule.hash != BUILT_IN[name].hash:
        known = ", ".join(f"{name} is {own.name}" for name, own in PYTORCH.items())
        raise UsageError(
            f"no optimizer of PyTorch is known to have the formula and the state of rule {name!r} ({known})"
        )
    return PYTORCH[name]


def array(value: Any, label: str) -> Any:
    """An array of the state, as NumPy's."""
    return view(value, label) if is_array(value) or hasattr(value, "detach") else value


def converter() -> Any:
    """What makes a tensor of an array, if PyTorch can be imported."""
    try:
        import torch
    except ImportError:
        return lambda values: values
    return torch.from_numpy
