"""Ray objects: always there, the only way between CPU replicas and between nodes without NCCL.

The parcel is the chunk itself, in few contiguous arrays: the actor returns them, Ray copies them
into shared memory (or onto the wire), and the target maps them without a copy. The Migrator holds
the only reference and drops it when the target has taken the chunk in.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mell_ray.migration.transports.base import OBJECTS


class ObjectTransport:
    """See the module. Holds no state: there is no link to open or to lose."""

    name = OBJECTS
    on_device = False

    def offer(self, peer: str) -> None:
        del peer

    async def join(self, peer: str, ticket: Any, *, is_source: bool, timeout_s: float) -> None:
        del peer, ticket, is_source, timeout_s

    async def send_blocks(
        self, peer: str, data: list[np.ndarray], timeout_s: float
    ) -> list[np.ndarray]:
        del peer, timeout_s
        return data

    async def recv_blocks(
        self, peer: str, parcel: list[np.ndarray], timeout_s: float
    ) -> list[np.ndarray]:
        del peer, timeout_s
        return parcel

    def abort(self, peer: str) -> None:
        del peer
