"""The operations of ``ops`` on a CUDA device: which Triton kernel runs, and on what part of it.

Nothing here waits for the device: all that decides a launch is known to the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from mell_kernels import triton_chunks, triton_copies, triton_decode, triton_tiles
from mell_kernels.metadata import AttentionMetadata

# Without a device to ask (interpreter), few enough that splitting is exercised and still cheap.
_MULTIPROCESSORS_ELSEWHERE = 1


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """What is the same in all layers of a step."""

    num_decodes: int  # leading sequences of one query each
    splits: int  # of each decode's keys


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS_ELSEWHERE
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _views(pool: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's keys and values, each ``[num_blocks, block_size, num_kv_heads, head_dim]``; the
    same where one plane is both."""
    return pool[:, layer, 0], pool[:, layer, -1]


def plan(pool: torch.Tensor, meta: AttentionMetadata) -> GpuPlan:
    _, _, _, _, kv_heads, head_dim = pool.shape
    tile = triton_tiles.tiling(head_dim, pool.itemsize).keys
    splits = triton_decode.num_splits(
        meta.num_decodes * kv_heads, meta.max_seqlen_k, tile, _multiprocessors(pool.device)
    )
    return GpuPlan(meta.num_decodes, splits)


def write_kv(
    pool: torch.Tensor,
    layer: int,
    key: torch.Tensor,
    value: torch.Tensor | None,
    meta: AttentionMetadata,
) -> None:
    triton_copies.write_kv(*_views(pool, layer), key, value, meta.slot_mapping)


def paged_attention(
    query: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    meta: AttentionMetadata,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Decodes, which stand first, in one kernel; all else, chunks of prefills, in another."""
    keys, values = _views(pool, layer)
    work: GpuPlan = meta.plan
    num_tokens, num_heads, _ = query.shape
    size = (num_tokens, num_heads, values.shape[-1])
    out = torch.empty(size, dtype=query.dtype, device=query.device)
    first = work.num_decodes
    triton_decode.decode(
        query[:first],
        keys,
        values,
        meta.block_tables[:first],
        meta.seq_lens[:first],
        out,
        splits=work.splits,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )
    triton_chunks.chunks(
        query,
        keys,
        values,
        meta.block_tables[first:],
        meta.seq_lens[first:],
        meta.cu_seqlens_q[first:],
        out,
        num_tokens=num_tokens - first,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )
    return out
