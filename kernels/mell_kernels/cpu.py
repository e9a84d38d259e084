"""Paged attention and KV copies in plain torch, made for a CPU.

The pool is block-major, ``[num_blocks, num_layers, planes, block_size, num_kv_heads, head_dim]``
(see ``ops``). Seen as rows of one (block, layer, plane) each it is a plain matrix, and so it is
with rows of one token each: the keys and values that a sequence needs in a layer are one
``index_select`` into a workspace that stays in the cache. Sequences are served one after the other,
since a batched gather of long ones reads more memory than it saves calls; decodes that are short
enough to fit into the cache together are served together. On another device the same code is
right, and slow.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from mell_kernels.metadata import AttentionMetadata

# Decodes are grouped while their gathered KV fits into a typical L2 cache and at least half of it
# is not padding.
_GROUP_BYTES = 1 << 20


class Workspace:
    """Scratch memory that outlives the steps; fresh pages on each call would cost more than the
    copy. Grows to the most that was ever needed."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def like(self, count: int, source: torch.Tensor) -> torch.Tensor:
        """``[count, source.shape[1]]`` of uninitialised memory."""
        size = count * source.shape[1]
        if (
            self._buffer is None
            or self._buffer.numel() < size
            or self._buffer.dtype != source.dtype
        ):
            self._buffer = torch.empty(size, dtype=source.dtype, device=source.device)
        return self._buffer[:size].view(count, source.shape[1])


class _Single(NamedTuple):
    """One sequence of the batch; its KV is gathered block by block."""

    q_start: int
    q_end: int
    num_rows: int  # of the gathered matrix: K blocks, then V blocks where there are planes for both
    skip: int  # gathered tokens before the first key in reach
    num_keys: int
    mask: torch.Tensor | None  # [q, keys] to add, where causality alone does not say it
    is_causal: bool


class _Group(NamedTuple):
    """Several decodes at once; their KV is gathered token by token. A shorter one is padded with
    its own last token, so that nothing stale and nothing of a neighbour can reach its softmax."""

    tokens: torch.Tensor  # [G] rows of the batch
    num_keys: int  # of the longest
    mask: torch.Tensor  # [G, 1, 1, keys] to add


class _WindowPlan(NamedTuple):
    singles: list[_Single]
    single_rows: list[tuple[torch.Tensor, ...]]  # per layer, per sequence
    groups: list[_Group]
    group_rows: list[tuple[torch.Tensor, ...]]  # per layer, per group


