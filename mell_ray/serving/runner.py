"""Carries one request from placement to its last token, whatever happens to replicas meanwhile."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field

from ray.exceptions import RayActorError, RayTaskError

from mell_ray.engine.types import RequestState, SamplingParams
from mell_ray.errors import (
    ConflictError,
    FencedError,
    InvalidRequestError,
    MellError,
    ServerError,
)
from mell_ray.observability.clock import RequestClock
from mell_ray.observability.pulse import Pulse
from mell_ray.observability.recorder import Recorder
from mell_ray.observability.requests import FLUSH_S, RequestMeter
from mell_ray.observability.spans import ChoiceSpan
from mell_ray.observability.tracing import Tracer
from mell_ray.serving.links import ReplicaGone, ReplicaLinks
from mell_ray.serving.mailbox import Mailbox
from mell_ray.serving.prefix import prompt_prefix
from mell_ray.serving.ray_errors import unwrap
from mell_ray.serving.router_client import RouterClient
from mell_ray.serving.track import Accepted, Track
from mell_ray.serving.wire import (
    Evicted,
    Lease,
    Migrating,
    Moved,
    PlaceRequest,
    Share,
    StreamItem,
)

logger = logging.getLogger(__name__)

# A request that kills every replica it touches must not kill them all.
MAX_RECOVERIES_WITHOUT_PROGRESS = 3


@dataclass(frozen=True, slots=True)
class Lost:
    """The replica that owned the request is gone, or gave the request up."""

    replica_id: str
    died: bool


@dataclass(slots=True)
class Live:
    job: Job
    span: ChoiceSpan
    track: Track
    events: Mailbox[Accepted | Lost]


@dataclass(frozen=True, slots=True)
class Job:
    """What the ingress wants generated: one choice of one request."""

    request_id: str
    model_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    clock: RequestClock = field(default_factory=RequestClock)
    traceparent: str = ""  # of the span that it belongs to; "": not traced
    share: Share | None = None  # whose it is, where places are shared fairly


class Runner:
    """All requests of one ingress; ``block_sizes`` of the prefix cache of each model, 0: none."""

    def __init__(
        self,
        namespace: str,
        ingress_id: str,
        router: RouterClient,
        block_sizes: Mapping[str, int],
        recorder: Recorder,
        tracer: Tracer | None,
    ) -> None:
        self._tracer = tracer
        self._ingress_id = ingress_id
        self._router = router
        self._live: dict[str, Live] = {}
        self._links = ReplicaLinks(namespace, ingress_id, self._on_item, self._on_lost)
        self._block_sizes = block_sizes
        self._meter = RequestMeter(recorder, block_sizes, self._tell)
        self._telling: asyncio.Task[None] | None = None
        self._links.spawn(self._flush_meter())

    async def run(self, job: Job) -> AsyncGenerator[Accepted, None]:
        """Generate. The caller may stop early (``aclose``): the request is then dropped.

        Raises:
            MellError: the request is refused or failed for good.
        """
        if job.request_id in self._live:
            raise ConflictError(f"request {job.request_id} is running already; use another id")
        track = Track(job.request_id, replica_id="", generation=0)
        span = ChoiceSpan(
            self._tracer,
            job.traceparent,
            job.request_id,
            job.model_id,
            len(job.prompt_token_ids),
        )
        live = Live(job, span, track, Mailbox())
        outcome = "cancelled"
        self._live[job.request_id] = live
        try:
            await self._start(live, lost=None)
            failures = 0
            while not track.finished or len(live.events):
                event = await live.events.get()
                if isinstance(event, Accepted):
                    event = _with_what_waits(event, live.events)
                    failures = 0
                    outcome = event.finish_reason or outcome
                    if event.error is not None:
                        raise ServerError(event.error)
                    yield event
                elif event.replica_id == track.replica_id and not track.finished:
                    failures += event.died
                    if failures > MAX_RECOVERIES_WITHOUT_PROGRESS:
                        raise ServerError(
                            f"{failures} replicas died one after another with this request"
                        )
                    self._meter.lost(job.model_id, job.clock, died=event.died)
                    await self._start(live, lost=event.replica_id)
        except Exception as error:
            refused = isinstance(error, MellError) and not isinstance(error, ServerError)
            outcome = "refused" if refused else "error"
            raise
        finally:
            if job.clock.stopped:
                outcome = "stop"
            self._meter.finished(job.model_id, job.clock, outcome)
            span.end(job.clock, outcome)
            del self._live[job.request_id]
            if not track.finished:
                self._abandon(track)

    async def _start(self, live: Live, lost: str | None) -> None:
        """Get a place and bring the request there, with all tokens received so far."""
        job, track = live.job, live.track
        block_size = self._block_sizes[job.model_id]
        prefix = prompt_prefix(job.model_id, job.prompt_token_ids, block_size)
        while True:
            lease = await self._router.place(
                PlaceRequest(
                    request_id=job.request_id,
                    ingress_id=self._ingress_id,
                    model_id=job.model_id,
                    num_tokens=len(job.prompt_token_ids) + len(track.token_ids),
                    max_total_tokens=len(job.prompt_token_ids) + job.sampling.max_tokens,
                    priority=job.priority,
                    generation=track.generation,
                    lost_replica=lost,
                    traceparent=live.span.traceparent,
                    prefix=prefix,
                    share=job.share,
                )
            )
            track.take_over(lease.replica_id, lease.generation)
            self._meter.placed(job.model_id, job.clock)
            try:
                actor = await self._links.ensure(lease.replica_id)
                if not lease.existing:
                    await actor.submit.remote(self._state(live, lease))
                return
            except (ReplicaGone, RayActorError):
                lost = lease.replica_id
            except RayTaskError as error:
                cause = unwrap(error)
                if not isinstance(cause, FencedError):
                    raise cause from None
                lost = lease.replica_id

    def _state(self, live: Live, lease: Lease) -> RequestState:
        job, track = live.job, live.track
        return RequestState(
            request_id=job.request_id,
            prompt_token_ids=job.prompt_token_ids,
            sampling=job.sampling,
            arrival_s=lease.arrival_s,
            priority=job.priority,
            generation=lease.generation,
            output_token_ids=list(track.token_ids),
            output_logprobs=list(track.logprobs),
            ingress_id=self._ingress_id,
            traceparent=live.span.traceparent,
        )

    def _abandon(self, track: Track) -> None:
        if track.replica_id:
            self._links.cancel(track.replica_id, [track.request_id])
        self._links.spawn(self._router.call("forget", [track.request_id]))

    # --- metrics ---------------------------------------------------------------------------

    async def _flush_meter(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            self._meter.flush()

    def _tell(self, pulse: Pulse) -> None:
        """Let the Router know, one pulse at a time: while it is being replaced they are lost."""
        if self._telling is None or self._telling.done():
            self._telling = self._links.spawn(self._tell_router(pulse))

    async def _tell_router(self, pulse: Pulse) -> None:
        try:
            await self._router.call("tell", pulse)
        except MellError as error:
            logger.info("a pulse was lost: %s", error)

    # --- streams ---------------------------------------------------------------------------

    def _on_item(self, replica_id: str, item: StreamItem) -> None:
        strays: list[str] = []
        now = time.monotonic()
        for delta in item.deltas:
            live = self._live.get(delta[0])
            if live is None:
                if delta[5] is None:
                    strays.append(delta[0])
                continue
            before = live.track.violations
            accepted = live.track.accept(replica_id, delta)
            if accepted is not None:
                live.events.put(accepted)
                if accepted.token_ids:
                    self._delivered(live, now, replica_id, delta[1], len(accepted.token_ids))
            elif delta[5] is None and live.track.is_ahead(delta):
                strays.append(delta[0])
            if live.track.violations > before:
                self._meter.violated(live.job.model_id)
                what = live.track.last_violation
                logger.error("exactly-once violated: %s by %s (%s)", delta[0], replica_id, what)
                self._links.spawn(self._router.call("violated", 1))
        if strays:
            self._links.cancel(replica_id, strays)
        for notice in item.notices:
            self._on_notice(replica_id, notice)

    def _delivered(
        self, live: Live, now: float, replica_id: str, generation: int, num_tokens: int
    ) -> None:
        job = live.job
        self._meter.delivered(
            job.model_id,
            job.clock,
            now,
            replica_id,
            generation,
            num_tokens,
            len(job.prompt_token_ids),
        )
        stall = live.track.came(now)
        if stall is not None:
            self._links.spawn(self._router.call("handed_over", [stall]))

    def _on_notice(self, replica_id: str, notice: Migrating | Moved | Evicted) -> None:
        live = self._live.get(notice.request_id)
        if live is None:
            return
        if isinstance(notice, Evicted):
            live.events.put(Lost(replica_id, died=False))
            return
        if isinstance(notice, Moved):
            live.track.follow(replica_id, notice.dst)
        self._links.spawn(self._connect(notice.dst, live))

    async def _connect(self, replica_id: str, live: Live) -> None:
        try:
            await self._links.ensure(replica_id)
        except ReplicaGone:
            live.events.put(Lost(replica_id, died=True))

    def _on_lost(self, replica_id: str) -> None:
        for live in self._live.values():
            if live.track.replica_id == replica_id:
                live.events.put(Lost(replica_id, died=True))


def _with_what_waits(first: Accepted, events: Mailbox[Accepted | Lost]) -> Accepted:
    """What a client that lags behind gets at once: fewer, larger writes let it catch up."""
    while len(events):
        more = events.first()
        if isinstance(more, Lost):
            break
        events.pop()
        first = first.joined(more)
    return first


def check_fits(job: Job, limits: tuple[int, int] | None) -> None:
    """Refuse what no replica of the model can ever hold. ``limits``: context length and pool
    capacity in tokens, where a replica has told them.

    Raises:
        InvalidRequestError: names both lengths.
    """
    if limits is None:
        return
    total = len(job.prompt_token_ids) + job.sampling.max_tokens
    pool = limits[1]
    if total > pool:
        raise InvalidRequestError(
            f"prompt of {len(job.prompt_token_ids)} tokens plus max_tokens "
            f"{job.sampling.max_tokens} exceeds the {pool} tokens that a replica can hold; "
            "shorten the prompt or lower max_tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )
