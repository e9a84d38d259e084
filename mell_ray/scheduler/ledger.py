"""One model's share of the scheduler: its pool, waiting line, fleet, executor and policy."""

from __future__ import annotations

from random import Random

from mell_ray.scheduler.config import ModelLimits, SchedulerConfig
from mell_ray.scheduler.cost import CostModel
from mell_ray.scheduler.events import Decision, Preempt
from mell_ray.scheduler.execution import Executor
from mell_ray.scheduler.fairness import FairShares
from mell_ray.scheduler.fleet import Fleet
from mell_ray.scheduler.forecast import Forecast
from mell_ray.scheduler.latency import spread
from mell_ray.scheduler.policies import Context, Policy
from mell_ray.scheduler.prefixes import PrefixIndex
from mell_ray.scheduler.queue import OVERTAKE_LIMIT, WaitingLine
from mell_ray.scheduler.state import Gpu, Pool, Request

_TRIES = 4  # waiting requests that find no room before the line is left for now
_BATCH = 64  # waiting requests looked at in one go
_PATIENCE_TICKS = 40  # ticks after which a planned move that cannot start is given up
_LONGEST_TICK_S = 5.0  # a longer pause between ticks counts as that long
_QUIET_S = 30.0  # no voluntary moves after an operator's, which they would undo


