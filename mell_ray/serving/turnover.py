"""How fast a waiting line moves, for telling clients when to come back. Pure."""

from __future__ import annotations

import collections
import math

WINDOW_S = 60.0
REMEMBERED = 512
LONGEST_S = 60
UNKNOWN_S = 5  # nobody has left the line lately


class Turnover:
    """Departures from a line within the last ``WINDOW_S`` seconds. Times in seconds."""

    def __init__(self) -> None:
        self._left: collections.deque[float] = collections.deque(maxlen=REMEMBERED)

    def left(self, now: float) -> None:
        """One request has left the line."""
        self._left.append(now)

    def wait_s(self, waiting: int, now: float) -> int:
        """Whole seconds until as many as wait now will have left, as fast as they did lately; at
        least 1, at most ``LONGEST_S``."""
        while self._left and now - self._left[0] > WINDOW_S:
            self._left.popleft()
        if not self._left:
            return UNKNOWN_S
        per_request = (now - self._left[0]) / len(self._left)
        return min(LONGEST_S, max(1, math.ceil(waiting * per_request)))
