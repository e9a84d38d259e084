"""Replicas without Serve, for measurements of what happens between them: real replica processes,
their token streams as an ingress reads them, and the Migrator's driver in this process."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass, field
from itertools import pairwise

import psutil

from mell_ray.config import LLMConfig, MellSettings
from mell_ray.engine.types import RequestState, SamplingParams
from mell_ray.migration.budget import Budgets, Slots
from mell_ray.migration.driver import DriverLimits, migrate
from mell_ray.migration.faults import Faults
from mell_ray.migration.transports import LinkTable
from mell_ray.migration.types import MigrationOrder, MigrationResult, Mode
from mell_ray.serving.fleet import Fleet, Replica, actor_class
from mell_ray.serving.links import ReplicaLinks
from mell_ray.serving.migrator import LinkWay, RaySource, RayTarget
from mell_ray.serving.replica import GPUReplica
from mell_ray.serving.track import Track
from mell_ray.serving.wire import Migrating, Moved, StreamItem

POLL_S = 0.001


@dataclass(slots=True)
class Watched:
    """One request and when its tokens came."""

    track: Track
    submitted_s: float
    token_s: list[tuple[float, int]] = field(default_factory=list)  # (when, how many)
    hand_over_s: dict[int, float] = field(default_factory=dict)  # generation -> gap around it
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def num_tokens(self) -> int:
        return len(self.track.token_ids)

    @property
    def ttft_s(self) -> float:
        return self.token_s[0][0] - self.submitted_s

    def gaps_s(self) -> list[float]:
        """Between deliveries, those around hand-overs included."""
        times = [at for at, _ in self.token_s]
        return [b - a for a, b in pairwise(times)]

    async def reached(self, num_tokens: int) -> None:
        while self.num_tokens < num_tokens and not self.track.finished:
            await asyncio.sleep(POLL_S)

    async def followed_to(self, replica_id: str) -> None:
        """Until the stream has told that the request lives there; commits are known earlier."""
        while self.track.replica_id != replica_id and not self.track.finished:
            await asyncio.sleep(POLL_S)


class Rig:
    """``count`` replicas of one model. Ray must be running; ``close`` kills the replicas."""

    def __init__(
        self, llm: LLMConfig, settings: MellSettings, replica: type[GPUReplica] = GPUReplica
    ) -> None:
        self._llm = llm
        self._namespace = f"mell-bench-{uuid.uuid4().hex[:8]}"
        self._ingress_id = uuid.uuid4().hex
        self._fleet = Fleet({llm.model_id: llm}, settings, self._namespace)
        self._fleet.replica_class = actor_class(replica)
        self._links = ReplicaLinks(self._namespace, self._ingress_id, self._on_item, lambda _: None)
        self._watched: dict[str, Watched] = {}
        self._config = settings.migration
        self._table = LinkTable(settings.migration.transports)
        self._slots = Slots(self._config.max_concurrent, self._config.max_concurrent_per_replica)
        self._no_faults = Faults(None)
        self._serial = 0
        self.replicas: list[Replica] = []

    async def open(self, count: int) -> None:
        await asyncio.gather(*(self.start() for _ in range(count)))

    async def start(self) -> Replica:
        """One replica more, and its stream."""
        replica = self._fleet.create(self._llm.model_id)
        self.replicas.append(replica)
        await self._fleet.wait_ready(replica)
        await self._links.ensure(replica.replica_id)
        return replica

    def close(self) -> None:
        for replica in self.replicas:
            self._fleet.kill(replica.replica_id)

    async def end(self, replica: Replica) -> None:
        """Kill one replica and wait until its process is gone."""
        self.replicas.remove(replica)
        self._fleet.kill(replica.replica_id)
        assert replica.info is not None
        while psutil.pid_exists(replica.info.pid):
            await asyncio.sleep(POLL_S)

    async def sleep(self, replica: Replica) -> None:
        outcome = await replica.actor.sleep.remote(0)
        assert outcome == "asleep", outcome

    async def wake(self, replica: Replica) -> None:
        """Get its slot back from Ray, and then itself."""
        slot = await self._fleet.find_slot(replica)
        assert slot is not None
        await replica.actor.wake.remote(0)
        replica.holder.hold.remote(replica.actor)
        replica.holder = None

    async def submit(
        self,
        replica: Replica,
        prompt_token_ids: list[int],
        max_tokens: int,
        temperature: float = 0.0,
    ) -> Watched:
        self._serial += 1
        state = RequestState(
            request_id=f"bench-{self._serial}",
            prompt_token_ids=prompt_token_ids,
            sampling=SamplingParams(
                max_tokens=max_tokens, temperature=temperature, seed=17, ignore_eos=True
            ),
            arrival_s=time.time(),
            generation=1,
            ingress_id=self._ingress_id,
        )
        track = Track(state.request_id, replica.replica_id, generation=1)
        watched = self._watched[state.request_id] = Watched(track, time.monotonic())
        await replica.actor.submit.remote(state)
        return watched

    async def cancel(self, watched: Watched) -> None:
        track = watched.track
        for replica in self.replicas:
            await replica.actor.cancel.remote([track.request_id])
        self._watched.pop(track.request_id, None)

    async def move(
        self,
        watched: Watched,
        mode: Mode,
        dst: Replica | None = None,
        bytes_per_s: float | None = None,
        *,
        patient: bool = False,
    ) -> MigrationResult:
        """Move a request to ``dst`` or to the replica after its own, over a link of at most
        ``bytes_per_s``. Returns when this end has heard of it too. ``patient``: wait while a
        replica rests, as moves do that can."""
        names = [replica.replica_id for replica in self.replicas]
        src = self.replicas[names.index(watched.track.replica_id)]
        dst = dst or self.replicas[(names.index(src.replica_id) + 1) % len(names)]
        assert src.info is not None
        assert dst.info is not None
        order = MigrationOrder(
            uuid.uuid4().hex,
            watched.track.request_id,
            src.replica_id,
            dst.replica_id,
            mode,
            "bench",
        )
        budgets = Budgets(self._config.buffer_bytes, bytes_per_s)
        async with self._slots.between(src.replica_id, dst.replica_id, patient=patient):
            result = await migrate(
                order,
                RaySource(src.actor, self._no_faults),
                RayTarget(dst.actor, self._no_faults),
                block_size=src.info.block_size,
                block_nbytes=src.info.block_nbytes,
                limits=DriverLimits(
                    max_stages=self._config.max_stages,
                    chunk_bytes=self._config.chunk_bytes,
                    tail_bytes=self._config.tail_bytes,
                    timeout_s=self._config.timeout_s,
                ),
                way=LinkWay(
                    self._table, budgets, self._slots, src.info.endpoint(), dst.info.endpoint()
                ),
            )
        if result.outcome == "committed":
            await watched.followed_to(dst.replica_id)
        return result

    @property
    def chunk_bytes(self) -> int:
        return self._config.chunk_bytes

    def forget(self, watched: Watched) -> None:
        """A request that has ended."""
        self._watched.pop(watched.track.request_id, None)

    async def check(self) -> None:
        """No replica holds anything, and all its books agree. Raises AssertionError."""
        for replica in self.replicas:
            await replica.actor.check.remote()
            report = await replica.actor.report.remote(0, 0.0)
            assert report.stats.used_blocks == 0, f"{replica.replica_id} holds blocks"

    def _on_item(self, replica_id: str, item: StreamItem) -> None:
        now = time.monotonic()
        for delta in item.deltas:
            watched = self._watched.get(delta[0])
            if watched is None:
                continue
            accepted = watched.track.accept(replica_id, delta)
            if accepted is None:
                continue
            if accepted.token_ids:
                watched.token_s.append((now, len(accepted.token_ids)))
                stall = watched.track.came(now)
                if stall is not None:
                    watched.hand_over_s[stall.generation] = stall.seconds
            if accepted.finish_reason is not None:
                watched.ended.set()
        for notice in item.notices:
            watched = self._watched.get(notice.request_id)
            if watched is not None and isinstance(notice, Moved):
                watched.track.follow(replica_id, notice.dst)
            if isinstance(notice, Migrating | Moved):
                self._links.spawn(self._links.ensure(notice.dst))
