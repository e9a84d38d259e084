"""Which tokens the next step computes, and who gets blocks for them. No torch.

One token budget per step: sequences that decode come first with one token each, then prefills in
order get what is left, in chunks; last, waiting requests are admitted. Order is priority, then
arrival. Prefill, chunk, prefix hit, recomputation after preemption and the target side of a token
migration are all the same thing here: "computed up to here, compute that many more".
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from mell_ray.engine.block_pool import BlockPool, extend_chain
from mell_ray.engine.sequence import Sequence
from mell_ray.errors import OutOfBlocksError


def _key(seq: Sequence) -> tuple[int, float, int]:
    return seq.key


@dataclass(slots=True)
class Plan:
    """``chunks[i]`` = (sequence, how many of its tokens to compute)."""

    chunks: list[tuple[Sequence, int]] = field(default_factory=list)
    num_preempted: int = 0


class Planner:
    """Owns the queues, the rows of the block table, and all block allocation.

    ``waiting`` sequences hold nothing. ``running`` ones hold a row and blocks and are planned.
    A *parked* sequence (frozen, or reserved for imports) holds a row and blocks but stands in
    neither list; parked and reserved sequences are never preempted.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefix_root: bytes | None,
    ) -> None:
        self.pool = pool
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.prefix_hit_tokens = 0
        self.prefix_query_tokens = 0
        self.preemptions = 0
        self.block_size = block_size
        self._budget = max_num_batched_tokens
        self._root = prefix_root
        self._rows = list(range(max_num_seqs - 1, -1, -1))
        self._stalled = False

    # --- queues --------------------------------------------------------------------------------

    def changed(self) -> None:
        """Something outside the planner may have made progress possible again."""
        self._stalled = False

    def has_work(self) -> bool:
        if self._stalled:
            return False
        return bool(self.waiting) or any(seq.num_to_compute > 0 for seq in self.running)

    def enqueue(self, seq: Sequence) -> None:
        seq.status = "waiting"
        insort(self.waiting, seq, key=_key)
        self.changed()

    def run(self, seq: Sequence) -> None:
        """Plan ``seq``, which already holds a row, from the next step on."""
        insort(self.running, seq, key=_key)
        self.changed()

    def park(self, seq: Sequence) -> None:
        """Leave ``seq`` out of planning; it keeps what it holds."""
        for queue in (self.waiting, self.running):
            at = bisect_left(queue, seq.key, key=_key)
            if at < len(queue) and queue[at] is seq:
                del queue[at]
        self.changed()

    def remove(self, seq: Sequence) -> None:
        self.park(seq)
        self.drop_blocks(seq)

    # --- blocks --------------------------------------------------------------------------------

    def drop_blocks(self, seq: Sequence) -> None:
        self.pool.free(seq.blocks)
        seq.blocks = []
        seq.times_dropped += 1
        seq.num_registered = 0
        seq.num_table_blocks = 0
        if seq.row is not None:
            self._rows.append(seq.row)
            seq.row = None

    def grow(self, seq: Sequence, num_tokens: int) -> None:
        """Give ``seq`` blocks for ``num_tokens`` tokens.

        Raises:
            OutOfBlocksError: the pool has too few; nothing is taken then.
        """
        missing = seq.blocks_for(num_tokens) - len(seq.blocks)
        if missing > 0:
            seq.blocks += self.pool.allocate(missing)

    def take_room(self, seq: Sequence, num_tokens: int, spare: int = 0) -> None:
        """Give ``seq``, which holds nothing, a row, its cached prefix, and blocks for
        ``num_tokens`` tokens; ``spare`` blocks must stay free besides.

        Raises:
            OutOfBlocksError: no row or too few blocks; nothing is taken then.
        """
        if not self._rows:
            raise OutOfBlocksError("max_num_seqs sequences are already running")
        cached = self._match(seq)
        needed = seq.blocks_for(num_tokens) - len(cached)
        available = self.pool.num_free_without(cached) - spare
        if needed > available:
            raise OutOfBlocksError(f"{needed} KV blocks needed, {max(available, 0)} available")
        self.pool.share(cached)
        seq.blocks = cached + self.pool.allocate(needed)
        seq.row = self._rows.pop()
        seq.num_registered = len(cached)
        seq.num_computed = len(cached) * self.block_size
        self.prefix_hit_tokens += seq.num_computed
        if self._root is not None:
            self.prefix_query_tokens += seq.num_tokens

    def unshare(self, seq: Sequence) -> None:
        """Give up blocks that were offered to the prefix index but will be computed again: that
        must not happen inside a block others may read."""
        full = seq.num_computed // self.block_size
        if full < seq.num_registered:
            self.pool.free(seq.blocks[full:])
            del seq.blocks[full:]
            seq.num_registered = full
            seq.num_table_blocks = min(seq.num_table_blocks, full)
            seq.num_computed = full * self.block_size

    def _match(self, seq: Sequence) -> list[int]:
        """Cached blocks of ``seq``'s prefix. At least its last token is left to compute: computing
        it again inside a shared block would change that block under its other readers."""
        if self._root is None:
            return []
        usable = (seq.num_tokens - 1) // self.block_size
        extend_chain(seq.chain, self._root, seq.token_ids, self.block_size, usable)
        return self.pool.match(seq.chain[:usable])

    def register(self, seq: Sequence) -> None:
        """Offer blocks that have become full and computed to the prefix index."""
        full = seq.num_computed // self.block_size
        if self._root is None or full <= seq.num_registered:
            return
        extend_chain(seq.chain, self._root, seq.token_ids, self.block_size, full)
        for i in range(seq.num_registered, full):
            self.pool.register(seq.blocks[i], seq.chain[i])
        seq.num_registered = full

    # --- planning ------------------------------------------------------------------------------

    def plan(self) -> Plan:
        plan = Plan()
        budget = self._plan_running(plan, self._budget, decodes=True)
        budget = self._plan_running(plan, budget, decodes=False)
        self._admit(plan, budget)
        self._stalled = not plan.chunks
        return plan

    def _plan_running(self, plan: Plan, budget: int, *, decodes: bool) -> int:
        for seq in self._each_running():
            todo = seq.num_to_compute
            if budget == 0:
                break
            if todo < 1 or (todo == 1) is not decodes:
                continue
            chunk = min(todo, budget)
            if self._make_room(seq, seq.num_computed + chunk, plan):
                plan.chunks.append((seq, chunk))
                budget -= chunk
        return budget

    def _each_running(self) -> Iterator[Sequence]:
        """In order, while preemption shortens the list from its end."""
        index = 0
        while index < len(self.running):
            seq = self.running[index]
            yield seq
            if index < len(self.running) and self.running[index] is seq:
                index += 1

    def _make_room(self, seq: Sequence, num_tokens: int, plan: Plan) -> bool:
        """Blocks for ``seq`` up to ``num_tokens``, at the cost of those after it in order.

        False if ``seq`` itself was preempted, or must wait because all that is left of the pool
        belongs to migrations (it keeps its blocks then: they end or expire).
        """
        missing = seq.blocks_for(num_tokens) - len(seq.blocks)
        while missing > self.pool.num_free:
            victim = self._victim(plan)
            if victim is None or (victim is seq and self._alone(seq)):
                return False
            self._preempt(victim, plan)
            if victim is seq:
                return False
        self.grow(seq, num_tokens)
        return True

    def _victim(self, plan: Plan) -> Sequence | None:
        """The last in order that may be preempted and has no chunk in this plan yet."""
        planned = {id(seq) for seq, _ in plan.chunks}
        for seq in reversed(self.running):
            if seq.status == "running" and id(seq) not in planned:
                return seq
        return None

    def _alone(self, seq: Sequence) -> bool:
        return all(other is seq or other.status != "running" for other in self.running)

    def _preempt(self, seq: Sequence, plan: Plan) -> None:
        self.park(seq)
        self.drop_blocks(seq)
        seq.num_computed = 0
        self.enqueue(seq)
        self.preemptions += 1
        plan.num_preempted += 1

    def _admit(self, plan: Plan, budget: int) -> None:
        """Admit strictly in order: a big request is never overtaken for ever by small ones.

        Blocks for all known tokens are taken at once, so that a prefill never has to stop half
        way, and what the running ones need in their next step is left free, so that nobody is
        admitted only to be preempted.
        """
        spare = sum(
            1
            for seq in self.running
            if seq.status == "running" and seq.num_tokens >= len(seq.blocks) * self.block_size
        )
        computing = self._being_computed(plan.chunks) if self.waiting else set()
        while self.waiting and budget > 0 and not self._soon_cached(self.waiting[0], computing):
            seq = self.waiting[0]
            try:
                self.take_room(seq, seq.num_tokens, spare)
            except OutOfBlocksError:
                break
            del self.waiting[0]
            seq.status = "running"
            insort(self.running, seq, key=_key)
            chunk = (seq, min(seq.num_to_compute, budget))
            plan.chunks.append(chunk)
            budget -= chunk[1]
            computing |= self._being_computed([chunk])

    def _being_computed(self, chunks: list[tuple[Sequence, int]]) -> set[bytes]:
        """Hashes of the blocks that prefills among ``chunks`` complete in this step."""
        hashes: set[bytes] = set()
        for seq, count in chunks:
            if self._root is not None and count > 1:
                full = (seq.num_computed + count) // self.block_size
                extend_chain(seq.chain, self._root, seq.token_ids, self.block_size, full)
                hashes.update(seq.chain[seq.num_registered : full])
        return hashes

    def _soon_cached(self, seq: Sequence, computing: set[bytes]) -> bool:
        """Whether another sequence computes the very next block of ``seq`` in this step, as among
        several choices for one prompt. It is cheaper to wait for that than to compute it twice."""
        if not computing:
            return False
        known = len(self._match(seq))
        usable = (seq.num_tokens - 1) // self.block_size
        return known < usable and seq.chain[known] in computing

    # --- invariants ----------------------------------------------------------------------------

    def check(self, seqs: list[Sequence]) -> None:
        """``seqs``: everything that may hold a row or blocks.

        Raises:
            AssertionError: with what does not agree.
        """
        for queue in (self.waiting, self.running):
            keys = [seq.key for seq in queue]
            assert keys == sorted(keys), "a queue is out of order"
        for seq in self.waiting:
            assert not seq.blocks, f"{seq.request_id} waits and holds blocks"
        rows = [seq.row for seq in seqs if seq.row is not None]
        assert len(set(rows)) == len(rows), "two sequences share a row of the block table"
        assert not set(rows) & set(self._rows), "a row is free and taken"
        for seq in seqs:
            self._check_sequence(seq)

    def _check_sequence(self, seq: Sequence) -> None:
        name = seq.request_id
        assert seq.row is not None or not seq.blocks, f"{name} has blocks without a row"
        assert len(set(seq.blocks)) == len(seq.blocks), f"{name} holds a block twice"
        held = len(seq.blocks) * self.block_size
        assert seq.num_computed <= held, f"{name}: {seq.num_computed} computed, room for {held}"
        full = seq.num_computed // self.block_size
        assert seq.num_registered <= full, f"{name} registered an unfinished block"
        for block in seq.blocks[full:]:
            assert self.pool.refs(block) == 1, f"{name} may write block {block}, which is shared"
            assert not self.pool.is_cached(block), (
                f"{name} may write block {block}, which is cached"
            )
