"""Calls of the migration protocol from one process to a replica."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayTaskError

from mell_ray.errors import MigrationError
from mell_ray.migration.faults import Faults, fault_point
from mell_ray.migration.peers import PeerDied
from mell_ray.migration.transports.base import Parcel, TransportError, TransportName
from mell_ray.migration.transports.berths import Berth
from mell_ray.migration.types import ChunkMeta, MigrationOrder
from mell_ray.serving.ray_errors import unwrap

T = TypeVar("T")

REMEMBERED = 64


async def ask(call: Awaitable[T]) -> T:
    """Await a replica's answer.

    Raises:
        MellError: it refused, or could not be asked.
        PeerDied: it is dead.
    """
    told: BaseException
    try:
        return await call
    except ActorDiedError as error:
        told = PeerDied(str(error).splitlines()[0])
    except (ActorUnavailableError, ObjectLostError) as error:
        told = MigrationError(f"{type(error).__name__}: no answer from the replica")
    except RayTaskError as error:
        told = unwrap(error)
        if isinstance(told, RayTaskError):
            told = MigrationError(f"{type(told.cause).__name__}: {told.cause}")
    try:
        raise told  # out here, or it and Ray's error would hold each other, and all that they saw
    finally:
        del told


class Sources:
    """The replicas that requests come from, as their target asks them for blocks.

    The target asks, not the Migrator: blocks then go from one replica to the other in one message,
    and the target, which takes them in, is also who holds them until then.
    """

    def __init__(self, namespace: str, faults: Faults) -> None:
        self._namespace = namespace
        self.faults = faults
        self._actors: dict[str, Any] = {}

    @fault_point("target.stage")
    async def stage(
        self,
        order: MigrationOrder,
        first_block: int,
        max_blocks: int,
        transport: TransportName,
        timeout_s: float,
        berth: Berth | None = None,
    ) -> tuple[ChunkMeta, Parcel]:
        """Have blocks sent by ``transport``, and what it needs to receive them. ``berth``: memory
        for them here.

        Raises:
            MellError: the source refused, is gone, or cannot be reached.
            TransportError: the transport failed there, or nothing came in time.
        """
        meta, parcel = self._actor(order.src).mig_stage.remote(
            order.migration_id, first_block, max_blocks, transport, berth
        )
        try:
            async with asyncio.timeout(timeout_s):
                sent, blocks = await asyncio.gather(ask(meta), ask(parcel))
                return sent, blocks
        except TimeoutError:
            raise TransportError(f"{transport}: the source did not send in time") from None
        except PeerDied:
            self._actors.pop(order.src, None)
            raise MigrationError(f"the source {order.src} has died") from None

    def _actor(self, replica_id: str) -> Any:
        if replica_id not in self._actors:
            if len(self._actors) >= REMEMBERED:
                self._actors.clear()
            try:
                actor = ray.get_actor(replica_id, namespace=self._namespace)
            except ValueError:
                raise MigrationError(f"there is no source {replica_id}") from None
            self._actors[replica_id] = actor
        return self._actors[replica_id]
