"""MELL, as the paper describes it (Qianli Liu et al., INFOCOM 2025), reconstructed from its scheme.

Requests are classed by their share of a GPU: large (1/2, 1], medium (1/3, 1/2], small (1/4, 1/3],
tiny up to 1/4. Tiny ones travel in multi-items of up to 1/4 of a GPU, a bundle that counts as one
move. A GPU has the class of its biggest request. Arrivals go where they fit best. Once per epoch
the operations since the last one (arrivals, departures, class changes) are answered together: GPUs
of the higher classes are filled up from the GPUs of the lowest class, so that at most a few GPUs of
each class are not full. Only the net effect is carried out, so opposite moves of an epoch cancel.

Guarantees: at most ``moves_per_operation`` moves per operation, a bundle counting as one. The
paper's ratio of 4/3 with O(1) migrations (after Gambosi, Postiglione and Talamo, SICOMP 2000) rests
on that counting: a bundle may hold any number of requests. Counted in single requests no algorithm
is better than 1.387 with O(1) of them (Balogh et al.). No ratio is claimed for this reconstruction.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from mell_ray.scheduler.policies.base import Context, Policy
from mell_ray.scheduler.state import Gpu, Request

_need = attrgetter("need")
LARGE, MEDIUM, SMALL, TINY = range(4)


@dataclass(frozen=True)
class MellParams:
    moves_per_operation: int = 7

    def __post_init__(self) -> None:
        if self.moves_per_operation < 0:
            raise ValueError(
                f"moves_per_operation must be at least 0, not {self.moves_per_operation}"
            )


def size_class(size: int, capacity: int) -> int:
    """LARGE, MEDIUM, SMALL or TINY by the share of the capacity."""
    if 2 * size > capacity:
        return LARGE
    if 3 * size > capacity:
        return MEDIUM
    return SMALL if 4 * size > capacity else TINY


class Mell(Policy):
    name = "mell"
    Params = MellParams
    params: MellParams
    eager = True

    def __init__(self, context: Context, params: Mapping[str, Any]) -> None:
        super().__init__(context, params)
        self._classes: dict[Request, int] = {}  # at the last epoch
        self.operations = 0  # in all
        self.moves = 0  # in all, a bundle counting as one

    def place(self, request: Request) -> Gpu | None:
        return self.pool.best_fit(request)

    def tick(self, elapsed_s: float) -> None:
        del elapsed_s
        operations = self._count_operations()
        self.operations += operations
        if not self.context.may_move:
            return
        budget = self.params.moves_per_operation * operations
        order = sorted(self.pool.used(), key=self._rank)
        head, tail = 0, len(order) - 1
        while head < tail and budget > 0:
            group = self._group(order[tail], order[head].room(), order[tail].capacity)
            if not group:
                head += 1
                continue
            for request in group:
                self.pool.assign(request, order[head], "consolidate")
            budget -= 1
            self.moves += 1
            if not order[tail].requests:
                tail -= 1

    def _count_operations(self) -> int:
        """Arrivals, departures and changes of class since the last epoch."""
        before, now = self._classes, {}
        operations = 0
        for gpu in self.pool.used():
            for request in gpu.requests:
                kind = now[request] = size_class(request.need, gpu.capacity)
                operations += before.pop(request, None) != kind
        self._classes = now
        return operations + len(before)

    @staticmethod
    def _rank(gpu: Gpu) -> tuple[int, int, int]:
        """GPUs of the largest requests first, in a class the fullest first."""
        biggest = max(r.need for r in gpu.requests)
        return size_class(biggest, gpu.capacity), -gpu.load, gpu.slot

    @staticmethod
    def _group(donor: Gpu, room: int, capacity: int) -> list[Request]:
        """One item of the donor that fits into ``room``: its largest single request, or a bundle
        of tiny ones, largest first."""
        movable = donor.movable()
        last = bisect_right(movable, room, key=_need) - 1
        if last < 0:
            return []
        if size_class(movable[last].need, capacity) != TINY:
            return [movable[last]]
        group: list[Request] = []
        left = min(room, capacity // 4)
        while last >= 0:
            if movable[last].need <= left:
                group.append(movable[last])
                left -= movable[last].need
            last -= 1
        return group
