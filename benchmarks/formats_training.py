"""Trains one small transformer with AdamW in each way to store parameters and state, and draws the curves.

    python benchmarks/formats_training.py [--steps N] [--threads N] [--png FILE] [--json FILE]

needs PyTorch and matplotlib. The text is what `help()` says of Python's topics, which every Python brings along. The
network computes in float32 whatever its parameters are stored as, so that the curves differ by the storage alone; all
begin with the same numbers and see the same batches.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import optforge as of

WIDTH, LAYERS, HEADS, LENGTH, BATCH = 64, 2, 4, 48, 8

# name: parameters and gradients, settings of the optimizer, bytes of a parameter with its state
STATE, BLOCKS = {"m": "bf16", "v": "bf16"}, {"m": "q8", "v": "uq8"}
WAYS: dict[str, tuple[torch.dtype, dict[str, Any], int]] = {
    "float32": (torch.float32, {}, 12),
    "p, g bf16": (torch.bfloat16, {}, 10),
    "p, g bf16, stochastic": (torch.bfloat16, {"rounding": "stochastic"}, 10),
    "all bf16": (torch.bfloat16, {"store": STATE}, 6),
    "all bf16, stochastic": (torch.bfloat16, {"store": STATE, "rounding": "stochastic"}, 6),
    "p, g bf16, master f32": (torch.bfloat16, {"master": "f32"}, 14),
    "p, g bf16, master split": (torch.bfloat16, {"master": "split"}, 12),
    "all bf16, master split": (torch.bfloat16, {"store": STATE, "master": "split"}, 8),
    "p, g f16": (torch.float16, {}, 10),
    "moments q8": (torch.float32, {"store": BLOCKS}, 6),
    "p, g bf16, master split, moments q8": (torch.bfloat16, {"store": BLOCKS, "master": "split"}, 6),
}


class Network(nn.Module):
    """A transformer that guesses the next character."""

    def __init__(self, characters: int):
        super().__init__()
        self.embed, self.place = nn.Embedding(characters, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.guess = nn.Linear(WIDTH, characters)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """What each next character may be, as logits."""
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        x = self.embed(text) + self.place(torch.arange(LENGTH))
        return self.guess(self.layers(x, mask=mask, is_causal=True))  # type: ignore[no-any-return]


def train(way: str, steps: int, data: torch.Tensor, characters: int, threads: int) -> list[float]:
    """The loss at each step."""
    dtype, settings, _ = WAYS[way]
    torch.manual_seed(0)
    network = Network(characters)
    names = [name for name, _ in network.named_parameters()]
    params = [p.detach().to(dtype).clone() for p in network.parameters()]
    opt = of.Optimizer(params, "adamw", lr=3e-4, weight_decay=0.01, threads=threads, **settings)
    opt.lr = of.schedules.cosine(3e-4, steps=steps, warmup=steps // 20)
    batches, losses = np.random.default_rng(0), []
    for _ in range(steps):
        begins = batches.integers(0, len(data) - LENGTH - 1, BATCH)
        text = torch.stack([data[k : k + LENGTH + 1] for k in begins])
        full = [p.float().requires_grad_() for p in params]
        guesses = torch.func.functional_call(network, dict(zip(names, full, strict=True)), (text[:, :-1],))
        loss = functional.cross_entropy(guesses.reshape(-1, characters), text[:, 1:].reshape(-1))
        grads = torch.autograd.grad(loss, full)
        opt.step([g.to(dtype) for g in grads])
        losses.append(float(loss.detach()))
    return losses


def main() -> int:
    """Train, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    text = "".join(topics.values())
    known = sorted(set(text))
    data = torch.tensor([known.index(c) for c in text])
    curves: dict[str, list[float]] = {}
    last = max(1, asked.steps // 10)
    for way, (_, _, size) in WAYS.items():
        curves[way] = train(way, asked.steps, data, len(known), asked.threads)
        mean, plain = (float(np.mean(curves[own][-last:])) for own in (way, "float32"))
        print(f"{way:36} {size:3} bytes   loss {mean:.4f}   against float32 {mean - plain:+.4f}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps({"steps": asked.steps, "curves": curves}))
    if asked.png:
        draw(curves, asked.png)
    return 0


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The curves, smoothed, and how far each is from that of float32."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (whole, apart) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    width = max(1, len(curves["float32"]) // 10)
    steps = np.arange(width, len(curves["float32"]) + 1)
    smooth = {way: np.convolve(losses, np.ones(width) / width, "valid") for way, losses in curves.items()}
    for way, losses in smooth.items():
        style = "-" if "stochastic" in way or "master" in way or way == "float32" else "--"
        whole.plot(steps, losses, style, label=way, linewidth=1.2)
        apart.plot(steps, losses - smooth["float32"], style, linewidth=1.2)
    whole.set(xlabel="step", ylabel="loss, nats per character", title="AdamW, a small transformer, by how it is stored")
    apart.set(xlabel="step", ylabel="loss less that of float32", ylim=(-0.03, 0.05))
    whole.legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
