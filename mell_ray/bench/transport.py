"""How fast blocks travel as Ray objects, beside this machine's memcpy.

Two figures, of the same migrations' calls:

- *transport*: from the moment the source gives the first block away (``send_blocks``) until the
  target can read the last one (``recv_blocks``). In it: Ray's copy into shared memory, the message
  from the source to the target, and where there are several chunks all that lies between them.
  Not in it: the request for the first chunk, and copying into the target's pool (left out for this
  figure, so that it does not take the cores either).
- *pool to pool*: from the driver's first call to the target's last answer; everything.

Both move blocks that lie in no cache, and so does memcpy: each takes the next part of memory larger
than the caches. All figures are medians.
"""

from __future__ import annotations

import asyncio
import time
from statistics import median
from typing import Any

import numpy as np

from mell_ray.bench.local_ray import OBJECT_STORE_BYTES
from mell_ray.bench.rig import Rig, Watched
from mell_ray.migration.copying import BlockCopier, CopyLimits
from mell_ray.migration.faults import Faults
from mell_ray.migration.peers import PlainWay
from mell_ray.migration.types import MigrationOrder
from mell_ray.serving.migrator import RaySource, RayTarget

SIZES_MIB = (16, 32, 64)
REQUESTS = 3  # of the largest size each, to take turns
WARM_UP = 3  # transfers and copies of each kind that are not counted
COPIES = 3  # of memcpy after each transfer
FREE_S = 1.5  # within that time Ray gives freed objects' memory back to its store


class Memcpy:
    """One thread copying memory that is mapped but in no cache, as blocks of a pool are."""

    BUFFER_BYTES = 512 << 20

    def __init__(self) -> None:
        self._source = np.ones(self.BUFFER_BYTES, np.uint8)
        self._target = np.ones(self.BUFFER_BYTES, np.uint8)
        self._at = 0

    def seconds(self, nbytes: int) -> float:
        if self._at + nbytes > self.BUFFER_BYTES:
            self._at = 0
        part = slice(self._at, self._at + nbytes)
        self._at += nbytes
        started = time.perf_counter()
        np.copyto(self._target[part], self._source[part])
        return time.perf_counter() - started


class Transfers:
    """Blocks of frozen requests from the first replica to the second, again and again. The replicas
    are ``TimedReplica``."""

    def __init__(self, rig: Rig) -> None:
        self.source, self.target = rig.replicas
        info = self.source.info
        assert info is not None
        self.info = info
        self.ends = (
            RaySource(self.source.actor, Faults(None)),
            RayTarget(self.target.actor, Faults(None)),
        )
        self._limits = CopyLimits(
            info.block_nbytes, max(1, rig.chunk_bytes // info.block_nbytes), 30.0
        )
        self._orders: list[MigrationOrder] = []
        self._next: list[tuple[int, int]] = []  # (request, first block)
        self.blocks_of = 0  # each request

    async def add(self, watched: Watched) -> None:
        """A request that runs on the first replica, with at least as much KV as the largest size,
        or what there is counts; it rests there until ``close``."""
        order = MigrationOrder(
            f"bench-transport-{watched.track.request_id}",
            watched.track.request_id,
            self.source.replica_id,
            self.target.replica_id,
            "kv",
            "bench",
        )
        state = await self.ends[0].begin(order)
        await self.ends[1].reserve(order, state)
        await self.ends[0].freeze(order.migration_id, 0)[0]
        self._orders.append(order)
        self.blocks_of = state.num_computed // self.info.block_size

    async def close(self) -> None:
        for order in self._orders:
            await self.ends[1].settle(order.migration_id)
            await self.ends[0].thaw(order)
        for replica in (self.source, self.target):
            await replica.actor.plain_transport.remote()

    async def keep(self, keep: bool) -> None:
        for replica in (self.source, self.target):
            await replica.actor.time_transport.remote(keep)

    async def touch(self, store_bytes: int) -> None:
        """Use half of Ray's store at both ends (of more it would spill some): what follows finds
        hardly any memory that its process has never touched, as memcpy does not."""
        nbytes = self.blocks_of * self.info.block_nbytes
        for _ in range(2):
            for _ in range(store_bytes // 2 // nbytes):
                await self.once(self.blocks_of)
            await asyncio.sleep(FREE_S)

    async def once(self, blocks: int) -> tuple[float, float]:
        """Seconds: of the transport, of everything."""
        request, first = self._place(blocks)
        copier = BlockCopier(self._orders[request], *self.ends, PlainWay(), self._limits)
        started = time.perf_counter()
        await copier.ascending(first, first + blocks)
        everything = time.perf_counter() - started
        given = await self.source.actor.moments.remote()
        readable = await self.target.actor.moments.remote()
        return max(at for _, at in readable) - min(at for _, at in given), everything

    def _place(self, blocks: int) -> tuple[int, int]:
        """Other blocks each time, until it is their turn again."""
        if not self._next or self._next[0][1] + blocks > self.blocks_of:
            self._next = self._next[1:]
        if not self._next:
            self._next = [(request, 0) for request in range(len(self._orders))]
        request, first = self._next[0]
        self._next[0] = (request, first + blocks)
        return request, first


async def measure_transport(moving: Transfers, transfers: int) -> dict[str, Any]:
    """``transfers`` of each size and kind, nothing else running, beside memcpy of as many bytes."""
    reference, found = Memcpy(), {}
    await moving.keep(False)
    await moving.touch(OBJECT_STORE_BYTES)
    for size in SIZES_MIB:
        blocks = min((size << 20) // moving.info.block_nbytes, moving.blocks_of)
        nbytes = blocks * moving.info.block_nbytes
        seconds: dict[str, list[float]] = {"transport": [], "pool_to_pool": [], "memcpy": []}
        for keep in (False, True):
            await moving.keep(keep)
            for turn in range(WARM_UP + transfers):
                transport, everything = await moving.once(blocks)
                copies = [reference.seconds(nbytes) for _ in range(COPIES)]
                # Slow enough for the store to get its memory back: a full one spills to disk.
                await asyncio.sleep(FREE_S * nbytes / (OBJECT_STORE_BYTES // 3))
                if turn >= WARM_UP:
                    seconds["pool_to_pool" if keep else "transport"].append(
                        everything if keep else transport
                    )
                    seconds["memcpy"] += copies
        rate = {name: nbytes / median(took) for name, took in seconds.items()}
        found[f"{size} MiB"] = {
            "bytes": nbytes,
            **{f"{name}_bytes_per_s": value for name, value in rate.items()},
            "transport_ratio": rate["transport"] / rate["memcpy"],
            "pool_to_pool_ratio": rate["pool_to_pool"] / rate["memcpy"],
        }
    return {
        **{
            name: min(size[name] for size in found.values())
            for name in ("transport_ratio", "pool_to_pool_ratio")
        },
        "by_size": found,
    }
