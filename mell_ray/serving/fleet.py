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
from dataclasses import dataclass
from typing import Any, ClassVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util import list_named_actors

from mell_ray.config import LLMConfig, MellSettings
from mell_ray.errors import ServerError
from mell_ray.serving.replica import CONTROL_GROUP, GPUReplica
from mell_ray.serving.versions import config_hash
from mell_ray.serving.wire import ReplicaInfo, ReplicaReport, ReplicaSpec, ReplicaState

logger = logging.getLogger(__name__)

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
    actor: Any
    state: ReplicaState = "starting"
    info: ReplicaInfo | None = None
    report: ReplicaReport | None = None
    avoids: frozenset[str] = frozenset()  # nodes that it was not to be started on
    outdated: bool = False  # of other settings than today's
    withdrawn: bool = False  # killed while it started, as it was no longer wanted like this


class Fleet:
    """Creates, re-attaches and kills replica actors. Holds no policy."""

    replica_class: ClassVar[Any] = actor_class(GPUReplica)  # benchmarks put theirs in its place

    def __init__(self, llms: dict[str, LLMConfig], settings: MellSettings, namespace: str) -> None:
        self._llms = llms
        self._settings = settings
        self.namespace = namespace
        self.replicas: dict[str, Replica] = {}
        self.avoided: frozenset[str] = frozenset()  # ids of nodes that get no new replica

    def create(self, model_id: str) -> Replica:
        """Ask Ray for one more replica; it is pending until a node has room for it."""
        llm = self._llms[model_id]
        slug = re.sub(r"[^a-z0-9]+", "-", model_id.split("/")[-1].lower()).strip("-") or "model"
        replica_id = f"{slug}-{secrets.token_hex(2)}"
        while replica_id in self.replicas:
            replica_id = f"{slug}-{secrets.token_hex(2)}"
        device, resources = self._resources(llm)
        spec = ReplicaSpec(
            replica_id=replica_id,
            namespace=self.namespace,
            device=device,
            llm=llm,
            migration=self._settings.migration,
            lease_s=self._settings.fleet.replica_lease_s,
            ingress_timeout_s=INGRESS_TIMEOUT_S,
            config_hash=config_hash(llm),
            share_weights=self._shares_weights(device),
            log_level=self._settings.log_level,
            tracing=self._settings.observability.tracing,
        )
        threads = str(llm.engine_kwargs.num_threads)
        actor = self.replica_class.options(
            name=replica_id,
            namespace=self.namespace,
            lifetime="detached",
            max_restarts=0,
            max_task_retries=0,
            num_cpus=0,
            max_concurrency=DATA_CONCURRENCY,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}},
            **resources,
            **self._elsewhere(),
        ).remote(spec)
        replica = Replica(replica_id, model_id, actor, avoids=self.avoided)
        self.replicas[replica_id] = replica
        logger.info("replica %s requested on %s", replica_id, device)
        return replica

    async def wait_ready(self, replica: Replica) -> ReplicaInfo:
        """Wait until the replica answers.

        Raises:
            ServerError: it did not come up; the message says why. It has been killed.
        """
        try:
            async with asyncio.timeout(self._settings.fleet.startup_timeout_s):
                info = await replica.actor.info.remote()
        except (RayActorError, RayTaskError, TimeoutError) as error:
            self.kill(replica.replica_id)
            raise ServerError(f"replica {replica.replica_id} did not start: {error}") from None
        replica.info = info
        replica.state = "ready"
        return info

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
            self.replicas[name] = Replica(name, info.model_id, actor, "ready", info)
        return list(self.replicas.values())

    def kill(self, replica_id: str) -> None:
        """End the process and forget the replica; unknown ids are fine."""
        replica = self.replicas.pop(replica_id, None)
        if replica is not None:
            ray.kill(replica.actor)

    def count(self, model_id: str) -> int:
        return sum(replica.model_id == model_id for replica in self.replicas.values())

    def _elsewhere(self) -> dict[str, Any]:
        if not self.avoided:
            return {}
        return {"label_selector": {"ray.io/node-id": f"!in({', '.join(sorted(self.avoided))})"}}

    def _shares_weights(self, device: str) -> bool:
        wanted = self._settings.fleet.share_weights
        return device == "cpu" if wanted is None else wanted

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
