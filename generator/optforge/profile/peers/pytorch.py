"""PyTorch: its own optimizers where they have the rule's formula, else the rule's text; and optforge on its tensors."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...core.functions import Array
from ...library.rule import BUILT_IN
from ...train.interop import PYTORCH, Key
from .side import NoPeer, Problem, Side
from .text import Text

# Rules whose formula is that of an optimizer of PyTorch's: its name, its settings by ours, others that make it so, and
# ours that do (eps stands inside the root here, and behind it there: so little is nothing in both places).
FORMULAS: dict[str, tuple[str, Mapping[str, Key], Mapping[str, Any], Mapping[str, float]]] = {
    **{
        rule: (own.name, own.hyperparameters, {}, own.fixed)
        for rule, own in PYTORCH.items()
    },
    "momentum": ("SGD", {"lr": "lr", "momentum": "momentum"}, {}, {}),
    "nesterov": ("SGD", {"lr": "lr", "momentum": "momentum"}, {"nesterov": True}, {}),
    "rmsprop": ("RMSprop", {"lr": "lr", "rho": "alpha", "eps": "eps"}, {}, {"eps": 1e-30}),
    "adagrad": ("Adagrad", {"lr": "lr", "eps": "eps"}, {}, {"eps": 1e-30}),
}  # fmt: skip
CLIPS = ("clip_by_global_norm", "clip_by_value")
LARGE = 1 << 22  # elements of all tensors beyond which new gradients are new tensors over the same memory
FUSED = ("Adam", "AdamW", "SGD", "Adagrad")


def formula(problem: Problem) -> str:
    """The name of the built-in rule that is computed behind clips that PyTorch has; empty where it is none."""
    parts = problem.rule.definition.parts
    last = problem.rule.definition.last
    same = last.name in FORMULAS and BUILT_IN[last.name].definition.last.hash == last.hash
    same = same and problem.options.get("form") != "lasagne"
    return last.name if same and all(part.name in CLIPS for part in parts[:-1]) else ""


class Tensors(Side):
    """Parameters as tensors, with gradients that can be new ones at each step."""

    renews = True

    def __init__(self, problem: Problem):
        import torch

        self.torch, self.problem = torch, problem
        # As a model has them: each in memory of PyTorch's own allocator.
        self.tensors = [torch.from_numpy(p).clone().requires_grad_() for p in problem.params]
        sets = 1 if problem.model.elements > LARGE else 2
        self.sets = [[torch.from_numpy(g).clone() for g in problem.grads] for _ in range(sets)]
        self.turn = 0
        self.given = [[g.numpy() for g in own] for own in self.sets]
        self.hand_over()

    def hand_over(self) -> None:
        """Give the parameters their gradients."""
        for p, g in zip(self.tensors, self.sets[self.turn % len(self.sets)], strict=True):
            p.grad = g

    def load(self, factor: float) -> None:
        """Set the gradients."""
        for own in self.given:
            for g, given in zip(own, self.problem.grads, strict=True):
                g[...] = given
                if factor != 1.0:
                    g *= factor
        self.hand_over()

    def renew(self) -> None:
        """New tensors, over other memory where there is not much of it."""
        self.turn += 1
        for p, g in zip(self.tensors, self.sets[self.turn % len(self.sets)], strict=True):
            p.grad = g.detach()

    def params(self) -> Sequence[Array]:
        """The parameters."""
        return [p.detach().numpy() for p in self.tensors]


class Ours(Tensors):
    """optforge, over tensors of PyTorch."""

    name = "optforge"

    def __init__(self, problem: Problem, **how: bool):
        super().__init__(problem)
        from ...train.optimizer import Optimizer

        settings: dict[str, Any] = {**problem.hyperparameters, **problem.options, **how}
        self.optimizer = Optimizer(self.tensors, problem.rule, threads=problem.threads, **settings)

    def step(self) -> None:
        """One step, as a training loop calls it."""
        self.optimizer.step([p.grad for p in self.tensors])


class Optimizer(Tensors):
    """An optimizer of PyTorch's, behind its own functions that clip."""

    def __init__(self, problem: Problem, how: str, compiled: bool = False):
        super().__init__(problem)
        self.name = f"torch {how}" if how != "loop" else "torch for-loop"
        self.name = "torch compiled" if compiled else self.name
        name, keys, others, _ = FORMULAS[formula(problem)]
        settings: dict[str, Any] = dict(others)
        for own, key in keys.items():
            if isinstance(key, tuple):
                settings[key[0]] = (*settings.get(key[0], ()), problem.hyperparameters[own])
            else:
                settings[key] = problem.hyperparameters[own]
        chosen = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}[how]
        make: Any = getattr(self.torch.optim, name)
        self.optimizer = make(self.tensors, **settings, **chosen)
        self.clips = [part.name for part in problem.rule.definition.parts[:-1]]
        self.run = self.torch.compile(self.optimizer.step) if compiled else self.optimizer.step

    def step(self) -> None:
        """Clip, and one step."""
        hyper = self.problem.hyperparameters
        for clip in self.clips:
            if clip == "clip_by_global_norm":
                self.torch.nn.utils.clip_grad_norm_(self.tensors, hyper["max_norm"])
            else:
                self.torch.nn.utils.clip_grad_value_(self.tensors, hyper["max_value"])
        self.run()


