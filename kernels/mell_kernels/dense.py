"""The KV of running decodes once more, each sequence's in one piece.

Blocks make KV movable and shareable, but a CPU's attention wants a sequence's keys side by side,
and to gather them for each layer of each step costs about as much as the attention itself. So
sequences that decode keep a dense copy beside the pool, as far as its memory allows: filled once
from their blocks, and from then on made longer by what each step writes. The pool stays what is
true: a copy may be dropped at any time.

Copies of sequences of similar length lie in one tensor, a shelf, so that one call serves them all.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

_SHORTEST = 64  # tokens; each shelf's sequences are up to twice as long as the one's before
# To copy longer ones takes as long as a step, which their clients would see at each migration.
_LONGEST = 512
_LONGER = 16  # tokens that are read at a time, so that the same views serve as many steps
_MORE = 8  # slots that a shelf grows by
_EMPTY = -1
_FILL_BLOCKS = 64  # at once, which bounds the memory in between


class Decode(NamedTuple):
    """One decoding sequence of a batch."""

    owner: Hashable  # the same as long as what its blocks hold only grows
    token: int  # its row of the batch
    length: int  # tokens of KV, this step's included
    blocks: np.ndarray  # at least those that hold the tokens before


@dataclass(slots=True)
class Served:
    """Decodes that one shelf serves in a step. They are its first G slots, in their order."""

    longest: int
    tokens: slice | torch.Tensor  # [G] rows of the batch
    write_rows: list[torch.Tensor]  # [G] for each plane, in ``token_rows``
    token_rows: list[torch.Tensor]  # for each layer, [slots * planes * capacity, Hk * D]
    layers: list[tuple[torch.Tensor, torch.Tensor]]  # keys, values: [G, Hk, keys, D]
    mask: torch.Tensor  # [G, 1, 1, keys] to add

    def of_batch(self, rows: torch.Tensor) -> torch.Tensor:
        """Those of a tensor with one row per token of the batch, ``[G, ...]``."""
        if isinstance(self.tokens, slice):
            return rows[self.tokens]
        return rows.index_select(0, self.tokens)

    def to_batch(self, result: torch.Tensor) -> torch.Tensor:
        """``of_batch`` undone, where these decodes are the batch."""
        if isinstance(self.tokens, slice):
            return result
        return torch.empty_like(result).index_copy_(0, self.tokens, result)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor | None) -> None:
        """The batch's keys and values, ``[T, Hk, D]``."""
        for heads, rows in zip((key, value), self.write_rows, strict=False):
            if heads is not None:
                self.token_rows[layer].index_copy_(0, rows, self.of_batch(heads).flatten(1))


