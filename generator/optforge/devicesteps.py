"""What a device knows of its steps: their count, and the scalars of those to come, handed over ahead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from struct import Struct
from typing import Any

import numpy as np

from .cudasource import CONTROL, ROWS, WINDOW
from .device import Device
from .rowsource import Rows

KINDS = {"uint64_t": "u8", "uint32_t": "u4", "int32_t": "i4"}


def struct(entries: Any) -> np.dtype[Any]:
    """The dtype of a struct of the emitted files; pointers are whole numbers."""
    return np.dtype([(name, KINDS.get(kind.strip(), "u8")) for kind, name, _ in entries], align=True)


CONTROL_STRUCT = struct((*CONTROL, *WINDOW))
PACK_WINDOW = Struct(f"@{len(WINDOW)}Q").pack
WINDOW_AT = struct(CONTROL).itemsize
MOST_PENDING = ROWS // 2


class DeviceSteps:
    """Counts an optimizer's steps on a device.

    The device itself decides whether a step is skipped, and so which number the next one has. The host does not wait to
    learn it: it hands over the scalars of every step that may be the next. Only when it has lost sight of
    `MOST_PENDING` steps, or is asked for the count, it waits.
    """

    def __init__(self, device: Device, rows: Rows, stream: Any):
        self.device, self.rows, self.stream = device, rows, stream
        self.groups = 0
        self.block: Any = None
        self.values, self.grad_scale = b"", 1.0  # of the scalars that the device has
        self.used: tuple[int, ...] = ()
        self.next = self.first = self.end = self.ahead = 0
        # While the device decides: steps that have been applied for certain, steps since then, and what the optimizer,
        # which does not know the outcome yet, believes the next one to be.
        self.deciding = False
        self.known = self.pending = self.told = 0
        self.seen: Any = None
        self.event: Any = None

    def room(self, groups: int) -> dict[str, int]:
        """The addresses of what kernels read, for so many groups."""
        size = self.rows.size * groups
        with self.device:
            if self.block is None or self.groups != groups:
                # The scalars of a step stand right behind the window that tells of them, so that one copy brings both.
                self.block = self.device.allocate(CONTROL_STRUCT.itemsize + (ROWS + 1) * size)
                self.device.drv.memset_d8_async(int(self.block), 0, CONTROL_STRUCT.itemsize, self.stream)
                self.groups, self.values = groups, b""
                self.next, self.deciding = 0, False  # it is told the number of the next step
        control = int(self.block)
        rows = control + CONTROL_STRUCT.itemsize
        return {"control": control, "rows": rows, "s": rows + ROWS * size}

    def bring(
        self, hyperparameters: Any, used: tuple[int, ...], t: int, grad_scale: float, explain: Callable[[], Any]
    ) -> None:
        """Make sure that the device has the scalars of step t, and of those that may come instead, for groups in use.

        They are handed over ahead for more and more steps while nothing changes. `explain` raises what a scalar without
        a value is to say.
        """
        low, pending, sets = t, 0, t != self.next
        if self.deciding and t == self.told:
            self.look()
            low, pending, sets = self.known + 1, self.pending, False
        values = hyperparameters.tobytes()
        same = values == self.values and grad_scale == self.grad_scale and used == self.used
        if same and not sets and self.first <= low and low + pending < self.end:
            return
        self.ahead = min(2 * self.ahead, ROWS) if same and not sets else 1
        rows = self.table(hyperparameters, used, range(low, low + min(pending + self.ahead, ROWS)), grad_scale)
        if len(rows) <= pending:
            explain()
            raise ArithmeticError(f"a scalar has no value at t={low + len(rows)}")
        # Kept until the copy is done.
        self.brought = b"".join([PACK_WINDOW(sets, low - 1, low, len(rows)), *rows])
        self.device.drv.memcpy_htod_async(int(self.block) + WINDOW_AT, self.brought, self.stream)
        self.values, self.used, self.grad_scale = values, used, grad_scale
        self.first, self.end = low, low + len(rows)

    def table(self, hyperparameters: Any, used: tuple[int, ...], steps: range, grad_scale: float) -> list[bytes]:
        """The scalars of steps, each for all groups, up to the first step at which one has no value."""
        groups, compute, pack = hyperparameters.tolist(), self.rows.compute, self.rows.pack
        rows = []
        for t in steps:
            own = [bytes(self.rows.size)] * len(groups)
            try:
                for k in used:
                    own[k] = pack(*compute(groups[k], float(t), 1 / grad_scale))
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
