"""Rules as optimizers of PyTorch: `from optforge.torch import Optimizer`, and everything around it works."""

from .optimizer import Optimizer

__all__ = ["Optimizer"]
