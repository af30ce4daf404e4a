"""Checkpoints: everything of a training run that an optimizer has, in one file.

The arrays are `params` and a path, such as params['w'], with the shape of the parameter; `state['m']` and the path; and
for scalar state `state['mu']`, one double for each parameter. The header has

    format           2; format 1 has no "steps"
    rule, origin, hash, options
    t                the optimizer's steps
    grouped          whether there are groups; `branches` has the structure of each: list, tuple or dict, and the keys
    tensors          of each parameter in order: "path", "shape", "dtype", whether it has "started", its own "steps"
    hyperparameters  of each group; `schedules`, where there are any, too
    companions       what was saved with it
"""

from __future__ import annotations

import ast
import contextlib
import copy
import json
import os
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from ..core.diagnostics import UsageError
from ..core.formats import spelled
from ..core.functions import Array
from ..core.scalars import check_hyperparameters
from ..engines.arrays import kind
from ..library.named import named, named_rule
from ..library.rule import Rule
from . import tensorfile
from .checkpoint_header import KEY_LENGTH, malformed, structure_of
from .optimizer_like import OptimizerLike
from .resume import Saved, checked, noting, other_options, other_rule, schedules_to_save

FORMAT = 2
OLDER = (1,)  # formats that are read as well: 1 has one count of steps for all tensors

PathLike = str | os.PathLike[str]
Own = TypeVar("Own", bound=OptimizerLike)


def save(opt: OptimizerLike, path: PathLike, companions: Mapping[str, Any]) -> None:
    """`Optimizer.save`."""
    check_companions(companions)
    opt._inputs.follow()
    structure, tensors, read = opt._structure, opt._tensors, opt._space.read
    arrays = {tensor.label: read(tensor.p).reshape(tensor.shape) for tensor in tensors}
    for state in opt._kernel.state:
        if state.scalar:
            arrays[f"state[{state.name!r}]"] = np.array([tensor.number(state.name) for tensor in tensors])
        else:
            for tensor in tensors:
                arrays[f"state[{state.name!r}]{tensor.path}"] = read(tensor.arrays[state.name]).reshape(
                    tensor.shape_of(state.name)
                )
    header = {
        "format": FORMAT,
        "rule": opt.rule.name,
        "origin": opt.rule.origin,
        "hash": opt.rule.hash,
        "options": opt._options,
        "t": opt.t,
        "grouped": structure.grouped,
        "branches": [
            {"kind": branch.kind.__name__, "keys": [written(key) for key in branch.keys]}
            for branch in structure.branches
        ],
        "tensors": [
            {
                "path": tensor.path,
                "shape": tensor.shape,
                "dtype": str(tensor.p.dtype),
                "started": tensor.started,
                "steps": steps,
            }
            for tensor, steps in zip(tensors, opt._progress.counts.tolist(), strict=True)
        ],
        "stored": {"store": opt.store, "master": opt.master or "", "rounding": opt.rounding, "seed": opt.seed},
        "hyperparameters": opt._rows(),
        "schedules": schedules_to_save(opt._hyper),
        "companions": {name: state_of(name, companion) for name, companion in companions.items()},
    }
    tensorfile.write(path, header, arrays)


def written(key: Any) -> str:
    """A key of a dict of parameters as text that gives it again."""
    text = repr(key)
    try:
        same = ast.literal_eval(text) == key
    except (SyntaxError, ValueError):
        same = False
    if not same or len(text) > KEY_LENGTH:
        raise UsageError(
            f"a checkpoint takes text, numbers and tuples of them as keys of params, not {text[:KEY_LENGTH]}"
        )
    return text


def check_companions(companions: Mapping[str, Any]) -> None:
    """Raise where something cannot be saved with an optimizer, or restored."""
    for name, companion in companions.items():
        for method in ("state_dict", "load_state_dict"):
            if not callable(getattr(companion, method, None)):
                raise TypeError(
                    f"{name!r} is saved by its state_dict() and load_state_dict(); {kind(companion)} has no {method}"
                )


def state_of(name: str, companion: Any) -> Any:
    """The state of what is saved with an optimizer."""
    state = companion.state_dict()
    what = f"the state dict of {name!r} cannot be saved as JSON"
    try:
        json.dumps(state)
    except ValueError as problem:
        raise UsageError(f"{what}: {problem}") from None
    except TypeError:
        pass  # it is found below, with its place
    for difference in unlike_json(state, name):
        raise UsageError(f"{what}: {difference}")
    return state


