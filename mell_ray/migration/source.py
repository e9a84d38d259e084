"""The source's half of a migration: what a replica does for a request that is leaving.

Every method runs in the engine thread, between two steps, so it sees the engine at rest and is
atomic towards decoding. Until ``freeze`` nothing here changes what the request does.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mell_ray.engine.types import RequestState
from mell_ray.errors import ConflictError, MigrationError
from mell_ray.migration.types import ChunkMeta, Frozen, MigrationOrder, TokenTail

if TYPE_CHECKING:
    import torch

    from mell_ray.engine import Engine


@dataclass(slots=True)
class Outgoing:
    """A migration this replica is the source of."""

    order: MigrationOrder
    deadline: float  # monotonic; an unfrozen entry older than this is forgotten
    times_dropped: int  # of the request, when it was begun
    frozen_at: float | None = None  # monotonic


class MigrationSource:
    """All outgoing migrations of one replica. At most one per request."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._by_id: dict[str, Outgoing] = {}
        self._by_request: dict[str, str] = {}

    def begin(self, engine: Engine, order: MigrationOrder) -> RequestState:
        """Register the migration and return the request as it is now.

        Raises:
            ConflictError: the request is already being migrated.
            MigrationError: the request is not here (any more).
        """
        self.expire()
        if order.request_id in self._by_request:
            raise ConflictError(f"request {order.request_id} is already being migrated")
        try:
            state = engine.peek_state(order.request_id)
            dropped = engine.times_dropped(order.request_id)
        except KeyError:
            raise MigrationError(f"request {order.request_id} is not on {order.src}") from None
        self._by_id[order.migration_id] = Outgoing(
            order, time.monotonic() + self._timeout_s, dropped
        )
        self._by_request[order.request_id] = order.migration_id
        return state

    def ready(
        self, engine: Engine, migration_id: str, first_block: int, max_blocks: int
    ) -> ChunkMeta:
        """Which complete blocks from ``first_block`` on there are, at most ``max_blocks``; they do
        not change any more while the request decodes on."""
        outgoing = self._get(migration_id)
        _, computed = self._progress(engine, outgoing)
        ready = computed // engine.block_size
        count = max(0, min(ready - first_block, max_blocks))
        return ChunkMeta(first_block, count, ready, count * engine.block_nbytes)

    def copy_out(
        self, engine: Engine, migration_id: str, first_block: int, num_blocks: int, out: np.ndarray
    ) -> None:
        """Copy blocks that ``ready`` has named into ``out``, 1-D uint8 of their length.

        Raises:
            MigrationError: the request has ended, or was preempted and lost them.
        """
        request_id = self._complete(engine, migration_id, first_block + num_blocks)
        engine.export_into(request_id, first_block, num_blocks, out)

    def lend(
        self, engine: Engine, migration_id: str, first_block: int, num_blocks: int, max_pieces: int
    ) -> list[np.ndarray] | None:
        """The blocks that ``ready`` has named where they lie, to be read while the request decodes
        on. If it is preempted before they have been read, others write there: then ``freeze``
        refuses, so that nothing read meanwhile is ever used. None: see ``Engine.lend_blocks``."""
        request_id = self._complete(engine, migration_id, first_block + num_blocks)
        return engine.lend_blocks(request_id, first_block, num_blocks, max_pieces)

    def copy_on_device(
        self, engine: Engine, migration_id: str, first_block: int, num_blocks: int
    ) -> torch.Tensor:
        """The same into new memory of the engine's device; see ``copy_out``."""
        request_id = self._complete(engine, migration_id, first_block + num_blocks)
        return engine.export_tensor(request_id, first_block, num_blocks)

    def _complete(self, engine: Engine, migration_id: str, num_blocks: int) -> str:
        """The request, if its first ``num_blocks`` blocks are complete."""
        outgoing = self._get(migration_id)
        _, computed = self._progress(engine, outgoing)
        if num_blocks > computed // engine.block_size:
            raise MigrationError(f"request {outgoing.order.request_id} was preempted")
        return outgoing.order.request_id

    def tokens(self, engine: Engine, migration_id: str, start: int) -> TokenTail:
        outgoing = self._get(migration_id)
        self._progress(engine, outgoing)
        return TokenTail(start, engine.tokens_of(outgoing.order.request_id, start))

    def freeze(
        self, engine: Engine, migration_id: str, first_block: int
    ) -> tuple[Frozen, np.ndarray]:
        """Stop decoding the request and export what is left. From here on the request is the
        target's if and only if the target commits.

        Raises:
            MigrationError: the request has ended, or was preempted while its blocks were copied.
        """
        outgoing = self._get(migration_id)
        self._progress(engine, outgoing)
        request_id = outgoing.order.request_id
        if outgoing.order.mode != "token" and (
            engine.times_dropped(request_id) != outgoing.times_dropped
        ):
            raise MigrationError(f"request {request_id} was preempted")
        state = engine.freeze(outgoing.order.request_id)
        outgoing.frozen_at = time.monotonic()
        count = 0
        if outgoing.order.mode != "token":
            count = max(0, -(-state.num_computed // engine.block_size) - first_block)
        payload = self._export(engine, outgoing, first_block, count)
        return Frozen(state, first_block, count, payload.nbytes), payload

    def thaw(self, engine: Engine, migration_id: str) -> None:
        """The target did not take it: decode on. Unknown ids are fine."""
        outgoing = self._drop(migration_id)
        if outgoing is not None and outgoing.frozen_at is not None:
            with suppress(KeyError):  # aborted by its client meanwhile
                engine.thaw(outgoing.order.request_id)

    def release(self, engine: Engine, migration_id: str) -> MigrationOrder | None:
        """The target owns it: forget the request and free its blocks."""
        outgoing = self._drop(migration_id)
        if outgoing is None:
            return None
        engine.release(outgoing.order.request_id)
        return outgoing.order

    def expire(self) -> list[str]:
        """Forget unfrozen migrations whose driver has gone silent; nothing else hangs on them.
        Returns their ids."""
        now = time.monotonic()
        late = [
            migration_id
            for migration_id, outgoing in self._by_id.items()
            if outgoing.frozen_at is None and outgoing.deadline < now
        ]
        for migration_id in late:
            self._drop(migration_id)
        return late

    @property
    def num_live(self) -> int:
        """Requests that are leaving and still decode here."""
        return sum(outgoing.frozen_at is None for outgoing in self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def order(self, migration_id: str) -> MigrationOrder:
        """Raises MigrationError if the migration is not known."""
        return self._get(migration_id).order

    def overdue(self, freeze_s: float) -> list[MigrationOrder]:
        """Frozen migrations that nobody has ended for ``freeze_s``: the replica settles them with
        the target by itself."""
        now = time.monotonic()
        return [
            outgoing.order
            for outgoing in self._by_id.values()
            if outgoing.frozen_at is not None and now - outgoing.frozen_at > freeze_s
        ]

    def is_leaving(self, request_id: str) -> bool:
        return request_id in self._by_request

    def _get(self, migration_id: str) -> Outgoing:
        try:
            return self._by_id[migration_id]
        except KeyError:
            raise MigrationError(f"migration {migration_id} is not known here") from None

    def _drop(self, migration_id: str) -> Outgoing | None:
        outgoing = self._by_id.pop(migration_id, None)
        if outgoing is not None:
            self._by_request.pop(outgoing.order.request_id, None)
        return outgoing

    def _progress(self, engine: Engine, outgoing: Outgoing) -> tuple[int, int]:
        try:
            return engine.progress(outgoing.order.request_id)
        except KeyError:
            self._drop(outgoing.order.migration_id)
            raise MigrationError(f"request {outgoing.order.request_id} has ended") from None

    def _export(
        self, engine: Engine, outgoing: Outgoing, first_block: int, count: int
    ) -> np.ndarray:
        if not count:
            return np.empty(0, dtype=np.uint8)
        return engine.export_blocks(outgoing.order.request_id, first_block, count)