class _Shelf:
    def __init__(self, pool: torch.Tensor, capacity: int, slots: int) -> None:
        _, layers, planes, self._block_size, kv_heads, dim = pool.shape
        self.capacity, self.slots, self.planes = capacity, slots, planes
        self._heads = kv_heads, dim
        shape = (layers, slots, planes, capacity, kv_heads * dim)
        self._kv = torch.zeros(shape, dtype=pool.dtype, device=pool.device)
        self._mask = pool.new_zeros((slots, 1, 1, capacity))
        self._token_rows = list(self._kv.view(layers, -1, kv_heads * dim))
        self.slot_of: dict[Hashable, int] = {}
        self._owners: list[Hashable] = [None] * slots
        self._lengths = [_EMPTY] * slots
        self._views: tuple[int, int] = (0, 0)
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def nbytes(self) -> int:
        return self._kv.nbytes

    def serve(self, pool: torch.Tensor, decodes: list[Decode]) -> Served:
        """``decodes``: at most as many as there are slots, none longer than the capacity."""
        placed = self._place(decodes)
        for slot, decode in enumerate(placed):
            if self._lengths[slot] not in (decode.length - 1, decode.length):
                self._fill(pool, slot, decode)
            self._lengths[slot] = decode.length
        last = np.array([decode.length - 1 for decode in placed])
        first = np.arange(len(placed)) * self.capacity
        self._mask.view(-1).index_fill_(0, torch.from_numpy(first + last), 0.0)
        longest = int(last.max()) + 1
        num_keys = min(self.capacity, -(-longest // _LONGER) * _LONGER)
        rows = first * self.planes + last
        return Served(
            longest=longest,
            tokens=_rows_of([decode.token for decode in placed]),
            write_rows=[
                torch.from_numpy(rows + plane * self.capacity) for plane in range(self.planes)
            ],
            token_rows=self._token_rows,
            layers=self._viewed(len(placed), num_keys),
            mask=self._mask[: len(placed), ..., :num_keys],
        )

    def _place(self, decodes: list[Decode]) -> list[Decode]:
        """By slot, without a gap: who has a slot that is left keeps it."""
        placed: list[Decode | None] = [None] * len(decodes)
        others = []
        for decode in decodes:
            slot = self.slot_of.get(decode.owner, len(decodes))
            if slot < len(decodes):
                placed[slot] = decode
            else:
                others.append(decode)
        for slot, holder in enumerate(placed):
            if holder is None:
                placed[slot] = decode = others.pop(0)
                self._give(slot, decode.owner)
        return [decode for decode in placed if decode is not None]

    def _give(self, slot: int, owner: Hashable) -> None:
        before = self._owners[slot]
        if before is not None:
            del self.slot_of[before]
        left = self.slot_of.get(owner)
        if left is not None:
            self._owners[left], self._lengths[left] = None, _EMPTY
        self.slot_of[owner], self._owners[slot] = slot, owner
        self._lengths[slot] = _EMPTY

    def _fill(self, pool: torch.Tensor, slot: int, decode: Decode) -> None:
        """With the tokens before this step's. Zeros follow, so that nothing of whoever was here
        before, not even a NaN, can reach a softmax."""
        size, before = self._block_size, decode.length - 1
        kept = self._kv[:, slot]
        for start in range(0, -(-before // size), _FILL_BLOCKS):
            stop = min(start + _FILL_BLOCKS, -(-before // size))
            ids = decode.blocks[start:stop].astype(np.int64)
            blocks = pool.index_select(0, torch.from_numpy(ids)).flatten(4).permute(1, 2, 0, 3, 4)
            target = kept[:, :, start * size : (start + len(ids)) * size]
            target.unflatten(2, (len(ids), size)).copy_(blocks)
        kept[:, :, before:].zero_()
        self._mask[slot, ..., :before].zero_()
        self._mask[slot, ..., before:].fill_(-torch.inf)

    def _viewed(self, count: int, num_keys: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if self._views != (count, num_keys):
            self._views = count, num_keys
            kv = self._kv[:, :count, :, :num_keys].unflatten(4, self._heads).transpose(3, 4)
            self._layers = [(layer[:, 0], layer[:, -1]) for layer in kv]
        return self._layers


class DenseKV:
    """The copies of one pool's sequences, in ``nbytes`` of memory at most."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._pool: torch.Tensor | None = None
        self._shelves: dict[int, _Shelf] = {}

    @property
    def nbytes(self) -> int:
        return sum(shelf.nbytes for shelf in self._shelves.values())

    def place_of(self, owner: Hashable) -> tuple[int, int]:
        """Sorts sequences as they lie here; who is not here comes last. A batch in this order needs
        no exchange of rows around attention."""
        for capacity in sorted(self._shelves, reverse=True):  # it may have outgrown another
            slot = self._shelves[capacity].slot_of.get(owner)
            if slot is not None:
                return capacity, slot
        return 1 << 62, 0

    def serve(self, pool: torch.Tensor, decodes: list[Decode]) -> tuple[list[Served], set[int]]:
        """What serves which of ``decodes``, and their rows of the batch."""
        if self._pool is not pool:
            self._pool, self._shelves = pool, {}
        by_capacity: dict[int, list[Decode]] = {}
        for decode in decodes:
            if decode.length > _LONGEST:
                continue
            by_capacity.setdefault(_capacity(decode.length, pool.shape[3]), []).append(decode)
        served: list[Served] = []
        rows: set[int] = set()
        for capacity, members in sorted(by_capacity.items()):
            shelf = self._shelf(pool, capacity, len(members), by_capacity)
            if shelf is not None:
                # Those that are here already come first: who is left out is always the same.
                members.sort(key=lambda decode: shelf.slot_of.get(decode.owner, shelf.slots))
                members = members[: shelf.slots]
                served.append(shelf.serve(pool, members))
                rows.update(decode.token for decode in members)
        return served, rows

    def _shelf(
        self, pool: torch.Tensor, capacity: int, wanted: int, in_use: dict[int, list[Decode]]
    ) -> _Shelf | None:
        """A shelf with ``wanted`` slots, or with fewer or none where memory ends."""
        shelf = self._shelves.get(capacity)
        if shelf is not None and shelf.slots >= wanted:
            return shelf
        slot_nbytes = pool[0, :, :, 0].nbytes * capacity
        slots = -(-wanted // _MORE) * _MORE
        held = self.nbytes - (0 if shelf is None else shelf.nbytes)
        for other in list(self._shelves):
            if other not in in_use and held + slots * slot_nbytes > self._nbytes:
                held -= self._shelves.pop(other).nbytes
        slots = min(slots, (self._nbytes - held) // slot_nbytes)
        if slots > (0 if shelf is None else shelf.slots):
            self._shelves.pop(capacity, None)  # what it holds is read from the pool again
            shelf = self._shelves[capacity] = _Shelf(pool, capacity, slots)
        return shelf


def _capacity(length: int, block_size: int) -> int:
    """Of the shelf for sequences of ``length``: whole blocks, and at most twice as long."""
    tokens = max(_SHORTEST, 1 << (length - 1).bit_length())
    return -(-tokens // block_size) * block_size


def _rows_of(tokens: list[int]) -> slice | torch.Tensor:
    first, count = tokens[0], len(tokens)
    if tokens == list(range(first, first + count)):
        return slice(first, first + count)
    return torch.tensor(tokens)
