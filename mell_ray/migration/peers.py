"""The two ends of a migration and the way between them, as its driver sees them."""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Protocol

from mell_ray.engine.types import RequestState, Reservation
from mell_ray.migration.transports.base import OBJECTS, Ticket, TransportName
from mell_ray.migration.types import (
    Committed,
    Frozen,
    MigrationOrder,
    Received,
    Settlement,
    TokenTail,
)

# A payload that the driver only passes on (with Ray, an ObjectRef).
Payload = Any


class PeerDied(Exception):
    """The replica at the other end of a call is dead; nothing of the call can take effect."""


def let_go(error: BaseException) -> None:
    """Drop what the frames hold through which ``error`` came, payloads among them. A task that has
    failed and the traceback that it is in hold each other, and the garbage collector of a process
    that has nothing more to do would leave the blocks in Ray's store."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


class Source(Protocol):
    async def begin(self, order: MigrationOrder) -> RequestState: ...

    async def offer(self, transport: TransportName, peer: str) -> Ticket: ...

    async def join(self, transport: TransportName, peer: str, ticket: Ticket) -> None: ...

    async def abort_link(self, transport: TransportName, peer: str) -> None: ...

    async def tokens(self, migration_id: str, start: int) -> TokenTail: ...

    def freeze(
        self, migration_id: str, first_block: int
    ) -> tuple[Awaitable[Frozen], Payload, Payload]:
        """(the message, the message as a reference, the tail blocks as a reference)."""
        ...

    async def thaw(self, order: MigrationOrder) -> bool:
        """Returns whether the source still has the request."""
        ...

    async def release(self, migration_id: str) -> float:
        """Returns for how many seconds the source is to be left alone; see ``Committed``."""
        ...


class Target(Protocol):
    async def reserve(self, order: MigrationOrder, state: RequestState) -> Reservation: ...

    async def join(self, transport: TransportName, peer: str, ticket: Ticket) -> None: ...

    async def abort_link(self, transport: TransportName, peer: str) -> None: ...

    async def receive(
        self, migration_id: str, first_block: int, num_blocks: int, transport: TransportName
    ) -> Received:
        """Ask the source for these blocks and take them in."""
        ...

    async def extend(self, migration_id: str, tail: TokenTail) -> None: ...

    async def wait_progress(self, migration_id: str, num_tokens: int) -> int: ...

    async def commit(self, migration_id: str, frozen: Payload, payload: Payload) -> Committed: ...

    async def settle(self, migration_id: str) -> Settlement: ...


class Way(Protocol):
    """What the Migrator knows of the link, and what it may carry."""

    def transports(self) -> Sequence[TransportName]:
        """Usable now, best first; never empty."""
        ...

    def worked(self, transport: TransportName, nbytes: int, seconds: float) -> None: ...

    def failed(self, transport: TransportName) -> None: ...

    def chunk(self, transport: TransportName, nbytes: int) -> AbstractAsyncContextManager[None]:
        """Room for one chunk, for as long as it is on its way."""
        ...

    def rest(self, replica_id: str, seconds: float) -> None:
        """That replica is to be left alone for so long."""
        ...


class PlainWay:
    """Ray objects without limits."""

    def transports(self) -> Sequence[TransportName]:
        return (OBJECTS,)

    def worked(self, transport: TransportName, nbytes: int, seconds: float) -> None:
        del transport, nbytes, seconds

    def failed(self, transport: TransportName) -> None:
        del transport

    def chunk(self, transport: TransportName, nbytes: int) -> AbstractAsyncContextManager[None]:
        del transport, nbytes
        return nullcontext()

    def rest(self, replica_id: str, seconds: float) -> None:
        del replica_id, seconds
