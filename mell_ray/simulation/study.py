"""Several policies on one trace: the runs, what they are measured in, and every figure of them.

The simulator counts bins. Here a bin becomes what a person pays for: a replica of one or more
GPUs with a price, whose KV tokens have a size in bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mell_ray.simulation.types import SimOptions, SimResult, TraceRow

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Lengths:
    """Percentiles of a number of tokens."""

    p50: int
    p90: int
    p99: int
    max: int


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """What a trace is like, as it is given (before copies, compression and drops)."""

    name: str
    requests: int
    duration_s: float
    requests_per_s: float
    peak_requests_per_s: float  # of the busiest minute
    prompt: Lengths
    output: Lengths


@dataclass(frozen=True, slots=True)
class Assumption:
    """One figure that the result rests on, and whose word it is."""

    name: str
    value: str
    source: str  # "given", "model config", "estimate", "data sheet", "assumption"


@dataclass(frozen=True, slots=True)
class Run:
    """One policy's run. A variant runs the same policy again at another migration price."""

    label: str
    result: SimResult
    seconds: float  # wall time of the simulation
    variant: bool = False


@dataclass
class Study:
    """Runs of one trace and what turns their bins, tokens and seconds into GPUs, bytes, money."""

    title: str
    trace: TraceSummary
    runs: list[Run] = field(default_factory=list)
    migration_price: float = 1e-5  # replica-seconds a moved token costs, in every run's J
    gpus_per_replica: int = 1
    kv_bytes_per_token: float | None = None  # None: bytes are not reported
    gpu_price_per_hour: float | None = None  # None: money is not reported
    assumptions: list[Assumption] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def percentile(ordered: Sequence[int], share: float) -> int:
    """The smallest value that at least ``share`` of the (sorted) values do not exceed."""
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def summarise(name: str, rows: Sequence[TraceRow]) -> TraceSummary:
    """Describe a trace. ``rows`` are in order of arrival and not empty."""
    duration = rows[-1].arrival_s - rows[0].arrival_s
    minutes: dict[int, int] = {}
    for row in rows:
        minute = int(row.arrival_s // 60)
        minutes[minute] = minutes.get(minute, 0) + 1
    return TraceSummary(
        name=name,
        requests=len(rows),
        duration_s=duration,
        requests_per_s=len(rows) / duration if duration else float(len(rows)),
        peak_requests_per_s=max(minutes.values()) / min(60.0, max(duration, 1.0)),
        prompt=_lengths([row.prompt_tokens for row in rows]),
        output=_lengths([row.output_tokens for row in rows]),
    )


def _lengths(values: list[int]) -> Lengths:
    values.sort()
    p50, p90, p99 = (percentile(values, share) for share in (0.5, 0.9, 0.99))
    return Lengths(p50, p90, p99, values[-1])


def total_tokens_p999(rows: Sequence[TraceRow]) -> int:
    """p99.9 of prompt + output: the size that a replica must be able to hold."""
    return percentile(sorted(row.prompt_tokens + row.output_tokens for row in rows), 0.999)


def figures(study: Study, run: Run) -> dict[str, Any]:
    """Every figure of one run by name, in whole-study units: GPUs (not replicas), bytes, dollars.

    Money is None without a price, bytes without a KV size. Nothing is rounded.
    """
    result, gpus = run.result, study.gpus_per_replica
    billed_hours = gpus * result.billed_gpu_seconds / HOUR_S
    price, kv_bytes = study.gpu_price_per_hour, study.kv_bytes_per_token
    seconds = max(result.duration_s, 1e-12)
    return {
        "run": run.label,
        "policy": run.result.options.policy,
        "gpu_hours": gpus * result.gpu_seconds / HOUR_S,
        "billed_gpu_hours": billed_hours,
        "lower_bound_gpu_hours": gpus * result.lower_bound_gpu_seconds / HOUR_S,
        "lower_bound_volume_gpu_hours": gpus * result.volume_gpu_seconds / HOUR_S,
        "lower_bound_l2_gpu_hours": gpus * result.l2_gpu_seconds / HOUR_S,
        "ratio": result.ratio,
        "billed_ratio": result.billed_ratio,
        "mean_gpus": gpus * result.gpu_seconds / seconds,
        "mean_lower_bound_gpus": gpus * result.lower_bound_gpu_seconds / seconds,
        "peak_gpus": gpus * result.peak_gpus,
        "peak_lower_bound_gpus": gpus * result.peak_lower_bound,
        "migrations": result.migrations,
        "migrations_per_request": result.migrations / max(result.finished, 1),
        "migrated_tokens": result.migrated_tokens,
        "migrated_bytes": None if kv_bytes is None else result.migrated_tokens * kv_bytes,
        "recourse": result.recourse,
        "migrations_by_reason": dict(result.migrations_by_reason),
        "migrated_tokens_by_reason": dict(result.migrated_tokens_by_reason),
        "migrated_tokens_by_mode": dict(result.migrated_tokens_by_mode),
        "migration_price": result.options.migration_price,
        "cost_j": result.cost(study.migration_price),
        "billed_usd": None if price is None else billed_hours * price,
        "usd_per_million_tokens": None
        if price is None
        else billed_hours * price / max(result.total_tokens, 1) * 1e6,
        "requests": result.requests,
        "finished": result.finished,
        "rejected": result.rejected,
        "dropped": result.dropped,
        "total_tokens": result.total_tokens,
        "preemptions": result.preemptions,
        "delayed_requests": result.delayed_requests,
        "delayed_share": result.delayed_requests / max(result.finished, 1),
        "delay_p50_s": result.delay_p50_s,
        "delay_p99_s": result.delay_p99_s,
        "demand_short_share": result.demand_short_share,
        "duration_s": result.duration_s,
        "scheduler_events": result.scheduler_events,
        "scheduler_seconds": result.scheduler_seconds,
        "simulation_seconds": run.seconds,
    }


def best_run(study: Study) -> Run:
    """The policy that bills least; of equals the one that moves least, then the first."""
    runs = [run for run in study.runs if not run.variant]
    return min(runs, key=lambda run: (run.result.billed_gpu_seconds, run.result.migrated_tokens))


def reference_run(study: Study) -> Run:
    """The run whose lower bound stands for the load: the one in which requests waited least.

    The bound is taken over the requests present at an instant, so each run has its own where
    requests wait; they are the same where none do.
    """
    return min(study.runs, key=lambda run: run.result.demand_short_share)


def billed_over_bound(study: Study, run: Run) -> tuple[float, float]:
    """(the load's lower bound in GPU-hours, what ``run`` bills as a multiple of it)."""
    bound = figures(study, reference_run(study))["lower_bound_gpu_hours"]
    return bound, figures(study, run)["billed_gpu_hours"] / max(bound, 1e-12)


def saving(run: Run, other: Run) -> float:
    """The share of ``other``'s billed GPU-hours that ``run`` does without."""
    return 1 - run.result.billed_gpu_seconds / max(other.result.billed_gpu_seconds, 1e-12)


def as_json(study: Study) -> dict[str, Any]:
    """The whole study as JSON-able values: all figures, options and time series."""
    return {
        "title": study.title,
        "trace": dataclasses.asdict(study.trace),
        "migration_price": study.migration_price,
        "gpus_per_replica": study.gpus_per_replica,
        "kv_bytes_per_token": study.kv_bytes_per_token,
        "gpu_price_per_hour": study.gpu_price_per_hour,
        "assumptions": [dataclasses.asdict(item) for item in study.assumptions],
        "notes": list(study.notes),
        "runs": [
            {
                **figures(study, run),
                "options": _options_json(run.result.options),
                "timeline": dataclasses.asdict(run.result.timeline),
            }
            for run in study.runs
        ],
    }


def _options_json(options: SimOptions) -> dict[str, Any]:
    return {**dataclasses.asdict(options), "params": dict(options.params)}
