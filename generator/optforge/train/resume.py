"""Save what an optimizer is in the middle of, and take it over again: nothing of it unless all of it fits."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..core.formats import FORMATS, raw, spelled
from ..core.functions import Array
from ..core.ir import Kernel
from ..engines.arrays import kind, teller
from ..engines.tensor import Tensor
from ..frontend.settings import check_seed, real
from ..library.rule import Rule
from .hyperparameters import Hyperparameters, Schedules
from .optimizer_like import OptimizerLike
from .structure import Structure


def state_dict(
    opt: OptimizerLike, describe: Callable[[Hyperparameters], list[dict[str, Any]]] | None = None
) -> dict[str, Any]:
    """`Optimizer.state_dict`; `describe` gives what it says of the schedules."""
    structure, hyper = opt._structure, opt._hyper
    rows = [hyper.of(k) for k in range(len(hyper.values))]
    schedules = (describe or schedules_to_save)(hyper)
    return {
        "rule": opt.rule.name,
        "hash": opt.rule.hash,
        "options": dict(opt._options),
        **({"groups": rows} if structure.grouped else {"hyperparameters": rows[0]}),
        "t": opt.t,
        "steps": structure.build(opt._progress.counts.tolist()),
        "state": {
            name: structure.build(
                value if isinstance(value, float) else np.array(opt._space.read(value))
                for value in structure.flatten(tree, name)
            )
            for name, tree in opt.state.items()
        },
        "started": structure.build(tensor.started for tensor in opt._tensors),
        **({"seed": opt.seed} if opt._usual.stochastic else {}),
        **({"store": in_blocks(opt.store)} if in_blocks(opt.store) else {}),
        **({"schedules": schedules} if schedules else {}),
    }


CHAINED = ("first", "following")  # of a chain of schedules
DEEPEST_CHAIN = 100


@dataclass(frozen=True)
class Saved:
    """What a state dict changes in an optimizer, checked: `changes` are own arrays and what they become.

    `lost` are hyperparameters, with their values, that were functions of t which could not be saved.
    """

    t: int
    steps: list[int]
    hyperparameters: tuple[Array, Schedules]
    lost: list[tuple[str, float]]
    started: list[bool]
    changes: list[tuple[Array, Array]]
    seed: int

    def apply(self, opt: OptimizerLike) -> None:
        """Say what is lost, and make the changes."""
        self.warn(4)
        self.make(opt)

    def warn(self, level: int) -> None:
        """Say what is lost: before anything is changed, since a warning may be made an error."""
        for name, value in self.lost:
            message = f"{name} was a function that could not be saved; it is {value!r} from here on"
            warnings.warn(message, stacklevel=level)

    def make(self, opt: OptimizerLike) -> None:
        """Make the changes."""
        progress = opt._progress
        if progress.unfinished:
            opt._set(_begun=None)  # nobody knows whether it was done, and what it changed is replaced
        else:
            opt._settle()
        if hasattr(opt._engine, "applied"):
            opt._engine.applied()  # a device ends what it is at
        progress.undecided, progress.unfinished = False, "a load"
        opt._set(_plan=None)
        for own, given in self.changes:
            opt._space.write(own, given.reshape(-1))
        for tensor, flag in zip(opt._tensors, self.started, strict=True):
            tensor.started = bool(flag)
        opt._hyper.replace(*self.hyperparameters)
        opt._set(seed=self.seed, _usual=replace(opt._usual, seed=self.seed))
        progress.begin(self.t, self.steps)
        tell = teller(tensor.owner for tensor in opt._tensors)
        if tell is not None:
            tell()
        progress.unfinished = ""


def checked(opt: OptimizerLike, saved: Any) -> Saved:
    """What a state dict changes.

    Raises
    ------
    TypeError, ValueError
        It does not fit; the message says all that does not.
    """
    if not isinstance(saved, Mapping):
        raise TypeError(f"a state dict is a dict, not {kind(saved)}")
    grouped = opt._structure.grouped
    mine, other = ("groups", "hyperparameters") if grouped else ("hyperparameters", "groups")
    wanted = ("rule", "hash", "options", mine, "t", "state", "started")
    missing = [name for name in wanted if name not in saved]
    if missing == [mine] and other in saved:
        raise ValueError(
            f"it is of parameters {'without groups, here are some' if grouped else 'in groups, here are none'}"
        )
    if missing:
        raise ValueError(f"the state dict lacks {', '.join(map(repr, missing))}")
    problems = other_rule(opt.rule, saved) + other_options(opt, saved) + other_blocks(opt, saved)
    if problems:  # the rest cannot fit
        raise ValueError("; ".join(problems))

    t = noting(problems, steps_taken, saved["t"])
    rows = saved["groups"] if grouped else [saved["hyperparameters"]]
    hyperparameters, lost = saved_hyperparameters(opt._hyper, rows, saved.get("schedules"), t or 0, problems)
    started = matching(opt._structure, saved["started"], "started", problems)
    for tensor, flag in zip(opt._tensors, started, strict=False):
        if not isinstance(flag, (bool, np.bool_)):
            problems.append(f"started{tensor.path} is {flag!r}, not True or False")
    changes = saved_state(opt._kernel, opt._structure, opt._tensors, saved["state"], problems)
    steps = saved_steps(opt, saved, t, started, problems)
    seed = saved.get("seed", opt.seed)
    noting(problems, check_seed, seed)
    if problems:
        raise ValueError("; ".join(problems))
    return Saved(t, steps, hyperparameters, lost, started, changes, int(seed))


def saved_steps(
    opt: OptimizerLike, saved: Mapping[str, Any], t: int | None, started: Sequence[Any], problems: list[str]
) -> list[int]:
    """The tensors' own counts of steps in a state dict; what does not fit is noted.

    Older ones have one count for all, which is that of each tensor with a step.
    """
    if "steps" not in saved:
        return [t or 0 if flag else 0 for flag in started]
    counts = matching(opt._structure, saved["steps"], "steps", problems)
    for tensor, count in zip(opt._tensors, counts, strict=False):
        given = noting(problems, steps_taken, count, f"steps{tensor.path}")
        if given is not None and t is not None and given > t:
            problems.append(f"steps{tensor.path} is {given}, more than t, which is {t}")
    return counts


def other_rule(rule: Rule, saved: Mapping[str, Any]) -> list[str]:
    """What does not fit of the rule that was saved."""
    if saved["rule"] != rule.name:
        return [f"it is of rule {saved['rule']!r}, this optimizer of {rule.name!r}"]
    return [f"it is of another version of rule {rule.name!r} (the hashes differ)"] if saved["hash"] != rule.hash else []


def other_options(opt: OptimizerLike, saved: Mapping[str, Any]) -> list[str]:
    """What does not fit of the options that were saved."""
    if saved["options"] == opt._options:
        return []
    return [f"its options are {saved['options']!r}, here {opt._options!r}"]


def in_blocks(store: Any) -> dict[str, str]:
    """The arrays of a store that have scales, whose codes do not tell which format they are in."""
    pairs = store.items() if isinstance(store, Mapping) else ()
    return {name: own for name, own in pairs if isinstance(own, str) and own in FORMATS and FORMATS[own].scales}


def other_blocks(opt: OptimizerLike, saved: Mapping[str, Any]) -> list[str]:
    """What does not fit of the state that was saved in blocks."""
    mine, given = in_blocks(opt.store), in_blocks(saved.get("store"))
    if mine == given:
        return []
    told, here = (", ".join(f"{k}={v}" for k, v in own.items()) or "none" for own in (given, mine))
    return [f"its state in blocks of 8 bits is {told}, here {here}"]


def is_codes(given: Array, own: Array) -> bool:
    """Whether an array is the codes that state has, as users see them."""
    return given.dtype == np.uint8 and bool(own.dtype == np.int8)


def steps_taken(value: Any, name: str = "t") -> int:
    """A step count."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is a whole number, not {value!r}")
    if not 0 <= value < 2**63:
        raise ValueError(f"{name} counts steps, and cannot be {value}")
    return int(value)


