"""Discrete-event simulation: a trace drives the scheduler that is deployed, on a virtual clock.

Requests decode at a constant rate. At every report, in this order: requests that are done end, the
others report their growth, and requests that have arrived since the last report are handed over
(largest first). The scheduler plans once an epoch, at a report. Between two reports nothing but
growth happens, unless GPUs or migrations take time: their ends come at their own moments.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence

from mell_ray.scheduler import CostConfig, ModelLimits, Scheduler, SchedulerConfig
from mell_ray.scheduler.events import (
    AcquireGpu,
    Arrive,
    Decision,
    Event,
    Finish,
    GpuReady,
    Grow,
    Migrate,
    MigrationDone,
    Place,
    Preempt,
    Queue,
    Reject,
    ReleaseGpu,
    Tick,
    WithdrawGpu,
)
from mell_ray.scheduler.prefixes import PrefixIndex
from mell_ray.simulation.fleet import SimFleet
from mell_ray.simulation.measure import Meter
from mell_ray.simulation.transform import prepare
from mell_ray.simulation.types import EventSink, SimOptions, SimResult, TraceRow

MODEL = "model"
PREFIX_BLOCK_TOKENS = 512  # what one of a trace's prefix hashes stands for
_UNLIMITED = 1 << 30


def simulate(
    rows: Sequence[TraceRow],
    options: SimOptions,
    *,
    sink: EventSink | None = None,
    progress: Callable[[float], None] | None = None,
) -> SimResult:
    """Run a trace to its end.

    Args:
        rows: the trace, see ``transform.prepare`` for what ``options`` do to it.
        sink: gets every event; see ``EventSink``.
        progress: gets the fraction done, from 0 to 1.

    Raises:
        ConfigError: unknown policy or policy setting.
        ValueError: an option that makes no sense.
    """
    prepared, dropped = prepare(rows, options)
    run = Simulation(prepared, options, sink)
    run.meter.result.dropped = dropped
    return run.run(progress)


def scheduler_config(options: SimOptions) -> SchedulerConfig:
    """The scheduler's settings for a simulation; sizes are tokens."""
    unlimited = 1e15  # per second: takes no time
    cost = CostConfig(
        bytes_per_token=options.kv_bytes_per_token,
        link_bytes_per_s=options.link_bytes_per_s or unlimited,
        link_latency_s=options.link_latency_s,
        prefill_tokens_per_s=options.prefill_tokens_per_s or 1e9,
    )
    maximum = _UNLIMITED if options.max_gpus is None else options.max_gpus
    return SchedulerConfig(
        models={MODEL: ModelLimits(options.min_gpus, maximum, options.gpu_tokens)},
        policy=options.policy,
        params=options.params,
        growth_per_tick=options.growth_tokens,
        tokens_per_unit=1,
        units_per_prefix_block=PREFIX_BLOCK_TOKENS,
        spare_gpus=options.spare_gpus,
        idle_grace_s=options.idle_grace_s,
        startup_s=options.startup_s,
        forecast=options.forecast,
        migration_price=options.migration_price,
        migration_mode="auto" if options.prefill_tokens_per_s else "kv",
        cost=cost,
    )


class _Live:
    """A request between arrival and end. Tokens are counted from ``base`` at time ``since``."""

    __slots__ = ("asked", "base", "gpu", "id", "prefix", "row", "since", "size", "total")

    def __init__(self, row: TraceRow, asked: float) -> None:
        self.row = row
        self.id = str(row.request)
        self.size = row.prompt_tokens
        self.total = row.prompt_tokens + row.output_tokens
        self.base = self.size
        self.since = 0.0
        self.gpu = ""  # where it runs; "": it waits
        self.prefix = tuple(block.encode() for block in row.prefix_hashes)
        self.asked = asked  # when the scheduler was given it (again)


