"""What migrations take from the requests that decode beside them, and when that is paid off. Pure.

Two things are counted while a migration is at a replica and others decode there: time for which
the engine was held between steps, and what steps took longer than steps of as many requests take
when nothing moves: on a CPU the processes of a migration want the cores that decode. Together they
may be a share of all time; what is beyond is owed, and paid off by leaving the replica alone.
"""

from __future__ import annotations

_LEARN = 0.05
# A migration still costs while its last messages are on their way and its objects are freed.
_STEPS_AFTER = 3
# What moves that could not wait have taken beyond this is forgiven: the others wait no longer.
_LONGEST_REST_S = 5.0


class Toll:
    """The account of one replica; used in its engine thread. ``share``: above 0; 1: no limit."""

    def __init__(self, share: float, now: float) -> None:
        self._share = share
        self._usual: dict[int, float] = {}  # seconds of a step by how many decode in it
        self._owed_s = 0.0
        self._stretched_s = 0.0  # of the migrations under way; noise cancels before it counts
        self._steps_since = _STEPS_AFTER
        self._paid_at = now

    def held(self, seconds: float) -> None:
        """A migration has kept the engine from its next step for that long."""
        self._owed_s += seconds

    def stepped(self, num_decoding: int, seconds: float, *, moving: bool, others: bool) -> None:
        """A step that only decoded has taken that long. ``moving``: a migration is at this replica;
        ``others``: requests that do not move were among those decoding."""
        usual = self._usual.get(num_decoding)
        self._steps_since = 0 if moving else self._steps_since + 1
        if self._steps_since >= _STEPS_AFTER:
            self._count_stretch()
            self._usual[num_decoding] = (
                seconds if usual is None else usual + _LEARN * (seconds - usual)
            )
        elif usual is not None and others:
            self._stretched_s += seconds - usual

    def rest_s(self, now: float) -> float:
        """For how long the replica is to be left alone before something moves that can wait."""
        paid = self._share * (now - self._paid_at)
        self._paid_at = now
        self._owed_s = min(max(0.0, self._owed_s - paid), _LONGEST_REST_S * self._share)
        if self._share >= 1:
            return 0.0
        return (self._owed_s + max(0.0, self._stretched_s)) / self._share

    def _count_stretch(self) -> None:
        self._owed_s += max(0.0, self._stretched_s)
        self._stretched_s = 0.0
