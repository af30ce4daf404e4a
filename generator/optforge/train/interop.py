"""State dicts of other libraries' optimizers, for rules that share their formula."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.diagnostics import UsageError
from ..engines.arrays import is_array, kind, view
from . import bitsandbytes
from .resume import checked

if TYPE_CHECKING:
    from .optimizer import Optimizer

Key = str | tuple[str, int]  # of a parameter group: a name, or a name and a place in the tuple there


@dataclass(frozen=True)
class Counterpart:
    """The optimizer of PyTorch with the formula of a rule: its names for state and hyperparameters, by ours.

    `fixed` are hyperparameters of ours, `others` settings of theirs, for which alone the formulas are the same. All
    state of ours starts as zeros.
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

# Keys of their groups that no step depends on: names, how to run it, what schedulers note, and, where there is no
# weight decay, its kind.
NEUTRAL = frozenset(
    "params name param_names foreach fused capturable differentiable initial_lr max_lr min_lr base_momentum "
    "max_momentum swa_lr decoupled_weight_decay".split()
)
LATER = frozenset({"maximize", "decoupled_weight_decay", *bitsandbytes.SETTINGS})  # older versions do not have them

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


EIGHT = Counterpart(
    bitsandbytes.NAME, {**BETAS, "weight_decay": "weight_decay"}, fixed={}, others=bitsandbytes.SETTINGS
)


def to_torch(opt: Optimizer) -> dict[str, Any]:
    """The state dict of the PyTorch optimizer with the same formula: `torch_optimizer.load_state_dict(to_torch(opt))`.

    With m=q8, v=uq8 that is the one of bitsandbytes' Adam8bit and AdamW8bit, without weight decay. Otherwise it is Adam
    (for `adam` with lam=1), AdamW, Adadelta and SGD. Parameters are numbered in order, through all groups. The values
    are copies: tensors where PyTorch can be imported, else NumPy arrays.

    Raises
    ------
    ValueError
        No optimizer of PyTorch is known to have the formula of this rule, with these hyperparameters.
    """
    own = counterpart(opt)
    number = converter()
    groups, first = [], 0
    for k, (row, branch) in enumerate(zip(opt._rows(), opt._structure.branches, strict=True)):
        if own is EIGHT and row["weight_decay"]:
            raise UsageError(opt._hyper.where(k) + bitsandbytes.DECAY.format(row["weight_decay"]))
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
    opt._settle()
    steps = opt._progress.counts
    state: dict[int, dict[str, Any]] = {}
    for k, tensor in enumerate(opt._tensors):
        if tensor.started and (own.state or own.name == bitsandbytes.NAME):
            state[k] = {"step": number(np.array(steps[k], np.float32))} if own.steps else {}
            if own.name == bitsandbytes.NAME:
                state[k] = bitsandbytes.entry_of(tensor, int(steps[k]), number)
            for name, key in own.state.items():
                state[k][key] = number(tensor.arrays[name].reshape(tensor.shape).copy())
    return {"state": state, "param_groups": groups}


