"""Which transport to use between two replicas: what reaches, what has worked, how fast it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mell_ray.migration.transports.base import (
    OBJECTS,
    Endpoint,
    TransportName,
    reachable,
)

# Bytes a second assumed of a link that has not been used yet.
FIRST_GUESS: dict[TransportName, float] = {"cuda_ipc": 100e9, "nccl": 20e9, "objects": 2e9}
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0
LEARN = 0.3
REMEMBERED = 4096  # links; replicas come and go for ever
# Smaller transfers say more about latency than about bandwidth.
MEASURED_FROM_BYTES = 1 << 20


@dataclass(slots=True)
class _Link:
    bytes_per_s: float
    failures: int = 0
    closed_until: float = 0.0  # monotonic


class LinkTable:
    """Measured state of every (source, target, transport). Pure; the caller brings the time."""

    def __init__(self, allowed: Sequence[TransportName]) -> None:
        # Ray objects need nothing but Ray, and are what everything falls back to.
        self._allowed = tuple(dict.fromkeys([*allowed, OBJECTS]))
        self._links: dict[tuple[str, str, TransportName], _Link] = {}

    def ranked(self, src: Endpoint, dst: Endpoint, now: float) -> list[TransportName]:
        """Usable transports, the fastest first. One that failed lately is left out until it is
        time to probe its link again; Ray objects are always there."""
        usable = [
            name
            for name in self._allowed
            if reachable(name, src, dst)
            and (name == OBJECTS or self._link(src, dst, name).closed_until <= now)
        ]
        return sorted(usable, key=lambda name: -self._link(src, dst, name).bytes_per_s)

    def worked(
        self, src: Endpoint, dst: Endpoint, name: TransportName, nbytes: int, seconds: float
    ) -> None:
        """``nbytes`` have arrived in ``seconds``."""
        link = self._link(src, dst, name)
        link.failures = 0
        if nbytes >= MEASURED_FROM_BYTES and seconds > 0:
            link.bytes_per_s += LEARN * (nbytes / seconds - link.bytes_per_s)

    def failed(self, src: Endpoint, dst: Endpoint, name: TransportName, now: float) -> float:
        """The link broke. Returns for how many seconds it is left alone: twice as long each
        time."""
        link = self._link(src, dst, name)
        pause = min(FIRST_PAUSE_S * 2**link.failures, LONGEST_PAUSE_S)
        link.failures += 1
        link.closed_until = now + pause
        return pause

    def _link(self, src: Endpoint, dst: Endpoint, name: TransportName) -> _Link:
        key = (src.replica_id, dst.replica_id, name)
        link = self._links.pop(key, None) or _Link(FIRST_GUESS[name])
        self._links[key] = link  # the last used last
        if len(self._links) > REMEMBERED:
            del self._links[next(iter(self._links))]
        return link
