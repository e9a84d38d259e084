"""Copies into, out of and within the block-major pool, in Triton.

A step's keys and values go to their slots; a migration takes whole blocks out of one pool and puts
them into another. A block is one extent of bytes, so the latter two know nothing of layers or
heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)  # widest first
_CHUNK = 2048


@triton.jit
def _write_kv_kernel(
    k_cache,
    v_cache,
    key,
    value,
    slot_mapping,
    num_heads,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_key_t,
    stride_key_h,
    stride_value_t,
    stride_value_h,
    BLOCK_SIZE: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    PAD_HEADS: tl.constexpr,
):
    """Program t: all heads of token t."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    heads = tl.arange(0, PAD_HEADS)[:, None]
    dims = tl.arange(0, PAD)[None, :]
    real = (heads < num_heads) & (dims < DIM)
    k = tl.load(key + token * stride_key_t + heads * stride_key_h + dims, mask=real, other=0.0)
    k_row = k_cache + block * stride_kb + offset * stride_kt
    tl.store(k_row + heads * stride_kh + dims, k, mask=real)
    if HAS_VALUE:
        v_at = value + token * stride_value_t + heads * stride_value_h + dims
        v_row = v_cache + block * stride_vb + offset * stride_vt
        tl.store(v_row + heads * stride_vh + dims, tl.load(v_at, mask=real, other=0.0), mask=real)


def write_kv(
    keys: torch.Tensor,
    values: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    slot_mapping: torch.Tensor,
) -> None:
    """Store this step's keys and values at their slots.

    Args:
        keys: ``[num_blocks, block_size, num_kv_heads, head_dim]``, a view of the pool.
        values: the same.
        key: ``[T, num_kv_heads, head_dim]``, the last dimension contiguous.
        value: the same; None: ``values`` are not written.
        slot_mapping: ``[T]`` int64, ``block * block_size + offset``.
    """
    num_tokens, num_heads, dim = key.shape
    if num_tokens == 0:
        return
    given = key if value is None else value
    if key.stride(-1) != 1 or given.stride(-1) != 1:
        raise ValueError("the last dimension of key and value must be contiguous")
    _write_kv_kernel[(num_tokens,)](
        keys, values, key, given, slot_mapping, num_heads,
        *keys.stride()[:3], *values.stride()[:3], *key.stride()[:2], *given.stride()[:2],
        BLOCK_SIZE=keys.shape[1], HAS_VALUE=value is not None, DIM=dim,
        PAD=triton.next_power_of_2(dim), PAD_HEADS=triton.next_power_of_2(num_heads),
    )  # fmt: skip


@triton.jit
def _copy_blocks_kernel(
    target,
    source,
    block_ids,
    words,
    GATHER: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (i, chunk): a part of block ``block_ids[i]`` and of the i-th row of the buffer."""
    i = tl.program_id(0).to(tl.int64)
    block = tl.load(block_ids + i)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = at < words
    in_pool = block * words + at
    in_buffer = i * words + at
    if GATHER:
        tl.store(target + in_buffer, tl.load(source + in_pool, mask=inside, other=0), mask=inside)
    else:
        tl.store(target + in_pool, tl.load(source + in_buffer, mask=inside, other=0), mask=inside)


def _as_words(pool: torch.Tensor, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Both as 1-D of the widest integers that divide a block and suit both addresses; and how many
    of them a block is."""
    block_nbytes = pool[0].numel() * pool.itemsize
    for dtype in _WORDS:
        size = dtype.itemsize
        if not (block_nbytes % size or pool.data_ptr() % size or buffer.data_ptr() % size):
            break
    flat = pool.view(-1).view(torch.uint8).view(dtype)
    return flat, buffer.view(dtype), block_nbytes // size


def gather_blocks(pool: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """The bytes of whole blocks, one after the other.

    Args:
        pool: ``[num_blocks, ...]``, contiguous.
        block_ids: ``[n]`` int64.

    Returns:
        1-D uint8 of n blocks.
    """
    nbytes = len(block_ids) * pool[0].numel() * pool.itemsize
    buffer = torch.empty(nbytes, dtype=torch.uint8, device=pool.device)
    if nbytes > 0:
        source, target, words = _as_words(pool, buffer)
        grid = (len(block_ids), triton.cdiv(words, _CHUNK))
        _copy_blocks_kernel[grid](
            target, source, block_ids, words, GATHER=True, CHUNK=_CHUNK, num_warps=8
        )
    return buffer


def scatter_blocks(pool: torch.Tensor, block_ids: torch.Tensor, data: torch.Tensor) -> None:
    """The inverse of ``gather_blocks``: overwrite ``block_ids``, all different, with ``data``."""
    if data.numel() > 0:
        target, source, words = _as_words(pool, data)
        grid = (len(block_ids), triton.cdiv(words, _CHUNK))
        _copy_blocks_kernel[grid](
            target, source, block_ids, words, GATHER=False, CHUNK=_CHUNK, num_warps=8
        )
