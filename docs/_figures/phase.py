"""The picture of the README: `python docs/_figures/phase.py` writes docs/phase.png. It needs matplotlib.

The numbers are of one run of benchmarks/phase.py on two cores of a Zen 4, with PyTorch 2.13.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MODELS = ("GPT-2\n124 M in 148", "MLP\n102 k in 4", "LeNet\n431 k", "ResNet-20\n269 k", "MLP\n798 k", "10,000 × 64")
TIMES = {
    "PyTorch fused, folded": ("#7aa6c2", (2.5, 3.7, 2.7, 7.5, 2.8, 55)),
    "PyTorch fused": ("#2f6f95", (2.8, 5.1, 2.9, 9.0, 3.2, 71)),
    "PyTorch foreach": ("#c98b4b", (8.8, 5.7, 5.6, 14, 5.9, 118)),
}
WIDTH = 0.26
TICKS = (1, 2, 5, 10, 20, 50, 100)

figure, axes = plt.subplots(figsize=(8, 3.4), dpi=130)
for k, (name, (colour, times)) in enumerate(TIMES.items()):
    places = [place + (k - 1) * WIDTH for place in range(len(MODELS))]
    axes.bar(places, times, WIDTH, label=name, color=colour)
    for place, time in zip(places, times, strict=True):
        axes.text(place, time * 1.05, f"{time:g}", ha="center", va="bottom", fontsize=7.5)
axes.set_yscale("log")
axes.set_ylim(1, 220)
axes.set_xlim(-0.55, len(MODELS) - 0.45)
axes.set_xticks(range(len(MODELS)), MODELS, fontsize=8)
axes.set_yticks(TICKS, [str(tick) for tick in TICKS], fontsize=8)
axes.minorticks_off()
axes.set_ylabel("time; optforge is 1", fontsize=8.5)
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=3)
axes.set_title("Optimizer phase: unscale, clip, AdamW, norms, skip, zero (lower is better)", fontsize=9.5, loc="left")
figure.tight_layout()
figure.savefig(Path(__file__).resolve().parent.parent / "phase.png", metadata={"Software": None})
