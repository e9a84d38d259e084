"""Ray objects: always there, the only way between CPU replicas and between nodes without NCCL.

The parcel is the chunk itself, in few contiguous arrays: the source returns them to the target that
asked, Ray copies them into shared memory (or onto the wire), and the target maps them without a
copy. The target owns the object and is the only one that refers to it; it lets go of it when the
chunk has been taken in.
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
