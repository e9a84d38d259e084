"""The fleet: the replica actors of one application, their birth and their end.

The Router decides how many there are and which one goes; this module knows how Ray makes it so.
Replicas are detached actors, named by their id in a namespace of the application's own, so a
restarted Router finds them again.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util import list_named_actors

from mell_ray.config import LLMConfig, MellSettings
from mell_ray.errors import ServerError
from mell_ray.serving import slots
from mell_ray.serving.replica import GPUReplica
from mell_ray.serving.replica_migration import CONTROL_GROUP
from mell_ray.serving.versions import config_hash
from mell_ray.serving.wire import (
    ReplicaInfo,
    ReplicaReport,
    ReplicaSpec,
    ReplicaState,
    Slot,
)

logger = logging.getLogger(__name__)

ASLEEP = ("asleep", "lent")
INGRESS_TIMEOUT_S = 10.0
CONTROL_CONCURRENCY = 128
DATA_CONCURRENCY = 10_000


def actor_class(replica: type[GPUReplica]) -> Any:
    """The class as Ray runs it."""
    return ray.remote(concurrency_groups={CONTROL_GROUP: CONTROL_CONCURRENCY})(replica)


def replica_namespace(settings: MellSettings, app_name: str) -> str:
    """The Ray namespace of an application's replicas."""
    return f"{settings.namespace}.{app_name}"


@dataclass(slots=True)
class Replica:
    """One replica as the Router knows it. ``info`` is there once it is ready."""

    replica_id: str
    model_id: str
    actor: Any  # None: it waits for its slot
    state: ReplicaState = "starting"
    info: ReplicaInfo | None = None
    report: ReplicaReport | None = None
    holder: Any = None  # holds its slot apart from it, if it may sleep; None: it does so itself
    slot: Slot | None = None  # once Ray has given it one
    asked_s: float = field(default_factory=time.monotonic)  # when it was asked for, or to wake
    placed_s: float | None = None  # when it got its slot
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)  # falls asleep, or wakes
    followed: bool = False  # its reports are being asked for
    avoids: frozenset[str] = frozenset()  # nodes that it was not to be started on
    outdated: bool = False  # of other settings than today's
    withdrawn: bool = False  # killed while it started, as it was no longer wanted like this
    needless: bool = False  # killed while it started, as none is wanted any more


