"""What people use today: each library that is installed, checked to compute the same, and then timed in turns."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...core.diagnostics import EnvironmentProblem, UsageError, nearest
from ...library.rule import BUILT_IN
from .. import machine, statistics
from ..kernels import Compiled
from ..measure import turns
from ..models import Model
from .side import Disagreement, NoPeer, Problem, Side, Turn, agree, first_steps

BLOCK_SECONDS, SETTLE_SECONDS = 0.03, 0.015
FEWEST = 5
OVERTIME = 1.5  # of the time, after which nothing more is compared
LEAST_SECONDS = 10.0
HUGE = 48 << 20  # elements beyond which gradients are new ones only
PATTERN = 1 << 18
DIFFER = "the results differ"  # begins a note that ends in exit code 1


@dataclass(frozen=True)
class Peer:
    """A library: the packages that it needs, the module and the function that make its sides, and what it is."""

    packages: tuple[str, ...]
    module: str
    function: str
    doc: str
    usual: bool = True

    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]

    def sides(self, problem: Problem) -> list[Side]:
        """Its ways to do a problem."""
        return list(getattr(importlib.import_module(f".{self.module}", __package__), self.function)(problem))


PEERS: dict[str, Peer] = {
    "torch": Peer(("torch",), "pytorch", "sides", "PyTorch: fused, foreach and for-loop"),
    "torch-fused": Peer(("torch",), "pytorch", "fused", "PyTorch's fused", False),
    "torch-foreach": Peer(("torch",), "pytorch", "foreach", "PyTorch's foreach", False),
    "torch-loop": Peer(("torch",), "pytorch", "loop", "PyTorch's loop over tensors", False),
    "torch-compile": Peer(("torch",), "pytorch", "compiled", "PyTorch under torch.compile", False),
    "optax": Peer(("optax", "jax"), "optax", "sides", "optax under jit"),
    "numba": Peer(("numba",), "loops", "numba", "a loop compiled by numba"),
    "numpy": Peer(("numpy",), "loops", "plain", "the rule's text on NumPy"),
    "deepspeed": Peer(("deepspeed", "torch"), "deepspeed", "sides", "DeepSpeed's CPUAdam"),
}


def chosen(names: Sequence[str]) -> dict[str, Peer]:
    """What `--against` names; "all" are those that are installed, but the ones that are asked for by their own names.

    Raises
    ------
    UsageError
        There is none of a name.
    EnvironmentProblem
        One is not installed.
    """
    found: dict[str, Peer] = {}
    for name in names:
        if name == "all":
            found |= {own: peer for own, peer in PEERS.items() if peer.usual and not peer.missing()}
        elif name not in PEERS:
            listed = f"; there are {', '.join(PEERS)}, and all"
            raise UsageError(f"--against {name}: there is no such peer{nearest(name, PEERS) or listed}")
        elif missing := PEERS[name].missing():
            raise EnvironmentProblem(f"--against {name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
        else:
            found[name] = PEERS[name]
    return found


def problem(own: Compiled, settings: dict[str, Any], model: Model, threads: int) -> Problem:
    """What all sides compute, with hyperparameters for which formulas are the same."""
    from .pytorch import FORMULAS

    rule = own.rule
    hyperparameters, options = rule.settings({**rule.definition.settings, **settings})
    last = rule.definition.last
    if last.name in FORMULAS and last.hash == BUILT_IN[last.name].definition.last.hash:
        hyperparameters = {**hyperparameters, **FORMULAS[last.name][3]}
    random = np.random.default_rng(11)
    p = (0.02 * random.standard_normal(PATTERN)).astype(np.float32)
    g = (1e-3 * random.standard_normal(PATTERN)).astype(np.float32)
    params = [np.resize(np.roll(p, 61 * k)[: max(int(np.prod(s)), 1)], s) for k, s in enumerate(model.shapes)]
    grads = [np.resize(np.roll(g, 61 * k)[: max(int(np.prod(s)), 1)], s) for k, s in enumerate(model.shapes)]
    return Problem(rule, hyperparameters, options, model, params, grads, threads)


@dataclass(frozen=True)
class Plan:
    """One comparison: a rule over a model on so many threads."""

    own: Compiled
    settings: dict[str, Any]
    model: Model
    threads: int
    weight: float


def measure(
    plans: Sequence[Plan],
    wanted: dict[str, Peer],
    seconds: float,
    progress: Callable[[str, float], None],
    note: Callable[[str], None],
    about: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Compare on all of them; sides that compute something else are noted, and not timed."""
    late: list[str] = []
    seen: set[str] = set()  # each rule is compared once at least
    total, start = sum(plan.weight for plan in plans) or 1.0, time.perf_counter()
    for plan in plans:
        over = time.perf_counter() - start > max(OVERTIME * seconds, LEAST_SECONDS)
        if over and plan.own.rule.name in seen:
            late.append(f"{plan.own.rule.name} on {plan.model.name}")
            continue
        seen.add(plan.own.rule.name)
        label = f"{plan.own.rule.name} against others, {plan.model.name}"
        progress(label, plan.weight / total)
        yield from compare(plan, wanted, seconds * plan.weight / total, note, about)
    if late:
        note(f"the time was up before these were compared with others: {', '.join(late)}; give more --seconds")


