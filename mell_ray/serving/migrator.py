"""The Migrator: a Serve deployment actor that drives live migrations.

It holds no state that matters: if it dies, reservations and freezes expire or are settled by the
replicas, and the Router retries what it still wants.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable
from contextlib import AbstractAsyncContextManager
from typing import Any

import ray

from mell_ray.config import MellSettings
from mell_ray.engine.types import RequestState, Reservation
from mell_ray.migration.budget import Budgets, Slots
from mell_ray.migration.driver import DriverLimits, migrate
from mell_ray.migration.faults import Faults, fault_point
from mell_ray.migration.peers import Payload
from mell_ray.migration.transports import Endpoint, LinkTable
from mell_ray.migration.transports.base import Ticket, TransportName
from mell_ray.migration.types import (
    Committed,
    Frozen,
    MigrationOrder,
    MigrationResult,
    Received,
    Settlement,
    TokenTail,
)
from mell_ray.serving.heap import keep_trimmed
from mell_ray.serving.logs import configure_logging
from mell_ray.serving.peer_calls import ask
from mell_ray.serving.wire import ReplicaInfo

logger = logging.getLogger(__name__)

# Of these a replica must do one thing at a time: two communicators on one GPU may block each other.
ALONE: frozenset[TransportName] = frozenset({"nccl"})
# Reasons for a move that somebody waits for: a request that cannot grow or cannot be placed, an
# operator.
IMPATIENT = frozenset({"overflow", "make-room", "operator"})


class RaySource:
    """The source replica as the driver sees it. What it hands over at the freeze is owned here, as
    object references, and freed as soon as the target has committed."""

    def __init__(self, actor: Any, faults: Faults) -> None:
        self._actor = actor
        self.faults = faults

    @fault_point("migrator.begin")
    async def begin(self, order: MigrationOrder) -> RequestState:
        return await ask(self._actor.mig_begin.remote(order))

    async def offer(self, transport: TransportName, peer: str) -> Ticket:
        return await ask(self._actor.mig_offer.remote(transport, peer))

    async def join(self, transport: TransportName, peer: str, ticket: Ticket) -> None:
        await ask(self._actor.mig_join.remote(transport, peer, ticket, True))

    async def abort_link(self, transport: TransportName, peer: str) -> None:
        await ask(self._actor.mig_abort_link.remote(transport, peer))

    @fault_point("migrator.tokens")
    async def tokens(self, migration_id: str, start: int) -> TokenTail:
        return await ask(self._actor.mig_tokens.remote(migration_id, start))

    def freeze(
        self, migration_id: str, first_block: int
    ) -> tuple[Awaitable[Frozen], Payload, Payload]:
        frozen, payload = self._actor.mig_freeze.remote(migration_id, first_block)
        return self._frozen(frozen), frozen, payload

    @fault_point("migrator.freeze")
    async def _frozen(self, frozen: Awaitable[Frozen]) -> Frozen:
        return await ask(frozen)

    async def thaw(self, order: MigrationOrder) -> bool:
        return await ask(self._actor.mig_thaw.remote(order))

    @fault_point("migrator.release")
    async def release(self, migration_id: str) -> float:
        return await ask(self._actor.mig_release.remote(migration_id))


class RayTarget:
    """The target replica as the driver sees it."""

    def __init__(self, actor: Any, faults: Faults) -> None:
        self._actor = actor
        self.faults = faults

    @fault_point("migrator.reserve")
    async def reserve(self, order: MigrationOrder, state: RequestState) -> Reservation:
        return await ask(self._actor.mig_reserve.remote(order, state))

    async def join(self, transport: TransportName, peer: str, ticket: Ticket) -> None:
        await ask(self._actor.mig_join.remote(transport, peer, ticket, False))

    async def abort_link(self, transport: TransportName, peer: str) -> None:
        await ask(self._actor.mig_abort_link.remote(transport, peer))

    @fault_point("migrator.receive")
    async def receive(
        self, migration_id: str, first_block: int, num_blocks: int, transport: TransportName
    ) -> Received:
        return await ask(
            self._actor.mig_receive.remote(migration_id, first_block, num_blocks, transport)
        )

    @fault_point("migrator.extend")
    async def extend(self, migration_id: str, tail: TokenTail) -> None:
        await ask(self._actor.mig_extend.remote(migration_id, tail))

    async def wait_progress(self, migration_id: str, num_tokens: int) -> int:
        return await ask(self._actor.mig_wait_progress.remote(migration_id, num_tokens))

    @fault_point("migrator.commit")
    async def commit(self, migration_id: str, frozen: Payload, payload: Payload) -> Committed:
        return await ask(self._actor.mig_commit.remote(migration_id, frozen, payload))

    async def settle(self, migration_id: str) -> Settlement:
        return await ask(self._actor.mig_settle.remote(migration_id))


class LinkWay:
    """The way between two replicas, as all of this Migrator's migrations share it."""

    def __init__(
        self,
        links: LinkTable,
        budgets: Budgets,
        slots: Slots,
        src: Endpoint,
        dst: Endpoint,
        *,
        urgent: bool = False,
    ) -> None:
        self._links = links
        self._budgets = budgets
        self._slots = slots
        self._ends = (src, dst)
        self._urgent = urgent

    def transports(self) -> list[TransportName]:
        return self._links.ranked(*self._ends, time.monotonic())

    def worked(self, transport: TransportName, nbytes: int, seconds: float) -> None:
        self._links.worked(*self._ends, transport, nbytes, seconds)

    def failed(self, transport: TransportName) -> None:
        pause = self._links.failed(*self._ends, transport, time.monotonic())
        logger.warning("%s is left alone for %.0f s", transport, pause)

    def chunk(self, transport: TransportName, nbytes: int) -> AbstractAsyncContextManager[None]:
        src, dst = self._ends
        return self._budgets.chunk(
            src.replica_id,
            dst.replica_id,
            nbytes,
            alone=transport in ALONE,
            urgent=self._urgent,
        )

    def rest(self, replica_id: str, seconds: float) -> None:
        self._slots.rest(replica_id, seconds)


