"""How much of every GPU to keep free for growth, found by feedback."""

from __future__ import annotations

_WINDOW_TICKS = 64


class Headroom:
    """Little headroom makes growing requests overflow and move; much of it leaves memory unused.

    The cost of the first falls with headroom, that of the second rises, and the control moves to
    where they cross: within a factor of two of the best fixed headroom under a stationary load.
    """

    def __init__(self, fixed: float | None) -> None:
        """``fixed``: a share of the capacity; None: find it."""
        self._fixed = fixed
        self.units = 0
        self._exact = 0.0
        self._shed = 0
        self._gpu_seconds = 0.0
        self._ticks = 0

    def shed(self, units: int) -> None:
        """That much had to move because it no longer fitted."""
        self._shed += units

    def tick(self, elapsed_s: float, gpus: int, capacity: int, price: float) -> None:
        if self._fixed is not None:
            self.units = int(self._fixed * capacity)
            return
        self._gpu_seconds += gpus * elapsed_s
        self._ticks += 1
        if self._ticks < _WINDOW_TICKS or not capacity:
            return
        if price * self._shed > self._exact / capacity * self._gpu_seconds:
            self._exact = min(0.1 * capacity, max(1.25 * self._exact, 0.002 * capacity))
        else:
            self._exact *= 0.8
            if self._exact < 0.001 * capacity:
                self._exact = 0.0
        self.units = int(self._exact)
        self._shed, self._gpu_seconds, self._ticks = 0, 0.0, 0
