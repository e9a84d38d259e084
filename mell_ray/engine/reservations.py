"""The target side of migrations: room held for requests that are still owned elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mell_ray.engine.kv_pool import KVPool
from mell_ray.engine.planner import Planner
from mell_ray.engine.sequence import Sequence
from mell_ray.engine.types import RequestState, Reservation
from mell_ray.errors import ConflictError


@dataclass(slots=True)
class _Held:
    seq: Sequence
    prefill: bool  # its tokens are computed here, at least the leading ones
    imports: bool  # blocks are imported, at least the last ones
    num_cached: int  # leading blocks from the prefix cache: shared, never written
    imported: set[int] = field(default_factory=set)  # positions of blocks, looked up only

    def imported_upto(self) -> int:
        """Leading blocks whose KV is here."""
        count = max(self.num_cached, self.seq.num_computed // self.seq.block_size)
        while count in self.imported:
            count += 1
        return count


class Reservations:
    """Held by key. A reservation has a row and blocks; one that prefills is planned like any
    request, but never sampled, and none is ever preempted."""

    def __init__(self, planner: Planner, kv: KVPool) -> None:
        self._planner = planner
        self._kv = kv
        self._held: dict[str, _Held] = {}

    def sequences(self) -> list[Sequence]:
        return [held.seq for held in self._held.values()]

    def holds_request(self, request_id: str) -> bool:
        return any(held.seq.request_id == request_id for held in self._held.values())

    def reserve(self, key: str, seq: Sequence, *, prefill: bool, imports: bool) -> Reservation:
        if key in self._held:
            raise ConflictError(f"migration {key} already has a reservation here")
        seq.status = "reserved"
        self._planner.take_room(seq, min(seq.num_tokens + 1, seq.max_kv_tokens))
        self._held[key] = _Held(seq, prefill, imports, seq.num_registered)
        if prefill:
            self._planner.run(seq)
        return Reservation(seq.request_id, seq.num_computed, len(seq.blocks))

    def refuse_foreign(self, state: RequestState) -> None:
        """Raises ConflictError if the blocks of ``state``'s owner mean something else here."""
        if state.kv_format not in ("", self._kv.format):
            raise ConflictError(
                f"blocks of {state.request_id} cannot be used here: they hold {state.kv_format}; "
                f"this engine's hold {self._kv.format}; migrate its tokens instead"
            )

    def import_blocks(self, key: str, first_block: int, data: np.ndarray) -> None:
        held = self._held[key]
        self.refuse_foreign(held.seq.state)
        if not held.imports:
            raise ConflictError(f"migration {key} prefills its tokens; blocks cannot be imported")
        count, rest = divmod(data.nbytes, self._kv.block_nbytes)
        if rest or first_block < 0:
            raise ConflictError(
                f"{data.nbytes} bytes at block {first_block} are not whole blocks of "
                f"{self._kv.block_nbytes} bytes"
            )
        seq, end = held.seq, first_block + count
        if end > seq.blocks_for(seq.max_kv_tokens):
            raise ConflictError(f"{seq.request_id} never has {end} blocks")
        self._planner.grow(seq, end * seq.block_size)
        computed = seq.num_computed // seq.block_size
        start = max(first_block, held.num_cached, computed)
        if start < end:
            skipped = (start - first_block) * self._kv.block_nbytes
            self._kv.load(seq.blocks[start:end], data.reshape(-1)[skipped:])
            held.imported.update(range(start, end))
        if held.prefill:
            limit = first_block * seq.block_size
            seq.compute_limit = min(limit, seq.compute_limit or limit)
            self._planner.changed()

    def extend(self, key: str, token_ids: list[int]) -> None:
        seq = self._held[key].seq
        num_tokens = seq.num_tokens + len(token_ids)
        self._planner.grow(seq, min(num_tokens + 1, seq.max_kv_tokens))
        seq.token_ids += token_ids
        self._planner.changed()

    def progress(self, key: str) -> int:
        held = self._held[key]
        if not held.imports:
            return held.seq.num_computed
        return max(held.seq.num_computed, held.imported_upto() * held.seq.block_size)

    def activate(self, key: str, state: RequestState) -> Sequence:
        """Turn a reservation into a sequence that has exactly ``state``'s tokens; it is neither
        owned nor planned yet."""
        held = self._held[key]
        reserved = held.seq
        if state.request_id != reserved.request_id:
            raise ConflictError(
                f"migration {key} is for {reserved.request_id}, not {state.request_id}"
            )
        # What was computed here is right whatever became of the source's own copy.
        have = max(reserved.num_computed, min(self.progress(key), state.num_computed))
        seq = Sequence(state, reserved.block_size, reserved.order)
        seq.state = seq.snapshot()
        common = min(seq.num_tokens, reserved.num_tokens)
        if seq.token_ids[:common] != reserved.token_ids[:common]:
            raise ConflictError(f"migration {key}: the tokens differ from those reserved for")
        del self._held[key]
        self._planner.park(reserved)
        seq.blocks, reserved.blocks = reserved.blocks, []
        seq.row, reserved.row = reserved.row, None
        seq.num_table_blocks = reserved.num_table_blocks
        seq.chain = reserved.chain[: seq.num_tokens // seq.block_size]
        seq.num_registered = reserved.num_registered
        seq.num_computed = min(have, seq.num_tokens - 1)
        self._planner.unshare(seq)
        self._planner.register(seq)
        return seq

    def cancel(self, key: str) -> bool:
        held = self._held.pop(key, None)
        if held is None:
            return False
        self._planner.remove(held.seq)
        return True
