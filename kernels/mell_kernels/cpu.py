"""Paged attention and KV copies in plain torch, made for a CPU.

The pool is block-major, ``[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]``. Seen
as rows of one (layer, K or V, block) each it is a plain matrix, so that gathering the keys and
values of a sequence for a layer is one ``index_select`` into a workspace that stays in the cache.
One sequence after the other: batched gathers with a mask read more memory than they save calls.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from mell_kernels.metadata import AttentionMetadata


class Workspace:
    """Scratch memory that outlives the steps; fresh pages on each call would cost more than the
    copy. Grows to the longest sequence seen."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def rows(self, count: int, like: torch.Tensor) -> torch.Tensor:
        """``[count, like.shape[1]]`` of uninitialised memory."""
        size = count * like.shape[1]
        if self._buffer is None or self._buffer.numel() < size or self._buffer.dtype != like.dtype:
            self._buffer = torch.empty(size, dtype=like.dtype)
        return self._buffer[:size].view(count, like.shape[1])


class _Span(NamedTuple):
    """One sequence of the batch, as attention with one window needs it."""

    q_start: int
    q_end: int
    num_rows: int  # of the gathered matrix: K blocks, then V blocks
    skip: int  # gathered tokens before the first key in reach
    num_keys: int
    mask: torch.Tensor | None  # [q, keys] bool, where causality alone does not say it
    is_causal: bool


class _WindowPlan(NamedTuple):
    spans: list[_Span]
    rows: list[tuple[torch.Tensor, ...]]  # per layer, per sequence: rows of the pool to gather


