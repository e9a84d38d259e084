"""The tensor that holds all KV of an engine, and how big it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from mell_kernels import int8, ops

from mell_ray.config import EngineConfig
from mell_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class KVShape:
    """What a block of one model holds, and how.

    ``dtype`` is what attention computes in; with ``int8`` the pool stores codes of it. Two planes
    are keys and values. One plane is a latent that is both, for all heads together (see ``mla``).
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    planes: int = 2
    int8: bool = False

    def block(self, block_size: int) -> tuple[int, int, int, int, int]:
        """``(num_layers, planes, block_size, num_kv_heads, head_dim)``."""
        return (self.num_layers, self.planes, block_size, self.num_kv_heads, self.head_dim)

    def block_nbytes(self, block_size: int) -> int:
        block = self.block(block_size)
        return int8.block_nbytes(*block) if self.int8 else math.prod(block) * self.dtype.itemsize

    def reading_nbytes(self, block_size: int) -> int:
        """Bytes besides that a block takes while a step reads it: one layer in ``dtype``."""
        return math.prod(self.block(block_size)[1:]) * self.dtype.itemsize if self.int8 else 0

    def format(self, block_size: int) -> str:
        """Says all of what a block's bytes mean: blocks of equal formats can be exchanged."""
        return f"{self}, blocks of {block_size}"

    def stored_as(self, kv_cache_dtype: str) -> KVShape:
        """This shape with the setting of that name.

        Raises:
            ConfigError: the model's KV cannot be stored so.
        """
        if kv_cache_dtype == "int8" and self.planes == 1:
            raise ConfigError(
                "kv_cache_dtype 'int8' has one scale per token and head, but the latent of "
                "multi-head latent attention serves all heads at once and carries a rotary part "
                "of another magnitude; use 'auto'",
                param="kv_cache_dtype",
            )
        return replace(self, int8=kv_cache_dtype == "int8")


def capacity_blocks(shape: KVShape, config: EngineConfig, free_bytes: int) -> int:
    """How many blocks a replica can offer, the padding block not counted.

    Raises:
        ConfigError: not even one fits into ``free_bytes``.
    """
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    nbytes = shape.block_nbytes(config.block_size)
    capacity = free_bytes // nbytes - 1
    if capacity < 1:
        raise ConfigError(
            f"the KV pool gets {free_bytes} bytes, but needs at least {2 * nbytes} for one block "
            "and the padding block; raise kv_cache_memory_bytes (CPU) or gpu_memory_utilization",
            param="kv_cache_memory_bytes",
        )
    return capacity


class KVPool:
    """``[num_blocks, num_layers, planes, block_size, num_kv_heads, head_dim]``, zeroed, of floats
    or as an ``Int8Pool``: ``cache`` is what ``ops`` take, ``tensor`` the memory itself.

    Block-major: one block of all layers is one extent, so a migration moves whole extents. Zeroed
    because a masked key whose value is NaN would still poison a batched softmax.
    """

    def __init__(
        self, shape: KVShape, block_size: int, capacity: int, device: torch.device
    ) -> None:
        self.block_nbytes = shape.block_nbytes(block_size)
        self.format = shape.format(block_size)
        self._shape = shape
        self._block = shape.block(block_size)
        self._capacity = capacity
        self._device = device
        self.allocate()

    def allocate(self) -> None:
        """Take the memory, at first or after ``release``."""
        shape, rows = self._shape, self._capacity + 1
        self.cache: torch.Tensor | int8.Int8Pool
        if shape.int8:
            self.tensor = torch.zeros(
                (rows, self.block_nbytes), dtype=torch.uint8, device=self._device
            )
            self.cache = int8.Int8Pool(self.tensor, self._block, shape.dtype)
        else:
            self.tensor = torch.zeros((rows, *self._block), dtype=shape.dtype, device=self._device)
            self.cache = self.tensor

    def release(self) -> None:
        """Give the memory back, with all that is in it; nothing else works until ``allocate``."""
        self.cache = self.tensor = self.tensor.new_empty(0)

    @torch.inference_mode()
    def export(self, block_ids: list[int]) -> np.ndarray:
        """The blocks' bytes: 1-D uint8, contiguous, ``len(block_ids) * block_nbytes`` long."""
        ids = torch.tensor(block_ids, dtype=torch.int64, device=self.tensor.device)
        return ops.gather_blocks(self.tensor, ids).cpu().numpy()

    @torch.inference_mode()
    def export_into(self, block_ids: list[int], out: np.ndarray) -> None:
        """``export`` without new memory, whose first touch costs more than the copy itself.

        ``out``: 1-D uint8, contiguous and writable, ``len(block_ids) * block_nbytes`` long.
        """
        ids = torch.tensor(block_ids, dtype=torch.int64, device=self.tensor.device)
        target = torch.from_numpy(out)
        if self.tensor.device.type == "cpu":
            rows = self.tensor.view(torch.uint8).view(self.tensor.shape[0], -1)
            torch.index_select(rows, 0, ids, out=target.view(len(block_ids), -1))
        else:
            target.copy_(ops.gather_blocks(self.tensor, ids))

    def lend(self, block_ids: list[int], max_pieces: int) -> list[np.ndarray] | None:
        """The blocks' bytes where they lie, read-only and in order: 1-D uint8, adjacent blocks in
        one piece. None where they are not in host memory or in more than ``max_pieces``."""
        if self.tensor.device.type != "cpu":
            return None
        starts = [0] + [i for i, (a, b) in enumerate(pairwise(block_ids), 1) if b != a + 1]
        if len(starts) > max_pieces:
            return None
        rows = self.tensor.view(torch.uint8).view(self.tensor.shape[0], -1).numpy()
        pieces = []
        for start, stop in pairwise([*starts, len(block_ids)]):
            piece = rows[block_ids[start] : block_ids[start] + stop - start].reshape(-1)
            piece.flags.writeable = False
            pieces.append(piece)
        return pieces

    @torch.inference_mode()
    def export_tensor(self, block_ids: list[int]) -> torch.Tensor:
        """``export`` without leaving the device."""
        ids = torch.tensor(block_ids, dtype=torch.int64, device=self.tensor.device)
        return ops.gather_blocks(self.tensor, ids)

    @torch.inference_mode()
    def load(self, block_ids: list[int], data: np.ndarray | torch.Tensor) -> None:
        """Overwrite blocks with bytes that ``export`` or ``export_tensor`` gave.

        Raises:
            ValueError: ``data`` has another length or type than those blocks.
        """
        expected = len(block_ids) * self.block_nbytes
        if data.dtype not in (np.uint8, torch.uint8) or data.nbytes != expected:
            raise ValueError(
                f"{data.nbytes} bytes of {data.dtype} given, {expected} bytes of uint8 needed"
            )
        if isinstance(data, torch.Tensor):
            ids = torch.tensor(block_ids, dtype=torch.int64, device=self.tensor.device)
            ops.scatter_blocks(self.tensor, ids, data.to(self.tensor.device))
            return
        source = np.ascontiguousarray(data).reshape(-1)
        if self.tensor.device.type == "cpu":
            # Straight from what shared memory lends read-only, which torch refuses to wrap.
            rows = self.tensor.view(torch.uint8).view(self.tensor.shape[0], -1).numpy()
            rows[block_ids] = source.reshape(len(block_ids), -1)
            return
        if not source.flags.writeable:
            source = source.copy()
        ids = torch.tensor(block_ids, dtype=torch.int64, device=self.tensor.device)
        ops.scatter_blocks(self.tensor, ids, torch.from_numpy(source).to(self.tensor.device))
