"""The nouns of a simulation: what goes in (rows, options), what comes out (events, result)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from mell_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace. ``request`` is its row number in the file, from 0."""

    request: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    session_id: str = ""
    prefix_hashes: tuple[str, ...] = ()  # chained ids of 512-token blocks, first block first


@dataclass(frozen=True)
class SimOptions:
    """How a trace is run. Times are seconds of the (compressed) trace, sizes are KV tokens."""

    gpu_tokens: int  # KV tokens one GPU holds
    policy: str = "tide"
    params: Mapping[str, Any] = field(default_factory=dict)  # the policy's own settings
    decode_tokens_per_s: float = 30.0  # per request, constant
    epoch_tokens: int = 16  # decoded tokens between two planning ticks
    report_tokens: int = 4  # between two reports of growth, ends, arrivals; at most an epoch
    migration_price: float = 1e-5  # GPU-seconds that one migrated token costs
    startup_s: float = 0.0  # from asking for a GPU until it takes requests; billed
    forecast: bool = False  # keep GPUs ready ahead of demand, as the scheduler forecasts it
    spare_gpus: int = 0  # empty GPUs kept ready
    idle_grace_s: float = 0.0  # how long an empty GPU stays before it is given back
    initial_gpus: int = 0  # ready at time 0
    min_gpus: int = 0
    max_gpus: int | None = None  # None: no limit
    gpus_per_node: int = 1  # a node is given back when all its GPUs are
    max_requests_per_gpu: int | None = None
    kv_bytes_per_token: int = 131072  # 8B model, 16 bit, grouped-query attention
    link_bytes_per_s: float | None = None  # None: a KV migration takes no time
    link_latency_s: float = 0.0
    prefill_tokens_per_s: float | None = None  # None: prefill takes no time
    time_compression: float = 1.0  # arrivals come that many times faster
    copies: float = 1.0  # of the trace, at independent circular time shifts; < 1 thins it
    drop_larger: bool = True  # leave out requests larger than a GPU; else they are rejected
    measure_from_share: float = 0.0  # leave that first part of the trace out of the sums
    measure_drain: bool = True  # False: leave out what happens after the last arrival
    max_samples: int = 4000  # length of the time series at most
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("gpu_tokens", "epoch_tokens", "report_tokens", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("decode_tokens_per_s", "time_compression", "copies"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("startup_s", "idle_grace_s", "migration_price", "link_latency_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a number from 0 on, not {getattr(self, name)}")
        if self.max_gpus is not None:
            for name in ("initial_gpus", "spare_gpus", "min_gpus"):
                if getattr(self, name) > self.max_gpus:
                    raise ConfigError(
                        f"{name} ({getattr(self, name)}) exceeds max_gpus ({self.max_gpus})"
                    )

    @property
    def epoch_s(self) -> float:
        return self.epoch_tokens / self.decode_tokens_per_s

    @property
    def growth_tokens(self) -> int:
        """What a request grows between two reports."""
        return min(self.report_tokens, self.epoch_tokens)

    @property
    def report_s(self) -> float:
        return self.growth_tokens / self.decode_tokens_per_s


class EventSink(Protocol):
    """Where the events of a run go, in order of time.

    ``event`` and its fields: ``gpu_open`` (gpu, capacity_tokens), ``gpu_close`` (gpu), ``place``
    (request, gpu, tokens), ``grow`` (request, gpu, tokens), ``migrate`` (request, src, dst,
    tokens, mode), ``preempt`` (request, gpu, tokens), ``finish`` (request, gpu, tokens).
    ``gpu`` is a string. With copies, ``request`` is the row of the superposed trace (see
    ``transform.prepare``), in order of arrival.
    """

    def emit(self, t: float, event: str, **fields: Any) -> None: ...


@dataclass
class Timeline:
    """Columns of equal length, one entry per sampled epoch."""

    t: list[float] = field(default_factory=list)
    gpus: list[int] = field(default_factory=list)  # open or starting
    lower_bound: list[int] = field(default_factory=list)
    used_tokens: list[int] = field(default_factory=list)
    migrated_tokens: list[int] = field(default_factory=list)  # since the start
    queued: list[int] = field(default_factory=list)


@dataclass
class SimResult:
    """Sums over the measured part of one run. GPU-seconds count whole GPUs."""

    options: SimOptions
    requests: int = 0  # of the prepared trace
    finished: int = 0
    rejected: int = 0
    dropped: int = 0  # larger than a GPU, left out before the run
    total_tokens: int = 0  # prompt + output of the requests that arrived in the measured part
    duration_s: float = 0.0  # of the measured part
    gpu_seconds: float = 0.0  # GPUs that hold requests
    billed_gpu_seconds: float = 0.0  # open or starting, spares and idle grace included
    lower_bound_gpu_seconds: float = 0.0  # max of the two below, instant by instant
    volume_gpu_seconds: float = 0.0  # ceil(sum of sizes / capacity)
    l2_gpu_seconds: float = 0.0  # Martello-Toth
    migrations: int = 0
    migrated_tokens: int = 0
    migrations_by_reason: dict[str, int] = field(default_factory=dict)
    migrated_tokens_by_reason: dict[str, int] = field(default_factory=dict)
    migrated_tokens_by_mode: dict[str, int] = field(default_factory=dict)
    preemptions: int = 0
    delayed_requests: int = 0  # not placed in the epoch in which they arrived, or preempted
    delay_p50_s: float = 0.0  # over the delayed ones
    delay_p99_s: float = 0.0
    demand_short_share: float = 0.0  # token-seconds waiting / token-seconds demanded
    peak_gpus: int = 0
    peak_lower_bound: int = 0
    scheduler_events: int = 0  # events handled; a growth report counts as one
    scheduler_seconds: float = 0.0  # process time spent in them
    timeline: Timeline = field(default_factory=Timeline)

    @property
    def ratio(self) -> float:
        """GPU-seconds over the lower bound's."""
        return self.gpu_seconds / max(self.lower_bound_gpu_seconds, 1e-12)

    @property
    def billed_ratio(self) -> float:
        return self.billed_gpu_seconds / max(self.lower_bound_gpu_seconds, 1e-12)

    @property
    def recourse(self) -> float:
        """Migrated tokens per token of prompt and output."""
        return self.migrated_tokens / max(self.total_tokens, 1)

    def cost(self, price: float) -> float:
        """J(price): (GPU-seconds + price x migrated tokens) / lower-bound GPU-seconds."""
        spent = self.gpu_seconds + price * self.migrated_tokens
        return spent / max(self.lower_bound_gpu_seconds, 1e-12)