def schedules_to_save(hyper: Hyperparameters) -> list[dict[str, Any]]:
    """The schedules of each group as a state dict has them; empty where there are none."""
    saved: list[dict[str, Any]] = [{} for _ in hyper.values]
    for (group, name), schedule in hyper.schedules.items():
        saved[group][name] = schedule.to_dict() if hasattr(schedule, "to_dict") else None
        if saved[group][name] is None:
            what = f"{hyper.where(group)}the schedule of hyperparameter {name!r} is {schedule!r}"
            warnings.warn(f"{what}, which cannot be saved; only its present value is", stacklevel=4)
    return saved if hyper.schedules else []


def saved_hyperparameters(
    hyper: Hyperparameters, saved: Any, schedules: Any, t: int, problems: list[str]
) -> tuple[tuple[Array, Schedules], list[tuple[str, float]]]:
    """The hyperparameters of a state dict as `Hyperparameters.replace` takes them; what does not fit is noted.

    Also gives those that were functions which could not be saved, and are numbers here.
    """
    nothing: tuple[tuple[Array, Schedules], list[tuple[str, float]]] = ((hyper.values, hyper.schedules), [])
    number = len(hyper.values)
    schedules = [{}] * number if schedules is None else schedules
    for what, given in (("groups", saved), ("schedules", schedules)):
        if not isinstance(given, (list, tuple)) or len(given) != number:
            shown = f"{len(given)} {what}" if isinstance(given, (list, tuple)) else f"{given!r} for its {what}"
            problems.append(f"it has {shown}, here are {number} groups")
            return nothing
    before = len(problems)
    found, lost = {}, []
    for group, (row, functions) in enumerate(zip(saved, schedules, strict=True)):
        where = hyper.where(group)
        if not isinstance(row, Mapping) or set(row) != set(hyper.names):
            problems.append(f"{where}its hyperparameters are {keys_of(row)}, here {sorted(hyper.names)}")
            continue
        if not isinstance(functions, Mapping) or not set(functions) <= set(hyper.names):
            problems.append(f"{where}its schedules are {keys_of(functions)}, here {sorted(hyper.names)}")
            continue
        values = {name: noting(problems, real, name, row[name], where) for name in hyper.names}
        for name, described in functions.items():
            if described is not None:
                found[group, name] = noting(problems, schedule_of, described)
            elif (group, name) in hyper.schedules:
                found[group, name] = hyper.schedules[group, name]
            else:
                lost.append((f"{where}hyperparameter {name!r}", values[name]))
    if len(problems) > before:
        return nothing
    changed = noting(problems, hyper.changed, saved, found, max(t, 1))
    return (changed, lost) if changed else nothing


