"""Who holds which KV block, and which blocks hold which prefix. Integers only, no torch.

A block is *used* while at least one sequence refers to it and *free* otherwise. A free block whose
content is still known by its prefix hash is *cached*: it is handed out again only when no blank
block is left, the least recently freed one first.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from mell_ray.errors import OutOfBlocksError

PADDING_BLOCK = 0
_HASH_BYTES = 16


def root_hash(*identity: str) -> bytes:
    """Start of the hash chain: everything besides the tokens that decides the KV (model, dtype)."""
    return blake2b("\0".join(identity).encode(), digest_size=_HASH_BYTES).digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of one full block given the hash of the block before it (or the root)."""
    return blake2b(parent + array("I", token_ids).tobytes(), digest_size=_HASH_BYTES).digest()


def extend_chain(
    chain: list[bytes], root: bytes, token_ids: Sequence[int], block_size: int, num_blocks: int
) -> None:
    """Lengthen ``chain`` in place to ``num_blocks`` hashes; what it already has is kept."""
    for i in range(len(chain), num_blocks):
        parent = chain[-1] if chain else root
        chain.append(block_hash(parent, token_ids[i * block_size : (i + 1) * block_size]))


class BlockPool:
    """Reference counts, prefix index and free lists of ``capacity`` blocks.

    Block ids run from 1 to ``capacity``; block 0 is for padding rows and never handed out.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.evictions = 0  # cached blocks given to somebody else, since the start
        self._refs = [0] * (capacity + 1)
        self._hash_of: list[bytes | None] = [None] * (capacity + 1)
        self._block_of: dict[bytes, int] = {}
        self._blank = list(range(capacity, 0, -1))  # a stack: the last used is the warmest
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.capacity - self.num_free

    def refs(self, block: int) -> int:
        return self._refs[block]

    def is_cached(self, block: int) -> bool:
        """Whether a later request may find this block by its prefix hash."""
        return self._hash_of[block] is not None

    def allocate(self, count: int) -> list[int]:
        """``count`` private blocks.

        Raises:
            OutOfBlocksError: fewer are free; nothing is taken then.
        """
        if count > self.num_free:
            raise OutOfBlocksError(f"{count} KV blocks needed, {self.num_free} free")
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
            self.evictions += 1
        self._refs[block] = 1
        return block

    def _forget(self, block: int) -> None:
        digest = self._hash_of[block]
        if digest is not None:
            del self._block_of[digest]
            self._hash_of[block] = None

    def match(self, chain: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix of ``chain``. Changes nothing."""
        blocks = []
        for digest in chain:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_without(self, blocks: Iterable[int]) -> int:
        """Free blocks that would be left after ``share(blocks)``."""
        return self.num_free - sum(1 for block in blocks if self._refs[block] == 0)

    def share(self, blocks: Iterable[int]) -> None:
        """Take one more reference on each of ``blocks``, which ``match`` returned."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one reference on each, the last block first, so that prefixes live longest."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] > 0:
                continue
            if self._hash_of[block] is None:
                self._blank.append(block)
            else:
                self._cached[block] = None

    def register(self, block: int, digest: bytes) -> None:
        """Say that ``block`` is full and computed. The first block of a content keeps the hash."""
        if digest not in self._block_of and self._hash_of[block] is None:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def forget_cached(self) -> None:
        """Forget what the blocks hold. Only where none is in use."""
        self._cached.clear()
        self._block_of.clear()
        self._hash_of = [None] * (self.capacity + 1)
        self._blank = list(range(self.capacity, 0, -1))

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Compare with the blocks that all ``holders`` say they have.

        Raises:
            AssertionError: naming what is wrong.
        """
        expected = [0] * (self.capacity + 1)
        for blocks in holders:
            for block in blocks:
                expected[block] += 1
        assert expected[PADDING_BLOCK] == 0, "the padding block was handed out"
        for block in range(1, self.capacity + 1):
            assert expected[block] == self._refs[block], (
                f"block {block} has {self._refs[block]} references, {expected[block]} holders"
            )
        free = [*self._blank, *self._cached]
        assert len(free) == len(set(free)), "a block is free twice"
        used = sum(1 for count in self._refs if count > 0)
        assert len(free) + used == self.capacity, f"{len(free)} free + {used} used blocks"
        assert all(self._refs[block] == 0 for block in free), "a free block is referred to"
        assert all(self._hash_of[block] is None for block in self._blank), (
            "a blank block has a hash"
        )
        for digest, block in self._block_of.items():
            assert self._hash_of[block] == digest, f"prefix index and block {block} disagree"
