"""Paged attention and KV copies in plain torch, made for a CPU.

The pool is block-major, ``[num_blocks, num_layers, planes, block_size, num_kv_heads, head_dim]``
(see ``ops``). Seen as rows of one (block, layer, plane) each it is a plain matrix, and so it is
with rows of one token each: the keys and values that a sequence needs in a layer are one
``index_select`` into a workspace that stays in the cache. Sequences are served one after the other,
since a batched gather of long ones reads more memory than it saves calls; decodes that are short
enough to fit into the cache together are served together. Decodes of which the workspace keeps a
dense copy (``dense``) need no gathering. On another
device the same code is right, and slow.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from mell_kernels.cpu_plan import CpuPlan, Group, Single, chunk_mask
from mell_kernels.dense import Served


def write_kv(
    pool: torch.Tensor, layer: int, key: torch.Tensor, value: torch.Tensor | None, plan: CpuPlan
) -> None:
    rows, width = plan.views.token_rows[layer], pool.shape[4] * pool.shape[5]
    rows.index_copy_(0, plan.write_rows[0], key.reshape(-1, width))
    if value is not None:
        rows.index_copy_(0, plan.write_rows[1], value.reshape(-1, width))
    for served in plan.dense:
        served.write(layer, key, value)


def paged_attention(
    query: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    plan: CpuPlan,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    views, kv_heads = plan.views, pool.shape[4]
    num_tokens, heads, head_dim = query.shape
    # The heads that share a KV head are its query rows.
    grouped = query.view(num_tokens, kv_heads, heads // kv_heads, head_dim)
    if sinks is not None:
        sinks = sinks.float().view(grouped.shape[1:3])
    work = plan.window(window)
    how = (scale, softcap, sinks)
    if len(work.singles) + len(work.groups) + len(work.dense) == 1:
        if work.singles:
            result = _sequence(grouped, views.block_rows[layer], work.singles[0], *how)
        elif work.groups:
            # Members of a group are in the order of the batch.
            result = _decodes(grouped, views.token_rows[layer], work.groups[0], *how)
        else:
            served = work.dense[0]
            result = served.to_batch(_dense(served.of_batch(grouped), layer, served, *how))
        return result.reshape(query.shape)
    output = query.new_empty(grouped.shape)
    for served in work.dense:
        result = _dense(served.of_batch(grouped), layer, served, *how)
        if isinstance(served.tokens, slice):
            output[served.tokens] = result
        else:
            output.index_copy_(0, served.tokens, result)
    for single in work.singles:
        q = grouped[single.q_start : single.q_end]
        result = _sequence(q, views.block_rows[layer], single, *how)
        output[single.q_start : single.q_end].copy_(result)
    for many in work.groups:
        q = grouped.index_select(0, many.tokens)
        output.index_copy_(0, many.tokens, _decodes(q, views.token_rows[layer], many, *how))
    return output.view(query.shape)


def _decodes(
    q: torch.Tensor,
    rows: torch.Tensor,
    many: Group,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    torch.index_select(rows, 0, many.rows, out=many.gathered)
    return _together(q, many.keys, many.values, many.mask, scale, softcap, sinks)


def _dense(
    q: torch.Tensor,
    layer: int,
    served: Served,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    return _together(q, *served.layers[layer], served.mask, scale, softcap, sinks)


def _together(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    if softcap is not None or sinks is not None:
        sink = None if sinks is None else sinks.expand(q.shape[0], -1, -1)
        return _by_hand(q, keys, values, mask, scale, softcap, sink)
    return scaled_dot_product_attention(q, keys, values, mask, scale=scale)


def _sequence(
    q: torch.Tensor,
    rows: torch.Tensor,
    single: Single,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    torch.index_select(rows, 0, single.rows, out=single.gathered)
    if softcap is not None or sinks is not None:
        return _chunk_by_hand(q, single, scale, softcap, sinks)
    if q.shape[0] > 1:
        return _chunk(q, single, scale)
    return scaled_dot_product_attention(q, single.keys, single.values, scale=scale)


def _chunk(q: torch.Tensor, single: Single, scale: float) -> torch.Tensor:
    """KV heads stand in the batch dimension; their groups read the same keys through stride 0."""
    keys, values = (
        each[0, :, None].expand(-1, q.shape[2], -1, -1) for each in (single.keys, single.values)
    )
    result = scaled_dot_product_attention(
        q.permute(1, 2, 0, 3),
        keys,
        values,
        attn_mask=single.mask,
        is_causal=single.is_causal,
        scale=scale,
    )
    return result.permute(2, 0, 1, 3)


def _chunk_by_hand(
    q: torch.Tensor,
    single: Single,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    mask = single.mask
    if single.is_causal:
        mask = chunk_mask(0, 0, single.keys.shape[2], None, q)
    keys, values = single.keys[0, :, None], single.values[0, :, None]
    sink = None if sinks is None else sinks[:, :, None].expand(-1, -1, len(q))
    result = _by_hand(q.permute(1, 2, 0, 3), keys, values, mask, scale, softcap, sink)
    return result.permute(2, 0, 1, 3)


def _by_hand(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """What SDPA cannot do: soft-capped scores, and a learned sink in each row's softmax.

    Shapes are SDPA's; ``sinks`` has that of ``q`` without the last dimension.
    """
    scores = torch.matmul(q, keys.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks[..., None]), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : keys.shape[-2]]
    return torch.matmul(weights.to(values.dtype), values)


def gather_blocks(pool: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    rows = pool.view(torch.uint8).view(pool.shape[0], -1)
    return rows.index_select(0, block_ids).view(-1)


def scatter_blocks(pool: torch.Tensor, block_ids: torch.Tensor, data: torch.Tensor) -> None:
    rows = pool.view(torch.uint8).view(pool.shape[0], -1)
    rows.index_copy_(0, block_ids, data.view(len(block_ids), -1))
