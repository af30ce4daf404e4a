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
    total, start = sum(plan.weight for plan in plans) or 1.0, time.perf_counter()
    for plan in plans:
        if time.perf_counter() - start > max(OVERTIME * seconds, LEAST_SECONDS):
            late.append(f"{plan.own.rule.name} on {plan.model.name}")
            continue
        label = f"{plan.own.rule.name} against others, {plan.model.name}"
        progress(label, plan.weight / total)
        yield from compare(plan, wanted, seconds * plan.weight / total, note, about)
    if late:
        note(f"the time was up before these were compared with others: {', '.join(late)}; give more --seconds")


def failed(name: str, reason: Exception) -> str:
    """What is said of a library that raises."""
    text = next(iter(str(reason).strip().splitlines()), "")
    return f"{name} was left out, as it fails here: {type(reason).__name__}: {text[:200]}"


def compare(
    plan: Plan, wanted: dict[str, Peer], seconds: float, note: Callable[[str], None], about: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One comparison, with gradients in the same arrays at each step and in new ones."""
    made = problem(plan.own, plan.settings, plan.model, plan.threads)
    tensors = any("torch" in peer.packages for peer in wanted.values())
    if tensors:
        import torch

        torch.set_num_threads(plan.threads)
        from .pytorch import Ours
    else:
        from .loops import Ours  # type: ignore[assignment]
    ours: Side = Ours(made)
    first_steps(ours)
    sides: list[Side] = []
    apart: dict[str, float] = {}
    for name, peer in wanted.items():
        try:
            found = peer.sides(made)
        except NoPeer as reason:
            note(f"{name} was left out for {made.rule.name}: {reason}")
            continue
        except Exception as reason:  # of the library's own: the others go on
            note(failed(name, reason))
            continue
        for side in found:
            try:
                apart[side.name] = agree(made, ours, side)
                sides.append(side)
            except Disagreement as problem_found:
                note(f"{DIFFER}: {problem_found}")
            except Exception as reason:
                note(failed(side.name, reason))
    if not sides:
        return
    kinds = (True,) if plan.model.elements > HUGE else (False, True)
    for new in kinds:
        turning = [Turn(side, new) for side in (ours, *sides)]
        rounds = turns(turning, seconds / len(kinds), BLOCK_SECONDS, SETTLE_SECONDS, FEWEST)
        busy = float(np.median(rounds.busy))
        yield {
            "rule": made.rule.name,
            "size": {
                "name": plan.model.name,
                "tensors": len(plan.model.shapes),
                "elements": plan.model.elements,
            },
            "threads": plan.threads,
            "gradients": "new" if new else "same",
            "arrays": "torch" if tensors else "numpy",
            "ms": 1e3 * float(np.median(rounds.median("optforge"))),
            "contended": machine.contended(plan.threads, busy, about),
            "results": [
                {
                    "name": side.name,
                    "ms": 1e3 * float(np.median(rounds.median(side.name))),
                    "ratio": vars(
                        statistics.estimate(
                            [b / a for a, b in zip(rounds.low("optforge"), rounds.low(side.name), strict=True)]
                        )
                    ),
                    "best": min(rounds.low(side.name)) / min(rounds.low("optforge")),
                    "apart": apart[side.name],
                }
                for side in sides
            ],
            "rounds": rounds.as_dict(),
        }
