"""Messages of the live-migration protocol. Free of torch and Ray; picklable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mell_ray.engine.types import RequestState

# kv: blocks move. token: tokens move and the target prefills. hybrid: the target prefills from the
# front while the last blocks arrive, until both meet.
Mode = Literal["kv", "token", "hybrid"]
Outcome = Literal["committed", "aborted", "gone"]
Settlement = Literal["committed", "aborted"]


@dataclass(frozen=True, slots=True)
class MigrationOrder:
    """One migration, as the Router orders it. ``src`` and ``dst`` are replica ids."""

    migration_id: str
    request_id: str
    src: str
    dst: str
    mode: Mode
    reason: str
    urgent: bool = False  # the source must go: no limit meant for moves that can wait holds


@dataclass(frozen=True, slots=True)
class ChunkMeta:
    """What one stage carried: blocks ``first_block .. first_block + num_blocks`` of the request.

    ``ready_blocks`` is how many complete blocks the source had at that moment, so the driver knows
    whether another stage is worth it.
    """

    first_block: int
    num_blocks: int
    ready_blocks: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Received:
    """The target's answer to one stage. ``num_blocks`` of ``meta`` may be fewer than asked for:
    then none were taken in. ``progress_tokens``: leading tokens whose KV is at the target."""

    meta: ChunkMeta
    progress_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenTail:
    """Tokens that the source has produced since ``start`` (token mode)."""

    start: int
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Frozen:
    """The request as it leaves the source. ``state.generation`` is the new owner's."""

    state: RequestState
    first_block: int  # of the blocks that travel beside this message
    num_blocks: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Committed:
    """The target's answer: it owns the request under ``generation``. ``rest_s``: for how long it is
    to be left alone before something moves that can wait; see ``Toll``."""

    generation: int
    rest_s: float = 0.0


@dataclass(frozen=True, slots=True)
class MigrationResult:
    """How a migration ended.

    ``committed``: ``dst`` owns the request. ``aborted``: ``src`` still does. ``gone``: the request
    ended, or its source died, before a commit. ``freeze_s`` is from freeze to commit, ``copy_s``
    from the target's consent to the freeze: the part that grows with the size of the request.
    ``transport`` is what the last block moved by before the freeze, "" where none did.
    """

    order: MigrationOrder
    outcome: Outcome
    detail: str = ""
    stages: int = 0
    bytes: int = 0
    tail_bytes: int = 0  # of these, what the hand-over itself carried
    tokens: int = 0
    cached_tokens: int = 0
    generation: int = 0
    seconds: float = 0.0
    freeze_s: float = 0.0
    copy_s: float = 0.0
    finished_at: float = 0.0  # wall clock
    transport: str = ""
    fallbacks: int = 0  # transports that broke on the way
