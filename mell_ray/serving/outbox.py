"""Token deltas on their way from the engine thread to one ingress.

The engine thread puts, the stream's coroutine takes. Whatever has piled up since the last take
leaves as one item, so a slow ingress costs fewer and larger messages, never a longer queue of
small ones.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable

from mell_ray.serving.wire import Evicted, Migrating, Moved, StreamItem, WireDelta


class Outbox:
    """What one ingress has still to be told."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._item = StreamItem()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self.last_seen = time.monotonic()  # when the ingress last showed that it lives
        self.streams = 0  # opened so far; a newer stream ends an older one

    def put(
        self, deltas: Iterable[WireDelta] = (), notices: Iterable[Migrating | Moved | Evicted] = ()
    ) -> None:
        """Add messages; from any thread."""
        with self._lock:
            self._item.deltas.extend(deltas)
            self._item.notices.extend(notices)
            waiter = self._waiter
        if waiter is not None:
            loop, event = waiter
            loop.call_soon_threadsafe(event.set)

    async def take(self, timeout_s: float) -> StreamItem:
        """All that is waiting; after ``timeout_s`` without anything an empty item (a heartbeat)."""
        event = asyncio.Event()
        with self._lock:
            empty = not (self._item.deltas or self._item.notices)
            self._waiter = (asyncio.get_running_loop(), event) if empty else None
        if empty:
            try:
                async with asyncio.timeout(timeout_s):
                    await event.wait()
            except TimeoutError:
                pass
        with self._lock:
            self._waiter = None
            item, self._item = self._item, StreamItem()
        return item
