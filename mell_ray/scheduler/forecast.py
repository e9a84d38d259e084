"""How many GPUs to have, when one takes time to start.

The number needed in one start-up time from now is predicted from the number needed now: mean + rho
x (now - mean), with the mean, the variance and the correlation rho over one start-up time learnt
online, older moments weighing less. Requests that live much longer than a GPU takes to start give
rho near 1: follow demand. Short ones give rho near 0: hold the mean, for a GPU asked for now would
come too late for what is waiting. To the prediction z times its error's standard deviation is
added. z is not a setting but follows from what came of it: it rises while requests wait for room
and falls while none do, so that the share of demand that waits settles at the target; so it covers
what packing loses, too. Nothing is known of the future and nothing is tuned per workload.
"""

from __future__ import annotations

import math
from collections import deque

_MEMORY_S = 300.0
_GAIN = 20.0  # of z per excess shortage and start-up time: slower where its effect comes later
_Z_MIN, _Z_MAX = -1.0, 8.0


class Forecast:
    """Fed once per tick; ``target`` is the answer."""

    def __init__(self, shortage: float) -> None:
        """``shortage``: share of demand that may wait."""
        self._shortage = shortage
        self._past: deque[tuple[float, float]] = deque()
        self._last_s: float | None = None
        self._age_s = 0.0
        self._mean = 0.0
        self._variance = 0.0
        self._covariance = 0.0
        self._needed = 0.0
        self.z = 1.5
        self.young = True  # has seen too little: what waits while an empty fleet fills says nothing

    def observe(self, now: float, needed: float, waiting_share: float, horizon_s: float) -> None:
        """Learn from a tick.

        Args:
            needed: GPUs that all requests, waiting ones included, would fill to the brim.
            waiting_share: of all requests' size, what waits for room.
            horizon_s: time that a GPU takes to start.
        """
        elapsed = min(now - self._last_s, 5.0) if self._last_s is not None else 0.0
        self._last_s, self._needed = now, needed
        self.young = self._age_s <= 30.0 + 2 * horizon_s
        if not self.young:
            excess = min(waiting_share, 30 * self._shortage) - self._shortage
            self.z += _GAIN * elapsed / max(horizon_s, 2.0) * excess
            self.z = min(max(self.z, _Z_MIN), _Z_MAX)
        self._past.append((now, needed))
        while len(self._past) > 1 and self._past[1][0] <= now - horizon_s:
            self._past.popleft()
        self._age_s += elapsed
        # While young, three quarters of the weight lie on the last third of the past, so that the
        # filling of an empty fleet is soon forgotten.
        memory_s = min(max(_MEMORY_S, 4 * horizon_s), self._age_s / 3)
        share = min(1.0, elapsed / memory_s) if memory_s > 0 else 1.0
        self._mean += share * (needed - self._mean)
        off, before = needed - self._mean, self._past[0][1] - self._mean
        self._variance += share * (off * off - self._variance)
        self._covariance += share * (off * before - self._covariance)

    def correlation(self) -> float:
        """Of the GPUs needed now and one start-up time before, from 0 to 1."""
        if self._variance <= 0.0:
            return 1.0
        return min(1.0, max(0.0, self._covariance / self._variance))

    def target(self) -> int:
        """GPUs to have ready or starting."""
        rho = self.correlation()
        error = math.sqrt(max(0.0, self._variance) * (1.0 - rho * rho))
        expected = self._mean + rho * (self._needed - self._mean)
        return max(0, math.ceil(expected + self.z * error - 0.5))
