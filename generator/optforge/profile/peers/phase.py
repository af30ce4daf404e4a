"""The whole phase of a training step in PyTorch: unscale, clip, look for what is not finite, step, norms; and ours.

Every side spends its gradients, so that they are copied in anew before each step, which is not timed.
"""

from __future__ import annotations

import math
from typing import Any

from . import pytorch
from .pytorch import FORMULAS, FUSED, formula
from .side import NoPeer, Problem, Side

LOSS_SCALE = 65536.0
PHASE: dict[str, Any] = {"grad_scale": LOSS_SCALE, "stats": True}


class Ours(pytorch.Ours):
    """optforge, in one call, over tensors of PyTorch."""

    def __init__(self, problem: Problem):
        super().__init__(problem, skip_nonfinite=True)

    def load(self, factor: float) -> None:
        """Set the gradients, with the loss scale."""
        super().load(factor * LOSS_SCALE)

    def renew(self) -> None:
        """Gradients as a backward pass leaves them."""
        self.load(1.0)

    def step(self) -> None:
        """One phase."""
        self.optimizer.step([p.grad for p in self.tensors], **PHASE)


class Phase(pytorch.Optimizer):
    """The functions that PyTorch has for it, each over all tensors at once."""

    def __init__(self, problem: Problem, how: str):
        super().__init__(problem, how)
        if [*self.clips] not in ([], ["clip_by_global_norm"]):
            raise NoPeer(f"PyTorch has no phase with {' and '.join(self.clips)}")
        self.before = [self.torch.empty_like(p, requires_grad=False) for p in self.tensors]
        self.most = problem.hyperparameters["max_norm"] if self.clips else math.inf

    def load(self, factor: float) -> None:
        """Set the gradients, with the loss scale."""
        super().load(factor * LOSS_SCALE)

    def renew(self) -> None:
        """Gradients as a backward pass leaves them."""
        self.load(1.0)

    def step(self) -> None:
        """One phase."""
        torch, grads = self.torch, [p.grad for p in self.tensors]
        with torch.no_grad():
            torch._foreach_mul_(grads, 1 / LOSS_SCALE)
            norm = float(torch.nn.utils.clip_grad_norm_(self.tensors, self.most, foreach=True))
            if math.isfinite(norm):
                torch._foreach_copy_(self.before, self.tensors)
                self.run()
                self.finish()

    def finish(self) -> None:
        """The norms of the parameters and of what changed."""
        torch = self.torch
        torch._foreach_sub_(self.before, self.tensors)
        self.norms = [float(torch.nn.utils.get_total_norm(own, foreach=True)) for own in (self.tensors, self.before)]


class Folded(Phase):
    """The phase with unscaling and clipping left to the fused step, which divides gradients by a scale anyway.

    That saves two passes over the gradients; the attributes are those that `torch.amp.GradScaler` sets.
    """

    def __init__(self, problem: Problem):
        super().__init__(problem, "fused")
        self.name = "torch fused, folded"

    def step(self) -> None:
        """One phase."""
        torch, optimizer = self.torch, self.optimizer
        with torch.no_grad():
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.tensors], foreach=True)) / LOSS_SCALE
            if math.isfinite(norm):
                torch._foreach_copy_(self.before, self.tensors)
                optimizer.grad_scale = torch.tensor(LOSS_SCALE / min(1.0, self.most / (norm + 1e-6)))
                optimizer.found_inf = torch.tensor(0.0)
                self.run()
                self.finish()


def sides(problem: Problem) -> list[Side]:
    """PyTorch's ways to do a phase; none where it has not the rule."""
    own = formula(problem)
    if not own:
        return []
    fused: list[Side] = []
    if FORMULAS[own][0] in FUSED:
        fused = [Phase(problem, "fused"), Folded(problem)]
    return [*fused, Phase(problem, "foreach")]