class Simulation:
    """One run; ``simulate`` is the way in."""

    def __init__(
        self, rows: Sequence[TraceRow], options: SimOptions, sink: EventSink | None = None
    ) -> None:
        self.options = options
        self.now = 0.0
        self.scheduler = Scheduler(scheduler_config(options), seed=options.seed)
        self.fleet = SimFleet(options)
        self.meter = Meter(options, rows)
        self._rows = rows
        self._next_row = 0
        self._sink = sink
        self._live: dict[str, _Live] = {}
        self._running: dict[str, _Live] = {}
        self._later: list[tuple[float, int, Event]] = []  # ends of start-ups and migrations
        self._sequence = 0
        self._todo: deque[Event] = deque()
        self._caches: PrefixIndex[str] = PrefixIndex(PREFIX_BLOCK_TOKENS)

    def run(self, progress: Callable[[float], None] | None = None) -> SimResult:
        for _ in range(self.options.initial_gpus):
            self._happen(self._ready(*self.fleet.acquire()))
        step, step_s = 0, self.options.report_s
        planned = -1  # epoch of the last planning
        rows = len(self._rows)
        shown = 0.0
        while self._next_row < rows or self._live or self._later:
            step = self._skip_idle(step)
            at = step * step_s
            self._until(at)
            epoch = int(at / self.options.epoch_s + 1e-6)
            self._report(at, plan=epoch > planned)
            planned = epoch
            step += 1
            done = (self._next_row - len(self._live)) / rows if rows else 1.0
            if progress is not None and done >= shown + 0.005:
                shown = done
                progress(done)
        if progress is not None:
            progress(1.0)
        self._close_all()
        return self.meter.finish()

    # --- time ------------------------------------------------------------------------------

    def _skip_idle(self, step: int) -> int:
        """The first report from ``step`` on at which something can happen.

        With no request, no GPU and none on its way nothing does until the next arrival: traces
        have days of it. A forecast learns from quiet times too, once it has seen a request.
        """
        if self._live or self._later or self._next_row == len(self._rows) or self.fleet.billed():
            return step
        if self.options.forecast and self._next_row:
            return step
        step_s, arrival = self.options.report_s, self._rows[self._next_row].arrival_s
        following = max(step, math.floor(arrival / step_s))
        while following * step_s < arrival:
            following += 1
        if following > step:
            self.meter.idle(step, following)
        return following

    def _until(self, end: float) -> None:
        """What comes before the next report at its own moment."""
        while self._later and self._later[0][0] <= end:
            self.now, _, event = heapq.heappop(self._later)
            self._happen(event)
        self.now = end

    def _report(self, now: float, *, plan: bool) -> None:
        self._grow(now)
        for row in sorted(self._arrivals(now), key=lambda r: (-r.prompt_tokens, r.request)):
            self._arrive(row)
        if plan:
            self._happen(Tick())
        self._do(self.meter.timed(self.scheduler.relieve, now))
        self._settle()
        waiting = [r.size for r in self._live.values() if not r.gpu]
        self.meter.sample(
            now,
            used=self.fleet.used(),
            billed=self.fleet.billed(),
            sizes=[r.size for r in self._live.values()],
            waiting=waiting,
        )

    def _arrivals(self, now: float) -> list[TraceRow]:
        first = self._next_row
        while self._next_row < len(self._rows) and self._rows[self._next_row].arrival_s <= now:
            self._next_row += 1
        return list(self._rows[first : self._next_row])

    def _grow(self, now: float) -> None:
        rate = self.options.decode_tokens_per_s
        ended: list[_Live] = []
        sizes: dict[str, int] = {}
        for id, live in self._running.items():
            made = int((now - live.since) * rate + 1e-6)  # reports are at exact multiples
            if made <= 0:
                continue
            size = live.base + made
            if size >= live.total:
                ended.append(live)
            elif size != live.size:
                live.size = size
                sizes[id] = size
        for live in ended:
            self._end(live)
        if self._sink is not None:
            for id, size in sizes.items():
                live = self._live[id]
                self._emit("grow", request=live.row.request, gpu=live.gpu, tokens=size)
        self._happen(Grow(sizes))

    # --- events ----------------------------------------------------------------------------

    def _arrive(self, row: TraceRow) -> None:
        live = _Live(row, self.now)
        self._live[live.id] = live
        # The scheduler is not told the output's length, only what a GPU can hold. Prefixes matter
        # only where prefill takes time.
        limit = max(live.total, self.options.gpu_tokens)
        prefix = live.prefix if self.options.prefill_tokens_per_s else ()
        self._happen(Arrive(live.id, MODEL, live.size, limit, prefix=prefix))

    def _end(self, live: _Live) -> None:
        live.size = live.total
        self._emit("finish", request=live.row.request, gpu=live.gpu, tokens=live.total)
        self.fleet.leave(live.gpu)
        del self._running[live.id]
        del self._live[live.id]
        self.meter.finished()
        self._happen(Finish(live.id))

    def _happen(self, event: Event) -> None:
        """The scheduler learns of an event; all that follows from it at once is done."""
        self._todo.append(event)
        self._settle()

    def _settle(self) -> None:
        while self._todo:
            event = self._todo.popleft()
            if isinstance(event, MigrationDone) and not self._moved(event):
                continue
            if isinstance(event, GpuReady):
                self._emit("gpu_open", gpu=event.gpu, capacity_tokens=event.capacity)
                self.fleet.opened(event.gpu)
            self._do(self.meter.timed(self.scheduler.handle, event, self.now))

    def _moved(self, event: MigrationDone) -> bool:
        """A migration has ended; False if the request has gone meanwhile."""
        live = self._live.get(event.request)
        if live is None or live.gpu != event.src:
            return False
        live.gpu = event.dst
        self.fleet.leave(event.src)
        self.fleet.enter(event.dst)
        self._emit(
            "migrate",
            request=live.row.request,
            src=event.src,
            dst=event.dst,
            tokens=live.size,
            mode=event.mode,
        )
        return True

    def _do(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Place(request, gpu):
                    self._place(self._live[request], gpu)
                case Migrate():
                    self._migrate(decision)
                case AcquireGpu():
                    self._after(self.options.startup_s, self._ready(*self.fleet.acquire()))
                case WithdrawGpu():
                    self._withdraw()
                case ReleaseGpu(gpu):
                    self._emit("gpu_close", gpu=gpu)
                    self.fleet.release(gpu)
                    self._caches.forget(gpu)
                case Preempt(request, gpu):
                    self._preempt(self._live[request], gpu)
                case Reject(request):
                    del self._live[request]
                    self.meter.result.rejected += 1
                case Queue():
                    pass

    def _ready(self, gpu: str, node: str) -> GpuReady:
        options = self.options
        limit = options.max_requests_per_gpu or _UNLIMITED
        return GpuReady(gpu, MODEL, options.gpu_tokens, node, limit)

    def _after(self, seconds: float, event: Event) -> None:
        if seconds <= 0.0:
            self._todo.append(event)
            return
        self._sequence += 1
        heapq.heappush(self._later, (self.now + seconds, self._sequence, event))

    def _withdraw(self) -> None:
        """The GPU that was asked for last does not come."""
        starting = [entry for entry in self._later if isinstance(entry[2], GpuReady)]
        if not starting:
            return
        last = max(starting, key=lambda entry: entry[1])
        self._later.remove(last)
        heapq.heapify(self._later)
        assert isinstance(last[2], GpuReady)
        self.fleet.withdraw(last[2].gpu)

    def _place(self, live: _Live, gpu: str) -> None:
        live.gpu = gpu
        live.base = live.size
        live.since = self.now + self._prefill_s(live, gpu)
        self._running[live.id] = live
        self.fleet.enter(gpu)
        self.meter.placed(live.id, self.now - live.asked)
        self._emit("place", request=live.row.request, gpu=gpu, tokens=live.size)

    def _prefill_s(self, live: _Live, gpu: str) -> float:
        """Seconds until the GPU has computed the request's tokens; its prefix stays cached."""
        rate = self.options.prefill_tokens_per_s
        if not rate:
            return 0.0
        cached = min(self._caches.match(gpu, live.prefix), live.size)
        self._caches.record(gpu, live.prefix, self.options.gpu_tokens)
        return (live.size - cached) / rate

    def _migrate(self, decision: Migrate) -> None:
        live = self._live[decision.request]
        self.meter.started(live.size, decision.mode, decision.reason)
        if decision.mode == "token":
            seconds, moved = self._prefill_s(live, decision.dst), 0
        else:
            moved = live.size * self.options.kv_bytes_per_token
            link = self.options.link_bytes_per_s
            seconds = self.options.link_latency_s + (moved / link if link else 0.0)
        self._after(
            seconds,
            MigrationDone(
                decision.request,
                decision.src,
                decision.dst,
                decision.mode,
                live.size,
                moved,
                seconds,
            ),
        )

    def _preempt(self, live: _Live, gpu: str) -> None:
        self._emit("preempt", request=live.row.request, gpu=gpu, tokens=live.size)
        self.meter.preempted()
        self.fleet.leave(gpu)
        del self._running[live.id]
        live.gpu = ""
        live.asked = self.now

    def _close_all(self) -> None:
        for gpu in self.fleet.open_gpus():
            self._emit("gpu_close", gpu=gpu)

    def _emit(self, event: str, **fields: object) -> None:
        if self._sink is not None:
            self._sink.emit(self.now, event, **fields)
