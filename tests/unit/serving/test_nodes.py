"""Which nodes are left, and what becomes of the replicas there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mell_ray.errors import ConflictError, NotFoundError
from mell_ray.serving import nodes as module
from mell_ray.serving.nodes import ClusterNodes, Nodes

ALIVE = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.2"}


class Cluster:
    """Nodes a, b and c with one ready replica each; what is stored outlives a Router."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen = ClusterNodes(dict(ALIVE))
        self.stored: dict[str, list[str]] = {}
        self.reconsidered = 0
        self.replicas = {
            f"on-{node}": SimpleNamespace(
                replica_id=f"on-{node}", state="ready", info=SimpleNamespace(node_id=node)
            )
            for node in ALIVE
        }
        patch.setattr(module, "look_around", lambda: self.seen)
        patch.setattr(module, "_load", lambda key: self.stored.get(key, []))
        patch.setattr(module, "_save", self.stored.__setitem__)

    def drain(self, replica: Any) -> None:
        replica.state = "draining"

    def reconsider(self) -> None:
        self.reconsidered += 1

    async def router(self) -> tuple[Nodes, Any]:
        fleet = SimpleNamespace(replicas=self.replicas, namespace="n", avoided=frozenset())
        nodes = Nodes(SimpleNamespace(fleet=fleet), self)  # type: ignore[arg-type]
        await nodes.attach()
        return nodes, fleet

    def states(self) -> dict[str, str]:
        return {name: replica.state for name, replica in self.replicas.items()}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


async def test_a_node_that_ray_drains_is_left(cluster: Cluster) -> None:
    nodes, fleet = await cluster.router()
    cluster.seen = ClusterNodes(dict(ALIVE), frozenset({"b"}))
    nodes._update(cluster.seen)
    assert cluster.states() == {"on-a": "ready", "on-b": "draining", "on-c": "ready"}
    assert fleet.avoided == {"b"}
    views = {view["id"]: view for view in nodes.view()}
    assert (views["b"]["state"], views["b"]["drained_by"]) == ("draining", "ray")
    with pytest.raises(ConflictError, match="Ray itself"):
        await nodes.drain("b", drained=False)
    del cluster.replicas["on-b"]
    assert {v["id"]: v["state"] for v in nodes.view()}["b"] == "drained"
    nodes._update(ClusterNodes({"a": "10.0.0.1"}))
    assert "b" not in {view["id"] for view in nodes.view()}
    assert fleet.avoided == frozenset()


async def test_an_address_names_all_nodes_that_have_it(cluster: Cluster) -> None:
    nodes, _ = await cluster.router()
    told = await nodes.drain("10.0.0.2", drained=True)
    assert {view["id"] for view in told["nodes"]} == {"b", "c"}
    assert cluster.states() == {"on-a": "ready", "on-b": "draining", "on-c": "draining"}
    with pytest.raises(NotFoundError, match="not in the cluster"):
        await nodes.drain("10.0.0.9", drained=True)


async def test_a_drain_outlives_the_router_until_it_is_taken_back(cluster: Cluster) -> None:
    nodes, _ = await cluster.router()
    await nodes.drain("a", drained=True)
    nodes, fleet = await cluster.router()
    assert fleet.avoided == {"a"}
    told = await nodes.drain("a", drained=False)
    assert told["nodes"][0]["state"] == "ready"
    assert cluster.reconsidered == 1
    assert fleet.avoided == frozenset()
    _, fleet = await cluster.router()
    assert fleet.avoided == frozenset()