class Fleet:
    """Creates, wakes, re-attaches and kills replica actors. Holds no policy."""

    replica_class: Any = actor_class(GPUReplica)  # benchmarks put theirs in its place

    def __init__(self, llms: dict[str, LLMConfig], settings: MellSettings, namespace: str) -> None:
        self._llms = llms
        self._settings = settings
        self.namespace = namespace
        self.replicas: dict[str, Replica] = {}
        self.avoided: frozenset[str] = frozenset()  # ids of nodes that get no new replica

    def create(self, model_id: str) -> Replica:
        """Ask Ray for one more replica; it is pending until a node has room for it."""
        llm = self._llms[model_id]
        replica_id = self._new_id(model_id)
        device, resources = self._resources(llm)
        replica = Replica(replica_id, model_id, None, avoids=self.avoided)
        self.replicas[replica_id] = replica
        if resources and self._settings.fleet.sleep:
            replica.holder = slots.ask(resources, None, self._elsewhere())
        else:
            replica.actor = self._launch(replica, resources | self._elsewhere())
        logger.info("replica %s requested on %s", replica_id, device)
        return replica

    def _new_id(self, model_id: str) -> str:
        slug = re.sub(r"[^a-z0-9]+", "-", model_id.split("/")[-1].lower()).strip("-") or "model"
        while (replica_id := f"{slug}-{secrets.token_hex(2)}") in self.replicas:
            pass
        return replica_id

    def _launch(self, replica: Replica, where: dict[str, Any]) -> Any:
        """Its actor, with options that say where it runs."""
        llm = self._llms[replica.model_id]
        device, _ = self._resources(llm)
        spec = ReplicaSpec(
            replica_id=replica.replica_id,
            namespace=self.namespace,
            device=device,
            llm=llm,
            migration=self._settings.migration,
            lease_s=self._settings.fleet.replica_lease_s,
            ingress_timeout_s=INGRESS_TIMEOUT_S,
            config_hash=config_hash(llm),
            share_weights=self._shares_weights(device),
            slot=replica.slot,
            log_level=self._settings.log_level,
            tracing=self._settings.observability.tracing,
        )
        env = {"OMP_NUM_THREADS": str(llm.engine_kwargs.num_threads), **where.pop("env", {})}
        return self.replica_class.options(
            name=replica.replica_id,
            namespace=self.namespace,
            lifetime="detached",
            max_restarts=0,
            max_task_retries=0,
            enable_task_events=False,  # of each call, which the cluster's GCS would keep
            num_cpus=0,
            max_concurrency=DATA_CONCURRENCY,
            runtime_env={"env_vars": env},
            **where,
        ).remote(spec)

    async def wait_ready(self, replica: Replica) -> ReplicaInfo:
        """Wait until the replica answers.

        Raises:
            ServerError: it did not come up; the message says why. It has been killed.
        """
        try:
            async with asyncio.timeout(self._settings.fleet.startup_timeout_s):
                if replica.holder is not None:
                    self.settle(replica, await replica.holder.place.remote())
                info = await replica.actor.info.remote()
        except (RayActorError, RayTaskError, TimeoutError) as error:
            self.kill(replica.replica_id)
            raise ServerError(f"replica {replica.replica_id} did not start: {error}") from None
        replica.info = info
        replica.state = "ready"
        return info

    def settle(self, replica: Replica, slot: Slot) -> None:
        """Start a replica on the slot that its holder has."""
        replica.slot, replica.placed_s = slot, time.monotonic()
        replica.actor = self._launch(replica, slots.replica_options(slot))
        replica.holder.hold.remote(replica.actor)
        replica.holder = None

    async def find_slot(self, replica: Replica) -> Slot | None:
        """A slot for a replica that sleeps, where it is if there is one; ``replica.holder`` has
        it then. None: it needs none.

        Raises:
            ServerError: there was none in time.
        """
        if replica.info is None or not replica.info.lends:
            return None
        _, resources = self._resources(self._llms[replica.model_id])
        near = None if self.avoided else replica.info.node_id
        holder = replica.holder = slots.ask(resources, near, self._elsewhere())
        try:
            async with asyncio.timeout(self._settings.fleet.startup_timeout_s):
                slot = await holder.place.remote()
        except (RayActorError, TimeoutError) as error:
            ray.kill(holder)
            replica.holder = None
            raise ServerError(f"replica {replica.replica_id} got no slot: {error}") from None
        replica.placed_s = time.monotonic()
        return slot

    def move_in(self, model_id: str, holder: Any) -> Replica:
        """A new replica for a slot that has been found for another."""
        replica = Replica(self._new_id(model_id), model_id, None, holder=holder)
        self.replicas[replica.replica_id] = replica
        return replica

    def resource(self, model_id: str) -> str | None:
        """What a replica of the model takes one of, if anything."""
        _, resources = self._resources(self._llms[model_id])
        return slots.resource_name(resources) if resources else None

    def attach(self) -> list[Replica]:
        """Find the replicas that an earlier Router of this application has left."""
        for entry in list_named_actors(all_namespaces=True):
            name = entry["name"]
            if entry["namespace"] != self.namespace or name in self.replicas:
                continue
            try:
                actor = ray.get_actor(name, namespace=self.namespace)
                info = ray.get(actor.info.remote(), timeout=5)
            except (ValueError, RayActorError, GetTimeoutError) as error:
                logger.warning("replica %s cannot be attached: %s", name, error)
                continue
            state: ReplicaState = "asleep" if info.asleep else "ready"
            self.replicas[name] = Replica(name, info.model_id, actor, state, info)
        return list(self.replicas.values())

    def kill(self, replica_id: str) -> None:
        """End the process and forget the replica; unknown ids are fine."""
        replica = self.replicas.pop(replica_id, None)
        if replica is None:
            return
        for actor in (replica.actor, replica.holder):
            if actor is not None:
                ray.kill(actor)

    def count(self, model_id: str) -> int:
        """Replicas of a model, those that sleep not counted."""
        mine = (r for r in self.replicas.values() if r.model_id == model_id)
        return sum(replica.state not in ASLEEP for replica in mine)

    def _elsewhere(self) -> dict[str, Any]:
        if not self.avoided:
            return {}
        return {"label_selector": {"ray.io/node-id": f"!in({', '.join(sorted(self.avoided))})"}}

    def _shares_weights(self, device: str) -> bool:
        wanted = self._settings.fleet.share_weights
        return device == "cpu" or self._settings.fleet.sleep if wanted is None else wanted

    def _resources(self, llm: LLMConfig) -> tuple[str, dict[str, Any]]:
        offered = ray.cluster_resources()
        wanted = llm.accelerator_type
        if wanted not in (None, "CPU", "GPU"):
            return "cuda", {"num_gpus": 1, "accelerator_type": wanted}
        if wanted == "GPU" or (wanted is None and offered.get("GPU", 0) > 0):
            return "cuda", {"num_gpus": 1}
        fleet = self._settings.fleet
        takes_one = fleet.require_cpu_resource or offered.get(fleet.cpu_resource, 0) > 0
        return "cpu", {"resources": {fleet.cpu_resource: 1}} if takes_one else {}
