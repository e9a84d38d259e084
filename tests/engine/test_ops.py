"""The CPU operations against attention written out for one token at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mell_kernels import ops
from mell_kernels.metadata import AttentionMetadata

from mell_ray.engine.kv_pool import KVPool, KVShape

BLOCK, LAYERS, HEADS, KV_HEADS, DIM = 4, 3, 4, 2, 8


def ragged(
    lengths: list[tuple[int, int]], num_blocks: int, seed: int
) -> tuple[AttentionMetadata, list[list[int]]]:
    """``lengths``: (KV tokens there already, new tokens) of each sequence; scattered blocks."""
    rng = np.random.default_rng(seed)
    free = rng.permutation(np.arange(1, num_blocks)).tolist()
    tables = [[free.pop() for _ in range(-(-(old + new) // BLOCK))] for old, new in lengths]
    width = max(len(table) for table in tables)
    slots = [
        table[position // BLOCK] * BLOCK + position % BLOCK
        for (old, new), table in zip(lengths, tables, strict=True)
        for position in range(old, old + new)
    ]
    new_lengths = [new for _, new in lengths]
    meta = AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, *np.cumsum(new_lengths)], dtype=torch.int32),
        seq_lens=torch.tensor([old + new for old, new in lengths], dtype=torch.int32),
        block_tables=torch.tensor(
            [table + [0] * (width - len(table)) for table in tables], dtype=torch.int32
        ),
        slot_mapping=torch.tensor(slots),
        max_seqlen_q=max(new_lengths),
        max_seqlen_k=max(old + new for old, new in lengths),
    )
    return meta, tables


def token_by_token(
    query: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    lengths: list[tuple[int, int]],
    tables: list[list[int]],
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    rows, t = [], 0
    for (old, new), table in zip(lengths, tables, strict=True):
        planes = pool[table, layer].transpose(0, 1).flatten(1, 2).double()
        keys, values = planes[0], planes[-1]
        for position in range(old, old + new):
            first = 0 if window is None else max(0, position - window + 1)
            heads = []
            for head in range(HEADS):
                kv_head = head // (HEADS // KV_HEADS)
                scores = keys[first : position + 1, kv_head] @ query[t, head].double() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat((scores, sinks[head : head + 1].double()))
                weights = torch.softmax(scores, dim=0)[: position + 1 - first]
                heads.append(weights @ values[first : position + 1, kv_head])
            rows.append(torch.stack(heads))
            t += 1
    return torch.stack(rows).float()


@given(
    lengths=st.lists(st.tuples(st.integers(0, 21), st.integers(1, 9)), min_size=1, max_size=4),
    window=st.sampled_from([None, 1, 3, 4, 8, 100]),
    softcap=st.sampled_from([None, 2.0]),
    with_sinks=st.booleans(),
    planes=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=120, deadline=None)
def test_paged_attention(
    lengths: list[tuple[int, int]],
    window: int | None,
    softcap: float | None,
    with_sinks: bool,
    planes: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    meta, tables = ragged(lengths, 40, seed)
    pool = torch.randn(40, LAYERS, planes, BLOCK, KV_HEADS, DIM)
    pool[0] = math.nan  # padding must reach nobody
    total = len(meta.slot_mapping)
    query = torch.randn(total, HEADS, DIM)
    key, value = torch.randn(2, total, KV_HEADS, DIM)
    sinks = torch.randn(HEADS) if with_sinks else None
    ops.prepare(pool, meta, ops.Workspace())
    for layer in (2, 0):
        before = pool.clone()
        ops.write_kv(pool, layer, key, value if planes == 2 else None, meta)
        changed = (pool != before) & ~before.isnan()
        assert not changed[:, [x for x in range(LAYERS) if x != layer]].any()
        options = {"scale": 0.3, "window": window, "softcap": softcap, "sinks": sinks}
        output = ops.paged_attention(query, pool, layer, meta, **options)
        expected = token_by_token(query, pool, layer, lengths, tables, **options)
        torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-4)


def test_stale_values_behind_the_end_of_a_sequence_reach_nobody() -> None:
    lengths = [(5, 1), (0, 2)]
    meta, _ = ragged(lengths, 10, 0)
    outputs = []
    for garbage in (0.0, math.nan):
        torch.manual_seed(1)
        pool = torch.full((10, LAYERS, 2, BLOCK, KV_HEADS, DIM), garbage)
        table = meta.block_tables[0].tolist()
        pool[table[0], 0], pool[table[1], 0, :, :1] = 0.5, 0.25
        ops.prepare(pool, meta, ops.Workspace())
        ops.write_kv(pool, 0, *torch.randn(2, 3, KV_HEADS, DIM), meta)
        query = torch.randn(3, HEADS, DIM)
        outputs.append(ops.paged_attention(query, pool, 0, meta, scale=1.0))
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exported_blocks_load_into_another_pool(dtype: torch.dtype) -> None:
    shape = KVShape(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=DIM, dtype=dtype)
    source, target = (KVPool(shape, BLOCK, 6, torch.device("cpu")) for _ in range(2))
    source.tensor.copy_(torch.randn(source.tensor.shape))
    data = source.export([5, 2])
    assert data.dtype == np.uint8
    assert data.shape == (2 * source.block_nbytes,)
    target.load([1, 4], data)
    assert torch.equal(target.tensor[[1, 4]], source.tensor[[5, 2]])
    assert not target.tensor[[0, 2, 3, 5, 6]].any()
    with pytest.raises(ValueError, match="needed"):
        target.load([1], data)


def test_a_block_is_one_extent() -> None:
    shape = KVShape(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=DIM, dtype=torch.float32)
    pool = KVPool(shape, BLOCK, 3, torch.device("cpu"))
    pool.tensor[2] = 1.0
    flat = pool.tensor.view(-1).nonzero()[:, 0]
    assert len(flat) * 4 == pool.block_nbytes
    assert (flat.diff() == 1).all()
