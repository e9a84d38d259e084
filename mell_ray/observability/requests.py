"""The metrics of one ingress: values are gathered as tokens come and recorded once a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from mell_ray.observability.clock import RequestClock
from mell_ray.observability.pulse import MAX_SAMPLES, Pulse, thinned
from mell_ray.observability.recorder import Recorder

FLUSH_S = 1.0
MAX_GAPS_PER_FLUSH = 64


class _Gathered:
    """Of one model, since the last flush."""

    def __init__(self) -> None:
        self.tokens = 0
        self.prompt_tokens = 0
        self.gaps: list[float] = []


class RequestMeter:
    """``tell`` gets a pulse with every flush that has something to say."""

    def __init__(
        self,
        recorder: Recorder,
        models: Iterable[str],
        tell: Callable[[Pulse], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._recorder = recorder
        self._tell = tell
        self._now = now
        self._gathered = {model: _Gathered() for model in models}
        self._ttft: list[float] = []
        self._tpot: list[float] = []
        self._stalls: list[float] = []

    def placed(self, model: str, clock: RequestClock) -> None:
        """The Router has answered; the first time ends the queueing."""
        if clock.placed_at is None:
            clock.placed(self._now())
            assert clock.queue_s is not None
            self._recorder.observe("mell_queue_time_seconds", clock.queue_s, model=model)

    def delivered(
        self,
        model: str,
        clock: RequestClock,
        now: float,
        replica_id: str,
        generation: int,
        num_tokens: int,
        num_prompt_tokens: int,
    ) -> None:
        """New tokens of one request, in the order in which its client gets them. ``now``:
        ``time.monotonic``."""
        gathered = self._gathered[model]
        stalls = len(clock.stalls)
        gap = clock.tokens(now, replica_id, generation, num_tokens)
        gathered.tokens += num_tokens
        if gap is None:
            assert clock.ttft_s is not None
            self._ttft.append(clock.ttft_s)
            gathered.prompt_tokens += num_prompt_tokens
            self._recorder.observe("mell_time_to_first_token_seconds", clock.ttft_s, model=model)
        else:
            gathered.gaps.append(gap)
        if len(clock.stalls) > stalls:
            self._stalls.append(clock.stalls[-1].seconds)

    def lost(self, model: str, clock: RequestClock, *, died: bool) -> None:
        """The request has to be continued elsewhere."""
        clock.lost()
        cause = "died" if died else "evicted"
        self._recorder.add("mell_recoveries_total", 1, model=model, cause=cause)

    def violated(self, model: str) -> None:
        """A delta broke the ownership rules."""
        self._recorder.add("mell_exactly_once_violations_total", 1, model=model)

    def finished(self, model: str, clock: RequestClock, outcome: str) -> None:
        """The request has ended, one way or another."""
        tpot = clock.tpot_s
        if tpot is not None:
            self._tpot.append(tpot)
            self._recorder.observe("mell_time_per_output_token_seconds", tpot, model=model)
        self._recorder.add("mell_requests_finished_total", 1, model=model, outcome=outcome)

    def flush(self) -> None:
        """Record what has been gathered; to be called every ``FLUSH_S`` seconds."""
        pulse = Pulse(
            tokens=sum(gathered.tokens for gathered in self._gathered.values()),
            ttft_s=tuple(thinned(self._ttft, MAX_SAMPLES)),
            tpot_s=tuple(thinned(self._tpot, MAX_SAMPLES)),
            stall_s=tuple(thinned(self._stalls, MAX_SAMPLES)),
        )
        for model, gathered in self._gathered.items():
            self._record(model, gathered)
        self._gathered = {model: _Gathered() for model in self._gathered}
        self._ttft, self._tpot, self._stalls = [], [], []
        if pulse != Pulse():
            self._tell(pulse)

    def _record(self, model: str, gathered: _Gathered) -> None:
        record = self._recorder
        record.add("mell_generation_tokens_total", gathered.tokens, model=model)
        record.add("mell_prompt_tokens_total", gathered.prompt_tokens, model=model)
        for gap in thinned(gathered.gaps, MAX_GAPS_PER_FLUSH):
            record.observe("mell_inter_token_latency_seconds", gap, model=model)
