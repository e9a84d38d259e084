"""Every metric of mell-ray, in one table. Code records by these names and no others.

Ray puts ``ray_`` in front of a name when it exports it, and adds labels of its own (``WorkerId``,
``NodeAddress``, ``SessionName``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Source = Literal["ingress", "replica", "router"]

PREFIX = "ray_"

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0),
)
STALL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
EPOCH_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
BYTES = tuple(float(1 << shift) for shift in range(12, 36, 2))
STAGES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. ``source`` is the kind of process that records it. ``from_zero``: counters that
    exist with 0 from the start for each model, so that their first increase is seen as one;
    ``values``: of the label beside the model, all there are."""

    name: str
    kind: Kind
    help: str
    source: Source
    labels: tuple[str, ...] = ("model",)
    buckets: tuple[float, ...] = ()
    from_zero: bool = False
    values: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        """The name in Prometheus; a histogram's series add ``_bucket``, ``_sum`` or ``_count``."""
        return PREFIX + self.name


METRICS = (
    Metric(
        "mell_gpus",
        "gauge",
        "GPUs by state: starting, active (with requests), idle, cordoned, draining, asleep (given "
        "back while its replica sleeps), lent (given back, and somebody else has it).",
        "router",
        ("model", "state"),
    ),
    Metric(
        "mell_gpus_lower_bound",
        "gauge",
        "GPUs that the present requests need at least, whatever the scheduler (bin-packing bound).",
        "router",
        (),
    ),
    Metric(
        "mell_requests",
        "gauge",
        "Requests by state: queued at the Router, waiting on a replica, running, migrating.",
        "router",
        ("model", "state"),
    ),
    Metric(
        "mell_scheduler_epoch_seconds",
        "histogram",
        "Time of one planning epoch of the scheduler, its decisions handed out.",
        "router",
        (),
        EPOCH_SECONDS,
    ),
    Metric(
        "mell_migrations_total",
        "counter",
        "Migrations ended, by mode (kv, token, hybrid), reason and outcome (committed, aborted, or "
        "gone: the request had left its source meanwhile).",
        "router",
        ("mode", "reason", "outcome"),
    ),
    Metric(
        "mell_migration_stall_seconds",
        "histogram",
        "Freeze to commit of a committed migration: the part in which nobody decodes.",
        "router",
        ("mode",),
        STALL_SECONDS,
    ),
    Metric(
        "mell_migration_seconds",
        "histogram",
        "Reservation to commit of a committed migration.",
        "router",
        ("mode",),
        SECONDS,
    ),
    Metric(
        "mell_migration_phase_seconds",
        "histogram",
        "Parts of a committed migration: reserve (room at the target, agreement of both ends), "
        "copy (live), hand-over (freeze to commit).",
        "router",
        ("mode", "phase"),
        SECONDS,
    ),
    Metric(
        "mell_migration_stages",
        "histogram",
        "Live copy rounds of a committed migration before its freeze.",
        "router",
        ("mode",),
        STAGES,
    ),
    Metric(
        "mell_migration_size_bytes",
        "histogram",
        "KV bytes that one committed migration moved.",
        "router",
        ("mode",),
        BYTES,
    ),
    Metric(
        "mell_migration_bytes_total",
        "counter",
        "KV bytes moved by migrations, whatever their outcome.",
        "router",
        ("mode",),
    ),
    Metric(
        "mell_gpu_seconds_total",
        "counter",
        "Seconds for which a GPU has been held, from the start of its replica's process.",
        "replica",
        from_zero=True,
    ),
    Metric(
        "mell_kv_blocks",
        "gauge",
        "KV blocks by state: used, cached (free, its prefix still known), free.",
        "replica",
        ("model", "replica", "state"),
    ),
    Metric(
        "mell_prefix_cache_query_tokens_total",
        "counter",
        "Tokens looked up in the prefix cache.",
        "replica",
        from_zero=True,
    ),
    Metric(
        "mell_prefix_cache_hit_tokens_total",
        "counter",
        "Tokens found in the prefix cache and not computed again.",
        "replica",
        from_zero=True,
    ),
    Metric(
        "mell_prefix_cache_evicted_blocks_total",
        "counter",
        "Cached KV blocks whose prefix was forgotten because somebody needed the room.",
        "replica",
        from_zero=True,
    ),
    Metric(
        "mell_preemptions_total",
        "counter",
        "Requests that lost their KV blocks for want of room and were computed again.",
        "replica",
        from_zero=True,
    ),
    Metric(
        "mell_queue_time_seconds",
        "histogram",
        "From a request's acceptance at the ingress to a place on a GPU.",
        "ingress",
        buckets=SECONDS,
    ),
    Metric(
        "mell_time_to_first_token_seconds",
        "histogram",
        "From a request's acceptance at the ingress to its first token there.",
        "ingress",
        buckets=SECONDS,
    ),
    Metric(
        "mell_time_per_output_token_seconds",
        "histogram",
        "Mean time per output token after the first, one value a request.",
        "ingress",
        buckets=TOKEN_SECONDS,
    ),
    Metric(
        "mell_inter_token_latency_seconds",
        "histogram",
        "Gaps between deliveries of one request; where there are many, an even sample of at most "
        "64 a second and ingress.",
        "ingress",
        buckets=TOKEN_SECONDS,
    ),
    Metric(
        "mell_prompt_tokens_total",
        "counter",
        "Prompt tokens of requests that got a first token.",
        "ingress",
        from_zero=True,
    ),
    Metric(
        "mell_generation_tokens_total",
        "counter",
        "Output tokens delivered, each once.",
        "ingress",
        from_zero=True,
    ),
    Metric(
        "mell_requests_finished_total",
        "counter",
        "Requests ended, by outcome: stop, length, error, refused, cancelled (the client left).",
        "ingress",
        ("model", "outcome"),
        from_zero=True,
        values=("stop", "length", "error", "refused", "cancelled"),
    ),
    Metric(
        "mell_recoveries_total",
        "counter",
        "Requests continued elsewhere because their replica died or gave them up.",
        "ingress",
        ("model", "cause"),
        from_zero=True,
        values=("died", "evicted"),
    ),
    Metric(
        "mell_exactly_once_violations_total",
        "counter",
        "Token deltas that broke the ownership rules and were refused. Must stay 0.",
        "ingress",
        from_zero=True,
    ),
)

BY_NAME = {metric.name: metric for metric in METRICS}
