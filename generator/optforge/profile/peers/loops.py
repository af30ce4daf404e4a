"""NumPy, which runs the rule's own text; numba, which compiles a loop; and optforge over NumPy arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...core.functions import Array
from .side import NoPeer, Problem, Side, prepared


class Arrays(Side):
    """Parameters and gradients as NumPy arrays."""

    renews = True

    def __init__(self, problem: Problem):
        self.problem = problem
        self.arrays, self.grads = prepared(problem)

    def load(self, factor: float) -> None:
        """Set the gradients."""
        for g, given in zip(self.grads, self.problem.grads, strict=True):
            np.multiply(given, np.float32(factor), out=g)

    def renew(self) -> None:
        """New arrays over the same memory."""
        self.grads = [g.view() for g in self.grads]

    def params(self) -> Sequence[Array]:
        """The parameters."""
        return self.arrays


class Ours(Arrays):
    """optforge, over NumPy arrays."""

    name = "optforge"

    def __init__(self, problem: Problem, **how: bool):
        super().__init__(problem)
        from ...train.optimizer import Optimizer

        settings: dict[str, Any] = {**problem.hyperparameters, **problem.options, **how}
        self.optimizer = Optimizer(self.arrays, problem.rule, threads=problem.threads, **settings)

    def step(self) -> None:
        """One step."""
        self.optimizer.step(self.grads)


class Plain(Arrays):
    """The rule's text on NumPy arrays."""

    name = "NumPy, the rule's text"

    def __init__(self, problem: Problem):
        super().__init__(problem)
        if any(part.reductions for part in problem.rule.definition.parts):
            from .text import GLOBAL

            used = {getattr(call.func, "id", "") for part in problem.rule.definition.parts for call in part.reductions}
            if used & set(GLOBAL):
                raise NoPeer(f"{problem.rule.name} reduces over all tensors together")
        self.settings = {**problem.hyperparameters, **problem.options}
        self.state: list[tuple[Any, ...]] = [() for _ in self.arrays]
        self.t = 0
        self.time = problem.rule.definition.time

    def step(self) -> None:
        """One step."""
        self.t += 1
        time = {"t": self.t} if self.time else {}
        function = self.problem.rule.function
        for k, (p, g) in enumerate(zip(self.arrays, self.grads, strict=True)):
            answer = function(p.reshape(-1), g.reshape(-1), *self.state[k], **time, **self.settings)
            new, *state = answer if isinstance(answer, tuple) else (answer,)
            p.reshape(-1)[:] = new
            self.state[k] = tuple(state)


# ── numba ───────────────────────────────────────────────────────────────────────────────────────────────────────────

# The loop's body, the state, and the scalars of a step, of the rules that people write such loops for.
LOOPS: dict[str, tuple[str, str, dict[str, Callable[..., float]]]] = {
    "sgd": ("p[i] -= lr * g[i]", "", {"lr": lambda h, t: h["lr"]}),
    "momentum": (
        "m[i] = beta * m[i] - lr * g[i]\np[i] += m[i]",
        "m",
        {"lr": lambda h, t: h["lr"], "beta": lambda h, t: h["momentum"]},
    ),
    "nesterov": (
        "m[i] = beta * m[i] - lr * g[i]\np[i] += beta * m[i] - lr * g[i]",
        "m",
        {"lr": lambda h, t: h["lr"], "beta": lambda h, t: h["momentum"]},
    ),
    "adagrad": (
        "a[i] += g[i] * g[i]\np[i] -= lr * g[i] / np.sqrt(a[i] + eps)",
        "a",
        {"lr": lambda h, t: h["lr"], "eps": lambda h, t: h["eps"]},
    ),
    "rmsprop": (
        "a[i] = rho * a[i] + keep * g[i] * g[i]\np[i] -= lr * g[i] / np.sqrt(a[i] + eps)",
        "a",
        {
            "lr": lambda h, t: h["lr"],
            "eps": lambda h, t: h["eps"],
            "rho": lambda h, t: h["rho"],
            "keep": lambda h, t: 1 - h["rho"],
        },
    ),
    "adamw": (
        "m[i] = b1 * m[i] + k1 * g[i]\nv[i] = b2 * v[i] + k2 * (g[i] * g[i])\n"
        "p[i] = p[i] * keep - size * m[i] / (np.sqrt(v[i] / bias) + eps)",
        "m v",
        {
            "b1": lambda h, t: h["beta1"],
            "k1": lambda h, t: 1 - h["beta1"],
            "b2": lambda h, t: h["beta2"],
            "k2": lambda h, t: 1 - h["beta2"],
            "keep": lambda h, t: 1 - h["lr"] * h["weight_decay"],
            "size": lambda h, t: h["lr"] / (1 - h["beta1"] ** t),
            "bias": lambda h, t: 1 - h["beta2"] ** t,
            "eps": lambda h, t: h["eps"],
        },
    ),
}


@functools.cache
def jitted(name: str) -> Any:
    """The compiled loop of a rule."""
    import numba

    body, state, scalars = LOOPS[name]
    arguments = ", ".join(["p", "g", *state.split(), *scalars])
    indented = body.replace("\n", "\n        ")
    text = f"def loop({arguments}):\n    for i in numba.prange(p.size):\n        {indented}\n"
    names: dict[str, Any] = {"numba": numba, "np": np}
    exec(text, names)
    return numba.njit(parallel=True, error_model="numpy")(names["loop"])


class Numba(Arrays):
    """A loop over elements, compiled by numba on all threads, one call a tensor."""

    name = "numba"

    def __init__(self, problem: Problem):
        from .pytorch import formula

        super().__init__(problem)
        self.rule = formula(problem)
        if self.rule not in LOOPS or len(problem.rule.definition.parts) > 1:
            raise NoPeer(f"there is no loop for numba of {problem.rule.name}")
        import numba

        numba.set_num_threads(min(problem.threads, numba.config.NUMBA_NUM_THREADS))
        self.state = [[np.zeros(p.size, np.float32) for _ in LOOPS[self.rule][1].split()] for p in self.arrays]
        self.flat = [p.reshape(-1) for p in self.arrays]
        self.t, self.loop = 0, jitted(self.rule)

    def step(self) -> None:
        """One step."""
        self.t += 1
        _, _, scalars = LOOPS[self.rule]
        numbers = [np.float32(make(self.problem.hyperparameters, self.t)) for make in scalars.values()]
        for p, g, state in zip(self.flat, self.grads, self.state, strict=True):
            self.loop(p, g.reshape(-1), *state, *numbers)


def plain(problem: Problem) -> list[Side]:
    """NumPy."""
    return [Plain(problem)]


def numba(problem: Problem) -> list[Side]:
    """Numba."""
    return [Numba(problem)]
