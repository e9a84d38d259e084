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
_GROUP_BYTES = 2 << 20


class PoolViews:
    """A pool as matrices, once per layer. Each begins where its layer does, so that one set of row
    numbers, those of layer 0, is right for all layers."""

    def __init__(self, pool: torch.Tensor) -> None:
        _, layers, self.planes, self.block_size, self.kv_heads, self.head_dim = pool.shape
        self.pool = pool
        self.num_layers = layers
        blocks = pool.view(-1, self.block_size * self.kv_heads * self.head_dim)
        tokens = pool.view(-1, self.kv_heads * self.head_dim)
        self.block_rows = [blocks[i * self.planes :] for i in range(layers)]
        stride = self.planes * self.block_size
        self.token_rows = [tokens[i * stride :] for i in range(layers)]


class Workspace:
    """Scratch memory that outlives the steps; fresh pages on each call would cost more than the
    copy. Grows to the most that was ever needed."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        self._views: PoolViews | None = None

    def views(self, pool: torch.Tensor) -> PoolViews:
        if self._views is None or self._views.pool is not pool:
            self._views = PoolViews(pool)
        return self._views

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

    rows: torch.Tensor  # of the layer's blocks: those of K, then of V where there are planes for it
    gathered: torch.Tensor  # workspace for those rows
    keys: torch.Tensor  # [1, Hk, keys, D], what of ``gathered`` is in reach; as are the values
    values: torch.Tensor
    q_start: int
    q_end: int
    mask: torch.Tensor | None  # [q, keys] to add, where causality alone does not say it
    is_causal: bool


class _Group(NamedTuple):
    """Several decodes at once; their KV is gathered token by token. A shorter one is padded with
    its own last token, so that nothing stale and nothing of a neighbour can reach its softmax."""

    rows: torch.Tensor  # of the layer's tokens: sequence by sequence, its K, then its V if any
    gathered: torch.Tensor  # workspace for those rows
    keys: torch.Tensor  # [G, Hk, keys, D] in ``gathered``, as are the values
    values: torch.Tensor
    mask: torch.Tensor  # [G, 1, 1, keys] to add
    tokens: torch.Tensor  # [G] rows of the batch


class _WindowPlan(NamedTuple):
    singles: list[_Single]
    groups: list[_Group]


class CpuPlan:
    """What is the same in all layers of a step, computed once."""

    def __init__(self, pool: torch.Tensor, meta: AttentionMetadata, workspace: Workspace) -> None:
        self.views = views = workspace.views(pool)
        self._workspace = workspace
        self._device = pool.device
        self._block_size = views.block_size
        self._block_stride = views.num_layers * views.planes  # rows from a block to the next
        self._cu_seqlens = meta.cu_seqlens_q.tolist()
        self._seq_lens = meta.seq_lens.tolist()
        self._tables = meta.block_tables.cpu().numpy()
        self._windows: dict[int | None, _WindowPlan] = {}
        slots = meta.slot_mapping.cpu().numpy()
        block, offset = np.divmod(slots, self._block_size)
        first = block * (self._block_stride * self._block_size) + offset
        self.write_rows = [
            self._send(first + plane * self._block_size) for plane in range(views.planes)
        ]

    def _send(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def window(self, window: int | None) -> _WindowPlan:
        plan = self._windows.get(window)
        if plan is None:
            plan = self._windows[window] = self._build(window)
        return plan

    def _build(self, window: int | None) -> _WindowPlan:
        grouped = self._grouped(window)
        alone = set(range(len(self._seq_lens))).difference(*grouped)
        return _WindowPlan(
            [self._single(i, window) for i in sorted(alone)],
            [self._group(members, window) for members in grouped],
        )

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
        token = self.views.token_rows[0]
        limit = _GROUP_BYTES // (self.views.planes * token.shape[1] * token.itemsize)
        groups: list[list[int]] = []
        shortest = 0
        for num_keys, i in sorted(decodes):
            fits = groups and num_keys <= 2 * shortest
            if fits and (len(groups[-1]) + 1) * num_keys <= limit:
                groups[-1].append(i)
            else:
                groups.append([i])
                shortest = num_keys
        return [sorted(group) for group in groups if len(group) > 1]

    def _group(self, members: list[int], window: int | None) -> _Group:
        views, block_size = self.views, self._block_size
        starts = np.array([self._first_key(i, window) for i in members])
        ends = np.array([self._seq_lens[i] for i in members])
        num_keys = int((ends - starts).max())
        positions = starts[:, None] + np.arange(num_keys)
        inside = positions < ends[:, None]
        positions = np.minimum(positions, ends[:, None] - 1)
        blocks = self._tables[np.array(members)[:, None], positions // block_size].astype(np.int64)
        keys = blocks * (self._block_stride * block_size) + positions % block_size
        # A sequence's keys and values side by side: one core gathers and reads them then.
        planes = np.arange(views.planes)[None, :, None] * block_size
        rows = self._send((keys[:, None] + planes).reshape(-1))
        gathered = self._workspace.like(rows.numel(), views.token_rows[0])
        shape = (len(members), views.planes, num_keys, views.kv_heads, views.head_dim)
        kv = gathered.view(shape).permute(1, 0, 3, 2, 4)
        mask = np.where(inside, 0.0, -np.inf).astype(np.float32)[:, None, None]
        return _Group(
            rows,
            gathered,
            *_keys_values(kv),
            mask=self._send(mask).to(gathered.dtype),
            tokens=self._send(np.array([self._cu_seqlens[i] for i in members])),
        )

    def _single(self, i: int, window: int | None) -> _Single:
        views = self.views
        q_start, q_end = self._cu_seqlens[i], self._cu_seqlens[i + 1]
        q_len, kv_len = q_end - q_start, self._seq_lens[i]
        first_query, first_key = kv_len - q_len, self._first_key(i, window)
        first_block = first_key // self._block_size
        last_block = -(-kv_len // self._block_size)
        table = self._tables[i, first_block:last_block].astype(np.int64)
        rows = self._each_plane(table * self._block_stride, 1)
        gathered = self._workspace.like(rows.numel(), views.block_rows[0])
        # What the first and last block hold outside the span is cut off.
        skip = first_key - first_block * self._block_size
        kv = gathered.view(views.planes, -1, views.kv_heads, views.head_dim)
        windowed = window is not None and kv_len > window and q_len > 1
        is_causal = q_len > 1 and first_query == 0 and not windowed
        mask = None
        if q_len > 1 and not is_causal:
            mask = _chunk_mask(first_query, first_key, kv_len, window, gathered)
        kv = kv[:, None, skip : skip + kv_len - first_key].transpose(2, 3)
        return _Single(rows, gathered, *_keys_values(kv), q_start, q_end, mask, is_causal)

    def _each_plane(self, rows: np.ndarray, stride: int) -> torch.Tensor:
        planes = [rows + plane * stride for plane in range(self.views.planes)]
        return self._send(np.concatenate(planes))


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
    rows, width = plan.views.token_rows[layer], pool.shape[4] * pool.shape[5]
    rows.index_copy_(0, plan.write_rows[0], key.reshape(-1, width))
    if value is not None:
        rows.index_copy_(0, plan.write_rows[1], value.reshape(-1, width))


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
    if len(work.singles) + len(work.groups) == 1:
        if work.singles:
            result = _sequence(grouped, views.block_rows[layer], work.singles[0], *how)
        else:
            # Members of a group are in the order of the batch.
            result = _decodes(grouped, views.token_rows[layer], work.groups[0], *how)
        return result.reshape(query.shape)
    output = query.new_empty(grouped.shape)
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
    many: _Group,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    torch.index_select(rows, 0, many.rows, out=many.gathered)
    if softcap is not None or sinks is not None:
        sink = None if sinks is None else sinks.expand(q.shape[0], -1, -1)
        return _by_hand(q, many.keys, many.values, many.mask, scale, softcap, sink)
    return scaled_dot_product_attention(q, many.keys, many.values, many.mask, scale=scale)


def _sequence(
    q: torch.Tensor,
    rows: torch.Tensor,
    single: _Single,
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


def _keys_values(planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the last plane; they are the same where one plane is both."""
    return planes[0], planes[-1]


def _chunk(q: torch.Tensor, single: _Single, scale: float) -> torch.Tensor:
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
    single: _Single,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    mask = single.mask
    if single.is_causal:
        mask = _chunk_mask(0, 0, single.keys.shape[2], None, q)
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
