"""What of a CPU's paged attention is the same in all layers of a step; see ``cpu``."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from mell_kernels.dense import Decode, DenseKV, Served
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
    """Memory that outlives the steps. Scratch memory, of which fresh pages on each call would cost
    more than the copy: it grows to the most that was ever needed. And dense copies of the KV of
    running decodes."""

    def __init__(self, dense_nbytes: int = 0) -> None:
        """``dense_nbytes``: what such copies may take."""
        self.dense = DenseKV(dense_nbytes)
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


class Single(NamedTuple):
    """One sequence of the batch; its KV is gathered block by block."""

    rows: torch.Tensor  # of the layer's blocks: those of K, then of V where there are planes for it
    gathered: torch.Tensor  # workspace for those rows
    keys: torch.Tensor  # [1, Hk, keys, D], what of ``gathered`` is in reach; as are the values
    values: torch.Tensor
    q_start: int
    q_end: int
    mask: torch.Tensor | None  # [q, keys] to add, where causality alone does not say it
    is_causal: bool


class Group(NamedTuple):
    """Several decodes at once; their KV is gathered token by token. A shorter one is padded with
    its own last token, so that nothing stale and nothing of a neighbour can reach its softmax."""

    rows: torch.Tensor  # of the layer's tokens: sequence by sequence, its K, then its V if any
    gathered: torch.Tensor  # workspace for those rows
    keys: torch.Tensor  # [G, Hk, keys, D] in ``gathered``, as are the values
    values: torch.Tensor
    mask: torch.Tensor  # [G, 1, 1, keys] to add
    tokens: torch.Tensor  # [G] rows of the batch


class WindowPlan(NamedTuple):
    singles: list[Single]
    groups: list[Group]
    dense: list[Served]


class CpuPlan:
    """What is the same in all layers of a step, computed once: when it is first needed, as compiled
    layers (``native``) need none of it."""

    def __init__(self, pool: torch.Tensor, meta: AttentionMetadata, workspace: Workspace) -> None:
        self.views = views = workspace.views(pool)
        self._workspace = workspace
        self._device = pool.device
        self._block_size = views.block_size
        self._block_stride = views.num_layers * views.planes  # rows from a block to the next
        self._meta = meta
        self._windows: dict[int | None, WindowPlan] = {}

    @cached_property
    def _cu_seqlens(self) -> list[int]:
        return self._meta.cu_seqlens_q.tolist()

    @cached_property
    def _seq_lens(self) -> list[int]:
        return self._meta.seq_lens.tolist()

    @cached_property
    def _tables(self) -> np.ndarray:
        return self._meta.block_tables.cpu().numpy()

    @cached_property
    def _dense(self) -> tuple[list[Served], set[int]]:
        """Decodes served from dense copies, and their rows of the batch."""
        if self._meta.owners is None:
            return [], set()
        starts = self._cu_seqlens
        decodes = [
            Decode(owner, starts[i], self._seq_lens[i], self._tables[i])
            for i, owner in enumerate(self._meta.owners)
            if starts[i + 1] - starts[i] == 1
        ]
        return self._workspace.dense.serve(self.views.pool, decodes)

    @property
    def dense(self) -> list[Served]:
        return self._dense[0]

    @cached_property
    def write_rows(self) -> list[torch.Tensor]:
        """Of the layer's tokens, one for each of the batch: for each plane."""
        block, offset = np.divmod(self._meta.slot_mapping.cpu().numpy(), self._block_size)
        first = block * (self._block_stride * self._block_size) + offset
        planes = range(self.views.planes)
        return [self._send(first + plane * self._block_size) for plane in planes]

    def _send(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def window(self, window: int | None) -> WindowPlan:
        plan = self._windows.get(window)
        if plan is None:
            plan = self._windows[window] = self._build(window)
        return plan

    def _build(self, window: int | None) -> WindowPlan:
        # A copy is read from its beginning.
        dense, rows = self._dense
        if window is not None and any(served.longest > window for served in dense):
            dense, rows = [], set()
        left = [i for i in range(len(self._seq_lens)) if self._cu_seqlens[i] not in rows]
        grouped = self._grouped(left, window)
        alone = set(left).difference(*grouped)
        return WindowPlan(
            [self._single(i, window) for i in sorted(alone)],
            [self._group(members, window) for members in grouped],
            dense,
        )

    def _first_key(self, i: int, window: int | None) -> int:
        q_len = self._cu_seqlens[i + 1] - self._cu_seqlens[i]
        first_query = self._seq_lens[i] - q_len
        return 0 if window is None else max(0, first_query - window + 1)

    def _grouped(self, sequences: list[int], window: int | None) -> list[list[int]]:
        """Decodes to serve together, by length; those that would be alone are left out."""
        decodes = [
            (self._seq_lens[i] - self._first_key(i, window), i)
            for i in sequences
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

    def _group(self, members: list[int], window: int | None) -> Group:
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
        return Group(
            rows,
            gathered,
            *_keys_values(kv),
            mask=self._send(mask).to(gathered.dtype),
            tokens=self._send(np.array([self._cu_seqlens[i] for i in members])),
        )

    def _single(self, i: int, window: int | None) -> Single:
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
            mask = chunk_mask(first_query, first_key, kv_len, window, gathered)
        kv = kv[:, None, skip : skip + kv_len - first_key].transpose(2, 3)
        return Single(rows, gathered, *_keys_values(kv), q_start, q_end, mask, is_causal)

    def _each_plane(self, rows: np.ndarray, stride: int) -> torch.Tensor:
        planes = [rows + plane * stride for plane in range(self.views.planes)]
        return self._send(np.concatenate(planes))


def chunk_mask(
    first_query: int, first_key: int, end: int, window: int | None, like: torch.Tensor
) -> torch.Tensor:
    """Causal, aligned at the bottom right: the last query sees the last key."""
    keys = torch.arange(first_key, end, device=like.device)
    queries = torch.arange(first_query, end, device=like.device)[:, None]
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    return like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def _keys_values(planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the last plane; they are the same where one plane is both."""
    return planes[0], planes[-1]
