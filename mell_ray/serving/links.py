"""The ingress's connections to replicas: one token stream each, shared by all requests."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError

from mell_ray.serving.token_socket import read_items
from mell_ray.serving.wire import StreamItem

logger = logging.getLogger(__name__)

KEEPALIVE_S = 1.0


class ReplicaGone(Exception):
    """The replica is dead or its stream broke; its requests have to be continued elsewhere."""

    def __init__(self, replica_id: str) -> None:
        super().__init__(f"replica {replica_id} is gone")
        self.replica_id = replica_id


@dataclass(slots=True)
class Link:
    actor: Any
    opened: asyncio.Future[None]
    reader: asyncio.Task[None] | None = None


class ReplicaLinks:
    """Opens streams on demand and hands their items to ``on_item``; a stream that ends is told
    to ``on_lost`` once and opened anew when it is needed again."""

    def __init__(
        self,
        namespace: str,
        ingress_id: str,
        on_item: Callable[[str, StreamItem], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._namespace = namespace
        self._ingress_id = ingress_id
        self._on_item = on_item
        self._on_lost = on_lost
        self._links: dict[str, Link] = {}
        self._background: set[asyncio.Task[Any]] = set()
        self._keeper: asyncio.Task[None] | None = None

    async def ensure(self, replica_id: str) -> Any:
        """The replica's actor, its stream open.

        Raises:
            ReplicaGone: there is no such replica any more.
        """
        if self._keeper is None:
            self._keeper = self.spawn(self._keep_alive())
        link = self._links.get(replica_id)
        if link is None:
            try:
                actor = ray.get_actor(replica_id, namespace=self._namespace)
            except (ValueError, RayError):
                raise ReplicaGone(replica_id) from None
            link = Link(actor, asyncio.get_running_loop().create_future())
            self._links[replica_id] = link
            link.reader = self.spawn(self._read(replica_id, link))
        await asyncio.shield(link.opened)
        return link.actor

    def cancel(self, replica_id: str, request_ids: list[str]) -> None:
        """Tell a replica to drop requests; nothing is to be done if it is dead."""
        link = self._links.get(replica_id)
        if link is not None:
            self.spawn(_ignore_death(link.actor.cancel.remote(request_ids)))

    def spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        """Run it in the background, in a context of its own: what is asked of a deployment in the
        context of a request, Serve cancels when that request's client goes. To forget the request
        would be cancelled with it, and it would wait in the Router for ever."""
        task = asyncio.create_task(coroutine, context=contextvars.Context())
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _read(self, replica_id: str, link: Link) -> None:
        try:
            async with contextlib.aclosing(self._items(replica_id, link)) as items:
                async for item in items:
                    if not link.opened.done():
                        link.opened.set_result(None)
                    if item.deltas or item.notices:
                        self._on_item(replica_id, item)
        except RayError as error:
            logger.info("stream of %s ended: %s", replica_id, type(error).__name__)
        finally:
            if not link.opened.done():
                link.opened.set_exception(ReplicaGone(replica_id))
                link.opened.exception()  # retrieved, also where nobody waits
            if self._links.get(replica_id) is link:
                del self._links[replica_id]
            self._on_lost(replica_id)

    async def _items(self, replica_id: str, link: Link) -> AsyncGenerator[StreamItem, None]:
        """What the replica tells, over a socket if it can be reached so, else through Ray."""
        address = await link.actor.open_socket.remote()
        if address is not None:
            try:
                async with contextlib.aclosing(read_items(address, self._ingress_id)) as items:
                    async for item in items:
                        yield item
                return
            except OSError as error:  # TimeoutError is one
                logger.warning("%s is read through Ray, not by socket: %s", replica_id, error)
        stream = link.actor.open_stream.options(num_returns="streaming").remote(self._ingress_id)
        async for reference in stream:
            yield await reference

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(KEEPALIVE_S)
            for link in list(self._links.values()):
                self.spawn(self._show_life(link))

    async def _show_life(self, link: Link) -> None:
        """Also how the death of a whole node is found out, which closes no socket."""
        try:
            await link.actor.keepalive.remote(self._ingress_id)
        except ActorDiedError:
            if link.reader is not None:
                link.reader.cancel()
        except RayActorError as error:
            logger.info("a replica did not answer: %s", error)


async def _ignore_death(call: Any) -> None:
    with contextlib.suppress(RayActorError):  # its stream reports the death
        await call
