"""The front of train/schedules.py: `from optforge.schedules import cosine`."""

from .train.schedules import *  # noqa: F403
from .train.schedules import __all__ as __all__