def compare(
    plan: Plan, wanted: dict[str, Peer], seconds: float, note: Callable[[str], None], about: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One comparison: steps with gradients in the same arrays at each step and in new ones, and whole phases."""
    made = problem(plan.own, plan.settings, plan.model, plan.threads)
    tensors = any("torch" in peer.packages for peer in wanted.values())
    if tensors:
        import torch

        torch.set_num_threads(plan.threads)
        from .pytorch import Ours
    else:
        from .loops import Ours  # type: ignore[assignment]
    kinds = ["new"] if plan.model.elements > HUGE else ["same", "new"]
    phases = "torch" in wanted
    share = seconds / (len(kinds) + phases)
    ours: Side = Ours(made)
    makers = [(name, peer.sides) for name, peer in wanted.items()]
    if sides := agreeing(made, ours, makers, note):
        for kind in kinds:
            yield compared(plan, "step", kind, ours, sides, share, about, tensors)
    if phases:
        del ours, sides
        from . import phase

        ours = phase.Ours(made)
        if sides := agreeing(made, ours, [("torch's phase", phase.sides)], note):
            yield compared(plan, "phase", "new", ours, sides, share, about, tensors)


def agreeing(
    made: Problem,
    ours: Side,
    makers: Sequence[tuple[str, Callable[[Problem], list[Side]]]],
    note: Callable[[str], None],
) -> dict[str, tuple[Side, float]]:
    """The sides that compute what ours does, and how far they are from it; of the others it is noted why not."""
    first_steps(ours)
    found: dict[str, tuple[Side, float]] = {}
    for name, make in makers:
        try:
            for side in make(made):
                try:
                    found[side.name] = side, agree(made, ours, side)
                except Disagreement as reason:
                    note(f"{DIFFER}: {reason}")
        except NoPeer as reason:
            note(f"{name} was left out for {made.rule.name}: {reason}")
        except Exception as reason:  # of the library's own: the others go on
            text = next(iter(str(reason).strip().splitlines()), "")
            note(f"{name} was left out, as it fails here: {type(reason).__name__}: {text[:200]}")
    return found


def compared(
    plan: Plan,
    work: str,
    gradients: str,
    ours: Side,
    sides: dict[str, tuple[Side, float]],
    seconds: float,
    about: dict[str, Any],
    tensors: bool,
) -> dict[str, Any]:
    """Turns of all sides, as a row of the document."""
    turning = [Turn(side, gradients == "new") for side in (ours, *(side for side, _ in sides.values()))]
    rounds = turns(turning, seconds, BLOCK_SECONDS, SETTLE_SECONDS, FEWEST)
    own, size = rounds.low("optforge"), plan.model
    results = []
    for name, (_, apart) in sides.items():
        theirs = rounds.low(name)
        ratio = statistics.estimate([b / a for a, b in zip(own, theirs, strict=True)])
        ms, best = 1e3 * float(np.median(rounds.median(name))), min(theirs) / min(own)
        results.append({"name": name, "ms": ms, "ratio": vars(ratio), "best": best, "apart": apart})
    return {
        "rule": plan.own.rule.name,
        "work": work,
        "size": {"name": size.name, "tensors": len(size.shapes), "elements": size.elements},
        "threads": plan.threads,
        "gradients": gradients,
        "arrays": "torch" if tensors else "numpy",
        "ms": 1e3 * float(np.median(rounds.median("optforge"))),
        "contended": machine.contended(plan.threads, float(np.median(rounds.busy)), about),
        "results": results,
        "rounds": rounds.as_dict(),
    }
