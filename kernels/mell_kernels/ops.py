"""The compute operations of the engine; the one place that chooses an implementation by device.

All take the block-major pool ``[num_blocks, num_layers, planes, block_size, num_kv_heads,
head_dim]``. With two planes they are keys and values. With one plane what it holds is key and value
at once, as the latent of multi-head latent attention is. A pool may also hold int8 (``int8``).

Triton is imported where its kernels are first needed, so a CPU needs no Triton.
"""

from __future__ import annotations

import torch

from mell_kernels import cpu, cpu_sampling, reference
from mell_kernels.cpu_plan import CpuPlan, Workspace
from mell_kernels.int8 import Int8Plan, Int8Pool
from mell_kernels.metadata import AttentionMetadata
from mell_kernels.rows import SamplingRows
from mell_kernels.sampling import row_argmax


def _has_kernels(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels run on ``tensor``; all other devices get plain torch."""
    return tensor.is_cuda


def prepare(pool: torch.Tensor | Int8Pool, meta: AttentionMetadata, workspace: Workspace) -> None:
    """Compute once what all layers of a step share. Call it before the first layer."""
    if isinstance(pool, Int8Pool):
        meta.plan = plan = pool.plan(meta)
        prepare(plan.floats, plan.meta, workspace)
        return
    if _has_kernels(pool):
        from mell_kernels import gpu

        meta.plan = gpu.plan(pool, meta)
    else:
        meta.plan = CpuPlan(pool, meta, workspace)


def write_kv(
    pool: torch.Tensor | Int8Pool,
    layer: int,
    key: torch.Tensor,
    value: torch.Tensor | None,
    meta: AttentionMetadata,
) -> None:
    """Store ``key`` and ``value``, both ``[T, num_kv_heads, head_dim]``, at ``slot_mapping``;
    ``value`` is None if and only if the pool has one plane."""
    if isinstance(pool, Int8Pool):
        pool.write(layer, key, value, meta.plan)
        return
    if _has_kernels(pool):
        from mell_kernels import gpu

        gpu.write_kv(pool, layer, key, value, meta)
    else:
        cpu.write_kv(pool, layer, key, value, meta.plan)


def paged_attention(
    query: torch.Tensor,
    pool: torch.Tensor | Int8Pool,
    layer: int,
    meta: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a ragged batch over its paged KV, this batch's own already written.

    Args:
        query: ``[T, num_heads, head_dim]``.
        window: keys in reach of a query, itself included; None: all before it.
        softcap: ``softcap * tanh(score / softcap)`` where given.
        sinks: ``[num_heads]`` logits that join each head's softmax and carry no value.

    Returns:
        ``[T, num_heads, head_dim]``.
    """
    if isinstance(pool, Int8Pool):
        plan: Int8Plan = meta.plan
        pool.read(layer, plan)
        return paged_attention(
            query,
            plan.floats,
            0,
            plan.meta,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )
    if _has_kernels(pool):
        from mell_kernels import gpu

        return gpu.paged_attention(
            query, pool, layer, meta, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
    return cpu.paged_attention(
        query, pool, layer, meta.plan, scale=scale, window=window, softcap=softcap, sinks=sinks
    )


def gather_blocks(pool: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """The bytes of whole blocks, one after the other: 1-D uint8, contiguous."""
    if _has_kernels(pool):
        from mell_kernels import triton_copies

        return triton_copies.gather_blocks(pool, block_ids)
    return cpu.gather_blocks(pool, block_ids)


def scatter_blocks(pool: torch.Tensor, block_ids: torch.Tensor, data: torch.Tensor) -> None:
    """The inverse of ``gather_blocks``; ``block_ids`` are all different."""
    if _has_kernels(pool):
        from mell_kernels import triton_copies

        triton_copies.scatter_blocks(pool, block_ids, data)
    else:
        cpu.scatter_blocks(pool, block_ids, data)


def sample(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Draw one token per row, ``[R]`` int64; -1 where no logit is finite or one is NaN or infinite.

    The noise of a token is the same on every device; see ``sampling``. Does not change ``logits``.

    Args:
        logits: ``[R, V]`` float32.
    """
    if _has_kernels(logits):
        from mell_kernels import triton_sampling

        return triton_sampling.sample(logits, rows)
    return cpu_sampling.sample(logits, rows)


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """What ``sample`` draws at temperature 0, of logits of any floating type."""
    if not _has_kernels(logits):
        return cpu_sampling.likeliest(logits)
    tokens = row_argmax(logits)
    usable = logits.gather(1, tokens[:, None])[:, 0].isfinite()
    return tokens.masked_fill_(~usable, -1)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    round_first: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of ``x``, plus ``residual`` where given; see ``reference.rms_norm``."""
    if _has_kernels(x):
        from mell_kernels import triton_layers

        return triton_layers.rms_norm(
            x, weight, eps, residual=residual, weight_offset=weight_offset, round_first=round_first
        )
    return reference.rms_norm(
        x, weight, eps, residual=residual, weight_offset=weight_offset, round_first=round_first
    )


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of ``[T, num_heads, head_dim]``; see ``reference.rotary``."""
    if _has_kernels(x):
        from mell_kernels import triton_layers

        return triton_layers.rotary(x, cos, sin)
    return reference.rotary(x, cos, sin)
