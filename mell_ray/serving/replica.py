"""The GPU replica: one Ray actor that owns one accelerator.

Two event loops serve its calls: the default group carries the data path (submit, cancel, the token
streams), the ``control`` group the Router's polls and migrations, so that neither waits for the
other. The engine has a thread of its own. State that more than one of them touches is changed only
in the engine thread.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

import ray

from mell_ray.engine.loop import EngineLoop
from mell_ray.engine.types import EngineStats, RequestState, StepOutput
from mell_ray.errors import ConflictError, FencedError
from mell_ray.migration.faults import Faults
from mell_ray.migration.source import MigrationSource
from mell_ray.migration.target import MigrationTarget
from mell_ray.migration.types import (
    MigrationOrder,
    Settlement,
)
from mell_ray.observability.recorder import RayRecorder
from mell_ray.observability.replica import ReplicaMeter
from mell_ray.observability.spans import EngineSpans
from mell_ray.observability.tracing import make_tracer
from mell_ray.serving.heap import keep_trimmed
from mell_ray.serving.housekeeping import Housekeeping
from mell_ray.serving.listener import Address
from mell_ray.serving.loading import loading_turn
from mell_ray.serving.logs import configure_logging
from mell_ray.serving.mover import Mover
from mell_ray.serving.outbox import Outbox
from mell_ray.serving.peer_calls import Sources
from mell_ray.serving.replica_migration import MigrationCalls, control
from mell_ray.serving.shared_objects import RayMemory
from mell_ray.serving.token_socket import token_listener
from mell_ray.serving.versions import weights_hash
from mell_ray.serving.wire import (
    Evicted,
    ReplicaInfo,
    ReplicaReport,
    ReplicaSpec,
    SleepOutcome,
    StepSample,
    StreamItem,
    encode_delta,
)
from mell_ray.simulation.modelspec import attention_doubles_at

if TYPE_CHECKING:
    # Whoever looks up the actor imports this module, and torch takes seconds.
    from mell_ray.engine import Engine

logger = logging.getLogger(__name__)

T = TypeVar("T")

HEARTBEAT_S = 1.0
REMEMBERED_EVICTIONS = 1024
REMEMBERED_ENDS = 4096  # between two reports to the Router


class GPUReplica(MigrationCalls):
    """See the module. Created by the fleet with ``ray.remote``."""

    def __init__(self, spec: ReplicaSpec) -> None:
        configure_logging(spec.log_level)
        born = time.monotonic()
        self._spec = spec
        self._engine = self._make_engine()
        self._loop = EngineLoop(self._engine, self._on_step, self._on_fatal)
        self._source = MigrationSource(spec.migration.timeout_s)
        self._target = MigrationTarget(spec.migration.timeout_s)
        self.faults = Faults.from_environment()
        self._mover = Mover(
            self.in_engine,
            self._source,
            self._target,
            Sources(spec.namespace, self.faults),
            spec,
            self._engine.block_nbytes,
            RayMemory.here(),
        )
        self._outboxes: dict[str, Outbox] = {}
        self._ingress_of: dict[str, str] = {}  # request id -> ingress id
        self._listener = token_listener(self._items)
        self._ended: collections.deque[tuple[str, int]] = collections.deque(maxlen=REMEMBERED_ENDS)
        self._evicted: dict[str, int] = {}  # request id -> generation that lost its place
        self._incarnation = 0
        self._retired = False
        self._holders: list[asyncio.Event] = []  # each set when that holder may go
        self._step: StepSample | None = None
        self._changed: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        recorder = RayRecorder("replica")
        recorder.start_from_zero(spec.llm.model_id)
        self._meter = ReplicaMeter(recorder, spec.llm.model_id, spec.replica_id, born)
        self._spans = EngineSpans(make_tracer(spec.tracing, "replica"), spec.replica_id)
        self._loop.start()
        self._housekeeping = Housekeeping(
            self, spec.namespace, spec.lease_s, spec.migration.freeze_limit_s
        )
        self._housekeeping.start()
        keep_trimmed()

    def _make_engine(self) -> Engine:
        spec = self._spec
        with loading_turn():
            from mell_ray.serving.model_source import build_engine

            return build_engine(spec.llm, spec.device, share_weights=spec.share_weights)

    # --- engine thread ---------------------------------------------------------------------

    def _on_step(self, output: StepOutput) -> None:
        self._mover.stepped(output)
        self._step = StepSample(
            output.num_decode_tokens + (output.num_prefill_tokens > 0),
            output.num_resident_tokens,
            output.seconds,
        )
        self._spans.stepped(output)
        per_ingress: dict[str, list] = {}
        for delta in output.deltas:
            ingress = self._ingress_of.get(delta.request_id)
            if delta.finish_reason is not None:
                self._ingress_of.pop(delta.request_id, None)
                self._ended.append((delta.request_id, delta.generation))
                self._notify_router()
            if ingress is not None:
                per_ingress.setdefault(ingress, []).append(encode_delta(delta))
        for ingress, deltas in per_ingress.items():
            self._outbox(ingress).put(deltas)

    def _on_fatal(self) -> None:
        # Ray tells everybody at once that the actor died; each stream is then continued elsewhere.
        logging.shutdown()
        os._exit(1)

    def _notify_router(self) -> None:
        changed = self._changed
        if changed is not None:
            loop, event = changed
            loop.call_soon_threadsafe(event.set)

    def _outbox(self, ingress_id: str) -> Outbox:
        return self._outboxes.setdefault(ingress_id, Outbox())

    def _forget(self, engine: Engine, request_id: str) -> bool:
        self._ingress_of.pop(request_id, None)
        generation = engine.generation_of(request_id)
        if generation is not None:
            self._ended.append((request_id, generation))
        self._spans.left(request_id, "dropped")
        return engine.abort(request_id)

    def in_engine(self, function: Callable[[Engine], T]) -> asyncio.Future[T]:
        """Run ``function`` in the engine thread, between two steps."""
        return asyncio.wrap_future(self._loop.call(function))

    # --- data path -------------------------------------------------------------------------

    async def open_socket(self) -> Address | None:
        """Where an ingress finds its token stream; None: ``open_stream`` is the only way."""
        return await self._listener.address(ray.util.get_node_ip_address())

    async def open_stream(self, ingress_id: str) -> AsyncIterator[StreamItem]:
        """The ingress's token stream through Ray."""
        async with aclosing(self._items(ingress_id)) as items:
            async for item in items:
                yield item

    async def _items(self, ingress_id: str) -> AsyncGenerator[StreamItem, None]:
        """Everything the ingress must be told, one item per engine step, a heartbeat in between.
        A newer stream ends an older one."""
        outbox = self._outbox(ingress_id)
        outbox.streams += 1
        mine = outbox.streams
        outbox.last_seen = time.monotonic()
        yield StreamItem()
        while outbox.streams == mine:
            yield await outbox.take(HEARTBEAT_S)

    async def submit(self, state: RequestState) -> None:
        """Accept a new or recovered request.

        Raises:
            InvalidRequestError: it can never run here.
            FencedError: this replica is being released, or a newer owner is here.
        """

        def accept(engine: Engine) -> None:
            if self._retired:
                raise FencedError(f"replica {self._spec.replica_id} is being released")
            engine.validate(state)
            if state.generation <= self._evicted.get(state.request_id, -1):
                raise FencedError(f"{state.request_id} has lost its place here")
            present = engine.generation_of(state.request_id)
            if present is not None:
                if present >= state.generation:
                    raise FencedError(f"{state.request_id} is here with generation {present}")
                engine.abort(state.request_id)
            self._target.give_way(engine, state.request_id)
            engine.add(state)
            self._spans.arrived(state)
            self._ingress_of[state.request_id] = state.ingress_id

        await self.in_engine(accept)
        self._outbox(state.ingress_id).last_seen = time.monotonic()

    async def cancel(self, request_ids: list[str]) -> None:
        """Drop requests and free their blocks; unknown ids are fine."""

        def drop(engine: Engine) -> None:
            for request_id in request_ids:
                self._forget(engine, request_id)
            self._notify_router()

        await self.in_engine(drop)

    async def keepalive(self, ingress_id: str) -> None:
        """Show that the ingress lives; without it its requests are dropped after a while."""
        self._outbox(ingress_id).last_seen = time.monotonic()

    # --- control: Router -------------------------------------------------------------------

    @control
    async def info(self) -> ReplicaInfo:
        engine, spec = self._engine, self._spec
        return ReplicaInfo(
            replica_id=spec.replica_id,
            model_id=spec.llm.model_id,
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            device=spec.device,
            kernels=engine.kernels,
            capacity_blocks=engine.capacity_blocks,
            block_size=engine.block_size,
            block_nbytes=engine.block_nbytes,
            max_model_len=engine.max_model_len,
            max_num_seqs=spec.llm.engine_kwargs.max_num_seqs,
            config_hash=spec.config_hash,
            weights=weights_hash(spec.llm),
            kv_format=engine.kv_format,
            gpu_uuid=self._mover.gpu_uuid,
            devices=spec.slot.devices if spec.slot else "",
            asleep=engine.asleep,
            lends=spec.slot is not None,
            transports=tuple(self._mover.transports),
            attention_doubles_at=attention_doubles_at(engine.model_config),
        )

    @control
    async def report(self, incarnation: int, wait_s: float) -> ReplicaReport:
        """Renew the lease and report; waits up to ``wait_s`` for something to have ended.

        Raises:
            FencedError: a newer Router has spoken already.
        """
        self._fence(incarnation)
        if wait_s > 0 and not self._ended:
            event = asyncio.Event()
            self._changed = (asyncio.get_running_loop(), event)
            try:
                async with asyncio.timeout(wait_s):
                    await event.wait()
            except TimeoutError:
                pass
        return await self.in_engine(self._make_report)

    def _make_report(self, engine: Engine) -> ReplicaReport:
        step, self._step = self._step, None
        ended, self._ended = tuple(self._ended), collections.deque(maxlen=REMEMBERED_ENDS)
        return ReplicaReport(
            self._spec.replica_id, engine.stats(), engine.sequences(), step, self._retired, ended
        )

    @control
    async def retire(self, incarnation: int) -> bool:
        """Refuse everything from now on, provided nothing is here. The Router may then kill it."""
        self._fence(incarnation)

        def close(engine: Engine) -> bool:
            if not self._retired and not engine.sequences() and not len(self._target):
                self._retired = True
            return self._retired

        return await self.in_engine(close)

    @control
    async def sleep(self, incarnation: int) -> SleepOutcome:
        """Refuse everything and give up accelerator memory and slot until ``wake``, provided
        nothing is here."""
        self._fence(incarnation)

        def fall_asleep(engine: Engine) -> SleepOutcome:
            if engine.sequences() or engine.has_work() or len(self._target):
                return "busy"
            try:
                engine.sleep()
            except ConflictError as error:
                logger.warning("replica %s cannot sleep: %s", self._spec.replica_id, error)
                return "unable"
            self._retired = True
            return "asleep"

        outcome = await self.in_engine(fall_asleep)
        if outcome == "asleep":
            for holder in self._holders:
                holder.set()
        return outcome

    @control
    async def wake(self, incarnation: int) -> None:
        """Take weights and KV pool back and accept requests again."""
        self._fence(incarnation)

        def get_up(engine: Engine) -> None:
            engine.wake()
            self._retired = False

        await self.in_engine(get_up)

    @control
    async def keep_slot(self) -> None:
        """For the holder of its slot: returns when this replica falls asleep, at once if it has
        before the holder came to ask."""
        if self._engine.asleep:
            return
        done = asyncio.Event()
        self._holders.append(done)
        try:
            await done.wait()
        finally:
            self._holders.remove(done)

    @control
    async def evict(self, incarnation: int, request_id: str, generation: int) -> bool:
        """Give a request up; its ingress asks the Router for another place. If it is still on its
        way here it is refused when it comes. False: it is not here; it may have ended."""
        self._fence(incarnation)

        def give_up(engine: Engine) -> bool:
            self._evicted[request_id] = generation
            while len(self._evicted) > REMEMBERED_EVICTIONS:
                self._evicted.pop(next(iter(self._evicted)))
            present = engine.generation_of(request_id)
            if present != generation or self._source.is_leaving(request_id):
                return present is not None
            ingress = self._ingress_of.get(request_id)
            self._forget(engine, request_id)
            if ingress is not None:
                self._outbox(ingress).put(notices=[Evicted(request_id, generation)])
            return True

        return await self.in_engine(give_up)

    @control
    async def generation_of(self, request_id: str) -> int | None:
        return await self.in_engine(lambda e: e.generation_of(request_id))

    @control
    async def check(self) -> None:
        """Verify the engine's invariants; raises AssertionError."""
        await self.in_engine(lambda e: e.check())

    def _fence(self, incarnation: int) -> None:
        if incarnation < self._incarnation:
            raise FencedError(f"Router {incarnation} was replaced by {self._incarnation}")
        self._incarnation = incarnation
        self._housekeeping.renew_lease()

    # --- housekeeping (called from its thread) ---------------------------------------------

    def expire(self) -> None:
        """Drop what nobody will ever ask for again: requests of dead ingresses, reservations of
        dead migrations."""
        deadline = time.monotonic() - self._spec.ingress_timeout_s
        gone = {name for name, box in list(self._outboxes.items()) if box.last_seen < deadline}

        def drop(engine: Engine) -> EngineStats:
            self._mover.expire(engine)
            for request_id, ingress in list(self._ingress_of.items()):
                if ingress in gone:
                    logger.warning("ingress %s is gone: dropping %s", ingress, request_id)
                    self._forget(engine, request_id)
            return engine.stats()

        self._meter.sample(self._loop.call(drop).result())
        for name in gone:
            self._outboxes.pop(name, None)

    def busy(self) -> bool:
        return bool(self._ingress_of)

    def overdue(self, freeze_s: float) -> list[MigrationOrder]:
        return self._loop.call(lambda _: self._source.overdue(freeze_s)).result()

    def conclude(self, order: MigrationOrder, settlement: Settlement) -> None:
        """Act on the target's answer about a migration that its driver has left frozen."""
        migration_id = order.migration_id
        if settlement == "committed":
            self._loop.call(lambda e: self.release_moved(e, migration_id)).result()
        else:
            self._loop.call(lambda e: self._mover.thaw(e, migration_id)).result()
