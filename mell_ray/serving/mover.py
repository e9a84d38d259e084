"""A replica's part in moving blocks: between engine, staging buffers and transports.

Bookkeeping of the two halves of the protocol is in ``mell_ray.migration.source`` and ``target``;
this is what they need of the process around them: slices between steps, buffers, links.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mell_ray.engine.types import StepOutput
from mell_ray.migration.pacing import Pacer
from mell_ray.migration.source import MigrationSource
from mell_ray.migration.staging import Staging
from mell_ray.migration.target import MigrationTarget
from mell_ray.migration.toll import Toll
from mell_ray.migration.transports.base import (
    OBJECTS,
    Buffer,
    Parcel,
    Ticket,
    Transport,
    TransportName,
)
from mell_ray.migration.transports.berths import Berth, Memory
from mell_ray.migration.transports.cuda import cuda_transports
from mell_ray.migration.transports.objects import ObjectTransport
from mell_ray.migration.types import ChunkMeta, MigrationOrder, Received
from mell_ray.serving.peer_calls import Sources
from mell_ray.serving.wire import ReplicaSpec

if TYPE_CHECKING:
    from mell_ray.engine import Engine

T = TypeVar("T")

LINK_TIMEOUT_S = 10.0
PROGRESS_CHECK_S = 1.0
# Of blocks that lie apart, each piece costs its own place in a message: below this size it is
# cheaper to gather them first.
MIN_PIECE_BYTES = 1 << 20

InEngine = Callable[[Callable[["Engine"], Any]], "asyncio.Future[Any]"]


class Mover:
    """One per replica. ``call`` runs a function in the engine thread between two steps."""

    def __init__(
        self,
        call: InEngine,
        source: MigrationSource,
        target: MigrationTarget,
        sources: Sources,
        spec: ReplicaSpec,
        block_nbytes: int,
        memory: Memory,
    ) -> None:
        self._call = call
        self._source = source
        self._target = target
        self._sources = sources
        self._block_nbytes = block_nbytes
        self._staging = Staging()
        self._buffer_bytes = spec.migration.buffer_bytes
        self._pacer = Pacer(spec.migration.step_share)
        self._toll = Toll(spec.migration.slowdown, time.monotonic())
        # For how long this replica is to be left alone before something moves that can wait; as of
        # the last message of a migration.
        self.rest_s = 0.0
        self._step_waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self.gpu_uuid = ""
        self.transports: dict[TransportName, Transport] = {}
        self.use(ObjectTransport(memory, self._buffer_bytes))
        if spec.device == "cuda":
            found, self.gpu_uuid = cuda_transports(
                spec.migration.transports, spec.migration.chunk_bytes
            )
            self.transports |= found

    def use(self, objects: ObjectTransport) -> None:
        self.objects = objects
        self.transports[OBJECTS] = objects

    def stepped(self, output: StepOutput) -> None:
        """In the engine thread, after each step."""
        self._pacer.stepped(output.seconds)
        if not output.num_prefill_tokens:
            self._toll.stepped(
                output.num_decode_tokens,
                output.seconds,
                moving=len(self._source) + len(self._target) > 0,
                others=output.num_decode_tokens > self._source.num_live,
            )
        waiters, self._step_waiters = self._step_waiters, []
        for loop, event in waiters:
            loop.call_soon_threadsafe(event.set)

    def in_engine(self, function: Callable[[Engine], T]) -> asyncio.Future[T]:
        """Run what a migration needs in the engine thread, and count what that takes from
        others."""

        def run(engine: Engine) -> T:
            others = engine.stats().running > self._source.num_live
            started = time.perf_counter()
            try:
                return function(engine)
            finally:
                if others:
                    self._toll.held(time.perf_counter() - started)
                self.rest_s = self._toll.rest_s(time.monotonic())

        return self._call(run)

    async def progress(self, migration_id: str, num_tokens: int) -> int:
        """Wait until an arriving request has KV for ``num_tokens`` tokens. Returns how many."""
        while True:
            event = asyncio.Event()
            loop = asyncio.get_running_loop()

            def look(
                engine: Engine, event: asyncio.Event = event, loop: Any = loop
            ) -> tuple[int, bool]:
                have = self._target.progress(engine, migration_id)
                if have < num_tokens:
                    self._step_waiters.append((loop, event))
                return have, have >= num_tokens

            have, enough = await self.in_engine(look)
            if enough:
                return have
            with suppress(TimeoutError):  # a step may never come: the reservation may be gone
                async with asyncio.timeout(PROGRESS_CHECK_S):
                    await event.wait()

    async def join(
        self, transport: TransportName, peer: str, ticket: Ticket, *, is_source: bool
    ) -> None:
        await self.transports[transport].join(
            peer, ticket, is_source=is_source, timeout_s=LINK_TIMEOUT_S
        )

    async def send(
        self,
        migration_id: str,
        first_block: int,
        max_blocks: int,
        transport: TransportName,
        berth: Berth | None,
    ) -> tuple[ChunkMeta, Parcel]:
        """Gather blocks that are complete and give them to the transport. ``berth``: where the
        target has memory for them, if it said so."""
        way = self.transports[transport]

        def look(engine: Engine) -> tuple[ChunkMeta, list[np.ndarray] | None, bool]:
            meta = self._source.ready(engine, migration_id, first_block, max_blocks)
            lent = None
            if meta.num_blocks and not way.on_device:
                pieces = max(1, meta.nbytes // MIN_PIECE_BYTES)
                lent = self._source.lend(engine, migration_id, first_block, meta.num_blocks, pieces)
            return meta, lent, engine.has_work()

        meta, lent, busy = await self.in_engine(look)
        if not meta.num_blocks:
            return meta, []
        order = self._source.order(migration_id)
        if lent is not None:
            # Read by other threads, beside the engine's; the pause keeps the share all the same.
            await asyncio.sleep(self._pacer.pause_for(meta.nbytes, busy=busy and not order.urgent))
            return meta, await self._send(way, order.dst, lent, berth)
        if way.on_device:
            tensor = await self.in_engine(
                lambda engine: self._source.copy_on_device(
                    engine, migration_id, first_block, meta.num_blocks
                )
            )
            return meta, await way.send_blocks(order.dst, tensor, LINK_TIMEOUT_S)
        buffer = self._staging.take(migration_id, meta.nbytes)
        block_nbytes = self._block_nbytes

        def gather(part: range) -> Callable[[Engine], int]:
            out = buffer[part.start * block_nbytes : part.stop * block_nbytes]

            def work(engine: Engine) -> int:
                self._source.copy_out(
                    engine, migration_id, first_block + part.start, len(part), out
                )
                return len(part)

            return work

        await self._sliced(meta.num_blocks, gather, paced=busy and not order.urgent)
        return meta, await self._send(way, order.dst, [buffer], berth)

    async def _send(
        self, way: Transport, peer: str, data: list[np.ndarray], berth: Berth | None
    ) -> Parcel:
        if berth is not None and way is self.objects:
            return await self.objects.send_blocks(peer, data, LINK_TIMEOUT_S, berth)
        return await way.send_blocks(peer, data, LINK_TIMEOUT_S)

    async def receive(
        self, migration_id: str, first_block: int, num_blocks: int, transport: TransportName
    ) -> Received:
        """Have a chunk sent and take it in, if the source has all of it."""
        order, busy = await self.in_engine(
            lambda engine: (self._target.order(migration_id), engine.has_work())
        )
        way = self.transports[transport]
        nbytes = num_blocks * self._block_nbytes
        landing = self.objects.berth(order.src, nbytes)
        with landing if way is self.objects else nullcontext() as berth:
            meta, parcel = await self._sources.stage(
                order, first_block, num_blocks, transport, LINK_TIMEOUT_S, berth
            )
            if meta.num_blocks < num_blocks:
                return Received(meta)
            if berth is not None:
                data = await self.objects.recv_blocks(order.src, parcel, LINK_TIMEOUT_S, berth)
            else:
                data = await way.recv_blocks(order.src, parcel, LINK_TIMEOUT_S)
            paced = busy and not order.urgent
            return Received(meta, await self._take_in(migration_id, first_block, data, paced))

    async def _take_in(self, migration_id: str, first_block: int, data: Buffer, paced: bool) -> int:
        """Write a chunk into the pool. Returns how far the request's KV reaches then."""
        pieces = data if isinstance(data, list) else [data]
        block_nbytes = self._block_nbytes
        stop_block = first_block + sum(len(piece) for piece in pieces) // block_nbytes
        progress = 0
        # From the last block to the first: what a hybrid target need not compute itself is
        # everything from the first block that has arrived on.
        for piece in reversed(pieces):
            count = len(piece) // block_nbytes
            stop_block -= count

            def scatter(
                part: range, piece: Any = piece, first: int = stop_block, count: int = count
            ) -> Callable[[Engine], int]:
                start, stop = count - part.stop, count - part.start
                slab = piece[start * block_nbytes : stop * block_nbytes]

                def work(engine: Engine) -> int:
                    self._target.receive(engine, migration_id, first + start, slab)
                    return self._target.progress(engine, migration_id)

                return work

            progress = await self._sliced(count, scatter, paced=paced)
        return progress

    async def _sliced(
        self,
        num_blocks: int,
        work: Callable[[range], Callable[[Engine], int]],
        *,
        paced: bool,
    ) -> int:
        """Copy in slices, so that a step is never late by more than its share; what is urgent, or
        disturbs nobody, in one. Returns what the last of them returned."""
        answer = 0
        for part in self._pacer.slices(num_blocks, self._block_nbytes, busy=paced):
            answer, seconds = await self.in_engine(_timed(work(part)))
            self._pacer.copied(len(part) * self._block_nbytes, seconds)
            if part.stop < num_blocks:
                await asyncio.sleep(self._pacer.pause_s(seconds, busy=paced))
        return answer

    def thaw(self, engine: Engine, migration_id: str) -> None:
        self._staging.release(migration_id)
        self._source.thaw(engine, migration_id)

    def release(self, engine: Engine, migration_id: str) -> MigrationOrder | None:
        self._staging.release(migration_id)
        return self._source.release(engine, migration_id)

    def expire(self, engine: Engine) -> None:
        """Forget what nobody asks for any more, and give unused memory back."""
        for migration_id in self._source.expire():
            self._staging.release(migration_id)
        self._target.expire(engine)
        if not len(self._source):
            self._staging.trim(self._buffer_bytes)


def _timed(function: Callable[[Engine], int]) -> Callable[[Engine], tuple[int, float]]:
    def run(engine: Engine) -> tuple[int, float]:
        started = time.perf_counter()
        answer = function(engine)
        return answer, time.perf_counter() - started

    return run
