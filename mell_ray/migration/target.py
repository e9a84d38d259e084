"""The target's half of a migration: what a replica does for a request that is arriving.

Every method runs in the engine thread. ``commit`` is the one step in which ownership moves, and
``settle`` the one question that decides a migration whose commit answer was lost: after it has
said ``aborted``, a commit of the same migration is refused.
"""

from __future__ import annotations

import collections
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mell_ray.engine.types import RequestState, Reservation
from mell_ray.errors import MigrationError
from mell_ray.migration.types import Frozen, MigrationOrder, Settlement, TokenTail

if TYPE_CHECKING:
    from mell_ray.engine import Engine

_REMEMBERED = 4096


@dataclass(slots=True)
class Incoming:
    """A migration this replica is the target of, not yet committed."""

    order: MigrationOrder
    num_tokens: int  # known tokens handed to the engine so far
    deadline: float  # monotonic; renewed by every message of the migration


class MigrationTarget:
    """All incoming migrations of one replica, and how the recent ones ended."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._incoming: dict[str, Incoming] = {}
        self._ended: collections.OrderedDict[str, Settlement] = collections.OrderedDict()

    def reserve(self, engine: Engine, order: MigrationOrder, state: RequestState) -> Reservation:
        """Take room for the request.

        Raises:
            OutOfBlocksError: the pool declines.
            ConflictError: the request is here already.
            MigrationError: this migration was already settled as aborted.
        """
        self._refuse_ended(order.migration_id)
        reservation = engine.reserve(
            order.migration_id,
            state,
            prefill=order.mode != "kv",
            imports=order.mode != "token",
        )
        self._incoming[order.migration_id] = Incoming(
            order, state.num_tokens, time.monotonic() + self._timeout_s
        )
        return reservation

    def receive(
        self, engine: Engine, migration_id: str, first_block: int, payload: np.ndarray
    ) -> None:
        self._touch(migration_id)
        if payload.size:
            engine.import_blocks(migration_id, first_block, payload)

    def extend(self, engine: Engine, migration_id: str, tail: TokenTail) -> None:
        incoming = self._touch(migration_id)
        fresh = tail.token_ids[incoming.num_tokens - tail.start :]
        if fresh:
            engine.extend(migration_id, fresh)
            incoming.num_tokens += len(fresh)

    def order(self, migration_id: str) -> MigrationOrder:
        """Raises MigrationError if there is no such reservation."""
        return self._touch(migration_id).order

    def progress(self, engine: Engine, migration_id: str) -> int:
        """Leading tokens whose KV is here. Raises MigrationError if the reservation is gone."""
        self._touch(migration_id)
        return engine.reservation_progress(migration_id)

    def commit(self, engine: Engine, migration_id: str, frozen: Frozen, payload: np.ndarray) -> int:
        """Own the request from now on. Returns its generation; idempotent.

        Raises:
            MigrationError: refused; the source keeps the request. Nothing of it remains here.
        """
        if self._ended.get(migration_id) == "committed":
            return frozen.state.generation
        self._touch(migration_id)
        try:
            if payload.size:
                engine.import_blocks(migration_id, frozen.first_block, payload)
            engine.activate(migration_id, frozen.state)
        except Exception:
            self.abort(engine, migration_id)
            raise
        self._incoming.pop(migration_id)
        self._remember(migration_id, "committed")
        return frozen.state.generation

    def abort(self, engine: Engine, migration_id: str) -> None:
        if self._incoming.pop(migration_id, None) is not None:
            engine.cancel_reservation(migration_id)
        if migration_id not in self._ended:
            self._remember(migration_id, "aborted")

    def give_way(self, engine: Engine, request_id: str) -> None:
        """The request comes here by itself, because its owner is lost: what was held for its
        migration is in its way, and must never be committed."""
        for migration_id, incoming in list(self._incoming.items()):
            if incoming.order.request_id == request_id:
                self.abort(engine, migration_id)

    def settle(self, engine: Engine, migration_id: str) -> Settlement:
        """Decide the migration for good and say how it ended."""
        self.abort(engine, migration_id)
        return self._ended[migration_id]

    def expire(self, engine: Engine) -> int:
        """Cancel reservations whose source or driver has gone silent. Returns how many."""
        now = time.monotonic()
        late = [key for key, incoming in self._incoming.items() if incoming.deadline < now]
        for migration_id in late:
            self.abort(engine, migration_id)
        return len(late)

    def __len__(self) -> int:
        return len(self._incoming)

    def _touch(self, migration_id: str) -> Incoming:
        self._refuse_ended(migration_id)
        incoming = self._incoming.get(migration_id)
        if incoming is None:
            raise MigrationError(f"migration {migration_id} has no reservation here")
        incoming.deadline = time.monotonic() + self._timeout_s
        return incoming

    def _refuse_ended(self, migration_id: str) -> None:
        if migration_id in self._ended:
            raise MigrationError(f"migration {migration_id} is {self._ended[migration_id]}")

    def _remember(self, migration_id: str, settlement: Settlement) -> None:
        self._ended[migration_id] = settlement
        while len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)
