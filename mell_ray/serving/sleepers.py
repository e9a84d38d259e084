"""Replicas that sleep: how they come to, how they wake, and who has their slots meanwhile."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter

from ray.exceptions import RayActorError, RayTaskError

from mell_ray.errors import ServerError
from mell_ray.scheduler.events import AcquireFailed, Contended, GpuAsleep, GpuLost
from mell_ray.serving.core import Core
from mell_ray.serving.fleet import ASLEEP, Replica
from mell_ray.serving.slots import Supply, supply
from mell_ray.serving.watch import Watch
from mell_ray.serving.wire import Slot

logger = logging.getLogger(__name__)

PERIOD_S = 0.1
LOOK_S = 0.5  # how often Ray is asked for what is free, unless a replica waits for it
PATIENCE_S = 0.1  # a slot that is free is granted sooner
STARTING_S = 1.0  # a holder that has been granted one answers sooner


class Sleepers:
    """Of one Router. The scheduler decides who sleeps and who wakes."""

    def __init__(self, core: Core, watch: Watch) -> None:
        self._core = core
        self._watch = watch
        self._told: dict[str, int] = {}
        self._looked = 0.0

    async def put_to_sleep(self, replica_id: str) -> None:
        """The replica is superfluous. One that cannot sleep ends; one on which something has
        arrived meanwhile goes on."""
        replica = self._core.fleet.replicas.get(replica_id)
        if replica is None:
            self._core.handle(GpuLost(replica_id))
            return
        async with replica.changing:
            try:
                outcome = await replica.actor.sleep.remote(self._core.incarnation)
            except (RayActorError, RayTaskError) as error:
                logger.warning("replica %s does not fall asleep: %s", replica_id, error)
                outcome = "unable"
            if outcome == "asleep":
                replica.state = "asleep"
                logger.info("replica %s sleeps", replica_id)
            elif outcome == "busy":
                self._watch.join(replica)
            else:
                await self._end(replica)

    async def _end(self, replica: Replica) -> None:
        self._core.handle(GpuLost(replica.replica_id))
        await self._watch.release(replica.replica_id)

    async def wake(self, replica_id: str, model_id: str) -> None:
        """Bring the replica back. Where another has its slot but there is room elsewhere, a new
        one is started there; one that cannot wake is replaced, too."""
        replica = self._core.fleet.replicas.get(replica_id)
        if replica is None:
            self._watch.open(model_id)
            return
        async with replica.changing:
            if replica.state not in ASLEEP:
                return  # it did not fall asleep in the end, and is there
            before, replica.state = replica.state, "starting"
            replica.asked_s, replica.placed_s = time.monotonic(), None
            try:
                slot = await self._core.fleet.find_slot(replica)
                if slot is not None and not _is_home(replica, slot):
                    replica.state = before
                    self._move_on(replica)
                    return
                await self._get_up(replica)
            except (ServerError, RayActorError, RayTaskError) as error:
                logger.error("replica %s does not wake: %s", replica_id, error)
                self._core.fleet.kill(replica_id)
                self._core.handle(AcquireFailed(replica.model_id, str(error)))

    async def _get_up(self, replica: Replica) -> None:
        began = replica.placed_s or replica.asked_s
        await replica.actor.wake.remote(self._core.incarnation)
        # Not sooner: what holds for one that sleeps lets go at once.
        holder, replica.holder = replica.holder, None
        if holder is not None:
            holder.hold.remote(replica.actor)
        if self._core.fleet.replicas.get(replica.replica_id) is not replica:
            return  # ended meanwhile
        replica.state = "ready"
        took_s = time.monotonic() - began
        logger.info("replica %s woke in %.3f s", replica.replica_id, took_s)
        self._watch.join(replica, woken=True, took_s=took_s)

    def _move_on(self, sleeper: Replica) -> None:
        """There is room, but not where the sleeper is."""
        holder, sleeper.holder = sleeper.holder, None
        self._core.handle(GpuAsleep(sleeper.replica_id, sleeper.model_id))
        self._watch.start(self._core.fleet.move_in(sleeper.model_id, holder))
        logger.info("replica %s sleeps on: its slot is lent", sleeper.replica_id)

    # --- who waits, and who has what is lent -----------------------------------------------

    async def follow(self) -> None:
        """Keep telling the scheduler who waits for a slot, and mark slots that are lent."""
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                await self._look()
            except Exception as error:  # the head is away; what was known stays true
                logger.warning("free slots cannot be listed: %s", error)

    async def _look(self) -> None:
        now = time.monotonic()
        replicas = self._core.fleet.replicas.values()
        waiting = [
            r
            for r in replicas
            if r.holder is not None and r.placed_s is None and now - r.asked_s > PATIENCE_S
        ]
        asleep = [r for r in replicas if r.state in ASLEEP]
        if waiting or (asleep and now - self._looked > LOOK_S):
            self._looked = now
            await self._compare(waiting)
        elif not waiting:
            self._tell({})

    async def _compare(self, waiting: list[Replica]) -> None:
        fleet = self._core.fleet
        resources = {name: fleet.resource(name) for name in self._core.llms}
        found = {
            resource: await asyncio.to_thread(supply, resource)
            for resource in set(resources.values())
            if resource is not None
        }
        counts: Counter[str] = Counter()
        for replica in waiting:
            resource = resources[replica.model_id]
            if resource is not None and replica.holder is not None:
                counts[replica.model_id] += self._in_vain(replica, resource, found[resource])
        self._tell(dict(+counts))
        left = {resource: dict(each.free) for resource, each in found.items()}
        for replica in list(fleet.replicas.values()):
            resource = resources.get(replica.model_id)
            if replica.state not in ASLEEP or replica.info is None or resource is None:
                continue
            nodes = left[resource]
            nodes[replica.info.node_id] = nodes.get(replica.info.node_id, 0.0) - 1.0
            lent = replica.info.lends and nodes[replica.info.node_id] < 0.0
            replica.state = "lent" if lent else "asleep"

    def _in_vain(self, replica: Replica, resource: str, found: Supply) -> bool:
        """Whether all slots are taken, and not only by the one that is just coming to it."""
        if max(found.free.values(), default=0.0) >= 1.0:
            return False
        fleet = self._core.fleet
        known = sum(
            _has_slot(other) and fleet.resource(other.model_id) == resource
            for other in fleet.replicas.values()
        )
        return found.taken <= known or time.monotonic() - replica.asked_s > STARTING_S

    def _tell(self, waiting: dict[str, int]) -> None:
        if waiting != self._told:
            self._told = waiting
            self._core.handle(Contended(waiting))


def _has_slot(replica: Replica) -> bool:
    if replica.state == "starting":
        return replica.placed_s is not None
    return replica.state not in ASLEEP


def _is_home(replica: Replica, slot: Slot) -> bool:
    """Whether the slot is of the node, and the GPU, on which the replica sleeps."""
    info = replica.info
    return info is not None and (slot.node_id, slot.devices) == (info.node_id, info.devices)
