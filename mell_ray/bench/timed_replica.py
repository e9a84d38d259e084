"""A replica that says when blocks were given to its transport and when they could be read."""

from __future__ import annotations

import time
from typing import Literal

import numpy as np

from mell_ray.migration.transports.base import Parcel
from mell_ray.migration.transports.berths import Berth, Memory
from mell_ray.migration.transports.objects import ObjectTransport
from mell_ray.serving.replica import GPUReplica
from mell_ray.serving.replica_migration import control
from mell_ray.serving.shared_objects import RayMemory

Event = Literal["given", "readable"]


class TimedObjects(ObjectTransport):
    """Ray objects, with the moments of both halves. Without ``keep`` what is received ends here,
    readable but copied nowhere."""

    def __init__(self, memory: Memory, max_bytes: int) -> None:
        super().__init__(memory, max_bytes)
        self.keep = True
        self.moments: list[tuple[Event, float]] = []

    async def send_blocks(
        self, peer: str, data: list[np.ndarray], timeout_s: float, berth: Berth | None = None
    ) -> Parcel:
        self.moments.append(("given", time.perf_counter()))
        return await super().send_blocks(peer, data, timeout_s, berth)

    async def recv_blocks(
        self, peer: str, parcel: Parcel, timeout_s: float, berth: Berth | None = None
    ) -> list[np.ndarray]:
        data = await super().recv_blocks(peer, parcel, timeout_s, berth)
        self.moments.append(("readable", time.perf_counter()))
        return data if self.keep else []


class TimedReplica(GPUReplica):
    """A replica like any other until ``time_transport`` is called."""

    _timed: TimedObjects | None = None

    @control
    async def time_transport(self, keep: bool) -> None:
        if self._timed is None:
            self._timed = TimedObjects(RayMemory.here(), self._spec.migration.buffer_bytes)
            self._plain = self._mover.objects
            self._mover.use(self._timed)
        self._timed.keep = keep

    @control
    async def plain_transport(self) -> None:
        if self._timed is not None:
            self._mover.use(self._plain)
            self._timed = None

    @control
    async def moments(self) -> list[tuple[Event, float]]:
        """Those since the last call, by the clock that all processes of this machine share."""
        assert self._timed is not None
        found, self._timed.moments = self._timed.moments, []
        return found
