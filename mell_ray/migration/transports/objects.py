"""Ray objects: always there, the only way between CPU replicas and between nodes without NCCL.

The parcel is the chunk itself, in few contiguous arrays: the source returns them to the target that
asked, Ray copies them into shared memory (or onto the wire), and the target maps them without a
copy. The target owns the object and is the only one that refers to it; it lets go of it when the
chunk has been taken in. Where chunk follows chunk on one node, the object is one that the target
keeps for them, and the source writes into it: see ``berths``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mell_ray.migration.transports.base import OBJECTS
from mell_ray.migration.transports.berths import Berth, Berths, BerthWriter, Memory


class ObjectTransport:
    """See the module. There is no link to open. ``memory``: None: every chunk is a new object."""

    name = OBJECTS
    on_device = False

    def __init__(self, memory: Memory | None = None, max_bytes: int = 0) -> None:
        self._berths = Berths(memory, max_bytes) if memory is not None else None
        self._writer = BerthWriter(memory) if memory is not None else None

    def offer(self, peer: str) -> None:
        del peer

    async def join(self, peer: str, ticket: Any, *, is_source: bool, timeout_s: float) -> None:
        del peer, ticket, is_source, timeout_s

    @contextmanager
    def berth(self, peer: str, nbytes: int) -> Iterator[Berth | None]:
        """At the target: memory for the next chunk of ``peer`` to land in, for as long as it is
        asked for and taken in; to be named to ``peer`` and to ``recv_blocks``."""
        if self._berths is None:
            yield None
            return
        with self._berths.lend(peer, nbytes) as berth:
            yield berth

    async def send_blocks(
        self, peer: str, data: list[np.ndarray], timeout_s: float, berth: Berth | None = None
    ) -> Any:
        del timeout_s
        if berth is None or self._writer is None:
            return data
        return await self._writer.write(peer, berth, data) or data

    async def recv_blocks(
        self, peer: str, parcel: Any, timeout_s: float, berth: Berth | None = None
    ) -> list[np.ndarray]:
        del timeout_s
        if berth is None or self._berths is None:
            return parcel
        return self._berths.received(peer, berth, parcel)

    def abort(self, peer: str) -> None:
        del peer
