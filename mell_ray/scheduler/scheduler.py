"""The scheduler: events in, decisions out. Its drivers are the live Router and the simulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from mell_ray.scheduler.bounds import lower_bound
from mell_ray.scheduler.checks import check_scheduler
from mell_ray.scheduler.config import ModelLimits, SchedulerConfig
from mell_ray.scheduler.events import (
    AcquireFailed,
    Adopt,
    Arrive,
    Contended,
    Cordon,
    Decision,
    Evacuate,
    Event,
    Finish,
    GpuAsleep,
    GpuLost,
    GpuReady,
    Grow,
    MigrateRequest,
    MigrationDone,
    MigrationFailed,
    Outdate,
    Queue,
    Reject,
    StepTime,
    Tick,
)
from mell_ray.scheduler.ledger import Ledger
from mell_ray.scheduler.policies import find_policy
from mell_ray.scheduler.state import Gpu, Request
from mell_ray.scheduler.steptime import StepTimeModel
from mell_ray.scheduler.turns import Turns

_MANY = 2  # sizes per GPU in one report from which on re-indexing all is cheaper


@dataclass(frozen=True, slots=True)
class GpuView:
    """One GPU as the scheduler sees it. Sizes in the driver's unit."""

    id: str
    model: str
    node: str
    capacity: int
    booked: int  # requests that run there, their growth until the next tick, and reservations
    requests: int  # that run there
    state: str  # "ready" | "cordoned" | "draining" | "yielding"


