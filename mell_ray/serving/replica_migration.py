"""What a replica answers to the Migrator: the calls of both halves of the migration protocol."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import ray

from mell_ray.engine.types import RequestState, Reservation
from mell_ray.errors import ConflictError
from mell_ray.migration.faults import Faults, fault_point
from mell_ray.migration.source import MigrationSource
from mell_ray.migration.target import MigrationTarget
from mell_ray.migration.transports.base import Parcel, Ticket, TransportName
from mell_ray.migration.transports.berths import Berth
from mell_ray.migration.types import (
    ChunkMeta,
    Committed,
    Frozen,
    MigrationOrder,
    Received,
    Settlement,
    TokenTail,
)
from mell_ray.observability.spans import EngineSpans
from mell_ray.serving.mover import Mover
from mell_ray.serving.outbox import Outbox
from mell_ray.serving.wire import Migrating, Moved, ReplicaSpec

if TYPE_CHECKING:
    from mell_ray.engine import Engine

T = TypeVar("T")

CONTROL_GROUP = "control"

control = ray.method(concurrency_group=CONTROL_GROUP)
control_pair = ray.method(concurrency_group=CONTROL_GROUP, num_returns=2)


class MigrationCalls(ABC):
    """The part of ``GPUReplica`` that migrations talk to. Its state is the replica's."""

    faults: Faults
    _spec: ReplicaSpec
    _source: MigrationSource
    _target: MigrationTarget
    _mover: Mover
    _spans: EngineSpans
    _ingress_of: dict[str, str]  # request id -> ingress id
    _retired: bool

    @abstractmethod
    def in_engine(self, function: Callable[[Engine], T]) -> asyncio.Future[T]:
        """Run ``function`` in the engine thread, between two steps."""

    @abstractmethod
    def _outbox(self, ingress_id: str) -> Outbox: ...

    @abstractmethod
    def _notify_router(self) -> None: ...

    @fault_point("source.begin")
    @control
    async def mig_begin(self, order: MigrationOrder) -> RequestState:
        def begin(engine: Engine) -> RequestState:
            state = self._source.begin(engine, order)
            ingress = self._ingress_of.get(order.request_id)
            if ingress is not None:
                self._outbox(ingress).put(notices=[Migrating(order.request_id, order.dst)])
            return state

        return await self._mover.in_engine(begin)

    @fault_point("source.offer")
    @control
    async def mig_offer(self, transport: TransportName, peer: str) -> Ticket:
        return self._mover.transports[transport].offer(peer)

    @fault_point("join")
    @control
    async def mig_join(
        self, transport: TransportName, peer: str, ticket: Ticket, is_source: bool
    ) -> None:
        await self._mover.join(transport, peer, ticket, is_source=is_source)

    @control
    async def mig_abort_link(self, transport: TransportName, peer: str) -> None:
        self._mover.transports[transport].abort(peer)

    @fault_point("source.stage")
    @control_pair
    async def mig_stage(
        self,
        migration_id: str,
        first_block: int,
        max_blocks: int,
        transport: TransportName,
        berth: Berth | None,
    ) -> tuple[ChunkMeta, Parcel]:
        return await self._mover.send(migration_id, first_block, max_blocks, transport, berth)

    @fault_point("source.tokens")
    @control
    async def mig_tokens(self, migration_id: str, start: int) -> TokenTail:
        return await self._mover.in_engine(lambda e: self._source.tokens(e, migration_id, start))

    @fault_point("source.freeze")
    @control_pair
    async def mig_freeze(self, migration_id: str, first_block: int) -> tuple[Frozen, np.ndarray]:
        return await self._mover.in_engine(
            lambda e: self._source.freeze(e, migration_id, first_block)
        )

    @fault_point("source.thaw")
    @control
    async def mig_thaw(self, order: MigrationOrder) -> bool:
        """Decode on. False: the request is not here any more."""

        def thaw(engine: Engine) -> bool:
            self._mover.thaw(engine, order.migration_id)
            return engine.generation_of(order.request_id) is not None

        return await self.in_engine(thaw)

    @fault_point("source.release")
    @control
    async def mig_release(self, migration_id: str) -> float:
        await self._mover.in_engine(lambda e: self.release_moved(e, migration_id))
        return self._mover.rest_s

    def release_moved(self, engine: Engine, migration_id: str) -> None:
        """In the engine thread: the target owns the request; tell its ingress and forget it."""
        order = self._mover.release(engine, migration_id)
        if order is None:
            return
        self._spans.left(order.request_id, "moved")
        ingress = self._ingress_of.pop(order.request_id, None)
        if ingress is not None:
            self._outbox(ingress).put(notices=[Moved(order.request_id, order.dst)])
        self._notify_router()

    @fault_point("target.reserve")
    @control
    async def mig_reserve(self, order: MigrationOrder, state: RequestState) -> Reservation:
        def reserve(engine: Engine) -> Reservation:
            if self._retired:
                raise ConflictError(f"replica {self._spec.replica_id} is being released")
            return self._target.reserve(engine, order, state)

        return await self._mover.in_engine(reserve)

    @fault_point("target.receive")
    @control
    async def mig_receive(
        self, migration_id: str, first_block: int, num_blocks: int, transport: TransportName
    ) -> Received:
        return await self._mover.receive(migration_id, first_block, num_blocks, transport)

    @fault_point("target.extend")
    @control
    async def mig_extend(self, migration_id: str, tail: TokenTail) -> None:
        await self._mover.in_engine(lambda e: self._target.extend(e, migration_id, tail))

    @fault_point("target.wait_progress")
    @control
    async def mig_wait_progress(self, migration_id: str, num_tokens: int) -> int:
        """Wait until the reservation's KV reaches ``num_tokens - 1`` tokens (the last one is
        computed when the request is resumed)."""
        return await self._mover.progress(migration_id, num_tokens - 1)

    @fault_point("target.commit")
    @control
    async def mig_commit(self, migration_id: str, frozen: Frozen, payload: np.ndarray) -> Committed:
        def commit(engine: Engine) -> int:
            generation = self._target.commit(engine, migration_id, frozen, payload)
            self._ingress_of[frozen.state.request_id] = frozen.state.ingress_id
            self._spans.arrived(frozen.state)
            return generation

        generation = await self._mover.in_engine(commit)
        return Committed(generation, self._mover.rest_s)

    @fault_point("target.settle")
    @control
    async def mig_settle(self, migration_id: str) -> Settlement:
        return await self.in_engine(lambda e: self._target.settle(e, migration_id))
