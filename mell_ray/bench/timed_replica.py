"""A replica that says when blocks were given to its transport and when they could be read."""

from __future__ import annotations

import time
from typing import Any, Literal

import numpy as np

from mell_ray.migration.transports.base import OBJECTS, Parcel
from mell_ray.migration.transports.objects import ObjectTransport
from mell_ray.serving.replica import GPUReplica
from mell_ray.serving.replica_migration import control

Event = Literal["given", "readable"]


class TimedObjects(ObjectTransport):
    """Ray objects, with the moments of both halves. ``keep``: else what is received ends here,
    readable but copied nowhere."""

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self.moments: list[tuple[Event, float]] = []

    async def send_blocks(
        self, peer: str, data: list[np.ndarray], timeout_s: float
    ) -> list[np.ndarray]:
        self.moments.append(("given", time.perf_counter()))
        return await super().send_blocks(peer, data, timeout_s)

    async def recv_blocks(self, peer: str, parcel: Parcel, timeout_s: float) -> list[np.ndarray]:
        data = await super().recv_blocks(peer, parcel, timeout_s)
        self.moments.append(("readable", time.perf_counter()))
        return data if self._keep else []


class TimedReplica(GPUReplica):
    """A replica like any other until ``time_transport`` is called."""

    @control
    async def time_transport(self, keep: bool) -> None:
        self._timed: Any = TimedObjects(keep=keep)
        self._mover.transports[OBJECTS] = self._timed

    @control
    async def plain_transport(self) -> None:
        self._mover.transports[OBJECTS] = ObjectTransport()

    @control
    async def moments(self) -> list[tuple[Event, float]]:
        """Those since the last call, by the clock that all processes of this machine share."""
        found, self._timed.moments = self._timed.moments, []
        return found
