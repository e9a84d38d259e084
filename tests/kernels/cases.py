"""Random ragged batches on random pools, for kernels and their references alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from mell_kernels.metadata import AttentionMetadata

LAYERS = 3
LAYER = 1


@dataclass(frozen=True, slots=True)
class Case:
    """``lengths``: (tokens with KV already, new tokens) of each sequence."""

    lengths: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    shared: bool = False  # values are the keys, as in latent attention
    block_size: int = 4
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    seed: int = 0

    def __str__(self) -> str:
        lengths = "_".join(f"{old}+{new}" for old, new in self.lengths) or "empty"
        extras = [
            f"w{self.window}" if self.window else "",
            "cap" if self.softcap else "",
            "sinks" if self.sinks else "",
            "shared" if self.shared else "",
        ]
        shape = f"h{self.heads}:{self.kv_heads}-d{self.dim}-b{self.block_size}"
        return "-".join(filter(None, [lengths, shape, *extras]))


@dataclass(slots=True)
class Batch:
    query: torch.Tensor  # [T, heads, dim]
    key: torch.Tensor  # [T, kv_heads, dim]
    value: torch.Tensor  # [T, kv_heads, dim]
    keys: torch.Tensor  # [num_blocks, block_size, kv_heads, dim], strided like a layer of a pool
    values: torch.Tensor  # the same
    meta: AttentionMetadata
    sinks: torch.Tensor | None  # [heads]


def metadata(
    lengths: tuple[tuple[int, int], ...], block_size: int, num_blocks: int, seed: int
) -> AttentionMetadata:
    rng = np.random.default_rng(seed)
    free = rng.permutation(np.arange(1, num_blocks)).tolist()
    tables = [[free.pop() for _ in range(-(-(old + new) // block_size))] for old, new in lengths]
    width = max((len(table) for table in tables), default=0) + 1
    slots = [
        table[position // block_size] * block_size + position % block_size
        for (old, new), table in zip(lengths, tables, strict=True)
        for position in range(old, old + new)
    ]
    rows = [table + [0] * (width - len(table)) for table in tables]
    return AttentionMetadata(
        cu_seqlens_q=torch.tensor(np.cumsum([0, *(new for _, new in lengths)]), dtype=torch.int32),
        seq_lens=torch.tensor([old + new for old, new in lengths], dtype=torch.int32),
        block_tables=torch.tensor(rows, dtype=torch.int32).view(len(rows), width),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        max_seqlen_q=max((new for _, new in lengths), default=0),
        max_seqlen_k=max((old + new for old, new in lengths), default=0),
    )


def build(case: Case, dtype: torch.dtype, device: str = "cpu") -> Batch:
    """The same numbers on every device. Block 0 and everything behind the end of a sequence is NaN
    and must reach nobody."""
    generator = torch.Generator().manual_seed(case.seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    blocks = 2 + sum(-(-(old + new) // case.block_size) for old, new in case.lengths)
    meta = metadata(case.lengths, case.block_size, blocks, case.seed)
    alive = torch.zeros(blocks, case.block_size, dtype=torch.bool)
    for table, length in zip(meta.block_tables, meta.seq_lens.tolist(), strict=True):
        positions = torch.arange(length)
        alive[table[positions // case.block_size].long(), positions % case.block_size] = True
    planes = 1 if case.shared else 2
    pool = random(blocks, LAYERS, planes, case.block_size, case.kv_heads, case.dim).to(device)
    keys, values = pool[:, LAYER, 0], pool[:, LAYER, -1]
    for plane in (keys, values):
        plane[~alive.to(device)] = torch.nan
    tokens = int(meta.cu_seqlens_q[-1])
    for name in ("cu_seqlens_q", "seq_lens", "block_tables", "slot_mapping"):
        setattr(meta, name, getattr(meta, name).to(device))
    # transformers hands over [heads, tokens, dim] transposed.
    return Batch(
        query=random(case.heads, tokens, case.dim).to(device).transpose(0, 1),
        key=random(case.kv_heads, tokens, case.dim).to(device).transpose(0, 1),
        value=random(case.kv_heads, tokens, case.dim).to(device).transpose(0, 1),
        keys=keys,
        values=values,
        meta=meta,
        sinks=random(case.heads).to(device) if case.sinks else None,
    )