class Ledger:
    """Models share nothing, so each has books of its own."""

    policy: Policy  # set by the scheduler, may change

    def __init__(
        self,
        model: str,
        limits: ModelLimits,
        config: SchedulerConfig,
        known: dict[str, Gpu],
    ) -> None:
        self.config = config
        self.cost = CostModel(config.cost, config.tokens_per_unit, config.migration_mode)
        self.pool = Pool(model, limits, known)
        self.line = WaitingLine()
        self.shares = FairShares()
        self.prefixes: PrefixIndex[Gpu] = PrefixIndex(config.units_per_prefix_block)
        self.fleet = Fleet(self.pool, config, self._forget)
        self.executor = Executor(
            self.pool, self.line, config, self.cost, self.prefixes, self.shares
        )
        self._priorities: dict[int, int] = {}  # priority: requests that have it
        self._pending: dict[Request, int] = {}  # planned, not started: ticks so far
        self._last_plan: float | None = None
        self._ended = False  # requests have, since the last report
        self._quiet_until = float("-inf")
        self._forecast = Forecast(config.forecast_shortage) if config.forecast else None

    def context(self, rng: Random) -> Context:
        """What a policy of this model is made with."""
        return Context(
            pool=self.pool,
            price=self.price,
            growth=self.config.growth_per_tick,
            kept=lambda: max(self.pool.limits.min_gpus, self.fleet.foreseen),
            may_move=self.config.migration_enabled,
            rng=rng,
        )

    # --- requests --------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        if request.tenant is not None:
            request.tag = self.shares.arrived(request.tenant, request.weight, request.max_size)
        self.pool.requests[request.id] = request
        self._priorities[request.priority] = self._priorities.get(request.priority, 0) + 1

    def adopt(self, request: Request, gpu: Gpu) -> None:
        """The request runs on ``gpu`` already, whether there is room or not."""
        request.gpu = gpu
        gpu.residents[request] = None
        gpu.held += request.need
        self.pool.assign(request, gpu)

    def remove(self, request: Request) -> None:
        """The request is over, wherever it was."""
        if request.tenant is not None:
            unused = request.max_size - (request.size if request.served else 0)
            self.shares.ended(request.tenant, request.weight, unused)
        self.line.remove(request)
        self.executor.evict(request)
        self._ended = True
        del self.pool.requests[request.id]
        self._pending.pop(request, None)
        self._priorities[request.priority] -= 1
        if not self._priorities[request.priority]:
            del self._priorities[request.priority]

    def admit(self, request: Request, now: float, out: list[Decision]) -> bool:
        """Find a place for a new request, or let it wait; True if it runs now."""
        if not (len(self.line) and self.line.blocked(request)):
            gpu = self._place(request) or self._make_way(request, now, out)
            if gpu is not None:
                if len(self.line):
                    self.line.overtake(request)
                self.executor.place(request, gpu, out)
                if self.pool.retry:
                    self.executor.flush(out)
                if request.gpu is not None:
                    return True
        self.line.add(request, now)
        if request.plan is None:
            self.fleet.want(request.need, now, out, "demand")
        return False

    def _place(self, request: Request) -> Gpu | None:
        """Where the request's prefix is cached, if that saves more than it can cost; else where
        the policy wants it."""
        cached = self._where_cached(request) if request.prefix else None
        return cached or self.policy.place(request)

    def _where_cached(self, request: Request) -> Gpu | None:
        """A place that does not suit the policy costs at most one move to mend; what it saves is
        the prefill of what is cached there."""
        best: Gpu | None = None
        most = 0
        for gpu, units in self.prefixes.matches(request.prefix).items():
            fits = gpu.requests and gpu.state == "ready" and gpu.room() >= request.need
            if fits and gpu.id not in request.exclude and units > most:
                best, most = gpu, units
        if best is None:
            return None
        saved_s = most * self.config.tokens_per_unit / self.cost.prefill_rate(best)
        return best if saved_s > request.need * self.price() else None

    def price(self) -> float:
        """GPU-seconds that moving one unit costs."""
        fixed = self.config.migration_price
        return self.cost.price() if fixed is None else fixed

    def _make_way(self, request: Request, now: float, out: list[Decision]) -> Gpu | None:
        """At the largest fleet, preempt less important requests for a more important one."""
        if self.fleet.can_grow(now) or self.fleet.starting:
            return None
        if min(self._priorities) >= request.priority:
            return None
        for gpu in self.pool.indexed():
            lesser = [r for r in gpu.residents if r.priority < request.priority and not r.dst]
            room = gpu.capacity - gpu.held + sum(r.need for r in lesser)
            if not lesser or room < request.need or gpu.id in request.exclude:
                continue
            lesser.sort(key=lambda r: (r.priority, -r.order))
            while lesser and (not self.executor.fits(request, gpu) or gpu.room() < request.need):
                self.preempt(lesser.pop(0), now, out)
            if gpu.room() >= request.need:
                return gpu
        return None

    def preempt(self, request: Request, now: float, out: list[Decision]) -> None:
        """Take a running request off its GPU; it waits, ahead of younger ones."""
        assert request.gpu is not None
        out.append(Preempt(request.id, request.gpu.id))
        self.executor.evict(request)
        request.wanted_mode = None
        self.line.add(request, now)

    # --- room ------------------------------------------------------------------------------

    def fit(self, now: float, out: list[Decision]) -> None:
        """Make every overfull GPU fit again: moves, else a new GPU, else preemption."""
        pool = self.pool
        if not pool.keys or pool.keys[0] >= 0:
            return
        for gpu in [g for g in pool.indexed() if g.room() < 0]:
            self._recall_inbound(gpu)
            if gpu.room() >= 0:
                continue
            stuck = self.policy.shed(gpu) if self.config.migration_enabled else gpu.load
            if not stuck:
                continue
            if self.config.migration_enabled and self.fleet.relieve(gpu, stuck, now, out):
                continue
            self._preempt_overflow(gpu, now, out)

    def _recall_inbound(self, gpu: Gpu) -> None:
        """Moves to an overfull GPU that have not started are the cheapest to give up."""
        for request in reversed(list(gpu.inbound)):
            if gpu.room() >= 0:
                return
            home = request.gpu
            if home is None:
                self.pool.unassign(request)
            elif home.state == "ready" and home.room() >= request.need:
                self.pool.assign(request, home)

    def _preempt_overflow(self, gpu: Gpu, now: float, out: list[Decision]) -> None:
        """No GPU can take what overflows, and none will come: the youngest of the least important
        requests wait."""
        victims = [r for r in gpu.residents if r.plan is gpu]
        victims.sort(key=lambda r: (r.priority, -r.order))
        while gpu.room() < 0 and len(victims) > 1:
            self.preempt(victims.pop(0), now, out)

    def relieve(self, now: float, out: list[Decision]) -> None:
        """Preempt until what is booked fits; those that are to leave anyway go first."""
        for gpu in list(self.pool.gpus.values()):
            if gpu.held <= gpu.capacity:
                continue
            victims = sorted(
                [*gpu.residents, *gpu.reserved],
                key=lambda r: (r.dst is not None, r.plan is gpu, r.priority, -r.order),
            )
            while gpu.held > gpu.capacity and len(victims) > 1:
                self.preempt(victims.pop(0), now, out)
        self.settle(out)

    # --- what follows every event ----------------------------------------------------------

    def settle(self, out: list[Decision]) -> None:
        """Start what can start, then let waiting requests use the room that was freed."""
        pool = self.pool
        if pool.retry:
            self.executor.flush(out)
        while pool.freed:
            pool.freed = False
            if len(self.line):
                self._drain(out)
        if pool.emptied:
            self.fleet.release_emptied(bool(len(self.line)), out)

    def _drain(self, out: list[Decision]) -> None:
        """Place waiting requests until some find no room."""
        failed = 0
        batch = self.line.unplaced(_BATCH)
        for request in batch:
            gpu = self._place(request)
            if gpu is None:
                failed += 1
                if failed == _TRIES or request.overtaken >= OVERTAKE_LIMIT:
                    break
                continue
            self.line.overtake(request)
            self.executor.place(request, gpu, out)
        else:
            self.pool.freed = len(batch) == _BATCH  # most were placed, and more may wait
        self.executor.flush(out)

    # --- operator --------------------------------------------------------------------------

    def can_take(self, gpu: Gpu, request: Request) -> bool:
        """Whether an operator may send the request there."""
        return (
            gpu.pool is self.pool
            and gpu is not request.gpu
            and gpu.state == "ready"
            and gpu.room() >= request.need
        )

    def obey(self, request: Request, gpu: Gpu, now: float) -> None:
        """An operator's move: the policy leaves requests where they are for a while."""
        self.pool.assign(request, gpu, "operator")
        self._quiet_until = now + _QUIET_S

    def elsewhere(self, request: Request) -> Gpu | None:
        """Another GPU with room; a used one if possible."""
        return self.pool.best_fit(request)

    def set_state(self, gpu: Gpu, state: str, now: float, out: list[Decision]) -> None:
        if gpu.state == state:
            return
        self.pool.unindex(gpu)
        gpu.state = state
        if state == "draining":
            self.pool.draining[gpu] = None
        else:
            self.pool.draining.pop(gpu, None)
        self.pool.index(gpu)
        self.pool.freed = True
        if state != "ready":
            for request in list(gpu.inbound):
                if request.gpu is None:
                    self.pool.unassign(request)
                else:
                    self.pool.assign(request, request.gpu)
        if state == "draining":
            self._evacuate(gpu, now, out)

    def _evacuate(self, gpu: Gpu, now: float, out: list[Decision]) -> None:
        """Plan moves for everything on a GPU that is to be empty."""
        for request in reversed(list(gpu.movable())):
            target = self.pool.lasting_fit(request)
            if target is not None:
                self.pool.assign(request, target, "evacuate")
            else:
                self.fleet.want(request.need, now, out, "evacuate")

    # --- GPUs and ticks --------------------------------------------------------------------

    def lose(self, gpu: Gpu) -> list[Request]:
        """Forget a dead GPU; returns the requests that are gone with it."""
        gone = list(gpu.residents)
        for request in gone:
            self.remove(request)
        for request in list(gpu.reserved):
            self.executor.aborted(request)
        for request in list(gpu.inbound):
            if request.gpu is None:
                self.pool.unassign(request)
            else:
                self.pool.assign(request, request.gpu)
        self.pool.remove(gpu)
        self._forget(gpu)
        return gone

    def _forget(self, gpu: Gpu) -> None:
        """The GPU is gone: what was learnt about it is of no use."""
        self.prefixes.forget(gpu)
        self.cost.forget(gpu)

    def tick(self, now: float, out: list[Decision]) -> None:
        """The planning epoch."""
        self._give_up_stale()
        self.pool.freed = True
        self.settle(out)
        self.fleet.foreseen = self._foresee(now)
        self.fleet.renew_promises(self._unplaced(), now, out)
        self.fit(now, out)
        if self.config.migration_enabled and now >= self._quiet_until:
            stuck = spread(self.pool)
            if stuck:
                self.fleet.want(stuck, now, out, "latency")
        for gpu in self.pool.draining:
            self._evacuate(gpu, now, out)
        self._plan(now)
        self.settle(out)
        self.fleet.adjust(now, bool(len(self.line)), out)

    def ebb(self, now: float, out: list[Decision]) -> None:
        """After a report: where requests have ended, the policy need not wait for the epoch."""
        if self._ended and self.policy.eager:
            self._plan(now)
            self.settle(out)
        self._ended = False

    def _plan(self, now: float) -> None:
        """Let the policy move requests that run."""
        last = self._last_plan if self._last_plan is not None else now
        self._last_plan = now
        quiet = now < self._quiet_until or len(self.line) or self.pool.outdated
        if self.config.migration_enabled and not quiet:
            self.policy.tick(min(now - last, _LONGEST_TICK_S))

    def _foresee(self, now: float) -> int:
        """GPUs to have, as far as it can be foreseen; 0 without a forecast. A forecast that has
        seen little asks for GPUs, but gives none back."""
        if self._forecast is None:
            return 0
        waiting = sum(self._unplaced())
        total = waiting + sum(gpu.load for gpu in self.pool.gpus.values())
        if self.pool.capacity:
            needed = total / self.pool.capacity
            self._forecast.observe(now, needed, waiting / max(1, total), self.fleet.lag_s())
        target = self._forecast.target()
        return max(target, self.fleet.total()) if self._forecast.young else target

    def _unplaced(self) -> list[int]:
        return [r.need for r in self.line if r.plan is None]

    def _give_up_stale(self) -> None:
        """Planned moves that have not started for long: others have changed the room since."""
        pending: dict[Request, int] = {}
        for gpu in self.pool.gpus.values():
            if gpu.inbound and gpu not in self.pool.capped:
                for request in gpu.inbound:
                    pending[request] = self._pending.get(request, 0) + 1
        for request, ticks in list(pending.items()):
            if ticks < _PATIENCE_TICKS:
                continue
            del pending[request]
            if request.gpu is None:
                self.pool.unassign(request)
            else:
                self.pool.assign(request, request.gpu)
        self._pending = pending
