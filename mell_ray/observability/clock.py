"""When what happened to one request, as its ingress saw it. Pure; times are ``time.monotonic``."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal

StallKind = Literal["migration", "recovery"]
MAX_PLACES = 64


@dataclass(slots=True)
class Stay:
    """A stretch on one replica."""

    replica_id: str
    since: float
    until: float
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Stall:
    """The gap between the last token before a change of owner and the first one after it."""

    kind: StallKind
    at: float
    seconds: float


@dataclass(slots=True)
class RequestClock:
    """Written by the runner of the request (``placed``, ``tokens``, ``lost``) and by the service
    (``stopped``: a stop string was complete)."""

    accepted: float = field(default_factory=time.monotonic)
    accepted_wall: float = field(default_factory=time.time)
    placed_at: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    num_tokens: int = 0
    stays: list[Stay] = field(default_factory=list)
    stalls: list[Stall] = field(default_factory=list)
    migrations: int = 0
    recoveries: int = 0
    stopped: bool = False
    _generation: int = 0
    _recovering: bool = False

    def placed(self, now: float) -> None:
        """The Router has named a replica; only the first time counts as the end of queueing."""
        if self.placed_at is None:
            self.placed_at = now

    def lost(self) -> None:
        """The owner died or gave the request up; what comes next is a recovery."""
        self.recoveries += 1
        self._recovering = True

    def tokens(self, now: float, replica_id: str, generation: int, count: int) -> float | None:
        """``count`` new tokens from ``replica_id``. Returns the gap since the tokens before, None
        for the first."""
        gap = None if self.last_token is None else now - self.last_token
        if generation != self._generation:
            self._changed_owner(now, gap)
            self._generation = generation
        if not self.stays or self.stays[-1].replica_id != replica_id:
            since = now if self.placed_at is None or self.stays else self.placed_at
            self.stays.append(Stay(replica_id, since, now))
            # A request may move for ever; what is kept of it must not grow for ever.
            del self.stays[:-MAX_PLACES]
        stay = self.stays[-1]
        stay.until, stay.tokens = now, stay.tokens + count
        if self.first_token is None:
            self.first_token = now
        self.last_token = now
        self.num_tokens += count
        return gap

    def _changed_owner(self, now: float, gap: float | None) -> None:
        recovering, self._recovering = self._recovering, False
        if not self._generation:
            return
        if not recovering:
            self.migrations += 1
        if gap is not None:
            kind: StallKind = "recovery" if recovering else "migration"
            self.stalls.append(Stall(kind, now, gap))
            del self.stalls[:-MAX_PLACES]

    @property
    def queue_s(self) -> float | None:
        return None if self.placed_at is None else self.placed_at - self.accepted

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.accepted

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None with fewer than two tokens."""
        if self.first_token is None or self.last_token is None or self.num_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.num_tokens - 1)

    def breakdown(self) -> dict[str, Any]:
        """What ``x-mell-trace: 1`` answers with: milliseconds, and where the request ran."""
        first, last = self.first_token, self.last_token
        placed = self.placed_at
        return {
            "queue_ms": _ms(placed, self.accepted),
            "prefill_ms": _ms(first, placed),
            "decode_ms": _ms(last, first),
            "ttft_ms": _ms(first, self.accepted),
            "total_ms": _ms(last, self.accepted),
            "tokens": self.num_tokens,
            "migrations": self.migrations,
            "recoveries": self.recoveries,
            "stalls": [
                {
                    "kind": stall.kind,
                    "at_ms": _ms(stall.at, self.accepted),
                    "ms": round(stall.seconds * 1e3, 3),
                }
                for stall in self.stalls
            ],
            "replicas": [
                {
                    "id": stay.replica_id,
                    "from_ms": _ms(stay.since, self.accepted),
                    "to_ms": _ms(stay.until, self.accepted),
                    "tokens": stay.tokens,
                }
                for stay in self.stays
            ],
        }


def _ms(later: float | None, earlier: float | None) -> float | None:
    return None if later is None or earlier is None else round((later - earlier) * 1e3, 3)
