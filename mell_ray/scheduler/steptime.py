"""Step-time model of one GPU: seconds = a + b x sequences + c x resident units, fitted online.

Recursive least squares with forgetting, after scaling the inputs to about 1. The fit counts only
once it rests on enough steps of different shape; coefficients are kept from going negative, as no
load makes a step shorter.
"""

from __future__ import annotations

_FORGET = 0.995
_MIN_STEPS = 32
_SCALE_SEQUENCES = 32.0
_SCALE_TOKENS = 32768.0


class StepTimeModel:
    """Prediction for one GPU. Sizes are in the driver's unit of ``tokens_per_unit`` tokens."""

    def __init__(self, limit_s: float, tokens_per_unit: int) -> None:
        self.limit_s = limit_s
        self._unit = tokens_per_unit / _SCALE_TOKENS
        self._theta = [0.0, 0.0, 0.0]
        self._p = [[1e4, 0.0, 0.0], [0.0, 1e4, 0.0], [0.0, 0.0, 1e4]]
        self.steps = 0

    def observe(self, sequences: int, tokens: int, seconds: float) -> None:
        """Learn from one step with that many sequences and resident tokens."""
        x = (1.0, sequences / _SCALE_SEQUENCES, tokens / _SCALE_TOKENS)
        p = self._p
        px = [row[0] * x[0] + row[1] * x[1] + row[2] * x[2] for row in p]
        gain = _FORGET + x[0] * px[0] + x[1] * px[1] + x[2] * px[2]
        error = seconds - sum(t * v for t, v in zip(self._theta, x, strict=True))
        for i in range(3):
            self._theta[i] += px[i] / gain * error
        for i in range(3):
            for j in range(3):
                p[i][j] = (p[i][j] - px[i] * px[j] / gain) / _FORGET
            p[i][i] = min(p[i][i], 1e6)  # steps all alike must not blow it up
        self.steps += 1

    @property
    def ready(self) -> bool:
        return self.steps >= _MIN_STEPS

    def coefficients(self) -> tuple[float, float, float]:
        """(a, b, c): seconds, seconds per sequence, seconds per resident token; none negative."""
        a, b, c = (max(0.0, t) for t in self._theta)
        return a, b / _SCALE_SEQUENCES, c / _SCALE_TOKENS

    def predict(self, sequences: int, size: int) -> float:
        """Seconds of a step with that many sequences and resident units."""
        a, b, c = (max(0.0, t) for t in self._theta)
        return a + b * sequences / _SCALE_SEQUENCES + c * size * self._unit

    def room(self, sequences: int, size: int) -> int:
        """Units that fit under the limit beside ``size``, with ``sequences`` running; at least 0:
        a GPU that is too slow takes nothing more, and is not emptied for it."""
        if not self.ready:
            return 1 << 40
        spare = self.limit_s - self.predict(sequences, size)
        slope = max(0.0, self._theta[2]) * self._unit
        if spare <= 0.0:
            return 0
        return int(spare / slope) if slope > 1e-12 else 1 << 40
