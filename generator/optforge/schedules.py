"""Schedules: hyperparameters that change as training goes. `from optforge.schedules import cosine`."""

from .train.schedules import *  # noqa: F403
from .train.schedules import __all__ as __all__
