"""How much of every GPU to keep free for growth, found by feedback."""

from __future__ import annotations

_WINDOW_TICKS = 64
_HALVING = 0.01  # share of a GPU that, kept free, halves what overflows


class Headroom:
    """Little headroom makes growing requests overflow and move; much of it leaves memory unused.

    What overflows falls with the headroom h about as 1 / (h0 + h), h0 = 1 % of a GPU, and a share
    h kept free costs about h / 2 of the GPUs, because what it absorbs is use, too (both measured on
    the traces of ``load_tests/scheduler_matrix.md``). The sum of both costs is least where the
    price of what overflows equals (h0 + h) / 2 of the GPU-seconds; the control moves there, in
    windows of 64 ticks.
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
        balance = 0.5 * (_HALVING + self._exact / capacity) * self._gpu_seconds
        if price * self._shed > balance:
            self._exact = min(0.1 * capacity, max(1.5 * self._exact, 0.004 * capacity))
        else:
            self._exact *= 0.8
            if self._exact < 0.001 * capacity:
                self._exact = 0.0
        self.units = int(self._exact)
        self._shed, self._gpu_seconds, self._ticks = 0, 0.0, 0