class Migrator:
    """See the module."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = MellSettings.model_validate(settings)
        configure_logging(self._settings.log_level)
        keep_trimmed()
        config = self._settings.migration
        self._limits = DriverLimits(
            max_stages=config.max_stages,
            chunk_bytes=config.chunk_bytes,
            tail_bytes=config.tail_bytes,
            timeout_s=config.timeout_s,
        )
        self._slots = Slots(config.max_concurrent, config.max_concurrent_per_replica)
        self._links = LinkTable(config.transports)
        self._budgets = Budgets(config.buffer_bytes, config.max_bytes_per_s)
        self._faults = Faults.from_environment()

    async def migrate(
        self, order: MigrationOrder, namespace: str, src: ReplicaInfo, dst: ReplicaInfo
    ) -> MigrationResult:
        """Run one migration between replicas of ``namespace``; its result says who owns the
        request now."""
        patient = not order.urgent and order.reason not in IMPATIENT
        async with self._slots.between(order.src, order.dst, urgent=order.urgent, patient=patient):
            try:
                source = ray.get_actor(order.src, namespace=namespace)
                target = ray.get_actor(order.dst, namespace=namespace)
            except ValueError:
                result = MigrationResult(order, "aborted", detail="a replica does not exist")
            else:
                result = await migrate(
                    order,
                    RaySource(source, self._faults),
                    RayTarget(target, self._faults),
                    block_size=src.block_size,
                    block_nbytes=src.block_nbytes,
                    limits=self._limits,
                    way=LinkWay(
                        self._links,
                        self._budgets,
                        self._slots,
                        src.endpoint(),
                        dst.endpoint(),
                        urgent=order.urgent,
                    ),
                )
        logger.info(
            "migration %s of %s %s -> %s (%s, %s): %s %s",
            order.migration_id,
            order.request_id,
            order.src,
            order.dst,
            order.mode,
            order.reason,
            result.outcome,
            result.detail,
        )
        return result
