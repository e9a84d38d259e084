"""The requests of one engine: how they come, where they stand, and how they leave or move.

The part of an engine that computes nothing. What a migration needs is here: a source exports
blocks, freezes and releases; a target reserves, imports or prefills, and activates.
"""

from __future__ import annotations

import numpy as np
import torch

from mell_ray.engine.block_pool import BlockPool
from mell_ray.engine.grammar import GrammarCompiler, GrammarMasks
from mell_ray.engine.kv_pool import KVPool
from mell_ray.engine.planner import Planner
from mell_ray.engine.reservations import Reservations
from mell_ray.engine.sequence import Sequence, finish_reason
from mell_ray.engine.types import (
    EngineStats,
    FinishReason,
    RequestState,
    Reservation,
    SequenceInfo,
    TokenDelta,
)
from mell_ray.engine.validation import validate_state
from mell_ray.errors import ConflictError, InvalidRequestError


class Residents:
    """All requests here and the blocks they hold; the base of ``Engine``. Not thread-safe."""

    def __init__(
        self,
        kv: KVPool,
        planner: Planner,
        *,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
        grammars: GrammarCompiler | None,
    ) -> None:
        self.block_size = planner.block_size
        self.block_nbytes = kv.block_nbytes
        self.kv_format = kv.format
        self.capacity_blocks = planner.pool.capacity
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.asleep = False
        self._kv = kv
        self._planner = planner
        self._blocks: BlockPool = planner.pool
        self._seqs: dict[str, Sequence] = {}  # owned here, by request id
        self._reservations = Reservations(planner, kv)
        self._pending: list[TokenDelta] = []  # what the next step hands out first
        self._handovers: list[Sequence] = []
        self._order = 0
        self._masks = None if grammars is None else GrammarMasks(grammars)

    # --- life of a request ---------------------------------------------------------------------

    def validate(self, state: RequestState) -> None:
        """Whether this engine can run ``state`` at all.

        Raises:
            InvalidRequestError: naming the field: lengths beyond the model or the pool, token ids
                out of the vocabulary, an empty prompt, a sampling parameter out of range.
        """
        validate_state(
            state,
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            capacity_tokens=self.capacity_blocks * self.block_size,
        )
        if state.sampling.grammar is not None and self._masks is None:
            raise InvalidRequestError(
                "response_format: this engine was made without a grammar compiler",
                param="response_format",
            )

    def add(self, state: RequestState) -> None:
        """Queue a request. One that brings output tokens goes on behind them and emits only what
        is new. What ``state.num_computed`` says is ignored: KV comes through a reservation.

        Raises:
            InvalidRequestError: see ``validate``.
            ConflictError: a request of this id is here already.
        """
        self.validate(state)
        self._refuse_unwelcome(state.request_id)
        seq = self._sequence(state)
        seq.num_computed = 0
        seq.state.kv_format = self.kv_format
        seq.emitted = seq.num_output
        reason = finish_reason(state, self.eos_token_ids)
        if reason is not None:
            self._pending.append(self._delta(seq, reason))
            return
        self._seqs[seq.request_id] = seq
        self._planner.enqueue(seq)

    def abort(self, request_id: str) -> bool:
        """Forget a request and free its blocks; it emits nothing more. False if unknown."""
        known = len(self._pending)
        self._pending = [delta for delta in self._pending if delta.request_id != request_id]
        return self._forget(request_id) or len(self._pending) < known

    def has_work(self) -> bool:
        """Whether ``step`` could advance or hand out anything."""
        return bool(self._pending) or bool(self._handovers) or self._planner.has_work()

    # --- what is where -------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        planner = self._planner
        return EngineStats(
            capacity_blocks=self.capacity_blocks,
            used_blocks=self._blocks.num_used,
            cached_blocks=self._blocks.num_cached,
            running=len(self._seqs) - len(planner.waiting),
            waiting=len(planner.waiting),
            prefix_hit_tokens=planner.prefix_hit_tokens,
            prefix_query_tokens=planner.prefix_query_tokens,
            prefix_evictions=self._blocks.evictions,
            preemptions=planner.preemptions,
        )

    def sequences(self) -> list[SequenceInfo]:
        """Every request and reservation here, requests first, each in order of arrival here."""
        return [seq.info() for seq in (*self._seqs.values(), *self._reservations.sequences())]

    def generation_of(self, request_id: str) -> int | None:
        """The generation under which this engine owns a request; None if it does not."""
        seq = self._seqs.get(request_id)
        return None if seq is None else seq.state.generation

    def check(self) -> None:
        """Compare all books.

        Raises:
            AssertionError: with what does not agree.
        """
        seqs = [*self._seqs.values(), *self._reservations.sequences()]
        self._blocks.check([seq.blocks for seq in seqs])
        self._planner.check(seqs)

    # --- migration, source side ----------------------------------------------------------------

    def progress(self, request_id: str) -> tuple[int, int]:
        """(known tokens, tokens with KV). Raises KeyError if the request is not owned here."""
        seq = self._seqs[request_id]
        return seq.num_tokens, seq.num_computed

    def tokens_of(self, request_id: str, start: int = 0) -> list[int]:
        """Prompt and output token ids from position ``start``. Raises KeyError if not owned."""
        return self._seqs[request_id].token_ids[start:]

    def peek_state(self, request_id: str) -> RequestState:
        """A copy of the request as of now. Raises KeyError if not owned."""
        return self._seqs[request_id].snapshot()

    def export_blocks(self, request_id: str, first_block: int, num_blocks: int) -> np.ndarray:
        """The bytes of a request's own blocks by position: 1-D uint8 of
        ``num_blocks * block_nbytes``.

        Works while the request decodes; blocks before ``num_computed // block_size`` do not change
        any more.

        Raises:
            KeyError: the request is not owned here.
            ConflictError: it does not hold those blocks (it may have been preempted).
        """
        return self._kv.export(self._own_blocks(request_id, first_block, num_blocks))

    def export_into(
        self, request_id: str, first_block: int, num_blocks: int, out: np.ndarray
    ) -> None:
        """``export_blocks`` into memory that is there already: 1-D uint8 of the same length."""
        self._kv.export_into(self._own_blocks(request_id, first_block, num_blocks), out)

    def lend_blocks(
        self, request_id: str, first_block: int, num_blocks: int, max_pieces: int
    ) -> list[np.ndarray] | None:
        """``export_blocks`` without a copy, in at most ``max_pieces`` read-only pieces; None where
        that cannot be. What is read from them is the request's as long as ``times_dropped`` stays
        what it was; see there."""
        return self._kv.lend(self._own_blocks(request_id, first_block, num_blocks), max_pieces)

    def times_dropped(self, request_id: str) -> int:
        """How often a request has lost its blocks to others. Raises KeyError if not owned."""
        return self._seqs[request_id].times_dropped

    def export_tensor(self, request_id: str, first_block: int, num_blocks: int) -> torch.Tensor:
        """``export_blocks`` without leaving the engine's device."""
        return self._kv.export_tensor(self._own_blocks(request_id, first_block, num_blocks))

    def _own_blocks(self, request_id: str, first_block: int, num_blocks: int) -> list[int]:
        blocks = self._seqs[request_id].blocks
        last = first_block + num_blocks
        if first_block < 0 or num_blocks < 0 or last > len(blocks):
            raise ConflictError(
                f"blocks {first_block} to {last} of {request_id} asked for; it holds {len(blocks)}"
            )
        return blocks[first_block:last]

    def freeze(self, request_id: str) -> RequestState:
        """Leave a request out of planning. The copy returned is what the target goes on with: its
        generation and its count of migrations are one higher. Raises KeyError if not owned."""
        seq = self._seqs[request_id]
        self._planner.park(seq)
        seq.status = "frozen"
        state = seq.snapshot()
        state.generation += 1
        state.migrations += 1
        return state

    def thaw(self, request_id: str) -> None:
        """Undo ``freeze``: the migration failed. Raises KeyError if not owned."""
        seq = self._seqs[request_id]
        if seq.status != "frozen":
            return
        if seq.row is None:
            self._planner.enqueue(seq)
        else:
            seq.status = "running"
            self._planner.run(seq)

    def release(self, request_id: str) -> bool:
        """The target owns it now: forget it and free its blocks; their prefix hashes stay."""
        return self._forget(request_id)

    # --- migration, target side ----------------------------------------------------------------

    def reserve(
        self, key: str, state: RequestState, *, prefill: bool, imports: bool | None = None
    ) -> Reservation:
        """Hold room for a request that is still owned elsewhere: blocks for its tokens and one
        more, of which cached prefix blocks need not be sent.

        Args:
            key: names the migration in all later calls.
            prefill: True: compute the tokens' KV here (token migration), without sampling. False:
                blocks will be imported (KV migration).
            imports: with ``prefill``: blocks will be imported as well, and the tokens from the
                first of them on are not computed (hybrid migration).

        Raises:
            InvalidRequestError: this engine could never run it.
            OutOfBlocksError: no room now. A reservation never preempts anyone.
            ConflictError: the key or the request is already here, or blocks were to be imported
                whose format is another (``kv_format``).
        """
        self.validate(state)
        self._refuse_unwelcome(state.request_id)
        imports = not prefill if imports is None else imports
        if imports:
            self._reservations.refuse_foreign(state)
        return self._reservations.reserve(
            key, self._sequence(state), prefill=prefill, imports=imports
        )

    def import_blocks(self, key: str, first_block: int, data: np.ndarray) -> None:
        """Write blocks that ``export_blocks`` gave, at positions from ``first_block`` on. Blocks
        that came from the prefix cache are left as they are. Grows the reservation if needed.

        Raises:
            KeyError: no such reservation.
            ConflictError: the reservation prefills, or ``data`` is not whole blocks.
            OutOfBlocksError: no room to grow; nothing was written.
        """
        self._reservations.import_blocks(key, first_block, data)

    def extend(self, key: str, token_ids: list[int]) -> None:
        """More tokens of the request have become known (token migration).

        Raises:
            KeyError: no such reservation.
            OutOfBlocksError: no room to grow; the tokens were not taken.
        """
        self._reservations.extend(key, token_ids)

    def reservation_progress(self, key: str) -> int:
        """Leading tokens whose KV is here. Raises KeyError if there is no such reservation."""
        return self._reservations.progress(key)

    def activate(self, key: str, state: RequestState) -> None:
        """The commit: from here on this engine owns the request, with exactly ``state``'s tokens.

        KV that is missing is recomputed. The first delta tells all output from index 0, so that
        the receiver can fill gaps.

        Raises:
            KeyError: no such reservation.
            InvalidRequestError: this engine cannot run ``state``; the reservation stays.
            ConflictError: ``state`` is another request, or contradicts the tokens reserved for.
        """
        self.validate(state)
        seq = self._reservations.activate(key, state)
        seq.state.kv_format = self.kv_format
        self._constrain(seq)
        seq.emitted = 0
        reason = finish_reason(seq.state, self.eos_token_ids)
        if reason is not None:
            self._planner.remove(seq)
            self._pending.append(self._delta(seq, reason))
            return
        seq.handover = True
        self._handovers.append(seq)
        self._seqs[seq.request_id] = seq
        seq.status = "running"
        self._planner.run(seq)

    def cancel_reservation(self, key: str) -> bool:
        """Give the room back. False if there is no such reservation (any more)."""
        return self._reservations.cancel(key)

    # --- helpers -------------------------------------------------------------------------------

    def _sequence(self, state: RequestState) -> Sequence:
        self._order += 1
        seq = Sequence(state, self.block_size, self._order)
        seq.state = seq.snapshot()  # the caller keeps its own lists
        self._constrain(seq)
        return seq

    def _constrain(self, seq: Sequence) -> None:
        """Have its grammar compiled meanwhile, if it has one."""
        grammar = seq.state.sampling.grammar
        if grammar is not None and self._masks is not None:
            seq.constraint = self._masks.open(grammar)

    def _refuse_unwelcome(self, request_id: str) -> None:
        if self.asleep:
            raise ConflictError("this engine sleeps")
        if request_id in self._seqs or self._reservations.holds_request(request_id):
            raise ConflictError(f"request {request_id} is already here")

    def _forget(self, request_id: str) -> bool:
        seq = self._seqs.pop(request_id, None)
        if seq is None:
            return False
        self._planner.remove(seq)
        return True

    def _delta(
        self, seq: Sequence, reason: FinishReason | None, error: str | None = None
    ) -> TokenDelta:
        """All of ``seq``'s output that no delta has told yet."""
        index, seq.emitted, seq.handover = seq.emitted, seq.num_output, False
        state = seq.state
        logprobs = None if state.sampling.logprobs is None else state.output_logprobs[index:]
        return TokenDelta(
            request_id=seq.request_id,
            generation=state.generation,
            index=index,
            token_ids=state.output_token_ids[index:],
            logprobs=logprobs,
            finish_reason=reason,
            error=error,
        )

    def _take_pending(self) -> list[TokenDelta]:
        """Deltas of requests that ended on arrival, and of hand-overs not told by a token yet."""
        deltas, self._pending = self._pending, []
        for seq in self._handovers:
            if seq.handover and self._seqs.get(seq.request_id) is seq:
                deltas.append(self._delta(seq, None))
        self._handovers = []
        return deltas
