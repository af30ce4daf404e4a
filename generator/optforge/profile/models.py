"""What is stepped: single tensors that fit into a level of cache or fill the memory, and networks by their shapes."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..core.diagnostics import UsageError, nearest

Shapes = list[tuple[int, ...]]
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
MOST_ELEMENTS = 1 << 36


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
    """ResNet-50 for ImageNet: convolutions without biases, each with the scale and shift of its normalisation."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for out, into, size in ((width, channels, 1), (width, width, 3), (4 * width, width, 1)):
                shapes += [(out, into, size, size), (out,), (out,)]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


@dataclass(frozen=True)
class Model:
    """Tensors that are stepped together, by their shapes."""

    name: str
    shapes: Sequence[tuple[int, ...]]

    @property
    def elements(self) -> int:
        """The number of all elements."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def label(self) -> str:
        """Name and size, for tables."""
        alone = len(self.shapes) == 1
        return (
            f"{self.name} ({count(self.elements)})"
            if alone
            else f"{self.name} ({len(self.shapes):,}, {count(self.elements)})"
        )


def many(number: int) -> Model:
    """Very many very small tensors."""
    return Model(f"{number:,} x 64", [(64,)] * number)


def short(elements: int) -> str:
    """A number of elements as --sizes takes them, for axes: 4k, 16M."""
    for unit, size in (("G", 1 << 30), ("M", 1 << 20), ("k", 1 << 10)):
        if elements >= size:
            return f"{elements / size:.3g}{unit}"
    return str(elements)


def count(elements: float) -> str:
    """A number of elements with a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if elements >= size:
            return f"{elements / size:.3g} {unit}"
    return f"{elements:.0f}"


NETWORKS: dict[str, Callable[[], Sequence[tuple[int, ...]]]] = {
    "gpt2": gpt2,
    "resnet50": resnet50,
    "resnet20": resnet20,
    "lenet": lenet,
    "mlp": lambda: perceptron(784, 128, 10),
    "many": lambda: many(10_000).shapes,
}
LEVELS = ("L1", "L2", "L3", "memory")
USUAL = ("L1", "L2", "L3", "memory", "many", "resnet50", "gpt2")


def one(name: str, elements: int) -> Model:
    """One tensor."""
    return Model(name, [(elements,)])


def models(wanted: Iterable[str], caches: dict[str, int], bytes_per_element: int) -> list[Model]:
    """What `--sizes` asks for.

    Parameters
    ----------
    wanted : iterable of str
        Numbers of elements (4096, 64k, 16M: powers of two, k is 1024), networks, and levels of cache.
    caches : dict of str to int
        Bytes of each level that the machine has, for one core; of the last for all.
    bytes_per_element : int
        That all arrays of a tensor take.

    Raises
    ------
    UsageError
        It is none of these.
    """
    found = []
    for name in wanted:
        number = re.fullmatch(r"(\d+)\s*([kKmMgG]?)", name)
        level = next((level for level in LEVELS if level.lower() == name.lower()), "")
        if number:
            elements = int(number[1]) * UNITS[number[2].lower()]
            if not 1 <= elements <= MOST_ELEMENTS:
                raise UsageError(f"--sizes {name}: a tensor has from 1 to {MOST_ELEMENTS:,} elements")
            found.append(one(name, elements))
        elif level:
            if elements := at_level(level, caches, bytes_per_element):
                found.append(one(level, elements))
        elif name in NETWORKS:
            found.append(Model(name, NETWORKS[name]()))
        else:
            known = [*LEVELS, *NETWORKS]
            listed = f"; there are {', '.join(known)}, and numbers of elements: 4096, 64k, 16M"
            raise UsageError(f"--sizes {name}: there is no such size{nearest(name, known) or listed}")
    if not found:
        raise UsageError("--sizes: there is nothing to measure")
    return found


def at_level(level: str, caches: dict[str, int], bytes_per_element: int) -> int:
    """Elements of a tensor whose arrays fill a good half of a level, a multiple of a leaf; 0: there is no such level.

    Those of the memory are four times what the caches hold, and 32 M elements at least.
    """
    if level == "memory":
        return max(32 << 20, 4 * max(caches.values(), default=0) // bytes_per_element // 1024 * 1024)
    if level not in caches:
        return 0
    room = caches[level] * (5 if level != "L3" else 3) // 8
    return max(1024, room // bytes_per_element // 1024 * 1024)
