"""The Migrator: a Serve deployment actor that drives live migrations.

It holds no state that matters: if it dies, reservations and freezes expire or are settled by the
replicas, and the Router retries what it still wants.
"""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Awaitable
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayTaskError

from mell_ray.config import MellSettings
from mell_ray.engine.types import RequestState, Reservation
from mell_ray.errors import MigrationError
from mell_ray.migration.driver import DriverLimits, Payload, PeerDied, migrate
from mell_ray.migration.types import (
    ChunkMeta,
    Frozen,
    MigrationOrder,
    MigrationResult,
    Settlement,
    TokenTail,
)
from mell_ray.serving.logs import configure_logging
from mell_ray.serving.ray_errors import unwrap

logger = logging.getLogger(__name__)

T = TypeVar("T")

REMEMBERED_RESULTS = 1000


async def _ask(call: Awaitable[T]) -> T:
    """Await a replica's answer in the driver's terms: MellError, PeerDied or TimeoutError."""
    try:
        return await call
    except ActorDiedError as error:
        raise PeerDied(str(error).splitlines()[0]) from None
    except (ActorUnavailableError, ObjectLostError) as error:
        raise MigrationError(f"{type(error).__name__}: no answer from the replica") from None
    except RayTaskError as error:
        cause = unwrap(error)
        if isinstance(cause, RayTaskError):
            raise MigrationError(f"{type(cause.cause).__name__}: {cause.cause}") from None
        raise cause from None


class RaySource:
    """The source replica as the driver sees it. Payloads are object references owned here; they
    are freed as soon as the target has taken them in."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def begin(self, order: MigrationOrder) -> RequestState:
        return await _ask(self._actor.mig_begin.remote(order))

    def stage(
        self, migration_id: str, first_block: int, max_blocks: int
    ) -> tuple[Awaitable[ChunkMeta], Payload]:
        meta, payload = self._actor.mig_stage.remote(migration_id, first_block, max_blocks)
        return _ask(meta), payload

    async def tokens(self, migration_id: str, start: int) -> TokenTail:
        return await _ask(self._actor.mig_tokens.remote(migration_id, start))

    def freeze(
        self, migration_id: str, first_block: int
    ) -> tuple[Awaitable[Frozen], Payload, Payload]:
        frozen, payload = self._actor.mig_freeze.remote(migration_id, first_block)
        return _ask(frozen), frozen, payload

    async def thaw(self, migration_id: str) -> None:
        if not await _ask(self._actor.mig_thaw.remote(migration_id)):
            raise MigrationError("the request has ended")

    async def release(self, migration_id: str) -> None:
        await _ask(self._actor.mig_release.remote(migration_id))


class RayTarget:
    """The target replica as the driver sees it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def reserve(self, order: MigrationOrder, state: RequestState) -> Reservation:
        return await _ask(self._actor.mig_reserve.remote(order, state))

    async def receive(self, migration_id: str, first_block: int, payload: Payload) -> None:
        await _ask(self._actor.mig_receive.remote(migration_id, first_block, payload))

    async def extend(self, migration_id: str, tail: TokenTail) -> None:
        await _ask(self._actor.mig_extend.remote(migration_id, tail))

    async def wait_progress(self, migration_id: str, num_tokens: int) -> int:
        return await _ask(self._actor.mig_wait_progress.remote(migration_id, num_tokens))

    async def commit(self, migration_id: str, frozen: Payload, payload: Payload) -> int:
        return await _ask(self._actor.mig_commit.remote(migration_id, frozen, payload))

    async def settle(self, migration_id: str) -> Settlement:
        return await _ask(self._actor.mig_settle.remote(migration_id))


class Migrator:
    """See the module."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = MellSettings.model_validate(settings)
        configure_logging(self._settings.log_level)
        config = self._settings.migration
        self._limits = DriverLimits(max_stages=config.max_stages, timeout_s=config.timeout_s)
        self._slots = asyncio.Semaphore(config.max_concurrent)
        self._results: collections.deque[MigrationResult] = collections.deque(
            maxlen=REMEMBERED_RESULTS
        )

    async def migrate(
        self, order: MigrationOrder, namespace: str, block_size: int, block_nbytes: int
    ) -> MigrationResult:
        """Run one migration between replicas of ``namespace``; its result says who owns the
        request now."""
        async with self._slots:
            try:
                source = ray.get_actor(order.src, namespace=namespace)
                target = ray.get_actor(order.dst, namespace=namespace)
            except ValueError:
                result = MigrationResult(order, "aborted", detail="a replica does not exist")
            else:
                result = await migrate(
                    order,
                    RaySource(source),
                    RayTarget(target),
                    block_size=block_size,
                    block_nbytes=block_nbytes,
                    limits=self._limits,
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
        self._results.append(result)
        return result

    async def results(self) -> list[MigrationResult]:
        """The most recent migrations, oldest first."""
        return list(self._results)
