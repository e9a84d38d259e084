"""Migrations that the Router has ordered: started, followed, entered into the books."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError

from mell_ray.migration.records import MigrationLog
from mell_ray.migration.types import MigrationOrder, MigrationResult
from mell_ray.scheduler.events import Migrate, MigrationDone, MigrationFailed
from mell_ray.serving.books import Entry
from mell_ray.serving.core import Core

MIGRATOR = "migrator"
# Serve finds a dead Migrator at its next check, by default every 10 s, and starts another.
MIGRATOR_PATIENCE_S = 20.0
MIGRATOR_POLL_S = 0.1
OPERATOR = "operator"  # the scheduler's reason for a move that was asked for


class Moves:
    """The migrations in flight of one Router, by request."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._running: dict[str, asyncio.Task[MigrationResult]] = {}
        self.log = MigrationLog()

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
            mode=decision.mode,
            reason=decision.reason,
            urgent=decision.urgent,
        )
        entry.migrating_to = decision.dst
        task = self._core.spawn(self._run(order, entry))
        self._running[decision.request] = task
        task.add_done_callback(lambda _: self._running.pop(decision.request, None))

    async def _run(self, order: MigrationOrder, entry: Entry) -> MigrationResult:
        source, target = (self._core.fleet.replicas.get(name) for name in (order.src, order.dst))
        try:
            if source is None or source.info is None or target is None or target.info is None:
                result = MigrationResult(order, "aborted", detail="a replica is gone")
            elif source.info.weights != target.info.weights:
                result = MigrationResult(order, "aborted", detail="the target has other weights")
            else:
                if source.info.kv_format != target.info.kv_format:
                    order = dataclasses.replace(order, mode="token")
                migrator = await _migrator()
                result = await migrator.migrate.remote(
                    order,
                    self._core.fleet.namespace,
                    source.info,
                    target.info,
                )
        except (RayActorError, RayTaskError, ValueError) as error:
            # Reports will tell who owns the request.
            result = MigrationResult(order, "aborted", detail=f"Migrator failed: {error}")
        self._ended(result, entry)
        return result

    def _ended(self, result: MigrationResult, entry: Entry) -> None:
        self._core.on_migrated(result)
        self.log.add(result)
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
                result.tokens - result.cached_tokens,
                result.bytes - result.tail_bytes,  # what ``copy_s`` was spent on
                result.seconds,
                result.copy_s,
                result.cached_tokens,
            )
        )


async def _migrator() -> Any:
    """The Migrator, awaited where it has died: a move that is planned can wait.

    Raises:
        ValueError: Serve has not brought it back in time.
    """
    deadline = time.monotonic() + MIGRATOR_PATIENCE_S
    while True:
        try:
            return serve.get_deployment_actor(MIGRATOR)
        except ValueError:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(MIGRATOR_POLL_S)
