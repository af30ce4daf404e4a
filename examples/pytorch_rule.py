"""A rule of one's own beside AdamW, on a small convolutional network that reads handwritten digits.

    pip install 'optforge[torch,demo]'
    python examples/pytorch_rule.py

Each optimizer gets the rate that is best for it on a fifth of the training images, from the same list, and then trains
from three seeds. Draws examples/pytorch-rule.png.
"""

from pathlib import Path

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import nn

from optforge import rule, sign
from optforge.torch import Optimizer

EPOCHS, BATCH, SEEDS = 12, 64, (1, 2, 3)


@rule
def lion(p, g, m=0.0, *, lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.1):
    """Lion: the sign of a momentum. Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023."""
    update = sign(beta1 * m + (1 - beta1) * g)
    m = beta2 * m + (1 - beta2) * g
    p = p - lr * (update + weight_decay * p)
    return p, m


OPTIMIZERS = {
    "AdamW of PyTorch": (lambda params, lr: torch.optim.AdamW(params, lr=lr), (1e-3, 3e-3, 1e-2, 3e-2)),
    "AdamW of optforge": (lambda params, lr: Optimizer(params, "AdamW", lr=lr), (1e-3, 3e-3, 1e-2, 3e-2)),
    "lion, a rule of ten lines": (lambda params, lr: Optimizer(params, lion, lr=lr), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
}


def digits():
    """Training images, a fifth of them to choose by, test images; each with its labels."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(found.target)[order]
    return [(images[a:b], labels[a:b]) for a, b in ((0, 1120), (1120, 1400), (1400, None))]


def train(make, lr, seed, training, held_out):
    """The loss on held-out images behind each epoch, and the share of them that is read rightly in the end."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(288, 10))
    optimizer = make(model.parameters(), lr)
    images, labels = training
    steps = EPOCHS * (len(images) // BATCH)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images))[: len(images) // BATCH * BATCH].view(-1, BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            scheduler.step()
        with torch.no_grad():
            scores = model(held_out[0])
            losses.append(nn.functional.cross_entropy(scores, held_out[1]).item())
    return losses, (scores.argmax(1) == held_out[1]).float().mean().item()


def main():
    torch.set_num_threads(1)
    training, choosing, testing = digits()
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120, layout="constrained")
    for colour, (name, (make, rates)) in zip(("#0072B2", "#E69F00", "#009E73"), OPTIMIZERS.items(), strict=True):
        best = min(rates, key=lambda lr, make=make: train(make, lr, 0, training, choosing)[0][-1])
        runs = [train(make, best, seed, training, testing) for seed in SEEDS]
        right = sum(share for _, share in runs) / len(runs)
        print(f"{name:26} lr {best:g}, {100 * right:.1f} % of the test images, loss {runs[0][0][-1]:.4f}")
        for k, (losses, _) in enumerate(runs):
            label, line = f"{name}, lr {best:g}" if k == 0 else None, "--" if "optforge" in name else "-"
            axes.plot(range(1, EPOCHS + 1), losses, color=colour, linestyle=line, label=label)
    axes.set(xlabel="epoch", ylabel="loss on the test images", yscale="log")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(Path(__file__).with_name("pytorch-rule.png"))


if __name__ == "__main__":
    main()
