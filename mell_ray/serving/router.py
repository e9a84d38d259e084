"""The Router: one Serve replica that decides where every request lives.

It drives the scheduler with events (arrivals, reports, ends of migrations) and carries its
decisions out. It keeps no state that it could not rebuild from the replicas.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import ray
from ray import serve

from mell_ray.config import MellConfig
from mell_ray.errors import ConflictError, NotFoundError, ServerError
from mell_ray.migration.records import MigrationRecord
from mell_ray.observability.pulse import Pulse
from mell_ray.observability.recorder import RayRecorder
from mell_ray.scheduler.events import (
    AcquireGpu,
    Cordon,
    Decision,
    Migrate,
    MigrateRequest,
    Place,
    Preempt,
    Reject,
    ReleaseGpu,
    Tick,
    WithdrawGpu,
)
from mell_ray.serving.core import Core
from mell_ray.serving.fleet import ASLEEP, Replica
from mell_ray.serving.heap import keep_trimmed
from mell_ray.serving.listener import Address
from mell_ray.serving.logs import configure_logging
from mell_ray.serving.moves import Moves
from mell_ray.serving.nodes import Nodes
from mell_ray.serving.observer import Observer
from mell_ray.serving.place_socket import place_listener
from mell_ray.serving.placement import Placement
from mell_ray.serving.sleepers import Sleepers
from mell_ray.serving.snapshot import state_snapshot
from mell_ray.serving.track import Stall
from mell_ray.serving.upgrade import Upgrade
from mell_ray.serving.watch import Watch
from mell_ray.serving.wire import Lease, PlaceRequest


class Router:
    """See the module. One instance per application."""

    async def __init__(self, config: MellConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        configure_logging(config.mell.log_level)
        keep_trimmed()
        core = self._core = Core(config, serve.get_replica_context().app_name)
        self._moves = Moves(core)
        self._violations = 0
        self._placement = Placement(core, self._look_into)
        self._listener = place_listener(self._placement.place)
        self._watch = Watch(core, self._placement.refuse_model)
        self._sleepers = Sleepers(core, self._watch)
        core.carry_out = self._carry_out
        self._observer = Observer(core, RayRecorder("router"), self._placement.waiting)
        core.on_migrated = self._observer.migrated
        self._nodes = Nodes(core, self._watch)
        await self._nodes.attach()
        Upgrade(core, self._watch).begin(await self._watch.attach())
        core.spawn(self._nodes.follow())
        core.spawn(self._sleepers.follow())
        self._clock = core.spawn(self._run_clock())
        await self._wait_for_first_replicas()

    def check_health(self) -> None:
        if self._clock.done():
            raise RuntimeError("the Router's planning loop has ended")

    async def _wait_for_first_replicas(self) -> None:
        """Let the deployment count as started only when each model that must have a replica has
        one, so that a model that cannot be loaded fails the deployment with the reason."""
        wanted = [name for name, limits in self._core.limits.items() if limits.min_gpus]
        self._core.handle(Tick())
        while missing := [name for name in wanted if not self._watch.ready(name)]:
            for name in missing:
                if name in self._watch.start_errors:
                    raise RuntimeError(self._watch.start_errors[name])
            await asyncio.sleep(0.05)

    async def _run_clock(self) -> None:
        while True:
            await asyncio.sleep(self._core.settings.epoch_s)
            now = time.monotonic()
            for book in self._core.books.values():
                for event in book.unclaimed(now):
                    self._core.handle(event)
            started = time.perf_counter()
            self._core.handle(Tick())
            self._observer.epoch(time.perf_counter() - started)

    def _carry_out(self, decision: Decision) -> None:
        match decision:
            case Place(request_id, replica_id):
                self._placement.placed(request_id, replica_id)
            case Migrate():
                self._moves.start(decision)
            case AcquireGpu(model_id, wake=None):
                self._watch.open(model_id)
            case AcquireGpu(model_id, wake=str(replica_id)):
                self._core.spawn(self._sleepers.wake(replica_id, model_id))
            case WithdrawGpu(model_id):
                self._watch.withdraw(model_id)
            case ReleaseGpu(replica_id, sleep=True):
                self._core.spawn(self._sleepers.put_to_sleep(replica_id))
            case ReleaseGpu(replica_id):
                self._core.spawn(self._watch.release(replica_id))
            case Preempt(request_id, replica_id):
                self._watch.evict(request_id, replica_id)
            case Reject(request_id, reason):
                self._placement.refuse(request_id, ServerError(reason))

    # --- ingresses -------------------------------------------------------------------------

    async def place(self, request: PlaceRequest) -> Lease:
        """See ``Placement.place``."""
        return await self._placement.place(request)

    async def place_socket(self) -> Address | None:
        """Where an ingress may ask for places without Serve; None: nowhere."""
        return await self._listener.address(ray.util.get_node_ip_address())

    async def forget(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._placement.forget(request_id)

    async def tell(self, pulse: Pulse) -> None:
        """What an ingress has served in the last second."""
        self._observer.heard(pulse)

    async def ping(self) -> None:
        """Answer, to show that the Router lives."""

    async def limits(self, model_id: str) -> tuple[int, int] | None:
        """(context length, pool capacity) in tokens of the model's largest replica, if any."""
        infos = self._watch.known(model_id)
        if not infos:
            return None
        best = max(infos, key=lambda info: info.capacity_blocks)
        return best.max_model_len, best.capacity_blocks * best.block_size

    async def _look_into(self, request_id: str, replica_id: str) -> None:
        moving = self._moves.running(request_id)
        if moving is not None:
            await asyncio.wait([moving])
        await self._watch.look_into(replica_id)

    # --- operator --------------------------------------------------------------------------

    async def state(self) -> dict[str, Any]:
        """Every replica and request, as the replicas see them now."""
        await self._watch.poll_all()
        state = state_snapshot(self._core.fleet.replicas.values(), self._placement.waiting())
        state["transitions"] = self._core.scheduler.transitions()
        nodes = {"nodes": self._nodes.view()}
        return state | nodes | {"exactly_once_violations": self._violations}

    async def page_data(self) -> bytes:
        """JSON for the status page."""
        return self._observer.page_data()

    async def migrations(self) -> dict[str, Any]:
        """The most recent migrations, oldest first, and sums by mode over all of them since this
        Router started."""
        log = self._moves.log
        return {"migrations": log.recent(), "totals": log.totals_dict()}

    async def handed_over(self, stalls: list[Stall]) -> None:
        """What an ingress has seen of hand-overs to other replicas."""
        for stall in stalls:
            self._moves.log.stalled(
                stall.request_id, stall.generation, stall.seconds, stall.median_gap_s
            )

    async def violated(self, count: int) -> None:
        """An ingress has refused that many deltas that broke the ownership rules."""
        self._violations += count

    async def migrate(self, request_id: str, to: str | None, mode: str) -> dict[str, Any]:
        """Move one request and wait for the outcome.

        Raises:
            NotFoundError: no such request or replica.
            ConflictError: it cannot be moved now; the message says why.
        """
        request_id = request_id.removeprefix("chatcmpl-").removeprefix("cmpl-")
        entry = self._core.entry(request_id)
        if entry is None or entry.replica_id is None:
            raise NotFoundError(f"request {request_id!r} is not running", param="id")
        if to is not None and to not in self._core.fleet.replicas:
            raise NotFoundError(f"replica {to!r} does not exist", param="to")
        if to == entry.replica_id:
            raise ConflictError(f"request {request_id!r} is on {to!r} already", param="to")
        if self._moves.running(request_id) is not None:
            raise ConflictError(f"request {request_id!r} is being migrated already")
        chosen = None if mode == "auto" else mode
        self._core.handle(MigrateRequest(request_id, to, chosen))  # type: ignore[arg-type]
        task = self._moves.running(request_id)
        if task is None:
            where = f"on replica {to!r}" if to else "on any other replica"
            raise ConflictError(f"there is no room for request {request_id!r} {where}")
        return MigrationRecord(await asyncio.shield(task)).to_dict()

    async def evacuate(self, replica_id: str) -> dict[str, Any]:
        """Empty a replica by migration and release it; returns at once."""
        replica = self._replica(replica_id)
        if replica.state not in ASLEEP:
            minimum = self._core.limits[replica.model_id].min_gpus
            self._core.set_minimum(replica.model_id, minimum - 1)
        self._watch.drain(replica)
        running = replica.report.stats.running if replica.report else 0
        return {"id": replica_id, "state": replica.state, "running": running}

    async def drain_node(self, node: str, drained: bool) -> dict[str, Any]:
        """See ``Nodes.drain``."""
        return await self._nodes.drain(node, drained)

    async def cordon(self, replica_id: str, cordoned: bool) -> dict[str, Any]:
        """Keep new requests off a replica, or let them on again."""
        replica = self._replica(replica_id)
        if replica.state == "draining":
            raise ConflictError(f"replica {replica_id!r} is being emptied")
        if replica.state in ASLEEP:
            raise ConflictError(f"replica {replica_id!r} is asleep")
        self._core.handle(Cordon(replica_id, cordoned))
        return {"id": replica_id, "cordoned": cordoned}

    async def open_replica(self, model_id: str | None) -> dict[str, Any]:
        """Open one replica more and keep it until it is evacuated."""
        name = model_id or next(iter(self._core.llms))
        if name not in self._core.llms:
            raise NotFoundError(f"model {name!r} is not served here", param="model")
        replicas = self._core.fleet.replicas
        count, limit = self._core.fleet.count(name), self._core.limits[name].max_gpus
        if count >= limit:
            raise ConflictError(f"model {name!r} has its max_replicas ({limit}) already")
        before = {name for name, replica in replicas.items() if replica.state not in ASLEEP}
        self._core.set_minimum(name, count + 1)
        self._core.handle(Tick())
        await asyncio.sleep(0)  # one that sleeps begins to wake
        for replica in replicas.values():
            starts = replica.state == "starting" and replica.replica_id not in before
            if starts and replica.model_id == name:
                return {"id": replica.replica_id, "model": name, "state": replica.state}
        raise ConflictError("replicas failed to start just now; try again in a moment")

    def _replica(self, replica_id: str) -> Replica:
        replica = self._core.fleet.replicas.get(replica_id)
        if replica is None:
            raise NotFoundError(f"replica {replica_id!r} does not exist", param="id")
        if replica.state == "starting":
            raise ConflictError(f"replica {replica_id!r} is still starting")
        return replica
