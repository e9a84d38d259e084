"""What happens to a migration when the transport under it breaks, and hybrid mode's meeting."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from mell_ray.migration.copying import BlockCopier, CopyLimits
from mell_ray.migration.driver import DriverLimits, migrate
from mell_ray.migration.peers import PlainWay
from mell_ray.migration.transports import TransportError
from mell_ray.migration.types import ChunkMeta, MigrationOrder, Received
from tests.migration.inprocess import Node, SourceEnd, TargetEnd, Tracks, request
from tests.migration.test_driver import KEPT, PROMPT, finish, order, undisturbed, until


class Flaky:
    """A transport that carries ``good`` chunks and then breaks."""

    name = "nccl"
    on_device = False

    def __init__(self, good: int, at: str) -> None:
        self._left = good
        self._at = at
        self.log: list[str] = []

    def _use(self, what: str) -> None:
        self.log.append(what)
        if what == self._at:
            if not self._left:
                raise TransportError("the link broke")
            self._left -= 1

    def offer(self, peer: str) -> str:
        del peer
        self._use("offer")
        return "ticket"

    async def join(self, peer: str, ticket: Any, *, is_source: bool, timeout_s: float) -> None:
        del peer, is_source, timeout_s
        assert ticket == "ticket"
        self._use("join")

    async def send_blocks(self, peer: str, data: np.ndarray, timeout_s: float) -> np.ndarray:
        del peer, timeout_s
        self._use("send")
        return data

    async def recv_blocks(self, peer: str, parcel: np.ndarray, timeout_s: float) -> np.ndarray:
        del peer, timeout_s
        self._use("recv")
        if self._at == "hang" and not self._left:
            await asyncio.Event().wait()
        return parcel

    def abort(self, peer: str) -> None:
        del peer
        self.log.append("abort")


class Ranked(PlainWay):
    def __init__(self) -> None:
        self.broken: list[str] = []
        self.carried: list[str] = []

    def transports(self) -> tuple[str, ...]:
        return ("nccl", "objects")

    def failed(self, transport: str) -> None:
        self.broken.append(transport)

    def worked(self, transport: str, nbytes: int, seconds: float) -> None:
        assert nbytes > 0
        assert seconds >= 0
        self.carried.append(transport)


@pytest.mark.parametrize("mode", ["kv", "hybrid"])
@pytest.mark.parametrize(
    ("at", "good"), [("join", 1), ("offer", 0), ("send", 0), ("send", 1), ("recv", 1), ("hang", 0)]
)
async def test_broken_transport_is_replaced_in_mid_migration(mode: str, at: str, good: int) -> None:
    tracks = Tracks()
    nodes = Node("a", tracks), Node("b", tracks)
    flaky = Flaky(good, at)
    for node in nodes:
        node.transports["nccl"] = flaky
    way = Ranked()
    # Where nothing hangs, none is late; where something does, the transport after it is not.
    chunk_timeout_s = 2.0 if at == "hang" else 120.0
    try:
        await nodes[0].submit(request("r", PROMPT, 240), KEPT)
        await until(lambda: len(tracks["r"].token_ids) >= 60, "no progress")
        result = await migrate(
            order("a", "b", mode),
            SourceEnd(nodes[0]),
            TargetEnd(nodes[1]),
            block_size=16,
            block_nbytes=nodes[0].engine.block_nbytes,
            limits=DriverLimits(
                chunk_bytes=2 * nodes[0].engine.block_nbytes,
                chunk_timeout_s=chunk_timeout_s,
                timeout_s=120,
            ),
            way=way,
        )
        assert result.outcome == "committed", result.detail
        # A hybrid target may have computed everything before the first chunk was asked for.
        if mode == "kv" or way.broken:
            assert way.broken == ["nccl"]
            assert result.fallbacks == 1
            assert flaky.log[-2:] == ["abort", "abort"]
            assert way.carried.count("nccl") <= 2
        assert await finish(nodes) == undisturbed(0.0)
    finally:
        for node in nodes:
            node.stop()


async def test_without_any_working_transport_the_source_keeps_the_request() -> None:
    tracks = Tracks()
    nodes = Node("a", tracks), Node("b", tracks)

    class Nothing(Ranked):
        def transports(self) -> tuple[str, ...]:
            return ("nccl",)

    for node in nodes:
        node.transports["nccl"] = Flaky(0, "send")
    try:
        await nodes[0].submit(request("r", PROMPT, 240), KEPT)
        await until(lambda: len(tracks["r"].token_ids) >= 30, "no progress")
        result = await migrate(
            order("a", "b", "kv"),
            SourceEnd(nodes[0]),
            TargetEnd(nodes[1]),
            block_size=16,
            block_nbytes=nodes[0].engine.block_nbytes,
            limits=DriverLimits(timeout_s=120),
            way=Nothing(),
        )
        assert result.outcome == "aborted"
        assert "no transport" in result.detail
        assert await finish(nodes) == undisturbed(0.0)
    finally:
        for node in nodes:
            node.stop()


class Paced:
    """A source whose blocks take ``block_s`` each, and a target that computes meanwhile."""

    def __init__(self, block_s: float, compute_s: float) -> None:
        self._block_s = block_s
        self._compute_s = compute_s
        self._start = asyncio.get_running_loop().time()
        self.sent: list[int] = []

    def computed(self) -> int:
        return int((asyncio.get_running_loop().time() - self._start) / self._compute_s)

    async def receive(self, migration_id: str, first: int, count: int, transport: str) -> Received:
        del migration_id, transport
        await asyncio.sleep(self._block_s * count)
        self.sent += range(first, first + count)
        return Received(ChunkMeta(first, count, 10_000, count), self.computed() * 16)


@pytest.mark.parametrize(("block_s", "compute_s"), [(0.001, 0.01), (0.004, 0.004), (0.01, 0.001)])
async def test_hybrid_halves_meet_whatever_their_speeds(block_s: float, compute_s: float) -> None:
    both = Paced(block_s, compute_s)
    copier = BlockCopier(
        MigrationOrder("m", "r", "a", "b", "hybrid", "test"),
        both,  # type: ignore[arg-type]
        both,  # type: ignore[arg-type]
        PlainWay(),
        CopyLimits(block_nbytes=1, chunk_blocks=1000, chunk_timeout_s=60),
    )
    await copier.until_met(0, 100, 16)
    sent = sorted(both.sent)
    assert sent == list(range(sent[0], 100))  # the last blocks, without a gap, each once
    # What was not sent has been computed, or the chunk at the meeting point was cut too coarsely.
    assert both.computed() >= sent[0] - 1
