"""A KV pool of int8 codes, each token and head with a scale of its own.

A block holds all its codes, ``[num_layers, planes, block_size, num_kv_heads, head_dim]`` int8, then
all its scales, the same without the last dimension in float16, and is padded to 16 bytes: one
extent of bytes like any other block, about half of what it takes in 16 bits. A code is
``round(x / scale)`` with ``scale = max|x| / 127`` over the head; written once, it is never rounded
again, wherever the block goes.

Attention runs on floats. Before a layer's attention the blocks that this step reads are written out
as a pool of that one layer, on which the attention of any device works unchanged. So what a step
needs besides is the memory of one layer's KV of the running requests.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from mell_kernels.cpu_plan import Workspace
from mell_kernels.metadata import AttentionMetadata

_LEVELS = 127
_ALIGNMENT = 16
_SCALE = torch.float16
# A scale below would be zero in float16, and one above infinite.
_SMALLEST, _LARGEST = 2.0**-24, 65504.0


def block_nbytes(
    num_layers: int, planes: int, block_size: int, num_kv_heads: int, head_dim: int
) -> int:
    """Bytes of one block."""
    heads = num_layers * planes * block_size * num_kv_heads
    used = _aligned(heads * head_dim) + heads * _SCALE.itemsize
    return _aligned(used)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def quantize(heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[..., D]`` int8 and scales ``[...]`` float16 of ``heads`` ``[..., D]``."""
    values = heads.float()
    largest = values.abs().amax(dim=-1)
    scales = (largest / _LEVELS).clamp(_SMALLEST, _LARGEST).to(_SCALE)
    codes = (values / scales.float()[..., None]).round_().clamp_(-_LEVELS, _LEVELS)
    return codes.to(torch.int8), scales


@dataclass(frozen=True, slots=True)
class Int8Plan:
    """What is the same in all layers of a step."""

    used: torch.Tensor  # [U] int64, the blocks that the step reads
    blocks: torch.Tensor  # [T] int64, where the new tokens go
    offsets: torch.Tensor  # [T] int64, within the block
    floats: torch.Tensor  # [U, 1, planes, block_size, num_kv_heads, head_dim], one layer
    meta: AttentionMetadata  # of the same batch, with block tables into ``floats``


class Int8Pool:
    """``data`` ``[num_blocks, block_nbytes]`` uint8, seen as codes and scales.

    ``shape`` is that of the pool of floats which this stands for.
    """

    def __init__(self, data: torch.Tensor, block: tuple[int, ...], dtype: torch.dtype) -> None:
        self.data = data
        self.shape = torch.Size((len(data), *block))
        self._dtype = dtype
        num_codes, num_scales = math.prod(block), math.prod(block[:-1])
        first = _aligned(num_codes) // _SCALE.itemsize
        self.codes = data.view(torch.int8)[:, :num_codes].view(self.shape)
        self.scales = data.view(_SCALE)[:, first : first + num_scales].view(self.shape[:-1])
        self._code_workspace = Workspace()
        self._float_workspace = Workspace()

    def plan(self, meta: AttentionMetadata) -> Int8Plan:
        block_size = self.shape[3]
        width = meta.block_tables.shape[1]
        columns = torch.arange(width, device=meta.block_tables.device)
        held = columns * block_size < meta.seq_lens[:, None]
        used, tables = torch.where(held, meta.block_tables, 0).unique(return_inverse=True)
        row = self.data.new_empty((0, math.prod(self.shape[2:])), dtype=self._dtype)
        floats = self._float_workspace.like(len(used), row)
        return Int8Plan(
            used=used.long(),
            blocks=meta.slot_mapping // block_size,
            offsets=meta.slot_mapping % block_size,
            floats=floats.view(len(used), 1, *self.shape[2:]),
            meta=dataclasses.replace(
                meta,
                block_tables=tables.view(-1, width).to(torch.int32),
                slot_mapping=meta.slot_mapping.new_empty(0),  # nothing is written there
                owners=None,  # nor is it the same in the next layer
            ),
        )

    def write(
        self, layer: int, key: torch.Tensor, value: torch.Tensor | None, plan: Int8Plan
    ) -> None:
        for plane, heads in enumerate((key,) if value is None else (key, value)):
            codes, scales = quantize(heads)
            self.codes[:, layer, plane][plan.blocks, plan.offsets] = codes
            self.scales[:, layer, plane][plan.blocks, plan.offsets] = scales

    def read(self, layer: int, plan: Int8Plan) -> None:
        """Write one layer of the step's blocks out to ``plan.floats``."""
        rows = self.codes[:, layer].flatten(1)
        codes = self._code_workspace.like(len(plan.used), rows)
        torch.index_select(rows, 0, plan.used, out=codes)
        scales = self.scales[:, layer].index_select(0, plan.used).float()[..., None]
        floats = plan.floats[:, 0]
        torch.mul(codes.view(floats.shape), scales, out=floats)
