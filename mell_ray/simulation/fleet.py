"""The simulated machines: GPUs on nodes, and how many of them are paid for."""

from __future__ import annotations

import heapq

from mell_ray.simulation.types import SimOptions


class SimFleet:
    """Names GPUs, puts them on nodes, counts what runs on each."""

    def __init__(self, options: SimOptions) -> None:
        self._per_node = options.gpus_per_node
        self._made = 0
        self._nodes_made = 0
        self._vacancies: list[int] = []  # node numbers with a free place, lowest first
        self._node_of: dict[str, int] = {}  # of GPUs open or starting
        self._on_node: dict[int, int] = {}
        self._requests: dict[str, int] = {}  # of open GPUs
        self._used = 0

    def acquire(self) -> tuple[str, str]:
        """(GPU, node) that begins to start. A node that is paid for anyway comes first."""
        gpu = f"gpu-{self._made}"
        self._made += 1
        if self._per_node == 1:
            return gpu, self._put(gpu, self._made)
        while self._vacancies:
            node = heapq.heappop(self._vacancies)
            if node in self._on_node:
                return gpu, self._put(gpu, node)
        self._nodes_made += 1
        for _ in range(self._per_node - 1):
            heapq.heappush(self._vacancies, self._nodes_made)
        return gpu, self._put(gpu, self._nodes_made)

    def _put(self, gpu: str, node: int) -> str:
        self._node_of[gpu] = node
        self._on_node[node] = self._on_node.get(node, 0) + 1
        return f"node-{node}" if self._per_node > 1 else ""

    def opened(self, gpu: str) -> None:
        self._requests[gpu] = 0

    def release(self, gpu: str) -> None:
        del self._requests[gpu]
        self.withdraw(gpu)

    def withdraw(self, gpu: str) -> None:
        """A GPU that is not open, or not any more, is paid for no longer."""
        node = self._node_of.pop(gpu)
        self._on_node[node] -= 1
        if not self._on_node[node]:
            del self._on_node[node]
        elif self._per_node > 1:
            heapq.heappush(self._vacancies, node)

    def enter(self, gpu: str) -> None:
        self._used += not self._requests[gpu]
        self._requests[gpu] += 1

    def leave(self, gpu: str) -> None:
        self._requests[gpu] -= 1
        self._used -= not self._requests[gpu]

    def used(self) -> int:
        """GPUs on which requests run."""
        return self._used

    def billed(self) -> int:
        """GPUs open or starting; a node is paid for whole."""
        return len(self._on_node) * self._per_node

    def open_gpus(self) -> list[str]:
        return list(self._requests)
