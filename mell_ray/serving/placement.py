"""Who asks for a place, and what they are told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable

from mell_ray.errors import ConflictError, MellError, OverloadedError
from mell_ray.scheduler.events import Arrive
from mell_ray.serving.books import Entry
from mell_ray.serving.core import Core
from mell_ray.serving.turnover import Turnover
from mell_ray.serving.wire import Lease, PlaceRequest


class Placement:
    """The waiting ingresses of one Router.

    ``look_into(request_id, replica_id)`` finds out what is true of a replica that an ingress says
    it lost a request on, before the request is placed anew.
    """

    def __init__(self, core: Core, look_into: Callable[[str, str], Awaitable[None]]) -> None:
        self._core = core
        self._look_into = look_into
        self._waiting: dict[str, asyncio.Future[Lease]] = {}
        self._turnover = {model: Turnover() for model in core.llms}

    def waiting(self) -> Iterable[str]:
        """Ids of requests that somebody waits for."""
        return self._waiting

    async def place(self, request: PlaceRequest) -> Lease:
        """Find a place, waiting in the queue if there is none. May be called again for the same
        request, by the same ingress.

        Raises:
            OverloadedError: the queue is full.
            ConflictError: another ingress runs a request of this id.
            ServerError: no replica of the model can be started.
        """
        if request.lost_replica is not None:
            await self._look_into(request.request_id, request.lost_replica)
        entry = self._core.books[request.model_id].get(request.request_id)
        if entry is None:
            return await self._arrive(request)
        if entry.ingress_id not in ("", request.ingress_id):
            raise ConflictError(f"request {request.request_id} is running already; use another id")
        if entry.replica_id is None and not entry.lost:
            return await self._wait(request.request_id)  # queued: a repeated call, or evicted
        if entry.replica_id is not None and entry.generation > request.generation:
            return _lease(entry)
        self._core.withdraw(request.request_id)
        return await self._arrive(request)

    def forget(self, request_id: str) -> None:
        """The ingress wants it no more (client gone, request failed)."""
        future = self._waiting.pop(request_id, None)
        if future is not None:
            future.cancel()
        self._core.withdraw(request_id)

    def placed(self, request_id: str, replica_id: str) -> None:
        """The scheduler has found a place."""
        entry = self._core.entry(request_id)
        if entry is None:
            return
        entry.generation += 1
        book = self._core.books[entry.model_id]
        book.move(entry, replica_id, time.monotonic(), held=False)
        self._turnover[entry.model_id].left(time.monotonic())
        future = self._waiting.pop(request_id, None)
        if future is not None and not future.done():
            future.set_result(_lease(entry))

    def refuse(self, request_id: str, error: MellError) -> None:
        """Answer whoever waits for the request with ``error``."""
        future = self._waiting.pop(request_id, None)
        self._core.withdraw(request_id)
        if future is not None and not future.done():
            future.set_exception(error)

    def refuse_model(self, model_id: str, error: MellError) -> None:
        """Nothing of this model can be served."""
        book = self._core.books[model_id]
        for request_id in [name for name in self._waiting if book.get(name) is not None]:
            self.refuse(request_id, error)

    async def _arrive(self, request: PlaceRequest) -> Lease:
        book = self._core.books[request.model_id]
        size = book.blocks(request.num_tokens + 1)
        max_blocks = max(size, book.blocks(request.max_total_tokens))
        book.add(
            Entry(
                request_id=request.request_id,
                model_id=request.model_id,
                max_blocks=max_blocks,
                priority=request.priority,
                arrival_s=request.arrival_s or time.time(),
                ingress_id=request.ingress_id,
                generation=request.generation,
                traceparent=request.traceparent,
            )
        )
        future = self._future(request.request_id)
        self._core.handle(
            Arrive(
                request=request.request_id,
                model=request.model_id,
                size=size,
                max_size=max_blocks,
                priority=request.priority,
                prefix=request.prefix,
                tenant=request.share.tenant if request.share is not None else None,
                weight=request.share.weight if request.share is not None else 1.0,
            )
        )
        if not future.done():
            self._shed(request.model_id)
        return await self._wait(request.request_id, future)

    def _shed(self, model_id: str) -> None:
        """Turn the last in line away if too many wait. What has produced tokens is never turned
        away."""
        scheduler, limit = self._core.scheduler, self._core.settings.max_queued_requests
        waiting = scheduler.queue_length()
        if waiting <= limit:
            return
        for request_id in scheduler.last_in_line(model_id):
            entry = self._core.entry(request_id)
            if entry is not None and entry.generation == 0:
                wait_s = self._turnover[model_id].wait_s(waiting - 1, time.monotonic())
                message = f"{limit} requests are waiting for room already"
                self.refuse(request_id, OverloadedError(message, retry_after_s=wait_s))
                return

    def _future(self, request_id: str) -> asyncio.Future[Lease]:
        future = self._waiting.get(request_id)
        if future is None:
            future = asyncio.get_running_loop().create_future()
            self._waiting[request_id] = future
        return future

    async def _wait(self, request_id: str, future: asyncio.Future[Lease] | None = None) -> Lease:
        # Shielded: one caller that goes away must not take the place from a repeated call.
        return await asyncio.shield(future or self._future(request_id))


def _lease(entry: Entry) -> Lease:
    assert entry.replica_id is not None
    return Lease(entry.replica_id, entry.generation, entry.arrival_s, entry.held)
