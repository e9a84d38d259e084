"""What the scheduler is told and what it answers: the contract between it and its two drivers,
the live Router and the simulator.

Sizes are plain integers in the driver's unit: KV blocks live, KV tokens in a simulation. Time is
a float of seconds from any origin, passed beside the event; the scheduler never reads a clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

MigrationMode = Literal["kv", "token", "hybrid"]


# --- events in -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arrive:
    """A new request, or one that lost its GPU and needs a place again."""

    request: str
    model: str
    size: int  # what it holds once its known tokens are computed
    max_size: int  # what it holds at most, at its token limit
    priority: int = 0
    prefix: tuple[bytes, ...] = ()  # chained block hashes of its prompt, first block first
    exclude: tuple[str, ...] = ()  # GPUs that must not get it (one that just failed it)
    tenant: str | None = None  # who shares fairly with others; None: places come in turn
    weight: float = 1.0  # of the tenant


@dataclass(frozen=True, slots=True)
class Adopt:
    """A request that already runs on a GPU (the Router was restarted)."""

    request: str
    model: str
    gpu: str
    size: int
    max_size: int
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Grow:
    """Step report: the present sizes of requests, many at once."""

    sizes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Finish:
    """The request ended, was aborted, or left the queue."""

    request: str


@dataclass(frozen=True, slots=True)
class GpuReady:
    gpu: str
    model: str
    capacity: int
    node: str = ""
    max_requests: int = 1 << 30
    kv_bytes_per_token: int | None = None  # None: as configured
    # How many tokens must lie before one for it to take twice as long to prefill as the first.
    attention_doubles_at: float = math.inf
    woken: bool = False  # it slept before
    took_s: float | None = None  # from when it had its place; None: from when it was asked for


@dataclass(frozen=True, slots=True)
class GpuAsleep:
    """A GPU sleeps of which the scheduler does not know it: the Router was restarted, or one that
    was to be woken could not be."""

    gpu: str
    model: str


@dataclass(frozen=True, slots=True)
class GpuLost:
    """The GPU died, awake or asleep. Its requests are forgotten; the driver brings them back as
    ``Arrive``."""

    gpu: str


@dataclass(frozen=True, slots=True)
class Contended:
    """By model, how many of the GPUs that were asked for wait for a place, as those of others have
    them all. Models that are not named have none; holds until the next event of this kind."""

    waiting: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class StepTime:
    """One observed engine step, from which the step-time model of the GPU is fitted."""

    gpu: str
    sequences: int
    resident_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Cordon:
    """Operator: nothing new goes to this GPU (or does again)."""

    gpu: str
    cordoned: bool = True


@dataclass(frozen=True, slots=True)
class Evacuate:
    """Empty this GPU by migration and release it. ``urgent``: as fast as its bytes move, whatever
    limits there are for moves that can wait. From here on it counts neither towards the minimum
    nor the maximum of its model: one comes in its place where the rest has no room."""

    gpu: str
    urgent: bool = True


@dataclass(frozen=True, slots=True)
class Outdate:
    """This GPU is about to be replaced: what leaves another goes to a newer one if any has room,
    and nothing moves of its own accord while there are such GPUs."""

    gpu: str


@dataclass(frozen=True, slots=True)
class MigrateRequest:
    """Operator: move this request, to ``dst`` or to wherever it fits best."""

    request: str
    dst: str | None = None
    mode: MigrationMode | None = None


@dataclass(frozen=True, slots=True)
class MigrationDone:
    request: str
    src: str
    dst: str
    mode: MigrationMode
    tokens: int
    bytes: int
    seconds: float
    copy_seconds: float = 0.0  # of these, what grew with the request's size; 0: not measured
    cached_tokens: int = 0  # leading tokens that were at the target before, not among ``tokens``


@dataclass(frozen=True, slots=True)
class MigrationFailed:
    """The request still runs on ``src``."""

    request: str
    src: str
    dst: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class AcquireFailed:
    """A GPU that was asked for did not come."""

    model: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Tick:
    """The planning epoch."""


Event = (
    Arrive
    | Adopt
    | Grow
    | Finish
    | GpuReady
    | GpuAsleep
    | GpuLost
    | Contended
    | StepTime
    | Cordon
    | Evacuate
    | Outdate
    | MigrateRequest
    | MigrationDone
    | MigrationFailed
    | AcquireFailed
    | Tick
)


# --- decisions out -------------------------------------------------------------------------
# The two that there are most of are not frozen: that would make them three times as dear.


@dataclass(slots=True)
class Place:
    request: str
    gpu: str


@dataclass(frozen=True, slots=True)
class Queue:
    """No room now; the scheduler keeps the request and places it later by itself."""

    request: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Reject:
    """The request can never be placed (larger than any GPU of its model)."""

    request: str
    reason: str


@dataclass(slots=True)
class Migrate:
    """Start moving the request now. Room at ``dst`` is reserved in the scheduler's books until
    ``MigrationDone`` or ``MigrationFailed`` is reported; the source stays booked as well."""

    request: str
    src: str
    dst: str
    mode: MigrationMode
    reason: str  # "consolidate" | "overflow" | "make-room" | "balance" | "evacuate" | "operator"
    urgent: bool = False  # of an ``Evacuate`` that is


@dataclass(frozen=True, slots=True)
class AcquireGpu:
    model: str
    reason: str = ""
    wake: str | None = None  # the sleeping GPU that should come back, rather than a new one


@dataclass(frozen=True, slots=True)
class WithdrawGpu:
    """One GPU that was asked for need not come, the latest if they are alike; the scheduler counts
    on it no longer. If all have come meanwhile, nothing is to be done."""

    model: str


@dataclass(frozen=True, slots=True)
class ReleaseGpu:
    """The GPU is empty and superfluous; the scheduler has already forgotten it. ``sleep``: it is
    to sleep, and counts as a sleeping one from now on."""

    gpu: str
    sleep: bool = False


@dataclass(frozen=True, slots=True)
class Preempt:
    """Take the request off its GPU and keep its tokens; the scheduler has queued it again."""

    request: str
    gpu: str


Decision = Place | Queue | Reject | Migrate | AcquireGpu | WithdrawGpu | ReleaseGpu | Preempt
