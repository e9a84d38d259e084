"""How many bytes of a GPU are left for the KV pool, found by running what will run.

``gpu_memory_utilization`` is a share of the whole device. From it goes what others hold, the
weights, what the largest step needs besides, and what CUDA graphs keep for themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from mell_kernels import ops
from mell_kernels.metadata import AttentionMetadata
from mell_kernels.rows import SamplingRows

from mell_ray.config import EngineConfig
from mell_ray.engine.graphs import CudaCapture, DecodeGraphs, bucket_sizes
from mell_ray.engine.kv_pool import KVPool, KVShape, capacity_blocks
from mell_ray.engine.model import LoadedModel, PagedKV


class Device(Protocol):
    """A GPU's memory, in bytes."""

    def total(self) -> int: ...
    def used(self) -> int:
        """By everybody, this process's cache included."""

    def reserved(self) -> int:
        """By this process's allocator."""

    def peak(self) -> int:
        """The most that was ever reserved since ``trim``."""

    def trim(self) -> None:
        """Give unused memory back and forget the peak."""


class CudaDevice:
    """``Device`` of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def total(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[1])

    def used(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return int(total - free)

    def reserved(self) -> int:
        return int(torch.cuda.memory_reserved(self._device))

    def peak(self) -> int:
        torch.cuda.synchronize(self._device)
        return int(torch.cuda.max_memory_reserved(self._device))

    def trim(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """Where a device's memory goes, in bytes, the KV pool not counted."""

    total: int
    others: int  # other processes, and what CUDA itself keeps for this one
    weights: int
    activations: int  # of the largest step, at its peak
    graphs: int

    def kv_bytes(self, utilization: float) -> int:
        """What a KV pool may take; negative where the rest is too much already."""
        held = self.others + self.weights + self.activations + self.graphs
        return int(self.total * utilization) - held


def profile(device: Device, step: Callable[[], None], capture: Callable[[int], None],
            sizes: list[int]) -> MemoryProfile:  # fmt: skip
    """Measure a device on which only the weights are so far.

    Args:
        step: runs the largest step there can be.
        capture: captures the graph of one batch size and keeps it.
        sizes: batch sizes that will have a graph; the largest and the smallest are captured to
            learn what the first takes and what each further one adds.
    """
    device.trim()
    weights = device.reserved()
    step()
    activations = device.peak() - weights
    device.trim()
    before = device.used()
    others = before - device.reserved()
    graphs = 0
    if sizes:
        capture(sizes[-1])
        device.trim()
        first = device.used()
        capture(sizes[0])
        device.trim()
        further = max(0, device.used() - first)
        graphs = first - before + further * (len(sizes) - 1)
    return MemoryProfile(device.total(), others, weights, activations, graphs)


def gpu_capacity(model: LoadedModel, shape: KVShape, config: EngineConfig) -> int:
    """Blocks of a pool of ``shape`` that ``gpu_memory_utilization`` leaves room for.

    Raises:
        ConfigError: not even one.
    """
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    found = _measure(model, shape, config)
    torch.cuda.empty_cache()
    nbytes = shape.block_nbytes(config.block_size)
    # What reads a block of int8 needs memory too, at most for all blocks at once.
    share = nbytes / (nbytes + shape.reading_nbytes(config.block_size))
    return capacity_blocks(
        shape, config, int(found.kv_bytes(config.gpu_memory_utilization) * share)
    )


def _measure(model: LoadedModel, shape: KVShape, config: EngineConfig) -> MemoryProfile:
    # A pool of its own: block 0, in which everybody writes, is all that these steps need.
    kv = KVPool(shape, config.block_size, 1, model.device)
    width = -(-model.max_model_len // config.block_size) + 1
    sizes = graph_sizes(shape, config)
    taken = CudaCapture()
    kept: list[DecodeGraphs] = []
    return profile(
        CudaDevice(model.device),
        lambda: _largest_step(model, kv, config),
        lambda size: kept.append(DecodeGraphs(model, kv, [size], width, taken)),
        sizes,
    )


def graph_sizes(shape: KVShape, config: EngineConfig) -> list[int]:
    """Batch sizes to capture. None where graphs are off, or the blocks that a step reads, and so
    the shapes of its tensors, change from step to step (int8)."""
    return [] if config.enforce_eager or shape.int8 else bucket_sizes(config.max_num_seqs)


def _largest_step(model: LoadedModel, kv: KVPool, config: EngineConfig) -> None:
    """A step of ``max_num_batched_tokens`` that samples ``max_num_seqs`` tokens with log
    probabilities. Every sequence lies in block 0."""
    device, rows = model.device, config.max_num_seqs
    tokens = min(config.max_num_batched_tokens, rows * model.max_model_len)
    starts = np.linspace(0, tokens, rows + 1).astype(np.int64)
    lengths = starts[1:] - starts[:-1]
    positions = np.arange(tokens) - np.repeat(starts[:-1], lengths)

    def send(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(array).to(device, dtype)

    width = -(-int(lengths.max()) // config.block_size)
    meta = AttentionMetadata(
        cu_seqlens_q=send(starts, torch.int32),
        seq_lens=send(lengths, torch.int32),
        block_tables=torch.zeros((rows, width), dtype=torch.int32, device=device),
        slot_mapping=send(positions % config.block_size, torch.int64),
        max_seqlen_q=int(lengths.max()),
        max_seqlen_k=int(lengths.max()),
    )
    with torch.inference_mode():
        ops.prepare(kv.cache, meta, ops.Workspace())
        logits = model.forward(
            torch.ones((1, tokens), dtype=torch.int64, device=device),
            send(positions, torch.int64)[None],
            send(starts[1:] - 1, torch.int64),
            PagedKV(kv.cache, meta),
        )
        kept = torch.log_softmax(logits, dim=-1)
        ops.sample(logits, _sampling(rows, device))
        del kept


def _sampling(rows: int, device: torch.device) -> SamplingRows:
    ones = torch.ones(rows, device=device)
    keys = torch.zeros((rows, 2), dtype=torch.int32, device=device)
    return SamplingRows(ones, ones.int() * 50, ones * 0.9, ones.log(), keys)