class Written(Tensors):
    """The rule's text, tensor by tensor, as people write their own optimizer."""

    def __init__(self, problem: Problem, compiled: bool = False):
        super().__init__(problem)
        self.name = "torch, the rule's text" + " compiled" * compiled
        torch = self.torch
        own = (vars(builtins),) if compiled else ()
        self.text = Text(problem.rule.definition, functions(torch), torch.full_like, *own)
        self.settings = {**problem.hyperparameters, **problem.options}
        self.state: list[dict[str, Any]] = [{} for _ in self.tensors]
        self.t, self.whole = 0, compiled
        self.run = torch.compile(self.all) if compiled else self.all

    def all(self, t: Any) -> None:
        """All tensors."""
        with self.torch.no_grad():
            for k, p in enumerate(self.tensors):
                new, self.state[k] = self.text.step(p.detach(), p.grad, self.state[k], self.settings, t)
                p.copy_(new)

    def step(self) -> None:
        """One step."""
        self.t += 1
        # A tensor, so that a compiled step is not compiled anew for each t.
        self.run(self.torch.tensor(float(self.t), dtype=self.torch.float64) if self.whole else float(self.t))


def functions(torch: Any) -> dict[str, Callable[..., Any]]:
    """What the names of the language mean over tensors."""

    def either(name: str, scalar: Callable[[float], float]) -> Callable[[Any], Any]:
        return lambda x: getattr(torch, name)(x) if isinstance(x, torch.Tensor) else scalar(x)

    def both(name: str, scalar: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        def call(a: Any, b: Any) -> Any:
            tensor = a if isinstance(a, torch.Tensor) else b
            if not isinstance(tensor, torch.Tensor):
                return scalar(a, b)
            return getattr(torch, name)(*(torch.as_tensor(x, dtype=tensor.dtype) for x in (a, b)))

        return call

    return {
        "sqrt": either("sqrt", math.sqrt),
        "abs": either("abs", abs),
        "exp": either("exp", math.exp),
        "log": either("log", math.log),
        "tanh": either("tanh", math.tanh),
        "sign": either("sign", lambda x: float((x > 0) - (x < 0))),
        "minimum": both("minimum", min),
        "maximum": both("maximum", max),
        "where": torch.where,
        "norm": lambda x: float(torch.linalg.vector_norm(x, dtype=torch.float64)),
        "sum": lambda x: float(torch.sum(x, dtype=torch.float64)),
        "mean": lambda x: float(torch.mean(x, dtype=torch.float64)),
        "max_abs": lambda x: float(torch.max(torch.abs(x))),
    }


def sides(problem: Problem) -> list[Side]:
    """All ways in which PyTorch does a rule."""
    if not formula(problem):
        return [Written(problem)]
    found: list[Side] = []
    if FORMULAS[formula(problem)][0] in FUSED:
        found.append(Optimizer(problem, "fused"))
    return [*found, Optimizer(problem, "foreach"), Optimizer(problem, "loop")]


def one(how: str) -> Callable[[Problem], list[Side]]:
    """One of them, by name."""

    def make(problem: Problem) -> list[Side]:
        own = formula(problem)
        if not own or (how == "fused" and FORMULAS[own][0] not in FUSED):
            raise NoPeer(f"PyTorch has no {how} form of {problem.rule.name}")
        return [Optimizer(problem, how)]

    return make


fused, foreach, loop = one("fused"), one("foreach"), one("loop")


def compiled(problem: Problem) -> list[Side]:
    """What torch.compile makes of its own optimizer, or of the rule's text."""
    return [Optimizer(problem, "foreach", True) if formula(problem) else Written(problem, True)]
