"""What the migrations of one replica may use together: bytes in flight, and bytes a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext

REMEMBERED = 1024


class ReplicaBudget:
    """``buffer_bytes``: chunks between gather and scatter at once. ``bytes_per_s``: None: any."""

    def __init__(self, buffer_bytes: int, bytes_per_s: float | None) -> None:
        self._buffer_bytes = buffer_bytes
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0  # monotonic: when all admitted so far has passed at the limit
        self.in_flight = 0
        self._freed = asyncio.Event()
        self.alone = asyncio.Lock()  # held by a chunk that must be the only one of its kind

    async def take(self, nbytes: int) -> None:
        """Wait for room. A chunk larger than the whole buffer passes when nothing else does."""
        while self.in_flight and self.in_flight + nbytes > self._buffer_bytes:
            await self._freed.wait()
        self.in_flight += nbytes

    def give(self, nbytes: int) -> None:
        self.in_flight -= nbytes
        freed, self._freed = self._freed, asyncio.Event()
        freed.set()

    def delay_s(self, nbytes: int) -> float:
        """Book ``nbytes`` on the link; how long they must wait before they may leave."""
        if self._bytes_per_s is None:
            return 0.0
        now = time.monotonic()
        start = max(now, self._free_at)
        self._free_at = start + nbytes / self._bytes_per_s
        return self._free_at - now


class Budgets:
    """One ``ReplicaBudget`` per replica, made on demand."""

    def __init__(self, buffer_bytes: int, bytes_per_s: float | None) -> None:
        self._limits = (buffer_bytes, bytes_per_s)
        self._by_replica: dict[str, ReplicaBudget] = {}

    def of(self, replica_id: str) -> ReplicaBudget:
        if replica_id not in self._by_replica:
            self._drop_idle()
            self._by_replica[replica_id] = ReplicaBudget(*self._limits)
        return self._by_replica[replica_id]

    def _drop_idle(self) -> None:
        """Replicas come and go for ever; what is kept of them must not grow for ever."""
        if len(self._by_replica) >= REMEMBERED:
            self._by_replica = {
                name: budget for name, budget in self._by_replica.items() if budget.in_flight
            }

    @asynccontextmanager
    async def chunk(
        self, src: str, dst: str, nbytes: int, *, alone: bool = False, urgent: bool = False
    ) -> AsyncIterator[None]:
        """Hold room for one chunk at both ends, in the order of their names, so that two
        migrations in opposite directions never wait for each other. ``alone``: and let no other
        chunk of this kind pass at either end meanwhile. ``urgent``: do not wait for bytes per
        second, only for memory."""
        taken: list[ReplicaBudget] = []
        locks: list[asyncio.Lock] = []
        try:
            for name in sorted({src, dst}):
                budget = self.of(name)
                await budget.take(nbytes)
                taken.append(budget)
                if alone:
                    await budget.alone.acquire()
                    locks.append(budget.alone)
            delay_s = max(budget.delay_s(nbytes) for budget in taken)
            await asyncio.sleep(0.0 if urgent else delay_s)
            yield
        finally:
            for lock in locks:
                lock.release()
            for budget in taken:
                budget.give(nbytes)


class Slots:
    """How many migrations may run at once, altogether and from or to each replica. Urgent ones
    have slots of their own: ``URGENT`` times as many per replica, and any number altogether.
    Patient ones also wait while one of their replicas rests."""

    URGENT = 4

    def __init__(self, total: int, per_replica: int) -> None:
        self._total = asyncio.Semaphore(total)
        self._per_replica = per_replica
        self._running: dict[str, int] = {}
        self._rests_until: dict[str, float] = {}  # monotonic
        self._ended = asyncio.Event()

    def rest(self, replica_id: str, seconds: float) -> None:
        """Leave a replica alone for so long."""
        now = time.monotonic()
        if len(self._rests_until) >= REMEMBERED:
            self._rests_until = {r: at for r, at in self._rests_until.items() if at > now}
        self._rests_until[replica_id] = now + seconds

    @asynccontextmanager
    async def between(
        self, src: str, dst: str, *, urgent: bool = False, patient: bool = False
    ) -> AsyncIterator[None]:
        """Hold a slot. The replicas' own come first: a migration that waits for a busy replica
        must not keep others from running."""
        most = self._per_replica * (self.URGENT if urgent else 1)
        while True:
            if max(self._running.get(src, 0), self._running.get(dst, 0)) >= most:
                await self._ended.wait()
                continue
            rest_s = self._rest_s(src, dst) if patient else 0.0
            if rest_s <= 0:
                break
            await asyncio.sleep(rest_s)
        for name in (src, dst):
            self._running[name] = self._running.get(name, 0) + 1
        try:
            async with nullcontext() if urgent else self._total:
                yield
        finally:
            for name in (src, dst):
                self._running[name] -= 1
                if not self._running[name]:
                    del self._running[name]
            ended, self._ended = self._ended, asyncio.Event()
            ended.set()

    def _rest_s(self, *replicas: str) -> float:
        return max(self._rests_until.get(name, 0.0) for name in replicas) - time.monotonic()
