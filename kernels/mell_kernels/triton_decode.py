"""Paged decode attention in Triton: one query per sequence, its keys split over programs.

The parts of a sequence are computed on their own and merged by their softmaxes' sums; see
``triton_tiles`` for what a part is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mell_kernels.triton_tiles import LOG2E, MIN_DOT, Shape, fold_tile, load_query, store_rows

# A program per multiprocessor would leave the last wave half empty; this many even it out.
_PROGRAMS_PER_SM = 12
_MAX_SPLITS = 64
_MIN_TILES_PER_SPLIT = 4


def num_splits(programs: int, max_keys: int, tile: int, multiprocessors: int) -> int:
    """Into how many parts each sequence's keys are split: a power of two, so that there are few
    variants to compile; enough parts to fill the device, none much shorter than its start-up.

    Args:
        programs: what there would be without splitting, sequences times KV heads.
        max_keys: the most keys a sequence of the batch can have.
    """
    wanted = _PROGRAMS_PER_SM * multiprocessors / max(1, programs)
    most = max_keys / (tile * _MIN_TILES_PER_SPLIT)
    splits = 1
    while splits < min(wanted, most, _MAX_SPLITS):
        splits *= 2
    return splits


@triton.jit(do_not_specialize=["stride_table"])
def _decode_kernel(
    out,
    partial_acc,
    partial_sums,
    query,
    k_cache,
    v_cache,
    block_tables,
    seq_lens,
    sinks,
    scale,
    softcap,
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
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Program (heads of one KV head, split, sequence): their queries over one part of the keys."""
    TILES_OF_HEADS: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    kv_head = tl.program_id(0) // TILES_OF_HEADS
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens + seq)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    first_tile = first // TILE
    end_tile = tl.cdiv(length, TILE)
    per_split = tl.cdiv(end_tile - first_tile, SPLITS)
    begin = first_tile + split * per_split
    end = tl.minimum(begin + per_split, end_tile)

    in_group = tl.program_id(0) % TILES_OF_HEADS * ROWS + tl.arange(0, ROWS)
    heads = kv_head * GROUP + in_group
    real = in_group < GROUP
    q_main, q_rest = load_query(query, seq * stride_qt + heads * stride_qh, real, DIM, MAIN, REST)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc_main = tl.zeros([ROWS, MAIN], tl.float32)
    acc_rest = tl.zeros([ROWS, REST], tl.float32)
    if SINKS:
        # A sink is a key without a value; the first split counts it.
        sink = tl.load(sinks + heads, mask=real, other=0.0).to(tl.float32) * LOG2E
        mine = tl.zeros([ROWS], tl.int32) + split == 0
        best = tl.where(mine, sink, best)
        total = tl.where(mine, 1.0, total)

    table = block_tables + seq * stride_table
    k_head = k_cache + kv_head.to(tl.int64) * stride_kh
    v_head = v_cache + kv_head.to(tl.int64) * stride_vh
    for tile in range(begin, end):
        positions = tile * TILE + tl.arange(0, TILE)
        inside = positions < length
        if WINDOW > 0:
            inside = inside & (positions >= first)
        best, total, acc_main, acc_rest = fold_tile(
            k_head, v_head, table, positions, inside, inside[None, :],
            q_main, q_rest, best, total, acc_main, acc_rest, scale, softcap,
            stride_kb, stride_kt, stride_vb, stride_vt,
            SOFTCAP, SAME, DIM, MAIN, REST, BLOCK_SIZE,
        )  # fmt: skip

    if SPLITS == 1:
        norm = tl.where(total > 0, total, 1.0)[:, None]
        at = (seq * num_heads + heads) * DIM
        store_rows(out, at, real, acc_main / norm, acc_rest / norm, DIM, MAIN, REST)
    else:
        part = (seq * num_heads + heads) * SPLITS + split
        store_rows(partial_acc, part * DIM, real, acc_main, acc_rest, DIM, MAIN, REST)
        tl.store(partial_sums + part * 2, best, mask=real)
        tl.store(partial_sums + part * 2 + 1, total, mask=real)


@triton.jit
def _merge_kernel(
    out,
    partial_acc,
    partial_sums,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Program (sequence and head): what its splits found, weighted by their softmax sums."""
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, PAD)
    part = row * SPLITS + splits
    best = tl.load(partial_sums + part * 2)
    total = tl.load(partial_sums + part * 2 + 1)
    overall = tl.max(best, axis=0)
    base = tl.where(overall == float("-inf"), 0.0, overall)
    weights = tl.exp2(best - base)
    acc = tl.load(
        partial_acc + part[:, None] * DIM + dims[None, :], mask=(dims < DIM)[None, :], other=0.0
    )
    summed = tl.sum(acc * weights[:, None], axis=0)
    norm = tl.sum(total * weights, axis=0)
    result = summed / tl.where(norm > 0, norm, 1.0)
    tl.store(out + row * DIM + dims, result.to(out.dtype.element_ty), mask=dims < DIM)


def decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    splits: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attention of one query per sequence over its paged KV, into ``out``.

    Args:
        query: ``[B, num_heads, head_dim]``, the last dimension contiguous.
        keys: ``[num_blocks, block_size, num_kv_heads, head_dim]``, a view of the pool.
        values: the same; it may be the same memory.
        block_tables: ``[B, blocks]`` int32, rows contiguous.
        seq_lens: ``[B]`` int32. A sequence of 0 keys gets zeros.
        out: ``[B, num_heads, head_dim]``, contiguous.
        splits: parts of each sequence's keys, a power of two; see ``num_splits``.
    """
    num_seqs, num_heads, dim = query.shape
    if num_seqs == 0:
        return
    shape = Shape.of(query, keys, values, window, softcap, sinks)
    tile = shape.tiling
    rows = min(tile.rows, max(MIN_DOT, triton.next_power_of_2(shape.group)))
    acc, sums = out, out  # never touched where there is one split
    if splits > 1:
        parts = (num_seqs, num_heads, splits)
        acc = torch.empty((*parts, dim), dtype=torch.float32, device=query.device)
        sums = torch.empty((*parts, 2), dtype=torch.float32, device=query.device)
    _decode_kernel[(keys.shape[2] * triton.cdiv(shape.group, rows), splits, num_seqs)](
        out, acc, sums, query, keys, values, block_tables, seq_lens,
        out if sinks is None else sinks,
        scale, 0.0 if softcap is None else softcap, num_heads,
        *shape.strides, block_tables.stride(0),
        **shape.constants, ROWS=rows, TILE=tile.keys, SPLITS=splits,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(num_seqs * num_heads,)](
            out, acc, sums, DIM=dim, PAD=triton.next_power_of_2(dim), SPLITS=splits
        )
