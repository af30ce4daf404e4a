"""DeepSpeed's CPUAdam, which compiles itself where it is first used."""

from __future__ import annotations

from .pytorch import Tensors, formula
from .side import NoPeer, Problem, Side


class CPUAdam(Tensors):
    """DeepSpeedCPUAdam."""

    name = "DeepSpeed CPUAdam"

    def __init__(self, problem: Problem):
        own = formula(problem)
        if own not in ("adam", "adamw") or len(problem.rule.definition.parts) > 1:
            raise NoPeer(f"CPUAdam has not the formula of {problem.rule.name}")
        super().__init__(problem)
        import deepspeed.ops.adam as adam

        h = problem.hyperparameters
        self.optimizer = adam.DeepSpeedCPUAdam(
            self.tensors, lr=h["lr"], betas=(h["beta1"], h["beta2"]), eps=h["eps"],
            weight_decay=h.get("weight_decay", 0.0), adamw_mode=own == "adamw",
        )  # fmt: skip

    def step(self) -> None:
        """One step."""
        self.optimizer.step()


def sides(problem: Problem) -> list[Side]:
    """DeepSpeed."""
    return [CPUAdam(problem)]
