"""Which phase computes what: the plan that moves the fewest bytes.

A value can be computed in the first phase behind the reductions that enter it, or in any later one. Free to choose
are the phase of each reduction and the phase in which each output is stored. What a phase needs is found backwards from
what it stores and adds up, and ends at what memory already holds: the old arrays as long as they are not overwritten,
and the outputs that an earlier phase has stored. All choices are compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..core.ir import Expr, Let, Phase, Reduction, ScalarGroup, Type

Element = Let | Reduction
Stores = tuple[tuple[str, Expr], ...]

MOST_PLANS = 20_000
MOST_WORK = 250_000  # plans times bindings: of more, some are compared


@dataclass(frozen=True)
class Planned:
    """Phases, the scalars between them, and observed reductions that turned out to be others (`shared`, by id)."""

    phases: tuple[Phase, ...]
    scalars: tuple[ScalarGroup, ...]
    shared: Mapping[int, int]


@dataclass(frozen=True)
class Slice:
    """What one phase loads, and the bindings that it computes or loads."""

    loads: frozenset[str]
    lets: Mapping[int, Let]


class Planner:
    """Plans the phases of one kernel.

    Parameters
    ----------
    arrays : sequence of str
        Names of arrays in the order of the signature.
    elements : sequence of Let or Reduction
        In the order of the text.
    scalars : sequence of Let
    order : sequence of Let
        All bindings, each behind those that it reads.
    stores : pairs of names and values
        What is written back.
    inexact : set of str
        Arrays that are rounded when they are stored, so that no phase may read them back.
    cost : callable
        What a phase costs, from the names that it loads and those that it stores.
    """

    def __init__(
        self,
        arrays: Sequence[str],
        elements: Sequence[Element],
        scalars: Sequence[Let],
        order: Sequence[Let],
        stores: Stores,
        inexact: frozenset[str],
        cost: Callable[[Iterable[str], Iterable[str]], float],
    ):
        self.inexact, self.cost = inexact, cost
        self.arrays, self.elements, self.scalars, self.stores = arrays, elements, scalars, stores
        self.lets = {item.id: item for item in elements if isinstance(item, Let)}
        self.reductions = {item.id: item for item in elements if isinstance(item, Reduction)}
        self.below: dict[int, frozenset[int]] = {}
        for let in order:
            self.below[let.id] = self.entering(let.expr)
        self.needed = [r for r in self.reductions.values() if not r.observed]

    def entering(self, expr: Expr) -> frozenset[int]:
        """The ids of all reductions that enter an expression."""
        found: set[int] = set()
        for e in expr.walk():
            if e.op == "ref" and isinstance(e.value, int):
                found |= self.below[e.value]
            elif e.op in ("sum", "total") and isinstance(e.value, int):
                found |= {e.value} | self.entering(self.reductions[e.value].value)
        return frozenset(found)

    def earliest(self, expr: Expr, phase_of: Mapping[int, int]) -> int:
        """The first phase that can compute an expression."""
        return max((phase_of[id] + 1 for id in self.entering(expr)), default=0)

    # ── the search ──────────────────────────────────────────────────────────────────────────────────────────────

    def plan(self, statistics: Mapping[str, int]) -> Planned:
        """The best plan, with the observed reductions put where they cost least."""
        watched = [r.value for r in self.reductions.values() if r.observed]
        first: dict[int, int] = {}
        for reduction in self.needed:
            first[reduction.id] = self.earliest(reduction.value, first)
        number = 1 + max(
            [0, *first.values(), *(self.earliest(value, first) for value in [*dict(self.stores).values(), *watched])],
        )
        best = min(self.candidates(first, number), key=lambda candidate: candidate[0])
        _, phase_of, stored_in = best
        phase_of = dict(phase_of)
        shared = self.observe(phase_of, stored_in, statistics, number)
        phases = [self.phase(k, phase_of, stored_in) for k in range(number)]
        reading = [k for k, phase in enumerate(phases) if "g" in phase.loads]
        zeroing = reading[-1] if reading else number - 1
        phases[zeroing] = replace(phases[zeroing], zeroes=True)
        if phases[0].stores or not any(reduction.counts for reduction in phases[0].reductions):
            phases.insert(0, self.scan())
            phase_of = {id: k + 1 for id, k in phase_of.items()}
        return Planned(tuple(phases), tuple(self.groups(phase_of)), shared)

    def candidates(
        self, first: Mapping[int, int], number: int
    ) -> Iterator[tuple[tuple[float, ...], dict[int, int], dict[str, int]]]:
        """The plans that can be carried out: cost, phase of each reduction, phase of each store."""
        watched = [r.value for r in self.reductions.values() if r.observed]
        free = number ** (len(self.needed) + len(self.stores))
        many = free > MOST_PLANS or free * len(self.lets) > MOST_WORK
        for chosen in itertools.product(*([first[r.id], *range(first[r.id] + 1, number)] for r in self.needed)):
            phase_of = dict(zip((r.id for r in self.needed), chosen, strict=True))
            if any(self.earliest(r.value, phase_of) > phase_of[r.id] for r in self.needed):
                continue
            possible = [range(self.earliest(value, phase_of), number) for _, value in self.stores]
            if not all(possible):
                continue
            if many:
                possible = self.fewer(possible)
            for stored in itertools.product(*possible):
                stored_in = dict(zip((name for name, _ in self.stores), stored, strict=True))
                slices = [self.slice(self.roots(k, phase_of, stored_in), k, stored_in) for k in range(number)]
                if None not in slices and all(self.places(value, phase_of, stored_in, number) for value in watched):
                    written = [[name for name, own in stored_in.items() if own == k] for k in range(number)]
                    moved = sum(self.cost(own.loads, written[k]) for k, own in enumerate(slices) if own)
                    # Of equal plans the one that writes late is best: reading alone can be given up without a loss.
                    yield (moved, -sum(stored), -sum(chosen)), phase_of, stored_in
            if many:
                return

    def fewer(self, possible: Sequence[range]) -> list[range]:
        """Some of the places that stores can have: those that differ first and last, as many as can be compared.

        Of the others all are stored last, which is always possible.
        """
        tried, work = [], 1
        for k in possible:
            ends = range(k.start, k.stop, max(1, k.stop - 1 - k.start))
            more = work * len(ends) * len(self.lets) * k.stop * 10 <= MOST_WORK
            tried.append(ends if more else range(k.stop - 1, k.stop))
            work *= len(tried[-1])
        return tried

    def places(self, value: Expr, phase_of: Mapping[int, int], stored_in: Mapping[str, int], number: int) -> list[int]:
        """The phases that can compute a value."""
        possible = range(self.earliest(value, phase_of), number)
        return [k for k in possible if self.slice([value], k, stored_in) is not None]

    def roots(self, k: int, phase_of: Mapping[int, int], stored_in: Mapping[str, int]) -> list[Expr]:
        """What phase k is there for."""
        stored = [value for name, value in self.stores if stored_in[name] == k]
        return stored + [self.reductions[id].value for id, own in phase_of.items() if own == k]

    def slice(self, roots: Iterable[Expr], k: int, stored_in: Mapping[str, int]) -> Slice | None:
        """What phase k computes for some roots; None where it needs what has been overwritten."""
        exact = [(name, value) for name, value in self.stores if name not in self.inexact]
        in_memory = {value.value: name for name, value in exact if stored_in[name] < k and value.op == "ref"}
        overwritten = {name for name, _ in self.stores if stored_in[name] < k}
        loads: set[str] = set()
        lets: dict[int, Let] = {}
        pending = list(roots)
        while pending:
            for e in pending.pop().walk():
                if e.op == "load":
                    if e.value in overwritten:
                        return None
                    loads.add(str(e.value))
                elif e.op == "ref" and isinstance(e.value, int) and e.value in self.lets and e.value not in lets:
                    let = self.lets[e.value]
                    if e.value in in_memory:
                        name = in_memory[e.value]
                        loads.add(name)
                        lets[let.id] = replace(let, expr=Expr("load", Type.ELEMENT, value=name))
                    else:
                        lets[let.id] = let
                        pending.append(let.expr)
        return Slice(frozenset(loads), lets)

    # ── what the statistics need ────────────────────────────────────────────────────────────────────────────────

    def observe(
        self, phase_of: dict[int, int], stored_in: Mapping[str, int], statistics: Mapping[str, int], number: int
    ) -> dict[int, int]:
        """Give each observed reduction a phase in which it reads as little as possible more."""
        shared: dict[int, int] = {}
        usual = [self.slice(self.roots(k, phase_of, stored_in), k, stored_in) for k in range(number)]
        for id in dict.fromkeys(statistics.values()):
            own = self.reductions[id]
            if "p" in self.inexact and "p" in stored_in and id in (statistics["param"], statistics.get("update")):
                phase_of[id] = stored_in["p"]  # they are of what is stored
                continue
            costs = []
            for k in range(self.earliest(own.value, phase_of), number):
                more = self.slice([*self.roots(k, phase_of, stored_in), own.value], k, stored_in)
                before = usual[k]
                if more and before:
                    costs.append((len(more.loads) - len(before.loads), len(more.lets) - len(before.lets), k))
            _, _, best = min(costs)
            if own.counts:
                best = next((k for k, part in enumerate(usual) if part and "g" in part.loads), 0)
            same = [r for r in self.needed if (r.kind, r.value) == (own.kind, own.value) and phase_of[r.id] == best]
            if same:
                shared[id] = same[0].id
                self.replace_reduction(id, same[0].id, own.counts)
            else:
                phase_of[id] = best
        return shared

    def replace_reduction(self, id: int, other: int, counts: bool) -> None:
        """Let another reduction stand for an observed one."""
        self.reductions[other] = replace(self.reductions[other], counts=counts or self.reductions[other].counts)
        self.elements = [item for item in self.elements if not (isinstance(item, Reduction) and item.id == id)]

    def scan(self) -> Phase:
        """The phase that looks at the gradients, where the others begin to write before all of them have been seen."""
        counting = next(r for r in self.reductions.values() if r.counts)
        own = self.slice([counting.value], 0, {name: 0 for name, _ in self.stores})
        assert own is not None
        made = replace(counting, id=max(self.reductions) + 1, name=f"scanned_{counting.name}", observed=True)
        return Phase(("g",), (*own.lets.values(), made), (), optional=True)

    # ── the result ──────────────────────────────────────────────────────────────────────────────────────────────

    def phase(self, k: int, phase_of: Mapping[int, int], stored_in: Mapping[str, int]) -> Phase:
        """Phase k."""
        own = self.slice(self.roots(k, phase_of, stored_in), k, stored_in)
        assert own is not None
        body: list[Element] = []
        for item in self.elements:
            if isinstance(item, Let):
                if item.id in own.lets:
                    body.append(own.lets[item.id])
            elif phase_of.get(item.id) == k:
                body.append(self.reductions[item.id])
        stores = tuple((name, value) for name, value in self.stores if stored_in[name] == k)
        return Phase(tuple(name for name in self.arrays if name in own.loads), tuple(body), stores)

    def groups(self, phase_of: Mapping[int, int]) -> Iterator[ScalarGroup]:
        """The scalars in groups that are computed together."""
        places: dict[int, tuple[int, bool]] = {}
        for let in self.scalars:
            own = [(0, False)]
            for e in let.expr.walk():
                if e.op in ("state", "starting", "size"):
                    own.append((0, True))
                elif e.op in ("sum", "total") and isinstance(e.value, int):
                    own.append((phase_of[e.value] + 1, e.op == "sum"))
                elif e.op == "ref" and isinstance(e.value, int):
                    own.append(places[e.value])
            places[let.id] = (max(k for k, _ in own), any(tensor for _, tensor in own))
        for k, tensor in sorted(set(places.values())):
            lets = tuple(let for let in self.scalars if places[let.id] == (k, tensor))
            yield ScalarGroup("tensor" if tensor else "step", k, lets)
