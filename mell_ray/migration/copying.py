"""Moves the blocks of one request while it decodes on: in chunks, two on their way at once, by the
best transport that works."""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from mell_ray.errors import MellError, MigrationError
from mell_ray.migration.peers import PeerDied, Source, Target, Way, let_go
from mell_ray.migration.transports.base import OBJECTS, TransportError, TransportName
from mell_ray.migration.types import MigrationOrder

logger = logging.getLogger(__name__)

# The next chunk is gathered while one is received. Other transports than Ray objects need their
# sends and receives in one order, so there it is one after the other.
WINDOW = 2
ABORT_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class CopyLimits:
    block_nbytes: int
    chunk_blocks: int
    chunk_timeout_s: float


@dataclass(slots=True)
class Copied:
    """What has been moved so far."""

    bytes: int = 0
    transport: TransportName | None = None
    fallbacks: int = 0
    ready_blocks: int = 0  # complete at the source when it was last asked
    progress_tokens: int = 0  # leading tokens with KV at the target when it last answered


class SourceStopped(MigrationError):
    """The source no longer has the blocks it had: the request was preempted there."""


class BlockCopier:
    """One per migration."""

    def __init__(
        self,
        order: MigrationOrder,
        source: Source,
        target: Target,
        way: Way,
        limits: CopyLimits,
    ) -> None:
        self.done = Copied()
        self._order = order
        self._source = source
        self._target = target
        self._way = way
        self._limits = limits
        self.block_nbytes = limits.block_nbytes
        self._broken: set[TransportName] = set()
        self._joined: TransportName | None = None

    async def ascending(self, first: int, stop: int) -> None:
        """Move blocks ``first .. stop``, all complete at the source."""
        spans = iter(_chunks(first, stop, self._limits.chunk_blocks))
        await self._copy(lambda: next(spans, None))

    async def until_met(self, first: int, stop: int, block_size: int) -> None:
        """Move blocks from ``stop`` downwards until those that the target computes meanwhile,
        upwards from ``first``, meet them: both halves then end together, whatever the bandwidth
        of the link and the speed of the target."""
        low = stop
        self.done.progress_tokens = first * block_size

        def next_span() -> range | None:
            nonlocal low
            left = low - self.done.progress_tokens // block_size
            if left <= 0:
                return None
            # Small enough that little is both sent and computed where they meet.
            count = min(left, self._limits.chunk_blocks, max(4, left // 4))
            low -= count
            return range(low, low + count)

        await self._copy(next_span)

    async def _copy(self, next_span: Callable[[], range | None]) -> None:
        again: collections.deque[range] = collections.deque()

        def take() -> range | None:
            return again.popleft() if again else next_span()

        while True:
            transport = self._choose()
            unconfirmed: dict[asyncio.Task[None], range] = {}
            try:
                await self._join(transport)
                await self._stream(transport, take, unconfirmed)
                return
            except TransportError as error:
                let_go(error)
                await self._fall_back(transport, error)
                again.extend(unconfirmed.values())
            finally:
                for task in unconfirmed:
                    if not task.cancel() and not task.cancelled():
                        task.exception()  # looked at: one failure is enough to report

    async def _stream(
        self,
        transport: TransportName,
        take: Callable[[], range | None],
        unconfirmed: dict[asyncio.Task[None], range],
    ) -> None:
        """Keep chunks on their way until there are no more; those that did not arrive stay in
        ``unconfirmed``."""
        window = WINDOW if transport == OBJECTS else 1
        more = True
        while more or unconfirmed:
            while more and len(unconfirmed) < window:
                span = take()
                if span is None:
                    more = False
                else:
                    unconfirmed[asyncio.create_task(self._chunk(transport, span))] = span
            if unconfirmed:
                arrived, _ = await asyncio.wait(unconfirmed, return_when=asyncio.FIRST_COMPLETED)
                for task in arrived:
                    task.result()
                    del unconfirmed[task]

    async def _chunk(self, transport: TransportName, span: range) -> None:
        nbytes = len(span) * self._limits.block_nbytes
        started = time.monotonic()
        async with self._way.chunk(transport, nbytes):
            try:
                async with asyncio.timeout(self._limits.chunk_timeout_s):
                    await self._move(transport, span)
            except TimeoutError:
                raise TransportError(f"{transport}: a chunk did not arrive in time") from None
        self.done.bytes += nbytes
        self.done.transport = transport
        self._way.worked(transport, nbytes, time.monotonic() - started)

    async def _move(self, transport: TransportName, span: range) -> None:
        received = await self._target.receive(
            self._order.migration_id, span.start, len(span), transport
        )
        if received.meta.num_blocks < len(span):
            raise SourceStopped("the source was preempted while it was moved")
        self.done.progress_tokens = max(self.done.progress_tokens, received.progress_tokens)
        self.done.ready_blocks = max(self.done.ready_blocks, received.meta.ready_blocks)

    def _choose(self) -> TransportName:
        for name in self._way.transports():
            if name not in self._broken:
                return name
        raise MigrationError("no transport to the target works")

    async def _join(self, transport: TransportName) -> None:
        if transport in (OBJECTS, self._joined):
            return
        src, dst = self._order.src, self._order.dst
        ticket = await self._source.offer(transport, dst)
        await asyncio.gather(
            self._source.join(transport, dst, ticket), self._target.join(transport, src, ticket)
        )
        self._joined = transport

    async def _fall_back(self, transport: TransportName, error: TransportError) -> None:
        logger.warning(
            "migration %s: %s %s -> %s failed: %s",
            self._order.migration_id,
            transport,
            self._order.src,
            self._order.dst,
            error,
        )
        self._broken.add(transport)
        self._joined = None
        self.done.fallbacks += 1
        self._way.failed(transport)
        with suppress(MellError, PeerDied, TimeoutError):
            async with asyncio.timeout(ABORT_TIMEOUT_S):
                await asyncio.gather(
                    self._source.abort_link(transport, self._order.dst),
                    self._target.abort_link(transport, self._order.src),
                )


def _chunks(first: int, stop: int, size: int) -> Iterator[range]:
    for start in range(first, stop, size):
        yield range(start, min(start + size, stop))
