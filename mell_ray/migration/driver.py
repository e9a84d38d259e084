"""Drives one live migration from reserve to commit, or to a clean abort.

The driver talks to the two replicas through small protocols and never touches KV itself: payloads
are references that it passes on, so the bytes go from source to target directly. It may die at any
point; what it leaves behind expires or is settled by the replicas themselves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, Protocol

from mell_ray.engine.types import RequestState, Reservation
from mell_ray.errors import MellError, MigrationError
from mell_ray.migration.types import (
    ChunkMeta,
    Frozen,
    MigrationOrder,
    MigrationResult,
    Outcome,
    Settlement,
    TokenTail,
)

logger = logging.getLogger(__name__)

# A payload that the driver only passes on (with Ray, an ObjectRef).
Payload = Any


class PeerDied(Exception):
    """The replica at the other end of a call is dead; nothing of the call can take effect."""


class Source(Protocol):
    async def begin(self, order: MigrationOrder) -> RequestState: ...

    def stage(
        self, migration_id: str, first_block: int, max_blocks: int
    ) -> tuple[Awaitable[ChunkMeta], Payload]: ...

    async def tokens(self, migration_id: str, start: int) -> TokenTail: ...

    def freeze(
        self, migration_id: str, first_block: int
    ) -> tuple[Awaitable[Frozen], Payload, Payload]:
        """(the message, the message as a reference, the tail blocks as a reference)."""
        ...

    async def thaw(self, migration_id: str) -> None: ...

    async def release(self, migration_id: str) -> None: ...


class Target(Protocol):
    async def reserve(self, order: MigrationOrder, state: RequestState) -> Reservation: ...

    async def receive(self, migration_id: str, first_block: int, payload: Payload) -> None: ...

    async def extend(self, migration_id: str, tail: TokenTail) -> None: ...

    async def wait_progress(self, migration_id: str, num_tokens: int) -> int: ...

    async def commit(self, migration_id: str, frozen: Payload, payload: Payload) -> int: ...

    async def settle(self, migration_id: str) -> Settlement: ...


@dataclass(frozen=True, slots=True)
class DriverLimits:
    """When live copying stops and how long anything may take. Bytes, tokens and seconds."""

    max_stages: int = 8
    chunk_bytes: int = 16 << 20
    tail_tokens: int = 16
    timeout_s: float = 30.0
    settle_timeout_s: float = 5.0


@dataclass(frozen=True, slots=True)
class _Layout:
    block_size: int
    chunk_blocks: int


@dataclass(slots=True)
class _Progress:
    stages: int = 0
    bytes: int = 0
    tokens: int = 0
    cached_tokens: int = 0
    generation: int = 0
    freeze_s: float = 0.0


async def migrate(
    order: MigrationOrder,
    source: Source,
    target: Target,
    *,
    block_size: int,
    block_nbytes: int,
    limits: DriverLimits,
) -> MigrationResult:
    """Run one migration to its end. Never raises for a failure of the migration: the result says
    who owns the request now and why."""
    progress = _Progress()
    started = time.monotonic()
    outcome: Outcome
    detail = ""
    try:
        async with asyncio.timeout(limits.timeout_s):
            state = await source.begin(order)
            layout = _Layout(block_size, max(1, limits.chunk_bytes // block_nbytes))
            first_block = await _copy(order, state, source, target, layout, limits, progress)
            await _hand_over(order, first_block, source, target, progress)
        outcome = "committed"
    except (MellError, PeerDied, TimeoutError) as error:
        detail = f"{type(error).__name__}: {error}"
        outcome = await _undo(order, source, target, limits)
    return MigrationResult(
        order=order,
        outcome=outcome,
        detail=detail,
        stages=progress.stages,
        bytes=progress.bytes,
        tokens=progress.tokens,
        cached_tokens=progress.cached_tokens,
        generation=progress.generation,
        seconds=time.monotonic() - started,
        freeze_s=progress.freeze_s,
        finished_at=time.time(),
    )


async def _copy(
    order: MigrationOrder,
    state: RequestState,
    source: Source,
    target: Target,
    layout: _Layout,
    limits: DriverLimits,
    progress: _Progress,
) -> int:
    """Bring the target close enough to the source that freezing it costs about one step.

    Returns the first block that the freeze still has to carry.
    """
    reservation = await target.reserve(order, state)
    progress.cached_tokens = reservation.num_cached_tokens
    if order.mode == "token":
        await _catch_up(order.migration_id, source, target, state.num_tokens, limits, progress)
        return 0
    first_block = reservation.num_cached_tokens // layout.block_size
    return await _copy_blocks(
        order.migration_id, source, target, first_block, layout, limits, progress
    )


async def _copy_blocks(
    migration_id: str,
    source: Source,
    target: Target,
    first: int,
    layout: _Layout,
    limits: DriverLimits,
    progress: _Progress,
) -> int:
    """Stages. A stage is everything complete when it starts, sent in chunks; the target takes one
    chunk in while the source gathers the next."""
    receiving: asyncio.Task[None] | None = None
    try:
        while progress.stages < limits.max_stages:
            progress.stages += 1
            sent, ready = 0, first + 1
            while first < ready:
                meta_future, payload = source.stage(migration_id, first, layout.chunk_blocks)
                meta = await meta_future
                if receiving is not None:
                    await receiving
                receiving = asyncio.create_task(
                    target.receive(migration_id, meta.first_block, payload)
                )
                ready = meta.ready_blocks
                first += meta.num_blocks
                sent += meta.num_blocks
                progress.bytes += meta.nbytes
                if not meta.num_blocks:
                    break
            if receiving is not None:
                await receiving
                receiving = None
            if sent <= 1:
                break
    finally:
        if receiving is not None:
            receiving.cancel()
    return first


async def _catch_up(
    migration_id: str,
    source: Source,
    target: Target,
    num_tokens: int,
    limits: DriverLimits,
    progress: _Progress,
) -> None:
    """Let the target prefill what is known, then what was decoded meanwhile, until the rest is
    short."""
    while progress.stages < limits.max_stages:
        progress.stages += 1
        await target.wait_progress(migration_id, num_tokens)
        tail = await source.tokens(migration_id, num_tokens)
        await target.extend(migration_id, tail)
        num_tokens += len(tail.token_ids)
        if len(tail.token_ids) <= limits.tail_tokens:
            break


async def _hand_over(
    order: MigrationOrder, first_block: int, source: Source, target: Target, progress: _Progress
) -> None:
    """Freeze, commit, release: the only part the client can notice, so both calls go out at once
    and the freeze's answer reaches the target without a stop here."""
    frozen_at = time.monotonic()
    frozen_future, frozen_ref, payload = source.freeze(order.migration_id, first_block)
    commit = asyncio.ensure_future(target.commit(order.migration_id, frozen_ref, payload))
    try:
        frozen = await frozen_future
    except BaseException:
        commit.cancel()
        raise
    progress.tokens = frozen.state.num_tokens
    progress.bytes += frozen.nbytes
    progress.generation = await commit
    progress.freeze_s = time.monotonic() - frozen_at
    await _quietly(source.release(order.migration_id))


async def _undo(
    order: MigrationOrder,
    source: Source,
    target: Target,
    limits: DriverLimits,
) -> Outcome:
    """Ask the target how the migration ended, for good, and bring the source in line."""
    settlement: Settlement
    try:
        async with asyncio.timeout(limits.settle_timeout_s):
            settlement = await target.settle(order.migration_id)
    except PeerDied:
        settlement = "aborted"
    except (MellError, TimeoutError) as error:
        # Not known. A frozen source settles by itself as soon as the target answers.
        logger.warning("migration %s could not be settled: %s", order.migration_id, error)
        return "aborted"
    ended = source.release if settlement == "committed" else source.thaw
    alive = await _quietly(ended(order.migration_id))
    if settlement == "committed":
        return "committed"
    return "aborted" if alive else "gone"


async def _quietly(call: Awaitable[None]) -> bool:
    """Await a message whose effect the replicas also reach by themselves. False: peer is dead or
    does not know the request any more."""
    try:
        await call
    except (PeerDied, MigrationError, TimeoutError):
        return False
    return True