class CpuPlan:
    """What is the same in all layers of a step, computed once."""

    def __init__(self, pool: torch.Tensor, meta: AttentionMetadata, workspace: Workspace) -> None:
        _, layers, _, block_size, kv_heads, head_dim = pool.shape
        self.workspace = workspace
        self.gather_rows = pool.view(-1, block_size * kv_heads * head_dim)
        slots = meta.slot_mapping.numpy()
        first = (slots // block_size) * (layers * 2 * block_size) + slots % block_size
        steps = np.arange(layers * 2, dtype=np.int64)[:, None] * block_size
        self.write_rows = torch.from_numpy(first[None, :] + steps).unbind(0)
        self._layers = layers
        self._block_size = block_size
        self._cu_seqlens = meta.cu_seqlens_q.tolist()
        self._seq_lens = meta.seq_lens.tolist()
        self._tables = meta.block_tables.numpy()
        self._windows: dict[int | None, _WindowPlan] = {}

    def window(self, window: int | None) -> _WindowPlan:
        plan = self._windows.get(window)
        if plan is None:
            plan = self._windows[window] = self._build(window)
        return plan

    def _build(self, window: int | None) -> _WindowPlan:
        spans, tables = [], []
        for i, kv_len in enumerate(self._seq_lens):
            span, table = self._span(i, kv_len, window)
            spans.append(span)
            tables.append(table)
        base = np.concatenate(tables)
        matrix = torch.from_numpy(base[None, :] + 2 * np.arange(self._layers)[:, None])
        sizes = [span.num_rows for span in spans]
        return _WindowPlan(spans, [row.split(sizes) for row in matrix.unbind(0)])

    def _span(self, i: int, kv_len: int, window: int | None) -> tuple[_Span, np.ndarray]:
        q_start, q_end = self._cu_seqlens[i], self._cu_seqlens[i + 1]
        q_len = q_end - q_start
        first_q = kv_len - q_len  # position of the first query
        first_key = 0 if window is None else max(0, first_q - window + 1)
        first_block = first_key // self._block_size
        last_block = -(-kv_len // self._block_size)
        skip = first_key - first_block * self._block_size
        table = self._tables[i, first_block:last_block].astype(np.int64) * (2 * self._layers)
        windowed = window is not None and kv_len > window and q_len > 1
        is_causal = q_len > 1 and first_q == 0 and not windowed
        mask = None
        if q_len > 1 and not is_causal:
            keys = torch.arange(first_key, kv_len)
            queries = torch.arange(first_q, kv_len)[:, None]
            mask = keys <= queries
            if window is not None:
                mask &= keys > queries - window
        num_keys = kv_len - first_key
        span = _Span(q_start, q_end, 2 * len(table), skip, num_keys, mask, is_causal)
        return span, np.concatenate((table, table + 1))


def write_kv(
    pool: torch.Tensor, layer: int, key: torch.Tensor, value: torch.Tensor, plan: CpuPlan
) -> None:
    num_tokens = key.shape[0]
    rows = pool.view(-1, key.shape[1] * key.shape[2])  # one per (block, layer, K or V, offset)
    rows.index_copy_(0, plan.write_rows[2 * layer], key.reshape(num_tokens, -1))
    rows.index_copy_(0, plan.write_rows[2 * layer + 1], value.reshape(num_tokens, -1))


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
    _, _, _, _, kv_heads, head_dim = pool.shape
    num_tokens, heads, _ = query.shape
    grouped = query.view(num_tokens, kv_heads, heads // kv_heads, head_dim)
    output = torch.empty(grouped.shape, dtype=query.dtype)
    spans, layer_rows = plan.window(window)
    by_hand = softcap is not None or sinks is not None
    for span, rows in zip(spans, layer_rows[layer], strict=True):
        gathered = plan.workspace.rows(span.num_rows, plan.gather_rows)
        torch.index_select(plan.gather_rows, 0, rows, out=gathered)
        # [2, Hk, keys, D]; what the first and last block have outside the span is cut off.
        kv = gathered.view(2, -1, kv_heads, head_dim)[:, span.skip : span.skip + span.num_keys]
        keys, values = kv.transpose(1, 2).unbind(0)
        q = grouped[span.q_start : span.q_end]
        out = output[span.q_start : span.q_end]
        if by_hand:
            out.copy_(_by_hand(q, keys, values, span, scale, softcap, sinks))
        elif span.q_end - span.q_start == 1:
            # The heads of a group are the query rows of their one KV head.
            out.copy_(scaled_dot_product_attention(q, keys[None], values[None], scale=scale))
        else:
            out.copy_(_chunk(q, keys, values, span, scale))
    return output.view(num_tokens, heads, head_dim)


def _chunk(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, span: _Span, scale: float
) -> torch.Tensor:
    """KV heads stand in the batch dimension; their groups read the same keys through stride 0."""
    shape = (-1, q.shape[2], -1, -1)
    result = scaled_dot_product_attention(
        q.permute(1, 2, 0, 3),
        keys[:, None].expand(shape),
        values[:, None].expand(shape),
        attn_mask=span.mask,
        is_causal=span.is_causal,
        scale=scale,
    )
    return result.permute(2, 0, 1, 3)


def _by_hand(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    span: _Span,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """What SDPA cannot do: soft-capped scores, and a learned sink in each head's softmax."""
    q_len, kv_heads, group, _ = q.shape
    scores = torch.matmul(q.permute(1, 2, 0, 3), keys[:, None].transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    mask = span.mask
    if span.is_causal:
        mask = torch.ones(q_len, span.num_keys, dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(kv_heads, group, 1, 1).expand(-1, -1, q_len, 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : span.num_keys].to(values.dtype)
    return torch.matmul(weights, values[:, None]).permute(2, 0, 1, 3)


def gather_blocks(pool: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    rows = pool.view(torch.uint8).view(pool.shape[0], -1)
    return rows.index_select(0, block_ids).view(-1)


def scatter_blocks(pool: torch.Tensor, block_ids: torch.Tensor, data: torch.Tensor) -> None:
    rows = pool.view(torch.uint8).view(pool.shape[0], -1)
    rows.index_copy_(0, block_ids, data.view(len(block_ids), -1))
