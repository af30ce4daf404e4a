"""Times steps of optforge.jax against optax's, each in one jitted call with donated buffers, on the CPU.

    python benchmarks/under_jit.py [--quick] [--rule adamw] [--rounds N] [--json FILE]

Both sides first take three steps that must agree, and then take turns: README.md says how. Beside them stands what a
call takes that does nothing with the same arrays, which neither side can save.
Exit codes: 0 measured, 1 the results differ, 2 a mistake in the arguments, 3 something is missing on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import optforge.jax as ofj
except ImportError as problem:
    print(f"under_jit.py needs JAX, optax and optforge in one environment: {problem}", file=sys.stderr)
    sys.exit(3)

from optforge.profile.models import Model, gpt2, resnet20

LR = 1e-3
RULES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "adamw": (lambda: ofj.adamw(lr=LR, weight_decay=0.1), lambda: optax.adamw(LR, weight_decay=0.1)),
    "sgd": (lambda: ofj.sgd(lr=LR), lambda: optax.sgd(LR)),
    "lamb": (lambda: ofj.lamb(lr=LR, weight_decay=0.1), lambda: optax.lamb(LR, weight_decay=0.1)),
    "clipped": (
        lambda: ofj.Optimizer("clip_by_global_norm:adamw", lr=LR, max_norm=1.0, weight_decay=0.1),
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LR, weight_decay=0.1)),
    ),
}
MODELS = (
    Model("GPT-2 of width 24", gpt2(24, 512, 64)),
    Model("ResNet-20", resnet20()),
    Model("one tensor", [(30_000_000,)]),
    Model("GPT-2", gpt2()),
)
CHECKED_STEPS = (1.0, -0.5, 2.0)  # what the gradients are multiplied by in the steps that must agree
# How many units in the last place of a parameter, and what share of the learning rate per step, may differ: optax has
# 1 - beta2^t in float32, which is 3e-5 beside it at first.
ULPS = 4
RATE_SHARE = 1e-4
BLOCK_SECONDS = 0.05
MOST_STEPS = 200  # of a block


@dataclass
class Side:
    """One of the two: its jitted step, what goes from step to step, and what was measured."""

    name: str
    step: Callable[..., Any]
    carried: tuple[Any, Any]
    compiled: float = 0.0
    blocks: list[float] = field(default_factory=list)

    def take(self, grads: Sequence[Any], steps: int) -> float:
        """Seconds of each of some steps."""
        begin = time.perf_counter()
        for _ in range(steps):
            self.carried = self.step(*self.carried, grads)
        jax.block_until_ready(self.carried)
        return (time.perf_counter() - begin) / steps


def sides(rule: str, params: Sequence[Any]) -> list[Side]:
    """Ours, optax's, and nothing, over copies of the parameters."""
    ours, theirs = (make() for make in RULES[rule])

    def fused(params: Any, state: Any, grads: Any) -> Any:
        return ours.step(params, grads, state)

    def two_passes(params: Any, state: Any, grads: Any) -> Any:
        updates, state = theirs.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def nothing(params: Any, state: Any, grads: Any) -> Any:
        return params, state

    made = []
    for name, opt, step in (("optforge", ours, fused), ("optax", theirs, two_passes), ("nothing", ours, nothing)):
        own = [jnp.array(p) for p in params]
        made.append(Side(name, jax.jit(step, donate_argnums=(0, 1), keep_unused=True), (own, opt.init(own))))
    return made


def agree(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether parameters are equal up to rounding."""
    share, least = ULPS * np.finfo(np.float32).eps, RATE_SHARE * LR * len(CHECKED_STEPS)
    return all(bool(jnp.all(jnp.abs(x - y) <= share * jnp.abs(x) + least)) for x, y in zip(a, b, strict=True))


def compared(model: Model, rule: str, rounds: int) -> dict[str, Any]:
    """Both sides on one model."""
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in model.shapes]
    grads = [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in model.shapes]
    every = sides(rule, params)
    del params
    for side in every:
        begin = time.perf_counter()
        side.step = side.step.lower(*side.carried, grads).compile()  # type: ignore[attr-defined]
        side.compiled = time.perf_counter() - begin
        for factor in CHECKED_STEPS:
            side.take([g * factor for g in grads], 1)
    if not agree(every[0].carried[0], every[1].carried[0]):
        print(f"{model.label}: the results differ", file=sys.stderr)
        sys.exit(1)
    steps = [max(1, min(MOST_STEPS, int(BLOCK_SECONDS / side.take(grads, 1)))) for side in every]
    for k in range(rounds):
        for side, number in list(zip(every, steps, strict=True))[:: 1 if k % 2 else -1]:
            side.take(grads, 1)
            side.blocks.append(side.take(grads, number))
    ours, theirs, nothing = every
    return {
        "model": model.label,
        "rule": rule,
        "optforge_ms": 1e3 * statistics.median(ours.blocks),
        "optax_ms": 1e3 * statistics.median(theirs.blocks),
        "nothing_ms": 1e3 * statistics.median(nothing.blocks),
        "ratio": statistics.median(theirs.blocks) / statistics.median(ours.blocks),
        "best": min(theirs.blocks) / min(ours.blocks),
        "optforge_compile_s": ours.compiled,
        "optax_compile_s": theirs.compiled,
    }


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="leave the largest model out")
    parser.add_argument("--rule", choices=RULES, default="adamw")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"{'model':40} {'optforge':>11} {'optax':>11} {'nothing':>11} {'ratio':>6} {'best':>6}   compiled in")
    told = []
    for model in MODELS[:-1] if arguments.quick else MODELS:
        own = compared(model, arguments.rule, arguments.rounds)
        told.append(own)
        compiled = f"{own['optforge_compile_s']:5.1f} s, {own['optax_compile_s']:5.1f} s"
        print(
            f"{own['model']:40} {own['optforge_ms']:8.2f} ms {own['optax_ms']:8.2f} ms {own['nothing_ms']:8.2f} ms "
            f"{own['ratio']:6.2f} {own['best']:6.2f}   {compiled}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(told, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
