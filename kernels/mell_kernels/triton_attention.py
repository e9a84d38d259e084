"""Paged attention in Triton: split-KV decodes, and ragged chunks over what is cached before them.

Keys and values are read where they lie, through the block table, token by token: a tile of keys has
nothing to do with ``block_size``, so every block size works. The query heads that share a KV head
are the rows of one matrix, so a key is loaded once for all of them. A head_dim that is no power of
two is a power of two and a rest, each a matrix product of its own: 576, of latent attention, would
otherwise be computed as 1024.

What the compiler needs and the interpreter forgives is kept throughout: ``tl.arange`` over powers
of two only, ``tl.dot`` of at least 16 in each dimension, fp32 dots in IEEE precision (the default
would be TF32), accumulators of one type in all iterations, 64-bit offsets into the pool, and no
arithmetic in 16-bit floats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_MIN_DOT = 16
# A program per multiprocessor would leave the last wave half empty; this many even it out.
_PROGRAMS_PER_SM = 12
_MAX_SPLITS = 64
_MIN_TILES_PER_SPLIT = 4


@dataclass(frozen=True, slots=True)
class Tiling:
    """What one program works on at once."""

    keys: int
    rows: int  # at most; (query, head) pairs
    num_warps: int
    num_stages: int = 3  # block table, keys and values, products


def tiling(head_dim: int, itemsize: int) -> Tiling:
    """By the bytes of one key, so that a multiprocessor with 99 KiB of shared memory, the smallest
    since sm_80, can hold its part."""
    row = _width(head_dim) * itemsize
    if row <= 256:
        return Tiling(keys=64, rows=64, num_warps=4)
    if row <= 512:
        return Tiling(keys=32, rows=64 if itemsize < 4 else 32, num_warps=4)
    return Tiling(keys=16, rows=16, num_warps=4)


def _width(dim: int) -> int:
    """The largest power of two in ``dim``; what is left is computed apart."""
    power = triton.next_power_of_2(dim)
    return max(_MIN_DOT, power if power == dim else power // 2)


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


@triton.jit
def _softcapped(scores, cap):
    # tanh(x) = 2 sigmoid(2 x) - 1; libdevice's tanh does not exist in the interpreter.
    return cap * (2.0 * tl.sigmoid(2.0 * scores / cap) - 1.0)


@triton.jit
def _load_query(query, rows_at, real, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """Rows of queries, ``[ROWS, MAIN]`` and ``[ROWS, REST]``; zeros where not ``real``."""
    main = tl.arange(0, MAIN)
    rest = MAIN + tl.arange(0, REST)
    at = query + rows_at[:, None]
    first = tl.load(at + main[None, :], mask=real[:, None] & (main < DIM)[None, :], other=0.0)
    second = tl.load(at + rest[None, :], mask=real[:, None] & (rest < DIM)[None, :], other=0.0)
    return first, second


@triton.jit
def _fold_tile(
    k_cache,
    v_cache,
    table,
    positions,
    inside,
    visible,
    q_main,
    q_rest,
    best,
    total,
    acc_main,
    acc_rest,
    scale,
    softcap,
    stride_kb,
    stride_kt,
    stride_vb,
    stride_vt,
    SOFTCAP: tl.constexpr,
    SAME: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """One step of the online softmax, in base 2, over the keys at ``positions``: ``best`` is the
    running maximum, ``total`` the sum of weights, ``acc`` the weighted sum of values.

    Keys and values are 0 where not ``inside``: what a freed block holds there may be NaN, and no
    weight of 0 undoes a NaN.
    """
    main = tl.arange(0, MAIN)
    rest = MAIN + tl.arange(0, REST)
    blocks = tl.load(table + positions // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    offsets = (positions % BLOCK_SIZE).to(tl.int64)
    k_rows = k_cache + blocks * stride_kb + offsets * stride_kt
    v_rows = v_cache + blocks * stride_vb + offsets * stride_vt

    k_main = tl.load(
        k_rows[None, :] + main[:, None], mask=inside[None, :] & (main < DIM)[:, None], other=0.0
    )
    scores = tl.dot(q_main, k_main, input_precision="ieee")
    if DIM > MAIN:
        k_rest = tl.load(
            k_rows[None, :] + rest[:, None], mask=inside[None, :] & (rest < DIM)[:, None], other=0.0
        )
        scores = tl.dot(q_rest, k_rest, scores, input_precision="ieee")
    scores = scores * scale
    if SOFTCAP:
        scores = _softcapped(scores, softcap)
    scores = tl.where(visible, scores * _LOG2E, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, axis=1))
    # A row that has seen no key yet must not compute -inf - -inf.
    base = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(best - base)
    total = total * shrink + tl.sum(weights, axis=1)

    if SAME:
        v_main = tl.trans(k_main)
    else:
        v_main = tl.load(
            v_rows[:, None] + main[None, :], mask=inside[:, None] & (main < DIM)[None, :], other=0.0
        )
    weights = weights.to(v_main.dtype)
    acc_main = tl.dot(weights, v_main, acc_main * shrink[:, None], input_precision="ieee")
    if DIM > MAIN:
        if SAME:
            v_rest = tl.trans(k_rest)
        else:
            v_rest = tl.load(
                v_rows[:, None] + rest[None, :],
                mask=inside[:, None] & (rest < DIM)[None, :],
                other=0.0,
            )
        acc_rest = tl.dot(weights, v_rest, acc_rest * shrink[:, None], input_precision="ieee")
    return new_best, total, acc_main, acc_rest


@triton.jit
def _store(
    out, rows_at, real, main_values, rest_values,
    DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = out.dtype.element_ty
    main = tl.arange(0, MAIN)
    at = out + rows_at[:, None]
    mask = real[:, None] & (main < DIM)[None, :]
    tl.store(at + main[None, :], main_values.to(kind), mask=mask)
    if DIM > MAIN:
        rest = MAIN + tl.arange(0, REST)
        mask = real[:, None] & (rest < DIM)[None, :]
        tl.store(at + rest[None, :], rest_values.to(kind), mask=mask)


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
    q_main, q_rest = _load_query(query, seq * stride_qt + heads * stride_qh, real, DIM, MAIN, REST)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc_main = tl.zeros([ROWS, MAIN], tl.float32)
    acc_rest = tl.zeros([ROWS, REST], tl.float32)
    if SINKS:
        # A sink is a key without a value; the first split counts it.
        sink = tl.load(sinks + heads, mask=real, other=0.0).to(tl.float32) * _LOG2E
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
        best, total, acc_main, acc_rest = _fold_tile(
            k_head, v_head, table, positions, inside, inside[None, :],
            q_main, q_rest, best, total, acc_main, acc_rest, scale, softcap,
            stride_kb, stride_kt, stride_vb, stride_vt,
            SOFTCAP, SAME, DIM, MAIN, REST, BLOCK_SIZE,
        )  # fmt: skip

    if SPLITS == 1:
        norm = tl.where(total > 0, total, 1.0)[:, None]
        at = (seq * num_heads + heads) * DIM
        _store(out, at, real, acc_main / norm, acc_rest / norm, DIM, MAIN, REST)
    else:
        part = (seq * num_heads + heads) * SPLITS + split
        _store(partial_acc, part * DIM, real, acc_main, acc_rest, DIM, MAIN, REST)
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
    q_main, q_rest = _load_query(
        query, q_rows * stride_qt + heads * stride_qh, real, DIM, MAIN, REST
    )
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc_main = tl.zeros([ROWS, MAIN], tl.float32)
    acc_rest = tl.zeros([ROWS, REST], tl.float32)
    if SINKS:
        best = tl.load(sinks + heads, mask=real, other=0.0).to(tl.float32) * _LOG2E
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
        best, total, acc_main, acc_rest = _fold_tile(
            k_head, v_head, table, positions, inside, visible,
            q_main, q_rest, best, total, acc_main, acc_rest, scale, softcap,
            stride_kb, stride_kt, stride_vb, stride_vt,
            SOFTCAP, SAME, DIM, MAIN, REST, BLOCK_SIZE,
        )  # fmt: skip

    norm = tl.where(total > 0, total, 1.0)[:, None]
    at = (q_rows * num_heads + heads) * DIM
    _store(out, at, real, acc_main / norm, acc_rest / norm, DIM, MAIN, REST)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What both kernels are compiled for, and the strides that they take."""

    group: int
    tiling: Tiling
    strides: tuple[int, ...]
    constants: dict[str, int | bool]

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> _Shape:
        if query.stride(-1) != 1 or keys.stride(-1) != 1 or values.stride(-1) != 1:
            raise ValueError("the last dimension of query, keys and values must be contiguous")
        if keys.shape != values.shape:
            raise ValueError(f"keys {list(keys.shape)} and values {list(values.shape)} differ")
        _, block_size, kv_heads, dim = keys.shape
        group, main = query.shape[1] // kv_heads, _width(dim)
        constants = {
            "WINDOW": window or 0,
            "SOFTCAP": softcap is not None,
            "SINKS": sinks is not None,
            "SAME": keys.data_ptr() == values.data_ptr(),
            "GROUP": group,
            "DIM": dim,
            "MAIN": main,
            "REST": max(_MIN_DOT, triton.next_power_of_2(max(1, dim - main))),
            "BLOCK_SIZE": block_size,
        }
        strides = (*query.stride()[:2], *keys.stride()[:3], *values.stride()[:3])
        return cls(group, tiling(dim, keys.itemsize), strides, constants)


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
    shape = _Shape.of(query, keys, values, window, softcap, sinks)
    tile = shape.tiling
    rows = min(tile.rows, max(_MIN_DOT, triton.next_power_of_2(shape.group)))
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
    shape = _Shape.of(query, keys, values, window, softcap, sinks)
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
