"""A new configuration reaches the replicas one by one: one replica more than before, never twice
as many.

For each replica of the old settings a new one is opened, and once that takes requests the old one
is emptied by migration and released. Where the new settings do not start, the old replicas serve
on. Where there is no room for one more, the old one goes first. Requests are not moved between
different weights: an answer ends with the model that began it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time

from mell_ray.scheduler.events import Cordon, Outdate, Tick
from mell_ray.serving.core import Core
from mell_ray.serving.fleet import ASLEEP, Replica
from mell_ray.serving.versions import weights_hash
from mell_ray.serving.watch import Watch

logger = logging.getLogger(__name__)

POLL_S = 0.05
# A replica that has not come by then, though nothing is wrong with it, waits for what an old one
# holds.
PATIENCE_S = 60.0


class Upgrade:
    """Replaces the outdated replicas of one Router's fleet."""

    def __init__(self, core: Core, watch: Watch) -> None:
        self._core = core
        self._watch = watch

    def begin(self, outdated: list[Replica]) -> None:
        """Start replacing them in the background, each model by itself."""
        for replica in outdated:
            replica.outdated = True
            self._core.handle(Outdate(replica.replica_id))
        for model_id in dict.fromkeys(replica.model_id for replica in outdated):
            self._core.spawn(self._replace(model_id))

    async def _replace(self, model_id: str) -> None:
        while self._old(model_id):
            if not self._roomy(model_id):
                await self._open_one(model_id)
            left = [replica for replica in self._old(model_id) if replica.state == "ready"]
            if not left:
                await asyncio.sleep(POLL_S)
                continue
            for replica in left:
                if not self._keeps_weights(replica):
                    self._core.handle(Cordon(replica.replica_id))
            victim = min(left, key=_running)
            logger.warning("replica %s has old settings and is emptied", victim.replica_id)
            while not self._keeps_weights(victim) and self._there(victim) and _running(victim):
                await asyncio.sleep(POLL_S)
            if self._there(victim) and victim.state == "ready":
                self._watch.drain(victim, urgent=False)
            while self._there(victim):
                await asyncio.sleep(POLL_S)
        logger.warning("model %s: all replicas have the present settings", model_id)

    async def _open_one(self, model_id: str) -> None:
        """Until one more replica of the present settings takes requests, or waits for a place that
        only an old one can give it."""
        core, limits = self._core, self._core.limits[model_id]
        fresh = len(self._fresh(model_id))
        staying = self._staying(model_id)
        count = len(staying) + all(replica.state == "ready" for replica in staying)
        surge = dataclasses.replace(
            limits, min_gpus=max(limits.min_gpus, count), max_gpus=max(limits.max_gpus, count)
        )
        core.scheduler.set_limits(model_id, surge)
        try:
            core.handle(Tick())
            asked = time.monotonic()
            while len(self._fresh(model_id)) <= fresh and self._old(model_id):
                if model_id in self._watch.start_errors:
                    asked = time.monotonic()  # it is tried again, and the old ones serve on
                elif time.monotonic() - asked > PATIENCE_S:
                    return
                await asyncio.sleep(POLL_S)
        finally:
            core.scheduler.set_limits(model_id, core.limits[model_id])

    def _roomy(self, model_id: str) -> bool:
        """Whether an old replica can go without a new one in its place."""
        fresh = {replica.replica_id for replica in self._fresh(model_id)}
        gpus = [gpu for gpu in self._core.scheduler.gpus() if gpu.model == model_id]
        room = sum(gpu.capacity - gpu.booked for gpu in gpus if gpu.id in fresh)
        least = min((gpu.booked for gpu in gpus if gpu.id not in fresh), default=0)
        enough = len(self._staying(model_id)) > max(1, self._core.limits[model_id].min_gpus)
        return bool(fresh) and enough and room > least

    def _of(self, model_id: str) -> list[Replica]:
        return [r for r in self._core.fleet.replicas.values() if r.model_id == model_id]

    def _old(self, model_id: str) -> list[Replica]:
        return [r for r in self._of(model_id) if r.outdated]

    def _fresh(self, model_id: str) -> list[Replica]:
        return [r for r in self._of(model_id) if not r.outdated and r.state == "ready"]

    def _staying(self, model_id: str) -> list[Replica]:
        return [r for r in self._of(model_id) if r.state not in ("draining", *ASLEEP)]

    def _there(self, replica: Replica) -> bool:
        return self._core.fleet.replicas.get(replica.replica_id) is replica

    def _keeps_weights(self, replica: Replica) -> bool:
        info = replica.info
        return info is not None and info.weights == weights_hash(self._core.llms[info.model_id])


def _running(replica: Replica) -> int:
    stats = replica.report.stats if replica.report is not None else None
    return stats.running + stats.waiting if stats is not None else 0