class CpuPlan:
    """What is the same in all layers of a step, computed once."""

    def __init__(self, pool: torch.Tensor, meta: AttentionMetadata, workspace: Workspace) -> None:
        _, layers, planes, block_size, kv_heads, head_dim = pool.shape
        self.workspace = workspace
        self.block_rows = pool.view(-1, block_size * kv_heads * head_dim)
        self.token_rows = pool.view(-1, kv_heads * head_dim)
        self._layers = layers
        self._planes = planes
        self._block_size = block_size
        self._cu_seqlens = meta.cu_seqlens_q.tolist()
        self._seq_lens = meta.seq_lens.tolist()
        self._tables = meta.block_tables.cpu().numpy()
        self._windows: dict[int | None, _WindowPlan] = {}
        slots = meta.slot_mapping.cpu().numpy()
        first = (slots // block_size) * (planes * layers * block_size) + slots % block_size
        steps = np.arange(planes * layers, dtype=np.int64)[:, None] * block_size
        self.write_rows = self._send(first[None, :] + steps).unbind(0)

    def _send(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.block_rows.device)

    def window(self, window: int | None) -> _WindowPlan:
        plan = self._windows.get(window)
        if plan is None:
            plan = self._windows[window] = self._build(window)
        return plan

    def _build(self, window: int | None) -> _WindowPlan:
        grouped = self._grouped(window)
        alone = set(range(len(self._seq_lens))).difference(*grouped)
        singles = [self._single(i, window) for i in sorted(alone)]
        groups = [self._group(members, window) for members in grouped]
        return _WindowPlan(
            [single for single, _ in singles],
            self._per_layer([rows for _, rows in singles], self._planes),
            [group for group, _ in groups],
            self._per_layer([rows for _, rows in groups], self._planes * self._block_size),
        )

    def _per_layer(self, rows: list[np.ndarray], stride: int) -> list[tuple[torch.Tensor, ...]]:
        """``rows`` are those of layer 0; every layer's are ``stride`` further."""
        if not rows:
            return [()] * self._layers
        steps = np.arange(self._layers, dtype=np.int64)[:, None] * stride
        matrix = self._send(np.concatenate(rows)[None, :] + steps)
        return [row.split([len(part) for part in rows]) for row in matrix.unbind(0)]

    def _first_key(self, i: int, window: int | None) -> int:
        q_len = self._cu_seqlens[i + 1] - self._cu_seqlens[i]
        first_query = self._seq_lens[i] - q_len
        return 0 if window is None else max(0, first_query - window + 1)

    def _grouped(self, window: int | None) -> list[list[int]]:
        """Decodes to serve together, by length; those that would be alone are left out."""
        decodes = [
            (self._seq_lens[i] - self._first_key(i, window), i)
            for i in range(len(self._seq_lens))
            if self._cu_seqlens[i + 1] - self._cu_seqlens[i] == 1
        ]
        token_bytes = self._planes * self.token_rows.shape[1] * self.token_rows.itemsize
        limit = _GROUP_BYTES // token_bytes
        groups: list[list[int]] = []
        shortest = 0
        for num_keys, i in sorted(decodes):
            fits = groups and num_keys <= 2 * shortest
            if fits and (len(groups[-1]) + 1) * num_keys <= limit:
                groups[-1].append(i)
            else:
                groups.append([i])
                shortest = num_keys
        return [group for group in groups if len(group) > 1]

    def _group(self, members: list[int], window: int | None) -> tuple[_Group, np.ndarray]:
        block_size = self._block_size
        starts = np.array([self._first_key(i, window) for i in members])
        ends = np.array([self._seq_lens[i] for i in members])
        num_keys = int((ends - starts).max())
        positions = starts[:, None] + np.arange(num_keys)
        inside = positions < ends[:, None]
        positions = np.minimum(positions, ends[:, None] - 1)
        blocks = self._tables[np.array(members)[:, None], positions // block_size].astype(np.int64)
        keys = blocks * (self._planes * self._layers * block_size) + positions % block_size
        keys = keys.reshape(-1)
        mask = np.where(inside, 0.0, -np.inf).astype(np.float32)[:, None, None]
        group = _Group(
            tokens=self._send(np.array([self._cu_seqlens[i] for i in members])),
            num_keys=num_keys,
            mask=self._send(mask).to(self.token_rows.dtype),
        )
        return group, self._each_plane(keys, block_size)

    def _single(self, i: int, window: int | None) -> tuple[_Single, np.ndarray]:
        q_start, q_end = self._cu_seqlens[i], self._cu_seqlens[i + 1]
        q_len, kv_len = q_end - q_start, self._seq_lens[i]
        first_query, first_key = kv_len - q_len, self._first_key(i, window)
        first_block = first_key // self._block_size
        last_block = -(-kv_len // self._block_size)
        table = self._tables[i, first_block:last_block].astype(np.int64)
        table *= self._planes * self._layers
        windowed = window is not None and kv_len > window and q_len > 1
        is_causal = q_len > 1 and first_query == 0 and not windowed
        mask = None
        if q_len > 1 and not is_causal:
            mask = _chunk_mask(first_query, first_key, kv_len, window, self.token_rows)
        single = _Single(
            q_start,
            q_end,
            num_rows=self._planes * len(table),
            skip=first_key - first_block * self._block_size,
            num_keys=kv_len - first_key,
            mask=mask,
            is_causal=is_causal,
        )
        return single, self._each_plane(table, 1)

    def _each_plane(self, rows: np.ndarray, stride: int) -> np.ndarray:
        return np.concatenate([rows + plane * stride for plane in range(self._planes)])


def _chunk_mask(
    first_query: int, first_key: int, end: int, window: int | None, like: torch.Tensor
) -> torch.Tensor:
    """Causal, aligned at the bottom right: the last query sees the last key."""
    keys = torch.arange(first_key, end, device=like.device)
    queries = torch.arange(first_query, end, device=like.device)[:, None]
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    return like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def write_kv(
    pool: torch.Tensor, layer: int, key: torch.Tensor, value: torch.Tensor | None, plan: CpuPlan
) -> None:
    num_tokens, planes = key.shape[0], pool.shape[2]
    rows = pool.view(-1, key.shape[1] * key.shape[2])  # one per (block, layer, plane, offset)
    rows.index_copy_(0, plan.write_rows[planes * layer], key.reshape(num_tokens, -1))
    if value is not None:
        rows.index_copy_(0, plan.write_rows[planes * layer + 1], value.reshape(num_tokens, -1))


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
    _, _, planes, _, kv_heads, head_dim = pool.shape
    num_tokens, heads, _ = query.shape
    group = heads // kv_heads
    grouped = query.view(num_tokens, kv_heads, group, head_dim)
    output = query.new_empty(grouped.shape)
    if sinks is not None:
        sinks = sinks.float().view(kv_heads, group)
    work = plan.window(window)
    for single, rows in zip(work.singles, work.single_rows[layer], strict=True):
        gathered = plan.workspace.like(single.num_rows, plan.block_rows)
        torch.index_select(plan.block_rows, 0, rows, out=gathered)
        # [planes, keys, Hk, D]; what the first and last block hold outside the span is cut off.
        kv = gathered.view(planes, -1, kv_heads, head_dim)
        kv = kv[:, single.skip : single.skip + single.num_keys]
        q = grouped[single.q_start : single.q_end]
        out = output[single.q_start : single.q_end]
        if softcap is not None or sinks is not None:
            out.copy_(_chunk_by_hand(q, kv, single, scale, softcap, sinks))
        elif single.q_end - single.q_start == 1:
            keys, values = _keys_values(kv.transpose(1, 2)[:, None])
            out.copy_(scaled_dot_product_attention(q, keys, values, scale=scale))
        else:
            out.copy_(_chunk(q, kv, single, scale))
    for many, rows in zip(work.groups, work.group_rows[layer], strict=True):
        num_rows = planes * len(many.tokens) * many.num_keys
        gathered = plan.workspace.like(num_rows, plan.token_rows)
        torch.index_select(plan.token_rows, 0, rows, out=gathered)
        kv = gathered.view(planes, len(many.tokens), many.num_keys, kv_heads, head_dim)
        keys, values = _keys_values(kv.transpose(2, 3))  # [G, Hk, keys, D]
        # The heads that share a KV head are its query rows.
        q = grouped.index_select(0, many.tokens)
        if softcap is not None or sinks is not None:
            sink = None if sinks is None else sinks.expand(len(many.tokens), -1, -1)
            result = _by_hand(q, keys, values, many.mask, scale, softcap, sink)
        else:
            result = scaled_dot_product_attention(q, keys, values, many.mask, scale=scale)
        output.index_copy_(0, many.tokens, result)
    return output.view(num_tokens, heads, head_dim)


def _keys_values(planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the last plane; they are the same where one plane is both."""
    return planes[0], planes[-1]


def _chunk(q: torch.Tensor, kv: torch.Tensor, single: _Single, scale: float) -> torch.Tensor:
    """KV heads stand in the batch dimension; their groups read the same keys through stride 0."""
    expanded = kv.transpose(1, 2)[:, :, None].expand(-1, -1, q.shape[2], -1, -1)
    keys, values = _keys_values(expanded)
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
    kv: torch.Tensor,
    single: _Single,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    mask = single.mask
    if single.is_causal:
        mask = _chunk_mask(0, 0, single.num_keys, None, q)
    keys, values = _keys_values(kv.transpose(1, 2)[:, :, None])
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
