"""How much of an engine's time migrations may take. Pure.

Gathering and scattering blocks happen between two steps, so they make the next step late for every
request of the replica. They are therefore cut into slices, each at most a configured share of a
step long, with a pause after each that keeps the share over time too.
"""

from __future__ import annotations

from collections.abc import Iterator

_LEARN = 0.3
_FIRST_GUESS_BYTES_PER_S = 2e9


class Pacer:
    """``share``: of step time, above 0; 1 or more: no limit."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._step_s = 0.0  # 0: no step yet
        self._bytes_per_s = _FIRST_GUESS_BYTES_PER_S

    def stepped(self, seconds: float) -> None:
        """A step has taken that long."""
        self._step_s += (_LEARN if self._step_s else 1.0) * (seconds - self._step_s)

    def slices(self, num_blocks: int, block_nbytes: int, *, busy: bool) -> Iterator[range]:
        """Cut ``num_blocks`` into what may be copied between two steps, one block at least.
        ``busy``: others are decoding; without them there is nothing to spare."""
        if not busy or self._share >= 1 or not self._step_s:
            yield range(num_blocks)
            return
        start = 0
        while start < num_blocks:
            allowed = self._share * self._step_s * self._bytes_per_s
            stop = min(num_blocks, start + max(1, int(allowed / block_nbytes)))
            yield range(start, stop)
            start = stop

    def copied(self, nbytes: int, seconds: float) -> None:
        """A slice of ``nbytes`` has taken ``seconds``."""
        if nbytes and seconds > 0:
            self._bytes_per_s += _LEARN * (nbytes / seconds - self._bytes_per_s)

    def pause_for(self, nbytes: int, *, busy: bool) -> float:
        """``pause_s`` of a copy of ``nbytes`` that is not timed itself."""
        return self.pause_s(nbytes / self._bytes_per_s, busy=busy)

    def pause_s(self, seconds: float, *, busy: bool) -> float:
        """How long to leave the engine alone after a slice that took ``seconds``."""
        if not busy or self._share >= 1:
            return 0.0
        return seconds * (1 - self._share) / self._share
