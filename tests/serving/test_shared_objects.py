"""An object of Ray's store that two processes write and read."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import ray

from mell_ray.migration.transports.berths import Landed
from mell_ray.migration.transports.objects import ObjectTransport
from mell_ray.serving.shared_objects import RayMemory
from tests.serving.conftest import TIMEOUT_S

CHUNKS = 5
NBYTES = 4 << 20


class End:
    """A replica's transport in a process of its own. ``node_id``: "": where it runs."""

    def __init__(self, node_id: str = "") -> None:
        memory = RayMemory(node_id) if node_id else RayMemory.here()
        self._transport = ObjectTransport(memory, 64 << 20)

    async def send(self, seed: int, berth: Any) -> tuple[bool, Any]:
        data = np.random.default_rng(seed).integers(0, 256, NBYTES, np.uint8)
        cut = NBYTES // 3
        parcel = await self._transport.send_blocks("here", [data[:cut], data[cut:]], 60.0, berth)
        return isinstance(parcel, Landed), parcel

    async def receive(self, source: Any, seeds: list[int]) -> list[bool]:
        """How the chunks of these seeds came: landed in memory of this process, or as objects."""
        how = []
        for seed in seeds:
            expected = np.random.default_rng(seed).integers(0, 256, NBYTES, np.uint8)
            with self._transport.berth("there", NBYTES) as berth:
                landed, parcel = await source.send.remote(seed, berth)
                got = await self._transport.recv_blocks("there", parcel, 60.0, berth)
                assert np.array_equal(np.concatenate(got), expected)
            how.append(landed)
            while self._transport._berths._making is not None:  # type: ignore[union-attr]
                await asyncio.sleep(0.01)
        return how


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("elsewhere", [False, True])
def test_chunks_cross_processes_of_a_node(elsewhere: bool) -> None:
    actor = ray.remote(num_cpus=0)(End)
    source, target = actor.remote("f" * 56 if elsewhere else ""), actor.remote()
    how = ray.get(target.receive.remote(source, list(range(CHUNKS))), timeout=TIMEOUT_S)
    assert how == [False] * CHUNKS if elsewhere else how == [False, False] + [True] * (CHUNKS - 2)
