"""The Router's knowledge of which request lives where, and how reports correct it.

The scheduler's books are the plan; replicas are the truth. ``reconcile`` turns the difference
between what a replica reports and what was believed into scheduler events. Pure: no Ray, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mell_ray.engine.types import SequenceInfo
from mell_ray.scheduler.events import Adopt, Event, Finish, Grow

# A placed request must show up at its replica within this time, or its ingress has died.
SUBMIT_TTL_S = 10.0
# A request that lost its replica must be claimed by its ingress within this time.
CLAIM_TTL_S = 60.0


@dataclass(slots=True)
class Entry:
    """One live request."""

    request_id: str
    model_id: str
    max_blocks: int
    priority: int
    arrival_s: float  # wall clock
    ingress_id: str  # who asked for it; "" if only a replica has told of it
    generation: int
    replica_id: str | None = None  # None: queued, or its replica is lost
    since: float = 0.0  # monotonic, when replica_id was last changed
    held: bool = False  # the replica has it, rather than being about to get it
    seen: bool = False  # reported by replica_id since then
    lost: bool = False  # its replica died; its ingress will claim it
    migrating_to: str | None = None
    traceparent: str = ""  # of its span at the ingress; "": not traced


class RequestBook:
    """All live requests, indexed by replica."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._entries: dict[str, Entry] = {}
        self._on: dict[str, dict[str, Entry]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, request_id: str) -> Entry | None:
        return self._entries.get(request_id)

    def entries(self) -> Iterable[Entry]:
        return self._entries.values()

    def blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def add(self, entry: Entry) -> None:
        self._entries[entry.request_id] = entry

    def drop(self, request_id: str) -> Entry | None:
        entry = self._entries.pop(request_id, None)
        if entry is not None and entry.replica_id is not None:
            self._on[entry.replica_id].pop(request_id, None)
        return entry

    def move(self, entry: Entry, replica_id: str | None, now: float, *, held: bool) -> None:
        """Record that the request now belongs on ``replica_id``. ``seen`` starts over: a report
        on its way may be older than the move."""
        if entry.replica_id is not None:
            self._on[entry.replica_id].pop(entry.request_id, None)
        entry.replica_id, entry.since, entry.held = replica_id, now, held
        entry.seen, entry.lost, entry.migrating_to = False, False, None
        if replica_id is not None:
            self._on.setdefault(replica_id, {})[entry.request_id] = entry

    def lose_replica(self, replica_id: str, now: float) -> list[Entry]:
        """The replica died: its requests wait for their ingress to claim them."""
        lost = list(self._on.pop(replica_id, {}).values())
        for entry in lost:
            entry.replica_id, entry.since = None, now
            entry.held, entry.seen, entry.lost = False, False, True
        return lost

    def reconcile(
        self,
        replica_id: str,
        model_id: str,
        sequences: list[SequenceInfo],
        now: float,
        ended: Iterable[tuple[str, int]] = (),
    ) -> list[Event]:
        """Compare a replica's report with the book; returns what the scheduler must be told.
        ``ended``: requests with their generations that are no longer there."""
        events: list[Event] = []
        sizes: dict[str, int] = {}
        present: set[str] = set()
        for info in sequences:
            if info.status == "reserved":
                continue
            present.add(info.request_id)
            entry = self._entries.get(info.request_id)
            if entry is not None and entry.replica_id == replica_id:
                entry.seen = entry.held = True
                entry.generation = max(entry.generation, info.generation)
                sizes[info.request_id] = self.blocks(info.num_tokens)
            elif entry is None or self._has_moved(entry, replica_id, info):
                events += self._adopt(entry, replica_id, model_id, info, now)
        if sizes:
            events.append(Grow(sizes))
        gone = dict(ended)
        events += self._ended(replica_id, present, gone, now)
        return events

    def unclaimed(self, now: float) -> list[Event]:
        """Requests whose replica died and whose ingress never came back."""
        late = [
            entry.request_id
            for entry in self._entries.values()
            if entry.lost and now - entry.since > CLAIM_TTL_S
        ]
        for request_id in late:
            self.drop(request_id)
        return [Finish(request_id) for request_id in late]

    @staticmethod
    def _has_moved(entry: Entry, replica_id: str, info: SequenceInfo) -> bool:
        """Whether a request found elsewhere than booked is really owned there (a migration whose
        result was lost), rather than a stale copy that its ingress is about to cancel."""
        return entry.migrating_to != replica_id and info.generation > entry.generation

    def _adopt(
        self, entry: Entry | None, replica_id: str, model_id: str, info: SequenceInfo, now: float
    ) -> list[Event]:
        events: list[Event] = []
        if entry is None:
            entry = Entry(
                request_id=info.request_id,
                model_id=model_id,
                max_blocks=self.blocks(info.num_tokens),
                priority=info.priority,
                arrival_s=0.0,
                ingress_id="",
                generation=info.generation,
            )
            self.add(entry)
        else:
            events.append(Finish(info.request_id))
            entry.generation = info.generation
        self.move(entry, replica_id, now, held=True)
        size = self.blocks(info.num_tokens)
        events.append(
            Adopt(
                info.request_id,
                model_id,
                replica_id,
                size,
                max(size, entry.max_blocks),
                entry.priority,
            )
        )
        return events

    def _ended(
        self, replica_id: str, present: set[str], gone: Mapping[str, int], now: float
    ) -> list[Event]:
        ended = [
            entry.request_id
            for entry in self._on.get(replica_id, {}).values()
            if entry.request_id not in present
            and entry.migrating_to is None
            and (
                entry.seen
                or gone.get(entry.request_id, -1) >= entry.generation
                or now - entry.since > SUBMIT_TTL_S
            )
        ]
        for request_id in ended:
            self.drop(request_id)
        return [Finish(request_id) for request_id in ended]