def from_torch(opt: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Take over the state dict of the PyTorch optimizer with the same formula: hyperparameters, state and steps.

    With m=q8, v=uq8 it is one of bitsandbytes' Adam8bit or AdamW8bit without weight decay, whose small tensors of
    float32 are stored in blocks here, to nearest.

    Each tensor has its own count of steps there and here; `opt.t` is the largest. The parameters are not in it.
    Schedules end: hyperparameters are the numbers of the state dict. A tensor without state there has that of a new
    optimizer.

    Raises
    ------
    TypeError, ValueError
        It does not fit, or is of another formula; the message says all that does not, and nothing was changed.
    """
    own = counterpart(opt)
    groups, saved = parts(state_dict)
    sizes = [len(branch.keys) for branch in opt._structure.branches]
    given = [len(group["params"]) for group in groups]
    if given != sizes:
        raise UsageError(f"it is of groups of {given} tensors, here are {sizes}")
    problems: list[str] = []
    rows = [row_of(own, group, opt._hyper.where(k), problems) for k, group in enumerate(groups)]
    order = [place for group in groups for place in group["params"]]
    entries = [bitsandbytes.unwrapped(saved.get(place, {})) for place in order]
    if own.name != bitsandbytes.NAME and any("state1" in entry for entry in entries):
        raise UsageError(
            "it is of an optimizer of bitsandbytes, which an Optimizer with m=q8, v=uq8 in its store takes"
        )
    counts = [
        (step_of(own, place, entry, problems) or 0) if entry else 0 for place, entry in zip(order, entries, strict=True)
    ]
    known = set(order)
    homeless = [place for place, entry in saved.items() if entry and place not in known]
    if homeless:
        problems.append(f"it has the state of {', '.join(map(repr, homeless))}, which no group has")
    in_blocks = [
        bitsandbytes.state_of(tensor, entry, f"its state[{place}]", array, problems)
        for place, entry, tensor in zip(order, entries, opt._tensors, strict=True)
        if own.name == bitsandbytes.NAME
    ]
    if problems:
        raise UsageError("; ".join(problems))
    build = opt._structure.build
    state = {
        name: build(
            array(entry[key], f"state[{place}][{key!r}]") if entry else np.zeros(tensor.shape, tensor.p.dtype)
            for place, entry, tensor in zip(order, entries, opt._tensors, strict=True)
        )
        for name, key in own.state.items()
    }
    for name in in_blocks[0] if in_blocks else ():
        state[name] = build(entry[name] for entry in in_blocks)
    taken_over = {
        "rule": opt.rule.name,
        "hash": opt.rule.hash,
        "options": opt._options,
        **({"groups": rows} if opt._structure.grouped else {"hyperparameters": rows[0]}),
        "t": max(counts) if own.steps else opt.t,
        "steps": build(counts if own.steps else [opt.t] * len(counts)),
        "state": state,
        "started": build(bool(entry) or not (own.state or in_blocks) for entry in entries),
        "store": opt.store,
    }
    checked(opt, taken_over).apply(opt)


def parts(state_dict: Any) -> tuple[Sequence[Mapping[str, Any]], Mapping[Any, Mapping[str, Any]]]:
    """The groups and the state of a state dict of PyTorch, if it is one."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise TypeError(
            f"the state dict of an optimizer of PyTorch has 'state' and 'param_groups', not {kind(state_dict)}"
        )
    groups, state = state_dict["param_groups"], state_dict["state"]
    if not isinstance(groups, (list, tuple)):
        raise TypeError(f"its 'param_groups' is a list of dicts, not {kind(groups)}")
    if not isinstance(state, Mapping):
        raise TypeError(f"its 'state' is a dict, not {kind(state)}")
    for place, entry in state.items():
        if not isinstance(entry, Mapping):
            raise TypeError(f"its state[{place!r}] is a dict, not {kind(entry)}")
    for k, group in enumerate(groups):
        if not isinstance(group, Mapping):
            raise TypeError(f"its param_groups[{k}] is a dict, not {kind(group)}")
        places = group.get("params")
        if not isinstance(places, (list, tuple)) or not all(isinstance(place, int) for place in places):
            raise TypeError(f"its param_groups[{k}] has no 'params', a list of the numbers of its tensors")
    return groups, state


def row_of(own: Counterpart, group: Mapping[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    """Our hyperparameters of a group of theirs; what does not fit is noted."""
    row: dict[str, Any] = dict(own.fixed)
    for name, key in own.hyperparameters.items():
        try:
            row[name] = group[key[0]][key[1]] if isinstance(key, tuple) else group[key]
        except (KeyError, IndexError, TypeError):
            problems.append(f"{where}it has no {key!r}")
    problems += [f"{where}it has no {name!r}" for name in own.others if name not in group and name not in LATER]
    if own is EIGHT and row.get("weight_decay"):
        problems.append(where + bitsandbytes.DECAY.format(row["weight_decay"]))
    differing = [f"{name}={group[name]!r}" for name, value in own.others.items() if group.get(name, value) != value]
    if differing:
        problems.append(f"{where}it has another formula: {', '.join(differing)}")
    known = {key[0] if isinstance(key, tuple) else key for key in own.hyperparameters.values()}
    unknown = [f"{name}={value!r}" for name, value in group.items() if name not in known | own.others.keys() | NEUTRAL]
    if unknown:
        problems.append(f"{where}it has what {own.name} does not: {', '.join(unknown)}")
    return row


def step_of(own: Counterpart, place: int, entry: Mapping[str, Any], problems: list[str]) -> int | None:
    """The steps that a tensor with state has taken, where it says so; what does not fit of its state is noted."""
    known = [*own.state.values(), *(["step"] if own.steps else [])]
    if own.name == bitsandbytes.NAME:
        entry = {"step": entry.get("step")}  # the others are looked at with their maps
    problems += [f"its state[{place}] has no {key!r}" for key in known if entry.get(key) is None]
    unknown = [repr(key) for key, value in entry.items() if key not in known and value is not None]
    if unknown:
        problems.append(f"its state[{place}] has what {own.name} does not: {', '.join(unknown)}")
    value = entry.get("step") if own.steps else None
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, (str, bytes, bool)) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # PyTorch's of a tensor of several elements
        number = math.nan
    if not (number >= 0 and number.is_integer()):
        problems.append(f"its state[{place}]['step'] is a whole number from 0, not {value!r}")
        return None
    return int(number)


def counterpart(opt: Optimizer) -> Counterpart:
    """The optimizer of PyTorch, or of bitsandbytes, with the formula of a built-in rule."""
    from ..library.rule import BUILT_IN

    name = opt.rule.name
    if bitsandbytes.is_eight(opt) and opt.rule.hash == BUILT_IN[name].hash:
        if name == "adamw":
            return EIGHT
        return replace(EIGHT, hyperparameters=BETAS, fixed={"lam": 1.0}, others={"weight_decay": 0, **EIGHT.others})
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
