"""A small transformer trained as PyTorch users do, with their optimizer and with ours: the scripts differ in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from amount import FULL
from conftest import require_torch

torch = require_torch()
nn = torch.nn

from optforge.torch import Optimizer  # noqa: E402

STEPS = 200 if FULL else 20
TOKENS, LENGTH, WIDTH = 17, 12, 32

Made = Callable[[list[dict[str, Any]]], Any]


class Model(nn.Module):
    """Two layers of causal attention that learn to repeat a sequence backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(TOKENS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: Any) -> Any:
        return self.head(self.layers(self.embed(tokens) + self.place.weight))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(make: Made, amp: bool, rounded: bool = False) -> tuple[list[float], Any]:
    """The script; `make` is the one line that differs. It may start a rounding of float32 away."""
    torch.manual_seed(1)
    model = Model()
    for p in model.parameters() if rounded else ():
        p.data = torch.nextafter(p.data, torch.tensor(float("inf")))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = make([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}])
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, falling], milestones=[10])
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=20, enabled=amp)
    losses = []
    for _ in range(STEPS):
        tokens = torch.randint(TOKENS, (8, LENGTH))
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flip(1).flatten())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        losses.append(loss.item())
    return losses, model


def distance(one: Any, other: Any) -> float:
    """Between the parameters of two models, relative to their norm."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(one.parameters(), other.parameters(), strict=True)]
    squares = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return (squares / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
def test_a_transformer_is_trained_as_by_torch(amp: bool) -> None:
    """As near to PyTorch's training as that is to itself from parameters that differ by one rounding of float32."""
    settings = {"lr": 3e-3, "betas": (0.9, 0.98)}
    theirs, expected = train(lambda groups: torch.optim.AdamW(groups, **settings), amp)
    others, control = train(lambda groups: torch.optim.AdamW(groups, **settings), amp, rounded=True)
    apart = max(abs(a - b) for a, b in zip(others, theirs, strict=True))
    for rule in ("adamw", "AdamW") if FULL else ("adamw",):
        losses, model = train(lambda groups, rule=rule: Optimizer(groups, rule, **settings), amp)
        print(
            f"{rule}: parameters {distance(model, expected):.1e} apart, PyTorch's own {distance(control, expected):.1e}; "
            f"losses {max(abs(a - b) for a, b in zip(losses, theirs, strict=True)):.1e}, {apart:.1e}"
        )
        assert distance(model, expected) <= 4 * distance(control, expected)
        assert max(abs(a - b) for a, b in zip(losses, theirs, strict=True)) <= 4 * apart
    assert losses[-1] < losses[0]


@pytest.mark.skipif(not FULL, reason="OPTFORGE_TEST_FULL is not set")
def test_clipping_scaling_and_skipping_in_one_pass_is_the_same_training() -> None:
    """The clip of `clip_grad_norm_`, in the kernel."""
    settings = {"lr": 3e-3, "betas": (0.9, 0.98)}
    theirs, expected = train(lambda groups: torch.optim.AdamW(groups, **settings), False)

    torch.manual_seed(1)
    model = Model()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    rule = "clip_by_global_norm:AdamW"
    optimizer = Optimizer(groups, rule, max_norm=1.0, form="pytorch", skip_nonfinite=True, **settings)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, falling], milestones=[10])
    losses = []
    for _ in range(STEPS):
        tokens = torch.randint(TOKENS, (8, LENGTH))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flip(1).flatten())
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert distance(model, expected) <= 1e-3
    assert max(abs(a - b) for a, b in zip(losses, theirs, strict=True)) <= 1e-3
