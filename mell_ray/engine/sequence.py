"""One request inside an engine: its tokens, its blocks, and where it stands."""

from __future__ import annotations

import itertools
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from mell_ray.engine.types import FinishReason, RequestState, SeqStatus, SequenceInfo


@dataclass(slots=True, eq=False)
class Sequence:
    """A request, or a reservation for one that is still owned elsewhere.

    ``token_ids`` is prompt and output in one list; ``state.output_token_ids`` is kept beside it
    because it travels. ``state.num_computed`` is the one progress number.
    """

    state: RequestState
    block_size: int
    order: int  # tie-break between equal arrivals
    status: SeqStatus = "waiting"  # planner; engine for "frozen" and "reserved"
    token_ids: list[int] = field(init=False)  # engine
    blocks: list[int] = field(default_factory=list)  # planner; engine for imports
    times_dropped: int = 0  # planner: how often its blocks went back to the pool
    chain: list[bytes] = field(default_factory=list)  # prefix hashes, lengthened on demand
    num_registered: int = 0  # leading blocks offered to the prefix index
    row: int | None = None  # planner: row of the block table, while it holds blocks
    num_table_blocks: int = 0  # batch builder: blocks already written to that row
    emitted: int = 0  # engine: output tokens already handed out in deltas
    handover: bool = False  # engine: the next delta must tell everything from index 0
    compute_limit: int | None = None  # reservations: tokens to compute here; None: all known
    penalties: Any = None  # sampler: token counts, where a penalty needs them
    constraint: Any = None  # engine: the Constraint of its grammar, if it has one
    serial: int = field(default_factory=itertools.count().__next__)  # never that of another one
    key: tuple[int, float, int] = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = self.state.prompt_token_ids + self.state.output_token_ids
        self.key = (-self.state.priority, self.state.arrival_s, self.order)

    @property
    def request_id(self) -> str:
        return self.state.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def kv_owner(self) -> tuple[int, int]:
        """The same as long as its KV only grows, and never anybody else's."""
        return self.serial, self.times_dropped

    @property
    def num_computed(self) -> int:
        return self.state.num_computed

    @num_computed.setter
    def num_computed(self, value: int) -> None:
        self.state.num_computed = value

    @property
    def num_to_compute(self) -> int:
        """Known tokens without KV.

        A reservation leaves its last token out: whoever owns it computes that one to sample, and
        must not have to write into a block that was offered to the prefix index meanwhile.
        """
        known = len(self.token_ids) - (self.status == "reserved")
        if self.compute_limit is not None:
            known = min(known, self.compute_limit)
        return known - self.state.num_computed

    @property
    def max_kv_tokens(self) -> int:
        """Tokens it will ever have KV for: the last one is sampled, but never computed."""
        return len(self.state.prompt_token_ids) + self.state.sampling.max_tokens - 1

    @property
    def num_output(self) -> int:
        return len(self.state.output_token_ids)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.state.output_token_ids.append(token_id)

    def snapshot(self) -> RequestState:
        """A copy of the state that shares no list with it."""
        state = copy(self.state)
        state.prompt_token_ids = list(state.prompt_token_ids)
        state.output_token_ids = list(state.output_token_ids)
        state.output_logprobs = list(state.output_logprobs)
        return state

    def info(self) -> SequenceInfo:
        return SequenceInfo(
            request_id=self.request_id,
            generation=self.state.generation,
            status=self.status,
            num_tokens=self.num_tokens,
            num_computed=self.num_computed,
            num_blocks=len(self.blocks),
            priority=self.state.priority,
            migrations=self.state.migrations,
        )


def finish_reason(state: RequestState, eos_token_ids: tuple[int, ...]) -> FinishReason | None:
    """Why ``state`` is complete, or None while it is not. Derived from its tokens alone, so that a
    request that moved or was recovered ends where it would have ended."""
    output, sampling = state.output_token_ids, state.sampling
    if sampling.grammar is not None and output and output[-1] in eos_token_ids:
        return "stop"  # the grammar is complete, so nothing else could come
    if output and len(output) > sampling.min_tokens:
        last = output[-1]
        if last in sampling.stop_token_ids or (not sampling.ignore_eos and last in eos_token_ids):
            return "stop"
    return "length" if len(output) >= sampling.max_tokens else None
