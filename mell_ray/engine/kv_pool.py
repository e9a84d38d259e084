"""The tensor that holds all KV of an engine, and how big it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from mell_kernels import ops

from mell_ray.config import EngineConfig
from mell_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class KVShape:
    """What a block of one model holds.

    Two planes are keys and values. One plane is a latent that is both, for all heads together (see
    ``mla``).
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    planes: int = 2

    def block_nbytes(self, block_size: int) -> int:
        token = self.planes * self.num_kv_heads * self.head_dim
        return self.num_layers * block_size * token * self.dtype.itemsize


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
    """``[num_blocks, num_layers, planes, block_size, num_kv_heads, head_dim]``, zeroed.

    Block-major: one block of all layers is one extent, so a migration moves whole extents. Zeroed
    because a masked key whose value is NaN would still poison a batched softmax.
    """

    def __init__(
        self, shape: KVShape, block_size: int, capacity: int, device: torch.device
    ) -> None:
        block = (shape.num_layers, shape.planes, block_size, shape.num_kv_heads, shape.head_dim)
        self.tensor = torch.zeros((capacity + 1, *block), dtype=shape.dtype, device=device)
        self.block_nbytes = shape.block_nbytes(block_size)
        assert math.prod(block) * shape.dtype.itemsize == self.block_nbytes

    @torch.inference_mode()
    def export(self, block_ids: list[int]) -> np.ndarray:
        """The blocks' bytes: 1-D uint8, contiguous, ``len(block_ids) * block_nbytes`` long."""
        ids = torch.tensor(block_ids, dtype=torch.int64, device=self.tensor.device)
        return ops.gather_blocks(self.tensor, ids).cpu().numpy()

    @torch.inference_mode()
    def load(self, block_ids: list[int], data: np.ndarray) -> None:
        """Overwrite blocks with bytes that ``export`` gave.

        Raises:
            ValueError: ``data`` has another length or type than those blocks.
        """
        expected = len(block_ids) * self.block_nbytes
        if data.dtype != np.uint8 or data.size != expected:
            raise ValueError(f"{data.size} elements of {data.dtype} given, {expected} bytes needed")
        ids = torch.tensor(block_ids, dtype=torch.int64, device=self.tensor.device)
        source = np.ascontiguousarray(data).reshape(-1)
        if not source.flags.writeable:  # torch refuses to wrap what shared memory lends read-only
            source = source.copy()
        ops.scatter_blocks(self.tensor, ids, torch.from_numpy(source).to(self.tensor.device))
