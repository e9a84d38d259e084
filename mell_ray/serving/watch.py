"""Replicas as the Router follows them: from birth through their reports to their end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from ray.exceptions import RayActorError, RayTaskError

from mell_ray.errors import FencedError, ServerError
from mell_ray.scheduler.events import (
    AcquireFailed,
    Evacuate,
    GpuAsleep,
    GpuLost,
    GpuReady,
    StepTime,
)
from mell_ray.serving.books import Entry
from mell_ray.serving.core import Core
from mell_ray.serving.fleet import ASLEEP, Replica
from mell_ray.serving.ray_errors import unwrap
from mell_ray.serving.versions import config_hash
from mell_ray.serving.wire import ReplicaInfo

logger = logging.getLogger(__name__)

REPORT_TIMEOUT_S = 15.0
REPORT_PAUSE_S = 0.02


class Watch:
    """The replicas of one Router. ``on_hopeless`` is told when a model has no replica left and
    the last one asked for could not be started."""

    def __init__(self, core: Core, on_hopeless: Callable[[str, ServerError], None]) -> None:
        self._core = core
        self._on_hopeless = on_hopeless
        self.start_errors: dict[str, str] = {}  # by model, of the last start if it failed

    def ready(self, model_id: str) -> list[Replica]:
        return [
            replica
            for replica in self._core.fleet.replicas.values()
            if replica.model_id == model_id and replica.state in ("ready", "draining")
        ]

    def known(self, model_id: str) -> list[ReplicaInfo]:
        """What is known of the model's replicas, awake or asleep."""
        replicas = self._core.fleet.replicas.values()
        return [r.info for r in replicas if r.model_id == model_id and r.info is not None]

    async def attach(self) -> list[Replica]:
        """Take over what an earlier Router has left, before anything new is placed. Returns the
        replicas that have other settings than today's and are awake."""
        outdated: list[Replica] = []
        attached = self._core.fleet.attach()
        for replica in attached:
            llm = self._core.llms.get(replica.model_id)
            if llm is None:
                self._core.fleet.kill(replica.replica_id)
                continue
            outdates = replica.info is not None and replica.info.config_hash != config_hash(llm)
            if replica.state in ASLEEP and outdates:
                self._core.fleet.kill(replica.replica_id)
            elif replica.state in ASLEEP:
                self._core.handle(GpuAsleep(replica.replica_id, replica.model_id))
                self._follow_on(replica)
            else:
                self.join(replica)
                if outdates:
                    outdated.append(replica)
        await self.poll_all()
        for replica in attached:
            self._leave_node(replica)
        return outdated

    def drain(self, replica: Replica, *, urgent: bool = True) -> None:
        """Empty a replica by migration, as fast as its bytes move or, if that is not ``urgent``,
        as gently as any other move; it is released when it is empty. One that sleeps ends."""
        if replica.state in ASLEEP:
            replica.state = "draining"
            self._core.fleet.kill(replica.replica_id)
            self._core.handle(GpuLost(replica.replica_id))
            return
        replica.state = "draining"
        self._core.handle(Evacuate(replica.replica_id, urgent))

    async def poll_all(self) -> None:
        """A fresh report of every replica."""
        replicas = [r for r in self._core.fleet.replicas.values() if r.info is not None]
        await asyncio.gather(*(self.poll(replica, 0.0) for replica in replicas))

    async def look_into(self, replica_id: str) -> None:
        """Make sure that what is believed of a replica is true now."""
        replica = self._core.fleet.replicas.get(replica_id)
        if replica is not None and replica.info is not None:
            await self.poll(replica, 0.0)

    def open(self, model_id: str) -> None:
        """Ask Ray for one more replica."""
        self.start(self._core.fleet.create(model_id))

    def withdraw(self, model_id: str) -> None:
        """One of the model's replicas that start need not come: the latest, which is the furthest
        from being ready."""
        starting = [
            replica
            for replica in self._core.fleet.replicas.values()
            if replica.model_id == model_id and replica.state == "starting" and replica.info is None
        ]
        if not starting:
            return
        last = max(starting, key=lambda replica: replica.asked_s)
        last.needless = True
        logger.info("replica %s is not needed any more", last.replica_id)
        self._core.fleet.kill(last.replica_id)

    def start(self, replica: Replica) -> None:
        """Follow a replica from its request on."""
        self._core.spawn(self._start(replica))

    def reconsider(self) -> None:
        """Nodes may be used again: ask anew for the replicas that were to keep off them, as they
        may be waiting for a node that never comes."""
        for replica in list(self._core.fleet.replicas.values()):
            if replica.state == "starting" and replica.avoids - self._core.fleet.avoided:
                replica.withdrawn = True
                self._core.fleet.kill(replica.replica_id)

    async def release(self, replica_id: str) -> None:
        """End an empty replica; if something has arrived there meanwhile it stays."""
        replica = self._core.fleet.replicas.get(replica_id)
        if replica is None:
            return
        try:
            empty = await replica.actor.retire.remote(self._core.incarnation)
        except (RayActorError, RayTaskError):
            empty = True
        if empty:
            logger.info("replica %s released", replica_id)
            self._core.fleet.kill(replica_id)
        else:
            self.join(replica)
            self._leave_node(replica)

    def evict(self, request_id: str, replica_id: str) -> None:
        """Take a request off its replica; its ingress will ask for another place."""
        entry = self._core.entry(request_id)
        replica = self._core.fleet.replicas.get(replica_id)
        if entry is None or replica is None:
            return
        self._core.books[entry.model_id].move(entry, None, time.monotonic(), held=False)
        self._core.spawn(self._evict(entry, replica))

    async def _evict(self, entry: Entry, replica: Replica) -> None:
        """One that is not there has ended, and nobody would ever ask for it again; or it is on its
        way there, and its ingress asks for a place as if it were new."""
        name, incarnation = entry.request_id, self._core.incarnation
        try:
            present = await replica.actor.evict.remote(incarnation, name, entry.generation)
        except (RayActorError, RayTaskError) as error:
            logger.warning("replica %s did not take a call: %s", replica.replica_id, error)
            return
        if not present and self._core.entry(name) is entry and entry.replica_id is None:
            self._core.withdraw(name)

    async def poll(self, replica: Replica, wait_s: float) -> bool:
        """One report, entered into the books. False: do not poll this replica again."""
        try:
            async with asyncio.timeout(REPORT_TIMEOUT_S + wait_s):
                report = await replica.actor.report.remote(self._core.incarnation, wait_s)
        except (RayActorError, TimeoutError) as error:
            self._lost(replica, error)
            return False
        except RayTaskError as error:
            if isinstance(unwrap(error), FencedError):
                logger.warning("this Router was replaced; it stops polling")
            else:
                self._lost(replica, error)
            return False
        replica.report = report
        book = self._core.books[replica.model_id]
        now = time.monotonic()
        for event in book.reconcile(
            replica.replica_id, replica.model_id, report.sequences, now, report.ended
        ):
            self._core.handle(event)
        if report.step is not None:
            step = report.step
            self._core.handle(
                StepTime(replica.replica_id, step.sequences, step.resident_tokens, step.seconds)
            )
        return True

    async def _start(self, replica: Replica) -> None:
        try:
            await self._core.fleet.wait_ready(replica)
        except ServerError as error:
            if replica.needless:
                return
            if replica.withdrawn:
                self._core.handle(AcquireFailed(replica.model_id, "withdrawn"))
                return
            logger.error("%s", error)
            self.start_errors[replica.model_id] = str(error)
            self._core.handle(AcquireFailed(replica.model_id, str(error)))
            if not self.ready(replica.model_id):
                self._on_hopeless(replica.model_id, error)
            return
        self.start_errors.pop(replica.model_id, None)
        placed_s = replica.placed_s
        self.join(replica, took_s=None if placed_s is None else time.monotonic() - placed_s)
        self._leave_node(replica)

    def _leave_node(self, replica: Replica) -> None:
        """Empty the replica if the node that it is on is to be left."""
        known = self._core.fleet.replicas.get(replica.replica_id) is replica
        if known and replica.info is not None and replica.info.node_id in self._core.fleet.avoided:
            self.drain(replica)

    def join(self, replica: Replica, *, woken: bool = False, took_s: float | None = None) -> None:
        """The replica takes requests, after ``took_s`` seconds on its slot."""
        info = replica.info
        assert info is not None
        limit = self._core.llms[replica.model_id].deployment_config.max_ongoing_requests
        block_size = self._core.books[replica.model_id].block_size  # an outdated one's may differ
        self._core.handle(
            GpuReady(
                gpu=replica.replica_id,
                model=replica.model_id,
                capacity=info.capacity_blocks * info.block_size // block_size,
                node=info.node_id,
                max_requests=min(info.max_num_seqs, limit or info.max_num_seqs),
                kv_bytes_per_token=info.block_nbytes // info.block_size,
                attention_doubles_at=info.attention_doubles_at,
                woken=woken,
                took_s=took_s,
            )
        )
        self._follow_on(replica)

    def _follow_on(self, replica: Replica) -> None:
        if not replica.followed:
            replica.followed = True
            self._core.spawn(self._follow(replica))

    async def _follow(self, replica: Replica) -> None:
        while self._core.fleet.replicas.get(replica.replica_id) is replica:
            if not await self.poll(replica, self._core.settings.epoch_s):
                return
            await asyncio.sleep(REPORT_PAUSE_S)

    def _lost(self, replica: Replica, error: BaseException) -> None:
        if self._core.fleet.replicas.get(replica.replica_id) is not replica:
            return
        logger.warning("replica %s is lost: %s", replica.replica_id, type(error).__name__)
        # A replica that does not answer may still run: make sure that it does not.
        self._core.fleet.kill(replica.replica_id)
        self._core.books[replica.model_id].lose_replica(replica.replica_id, time.monotonic())
        self._core.handle(GpuLost(replica.replica_id))
