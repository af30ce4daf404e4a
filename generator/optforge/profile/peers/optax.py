"""optax under jit, or the rule's text under jit where optax has not its formula; on the CPU, with donated buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...core.functions import Array
from ..machine import cores
from .pytorch import formula
from .side import NoPeer, Problem, Side
from .text import Text

MAKERS: dict[str, Callable[[Any, Any], Any]] = {
    "sgd": lambda o, h: o.sgd(h["lr"]),
    "momentum": lambda o, h: o.sgd(h["lr"], momentum=h["momentum"]),
    "nesterov": lambda o, h: o.sgd(h["lr"], momentum=h["momentum"], nesterov=True),
    "adam": lambda o, h: o.adam(h["lr"], h["beta1"], h["beta2"], h["eps"]),
    "adamw": lambda o, h: o.adamw(h["lr"], h["beta1"], h["beta2"], h["eps"], weight_decay=h["weight_decay"]),
    "rmsprop": lambda o, h: o.rmsprop(h["lr"], decay=h["rho"], eps=h["eps"]),
    "adadelta": lambda o, h: o.adadelta(h["lr"], rho=h["rho"], eps=h["eps"]),
}


class Jitted(Side):
    """One jitted call for all tensors."""

    def __init__(self, problem: Problem):
        import jax

        if problem.threads != cores():
            raise NoPeer(f"JAX takes all {cores()} cores of the machine, and not {problem.threads}")
        self.jax, self.problem = jax, problem
        self.values = [jax.numpy.array(p) for p in problem.params]
        self.grads = [jax.numpy.array(g) for g in problem.grads]
        self.t = 0
        own = formula(problem)
        clips = [part.name for part in problem.rule.definition.parts[:-1]]
        if own in MAKERS and set(clips) <= {"clip_by_global_norm"}:
            self.name = "optax, jitted"
            self.prepare_optax(own, bool(clips))
        else:
            self.name = "JAX, the rule's text jitted"
            self.prepare_text()

    def prepare_optax(self, own: str, clips: bool) -> None:
        """Make the step of optax's."""
        import optax

        hyper = self.problem.hyperparameters
        made = MAKERS[own](optax, hyper)
        if clips:
            made = optax.chain(optax.clip_by_global_norm(hyper["max_norm"]), made)
        self.state = made.init(self.values)

        def step(values: Any, state: Any, grads: Any, t: Any) -> Any:
            updates, state = made.update(grads, state, values)
            return optax.apply_updates(values, updates), state

        self.run = self.jax.jit(step, donate_argnums=(0, 1))

    def prepare_text(self) -> None:
        """Make the step of the rule's text, whose scalars are single precision here, as all of JAX is."""
        problem, jnp = self.problem, self.jax.numpy
        text = Text(problem.rule.definition, functions(jnp), jnp.full_like)
        settings = {**problem.hyperparameters, **problem.options}
        numbers = [own.name for own in problem.rule.definition.state if own.initial != "g"]
        known: dict[str, Any] = dict(settings)
        every = {own.name: own for own in problem.rule.definition.state}
        if len(numbers) < len(every):
            raise NoPeer(f"{problem.rule.name} begins with the first gradient")
        self.state = [
            {
                name: jnp.float32(text.start(own, p, p, known)) if own.scalar else text.start(own, p, p, known)
                for name, own in every.items()
            }
            for p in self.values
        ]

        def step(values: Any, state: Any, grads: Any, t: Any) -> Any:
            new = [text.step(p, g, own, settings, t) for p, g, own in zip(values, grads, state, strict=True)]
            return [p for p, _ in new], [own for _, own in new]

        try:
            self.jax.eval_shape(step, self.values, self.state, self.grads, jnp.float32(1))
        except self.jax.errors.TracerBoolConversionError:
            raise NoPeer(f"{problem.rule.name} chooses by numbers that JAX does not know when it traces") from None
        self.run = self.jax.jit(step, donate_argnums=(0, 1))

    def load(self, factor: float) -> None:
        """Set the gradients."""
        self.grads = [self.jax.numpy.array(g * np.float32(factor)) for g in self.problem.grads]

    def step(self) -> None:
        """One step, done."""
        self.t += 1
        self.values, self.state = self.run(self.values, self.state, self.grads, np.float32(self.t))
        self.jax.block_until_ready(self.values)

    def params(self) -> Sequence[Array]:
        """The parameters."""
        return [np.asarray(p) for p in self.values]


def functions(jnp: Any) -> dict[str, Callable[..., Any]]:
    """What the names of the language mean over JAX's arrays; Python's numbers stay such."""

    def either(name: str, scalar: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: scalar(*args) if all(isinstance(x, float) for x in args) else getattr(jnp, name)(*args)

    return {
        "sqrt": either("sqrt", math.sqrt),
        "abs": either("abs", abs),
        "exp": either("exp", math.exp),
        "log": either("log", math.log),
        "tanh": either("tanh", math.tanh),
        "sign": either("sign", lambda x: float((x > 0) - (x < 0))),
        "minimum": either("minimum", min),
        "maximum": either("maximum", max),
        "where": jnp.where,
        "norm": lambda x: jnp.sqrt(jnp.sum(x * x)),
        "sum": jnp.sum,
        "mean": jnp.mean,
        "max_abs": lambda x: jnp.max(jnp.abs(x)),
    }


def sides(problem: Problem) -> list[Side]:
    """Optax."""
    return [Jitted(problem)]
