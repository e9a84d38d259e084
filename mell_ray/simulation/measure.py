"""Sums and samples of one run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mell_ray.scheduler.bounds import martello_toth_l2, volume_bound
from mell_ray.simulation.types import SimOptions, SimResult, TraceRow

Answer = TypeVar("Answer")


class Meter:
    """Counts only inside the measured part: from a share of the arrivals' span on, and up to the
    last arrival where the drain is left out."""

    def __init__(self, options: SimOptions, rows: Sequence[TraceRow]) -> None:
        self.result = SimResult(options, requests=len(rows))
        self._options = options
        first, last = (rows[0].arrival_s, rows[-1].arrival_s) if rows else (0.0, 0.0)
        share = options.measure_from_share
        self._first_s = first + share * (last - first) if share else 0.0
        self._last_s = float("inf") if options.measure_drain else last
        self._in = self._first_s <= 0.0
        self._delays: dict[str, float] = {}  # of requests that waited: how long, in all
        self._short = 0.0
        self._demand = 0.0
        self._every = 1  # reports per sample of the time series
        self._report = 0
        self.result.total_tokens = sum(
            r.prompt_tokens + r.output_tokens
            for r in rows
            if self._first_s <= r.arrival_s <= self._last_s
        )

    def timed(self, call: Callable[..., Answer], *args: Any) -> Answer:
        begin = time.perf_counter()
        answer = call(*args)
        self.result.scheduler_seconds += time.perf_counter() - begin
        self.result.scheduler_events += 1
        return answer

    def started(self, tokens: int, mode: str, reason: str) -> None:
        """A migration begins; its tokens count as moved whether or not it ends well."""
        if not self._in:
            return
        result = self.result
        for counts, key, amount in (
            (result.migrations_by_reason, reason, 1),
            (result.migrated_tokens_by_reason, reason, tokens),
            (result.migrated_tokens_by_mode, mode, tokens),
        ):
            counts[key] = counts.get(key, 0) + amount
        result.migrations += 1
        result.migrated_tokens += tokens

    def placed(self, request: str, delay_s: float) -> None:
        """Also after a preemption, whose wait adds to that before."""
        if self._in and delay_s > 0.0:
            self._delays[request] = self._delays.get(request, 0.0) + delay_s

    def preempted(self) -> None:
        self.result.preemptions += self._in

    def finished(self) -> None:
        self.result.finished += 1

    def sample(
        self, now: float, *, used: int, billed: int, sizes: list[int], waiting: list[int]
    ) -> None:
        """The state after a report stands for the time until the next one."""
        self._in = self._first_s <= now <= self._last_s
        if not self._in:
            return
        result, step = self.result, self._options.report_s
        volume = volume_bound(sizes, self._options.gpu_tokens)
        l2 = martello_toth_l2(sizes, self._options.gpu_tokens)
        result.duration_s += step
        result.gpu_seconds += used * step
        result.billed_gpu_seconds += billed * step
        result.volume_gpu_seconds += volume * step
        result.l2_gpu_seconds += l2 * step
        result.lower_bound_gpu_seconds += max(volume, l2) * step
        result.peak_gpus = max(result.peak_gpus, used)
        result.peak_lower_bound = max(result.peak_lower_bound, volume, l2)
        demand = sum(sizes)
        self._demand += demand
        self._short += sum(waiting)
        self._chart(now, billed, max(volume, l2), demand, len(waiting))

    def idle(self, first: int, end: int) -> None:
        """Reports ``first`` up to ``end``, excluded, that were left out as there was nothing: as
        many samples of nothing, without the time they would take."""
        step = self._options.report_s
        begin = max(first, math.ceil(self._first_s / step))
        stop = end if self._last_s == math.inf else min(end, math.floor(self._last_s / step) + 1)
        self._in = begin < stop == end
        if stop <= begin:
            return
        self.result.duration_s += (stop - begin) * step
        while begin < stop:
            behind = self._report % self._every
            ahead = min(stop - begin, self._every - behind if behind else 1)
            if behind:
                self._report += ahead
            else:
                self._chart(begin * step, 0, 0, 0, 0)
            begin += ahead

    def _chart(self, now: float, gpus: int, bound: int, tokens: int, queued: int) -> None:
        line = self.result.timeline
        if self._report % self._every == 0:
            line.t.append(now)
            line.gpus.append(gpus)
            line.lower_bound.append(bound)
            line.used_tokens.append(tokens)
            line.migrated_tokens.append(self.result.migrated_tokens)
            line.queued.append(queued)
            if len(line.t) > self._options.max_samples:
                columns = (line.gpus, line.lower_bound, line.used_tokens)
                for column in (line.t, *columns, line.migrated_tokens, line.queued):
                    del column[1::2]
                self._every *= 2
        self._report += 1

    def finish(self) -> SimResult:
        result = self.result
        delays = sorted(self._delays.values())
        result.delayed_requests = len(delays)
        if delays:
            result.delay_p50_s = delays[len(delays) // 2]
            result.delay_p99_s = delays[int(0.99 * (len(delays) - 1))]
        result.demand_short_share = self._short / self._demand if self._demand else 0.0
        return result
