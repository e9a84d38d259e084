"""The Router: one Serve replica that decides where every request lives.

It drives the scheduler with events (arrivals, reports, ends of migrations) and carries its
decisions out. It keeps no state that it could not rebuild from the replicas.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import uuid
from collections.abc import Iterable
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError

from mell_ray.config import MellConfig
from mell_ray.errors import (
    ConflictError,
    FencedError,
    NotFoundError,
    OverloadedError,
    ServerError,
)
from mell_ray.migration.types import MigrationOrder, MigrationResult
from mell_ray.scheduler import Scheduler
from mell_ray.scheduler.events import (
    AcquireFailed,
    AcquireGpu,
    Arrive,
    Cordon,
    Decision,
    Evacuate,
    Event,
    Finish,
    GpuLost,
    GpuReady,
    Migrate,
    MigrateRequest,
    MigrationDone,
    MigrationFailed,
    Place,
    Preempt,
    Reject,
    ReleaseGpu,
    StepTime,
    Tick,
)
from mell_ray.serving.books import Entry, RequestBook
from mell_ray.serving.fleet import Fleet, Replica, replica_namespace
from mell_ray.serving.logs import configure_logging
from mell_ray.serving.ray_errors import unwrap
from mell_ray.serving.scheduling import scheduler_config
from mell_ray.serving.snapshot import state_snapshot
from mell_ray.serving.wire import Lease, PlaceRequest

logger = logging.getLogger(__name__)

MIGRATOR = "migrator"
REPORT_TIMEOUT_S = 15.0
REPORT_PAUSE_S = 0.02


class Router:
    """See the module. One instance per application, fenced by ``incarnation``."""

    async def __init__(self, config: MellConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        settings = config.mell
        configure_logging(settings.log_level)
        self._settings = settings
        self._llms = {llm.model_id: llm for llm in config.llm_configs}
        self._incarnation = time.time_ns()
        app_name = serve.get_replica_context().app_name
        self._fleet = Fleet(self._llms, settings, replica_namespace(settings, app_name))
        self._books = {
            name: RequestBook(llm.engine_kwargs.block_size) for name, llm in self._llms.items()
        }
        planned = scheduler_config(config)
        self._limits = dict(planned.models)
        self._scheduler = Scheduler(planned, seed=settings.seed)
        self._waiting: dict[str, asyncio.Future[Lease]] = {}
        self._migrations: dict[str, asyncio.Task[MigrationResult]] = {}  # by request id
        self._start_errors: dict[str, str] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        await self._attach()
        self._clock = self._spawn(self._run_clock())
        await self._wait_for_first_replicas()

    def check_health(self) -> None:
        if self._clock.done():
            raise RuntimeError("the Router's planning loop has ended")

    # --- requests --------------------------------------------------------------------------

    async def place(self, request: PlaceRequest) -> Lease:
        """Find a place, waiting in the queue if there is none.

        Raises:
            OverloadedError: the queue is full.
            ServerError: no replica of the model can be started.
        """
        if request.lost_replica is not None:
            await self._look_into(request.request_id, request.lost_replica)
        entry = self._books[request.model_id].get(request.request_id)
        if entry is None:
            return await self._arrive(request)
        if entry.ingress_id not in ("", request.ingress_id):
            raise ConflictError(f"request {request.request_id} is running already; use another id")
        if entry.replica_id is None and not entry.lost:
            return await self._wait(request.request_id)  # queued: a repeated call, or evicted
        if entry.replica_id is not None and entry.generation > request.generation:
            return self._lease(entry)
        self._withdraw(request.request_id)
        return await self._arrive(request)

    async def _look_into(self, request_id: str, replica_id: str) -> None:
        """An ingress says that it lost the request there: find out what is true of it."""
        moving = self._migrations.get(request_id)
        if moving is not None:
            await asyncio.wait([moving])
        replica = self._fleet.replicas.get(replica_id)
        if replica is not None and replica.info is not None:
            await self._poll_once(replica, 0.0)

    async def forget(self, request_ids: list[str]) -> None:
        """The ingress wants these no more (client gone, request failed)."""
        for request_id in request_ids:
            future = self._waiting.pop(request_id, None)
            if future is not None:
                future.cancel()
            self._withdraw(request_id)

    async def _arrive(self, request: PlaceRequest) -> Lease:
        book = self._books[request.model_id]
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
            )
        )
        future = self._future(request.request_id)
        self._handle(
            Arrive(
                request=request.request_id,
                model=request.model_id,
                size=size,
                max_size=max_blocks,
                priority=request.priority,
            )
        )
        limit = self._settings.max_queued_requests
        recovered = request.generation > 0
        if not future.done() and not recovered and self._scheduler.queue_length() > limit:
            self._refuse(
                request.request_id,
                OverloadedError(f"{limit} requests are waiting for room already", retry_after_s=1),
            )
        return await self._wait(request.request_id, future)

    def _future(self, request_id: str) -> asyncio.Future[Lease]:
        future = self._waiting.get(request_id)
        if future is None:
            future = asyncio.get_running_loop().create_future()
            self._waiting[request_id] = future
        return future

    async def _wait(self, request_id: str, future: asyncio.Future[Lease] | None = None) -> Lease:
        # Shielded: one caller that goes away must not take the place from a repeated call.
        return await asyncio.shield(future or self._future(request_id))

    def _withdraw(self, request_id: str) -> None:
        """Take the request out of all books."""
        self._book_of(request_id, drop=True)
        self._handle(Finish(request_id))

    def _refuse(self, request_id: str, error: Exception) -> None:
        future = self._waiting.pop(request_id, None)
        self._withdraw(request_id)
        if future is not None and not future.done():
            future.set_exception(error)

    def _lease(self, entry: Entry) -> Lease:
        assert entry.replica_id is not None
        return Lease(entry.replica_id, entry.generation, entry.arrival_s, entry.held)

    def _book_of(self, request_id: str, *, drop: bool = False) -> Entry | None:
        for book in self._books.values():
            entry = book.get(request_id)
            if entry is not None:
                return book.drop(request_id) if drop else entry
        return None

    # --- scheduler -------------------------------------------------------------------------

    def _handle(self, event: Event) -> list[Decision]:
        decisions = self._scheduler.handle(event, time.monotonic())
        self._carry_out(decisions)
        return decisions

    def _carry_out(self, decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Place(request_id, replica_id):
                    self._placed(request_id, replica_id)
                case Migrate():
                    self._start_migration(decision)
                case AcquireGpu(model_id):
                    self._spawn(self._open(self._fleet.create(model_id)))
                case ReleaseGpu(replica_id):
                    self._spawn(self._release(replica_id))
                case Preempt(request_id, replica_id):
                    self._evict(request_id, replica_id)
                case Reject(request_id, reason):
                    self._refuse(request_id, ServerError(reason))

    def _placed(self, request_id: str, replica_id: str) -> None:
        entry = self._book_of(request_id)
        if entry is None:
            return
        entry.generation += 1
        book = self._books[entry.model_id]
        book.move(entry, replica_id, time.monotonic(), held=False)
        future = self._waiting.pop(request_id, None)
        if future is not None and not future.done():
            future.set_result(self._lease(entry))

    def _evict(self, request_id: str, replica_id: str) -> None:
        entry, replica = self._book_of(request_id), self._fleet.replicas.get(replica_id)
        if entry is None or replica is None:
            return
        self._books[entry.model_id].move(entry, None, time.monotonic(), held=False)
        self._spawn(
            self._tell(
                replica,
                replica.actor.evict.remote(self._incarnation, request_id, entry.generation),
            )
        )

    async def _run_clock(self) -> None:
        while True:
            await asyncio.sleep(self._settings.epoch_s)
            now = time.monotonic()
            for book in self._books.values():
                for event in book.unclaimed(now):
                    self._handle(event)
            self._handle(Tick())

    # --- migrations ------------------------------------------------------------------------

    def _start_migration(self, decision: Migrate) -> None:
        entry = self._book_of(decision.request)
        order = MigrationOrder(
            migration_id=uuid.uuid4().hex,
            request_id=decision.request,
            src=decision.src,
            dst=decision.dst,
            mode="token" if decision.mode == "token" else "kv",
            reason=decision.reason,
        )
        if entry is None or entry.replica_id != decision.src:
            self._handle(MigrationFailed(decision.request, decision.src, decision.dst, "gone"))
            return
        entry.migrating_to = decision.dst
        task = self._spawn(self._migrate(order, entry))
        self._migrations[decision.request] = task
        task.add_done_callback(lambda _: self._migrations.pop(decision.request, None))

    async def _migrate(self, order: MigrationOrder, entry: Entry) -> MigrationResult:
        replica = self._fleet.replicas.get(order.src)
        try:
            if replica is None or replica.info is None:
                result = MigrationResult(order, "aborted", detail="the source is gone")
            else:
                migrator = serve.get_deployment_actor(MIGRATOR)
                result = await migrator.migrate.remote(
                    order, self._fleet.namespace, replica.info.block_size, replica.info.block_nbytes
                )
        except (RayActorError, RayTaskError, ValueError) as error:
            # Reports will tell who owns the request.
            result = MigrationResult(order, "aborted", detail=f"Migrator failed: {error}")
        self._migrated(result, entry)
        return result

    def _migrated(self, result: MigrationResult, entry: Entry) -> None:
        order = result.order
        current = self._books[entry.model_id].get(order.request_id) is entry
        if current:
            entry.migrating_to = None
        if result.outcome == "committed":
            if current:
                entry.generation = max(entry.generation, result.generation)
                book = self._books[entry.model_id]
                book.move(entry, order.dst, time.monotonic(), held=True)
            self._handle(
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
        else:
            self._handle(MigrationFailed(order.request_id, order.src, order.dst, result.detail))

    # --- fleet -----------------------------------------------------------------------------

    async def _attach(self) -> None:
        """Take over what an earlier Router has left, before anything new is placed."""
        for replica in self._fleet.attach():
            if replica.model_id not in self._llms:
                self._fleet.kill(replica.replica_id)
                continue
            self._join(replica)
        first_reports = [self._poll_once(r, 0.0) for r in list(self._fleet.replicas.values())]
        await asyncio.gather(*first_reports)

    async def _wait_for_first_replicas(self) -> None:
        """Let the deployment count as started only when each model that must have a replica has
        one, so that a model that cannot be loaded fails the deployment with the reason."""
        wanted = [
            name
            for name, llm in self._llms.items()
            if llm.deployment_config.autoscaling_config.min_replicas
        ]
        self._handle(Tick())
        while True:
            missing = [name for name in wanted if not self._ready(name)]
            if not missing:
                return
            for name in missing:
                if name in self._start_errors:
                    raise RuntimeError(self._start_errors[name])
            await asyncio.sleep(0.05)

    def _ready(self, model_id: str) -> list[Replica]:
        return [
            replica
            for replica in self._fleet.replicas.values()
            if replica.model_id == model_id and replica.state != "starting"
        ]

    async def _open(self, replica: Replica) -> None:
        try:
            await self._fleet.wait_ready(replica)
        except ServerError as error:
            logger.error("%s", error)
            self._start_errors[replica.model_id] = str(error)
            self._handle(AcquireFailed(replica.model_id, str(error)))
            if not self._fleet.count(replica.model_id):
                self._fail_waiting(replica.model_id, error)
            return
        self._start_errors.pop(replica.model_id, None)
        self._join(replica)

    def _join(self, replica: Replica) -> None:
        info = replica.info
        assert info is not None
        self._handle(
            GpuReady(
                gpu=replica.replica_id,
                model=replica.model_id,
                capacity=info.capacity_blocks,
                node=info.node_id,
                max_requests=self._max_requests(replica),
            )
        )
        self._spawn(self._poll(replica))

    def _max_requests(self, replica: Replica) -> int:
        assert replica.info is not None
        limit = self._llms[replica.model_id].deployment_config.max_ongoing_requests
        return min(replica.info.max_num_seqs, limit or replica.info.max_num_seqs)

    def _fail_waiting(self, model_id: str, error: ServerError) -> None:
        for request_id in list(self._waiting):
            if self._books[model_id].get(request_id) is not None:
                self._refuse(request_id, error)

    async def _release(self, replica_id: str) -> None:
        replica = self._fleet.replicas.get(replica_id)
        if replica is None:
            return
        try:
            empty = await replica.actor.retire.remote(self._incarnation)
        except (RayActorError, RayTaskError):
            empty = True
        if empty:
            logger.info("replica %s released", replica_id)
            self._fleet.kill(replica_id)
            return
        # Something arrived between the decision and now: it stays.
        assert replica.info is not None
        self._join(replica)

    async def _poll(self, replica: Replica) -> None:
        """Follow one replica until it is gone."""
        while self._fleet.replicas.get(replica.replica_id) is replica:
            if not await self._poll_once(replica, self._settings.epoch_s):
                return
            await asyncio.sleep(REPORT_PAUSE_S)

    async def _poll_once(self, replica: Replica, wait_s: float) -> bool:
        try:
            async with asyncio.timeout(REPORT_TIMEOUT_S + wait_s):
                report = await replica.actor.report.remote(self._incarnation, wait_s)
        except (RayActorError, TimeoutError) as error:
            self._lost(replica, error)
            return False
        except RayTaskError as error:
            if isinstance(unwrap(error), FencedError):
                logger.warning("this Router was replaced; it stops polling")
                return False
            self._lost(replica, error)
            return False
        replica.report = report
        now = time.monotonic()
        book = self._books[replica.model_id]
        for event in book.reconcile(replica.replica_id, replica.model_id, report.sequences, now):
            self._handle(event)
        if report.step is not None:
            step = report.step
            self._handle(
                StepTime(replica.replica_id, step.sequences, step.resident_tokens, step.seconds)
            )
        return True

    def _lost(self, replica: Replica, error: BaseException) -> None:
        if self._fleet.replicas.get(replica.replica_id) is not replica:
            return
        logger.warning("replica %s is lost: %s", replica.replica_id, type(error).__name__)
        # A replica that does not answer may still run: make sure that it does not.
        self._fleet.kill(replica.replica_id)
        self._books[replica.model_id].lose_replica(replica.replica_id, time.monotonic())
        self._handle(GpuLost(replica.replica_id))

    async def _tell(self, replica: Replica, call: Any) -> None:
        try:
            await call
        except (RayActorError, RayTaskError) as error:
            logger.warning("replica %s did not take a call: %s", replica.replica_id, error)

    def _spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- operator --------------------------------------------------------------------------

    async def ping(self) -> None:
        """Answer, to show that the Router lives."""

    async def state(self) -> dict[str, Any]:
        """Every replica and request, as the replicas see them now."""
        polled = [r for r in self._fleet.replicas.values() if r.info is not None]
        await asyncio.gather(*(self._poll_once(replica, 0.0) for replica in polled))
        return state_snapshot(self._fleet.replicas.values(), self._waiting)

    async def limits(self, model_id: str) -> tuple[int, int] | None:
        """(context length, pool capacity) in tokens of the model's largest replica, if any."""
        infos = [replica.info for replica in self._ready(model_id) if replica.info is not None]
        if not infos:
            return None
        best = max(infos, key=lambda info: info.capacity_blocks)
        return best.max_model_len, best.capacity_blocks * best.block_size

    async def migrate(self, request_id: str, to: str | None, mode: str) -> dict[str, Any]:
        """Move one request and wait for the outcome.

        Raises:
            NotFoundError: no such request or replica.
            ConflictError: it cannot be moved now; the message says why.
        """
        request_id = request_id.removeprefix("chatcmpl-").removeprefix("cmpl-")
        entry = self._book_of(request_id)
        if entry is None or entry.replica_id is None:
            raise NotFoundError(f"request {request_id!r} is not running", param="id")
        if to is not None and to not in self._fleet.replicas:
            raise NotFoundError(f"replica {to!r} does not exist", param="to")
        if to == entry.replica_id:
            raise ConflictError(f"request {request_id!r} is on {to!r} already", param="to")
        if request_id in self._migrations:
            raise ConflictError(f"request {request_id!r} is being migrated already")
        chosen = None if mode == "auto" else mode
        self._handle(MigrateRequest(request_id, to, chosen))  # type: ignore[arg-type]
        task = self._migrations.get(request_id)
        if task is None:
            where = f"on replica {to!r}" if to else "on any other replica"
            raise ConflictError(f"there is no room for request {request_id!r} {where}")
        result = await asyncio.shield(task)
        return migration_dict(result)

    async def evacuate(self, replica_id: str) -> dict[str, Any]:
        """Empty a replica by migration and release it; returns at once."""
        replica = self._replica(replica_id)
        replica.state = "draining"
        self._set_minimum(replica.model_id, self._limits[replica.model_id].min_gpus - 1)
        self._handle(Evacuate(replica_id))
        running = replica.report.stats.running if replica.report else 0
        return {"id": replica_id, "state": "draining", "running": running}

    async def cordon(self, replica_id: str, cordoned: bool) -> dict[str, Any]:
        """Keep new requests off a replica, or let them on again."""
        self._replica(replica_id)
        self._handle(Cordon(replica_id, cordoned))
        return {"id": replica_id, "cordoned": cordoned}

    async def open_replica(self, model_id: str | None) -> dict[str, Any]:
        """Open one replica more and keep it until it is evacuated."""
        name = model_id or next(iter(self._llms))
        if name not in self._llms:
            raise NotFoundError(f"model {name!r} is not served here", param="model")
        count, limit = self._fleet.count(name), self._limits[name].max_gpus
        if count >= limit:
            raise ConflictError(f"model {name!r} has its max_replicas ({limit}) already")
        before = set(self._fleet.replicas)
        self._set_minimum(name, count + 1)
        self._handle(Tick())
        for replica in self._fleet.replicas.values():
            if replica.model_id == name and replica.replica_id not in before:
                return {"id": replica.replica_id, "model": name, "state": replica.state}
        raise ConflictError("replicas failed to start just now; try again in a moment")

    def _set_minimum(self, model_id: str, minimum: int) -> None:
        """Keep that many replicas, but never fewer than configured."""
        configured = self._llms[model_id].deployment_config.autoscaling_config.min_replicas
        limits = dataclasses.replace(self._limits[model_id], min_gpus=max(configured, minimum))
        self._limits[model_id] = limits
        self._scheduler.set_limits(model_id, limits)

    async def migrations(self) -> list[dict[str, Any]]:
        """The most recent migrations, oldest first."""
        migrator = serve.get_deployment_actor(MIGRATOR)
        return [migration_dict(result) for result in await migrator.results.remote()]

    def _replica(self, replica_id: str) -> Replica:
        replica = self._fleet.replicas.get(replica_id)
        if replica is None:
            raise NotFoundError(f"replica {replica_id!r} does not exist", param="id")
        if replica.state == "starting":
            raise ConflictError(f"replica {replica_id!r} is still starting")
        return replica


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
