"""Decode steps replayed as CUDA graphs, one for each padded batch size.

A decode of a small batch is hundreds of kernels of microseconds each, and launching them takes
longer than running them. A graph launches all at once, but always with the same shapes and
addresses: so a batch is copied into inputs that stay, padded to the next size there is a graph for.
Padding rows are sequences of one token in the padding block, so they need no exception anywhere and
harm nobody. Steps with prefill run as they are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch
from mell_kernels import ops
from mell_kernels.metadata import AttentionMetadata

from mell_ray.engine.batch import RaggedBatch
from mell_ray.engine.kv_pool import KVPool
from mell_ray.engine.model import LoadedModel, PagedKV
from mell_ray.errors import ConfigError

Forward = Callable[[], torch.Tensor]
# Takes a function and returns one that does the same again, with the same tensors.
Capture = Callable[[Forward], Forward]


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to have a graph for, ascending: 1, 2, 4, then multiples of 8, of 16 above 64 and
    of 32 above 256, up to ``max_num_seqs``. Padding is then never more than a third or 7 rows."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 4097, 32)]
    smaller = [size for size in sizes if size < max_num_seqs]
    return [*smaller, max_num_seqs]


class CudaCapture:
    """Captures functions as CUDA graphs that share their memory: only one runs at a time, and its
    output is read before another runs."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Forward) -> Forward:
        """Runs ``forward`` twice before, so that its kernels are compiled and its libraries have
        what they allocate once.

        Raises:
            ConfigError: something in it cannot be captured.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            forward()
            forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._memory):
                output = forward()
        except RuntimeError as error:
            raise ConfigError(
                f"this model's decode step cannot be captured as a CUDA graph: {error}; set "
                "enforce_eager to run it without",
                param="enforce_eager",
            ) from error

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay


class DecodeGraphs:
    """Owns the inputs that all graphs read, and one graph per size."""

    def __init__(
        self,
        model: LoadedModel,
        kv: KVPool,
        sizes: list[int],
        table_width: int,
        capture: Capture,
    ) -> None:
        """``table_width``: blocks of the longest sequence there can be."""
        self._model = model
        self._kv = kv
        self._sizes = sizes
        most, device = sizes[-1], kv.tensor.device
        self._input_ids = torch.zeros((1, most), dtype=torch.int64, device=device)
        self._position_ids = torch.zeros((1, most), dtype=torch.int64, device=device)
        self._slot_mapping = torch.zeros(most, dtype=torch.int64, device=device)
        self._seq_lens = torch.ones(most, dtype=torch.int32, device=device)
        self._tables = torch.zeros((most, table_width), dtype=torch.int32, device=device)
        self._rows = torch.arange(most, dtype=torch.int64, device=device)
        self._starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._workspace = ops.Workspace()
        # The largest first: the memory it takes is what the smaller ones use again.
        captured = {size: capture(self._forward(size)) for size in reversed(sizes)}
        self._replay = captured

    def _forward(self, size: int) -> Forward:
        def forward() -> torch.Tensor:
            meta = AttentionMetadata(
                cu_seqlens_q=self._starts[: size + 1],
                seq_lens=self._seq_lens[:size],
                block_tables=self._tables[:size],
                slot_mapping=self._slot_mapping[:size],
                max_seqlen_q=1,
                max_seqlen_k=self._model.max_model_len,
                num_decodes=size,
            )
            ops.prepare(self._kv.cache, meta, self._workspace)
            return self._model.forward(
                self._input_ids[:, :size],
                self._position_ids[:, :size],
                self._rows[:size],
                PagedKV(self._kv.cache, meta),
            )

        return forward

    def run(self, batch: RaggedBatch) -> torch.Tensor | None:
        """Logits as ``LoadedModel.forward`` gives, valid until the next call; None where the batch
        is not one of decodes alone, or larger than all graphs."""
        meta = batch.attention
        count = batch.input_ids.shape[1]
        if meta.num_decodes != count or count > self._sizes[-1]:
            return None
        size = self._sizes[bisect_left(self._sizes, count)]
        self._fill(batch, count, size)
        logits = self._replay[size]()[:count]
        if len(batch.sampled) < count:
            logits = logits.index_select(0, batch.logits_rows)
        return logits

    def _fill(self, batch: RaggedBatch, count: int, size: int) -> None:
        meta = batch.attention
        self._input_ids[:, :count].copy_(batch.input_ids)
        self._position_ids[:, :count].copy_(batch.position_ids)
        self._slot_mapping[:count].copy_(meta.slot_mapping)
        self._seq_lens[:count].copy_(meta.seq_lens)
        self._tables[:count, : meta.block_tables.shape[1]].copy_(meta.block_tables)
        if size > count:
            self._input_ids[:, count:size].zero_()
            self._position_ids[:, count:size].zero_()
            self._slot_mapping[count:size].zero_()
            self._seq_lens[count:size].fill_(1)
            self._tables[count:size, 0].zero_()
