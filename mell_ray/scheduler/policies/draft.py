"""A plan on paper: moves tried out on a copy of the index, taken over all or not at all."""

from __future__ import annotations

from bisect import bisect_left, insort

from mell_ray.scheduler.state import SLOT_BITS, Gpu, Pool, Request

_SLOT_MASK = (1 << SLOT_BITS) - 1


class Draft:
    """Loads as they would be after the drafted moves; the books stay as they are."""

    def __init__(self, pool: Pool, leaving: Gpu | None = None) -> None:
        """``leaving`` takes nothing in this draft."""
        self._pool = pool
        self._leaving = leaving
        self.keys = pool.keys.copy()
        self._added: dict[Gpu, tuple[int, int]] = {}  # GPU: (size, requests) added so far
        self.moves: dict[Request, Gpu] = {}
        self.moved = 0  # units
        if leaving is not None and leaving.state == "ready":
            del self.keys[bisect_left(self.keys, leaving.key)]

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

    def emptiest(self, count: int) -> list[tuple[int, Gpu]]:
        """(room, GPU) of up to ``count`` used GPUs, most room first."""
        slots = self._pool.slots
        found: list[tuple[int, Gpu]] = []
        for key in reversed(self.keys):
            gpu = slots[key & _SLOT_MASK]
            if gpu is not None and gpu.requests:
                found.append((key >> SLOT_BITS, gpu))
                if len(found) == count:
                    break
        return found

    def best_fit(self, request: Request, reserve: int) -> Gpu | None:
        """Least room that suffices among used GPUs; not where the request is planned now."""
        keys, slots = self.keys, self._pool.slots
        position = bisect_left(keys, max(request.need + reserve, 1) << SLOT_BITS)
        while position < len(keys):
            gpu = slots[keys[position] & _SLOT_MASK]
            assert gpu is not None
            if gpu is not request.plan and gpu.id not in request.exclude:
                return gpu if gpu.requests else None
            position += 1
        return None

    def move(self, request: Request, gpu: Gpu) -> None:
        """Draft the request to ``gpu``."""
        self.moves[request] = gpu
        self.moved += request.need
        if request.plan is not None and request.plan is not self._leaving:
            self._change(request.plan, -request.need, -1)
        self._change(gpu, request.need, 1)

    def _change(self, gpu: Gpu, size: int, count: int) -> None:
        before = self._added.get(gpu)
        if gpu.state == "ready":
            key = gpu.key if before is None else self.room(gpu) << SLOT_BITS | gpu.slot
            del self.keys[bisect_left(self.keys, key)]
        held = before or (0, 0)
        self._added[gpu] = (held[0] + size, held[1] + count)
        if gpu.state == "ready":
            insort(self.keys, self.room(gpu) << SLOT_BITS | gpu.slot)

    def hold(self, gpu: Gpu, size: int) -> None:
        """Count ``size`` more on the GPU for a request that the draft does not move itself;
        negative: no more."""
        self._change(gpu, size, 1 if size > 0 else -1)

    def copy(self) -> Draft:
        other = Draft.__new__(Draft)
        other._pool = self._pool
        other._leaving = self._leaving
        other.keys = self.keys.copy()
        other._added = self._added.copy()
        other.moves = self.moves.copy()
        other.moved = self.moved
        return other

    def commit(self, reason: str) -> None:
        """Plan the drafted moves, in their order."""
        for request, gpu in self.moves.items():
            self._pool.assign(request, gpu, reason)
