"""How fast blocks travel as Ray objects, beside this machine's memcpy."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np

from mell_ray.bench.rig import Rig, Watched
from mell_ray.migration.copying import BlockCopier, CopyLimits
from mell_ray.migration.faults import Faults
from mell_ray.migration.peers import PlainWay
from mell_ray.migration.types import MigrationOrder
from mell_ray.serving.migrator import RaySource, RayTarget

SIZES_MIB = (16, 32, 64)


class Memcpy:
    """One thread copying memory that is mapped but in no cache, as blocks of a pool are: each copy
    takes the next part of two buffers much larger than the caches."""

    BUFFER_BYTES = 512 << 20

    def __init__(self) -> None:
        self._source = np.ones(self.BUFFER_BYTES, np.uint8)
        self._target = np.ones(self.BUFFER_BYTES, np.uint8)
        self._at = 0

    def bytes_per_s(self, nbytes: int) -> float:
        """The best of three."""
        best = float("inf")
        for _ in range(3):
            if self._at + nbytes > self.BUFFER_BYTES:
                self._at = 0
            part = slice(self._at, self._at + nbytes)
            self._at += nbytes
            started = time.perf_counter()
            np.copyto(self._target[part], self._source[part])
            best = min(best, time.perf_counter() - started)
        return nbytes / best


async def measure_transport(rig: Rig, watched: Watched, transfers: int) -> dict[str, Any]:
    """Chunks of one frozen request from pool to pool, nothing else running, beside memcpy of as
    many bytes in this process, both of memory in no cache.

    ``watched`` runs on the first replica with at least as much KV as the largest size, or what
    there is counts; it goes on there afterwards.
    """
    source, target = rig.replicas
    info = source.info
    assert info is not None
    order = MigrationOrder(
        "bench-transport",
        watched.track.request_id,
        source.replica_id,
        target.replica_id,
        "kv",
        "bench",
    )
    ends = RaySource(source.actor, Faults(None)), RayTarget(target.actor, Faults(None))
    state = await ends[0].begin(order)
    await ends[1].reserve(order, state)
    await ends[0].freeze(order.migration_id, 0)[0]
    found, reference = {}, Memcpy()
    chunk_blocks = max(1, rig.chunk_bytes // info.block_nbytes)
    for size in SIZES_MIB:
        blocks = min((size << 20) // info.block_nbytes, state.num_computed // info.block_size)
        rates, memcpy = [], []
        for turn in range(transfers + 2):
            copier = BlockCopier(
                order, *ends, PlainWay(), CopyLimits(info.block_nbytes, chunk_blocks, 30.0)
            )
            started = time.perf_counter()
            await copier.ascending(0, blocks)
            took = time.perf_counter() - started
            if turn >= 2:  # the first ones touch memory for the first time
                rates.append(blocks * info.block_nbytes / took)
                memcpy.append(reference.bytes_per_s(blocks * info.block_nbytes))
        found[f"{size} MiB"] = {
            "bytes": blocks * info.block_nbytes,
            "bytes_per_s": median(rates),
            "memcpy_bytes_per_s": median(memcpy),
            "ratio": median(rates) / median(memcpy),
        }
    await ends[1].settle(order.migration_id)
    await ends[0].thaw(order)
    return {"ratio": min(size["ratio"] for size in found.values()), "by_size": found}
