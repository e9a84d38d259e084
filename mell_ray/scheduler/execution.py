"""Carries planned moves out: starts each as soon as both ends can hold it, and books its end."""

from __future__ import annotations

from mell_ray.scheduler.config import SchedulerConfig
from mell_ray.scheduler.cost import CostModel
from mell_ray.scheduler.events import Decision, Migrate, MigrationMode, Place
from mell_ray.scheduler.fairness import FairShares
from mell_ray.scheduler.prefixes import PrefixIndex
from mell_ray.scheduler.queue import WaitingLine
from mell_ray.scheduler.state import Gpu, Pool, Request


class Executor:
    """Owns the step from plan to decision for one pool.

    What it starts always fits into what is booked now, reservations included: a plan that uses
    room which another move still has to free waits for that move.
    """

    def __init__(
        self,
        pool: Pool,
        line: WaitingLine,
        config: SchedulerConfig,
        cost: CostModel,
        prefixes: PrefixIndex[Gpu],
        shares: FairShares,
    ) -> None:
        self._pool = pool
        self._line = line
        self._config = config
        self._cost = cost
        self._prefixes = prefixes
        self._shares = shares
        self.in_flight: dict[Request, None] = {}

    def flush(self, out: list[Decision]) -> None:
        """Start every planned place and move that fits now.

        Those to one GPU start in the order in which they were planned, or beside the room that the
        earlier ones will take. As each was planned into room that the ones before it leave, the
        earliest of all can always start: plans never wait for each other in a circle.
        """
        pool = self._pool
        while pool.retry:
            gpu = next(iter(pool.retry))
            del pool.retry[gpu]
            owed = 0
            for request in list(gpu.inbound):
                if not self._start(request, gpu, owed, out):
                    owed += request.need

    def place(self, request: Request, gpu: Gpu, out: list[Decision]) -> None:
        """Plan a waiting request to be on ``gpu``, and start it there if it fits now and nobody
        is ahead of it."""
        if gpu.inbound or not self.fits(request, gpu):
            self._pool.assign(request, gpu, "place")
            return
        self._place(request, gpu, out)
        self._pool.assign(request, gpu, "place")

    def _start(self, request: Request, gpu: Gpu, owed: int, out: list[Decision]) -> bool:
        if not self.fits(request, gpu, owed):
            return False
        if request.gpu is None:
            del gpu.inbound[request]
            gpu.touch()
            self._place(request, gpu, out)
        elif request.gpu.urgent or len(self.in_flight) < self._config.max_migrations_in_flight:
            self._depart(request, gpu, out)
        else:
            self._pool.capped[gpu] = None
            return False
        return True

    @staticmethod
    def fits(request: Request, gpu: Gpu, owed: int = 0) -> bool:
        """Whether ``gpu`` can book the request now, beside ``owed`` for others."""
        booked = len(gpu.residents) + len(gpu.reserved)
        return gpu.held + owed + request.need <= gpu.capacity and booked < gpu.max_requests

    def _place(self, request: Request, gpu: Gpu, out: list[Decision]) -> None:
        request.gpu = gpu
        request.served = True
        if request.tag:
            self._shares.placed(request.tag)
        gpu.residents[request] = None
        gpu.held += request.need
        self._line.remove(request)
        if request.prefix:
            self._prefixes.record(gpu, request.prefix, gpu.capacity)
        out.append(Place(request.id, gpu.id))

    def _depart(self, request: Request, gpu: Gpu, out: list[Decision]) -> None:
        src = request.gpu
        assert src is not None
        del gpu.inbound[request]
        gpu.reserved[request] = None
        gpu.held += request.need
        gpu.touch()
        request.dst = gpu
        self.in_flight[request] = None
        mode = self._mode(request, src)
        out.append(Migrate(request.id, src.id, gpu.id, mode, request.reason, src.urgent))

    def _mode(self, request: Request, src: Gpu) -> MigrationMode:
        assert request.dst is not None
        if request.wanted_mode is not None:
            return request.wanted_mode  # type: ignore[return-value]
        cached = self._prefixes.match(request.dst, request.prefix) if request.prefix else 0
        return self._cost.choose(src, request.dst, request.size, cached).mode

    def arrived(self, request: Request) -> None:
        """The migration in flight has ended well: the request runs at its destination."""
        src, dst = request.gpu, request.dst
        assert src is not None
        assert dst is not None
        self._leave(request, src)
        self._unreserve(request, dst)
        request.gpu = dst
        request.wanted_mode = None
        dst.residents[request] = None
        dst.held += request.need
        if request.prefix:
            self._prefixes.record(dst, request.prefix, dst.capacity)

    def aborted(self, request: Request) -> None:
        """The migration in flight has failed: the request stays where it runs."""
        dst, gpu = request.dst, request.gpu
        assert dst is not None
        assert gpu is not None
        self._unreserve(request, dst)
        request.wanted_mode = None
        self._pool.assign(request, gpu)

    def evict(self, request: Request) -> None:
        """Take the request off wherever it runs, goes or is planned; all its bookings end."""
        if request.dst is not None:
            self._unreserve(request, request.dst)
        if request.gpu is not None:
            self._leave(request, request.gpu)
            request.gpu = None
        self._pool.unassign(request)

    def _leave(self, request: Request, gpu: Gpu) -> None:
        del gpu.residents[request]
        gpu.held -= request.need
        gpu.touch()
        self._room_at(gpu)

    def _unreserve(self, request: Request, gpu: Gpu) -> None:
        del gpu.reserved[request]
        gpu.held -= request.need
        gpu.touch()
        request.dst = None
        del self.in_flight[request]
        self._room_at(gpu)
        self._pool.retry.update(self._pool.capped)
        self._pool.capped.clear()

    def _room_at(self, gpu: Gpu) -> None:
        self._pool.freed = True
        if gpu.inbound:
            self._pool.retry[gpu] = None
        elif not gpu.held:
            self._pool.emptied[gpu] = None
