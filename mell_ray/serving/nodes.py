"""Ray nodes that are to be left: because an operator says so, or because Ray is draining them.

Ray drains a node when its process is told to stop (a pod that is deleted, a machine that goes down
for maintenance), when a provider takes it back, or on ``ray drain-node``; it puts nothing new there
and lets what runs go on until a deadline. The replicas there are emptied by migration meanwhile. An
operator's drain does the same without stopping the node, and can be taken back.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray._private.state import state as cluster_state
from ray.experimental import internal_kv

from mell_ray.errors import ConflictError, NotFoundError
from mell_ray.serving.core import Core
from mell_ray.serving.fleet import ASLEEP, Replica
from mell_ray.serving.watch import Watch

logger = logging.getLogger(__name__)

PERIOD_S = 0.5

Cause = Literal["operator", "ray"]


@dataclass(frozen=True, slots=True)
class ClusterNodes:
    """The nodes of the cluster that are alive: id to address, and which of them Ray drains."""

    alive: dict[str, str]
    draining: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Leaving:
    by: Cause
    since: float = field(default_factory=time.time)  # wall clock


class Nodes:
    """The nodes as one Router sees them. An operator's drains outlive the Router."""

    def __init__(self, core: Core, watch: Watch) -> None:
        self._core = core
        self._watch = watch
        self._key = f"{core.fleet.namespace}/drained-nodes"
        self._cluster = ClusterNodes({})
        self._leaving: dict[str, Leaving] = {}

    async def attach(self) -> None:
        """Find out which nodes an earlier Router was to leave; before replicas are attached."""
        for node_id in await asyncio.to_thread(_load, self._key):
            self._leaving[node_id] = Leaving("operator")
        self._update(await asyncio.to_thread(look_around))

    async def follow(self) -> None:
        """Keep watching the cluster."""
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                self._update(await asyncio.to_thread(look_around))
            except Exception as error:  # the head is away; what was known stays true
                logger.warning("nodes cannot be listed: %s", error)

    async def drain(self, name: str, drained: bool) -> dict[str, Any]:
        """Leave a node, or take that back; returns at once.

        Args:
            name: its Ray id, or the address of all nodes that have it.

        Raises:
            NotFoundError: no such node is alive.
            ConflictError: Ray itself drains the node, which cannot be taken back.
        """
        if not self._find(name):
            self._update(await asyncio.to_thread(look_around))
        found = self._find(name)
        if not found:
            raise NotFoundError(f"node {name!r} is not in the cluster", param="id")
        if not drained and any(node_id in self._cluster.draining for node_id in found):
            raise ConflictError(f"node {name!r} is being drained by Ray itself")
        for node_id in found:
            if drained:
                self._leave(node_id, "operator")
            else:
                self._leaving.pop(node_id, None)
        self._publish()
        if not drained:
            self._watch.reconsider()
        kept = [name for name, leaving in self._leaving.items() if leaving.by == "operator"]
        await asyncio.to_thread(_save, self._key, kept)
        views = [view for view in self.view() if view["id"] in found]
        return {"id": name, "drained": drained, "nodes": views}

    def view(self) -> list[dict[str, Any]]:
        """Nodes with replicas, and those that are being left."""
        on = self._replicas()
        return [
            {
                "id": node_id,
                "address": self._cluster.alive.get(node_id),
                "state": self._state(node_id, on.get(node_id, [])),
                "drained_by": self._leaving[node_id].by if node_id in self._leaving else None,
                "since": self._leaving[node_id].since if node_id in self._leaving else None,
                "replicas": [replica.replica_id for replica in on.get(node_id, [])],
            }
            for node_id in dict.fromkeys([*on, *self._leaving])
        ]

    def _state(self, node_id: str, replicas: list[Replica]) -> str:
        if node_id not in self._leaving:
            return "ready"
        return "draining" if replicas else "drained"

    def _find(self, name: str) -> list[str]:
        return [n for n, address in self._cluster.alive.items() if name in (n, address)]

    def _update(self, cluster: ClusterNodes) -> None:
        self._cluster = cluster
        for node_id in cluster.draining - self._leaving.keys():
            self._leave(node_id, "ray")
        for node_id in [n for n in self._leaving if n not in cluster.alive]:
            del self._leaving[node_id]
        self._publish()

    def _leave(self, node_id: str, by: Cause) -> None:
        """Empty what is there. Replicas that are still starting there follow when they are up."""
        self._leaving.setdefault(node_id, Leaving(by))
        self._publish()
        replicas: Iterable[Replica] = self._replicas().get(node_id, [])
        for replica in replicas:
            if replica.state in ("ready", *ASLEEP):
                logger.warning("replica %s leaves node %s (%s)", replica.replica_id, node_id, by)
                self._watch.drain(replica)

    def _publish(self) -> None:
        self._core.fleet.avoided = frozenset(self._leaving)

    def _replicas(self) -> dict[str, list[Replica]]:
        on: dict[str, list[Replica]] = {}
        for replica in self._core.fleet.replicas.values():
            if replica.info is not None:
                on.setdefault(replica.info.node_id, []).append(replica)
        return on


def look_around() -> ClusterNodes:
    """Ask Ray; blocks. Which nodes drain it tells only in its private part, as Serve reads it."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    alive = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}
    return ClusterNodes(alive, frozenset(cluster_state.get_draining_nodes()) & alive.keys())


def _load(key: str) -> list[str]:
    stored = internal_kv._internal_kv_get(key)
    return json.loads(stored) if stored else []


def _save(key: str, node_ids: list[str]) -> None:
    internal_kv._internal_kv_put(key, json.dumps(node_ids), overwrite=True)
