"""The CUDA target."""

from ..cudasource import render

__all__ = ["render"]

ENDINGS = (".cuh", ".cu")  # of the files that it emits
