"""What the demonstration trains: a small network, and the handwritten digits that it is to read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.intp]

SHAPES = ((64, 128), (128,), (128, 64), (64,), (64, 10), (10,))  # weights and bias of each layer
BATCH = 64
TEST_IMAGES = 360


class Digits(NamedTuple):
    """Images, one row of 64 intensities from 0 to 1 each, and the digits they show."""

    images: Floats
    labels: Labels


class Network:
    """A fully connected network with ReLU between its layers and softmax cross-entropy at its end.

    Every array that takes part in a product belongs to the network and stays where it is: parameters are copied in.
    So equal bits in give equal bits out, however the linear algebra library treats addresses.
    """

    def __init__(self, rows: int) -> None:
        widths = [SHAPES[0][0], *(shape[0] for shape in SHAPES[1::2])]
        self.parameters: list[Floats] = [np.zeros(shape, np.float32) for shape in SHAPES]
        self.gradients: list[Floats] = [np.zeros(shape, np.float32) for shape in SHAPES]
        self._activations: list[Floats] = [np.zeros((rows, width), np.float32) for width in widths]
        self._errors: list[Floats] = [np.zeros((rows, width), np.float32) for width in widths]
        self._rows = np.arange(rows)

    def log_probabilities(self, parameters: Sequence[Floats], images: Floats) -> Floats:
        """Logarithm of the probability of every digit, shape (rows, 10); overwritten by the next call."""
        for own, given in zip([*self.parameters, self._activations[0]], [*parameters, images], strict=True):
            np.copyto(own, given)
        for layer, (below, above) in enumerate(itertools.pairwise(self._activations)):
            if layer > 0:
                np.maximum(below, 0, out=below)
            np.matmul(below, self.parameters[2 * layer], out=above)
            above += self.parameters[2 * layer + 1]
        scores = self._activations[-1]
        scores -= scores.max(axis=1, keepdims=True)
        scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
        return scores

    def evaluate(self, parameters: Sequence[Floats], digits: Digits) -> tuple[float, float]:
        """Mean loss and fraction of correct answers."""
        scores = self.log_probabilities(parameters, digits.images)
        loss = -scores[self._rows, digits.labels].mean(dtype=np.float64)
        return float(loss), float((scores.argmax(axis=1) == digits.labels).mean())

    def differentiate(self, parameters: Sequence[Floats], digits: Digits) -> list[Floats]:
        """Gradients of the mean loss; the same arrays at every call."""
        scores = self.log_probabilities(parameters, digits.images)
        np.exp(scores, out=self._errors[-1])
        self._errors[-1][self._rows, digits.labels] -= 1
        self._errors[-1] /= len(self._rows)
        for layer in reversed(range(len(SHAPES) // 2)):
            below, error = self._activations[layer], self._errors[layer + 1]
            np.matmul(below.T, error, out=self.gradients[2 * layer])
            np.sum(error, axis=0, out=self.gradients[2 * layer + 1])
            if layer > 0:
                np.matmul(error, self.parameters[2 * layer].T, out=self._errors[layer])
                self._errors[layer] *= below > 0
        return self.gradients


def load_digits(seed: int) -> tuple[Digits, Digits]:
    """Training and test images, split at random."""
    from sklearn.datasets import load_digits as load

    images, labels = load(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.intp)
    return Digits(images[TEST_IMAGES:], labels[TEST_IMAGES:]), Digits(images[:TEST_IMAGES], labels[:TEST_IMAGES])


def initial_parameters(seed: int) -> list[Floats]:
    """Draw weights of variance 2 / inputs (He et al., 2015), which keeps the scale through ReLU; biases are zero."""
    generator = np.random.default_rng([seed, 1])
    deviations = [np.sqrt(2 / shape[0]) if len(shape) == 2 else 0 for shape in SHAPES]
    both = zip(SHAPES, deviations, strict=True)
    return [generator.normal(0, deviation, shape).astype(np.float32) for shape, deviation in both]


def batches(digits: Digits, order: np.random.Generator) -> Iterator[Digits]:
    """All images in an order drawn anew, BATCH at a time; those left over sit out this pass."""
    shuffled = order.permutation(len(digits.labels))
    for start in range(0, len(shuffled) - BATCH + 1, BATCH):
        chosen = shuffled[start : start + BATCH]
        yield Digits(digits.images[chosen], digits.labels[chosen])
