"""Drives one live migration from reserve to commit, or to a clean abort.

The driver talks to the two replicas through small protocols and never touches KV itself: the
target asks the source for blocks, and of the last ones, which the freeze hands over, the driver
only passes a reference on. It may die at any point; what it leaves behind expires or is settled by
the replicas themselves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass

from mell_ray.engine.types import RequestState, Reservation
from mell_ray.errors import MellError, MigrationError
from mell_ray.migration.copying import BlockCopier, CopyLimits
from mell_ray.migration.peers import PeerDied, PlainWay, Source, Target, Way, let_go
from mell_ray.migration.types import MigrationOrder, MigrationResult, Outcome, Settlement

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DriverLimits:
    """When live copying stops and how long anything may take. Bytes, tokens and seconds."""

    max_stages: int = 8
    chunk_bytes: int = 32 << 20
    tail_bytes: int = 0  # of blocks that the freeze carries rather than another stage
    tail_tokens: int = 16
    timeout_s: float = 30.0
    chunk_timeout_s: float = 10.0
    settle_timeout_s: float = 5.0


@dataclass(slots=True)
class _Progress:
    stages: int = 0
    tail_bytes: int = 0
    tokens: int = 0
    cached_tokens: int = 0
    generation: int = 0
    freeze_s: float = 0.0
    copy_s: float = 0.0


async def migrate(
    order: MigrationOrder,
    source: Source,
    target: Target,
    *,
    block_size: int,
    block_nbytes: int,
    limits: DriverLimits,
    way: Way | None = None,
) -> MigrationResult:
    """Run one migration to its end. Never raises for a failure of the migration: the result says
    who owns the request now and why."""
    progress = _Progress()
    way = way or PlainWay()
    chunk_blocks = max(1, limits.chunk_bytes // block_nbytes)
    copier = BlockCopier(
        order,
        source,
        target,
        way,
        CopyLimits(block_nbytes, chunk_blocks, limits.chunk_timeout_s),
    )
    started = time.monotonic()
    outcome: Outcome
    detail = ""
    try:
        async with asyncio.timeout(limits.timeout_s):
            state = await source.begin(order)
            first_block = await _bring_close(
                order, state, source, target, copier, block_size, limits, progress
            )
            await _hand_over(order, first_block, source, target, way, progress)
        outcome = "committed"
    except (MellError, PeerDied, TimeoutError) as error:
        detail = f"{type(error).__name__}: {error}"
        let_go(error)
        outcome = await _undo(order, source, target, limits)
    return MigrationResult(
        order=order,
        outcome=outcome,
        detail=detail,
        stages=progress.stages,
        bytes=copier.done.bytes + progress.tail_bytes,
        tail_bytes=progress.tail_bytes,
        tokens=progress.tokens,
        cached_tokens=progress.cached_tokens,
        generation=progress.generation,
        seconds=time.monotonic() - started,
        freeze_s=progress.freeze_s,
        copy_s=progress.copy_s,
        finished_at=time.time(),
        transport=copier.done.transport or "",
        fallbacks=copier.done.fallbacks,
    )


async def _bring_close(
    order: MigrationOrder,
    state: RequestState,
    source: Source,
    target: Target,
    copier: BlockCopier,
    block_size: int,
    limits: DriverLimits,
    progress: _Progress,
) -> int:
    """Bring the target so close to the source that freezing it costs about one step.

    Returns the first block that the freeze still has to carry.
    """
    reservation = await target.reserve(order, state)
    progress.cached_tokens = reservation.num_cached_tokens
    started = time.monotonic()
    try:
        return await _copy(
            order, state, reservation, source, target, copier, block_size, limits, progress
        )
    finally:
        progress.copy_s = time.monotonic() - started


async def _copy(
    order: MigrationOrder,
    state: RequestState,
    reservation: Reservation,
    source: Source,
    target: Target,
    copier: BlockCopier,
    block_size: int,
    limits: DriverLimits,
    progress: _Progress,
) -> int:
    if order.mode == "token":
        await _catch_up(order.migration_id, source, target, state.num_tokens, limits, progress)
        return 0
    first = reservation.num_cached_tokens // block_size
    copier.done.ready_blocks = state.num_computed // block_size
    if order.mode == "hybrid":
        stop = max(first, copier.done.ready_blocks)
        progress.stages += 1
        await copier.until_met(first, stop, block_size)
        await target.wait_progress(order.migration_id, stop * block_size + 1)
        first = stop
    few = limits.tail_bytes // copier.block_nbytes
    return await _copy_stages(copier, first, few, limits.max_stages, progress)


async def _copy_stages(
    copier: BlockCopier, first: int, few: int, max_stages: int, progress: _Progress
) -> int:
    """Each stage moves what was complete when it began, until what is left is ``few`` blocks, or
    one. A request of few blocks needs no stage at all."""
    while progress.stages < max_stages:
        ready = copier.done.ready_blocks
        if ready - first <= max(few, min(1, progress.stages)):
            break
        progress.stages += 1
        await copier.ascending(first, ready)
        first = ready
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
    order: MigrationOrder,
    first_block: int,
    source: Source,
    target: Target,
    way: Way,
    progress: _Progress,
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
    progress.tail_bytes = frozen.nbytes
    committed = await commit
    progress.generation = committed.generation
    progress.freeze_s = time.monotonic() - frozen_at
    way.rest(order.dst, committed.rest_s)
    with suppress(PeerDied, MigrationError):  # the source hears of it from the target, too
        way.rest(order.src, await source.release(order.migration_id))


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
    here = True
    try:
        async with asyncio.timeout(limits.settle_timeout_s):
            if settlement == "committed":
                await source.release(order.migration_id)
            else:
                here = await source.thaw(order)
    except PeerDied:
        here = False
    except (MellError, TimeoutError) as error:
        # What it was to be told it also finds out by itself.
        logger.warning("migration %s: no answer from the source: %r", order.migration_id, error)
    if settlement == "committed":
        return "committed"
    return "aborted" if here else "gone"
