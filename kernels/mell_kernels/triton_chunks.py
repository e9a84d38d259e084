"""Paged attention of ragged chunks in Triton: queries of any number per sequence, over what is
cached before them and over each other; see ``triton_tiles`` for what a tile is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mell_kernels.triton_tiles import LOG2E, Shape, fold_tile, load_query, store_rows


@triton.jit(do_not_specialize=["num_seqs", "stride_table"])
def _chunk_kernel(
    out,
    query,
    k_cache,
    v_cache,
    block_tables,
    seq_lens,
    cu_seqlens,
    sinks,
    scale,
    softcap,
    num_seqs,
    num_heads,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_table,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    SAME: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (tile of queries, HEADS heads of one KV head). Rows are (token, head) pairs.

    Sequence ``i`` gets the tiles from ``(cu_seqlens[i] - cu_seqlens[0]) // TOKENS + i`` on, which
    are enough for any length; a few programs find nothing to do. So the host need not know the
    lengths.
    """
    TILES_OF_HEADS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    TOKENS: tl.constexpr = ROWS // HEADS
    q_tile = tl.program_id(0)
    kv_head = tl.program_id(1) // TILES_OF_HEADS
    origin = tl.load(cu_seqlens)
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        its_first = (tl.load(cu_seqlens + middle) - origin) // TOKENS + middle
        if its_first <= q_tile:
            low = middle + 1
        else:
            high = middle
    seq = low - 1
    q_start = tl.load(cu_seqlens + seq)
    q_len = tl.load(cu_seqlens + seq + 1) - q_start
    token0 = (q_tile - (q_start - origin) // TOKENS - seq) * TOKENS
    if token0 >= q_len:
        return
    length = tl.load(seq_lens + seq)
    cached = length - q_len

    rows = tl.arange(0, ROWS)
    tokens = token0 + rows // HEADS
    in_group = tl.program_id(1) % TILES_OF_HEADS * HEADS + rows % HEADS
    heads = kv_head * GROUP + in_group
    real = (rows < TOKENS * HEADS) & (tokens < q_len) & (in_group < GROUP)
    q_positions = cached + tokens
    q_rows = (q_start + tokens).to(tl.int64)
    q_main, q_rest = load_query(
        query, q_rows * stride_qt + heads * stride_qh, real, DIM, MAIN, REST
    )
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc_main = tl.zeros([ROWS, MAIN], tl.float32)
    acc_rest = tl.zeros([ROWS, REST], tl.float32)
    if SINKS:
        best = tl.load(sinks + heads, mask=real, other=0.0).to(tl.float32) * LOG2E
        total = total + 1.0

    first = 0
    if WINDOW > 0:
        first = tl.maximum(cached + token0 - WINDOW + 1, 0)
    last = tl.minimum(length, cached + token0 + TOKENS)
    table = block_tables + tl.cast(seq, tl.int64) * stride_table
    k_head = k_cache + kv_head.to(tl.int64) * stride_kh
    v_head = v_cache + kv_head.to(tl.int64) * stride_vh
    for tile in range(first // TILE, tl.cdiv(last, TILE)):
        positions = tile * TILE + tl.arange(0, TILE)
        inside = positions < last
        visible = inside[None, :] & (positions[None, :] <= q_positions[:, None])
        if WINDOW > 0:
            visible = visible & (positions[None, :] > q_positions[:, None] - WINDOW)
        best, total, acc_main, acc_rest = fold_tile(
            k_head, v_head, table, positions, inside, visible,
            q_main, q_rest, best, total, acc_main, acc_rest, scale, softcap,
            stride_kb, stride_kt, stride_vb, stride_vt,
            SOFTCAP, SAME, DIM, MAIN, REST, BLOCK_SIZE,
        )  # fmt: skip

    norm = tl.where(total > 0, total, 1.0)[:, None]
    at = (q_rows * num_heads + heads) * DIM
    store_rows(out, at, real, acc_main / norm, acc_rest / norm, DIM, MAIN, REST)


def chunks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    out: torch.Tensor,
    *,
    num_tokens: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Causal attention of ragged chunks of queries over paged KV, into ``out``.

    Args:
        query: ``[T, num_heads, head_dim]``; sequence ``i`` has the rows ``cu_seqlens[i]`` to
            ``cu_seqlens[i + 1]``, which are the last of its ``seq_lens[i]`` tokens.
        cu_seqlens: ``[B + 1]`` int32. It may begin above 0: rows before are not touched.
        num_tokens: of all chunks together, ``cu_seqlens[-1] - cu_seqlens[0]``.
        out: ``[T, num_heads, head_dim]``, contiguous. All else as in ``decode``.
    """
    num_seqs = len(seq_lens)
    if num_tokens == 0:
        return
    shape = Shape.of(query, keys, values, window, softcap, sinks)
    tile = shape.tiling
    heads = min(shape.group, tile.rows)
    tiles = num_tokens // (tile.rows // heads) + num_seqs
    _chunk_kernel[(tiles, keys.shape[2] * triton.cdiv(shape.group, heads))](
        out, query, keys, values, block_tables, seq_lens, cu_seqlens,
        out if sinks is None else sinks,
        scale, 0.0 if softcap is None else softcap, num_seqs, query.shape[1],
        *shape.strides, block_tables.stride(0),
        **shape.constants, HEADS=heads, ROWS=tile.rows, TILE=tile.keys,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