def schedule_of(described: Any) -> Any:
    """The schedule that a dict describes.

    Raises
    ------
    TypeError, ValueError
        It describes none.
    """
    inner, depth = [described], 0
    while inner:
        inner = [own[part] for own in inner if isinstance(own, Mapping) for part in CHAINED if part in own]
        depth += 1
        if depth > DEEPEST_CHAIN or len(inner) > DEEPEST_CHAIN:
            raise ValueError(f"a schedule is a chain of at most {DEEPEST_CHAIN} parts")
    return importlib.import_module(".schedules", __package__).from_dict(described)


def saved_state(
    kernel: Kernel, structure: Structure, tensors: Sequence[Tensor], saved: Any, problems: list[str]
) -> list[tuple[Array, Array]]:
    """Own state with what a state dict has for it; what does not fit is noted."""
    names = [state.name for state in kernel.state]
    if not isinstance(saved, Mapping) or set(saved) != set(names):
        problems.append(f"its state is {keys_of(saved)}, here {sorted(names)}")
        return []
    changes = []
    for state in kernel.state:
        values = matching(structure, saved[state.name], state.name, problems)
        for tensor, value in zip(tensors, values, strict=False):
            label = f"state[{state.name!r}]{tensor.path}"
            try:
                given = raw(np.asarray(value))
            except (TypeError, ValueError) as problem:
                problems.append(f"{label} is no array: {problem}")
                continue
            if state.scalar:
                own = tensor.scalars[state.name]
                if given.shape != () or given.dtype.kind not in "fiu":
                    what = f"{given.dtype} of shape {given.shape}" if given.shape else repr(value)
                    problems.append(f"{label} is {what}, here a number")
            else:
                own = tensor.arrays[state.name]
                shape = tensor.shape_of(state.name)
                given = given.view(own.dtype) if is_codes(given, own) else given
                if given.shape != shape or given.dtype != own.dtype:
                    what = f"{label} is {spelled(given.dtype)} of shape {given.shape}"
                    problems.append(f"{what}, here {spelled(own.dtype)} of shape {shape}")
            changes.append((own, given))
    return changes


def matching(structure: Structure, tree: Any, name: str, problems: list[str]) -> list[Any]:
    """The values of a saved structure; empty, with a problem noted, where it is unlike `params`."""
    values = structure.saved(tree)
    if values is None:
        problems.append(f"its {name!r} does not have the structure of params")
    return values or []


def noting(problems: list[str], function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives; None, with its complaint noted, where it refuses."""
    try:
        return function(*arguments)
    except (TypeError, ValueError) as problem:
        problems.append(str(problem))
        return None


def keys_of(thing: Any) -> str:
    """The keys of a mapping, or whatever it is, for messages."""
    return str(sorted(map(str, thing))) if isinstance(thing, Mapping) else repr(thing)
