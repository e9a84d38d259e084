"""A plan on paper: moves tried out on a copy of the index, taken over all or not at all."""

from __future__ import annotations

from bisect import bisect_left, insort

from mell_ray.scheduler.state import SLOT_BITS, Gpu, Pool, Request


class Draft:
    """Loads as they would be after the drafted moves; the books stay as they are."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.keys = pool.keys.copy()
        self._added: dict[Gpu, tuple[int, int]] = {}  # GPU: (size, requests) added so far
        self.moves: list[tuple[Request, Gpu]] = []
        self.moved = 0  # units

    def room(self, gpu: Gpu) -> int:
        """As ``Gpu.room`` with the drafted moves done."""
        if gpu not in self._added:
            return gpu.room()
        size, count = self._added[gpu]
        room = gpu.capacity - gpu.load - size
        present = len(gpu.requests) + count
        if present >= gpu.max_requests:
            room = min(room, gpu.max_requests - present)
        elif gpu.steps is not None and present:
            room = min(room, gpu.steps.room(present + 1, gpu.load + size))
        return room

    def best_fit(self, request: Request, reserve: int, but: Gpu | None = None) -> Gpu | None:
        """Least room that suffices among GPUs that have requests; neither ``but`` nor where the
        request is planned now."""
        keys, pool = self.keys, self._pool
        position = bisect_left(keys, max(request.need + reserve, 1) << SLOT_BITS)
        while position < len(keys):
            gpu = pool.at(keys[position])
            if gpu is not but and gpu is not request.plan and gpu.id not in request.exclude:
                return gpu if gpu.requests else None
            position += 1
        return None

    def move(self, request: Request, gpu: Gpu) -> None:
        """Draft the request to ``gpu``."""
        self.moves.append((request, gpu))
        self.moved += request.need
        assert request.plan is not None
        self._change(request.plan, -request.need, -1)
        self._change(gpu, request.need, 1)

    def drop(self, gpu: Gpu) -> None:
        """``gpu`` takes nothing more in this draft."""
        key = self.room(gpu) << SLOT_BITS | gpu.slot
        position = bisect_left(self.keys, key)
        if position < len(self.keys) and self.keys[position] == key:
            del self.keys[position]

    def _change(self, gpu: Gpu, size: int, count: int) -> None:
        key = self.room(gpu) << SLOT_BITS | gpu.slot
        position = bisect_left(self.keys, key)
        indexed = position < len(self.keys) and self.keys[position] == key
        before = self._added.get(gpu, (0, 0))
        self._added[gpu] = (before[0] + size, before[1] + count)
        if indexed:
            del self.keys[position]
            insort(self.keys, self.room(gpu) << SLOT_BITS | gpu.slot)

    def commit(self, reason: str) -> None:
        """Plan the drafted moves, in their order."""
        for request, gpu in self.moves:
            self._pool.assign(request, gpu, reason)
