"""The pool's books, without torch."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from mell_ray.engine.block_pool import BlockPool, block_hash, extend_chain, root_hash
from mell_ray.errors import OutOfBlocksError

CAPACITY = 9


class PoolMachine(RuleBasedStateMachine):
    """Holders come and go; a plain dictionary of who holds what is the model."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(CAPACITY)
        self.holders: dict[int, list[int]] = {}
        self.count = 0

    def hold(self, blocks: list[int]) -> int:
        self.count += 1
        self.holders[self.count] = blocks
        return self.count

    @rule(target=held, count=st.integers(0, 5))
    def allocate(self, count: int) -> int:
        free = self.pool.num_free
        if count > free:
            with pytest.raises(OutOfBlocksError):
                self.pool.allocate(count)
            assert self.pool.num_free == free
            return self.hold([])
        blocks = self.pool.allocate(count)
        assert all(
            self.pool.refs(block) == 1 and not self.pool.is_cached(block) for block in blocks
        )
        assert self.pool.num_free == free - count
        return self.hold(blocks)

    @rule(holder=held, name=st.integers(0, 4))
    def register(self, holder: int, name: int) -> None:
        blocks = self.holders.get(holder, [])
        for i, block in enumerate(blocks):
            self.pool.register(block, bytes([name, i]))

    @rule(target=held, name=st.integers(0, 4))
    def share(self, name: int) -> int:
        blocks = self.pool.match([bytes([name, i]) for i in range(5)])
        free_after = self.pool.num_free_without(blocks)
        self.pool.share(blocks)
        assert self.pool.num_free == free_after
        return self.hold(blocks)

    @rule(holder=consumes(held))
    def free(self, holder: int) -> None:
        self.pool.free(self.holders.pop(holder))

    @invariant()
    def books_agree(self) -> None:
        self.pool.check(self.holders.values())
        assert self.pool.num_used + self.pool.num_free == CAPACITY


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def test_the_padding_block_is_never_handed_out() -> None:
    assert sorted(BlockPool(4).allocate(4)) == [1, 2, 3, 4]


def test_the_least_recently_freed_content_is_overwritten_first() -> None:
    pool = BlockPool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    for name, blocks in ((b"o", old), (b"n", new)):
        for i, block in enumerate(blocks):
            pool.register(block, name + bytes([i]))
    pool.free(old)
    pool.free(new)
    pool.allocate(1)
    # Of the older request the tail went first, so its prefix is still of use.
    assert pool.match([b"o\0", b"o\1"]) == old[:1]
    assert pool.match([b"n\0", b"n\1"]) == new
    pool.allocate(1)
    assert pool.match([b"o\0"]) == []


def test_blank_blocks_are_used_before_cached_ones() -> None:
    pool = BlockPool(3)
    (cached,) = pool.allocate(1)
    pool.register(cached, b"x")
    pool.free([cached])
    assert cached not in pool.allocate(2)
    assert pool.num_cached == 1


def test_the_first_block_of_a_content_keeps_the_hash() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.register(first, b"x")
    pool.register(second, b"x")
    assert pool.match([b"x"]) == [first]
    pool.free([second])
    assert pool.num_cached == 0


def test_a_shared_block_outlives_its_first_owner() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.register(blocks[0], b"x")
    pool.share(blocks)
    pool.free(blocks)
    assert pool.num_free == 0
    with pytest.raises(OutOfBlocksError):
        pool.allocate(1)


def test_a_hash_depends_on_all_tokens_before_it() -> None:
    root = root_hash("model", "float32")
    chains = []
    for first in (1, 2):
        chain: list[bytes] = []
        extend_chain(chain, root, [first, 5, 6, 7, 8, 9], 2, 3)
        chains.append(chain)
    assert len(set(chains[0] + chains[1])) == 6
    assert root_hash("model", "bfloat16") != root
    assert root_hash("ab", "c") != root_hash("a", "bc")


def test_a_chain_is_extended_not_recomputed() -> None:
    root = root_hash("m")
    tokens = list(range(8))
    whole: list[bytes] = []
    extend_chain(whole, root, tokens, 2, 4)
    grown = [b"kept"]
    extend_chain(grown, root, tokens, 2, 2)
    assert grown == [b"kept", block_hash(b"kept", [2, 3])]
    part = whole[:2]
    extend_chain(part, root, tokens, 2, 4)
    assert part == whole


def test_the_hash_is_the_same_on_every_machine() -> None:
    root = root_hash("model", "torch.float32", "16")
    assert root.hex() == "721f6dcdf286bbadbfe1ff2370328be0"
    assert block_hash(root, list(range(16))).hex() == "5b797f69339851420c0ba31751622455"


def test_check_finds_a_leak_and_a_double_free() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    with pytest.raises(AssertionError, match="0 holders"):
        pool.check([])
    pool.free(blocks)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="references"):
        pool.check([])
