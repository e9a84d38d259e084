"""Migrations that the Router has ordered: started, followed, entered into the books."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError

from mell_ray.migration.types import MigrationOrder, MigrationResult
from mell_ray.scheduler.events import Migrate, MigrationDone, MigrationFailed
from mell_ray.serving.books import Entry
from mell_ray.serving.core import Core

MIGRATOR = "migrator"


class Moves:
    """The migrations in flight of one Router, by request."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._running: dict[str, asyncio.Task[MigrationResult]] = {}

    def running(self, request_id: str) -> asyncio.Task[MigrationResult] | None:
        return self._running.get(request_id)

    def start(self, decision: Migrate) -> None:
        entry = self._core.entry(decision.request)
        if entry is None or entry.replica_id != decision.src:
            self._core.handle(MigrationFailed(decision.request, decision.src, decision.dst, "gone"))
            return
        order = MigrationOrder(
            migration_id=uuid.uuid4().hex,
            request_id=decision.request,
            src=decision.src,
            dst=decision.dst,
            mode="token" if decision.mode == "token" else "kv",
            reason=decision.reason,
        )
        entry.migrating_to = decision.dst
        task = self._core.spawn(self._run(order, entry))
        self._running[decision.request] = task
        task.add_done_callback(lambda _: self._running.pop(decision.request, None))

    async def results(self) -> list[MigrationResult]:
        """The most recent migrations, oldest first."""
        return await serve.get_deployment_actor(MIGRATOR).results.remote()

    async def _run(self, order: MigrationOrder, entry: Entry) -> MigrationResult:
        source = self._core.fleet.replicas.get(order.src)
        try:
            if source is None or source.info is None:
                result = MigrationResult(order, "aborted", detail="the source is gone")
            else:
                migrator = serve.get_deployment_actor(MIGRATOR)
                result = await migrator.migrate.remote(
                    order,
                    self._core.fleet.namespace,
                    source.info.block_size,
                    source.info.block_nbytes,
                )
        except (RayActorError, RayTaskError, ValueError) as error:
            # Reports will tell who owns the request.
            result = MigrationResult(order, "aborted", detail=f"Migrator failed: {error}")
        self._ended(result, entry)
        return result

    def _ended(self, result: MigrationResult, entry: Entry) -> None:
        self._core.on_migrated(result)
        order, book = result.order, self._core.books[entry.model_id]
        current = book.get(order.request_id) is entry
        if current:
            entry.migrating_to = None
        if result.outcome != "committed":
            self._core.handle(
                MigrationFailed(order.request_id, order.src, order.dst, result.detail)
            )
            return
        if current:
            entry.generation = max(entry.generation, result.generation)
            book.move(entry, order.dst, time.monotonic(), held=True)
        self._core.handle(
            MigrationDone(
                order.request_id,
                order.src,
                order.dst,
                order.mode,
                result.tokens,
                result.bytes,
                result.seconds,
            )
        )


def migration_dict(result: MigrationResult) -> dict[str, Any]:
    """A migration as the operator API shows it."""
    order = result.order
    return {
        "id": order.migration_id,
        "request": order.request_id,
        "from": order.src,
        "to": order.dst,
        "mode": order.mode,
        "reason": order.reason,
        "outcome": result.outcome,
        "detail": result.detail,
        "stages": result.stages,
        "bytes": result.bytes,
        "tokens": result.tokens,
        "cached_tokens": result.cached_tokens,
        "generation": result.generation,
        "seconds": round(result.seconds, 6),
        "freeze_seconds": round(result.freeze_s, 6),
        "finished_at": result.finished_at,
    }
