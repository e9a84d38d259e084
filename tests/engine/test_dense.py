"""Attention over dense copies of running decodes' KV, as batches come and go."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mell_kernels import ops
from mell_kernels.metadata import AttentionMetadata

from tests.engine.test_ops import BLOCK, DIM, HEADS, KV_HEADS, LAYERS, token_by_token

NUM_BLOCKS = 1200
SLOT_NBYTES = 64 * LAYERS * 2 * KV_HEADS * DIM * 4  # of the shelf for up to 64 tokens, float32


class Server:
    """A pool, and sequences that grow in it step by step."""

    def __init__(self, dense_nbytes: int, planes: int = 2, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        self.pool = torch.randn(NUM_BLOCKS, LAYERS, planes, BLOCK, KV_HEADS, DIM)
        self.pool[0] = math.nan  # padding must reach nobody
        self.free = self.rng.permutation(np.arange(1, NUM_BLOCKS)).tolist()
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self.workspace = ops.Workspace(dense_nbytes)
        self.started = 0

    def start(self, length: int) -> int:
        """A sequence with KV of ``length`` tokens, that of whoever had its blocks before."""
        self.started += 1
        self.tables[self.started] = [self.free.pop() for _ in range(-(-length // BLOCK))]
        self.lengths[self.started] = length
        return self.started

    def end(self, owner: int) -> None:
        self.free += self.tables.pop(owner)
        del self.lengths[owner]

    def meta(self, chunks: list[tuple[int, int]]) -> AttentionMetadata:
        """Of a step that computes ``(owner, tokens)`` each."""
        slots, rows = [], []
        for owner, count in chunks:
            table, start = self.tables[owner], self.lengths[owner]
            while len(table) * BLOCK < start + count:
                table.append(self.free.pop())
            slots += [table[p // BLOCK] * BLOCK + p % BLOCK for p in range(start, start + count)]
            rows.append(table)
        width = max(map(len, rows))
        counts = [count for _, count in chunks]
        ends = [self.lengths[owner] + count for owner, count in chunks]
        return AttentionMetadata(
            cu_seqlens_q=torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
            seq_lens=torch.tensor(ends, dtype=torch.int32),
            block_tables=torch.tensor(
                [row + [0] * (width - len(row)) for row in rows], dtype=torch.int32
            ),
            slot_mapping=torch.tensor(slots),
            max_seqlen_q=max(counts),
            max_seqlen_k=max(ends),
            owners=[owner for owner, _ in chunks],
        )

    def check(self, chunks: list[tuple[int, int]], **options) -> torch.Tensor:
        """Run one step in two layers and compare; returns what the last layer gave."""
        meta = self.meta(chunks)
        total, planes = len(meta.slot_mapping), self.pool.shape[2]
        ops.prepare(self.pool, meta, self.workspace)
        query = torch.randn(total, HEADS, DIM)
        sizes = [(self.lengths[owner], count) for owner, count in chunks]
        tables = [self.tables[owner] for owner, _ in chunks]
        for layer in range(LAYERS):
            key, value = torch.randn(2, total, KV_HEADS, DIM)
            ops.write_kv(self.pool, layer, key, value if planes == 2 else None, meta)
            output = ops.paged_attention(query, self.pool, layer, meta, **options)
            expected = token_by_token(query, self.pool, layer, sizes, tables, **options)
            torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-4)
        return output

    def advance(self, chunks: list[tuple[int, int]]) -> None:
        for owner, count in chunks:
            self.lengths[owner] += count


OPTIONS = {"scale": 0.3, "window": None, "softcap": None, "sinks": None}


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_attention_is_right_whoever_comes_goes_waits_or_is_computed_again(data) -> None:
    slots = data.draw(st.sampled_from([0, 1, 3, 9, 100]), label="memory for so many short ones")
    server = Server(
        slots * SLOT_NBYTES,
        planes=data.draw(st.sampled_from([1, 2])),
        seed=data.draw(st.integers(0, 100)),
    )
    options = {
        "scale": 0.3,
        "window": data.draw(st.sampled_from([None, None, 5, 70])),
        "softcap": data.draw(st.sampled_from([None, 2.0])),
        "sinks": torch.randn(HEADS) if data.draw(st.booleans()) else None,
    }
    for _ in range(data.draw(st.integers(1, 8), label="steps")):
        for _ in range(data.draw(st.integers(0, 3), label="come")):
            if len(server.tables) < 8:
                server.start(data.draw(st.sampled_from([0, 1, 3, 4, 62, 63, 64, 65, 90, 510])))
        if not server.tables:
            continue
        for owner in data.draw(st.lists(st.sampled_from(sorted(server.tables)), max_size=2)):
            if owner in server.tables and len(server.tables) > 1:
                server.end(owner)
        owners = data.draw(st.permutations(sorted(server.tables)))
        owners = owners[: data.draw(st.integers(1, len(owners)), label="take part")]
        chunks = [(owner, data.draw(st.sampled_from([1, 1, 1, 1, 6]))) for owner in owners]
        server.check(chunks, **options)
        assert server.workspace.dense.nbytes <= slots * SLOT_NBYTES
        # A step that failed, or had no mask for its grammar, is computed again.
        if data.draw(st.integers(0, 3), label="again at 0"):
            server.advance(chunks)


def test_batch_in_the_order_of_the_copies_gives_the_same() -> None:
    server = Server(1 << 20)
    owners = [server.start(length) for length in (70, 3, 80, 10, 7)]
    server.check([(owner, 1) for owner in owners], **OPTIONS)
    server.end(owners.pop(1))
    owners.append(server.start(20))
    for _ in range(3):
        chunks = [(owner, 1) for owner in sorted(owners, key=server.workspace.dense.place_of)]
        server.check(chunks, **OPTIONS)
        server.advance(chunks)


def test_nothing_of_a_sequence_that_ended_reaches_who_takes_its_place() -> None:
    server = Server(1 << 20)
    bad = server.start(40)
    server.pool[server.tables[bad]] = math.nan
    meta = server.meta([(bad, 1)])
    ops.prepare(server.pool, meta, server.workspace)
    ops.write_kv(server.pool, 0, *torch.full((2, 1, KV_HEADS, DIM), math.nan), meta)
    server.end(bad)
    server.pool.copy_(torch.randn(server.pool.shape))
    chunks = [(server.start(5), 1)]
    assert server.workspace.dense.nbytes > 0
    for _ in range(40):
        server.check(chunks, **OPTIONS)
        server.advance(chunks)


def test_copies_of_a_pool_are_not_used_for_the_next_pool() -> None:
    server = Server(1 << 20)
    chunks = [(server.start(30), 1)]
    server.check(chunks, **OPTIONS)
    server.pool = torch.randn(server.pool.shape)
    server.check(chunks, **OPTIONS)
