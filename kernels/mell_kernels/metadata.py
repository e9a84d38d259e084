"""The shape of one ragged batch, in FlashAttention's names."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(slots=True)
class AttentionMetadata:
    """Where the queries of a ragged batch of B sequences and T tokens stand and find their keys.

    Sequence ``i`` has the queries ``cu_seqlens_q[i]:cu_seqlens_q[i + 1]``. They are the *last*
    tokens of its ``seq_lens[i]`` tokens of KV, so masks are aligned at the bottom right.
    """

    cu_seqlens_q: torch.Tensor  # [B + 1] int32
    seq_lens: torch.Tensor  # [B] int32, KV tokens including this batch's
    block_tables: torch.Tensor  # [B, max blocks of the batch] int32, padded with block 0
    slot_mapping: torch.Tensor  # [T] int64, block * block_size + offset
    max_seqlen_q: int
    max_seqlen_k: int
    num_decodes: int = 0  # leading sequences that have one query each
    # One per sequence, the same as long as what its blocks hold only grows; None: not known.
    owners: list[Hashable] | None = None
    plan: Any = None  # what a device prepares once a step; None until then
