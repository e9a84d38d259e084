"""The accelerator of a replica, held apart from it, so that it can be lent while that sleeps.

Ray takes back what an actor holds only when the actor ends. So where replicas may sleep they hold
nothing, and beside each stands a small actor that holds its GPU (or its CPU slot). It ends when
the replica falls asleep or dies, however that comes about, and Ray then gives the GPU to whoever
asks for it. To wake, a replica needs a new holder on its node.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mell_ray.serving.wire import Slot

# A holder whose Router has died before it had a replica gives up after that long; to wake is
# quicker.
UNCLAIMED_S = 180.0
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


class SlotHolder:
    """See the module. Created by ``ask`` with ``ray.remote``."""

    def __init__(self) -> None:
        self._unclaimed = threading.Timer(UNCLAIMED_S, os._exit, [0])
        self._unclaimed.daemon = True
        self._unclaimed.start()

    async def place(self) -> Slot:
        """Answers once Ray has found room."""
        node_id = ray.get_runtime_context().get_node_id()
        return Slot(node_id, os.environ.get(VISIBLE_DEVICES, "") if ray.get_gpu_ids() else "")

    async def hold(self, replica: Any) -> None:
        """Stay until the replica needs the slot no more, or is dead."""
        self._unclaimed.cancel()
        try:
            await replica.keep_slot.remote()
        except RayActorError:
            pass  # it is dead, and needs nothing
        finally:
            ray.actor.exit_actor()


_HOLDER = ray.remote(SlotHolder)


def ask(resources: dict[str, Any], near: str | None, where: dict[str, Any]) -> Any:
    """A holder of ``resources``; it answers ``place`` when it has them.

    Args:
        near: id of the node on which they are wanted, if there are any; else where there are.
        where: further options for its placement, without ``near``.
    """
    if near is not None:
        strategy = NodeAffinitySchedulingStrategy(near, soft=True, _spill_on_unavailable=True)
        where = {"scheduling_strategy": strategy}
    return _HOLDER.options(
        lifetime="detached", num_cpus=0, max_restarts=0, max_task_retries=0, **resources, **where
    ).remote()


def replica_options(slot: Slot) -> dict[str, Any]:
    """Options of a replica's actor that runs on ``slot``."""
    env = {}
    if slot.devices:
        # Ray hides all GPUs from an actor that asks for none, unless told to leave them alone.
        env = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", VISIBLE_DEVICES: slot.devices}
    strategy = NodeAffinitySchedulingStrategy(slot.node_id, soft=False)
    return {"env": env, "scheduling_strategy": strategy}


def resource_name(resources: dict[str, Any]) -> str:
    """The one resource of which a holder takes one."""
    return "GPU" if "num_gpus" in resources else next(iter(resources["resources"]))


@dataclass(frozen=True, slots=True)
class Supply:
    """A resource of the cluster: what each node has left of it, and how much is taken in all."""

    free: dict[str, float]
    taken: float


def supply(resource: str) -> Supply:
    """Ask Ray; blocks for a moment."""
    nodes = available_resources_per_node()
    free = {node_id: float(left.get(resource, 0.0)) for node_id, left in nodes.items()}
    return Supply(free, float(ray.cluster_resources().get(resource, 0.0)) - sum(free.values()))
