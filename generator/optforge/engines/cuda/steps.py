"""What a device knows of its steps: their count, and the scalars of those to come, handed over ahead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from struct import Struct
from typing import Any

import numpy as np

from ...emit import layout
from .device import Device
from .rows import Rows

KINDS = {"uint64_t": "u8", "uint32_t": "u4", "int32_t": "i4"}


def struct(name: str) -> np.dtype[Any]:
    """The dtype of a struct of the runtime; pointers are whole numbers."""
    return np.dtype([(own, KINDS.get(kind, "u8")) for kind, own in layout.members(name)], align=True)


CONTROL_STRUCT = struct("optforge_cuda_control")
ROWS = layout.constant("OPTFORGE_CUDA_ROWS")
WORDS = layout.constant("OPTFORGE_CUDA_NEWS")  # of 8 bytes, that one kernel brings
PACK_NEWS = Struct("@6Q2i").pack  # what stands behind the plan in optforge_cuda_news, before the words
MOST_PENDING = ROWS // 2

Row = tuple[int, int]
"""A group, and how many steps fewer than the optimizer tensors have had: each has scalars of its own."""


def news(window: tuple[int, int, int, int], at: int, data: bytes, told: bool, begins: bool) -> bytes:
    """What the kernel that begins steps is given behind the plan."""
    return PACK_NEWS(*window, at, len(data) // 8, told, begins) + data.ljust(8 * WORDS, b"\0")


BEGIN = news((0, 0, 0, 0), 0, b"", False, True)


class DeviceSteps:
    """Counts an optimizer's steps on a device.

    The device itself decides whether a step is skipped, and so which number the next one has. The host does not wait to
    learn it: it hands over the scalars of every step that may be the next. Only when it has lost sight of
    `MOST_PENDING` steps, or is asked for the count, it waits.
    """

    def __init__(self, device: Device, rows: Rows, stream: Any):
        self.device, self.rows, self.stream = device, rows, stream
        self.count = 0
        self.block: Any = None
        self.values, self.grad_scale = b"", 1.0  # of the scalars that the device has
        self.used: tuple[Row, ...] = ()
        self.next = self.first = self.end = self.ahead = 0
        # While the device decides: steps that have been applied for certain, steps since then, and what the optimizer,
        # which does not know the outcome yet, believes the next one to be.
        self.deciding = False
        self.known = self.pending = self.told = 0
        self.seen: Any = None
        self.event: Any = None

    def room(self, count: int) -> dict[str, int]:
        """The addresses of what kernels read, for so many rows of scalars."""
        with self.device:
            if self.block is None or self.count < count:
                before, drv = self.block, self.device.drv
                self.block = self.device.allocate(CONTROL_STRUCT.itemsize + (ROWS + 1) * self.rows.size * count)
                if before is None:
                    drv.memset_d8_async(int(self.block), 0, CONTROL_STRUCT.itemsize, self.stream)
                else:
                    self.wait()
                    drv.memcpy_dtod_async(int(self.block), int(before), CONTROL_STRUCT.itemsize, self.stream)
                self.count, self.values = count, b""
        control = int(self.block)
        rows = control + CONTROL_STRUCT.itemsize
        return {"control": control, "rows": rows, "scalars": rows + ROWS * self.rows.size * self.count}

    def bring(
        self,
        hyperparameters: Any,
        used: tuple[Row, ...],
        t: int,
        grad_scale: float,
        explain: Callable[[], Any],
        store: Callable[[bytes], None],
    ) -> bytes:
        """Make sure that the device has the scalars of step t, and of those that may come instead, for rows in use.

        They are handed over ahead for more and more steps while nothing changes: as arguments of kernels, which `store`
        launches, the last of which begins the step: its argument is returned. `explain` raises what a scalar without a
        value is to say.
        """
        low, pending, sets = t, 0, t != self.next
        if self.deciding and t == self.told:
            self.look()
            low, pending, sets = self.known + 1, self.pending, False
        values = hyperparameters.tobytes()
        same = values == self.values and grad_scale == self.grad_scale and used == self.used
        if same and not sets and self.first <= low and low + pending < self.end:
            return BEGIN
        self.ahead = min(2 * self.ahead, ROWS) if same and not sets else 1
        rows = self.table(hyperparameters, used, range(low, low + min(pending + self.ahead, ROWS)), grad_scale)
        if len(rows) <= pending:
            explain()
            raise ArithmeticError(f"a scalar has no value at t={low + len(rows)}")
        data, most = b"".join(rows), 8 * WORDS
        window = (int(sets), low - 1, low, len(rows))
        last = max(len(data) - 1, 0) // most * most
        for start in range(0, last, most):
            store(news(window, start // 8, data[start : start + most], False, False))
        self.values, self.used, self.grad_scale = values, used, grad_scale
        self.first, self.end = low, low + len(rows)
        return news(window, last // 8, data[last:], True, True)

    def table(self, hyperparameters: Any, used: Sequence[Row], steps: range, grad_scale: float) -> list[bytes]:
        """The scalars of steps, each for all rows, up to the first step at which one has no value."""
        groups, compute, pack = hyperparameters.tolist(), self.rows.compute, self.rows.pack
        rows = []
        for t in steps:
            try:
                own = [pack(*compute(groups[group], float(t - late), 1 / grad_scale)) for group, late in used]
            except (ArithmeticError, ValueError):
                break
            rows.append(b"".join(own))
        return rows

    def __del__(self) -> None:
        with contextlib.suppress(Exception), self.device:  # PyCUDA frees in the current context alone
            self.seen = self.event = None

    # ── how far the device is ───────────────────────────────────────────────────────────────────────────────────

    def done(self, t: int, skipped: bool) -> None:
        """Step t is over, and whether it was skipped is known."""
        self.next, self.deciding = t if skipped else t + 1, False

    def defer(self, t: int) -> None:
        """Step t, or one before it, has been enqueued, and the device decides whether it is skipped."""
        if self.seen is None:
            self.seen = self.device.drv.pagelocked_zeros(2, np.uint64)
            self.event = self.device.drv.Event()
        if not self.deciding:
            self.deciding, self.known, self.told, self.pending = True, t - 1, t, 0
        self.pending += 1
        self.device.drv.memcpy_dtoh_async(self.seen, int(self.block), self.stream)
        self.event.record(self.stream)

    def look(self) -> None:
        """Learn how far the device is, if it has done all steps, or if it is too far behind to go on without."""
        if self.pending >= MOST_PENDING:
            self.event.synchronize()
        if self.pending and self.event.query():
            self.known, self.pending = int(self.seen[0]) - (int(self.seen[1]) & 0xFFFFFFFF), 0

    def applied(self) -> int:
        """The number of steps that were applied, once the device has done all."""
        if self.block is None:
            return self.known
        with self.device:
            control = self.read()
        self.known = int(control["t"]) - int(control["skipped"])
        self.next, self.deciding = self.known + 1, False
        return self.known

    def read(self) -> Any:
        """What the device knows; waits for it."""
        self.wait()
        control = np.zeros(1, CONTROL_STRUCT)
        self.device.drv.memcpy_dtoh(control, int(self.block))
        return control[0]

    def wait(self) -> None:
        """Wait for the stream; copies wait for the default one by themselves."""
        if self.stream is not None:
            self.stream.synchronize()
