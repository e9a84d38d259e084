"""An object in Ray's store as memory that processes of its node share.

All processes of a node map the store, and what they have open stays where it is: Ray neither frees
nor spills it. Ray itself hands objects out as read-only arrays, because it takes them for
immutable; nobody but the two ends of a migration ever sees the ones made here.
"""

from __future__ import annotations

import asyncio
import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError

# More of its node's store is not taken for one area.
LARGEST_SHARE = 0.2
MAPS = Path("/proc/self/maps")


@dataclass(frozen=True, slots=True)
class ObjectTicket:
    node_id: str
    ref: list[ray.ObjectRef]  # in a list, or Ray would send what it stands for


class OpenedObject:
    """A writable view, which keeps the object."""

    def __init__(self, view: np.ndarray) -> None:
        self._view = view
        address = view.__array_interface__["data"][0]
        self.data = np.ctypeslib.as_array((ctypes.c_uint8 * view.size).from_address(address))


class RayMemory:
    """``Memory`` of a process that is a worker of a Ray cluster."""

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id

    @classmethod
    def here(cls) -> RayMemory:
        """Of the node that this process runs on."""
        return cls(ray.get_runtime_context().get_node_id())

    async def create(self, nbytes: int) -> tuple[ObjectTicket, np.ndarray] | None:
        if nbytes > LARGEST_SHARE * await asyncio.to_thread(self._store_bytes):
            return None
        try:
            ref = await asyncio.to_thread(ray.put, np.zeros(nbytes, np.uint8))
        except (ObjectStoreFullError, OutOfDiskError):
            return None
        return ObjectTicket(self._node_id, [ref]), await ref

    async def open(self, ticket: ObjectTicket) -> OpenedObject | None:
        if ticket.node_id != self._node_id:
            return None
        view = await ticket.ref[0]
        return OpenedObject(view) if _writable(view) else None

    def _store_bytes(self) -> float:
        for node in ray.nodes():
            if node["NodeID"] == self._node_id:
                return float(node["Resources"].get("object_store_memory", 0.0))
        return 0.0


def _writable(view: np.ndarray) -> bool:
    """Whether this process has mapped all of it shared and for writing."""
    start = view.__array_interface__["data"][0]
    try:
        maps = MAPS.read_text()
    except OSError:
        return False
    for line in maps.splitlines():
        span, rights, *_ = line.split(maxsplit=2)
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= start and start + view.size <= high:
            return rights.startswith("rw") and rights.endswith("s")
    return False
