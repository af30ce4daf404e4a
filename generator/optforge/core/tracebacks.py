"""The traceback of a user's mistake: it ends where the user's own line calls the package."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from .diagnostics import OptforgeError

MISTAKES = (OptforgeError, TypeError, ValueError, AttributeError)
PACKAGE = str(Path(__file__).parent.parent)


class Shortened:
    """What public functions do their work within: a mistake that the package finds there leaves without its frames.

    Those of a user's code that the package has called stay, and so does a cause. OPTFORGE_DEBUG=1 keeps all.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, _: TracebackType | None
    ) -> None:
        if problem is not None:
            shorten(problem)


def shorten(problem: BaseException) -> None:
    """Cut the frames below the public function that has caught a mistake."""
    trace = problem.__traceback__
    if trace is None or not isinstance(problem, MISTAKES) or os.environ.get("OPTFORGE_DEBUG"):
        return
    last = trace
    while last.tb_next is not None:
        last = last.tb_next
    if last.tb_frame.f_code.co_filename.startswith(PACKAGE):
        trace.tb_next = None
        if problem.__cause__ is None:
            problem.__context__ = None


SHORT = Shortened()
