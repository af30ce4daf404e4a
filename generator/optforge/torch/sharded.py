"""Steps over shards of DTensors: what is added up over all of them travels between ranks as sums of leaves.

Each rank adds up the leaves that it has, of 1,024 elements each; an all-reduce, in which every sum has one rank that it
comes from and zeros from the others, gives them to all; and each rank folds them by the one tree. So the bits of norms,
and of what follows from them, do not depend on the number of ranks, where shards begin and end at leaves. A parameter
whose shards do not is added up shard by shard: its norm is within some rounding errors of a double of the other.

Of chunks of 32 leaves that one rank has whole, it folds the leaves first: one sum travels instead of 32.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..core.diagnostics import UsageError
from ..core.functions import Array
from ..core.summation import CHUNK, LEAF
from ..engines.arrays import address
from ..engines.c.engine import SKIPPED, CEngine, CPlan, Table
from ..engines.stats import NORMS, RECORD
from ..engines.tensor import How
from .tensors import is_sharded

LEAVES = CHUNK // LEAF  # of a chunk


@dataclass(frozen=True)
class Shards:
    """How a parameter is spread over the ranks of a group.

    `begins` are where the shards begin and the last ends, counted in elements of the parameter where they are ranges of
    it (`ranges`), else of the shards laid end to end. A parameter that all ranks have is one shard, of the first rank.
    """

    begins: tuple[int, ...]
    ranges: bool
    whole: bool = False

    @property
    def at_leaves(self) -> bool:
        """Whether leaves of the parameter are leaves of shards."""
        return self.ranges and all(begin % LEAF == 0 or begin == self.begins[-1] for begin in self.begins)


@dataclass(frozen=True)
class Group:
    """The ranks that parameters are spread over, and how each is.

    Attributes
    ----------
    process_group : ProcessGroup
    rank, size : int
        This one, and how many there are.
    shards : tuple of Shards
    """

    process_group: Any
    rank: int
    size: int
    shards: tuple[Shards, ...]


def group_of(params: Sequence[Any], labels: Sequence[str]) -> Group | None:
    """The ranks that some parameters are spread over; None where each rank has all of them.

    Raises
    ------
    ValueError
        They are spread over different ranks, or over two dimensions of a mesh.
    """
    found: tuple[Any, int, str] | None = None
    meshes: list[int | None] = []
    for p, label in zip(params, labels, strict=True):
        dims = [d for d, own in enumerate(p.placements) if not own.is_replicate()] if is_sharded(p) else []
        dims = [d for d in dims if p.device_mesh.size(d) > 1 or len(p.placements) == 1]
        if any(p.placements[d].is_partial() for d in dims):
            raise UsageError(f"{label} is a DTensor of partial sums; a parameter is sharded or replicated")
        if len(dims) > 1:
            raise UsageError(f"{label} is sharded over {len(dims)} dimensions of its mesh; one can be stepped so far")
        meshes.append(dims[0] if dims else None)
        if not dims:
            continue
        own = p.device_mesh.get_group(dims[0])
        if found is None:
            found = own, dims[0], label
        elif dist.get_process_group_ranks(own) != dist.get_process_group_ranks(found[0]):
            raise UsageError(f"{label} is sharded over other ranks than {found[2]}: give them Optimizers of their own")
    if found is None:
        return None
    size = dist.get_world_size(found[0])
    shards = tuple(spread(p, dim, size) for p, dim in zip(params, meshes, strict=True))
    return Group(found[0], dist.get_rank(found[0]), size, shards)


def spread(p: Any, mesh_dim: int | None, size: int) -> Shards:
    """How a parameter is spread."""
    if mesh_dim is None:
        return Shards((0, p.numel()), ranges=True, whole=True)
    placement = p.placements[mesh_dim]
    rows = p.shape[placement.dim]
    each = -(-rows // size)  # as torch.chunk cuts them
    cuts = [min(k * each, rows) for k in range(size + 1)]
    row = p.numel() // rows if rows else 0
    plain = type(placement).__name__ == "Shard" and placement.dim == 0 and p.stride() == contiguous(p.shape)
    return Shards(tuple(cut * row for cut in cuts), ranges=plain)


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(torch.empty(tuple(shape), device="meta").stride())


class ShardedPlan(CPlan):
    """A `CPlan` over shards: where a step adds up, all ranks of the group do it together."""

    def __init__(self, engine: CEngine, group: Group, inputs: Any, behind: Array):
        super().__init__(engine.library, engine.kernel, inputs, behind)
        self.group = group
        self.shards = [group.shards[place] for place in inputs.places]
        self.together: bool | None = None
        kernel = engine.kernel
        self.per_tensor = bool(kernel.scalar_state) or any(own.scope == "tensor" for own in kernel.scalars)
        self.folds = not any(own.kind == "max" for own in kernel.reductions)
        self.work = self.library.ffi.new("optforge_work *")

    def set(self, how: How) -> None:
        """`CPlan.set`."""
        together = self.kernel.reduces or self.per_tensor or how.skip_nonfinite or how.stats is not None
        if together != self.together:
            self.place(together)
            self.together = together
        if how.stats is not None:
            self.records = np.zeros(1 + len(self.sizes), RECORD)
        super().set(how if how.stats is None else replace(how, stats=self.records))
        self.last = how

    def place(self, together: bool) -> None:
        """Number what this rank has among what all have: whole parameters, or shards that do not end at leaves."""
        group, ffi = self.group, self.library.ffi
        self.entries: list[tuple[int, int]] = []  # of each parameter: its first number, and how many it has
        numbers: list[int] = []
        parts: list[int] = []
        sizes: list[int] = []
        owners: list[tuple[int, ...]] = []
        for k, own in enumerate(self.shards):
            n = own.begins[-1]
            if own.whole or (own.at_leaves if together else own.ranges):
                self.entries.append((len(sizes), 1))
                numbers.append(len(sizes))
                parts.append(0 if own.whole else own.begins[group.rank])
                sizes.append(n)
                owners.append((0, *own.begins[1:]) if not own.whole else (0, *[n] * group.size))
                continue
            if together and self.per_tensor and group.size > 1:
                label = self.inputs.stepped[k].label
                raise UsageError(
                    f"{label} has shards that do not end at multiples of {LEAF} elements, and rule "
                    f"{self.kernel.name!r} adds up over each parameter: shard it otherwise, or leave it whole"
                )
            self.entries.append((len(sizes), group.size))
            numbers.append(len(sizes) + group.rank)
            parts.append(0)
            for r, (begin, end) in enumerate(itertools.pairwise(own.begins)):
                sizes.append(end - begin)
                owners.append((*[0] * (r + 1), *[end - begin] * (group.size - r)))
        self.sizes, number, part = (np.array(values, np.uint64) for values in (sizes, numbers, parts))
        self.numbers = []
        for own, members in zip(self.own, self.places, strict=True):
            pair = number[members.astype(np.intp)].copy(), part[members.astype(np.intp)].copy()
            own.number, own.part = (ffi.cast("size_t *", address(values)) for values in pair)
            self.numbers.append(pair)
        self.options.tensors, self.options.sizes = len(sizes), ffi.cast("size_t *", address(self.sizes))
        self.options.checked = 0
        self.travel(owners)

    def travel(self, owners: Sequence[Sequence[int]]) -> None:
        """Which sums of leaves travel; `owners` has for each number where the shares of ranks begin and end."""
        first = 0
        travel: list[int] = []
        folded: list[int] = []
        mine: list[Array] = []
        rank = self.group.rank
        for begins in owners:
            cuts = [-(-begin // LEAF) for begin in begins]
            leaves = cuts[-1]
            own = np.zeros(leaves, bool)
            own[cuts[rank] : cuts[rank + 1]] = True
            mine.append(own)
            broken = {cut // LEAVES for cut in cuts[1:-1] if cut % LEAVES} | {leaves // LEAVES}
            for chunk in range(-(-leaves // LEAVES)):
                begin = first + chunk * LEAVES
                if chunk in broken or not self.folds:
                    travel += range(begin, min(begin + LEAVES, first + leaves))
                else:
                    travel.append(begin)
                    folded.append(begin)
            first += leaves
        self.moving, self.chunks = np.array(travel, np.intp), np.array(folded, np.intp)
        self.elsewhere = np.flatnonzero(~np.concatenate([*mine, np.zeros(0, bool)]))
        self.leaves = first

    def step(self, hyperparameters: Any, t: int, how: How) -> bool:
        """`CPlan.step`; every rank of the group calls it, where the step adds up."""
        if how is not self.last:
            self.set(how)
        if not self.together:
            return super().step(hyperparameters, t, how)
        calls, work = self.library.calls, self.work
        hyper = self.library.ffi.from_buffer(hyperparameters if self.rows is None else hyperparameters[self.rows])
        for own in self.own:
            own.hyper, own.t = hyper, t - self.late
        for steps, behind in self.steps:
            np.subtract(t, behind, out=steps)
        status = calls.begin(work, self.lists, self.number, self.options)
        if status > 0:
            self.explain(status, hyperparameters, t, how)
        self.options.checked = 1
        number = self.library.ffi.new("size_t *")
        for phase in range(work.phases):
            calls.share(work, phase, 0, 1)
            sums = calls.partials(work, phase, number)
            if number[0]:
                self.reduce(np.frombuffer(self.library.ffi.buffer(sums, 8 * number[0])).reshape(-1, self.leaves))
            status = calls.fold(work, phase)
        if status > 0:
            self.explain(status, hyperparameters, t, how)
        if how.stats is not None:
            self.tell(how.stats)
        return bool(status == SKIPPED)

    def reduce(self, sums: Array) -> None:
        """Give the sums of leaves, a row for each of what is added up, to all ranks."""
        sums[:, self.elsewhere] = 0  # what all ranks have comes from one
        if len(self.chunks):
            parts = sums[:, self.chunks[:, None] + np.arange(LEAVES)]
            width = LEAVES
            while width > 1:
                width //= 2
                parts[..., :width] += parts[..., width : 2 * width]
            sums[:, self.chunks[:, None] + np.arange(LEAVES)] = 0
            sums[:, self.chunks] = parts[..., 0]
        moving = torch.from_numpy(np.ascontiguousarray(sums[:, self.moving]))
        dist.all_reduce(moving, group=self.group.process_group)
        sums[:, self.moving] = moving.numpy()

    def tell(self, stats: Array) -> None:
        """Write the statistics of parameters, from those of their shards."""
        stats[0] = self.records[0]
        for k, (first, count) in enumerate(self.entries, 1):
            entries = self.records[1 + first : 1 + first + count]
            stats[k] = entries[0]
            if count > 1:
                own = stats[k]
                for name in NORMS:
                    own[name] = np.sqrt(np.sum(entries[name] ** 2))
                own["nan"], own["inf"] = entries["nan"].sum(), entries["inf"].sum()
                with np.errstate(all="ignore"):
                    own["max_update_ratio"] = own["update_norm"] / own["param_norm"] if own["update_norm"] else 0.0
        stats[0]["max_update_ratio"] = np.max(stats[1:]["max_update_ratio"], initial=0.0)


def plan(engine: CEngine, group: Group, inputs: Any, behind: Array) -> ShardedPlan:
    """The plan of an engine over shards."""
    if inputs.table is None:
        inputs.table = Table(engine.kernel, inputs.tensors)
    return ShardedPlan(engine, group, inputs, behind)