class Scheduler:
    """Decides where requests live. Pure and deterministic: the same events at the same times with
    the same seed give the same decisions.

    What always holds (``check`` asserts it): what is booked on a GPU, reservations of migrations
    in flight included, never exceeds its capacity as long as requests grow at most
    ``growth_per_tick`` between ticks and ``relieve`` is called after each tick by a driver whose
    GPUs do not preempt by themselves; every request is in exactly one place; a request in flight
    is booked at both ends.

    Events about unknown requests or GPUs are ignored and counted in ``ignored``.
    """

    def __init__(self, config: SchedulerConfig, *, seed: int = 0) -> None:
        """Raises:
        ConfigError: unknown policy, or a setting that it does not have.
        """
        self.config = config
        self.ignored = 0
        self._rng = Random(seed)
        self._order = 0
        self._requests: dict[str, Request] = {}
        self._ledgers: dict[str, Ledger] = {}
        self._gpus: dict[str, Gpu] = {}
        self._out: list[Decision] = []
        self._now = 0.0
        for model, limits in config.models.items():
            self._ledgers[model] = Ledger(model, limits, config, self._gpus)
        self._turns = Turns(self._ledgers, config.turn_s)
        self.policy_name = ""
        self.set_policy(config.policy, config.params)
        self._handlers: dict[type, Callable[[Any], None]] = {
            Arrive: self._arrive,
            Adopt: self._adopt,
            Grow: self._grow,
            Finish: self._finish,
            GpuReady: self._gpu_ready,
            GpuAsleep: self._gpu_asleep,
            GpuLost: self._gpu_lost,
            Contended: self._contended,
            StepTime: self._step_time,
            Cordon: self._cordon,
            Evacuate: self._evacuate,
            Outdate: self._outdate,
            MigrateRequest: self._migrate_request,
            MigrationDone: self._migration_done,
            MigrationFailed: self._migration_failed,
            AcquireFailed: self._acquire_failed,
            Tick: self._tick,
        }

    def handle(self, event: Event, now: float) -> list[Decision]:
        """Take in one event at time ``now`` (seconds, not going back); returns what to do, in an
        order in which each decision fits what the ones before it have left booked."""
        self._out = []
        self._now = now
        self._handlers[type(event)](event)
        return self._out

    def relieve(self, now: float) -> list[Decision]:
        """Preempt wherever requests with one tick of growth exceed their GPU all the same.

        For a driver whose GPUs do not preempt by themselves (the simulator): call it after a tick,
        once the migrations that end at once have been reported.
        """
        self._out = []
        for ledger in self._ledgers.values():
            ledger.relieve(now, self._out)
        return self._out

    def set_policy(self, name: str, params: Mapping[str, Any] | None = None) -> None:
        """Change the policy; takes effect with the next event. Requests stay where they are.

        Raises:
            ConfigError: unknown policy, or a setting that it does not have.
        """
        kind = find_policy(name)
        made = {
            model: kind(ledger.context(Random(self._rng.random())), params or {})
            for model, ledger in self._ledgers.items()
        }
        for model, policy in made.items():
            self._ledgers[model].policy = policy
        self.policy_name = name

    def set_limits(self, model: str, limits: ModelLimits) -> None:
        """Change how many GPUs a model may have; takes effect with the next tick. GPUs above a
        lowered maximum stay until they are empty."""
        self._ledgers[model].pool.limits = limits

    # --- views -----------------------------------------------------------------------------

    def gpus(self) -> list[GpuView]:
        return [
            GpuView(g.id, g.pool.model, g.node, g.capacity, g.held, len(g.residents), g.state)
            for g in self._gpus.values()
        ]

    def queue_length(self) -> int:
        """Requests that wait for a place."""
        return sum(len(ledger.line) for ledger in self._ledgers.values())

    def last_in_line(self, model: str) -> Iterator[str]:
        """Waiting requests of a model that have no place in sight, last in line first."""
        return (request.id for request in self._ledgers[model].line.from_the_end())

    def starting(self) -> int:
        """GPUs asked for that have not come yet."""
        return sum(len(ledger.fleet.starting) for ledger in self._ledgers.values())

    def transitions(self) -> dict[str, dict[str, float | None]]:
        """Seconds by model, as learnt, until a GPU is there that is started or woken; None: none
        has been yet."""
        return {
            model: {
                "start_s": ledger.fleet.startup_s or None,
                "wake_s": ledger.fleet.wake_s or None,
            }
            for model, ledger in self._ledgers.items()
        }

    def in_flight(self) -> int:
        """Migrations under way."""
        return sum(len(ledger.executor.in_flight) for ledger in self._ledgers.values())

    def location(self, request: str) -> str | None:
        """The GPU on which the request runs; None: it waits or is unknown."""
        found = self._requests.get(request)
        return found.gpu.id if found is not None and found.gpu is not None else None

    def lower_bound(self) -> int:
        """GPUs that the present requests need at least, waiting ones included."""
        total = 0
        for ledger in self._ledgers.values():
            sizes = [r.size for r in ledger.pool.requests.values()]
            if sizes:
                total += lower_bound(sizes, max(ledger.pool.capacity, max(sizes)))
        return total

    def check(self) -> None:
        """Raises AssertionError if the books contradict themselves."""
        check_scheduler(self._ledgers, self._requests, self._gpus)

    # --- requests --------------------------------------------------------------------------

    def _arrive(self, event: Arrive) -> None:
        ledger = self._ledgers.get(event.model)
        if event.request in self._requests:
            self.ignored += 1
            return
        if ledger is None:
            self._out.append(Reject(event.request, f"no model {event.model!r} is served"))
            return
        capacity = ledger.pool.capacity
        most = event.max_size if event.max_size > event.size else event.size
        if 0 < capacity < most:
            held = f"the largest GPU of {event.model!r} holds {capacity}"
            reason = f"the request may grow to {most} units of KV cache, {held}"
            self._out.append(Reject(event.request, reason))
            return
        request = self._register(event, ledger)
        if not ledger.admit(request, self._now, self._out):
            self._out.append(Queue(request.id, "no room now"))
        ledger.settle(self._out)

    def _register(self, event: Arrive | Adopt, ledger: Ledger) -> Request:
        request = Request(event.request, ledger.pool, self._order, event.priority)
        self._order += 1
        size, most = event.size, event.max_size
        request.max_size = most if most > size else size
        request.resize(size, self.config.growth_per_tick)
        if isinstance(event, Arrive):
            request.tenant, request.weight = event.tenant, event.weight
            request.prefix, request.exclude = event.prefix, event.exclude
        self._requests[request.id] = request
        ledger.add(request)
        return request

    def _adopt(self, event: Adopt) -> None:
        gpu = self._gpus.get(event.gpu)
        if gpu is None or event.request in self._requests or gpu.pool.model != event.model:
            self.ignored += 1
            return
        ledger = self._ledgers[event.model]
        ledger.adopt(self._register(event, ledger), gpu)
        ledger.settle(self._out)

    def _grow(self, event: Grow) -> None:
        requests = self._requests
        for id, size in event.sizes.items():
            try:
                request = requests[id]
            except KeyError:
                self.ignored += 1
                continue
            gpu = request.gpu
            if gpu is request.plan and gpu is not None and size <= request.limit:
                change = size - request.size
                request.size = size
                request.need += change
                gpu.load += change
                gpu.held += change
            elif size != request.size:
                self._resize(request, size)
        self._reindex(event.sizes)
        for ledger in self._ledgers.values():
            ledger.fit(self._now, self._out)
            ledger.settle(self._out)
            ledger.ebb(self._now, self._out)

    def _resize(self, request: Request, size: int) -> None:
        """A change of size that is not plain: at its limit, waiting, or on its way."""
        change = request.resize(size, self.config.growth_per_tick)
        if request.plan is not None:
            request.plan.load += change
        if request.gpu is not None:
            request.gpu.held += change
        if request.dst is not None:
            request.dst.held += change

    def _reindex(self, changed: Mapping[str, int]) -> None:
        if len(changed) > _MANY * len(self._gpus):
            for ledger in self._ledgers.values():
                ledger.pool.rebuild()
            return
        known = (self._requests[id] for id in changed if id in self._requests)
        for gpu in dict.fromkeys(r.plan for r in known if r.plan is not None):
            gpu.pool.reindex(gpu)

    def _finish(self, event: Finish) -> None:
        request = self._requests.pop(event.request, None)
        if request is None:
            self.ignored += 1
            return
        ledger = self._ledgers[request.pool.model]
        ledger.remove(request)
        ledger.settle(self._out)

    # --- GPUs ------------------------------------------------------------------------------

    def _gpu_ready(self, event: GpuReady) -> None:
        ledger = self._ledgers.get(event.model)
        if ledger is None or event.gpu in self._gpus:
            self.ignored += 1
            return
        gpu = Gpu(event.gpu, ledger.pool, event.capacity, event.node, event.max_requests)
        tpot_limit_s = ledger.pool.limits.tpot_limit_s
        if tpot_limit_s is not None:
            gpu.steps = StepTimeModel(tpot_limit_s, self.config.tokens_per_unit)
        if event.kv_bytes_per_token is not None:
            ledger.cost.set_kv_bytes(event.kv_bytes_per_token)
        ledger.cost.set_attention(event.attention_doubles_at)
        ledger.fleet.arrived(self._now, event.gpu, event.woken, event.took_s)
        ledger.pool.add(gpu)
        ledger.fit(self._now, self._out)
        ledger.settle(self._out)

    def _gpu_lost(self, event: GpuLost) -> None:
        gpu = self._gpus.get(event.gpu)
        if gpu is None:
            for ledger in self._ledgers.values():
                ledger.fleet.asleep.pop(event.gpu, None)
            self.ignored += 1
            return
        ledger = self._ledgers[gpu.pool.model]
        for request in ledger.lose(gpu):
            del self._requests[request.id]
        ledger.settle(self._out)

    def _gpu_asleep(self, event: GpuAsleep) -> None:
        ledger = self._ledgers.get(event.model)
        if ledger is None or event.gpu in self._gpus:
            self.ignored += 1
            return
        ledger.fleet.asleep[event.gpu] = None

    def _contended(self, event: Contended) -> None:
        self._turns.update({m: n for m, n in event.waiting.items() if m in self._ledgers})

    def _acquire_failed(self, event: AcquireFailed) -> None:
        ledger = self._ledgers.get(event.model)
        if ledger is None:
            self.ignored += 1
            return
        ledger.fleet.failed(self._now)

    def _step_time(self, event: StepTime) -> None:
        gpu = self._gpus.get(event.gpu)
        if gpu is None:
            self.ignored += 1
            return
        if gpu.steps is not None:
            gpu.steps.observe(event.sequences, event.resident_tokens, event.seconds)
            gpu.pool.reindex(gpu)

    # --- operator --------------------------------------------------------------------------

    def _cordon(self, event: Cordon) -> None:
        self._set_state(event.gpu, "cordoned" if event.cordoned else "ready")

    def _evacuate(self, event: Evacuate) -> None:
        self._set_state(event.gpu, "draining", urgent=event.urgent)

    def _outdate(self, event: Outdate) -> None:
        gpu = self._gpus.get(event.gpu)
        if gpu is None:
            self.ignored += 1
            return
        gpu.pool.outdated[gpu] = None

    def _set_state(self, id: str, state: str, *, urgent: bool = False) -> None:
        gpu = self._gpus.get(id)
        if gpu is None:
            self.ignored += 1
            return
        ledger = self._ledgers[gpu.pool.model]
        gpu.urgent = urgent
        ledger.set_state(gpu, state, self._now, self._out)
        ledger.settle(self._out)

    def _migrate_request(self, event: MigrateRequest) -> None:
        request = self._requests.get(event.request)
        if request is None or request.gpu is None or request.dst is not None:
            self.ignored += 1
            return
        ledger = self._ledgers[request.pool.model]
        dst = self._gpus.get(event.dst) if event.dst is not None else ledger.elsewhere(request)
        if dst is None or not ledger.can_take(dst, request):
            self.ignored += 1
            return
        request.wanted_mode = event.mode
        ledger.obey(request, dst, self._now)
        ledger.settle(self._out)

    # --- migrations ------------------------------------------------------------------------

    def _in_flight(self, event: MigrationDone | MigrationFailed) -> Request | None:
        request = self._requests.get(event.request)
        if (
            request is None
            or request.dst is None
            or request.dst.id != event.dst
            or request.gpu is None
            or request.gpu.id != event.src
        ):
            self.ignored += 1
            return None
        return request

    def _migration_done(self, event: MigrationDone) -> None:
        request = self._in_flight(event)
        if request is None:
            return
        assert request.gpu is not None
        assert request.dst is not None
        ledger = self._ledgers[request.pool.model]
        ledger.cost.observe(request.gpu, request.dst, event)
        ledger.executor.arrived(request)
        ledger.settle(self._out)

    def _migration_failed(self, event: MigrationFailed) -> None:
        request = self._in_flight(event)
        if request is None:
            return
        ledger = self._ledgers[request.pool.model]
        ledger.executor.aborted(request)
        ledger.settle(self._out)

    # --- planning --------------------------------------------------------------------------

    def _tick(self, event: Tick) -> None:
        del event
        self._turns.tick(self._now, self._out)
        for ledger in self._ledgers.values():
            ledger.tick(self._now, self._out)
