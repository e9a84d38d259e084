"""A fleet on paper: carries out decisions and knows the truth independently of the scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mell_ray.scheduler import ModelLimits, Scheduler, SchedulerConfig
from mell_ray.scheduler.events import (
    AcquireFailed,
    AcquireGpu,
    Arrive,
    Decision,
    Event,
    Finish,
    GpuLost,
    GpuReady,
    Grow,
    Migrate,
    MigrationDone,
    MigrationFailed,
    Place,
    Preempt,
    Queue,
    Reject,
    ReleaseGpu,
    Tick,
    WithdrawGpu,
)

CAPACITY = 100


@dataclass
class World:
    """``where``: the GPU each placed request runs on. Every decision must be possible."""

    scheduler: Scheduler
    instant_gpus: bool = True
    instant_moves: bool = True
    now: float = 0.0
    capacity: dict[str, int] = field(default_factory=dict)
    model_of: dict[str, str] = field(default_factory=dict)  # of GPUs
    where: dict[str, str] = field(default_factory=dict)
    size: dict[str, int] = field(default_factory=dict)
    waiting: dict[str, None] = field(default_factory=dict)
    moving: dict[str, Migrate] = field(default_factory=dict)
    starting: list[str] = field(default_factory=list)  # models of GPUs asked for
    log: list[Decision] = field(default_factory=list)
    opened: int = 0
    next_capacity: int = CAPACITY
    moved: int = 0

    def send(self, event: Event) -> list[Decision]:
        """One event, and all that follows from its decisions at once."""
        if isinstance(event, Arrive):
            self.size[event.request] = event.size
        decisions = self.scheduler.handle(event, self.now)
        todo = list(decisions)
        while todo:
            todo.extend(self._carry_out(todo.pop(0)))
        return decisions

    def _carry_out(self, decision: Decision) -> list[Decision]:
        self.log.append(decision)
        match decision:
            case Place(request, gpu):
                assert request not in self.where, f"{request} placed twice"
                self.waiting.pop(request, None)
                self.where[request] = gpu
                assert gpu in self.capacity, f"{request} placed on unknown {gpu}"
            case Queue(request):
                assert request not in self.where
                self.waiting[request] = None
            case Reject(request):
                self.size.pop(request)
            case Migrate(request, src, dst):
                assert self.where[request] == src
                assert src != dst
                assert dst in self.capacity
                assert request not in self.moving
                self.moving[request] = decision
                self.check_capacity()
                if self.instant_moves:
                    return self.end_move(request)
            case AcquireGpu(model):
                if self.instant_gpus:
                    return self._gpu_event(model)
                self.starting.append(model)
            case WithdrawGpu(model):
                self.starting.remove(model)
            case ReleaseGpu(gpu):
                assert gpu not in self.where.values(), f"{gpu} released with requests on it"
                assert gpu not in [m.dst for m in self.moving.values()]
                del self.capacity[gpu]
            case Preempt(request, gpu):
                assert self.where.pop(request) == gpu
                self.moving.pop(request, None)
                self.waiting[request] = None
        self.check_capacity()
        return []

    def _gpu_event(self, model: str) -> list[Decision]:
        name = f"g{self.opened}"
        self.opened += 1
        self.capacity[name] = self.next_capacity
        self.model_of[name] = model
        return self.scheduler.handle(GpuReady(name, model, self.next_capacity), self.now)

    def end_move(self, request: str, *, fails: bool = False) -> list[Decision]:
        move = self.moving.pop(request)
        if fails:
            event: Event = MigrationFailed(request, move.src, move.dst, "test")
        else:
            self.where[request] = move.dst
            self.moved += self.size[request]
            event = MigrationDone(
                request, move.src, move.dst, move.mode, self.size[request], 1000, 0.1
            )
        return self.scheduler.handle(event, self.now)

    def finish_move(self, request: str, *, fails: bool = False) -> None:
        todo = self.end_move(request, fails=fails)
        while todo:
            todo.extend(self._carry_out(todo.pop(0)))

    def start_gpu(self, *, fails: bool = False) -> None:
        model = self.starting.pop(0)
        if fails:
            todo = self.scheduler.handle(AcquireFailed(model), self.now)
        else:
            todo = self._gpu_event(model)
        while todo:
            todo.extend(self._carry_out(todo.pop(0)))

    def arrive(self, request: str, size: int, max_size: int = CAPACITY, **more: Any) -> None:
        self.send(Arrive(request, more.pop("model", "m"), size, max_size, **more))

    def finish(self, request: str) -> None:
        self.size.pop(request)
        self.where.pop(request, None)
        self.waiting.pop(request, None)
        self.moving.pop(request, None)
        self.send(Finish(request))

    def lose(self, gpu: str) -> list[str]:
        """The GPU dies; returns the requests that were on it."""
        gone = [r for r, g in self.where.items() if g == gpu]
        del self.capacity[gpu]
        for request in gone:
            del self.where[request]
            self.moving.pop(request, None)
            del self.size[request]
        for request, move in list(self.moving.items()):
            if move.dst == gpu:
                del self.moving[request]
        self.send(GpuLost(gpu))
        return gone

    def grow(self, by: int = 1, sizes: Mapping[str, int] | None = None) -> None:
        """Everything that runs grows, at most to the largest size it may have."""
        if sizes is None:
            sizes = {r: min(self.size[r] + by, CAPACITY) for r in self.where}
        self.size.update(sizes)
        self.send(Grow(sizes))

    def tick(self, seconds: float = 1.0) -> None:
        self.now += seconds
        self.send(Tick())
        if self.instant_moves:
            for decision in self.scheduler.relieve(self.now):
                self._carry_out(decision)

    def loads(self) -> dict[str, int]:
        """What each GPU truly holds, reservations of moves in flight included."""
        loads = dict.fromkeys(self.capacity, 0)
        for request, gpu in self.where.items():
            loads[gpu] += self.size[request]
        for request, move in self.moving.items():
            loads[move.dst] += self.size[request]
        return loads

    def check_capacity(self) -> None:
        for gpu, load in self.loads().items():
            assert load <= self.capacity[gpu], f"{gpu} holds {load} of {self.capacity[gpu]}"

    def check(self) -> None:
        """The scheduler's books agree with the truth."""
        self.scheduler.check()
        self.check_capacity()
        for request in self.size:
            assert self.scheduler.location(request) == self.where.get(request)
            assert (request in self.where) != (request in self.waiting)
        assert self.scheduler.queue_length() == len(self.waiting)
        assert self.scheduler.in_flight() == len(self.moving)
        assert sorted(v.id for v in self.scheduler.gpus()) == sorted(self.capacity)


def make_world(
    policy: str = "best-fit",
    params: Mapping[str, Any] | None = None,
    *,
    max_gpus: int = 8,
    min_gpus: int = 0,
    instant_gpus: bool = True,
    instant_moves: bool = True,
    seed: int = 0,
    tpot_limit_s: float | None = None,
    **settings: Any,
) -> World:
    limits = ModelLimits(min_gpus, max_gpus, CAPACITY, tpot_limit_s)
    settings.setdefault("idle_grace_s", 0.0)
    settings.setdefault("tokens_per_unit", 1)
    settings.setdefault("models", {"m": limits})
    config = SchedulerConfig(policy=policy, params=params or {}, **settings)
    return World(Scheduler(config, seed=seed), instant_gpus, instant_moves)
