"""What steps the parameters of some groups: an `optforge.Optimizer` over their memory, and its state as tensors.

It is made of groups and state, which stay what users see; where those change in form, another one is made of them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from ..core.blocks import SCALES
from ..core.diagnostics import UsageError
from ..core.formats import FORMATS, MASTERS
from ..core.ir import Kernel
from ..core.scalars import check_hyperparameters
from ..engines.inputs import same
from ..engines.stats import RECORD, Stats
from ..library.targets import engine as engine_of
from ..train.groups import within
from ..train.optimizer import Optimizer as ArrayOptimizer
from .formulas import Formula
from .tensors import Moved, NativeTensorInputs, TensorInputs, TensorSpace, check, is_sharded, local, on_gpu, spelled

BESIDE = frozenset(own.name for own in MASTERS.values())  # what a master is called in the state
USUAL = "c"  # the target where none is given


@dataclass
class How:
    """How steps are done, whatever the groups are."""

    target: str | None
    threads: int | None
    skip_nonfinite: bool
    zero_grads: bool
    store: dict[str, str]
    master: str | None
    rounding: str = "nearest"
    seed: int = 0


@dataclass
class Target:
    """An engine of the host over tensors: pass it as `target` to `optforge.Optimizer`.

    A `group` of ranks has shards of them.
    """

    name: str
    group: Any = None
    made: list[TensorSpace] = field(default_factory=list)

    def space(self) -> TensorSpace:
        """Where the tensors are."""
        self.made.append(TensorSpace())
        return self.made[-1]

    def __call__(self, rule: Any, kernel: Any) -> Any:
        """The engine of a rule."""
        engine = engine_of(self.name)(rule, kernel)
        engine.inputs = NativeTensorInputs if self.name == "c" else TensorInputs
        if self.group is not None:
            if self.name != "c":
                raise UsageError(f"shards of DTensors are stepped by target 'c', not {self.name!r}")
            from .sharded import plan

            engine.plan = functools.partial(plan, engine, self.group)
        return engine


class Stepper:
    """The steps of some groups.

    Parameters
    ----------
    formula : Formula
    how : How
    groups : sequence of dict
        Parameter groups of PyTorch.
    state : mapping
        For parameters that have had a step, their state; it is copied.

    Raises
    ------
    TypeError, ValueError
        A parameter, a hyperparameter or the state does not do.
    """

    def __init__(self, formula: Formula, how: How, groups: Sequence[dict[str, Any]], state: Mapping[Any, Any]):
        self.formula, self.how = formula, how
        self.members = [list(group["params"]) for group in groups]
        self.params = [p for members in self.members for p in members]
        self.paths = [path(group, k, place) for k, group in enumerate(groups) for place in range(len(group["params"]))]
        self.keys = tuple(dict.fromkeys(key[0] if isinstance(key, tuple) else key for key in formula.keys.values()))
        self.keys += (*formula.options, *formula.others)
        self.options = formula.chosen(groups)
        self.read = itemgetter(*self.keys, "params")  # a tuple, however few hyperparameters there are
        self.rows: list[tuple[Any, ...]] = [()] * len(groups)
        self.variable: set[int] = set()  # groups with hyperparameters that are tensors
        for k, group in enumerate(groups):
            self.note(k, self.row(group))
        self.kernels: dict[frozenset[str], Kernel] = {}  # with fewer asserts
        self.looked = False
        self.entries: list[dict[str, Any] | None] = [None] * len(self.params)
        self.sharded = any(map(is_sharded, self.params))
        self.owners = [local(p) for p in self.params]
        self.opt: ArrayOptimizer  # where there are parameters
        self.empty, self.same = not self.params, same
        for p, label in zip(self.owners, self.paths, strict=True):
            check(p, label)
            if p.device != self.owners[0].device:
                devices = f"{label} is on {p.device}, and {self.paths[0]} on {self.owners[0].device}"
                raise UsageError(f"{devices}: give the parameters of each device an Optimizer of their own")
            if p.device.type not in ("cpu", "cuda"):
                raise UsageError(f"{label} is on {p.device}; parameters are on the CPU or on a CUDA device")
        if not self.params:
            return
        own_groups, owners = [], iter(self.owners)
        for k, (group, members) in enumerate(zip(groups, self.members, strict=True)):
            if members:
                named = "param_names" in group and len(set(group["param_names"])) == len(members)
                names = group["param_names"] if named else range(len(members))
                mine = [next(owners) for _ in members]
                with within(f"param_groups[{k}]: "):
                    row = formula.row(group)
                own_groups.append({"params": dict(zip(names, mine, strict=True)) if named else mine, **row})
        self.row_of = [k for k, members in enumerate(self.members) if members]
        in_blocks = [name for name, own in (how.store or {}).items() if own in FORMATS and FORMATS[own].scales]
        if self.sharded and in_blocks:
            raise UsageError(f"{in_blocks[0]} is in blocks of 8 bits, which shards of DTensors are not: choose bf16")
        target = self.target()
        self.opt = ArrayOptimizer(
            own_groups,
            formula.rule,
            target=target,
            threads=how.threads,
            skip_nonfinite=how.skip_nonfinite,
            zero_grads=how.zero_grads,
            store=how.store,
            master=how.master,
            rounding=how.rounding,
            seed=how.seed,
            **self.options,
        )
        inputs = self.opt._inputs
        self.same = inputs.same
        self.reads = not self.sharded and isinstance(inputs, NativeTensorInputs) and inputs.read()
        self.space = target.made[0]
        self.steps = np.zeros(len(self.params), np.float32)  # what "step" is a view of
        self.take(state)

    def target(self) -> Any:
        """What makes the engine, of the device that the parameters are on."""
        self.gpu = on_gpu(self.owners[0])
        if not self.gpu:
            if self.how.target == "cuda":
                raise UsageError("target 'cuda' steps tensors on a CUDA device, and the parameters are on the CPU")
            return Target(self.how.target or USUAL, self.group())
        if self.how.target not in (None, "cuda"):
            raise UsageError(f"target {self.how.target!r} steps tensors on the CPU; leave target out for a GPU")
        if self.sharded:
            raise UsageError("shards of DTensors are stepped on the CPU so far")
        from .cuda import DeviceTarget

        return DeviceTarget(self.owners[0].device.index or 0)

    def group(self) -> Any:
        """The ranks that have shards of the parameters, or None."""
        if not self.sharded:
            return None
        from .sharded import group_of

        return group_of(self.params, self.paths)

    # ── state ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def names(self) -> dict[str, str]:
        """The state that the kernel has, by its names: what a parameter's state calls it."""
        return {own.name: self.formula.state.get(own.name, own.name) for own in self.opt._kernel.state}

    def entry(self, k: int) -> dict[str, Any]:
        """The state of a parameter as live tensors."""
        tensor, owner, p = self.opt._tensors[k], self.owners[k], self.params[k]
        entry: dict[str, Any] = {}
        if self.formula.steps or self.opt._usual.stochastic:
            entry["step"] = torch.from_numpy(self.steps)[k]
        for name, key in self.names().items():
            if name in tensor.scalars:
                entry[key] = self.space.tensor(tensor.scalars[name])[0]
            else:
                made = self.space.tensor(tensor.arrays[name])
                whole = tensor.has_scales(name)
                entry[key] = made if whole else like(made.as_strided(*self.space.layout(owner)), p)
        return entry

    def show(self, state: Any) -> None:
        """Let the state of parameters have what it is now."""
        if self.empty or self.looked:
            return
        self.opt._settle()
        self.steps[...] = self.opt._progress.counts
        for k, (p, tensor) in enumerate(zip(self.params, self.opt._tensors, strict=True)):
            if tensor.started and self.entries[k] is None:
                made = self.entries[k] = self.entry(k)
                if made:
                    state[p] = {**(state.get(p) or {}), **made}
        self.looked = True

    def edited(self, state: Any) -> bool:
        """Whether somebody has put other tensors, or another count of steps, into the state that was shown."""
        counts = self.steps.astype(np.int64)
        if not self.empty and (counts != self.opt._progress.counts).any():
            return True
        for p, shown in zip(self.params, self.entries, strict=True):
            own = state.get(p) if p in state else None
            if shown is None:
                if own:
                    return True
            elif shown and (own is None or any(own.get(key) is not value for key, value in shown.items())):
                return True
        self.looked = False
        return False

    def take(self, state: Mapping[Any, Any]) -> None:
        """Copy the state of parameters that have had a step."""
        opt, names = self.opt, self.names()
        counts, problems = np.zeros(len(self.params), np.int64), []
        for k, (p, tensor) in enumerate(zip(self.params, opt._tensors, strict=True)):
            entry = state.get(p) if p in state else None
            if not entry:
                continue
            label = f"the state of {self.paths[k]}"
            given = {key: value for key, value in entry.items() if value is not None}
            begun_anew = self.formula.later | BESIDE
            missing = [key for name, key in names.items() if key not in given and name not in begun_anew]
            unknown = [key for key in given if key not in names.values() and key not in ("step", *self.formula.later)]
            if other := BESIDE.intersection(unknown):
                has, own = " and ".join(map(repr, sorted(other))), self.how.master
                mine = f"master={own!r}" if own else "no master"
                problems.append(f"{label} has {has}, and this Optimizer {mine}: give it the master that wrote it")
                continue
            if strange := [key for key in unknown if key.endswith(SCALES)]:
                has = f"{label} has {', '.join(map(repr, strange))}, scales of state of 8 bits"
                problems.append(f"{has}: give this Optimizer the store that wrote it")
                continue
            if missing:
                also = f" and has {', '.join(map(repr, unknown))}" if unknown else ""
                if all(key.endswith(SCALES) for key in missing):
                    also += ", scales of state of 8 bits: give this Optimizer the store that wrote it"
                problems.append(f"{label} lacks {', '.join(map(repr, missing))}{also}")
                continue
            try:
                counts[k] = steps_of(given.get("step"), self.formula, label)
                for name, key in names.items():
                    if key in given:
                        self.write(k, name, given[key], f"{label}: {key!r}")
            except (TypeError, ValueError) as problem:
                problems.append(str(problem))
            tensor.started = True
        if problems:
            shown = [*problems[:5], *([f"and {len(problems) - 5} more"] if len(problems) > 5 else [])]
            raise ValueError("; ".join(shown))
        opt._progress.begin(int(counts.max(initial=0)), counts)
        self.entries = [None] * len(self.params)

    def write(self, k: int, name: str, value: Any, label: str) -> None:
        """Copy a state of a parameter."""
        tensor, owner, p = self.opt._tensors[k], self.owners[k], self.params[k]
        if name in tensor.scalars:
            self.space.write(tensor.scalars[name], float(value))
            return
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{label} is {value!r}, not a tensor")
        scales = tensor.has_scales(name)
        if tuple(value.shape) != (tensor.shape_of(name) if scales else tuple(p.shape)):
            here = f"and there are {tensor.arrays[name].size} blocks" if scales else f"its parameter {tuple(p.shape)}"
            raise ValueError(f"{label} has the shape {tuple(value.shape)}, {here}")
        wanted = self.space.tensor(tensor.arrays[name]).dtype
        if tensor.is_scaled(name) and value.dtype != wanted:
            raise TypeError(f"{label} is {spelled(value)}, and here it is {self.opt.store[name]}, codes in {wanted}")
        if value.dtype.is_complex or value.layout != torch.strided:
            raise TypeError(f"{label} is {spelled(value)} ({value.layout}), not a dense tensor of real numbers")
        array = tensor.arrays[name]
        with torch.no_grad():
            own, given = self.space.tensor(array), value if scales else part(value, p)
            if name == "p_low":  # bits, not numbers
                own, given = own.view(torch.int16), given.view(torch.int16)
            (own if scales else own.as_strided(*self.space.layout(owner))).copy_(given)

    # ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def serves(self, groups: Sequence[dict[str, Any]], state: Any) -> bool:
        """Whether it is for these groups and this state as they are; hyperparameters are taken over.

        Raises
        ------
        TypeError, ValueError
            A hyperparameter does not do.
        """
        if len(groups) != len(self.members) or (self.looked and self.edited(state)):
            return False
        changed = []
        for k, group in enumerate(groups):
            if not self.same(group["params"], self.members[k]):
                return False
            row = self.row(group)
            if row != self.rows[k] or k in self.variable:
                changed.append((k, row))
        if changed:
            if self.formula.chosen(groups) != self.options:
                return False
            for k, row in changed:
                self.assign(k, groups[k])
                self.note(k, row)
        return True

    def row(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        """What a step relies on of a group."""
        try:
            row: tuple[Any, ...] = self.read(group)
            return row
        except KeyError:
            return tuple(group.get(key) for key in self.keys)

    def note(self, k: int, row: tuple[Any, ...]) -> None:
        """Remember the hyperparameters of a group; those that are tensors may change where they are."""
        self.rows[k] = row
        flat = [own for value in row for own in (value if isinstance(value, tuple) else (value,))]
        if any(isinstance(own, torch.Tensor) for own in flat):
            self.variable.add(k)
        else:
            self.variable.discard(k)

    def assign(self, k: int, group: Mapping[str, Any]) -> None:
        """Take over the hyperparameters of a group."""
        if self.empty or k not in self.row_of:
            return
        where = f"param_groups[{k}]: "
        row, hyper = self.formula.row(group, where), self.opt._hyper
        values = hyper.values[self.row_of.index(k)]
        after = [row[name] for name in hyper.names]
        changed = [name for name, old, new in zip(hyper.names, values.tolist(), after, strict=False) if old != new]
        check_hyperparameters(self.asserting(frozenset(changed)), row, where)
        values[: len(after)] = after

    def asserting(self, names: frozenset[str]) -> Kernel:
        """The kernel with those of its asserts that are about some hyperparameters."""
        if names not in self.kernels:
            kernel = self.opt._kernel
            about = [{e.value for e in own.condition.walk() if e.op == "hyper"} for own in kernel.asserts]
            asserts = tuple(own for own, used in zip(kernel.asserts, about, strict=True) if used & names)
            self.kernels[names] = replace(kernel, asserts=asserts)
        return self.kernels[names]

    def step(self, grad_scale: float | None, stats: bool) -> Stats | None:
        """One step with the gradients that the parameters have.

        Raises
        ------
        Moved
            A parameter has another form than when this was made; nothing was written.
        """
        if self.empty:
            return Stats(np.zeros(1, RECORD), [], 0) if stats else None
        opt = self.opt
        if opt._begun is not None or opt._progress.unfinished:
            opt._resolve()
        grads = [None] * len(self.params) if self.reads else [p.grad for p in self.params]
        if self.sharded:
            if not all(local(p) is own for p, own in zip(self.params, self.owners, strict=True)):
                raise Moved
            grads = [None if g is None else local(g) for g in grads]
        if self.gpu:
            from .cuda import in_order

            with in_order(self.owners[0].device):
                told = opt._step(grads, grad_scale, stats)
        else:
            told = opt._step(grads, grad_scale, stats)
        if self.space.copied:
            for gradient in self.space.copied:
                gradient.zero_()
            self.space.copied = []
        return told

    def skip_from_here(self) -> None:
        """Let the device decide whether steps are skipped, which nobody then waits for."""
        if not self.how.skip_nonfinite:
            self.how.skip_nonfinite = True
            opt = self.opt
            opt._set(_usual=replace(opt._usual, skip_nonfinite=True), _how=replace(opt._how, skip_nonfinite=True))

    def skip(self) -> Stats:
        """Leave out a step because of what GradScaler has found; what is told of it."""
        if self.how.zero_grads:
            for p in self.params:
                if p.grad is not None:
                    p.grad.zero_()
        record = np.zeros(1 + len(self.params), RECORD)
        for name in ("grad_norm", "clipped_grad_norm", "param_norm"):
            record[name] = np.nan
        record["skipped"] = 1
        return Stats(record, list(range(len(self.params))), len(self.params))


def path(group: Mapping[str, Any], k: int, place: int) -> str:
    """What messages call a parameter."""
    names = group.get("param_names")
    return f"param_groups[{k}]['params'][{place}]" if names is None else f"parameter {names[place]!r}"


def steps_of(value: Any, formula: Formula, label: str) -> int:
    """The steps that a parameter with state has taken."""
    if value is None:
        if formula.steps and formula.rule.definition.time:
            raise ValueError(f"{label} lacks 'step'")
        return 1  # as far as anybody can tell
    number = float(value)
    if not (number >= 0 and number.is_integer()):
        raise ValueError(f"{label}: 'step' is a whole number from 0, not {value!r}")
    return int(number)


def like(made: Any, p: Any) -> Any:
    """A tensor of state, which is a DTensor where its parameter is one."""
    if not is_sharded(p):
        return made
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(made, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def part(value: Any, p: Any) -> Any:
    """What this process has of a state: of a whole tensor, the shard that it has of the parameter."""
    if is_sharded(value):
        if tuple(value.placements) != tuple(p.placements):
            value = value.redistribute(p.device_mesh, p.placements)
        return local(value)
    if not is_sharded(p):
        return value.detach()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return value.detach()[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
