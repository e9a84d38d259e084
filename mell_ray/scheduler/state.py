"""The books: which request is where, which is on its way, and how full every GPU is.

Two loads are kept per GPU. ``held`` is booked now: requests that run there and reservations of
migrations in flight to it; it decides whether something may start. ``load`` is planned: requests
that will be there once every planned move is done; policies see and change only this one, so a
plan may use room that a move still has to free.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from mell_ray.scheduler.config import ModelLimits
from mell_ray.scheduler.steptime import StepTimeModel

SLOT_BITS = 20
_SLOT_MASK = (1 << SLOT_BITS) - 1
_by_need = attrgetter("need", "order")


class Request:
    """One request. ``plan`` is where it will be; without moves under way that is ``gpu``."""

    __slots__ = (
        "dst",
        "exclude",
        "gpu",
        "id",
        "limit",
        "max_size",
        "need",
        "order",
        "overtaken",
        "plan",
        "pool",
        "prefix",
        "priority",
        "reason",
        "served",
        "since",
        "size",
        "tag",
        "tenant",
        "wanted_mode",
        "weight",
    )

    def __init__(self, id: str, pool: Pool, order: int, priority: int = 0) -> None:
        self.id = id
        self.pool = pool
        self.order = order  # of arrival: the youngest has the highest
        self.priority = priority
        self.size = 0  # what it holds, as last reported
        self.max_size = 0
        self.limit = 0  # the size from which ``need`` is no longer a whole growth ahead
        self.need = 0  # what is booked for it: its size and one tick's growth
        self.prefix: tuple[bytes, ...] = ()
        self.exclude: tuple[str, ...] = ()
        self.gpu: Gpu | None = None  # runs there; None: it waits
        self.dst: Gpu | None = None  # migration in flight to it
        self.plan: Gpu | None = None
        self.tenant: str | None = None  # among whom places are shared; None: not shared
        self.weight = 1.0  # of the tenant
        self.served = False  # it has had a place
        self.tag = 0.0  # its turn among the tenants' requests
        self.reason = ""  # of the planned move
        self.wanted_mode: str | None = None  # operator's choice for the planned move
        self.since = 0.0  # when it began to wait
        self.overtaken = 0  # younger requests placed while it waited

    def __repr__(self) -> str:
        return f"<Request {self.id} need={self.need} gpu={self.gpu} plan={self.plan}>"

    def resize(self, size: int, growth: int) -> int:
        """Set the size; returns the change of ``need``."""
        self.size = size
        self.limit = self.max_size - growth
        need = size + growth
        if need > self.max_size:
            need = max(size, self.max_size)
        change = need - self.need
        self.need = need
        return change


class Gpu:
    """One GPU and who is on it."""

    __slots__ = (
        "_needs",
        "_ordered",
        "capacity",
        "held",
        "id",
        "idle_since",
        "inbound",
        "key",
        "load",
        "max_requests",
        "node",
        "pool",
        "requests",
        "reserved",
        "residents",
        "slot",
        "state",
        "steps",
        "urgent",
    )

    def __init__(self, id: str, pool: Pool, capacity: int, node: str, max_requests: int) -> None:
        self.id = id
        self.pool = pool
        self.capacity = capacity
        self.node = node
        self.max_requests = max_requests
        self.state = "ready"  # "ready" | "cordoned" | "draining" | "yielding"
        self.urgent = False  # draining, as fast as can be
        self.slot = 0  # small number, unique among the pool's GPUs; ties go to the lowest
        self.key = 0  # its entry in the pool's index; 0 while it is not there
        self.held = 0
        self.load = 0
        self.requests: dict[Request, None] = {}  # planned here
        self.residents: dict[Request, None] = {}  # run here
        self.reserved: dict[Request, None] = {}  # in flight to here
        self.inbound: dict[Request, None] = {}  # planned to here, not started
        self.idle_since: float | None = None
        self.steps: StepTimeModel | None = None
        self._ordered: list[Request] | None = None
        self._needs: list[int] = []

    def __repr__(self) -> str:
        return f"<Gpu {self.id} {self.load}/{self.capacity}>"

    @property
    def empty(self) -> bool:
        """Nothing runs here, is on its way, or is planned."""
        return not (self.residents or self.reserved or self.inbound or self.requests)

    def room(self) -> int:
        """Planned free size; negative: over capacity, or too many requests."""
        room = self.capacity - self.load
        count = len(self.requests)
        if count >= self.max_requests:
            room = min(room, self.max_requests - count)
        elif self.steps is not None and count:
            room = min(room, self.steps.room(count + 1, self.load))
        return room

    def movable(self) -> list[Request]:
        """Requests that run here and are to stay, smallest first. Do not change the list.

        Those that are planned to leave or to come are not planned anew: as each request has one
        move at a time, plans can be carried out in the order in which they were made.
        """
        if self._ordered is None:
            self._ordered = sorted([r for r in self.requests if r.gpu is self], key=_by_need)
            self._needs = [r.need for r in self._ordered]
        return self._ordered

    def movable_needs(self) -> list[int]:
        """What each of ``movable`` needs, in the same order."""
        self.movable()
        return self._needs

    def touch(self) -> None:
        self._ordered = None


class Pool:
    """The GPUs and requests of one model, indexed by planned room.

    ``keys`` is a sorted list of ``room << SLOT_BITS | slot`` of the GPUs that take requests:
    overfull GPUs first, the emptiest last. A query or an update is a bisection.
    """

    def __init__(self, model: str, limits: ModelLimits, known: dict[str, Gpu]) -> None:
        """``known``: the GPUs of all models, kept up to date by each pool."""
        self.model = model
        self.limits = limits
        self._known = known
        self.gpus: dict[str, Gpu] = {}
        self.capacity = limits.capacity or 0  # of the largest GPU, or expected; 0: not known
        self.max_requests = 1 << 30  # of the latest GPU
        self.slots: list[Gpu | None] = []
        self.free_slots: list[int] = []
        self.keys: list[int] = []
        self.requests: dict[str, Request] = {}
        self.num_used = 0  # GPUs that have requests
        self.by_node: dict[str, int] = {}  # requests planned per node, where nodes are named
        self.retry: dict[Gpu, None] = {}  # GPUs with room freed or plans made: try their inbound
        self.capped: dict[Gpu, None] = {}  # GPUs whose inbound waits for the in-flight limit
        self.emptied: dict[Gpu, None] = {}  # GPUs that somebody has left
        self.draining: dict[Gpu, None] = {}  # GPUs in that state
        self.outdated: dict[Gpu, None] = {}  # GPUs that are to be replaced
        self.freed = False  # room has been freed since the queue was last tried
        self.frees = 0  # how often room has been freed

    # --- GPUs ------------------------------------------------------------------------------

    def add(self, gpu: Gpu) -> None:
        if self.free_slots:
            gpu.slot = self.free_slots.pop()
            self.slots[gpu.slot] = gpu
        else:
            gpu.slot = len(self.slots)
            self.slots.append(gpu)
        self.gpus[gpu.id] = gpu
        self._known[gpu.id] = gpu
        self.max_requests = gpu.max_requests
        self._update_capacity()
        self.index(gpu)
        self.freed = True
        self.frees += 1

    def remove(self, gpu: Gpu) -> None:
        """Forget the GPU; nobody may be on it any more."""
        self.unindex(gpu)
        del self.gpus[gpu.id]
        del self._known[gpu.id]
        if gpu.capacity == self.capacity:
            self._update_capacity()
        for listed in (self.emptied, self.draining, self.outdated):
            listed.pop(gpu, None)
        self.slots[gpu.slot] = None
        self.free_slots.append(gpu.slot)
        self.free_slots.sort(reverse=True)
        self.retry.pop(gpu, None)
        self.capped.pop(gpu, None)

    def _update_capacity(self) -> None:
        largest = max((g.capacity for g in self.gpus.values()), default=0)
        self.capacity = largest or self.limits.capacity or 0

    def used(self) -> list[Gpu]:
        """GPUs that take requests and have some, fullest first."""
        slots = self.slots
        gpus = [slots[key & _SLOT_MASK] for key in self.keys]
        return [gpu for gpu in gpus if gpu is not None and gpu.requests]

    # --- index -----------------------------------------------------------------------------

    def index(self, gpu: Gpu) -> None:
        if gpu.state != "ready":
            return
        gpu.key = gpu.room() << SLOT_BITS | gpu.slot
        insort(self.keys, gpu.key)

    def unindex(self, gpu: Gpu) -> None:
        if gpu.state == "ready":
            del self.keys[bisect_left(self.keys, gpu.key)]

    def reindex(self, gpu: Gpu) -> None:
        gpu._ordered = None
        if gpu.state == "ready":
            key = gpu.room() << SLOT_BITS | gpu.slot
            if key != gpu.key:
                keys = self.keys
                del keys[bisect_left(keys, gpu.key)]
                gpu.key = key
                insort(keys, key)

    def rebuild(self) -> None:
        """Index all GPUs anew; cheaper than one by one when most have changed."""
        keys = []
        for gpu in self.gpus.values():
            gpu._ordered = None
            if gpu.state == "ready":
                gpu.key = gpu.room() << SLOT_BITS | gpu.slot
                keys.append(gpu.key)
        keys.sort()
        self.keys = keys

    def at(self, key: int) -> Gpu:
        gpu = self.slots[key & _SLOT_MASK]
        assert gpu is not None
        return gpu

    def indexed(self) -> Iterator[Gpu]:
        """GPUs that take requests, least room first. The index must not change meanwhile."""
        return (self.at(key) for key in self.keys)

    def most_room(self) -> int:
        """Of all GPUs that take requests; 0 without any."""
        return self.keys[-1] >> SLOT_BITS if self.keys else 0

    def overfull(self) -> Gpu | None:
        """The fullest GPU, if it is over its capacity."""
        return self.at(self.keys[0]) if self.keys and self.keys[0] < 0 else None

    def best_fit(self, request: Request, reserve: int = 0, *, used: bool = False) -> Gpu | None:
        """The GPU with the least room that suffices, ``reserve`` left free; not the present one.

        ``used``: only a GPU that has requests already.
        """
        keys = self.keys
        position = bisect_left(keys, max(request.need + reserve, 1) << SLOT_BITS)
        while position < len(keys):
            gpu = self.slots[keys[position] & _SLOT_MASK]
            assert gpu is not None
            if gpu is not request.plan and gpu.id not in request.exclude:
                return gpu if gpu.requests or not used else None
            position += 1
        return None

    def lasting_fit(self, request: Request) -> Gpu | None:
        """As ``best_fit``, but an outdated GPU only if no other has room."""
        if self.outdated:
            for gpu in self.indexed():
                suits = gpu is not request.plan and gpu.id not in request.exclude
                if suits and gpu not in self.outdated and gpu.room() >= request.need:
                    return gpu
        return self.best_fit(request)

    def roomiest(self, request: Request, but: int, reserve: int) -> Gpu | None:
        """The GPU in use with the most room after the ``but`` emptiest ones, if the request fits
        there with ``reserve`` to spare."""
        least = max(request.need + reserve, 1) << SLOT_BITS
        for key in reversed(self.keys):
            if key < least:
                return None
            gpu = self.at(key)
            if not gpu.requests:
                continue
            but -= 1
            if but < 0 and gpu is not request.plan and gpu.id not in request.exclude:
                return gpu
        return None

    def emptiest(self, count: int) -> list[Gpu]:
        """Up to ``count`` GPUs that have requests, most planned room first."""
        found: list[Gpu] = []
        for key in reversed(self.keys):
            gpu = self.at(key)
            if gpu.requests:
                found.append(gpu)
                if len(found) == count:
                    break
        return found

    # --- plans -----------------------------------------------------------------------------

    def assign(self, request: Request, gpu: Gpu, reason: str = "") -> None:
        """Plan the request to be on ``gpu``: a place if it waits, a move if it runs elsewhere.

        Not for a request in flight: its destination is settled.
        """
        assert request.dst is None
        if request.plan is not None:
            self.unassign(request)
        request.plan = gpu
        request.reason = reason
        self.num_used += not gpu.requests
        gpu.requests[request] = None
        gpu.load += request.need
        if gpu.node:
            self.by_node[gpu.node] = self.by_node.get(gpu.node, 0) + 1
        if request.gpu is not gpu:
            gpu.inbound[request] = None
            self.retry[gpu] = None
        self.reindex(gpu)

    def unassign(self, request: Request) -> None:
        """Take back the request's plan; the caller plans anew or lets the request go."""
        gpu = request.plan
        if gpu is None:
            return
        request.plan = None
        del gpu.requests[request]
        self.num_used -= not gpu.requests
        gpu.load -= request.need
        if gpu.node:
            self.by_node[gpu.node] -= 1
        gpu.inbound.pop(request, None)
        self.freed = True
        self.frees += 1
        self.reindex(gpu)
