"""From planned chunks to the tensors of one ragged batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from mell_kernels.metadata import AttentionMetadata

from mell_ray.engine.sequence import Sequence
from mell_ray.engine.transfer import to_device

Chunk = tuple[Sequence, int]


@dataclass(slots=True)
class RaggedBatch:
    """One step's input. ``sampled[i]`` gets its next token from row ``i`` of the logits."""

    input_ids: torch.Tensor  # [1, T] int64
    position_ids: torch.Tensor  # [1, T] int64
    logits_rows: torch.Tensor  # [R] int64, rows of the T whose logits are wanted
    sampled: list[Sequence]
    attention: AttentionMetadata
    num_resident_tokens: int


class BatchBuilder:
    """Owns the block table, ``[max_num_seqs, max blocks of a sequence]``.

    A sequence keeps its row while it holds blocks, and only blocks it got since the last step are
    written: rebuilding the table from lists would cost more than the rest of the batch.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, block_size: int, device: torch.device):
        self._table = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._block_size = block_size
        self._device = device

    def build(self, chunks: list[Chunk]) -> RaggedBatch:
        lengths = np.array([count for _, count in chunks], dtype=np.int64)
        starts = np.array([seq.num_computed for seq, _ in chunks], dtype=np.int64)
        ends = starts + lengths
        cu_seqlens = np.zeros(len(chunks) + 1, dtype=np.int32)
        np.cumsum(lengths, out=cu_seqlens[1:])
        tables = self._tables([seq for seq, _ in chunks], int(ends.max()))
        owner = np.repeat(np.arange(len(chunks)), lengths)
        positions = np.arange(cu_seqlens[-1]) - cu_seqlens[owner] + starts[owner]
        blocks = tables[owner, positions // self._block_size].astype(np.int64)
        sampled = [
            (seq, cu_seqlens[i + 1] - 1)
            for i, (seq, count) in enumerate(chunks)
            if seq.status == "running" and seq.num_to_compute == count
        ]
        return RaggedBatch(
            input_ids=self._send(self._token_ids(chunks))[None],
            position_ids=self._send(positions)[None],
            logits_rows=self._send(np.array([row for _, row in sampled], dtype=np.int64)),
            sampled=[seq for seq, _ in sampled],
            attention=AttentionMetadata(
                cu_seqlens_q=self._send(cu_seqlens),
                seq_lens=self._send(ends.astype(np.int32)),
                block_tables=self._send(tables),
                slot_mapping=self._send(blocks * self._block_size + positions % self._block_size),
                max_seqlen_q=int(lengths.max()),
                max_seqlen_k=int(ends.max()),
                num_decodes=_leading_ones(lengths),
                owners=[seq.kv_owner for seq, _ in chunks],
            ),
            num_resident_tokens=int(ends.sum()),
        )

    def _tables(self, seqs: list[Sequence], max_tokens: int) -> np.ndarray:
        for seq in seqs:
            if seq.num_table_blocks < len(seq.blocks):
                new = seq.blocks[seq.num_table_blocks :]
                self._table[seq.row, seq.num_table_blocks : len(seq.blocks)] = new
                seq.num_table_blocks = len(seq.blocks)
        width = -(-max_tokens // self._block_size)
        rows = np.array([seq.row for seq in seqs])
        return self._table[rows, :width]

    @staticmethod
    def _token_ids(chunks: list[Chunk]) -> np.ndarray:
        ids: list[int] = []
        for seq, count in chunks:
            ids += seq.token_ids[seq.num_computed : seq.num_computed + count]
        return np.array(ids, dtype=np.int64)

    def _send(self, array: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(array), self._device)


def _leading_ones(lengths: np.ndarray) -> int:
    longer = np.flatnonzero(lengths != 1)
    return int(longer[0]) if len(longer) else len(lengths)
