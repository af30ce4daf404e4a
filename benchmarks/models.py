"""Networks by the shapes of their parameters, which is all that an optimizer sees of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

Shapes = list[tuple[int, ...]]


def gpt2(width: int = 768, words: int = 50257, positions: int = 1024, layers: int = 12) -> Shapes:
    """GPT-2, by default the small one."""
    shapes: Shapes = [(words, width), (positions, width)]
    for _ in range(layers):
        shapes += [(width,), (width,)]
        shapes += [(width, 3 * width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,)]
        shapes += [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [*shapes, (width,), (width,)]


def perceptron(*widths: int) -> Shapes:
    """Fully connected layers with biases."""
    shapes: Shapes = []
    for inputs, outputs in itertools.pairwise(widths):
        shapes += [(outputs, inputs), (outputs,)]
    return shapes


def lenet() -> Shapes:
    """LeNet with 20 and 50 filters."""
    return [(20, 1, 5, 5), (20,), (50, 20, 5, 5), (50,), (500, 800), (500,), (10, 500), (10,)]


def resnet20() -> Shapes:
    """ResNet-20 for images of 32 x 32, with biases in place of normalisation."""
    shapes: Shapes = [(16, 3, 3, 3)]
    channels = 16
    for width in (16, 32, 64):
        for _ in range(6):
            shapes += [(width, channels, 3, 3), (width,)]
            channels = width
    return [*shapes, (10, 64), (10,)]


def resnet50() -> Shapes:
    """ResNet-50 for ImageNet, with its normalisations: 161 tensors."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions: Shapes = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            convolutions += [(4 * width, channels, 1, 1)] if block == 0 else []
            shapes += [shape for own in convolutions for shape in (own, own[:1], own[:1])]
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


@dataclass(frozen=True)
class Model:
    """Parameters of a network, by their shapes."""

    name: str
    shapes: Shapes

    @property
    def elements(self) -> int:
        """The number of all elements."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def label(self) -> str:
        """Name and size, for tables."""
        size = f"{self.elements / 1e6:.1f} M" if self.elements >= 1e6 else f"{self.elements / 1e3:.0f} k"
        return f"{self.name} ({len(self.shapes)}, {size})"


def many(count: int) -> Model:
    """Very many very small tensors."""
    return Model(f"{count:,} x 64", [(64,)] * count)