def unlike_json(value: Any, path: str) -> Iterator[str]:
    """What JSON would not give back of a value; tuples, which it gives back as lists, pass."""
    if isinstance(value, dict):
        for key, own in value.items():
            if not isinstance(key, str):
                yield f"{path} has the key {key!r}, and JSON has text alone as keys; let state_dict() make text of it"
            yield from unlike_json(own, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for place, own in enumerate(value):
            yield from unlike_json(own, f"{path}[{place}]")
    elif value is not None and not isinstance(value, (str, int, float)):
        yield f"{path} is {kind(value)}"


class Load:
    """`opt.load(path)` takes a checkpoint over, `Optimizer.load(path)` makes an optimizer of one."""

    def __get__(self, opt: Own | None, owner: Callable[..., Own]) -> Callable[..., Any]:
        return types.MethodType(create, owner) if opt is None else types.MethodType(load, opt)


def load(opt: OptimizerLike, path: PathLike, /, **companions: Any) -> None:
    """Take a checkpoint over, parameters included, in place; the next step has the bits that it would have had there.

    Parameters
    ----------
    path : path
        A file that `save` wrote, on any target.
    **companions
        What was saved with it under these names; their `load_state_dict` is called.

    Raises
    ------
    OSError
        The file cannot be read.
    TypeError
        A companion has no `state_dict` or no `load_state_dict`.
    ValueError
        It is damaged, or does not fit; the message says all that does not, and nothing was changed.
    """
    check_companions(companions)
    header, arrays = contents(path)
    opt._inputs.follow()
    change = fitting(opt, path, header, arrays, companions)
    # A warning may be made an error: nothing has been changed by then.
    mention_companions(path, header, companions)
    change.warn(3)
    take_over(opt, path, header, companions, change)


def mention_companions(path: PathLike, header: Mapping[str, Any], companions: Mapping[str, Any]) -> None:
    """Warn of what a checkpoint has and nobody asked for."""
    for name in header["companions"]:
        if name not in companions:
            warnings.warn(f"{path} also has the state of {name!r}: opt.load(path, {name}=…) restores it", stacklevel=3)


def create(
    cls: Callable[..., Own],
    path: PathLike,
    *,
    rule: Rule | str | None = None,
    target: Any = "c",
    threads: int | None = None,
    skip_nonfinite: bool = False,
    zero_grads: bool = False,
    **others: Any,
) -> Own:
    """Make an optimizer of a checkpoint, whose parameters are new NumPy arrays, in the structure of those saved.

    What was saved with it, such as a ReduceLROnPlateau, is made over the new optimizer, and restored by
    `opt.load(path, plateau=plateau)`.

    Parameters
    ----------
    path : path
        A file that `save` wrote, on any target.
    rule : Rule or str, optional
        The rule; left out, the built-in one, or composition of built-in ones, that was saved.
    target, threads, skip_nonfinite, zero_grads
        As of the `Optimizer`; they are no part of a checkpoint.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        It is damaged, or is of another rule.
    """
    header, arrays = contents(path)
    for name in others:
        advice = f": make it over the new optimizer, then opt.load(path, {name}={name})"
        raise TypeError(f"Optimizer.load takes no {name!r}{advice if name in header['companions'] else ''}")
    if rule is None and ".py" in header["origin"]:
        raise UsageError(f"{path} is of rule {header['rule']!r} of {header['origin']}: give it as rule=")
    rule = named(header["origin"]) if rule is None else named_rule(rule)
    problems = other_rule(rule, header)
    if not problems and set(header["options"]) != set(rule.options):
        problems.append(f"its options are {sorted(header['options'])}, of the rule {sorted(rule.options)}")
    rows = header["hyperparameters"]
    if not problems and any(set(row) != set(rule.hyperparameters) for row in rows):
        problems.append(f"its hyperparameters are not {', '.join(rule.hyperparameters) or 'none'}")
    if not problems:
        noting(problems, check_settings, rule, header["options"], rows)
    if problems:
        raise UsageError(f"{path} does not fit: {'; '.join(problems)}")
    structure = structure_of(header)
    params = structure.build(arrays[f"params{path}"].copy() for _, path in structure.paths)
    if structure.grouped:
        params = [{"params": part, **row} for part, row in zip(params, rows, strict=True)]
    opt = cls(
        params,
        rule,
        target=target,
        threads=threads,
        skip_nonfinite=skip_nonfinite,
        zero_grads=zero_grads,
        **stored_as(header),
        **header["options"],
        **({} if structure.grouped else rows[0]),
    )
    change = fitting(opt, path, header, arrays, {})
    mention_companions(path, header, {})
    change.warn(3)
    take_over(opt, path, header, {}, change)
    return opt


def stored_as(header: Mapping[str, Any]) -> dict[str, Any]:
    """How the arrays of a checkpoint are stored, as an Optimizer takes it; older ones do not say."""
    stored = {"store": {}, "master": "", "rounding": "nearest", "seed": 0, **header.get("stored", {})}
    bits = any(one["dtype"] == "uint16" for one in header["tensors"])
    return {
        "store": {**stored["store"], **({"p": "bf16"} if bits else {})},
        "master": stored["master"] or None,
        "rounding": stored["rounding"],
        "seed": stored["seed"],
    }


def check_settings(rule: Rule, options: Mapping[str, bool | str], rows: Sequence[Mapping[str, float]]) -> None:
    """Raise ValueError where a rule does not take these options, or these hyperparameters of its groups."""
    for row in rows:
        hyperparameters, _ = rule.settings({**options, **row})
        check_hyperparameters(rule.kernel(**options), hyperparameters)


def contents(path: PathLike) -> tuple[dict[str, Any], dict[str, Array]]:
    """The header and the arrays of a checkpoint."""
    header, arrays = tensorfile.read(path)
    if isinstance(header, dict) and isinstance(header.get("format"), int) and header["format"] not in (*OLDER, FORMAT):
        known = " and ".join(map(str, (*OLDER, FORMAT)))
        raise UsageError(f"{path} is of format {header['format']}, and this version of optforge reads {known}")
    problem = malformed(header, arrays)
    if problem:
        raise UsageError(f"{path} is no checkpoint of optforge: {problem}")
    return header, arrays


def fitting(
    opt: OptimizerLike,
    path: PathLike,
    header: Mapping[str, Any],
    arrays: Mapping[str, Array],
    companions: Mapping[str, Any],
) -> Saved:
    """What a checkpoint changes in an optimizer, its parameters included.

    Raises
    ------
    UsageError
        It does not fit.
    """
    problems = [*other_rule(opt.rule, header), *other_options(opt, header), *other_parameters(opt, header)]
    problems += [f"it has no {name!r}" for name in companions if name not in header["companions"]]
    if not problems:
        problems += missing_state(opt, arrays)
    if not problems:
        try:
            change = checked(opt, as_state_dict(opt, header, arrays))
        except (TypeError, ValueError) as problem:
            problems.append(str(problem))
    if problems:
        raise UsageError(f"{path} does not fit: {'; '.join(problems)}")
    own = [(tensor.p, arrays[tensor.label]) for tensor in opt._tensors]
    return replace(change, changes=[*own, *change.changes])


def take_over(
    opt: OptimizerLike, path: PathLike, header: Mapping[str, Any], companions: Mapping[str, Any], change: Saved
) -> None:
    """Make an optimizer and its companions what a checkpoint says, or nothing of it."""
    before: list[tuple[Any, Any]] = []
    try:
        for name, companion in companions.items():
            before.append((companion, copy.deepcopy(companion.state_dict())))  # it may be what the companion lives on
            companion.load_state_dict(header["companions"][name])
    except BaseException as problem:
        for companion, state in before:
            with contextlib.suppress(Exception):  # the first problem is the one to tell
                companion.load_state_dict(state)
        if not isinstance(problem, Exception):
            raise
        raise UsageError(f"{path} does not fit: {name!r} refuses its state: {problem}") from problem
    change.make(opt)


def other_parameters(opt: OptimizerLike, header: Mapping[str, Any]) -> list[str]:
    """What does not fit of the parameters that were saved."""
    if header["grouped"] != opt._structure.grouped:
        return ["it is of parameters " + ("in groups, here are none" if header["grouped"] else "without groups")]
    saved = {f"params{one['path']}": one for one in header["tensors"]}
    problems = []
    for tensor in opt._tensors:
        one = saved.pop(tensor.label, None)
        if one is None:
            problems.append(f"it has no {tensor.label}")
        elif tuple(one["shape"]) != tensor.shape or one["dtype"] != str(tensor.p.dtype):
            what = f"{tensor.label} is {spelled(np.dtype(one['dtype']))} of shape {tuple(one['shape'])}"
            problems.append(f"its {what}, here {spelled(tensor.p.dtype)} of shape {tensor.shape}")
    return problems + [f"its {label} is not here" for label in saved]


def missing_state(opt: OptimizerLike, arrays: Mapping[str, Array]) -> list[str]:
    """The state that a checkpoint lacks."""
    problems = []
    for own in opt._kernel.state:
        label = f"state[{own.name!r}]"
        given = arrays.get(label)
        if own.scalar and (given is None or given.shape != (len(opt._tensors),) or given.dtype != np.float64):
            problems.append(f"it has no {label} of {len(opt._tensors)} numbers")
        if not own.scalar:
            wanted = [f"{label}{tensor.path}" for tensor in opt._tensors]
            problems += [f"it has no {name}" for name in wanted if name not in arrays]
    return problems


def as_state_dict(opt: OptimizerLike, header: Mapping[str, Any], arrays: Mapping[str, Array]) -> dict[str, Any]:
    """A checkpoint with the parameters of an optimizer as its `state_dict` would be."""
    structure, rows, tensors = opt._structure, header["hyperparameters"], header["tensors"]
    places = {one["path"]: place for place, one in enumerate(tensors)}
    mine = [tensors[places[tensor.path]] for tensor in opt._tensors]
    steps = {"steps": structure.build(one["steps"] for one in mine)} if header["format"] != 1 else {}
    state = {}
    for own in opt._kernel.state:
        label = f"state[{own.name!r}]"
        values = (
            float(arrays[label][places[tensor.path]]) if own.scalar else arrays[f"{label}{tensor.path}"]
            for tensor in opt._tensors
        )
        state[own.name] = structure.build(values)
    return {
        "rule": header["rule"],
        "hash": header["hash"],
        "options": header["options"],
        "t": header["t"],
        **({"groups": rows} if structure.grouped else {"hyperparameters": rows[0]}),
        "state": state,
        "started": structure.build(one["started"] for one in mine),
        "seed": header.get("stored", {}).get("seed", opt.seed),
        "store": stored_as(header)["store"],
        **steps,
        **({"schedules": header["schedules"]} if header["schedules"] else {}),
    }
