"""What every kernel computes, written to be read: plain torch, one sequence and head at a time.

Slow, and right in whatever precision it is given; tests compare with it in float64.
"""

from __future__ import annotations

import torch

from mell_kernels.metadata import AttentionMetadata
from mell_kernels.rows import SamplingRows
from mell_kernels.sampling import gumbel


def write_kv(
    keys: torch.Tensor,
    values: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    slot_mapping: torch.Tensor,
) -> None:
    """Store ``key`` and ``value``, ``[T, num_kv_heads, head_dim]``, at their slots of ``keys`` and
    ``values``, ``[num_blocks, block_size, num_kv_heads, head_dim]``."""
    block_size = keys.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        keys[slot // block_size, slot % block_size] = key[token]
        if value is not None:
            values[slot // block_size, slot % block_size] = value[token]


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a ragged batch; shapes as in ``ops.paged_attention``."""
    _, block_size, kv_heads, _ = keys.shape
    num_tokens, num_heads, _ = query.shape
    out = query.new_zeros(num_tokens, num_heads, values.shape[-1])
    starts = meta.cu_seqlens_q.tolist()
    for i, length in enumerate(meta.seq_lens.tolist()):
        table = meta.block_tables[i, : -(-length // block_size)].long()
        own_keys = keys[table].flatten(0, 1)[:length]
        own_values = values[table].flatten(0, 1)[:length]
        for token in range(starts[i], starts[i + 1]):
            position = length - (starts[i + 1] - token)
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(num_heads):
                kv_head = head // (num_heads // kv_heads)
                seen = slice(first, position + 1)
                scores = own_keys[seen, kv_head] @ query[token, head] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat((scores, sinks[head : head + 1].to(scores.dtype)))
                weights = torch.softmax(scores, dim=0)[: position + 1 - first]
                out[token, head] = weights @ own_values[seen, kv_head]
    return out


def gather_blocks(pool: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """The bytes of whole blocks of ``pool`` ``[num_blocks, ...]``, one after the other."""
    return pool[block_ids].view(-1).view(torch.uint8)


def scatter_blocks(pool: torch.Tensor, block_ids: torch.Tensor, data: torch.Tensor) -> None:
    """The inverse of ``gather_blocks``."""
    pool[block_ids] = data.view(pool.dtype).view(len(block_ids), *pool.shape[1:])


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    round_first: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x``, plus ``residual`` where given, over its root mean square, times ``weight``.

    Args:
        x: ``[..., size]``.
        weight: ``[size]``.
        residual: of ``x``'s shape.
        weight_offset: added to the weight (1 in Gemma).
        round_first: round to ``x``'s type before the weight is applied, as Llama does and Gemma
            does not.

    Returns:
        The result, and the sum that was normalised: the residual of what comes next.
    """
    summed = x if residual is None else x + residual
    wide = summed if summed.dtype == torch.float64 else summed.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    if round_first:
        normed = normed.to(x.dtype).to(wide.dtype)
    return (normed * (weight.to(wide.dtype) + weight_offset)).to(x.dtype), summed


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding in halves: element d of a head turns with element d + R / 2.

    Args:
        x: ``[T, num_heads, head_dim]``.
        cos: ``[T, R]`` with R up to ``head_dim``; elements behind R stay as they are.
        sin: likewise.
    """
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    first, second = turned.chunk(2, dim=-1)
    other = torch.cat((-second, first), dim=-1)
    return torch.cat((turned * cos[:, None] + other * sin[:, None], rest), dim=-1)


def sample(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Draw one token per row: temperature, then top-k, top-p, min-p, then Gumbel noise.

    Args:
        logits: ``[R, V]`` float32.

    Returns:
        ``[R]`` int64 token ids; -1 where a row has NaN or infinite logits, or only ``-inf``. Of
        equals the lowest id.
    """
    tokens = torch.full((len(logits),), -1, dtype=torch.int64)
    for r, row in enumerate(logits):
        best = row.max()
        if not best.isfinite():
            continue
        temperature = rows.temperature[r]
        if temperature == 0:
            tokens[r] = row.argmax()
            continue
        scores = (row - best) / temperature
        order = torch.sort(scores, descending=True, stable=True).indices
        top_k = int(rows.top_k[r])
        if top_k > 0:
            order = order[:top_k]
        weights = torch.softmax(scores[order].double(), dim=0)
        top_p = float(rows.top_p[r])
        if top_p < 1.0:
            before = weights.cumsum(0) - weights
            order = order[before < top_p]
        order = order[scores[order] >= rows.log_min_p[r]].sort().values
        noisy = scores[order] + gumbel(rows.keys[r], order.int())
        tokens[r] = order[noisy.argmax()]
    return tokens
