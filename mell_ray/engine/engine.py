"""The engine of one accelerator: continuous batching of requests that can move while they run.

One thread owns an Engine and makes every call. ``step`` plans, runs one ragged batch, samples, and
hands out what is new. Its base ``Residents`` is the other half: requests and their migrations.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from mell_kernels import ops

from mell_ray.config import EngineConfig
from mell_ray.engine.batch import BatchBuilder, Chunk, RaggedBatch
from mell_ray.engine.block_pool import BlockPool, root_hash
from mell_ray.engine.grammar import GrammarCompiler, wait_for_masks
from mell_ray.engine.graphs import CudaCapture, DecodeGraphs
from mell_ray.engine.host_memory import free_bytes
from mell_ray.engine.kv_pool import KVPool, KVShape, capacity_blocks
from mell_ray.engine.memory import gpu_capacity, graph_sizes
from mell_ray.engine.model import LoadedModel, PagedKV
from mell_ray.engine.planner import Planner
from mell_ray.engine.residents import Residents
from mell_ray.engine.sampler import Draw, Sampled, chosen, wants_likeliest
from mell_ray.engine.sampler import start as start_draw
from mell_ray.engine.sequence import Sequence, finish_reason
from mell_ray.engine.transfer import to_device
from mell_ray.engine.types import StepOutput, TokenDelta
from mell_ray.engine.weight_image import WeightImage
from mell_ray.errors import ConfigError, ConflictError

_MOST_DENSE = 0.25  # of the host's free memory


class Engine(Residents):
    """Runs a loaded model on a pool of KV blocks. Not thread-safe, by design."""

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        device: str = "cpu",
        grammars: GrammarCompiler | None = None,
        image: WeightImage | None = None,
    ) -> None:
        """
        Args:
            grammars: for requests with a grammar, which are refused without it.
            image: what ``model`` was made into or from; an engine without one cannot sleep.
        """
        shape = model.kv_shape.stored_as(config.kv_cache_dtype)
        target = torch.device(device)
        if target.type != model.device.type:
            raise ConfigError(f"the engine is for {device}, but its model is on {model.device}")
        if target.type == "cpu":
            torch.set_num_threads(config.num_threads)
        capacity = _capacity(model, shape, config)
        kv = KVPool(shape, config.block_size, capacity, target)
        self.prefix_root = root_hash(model.name, kv.format)
        planner = Planner(
            BlockPool(capacity),
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            prefix_root=self.prefix_root if config.enable_prefix_caching else None,
        )
        super().__init__(
            kv,
            planner,
            vocab_size=model.vocab_size,
            max_model_len=model.max_model_len,
            eos_token_ids=model.eos_token_ids,
            grammars=grammars,
        )
        self._model = model
        self.kernels = model.kernels
        self.model_config: dict[str, Any] = model.model.config.to_dict()
        longest = min(self.max_model_len, self.capacity_blocks * self.block_size)
        max_blocks = -(-longest // self.block_size) + 1
        self._builder = BatchBuilder(config.max_num_seqs, max_blocks, self.block_size, target)
        self._widest_step = config.max_num_batched_tokens, config.max_num_seqs
        self._dense_nbytes = _dense_nbytes(kv, config)
        self._workspace = ops.Workspace(self._dense_nbytes)
        self._graph_sizes = graph_sizes(shape, config)
        self._max_blocks = max_blocks
        self._graphs = self._capture_graphs()
        self._image = image

    def warm_up(self, limit_s: float) -> None:
        """Do now what the first steps of each size would else take time and memory for; on a CPU,
        for about ``limit_s`` at most."""
        if self._model.fused is not None:
            self._model.fused.compile_products(*self._widest_step, limit_s)

    @torch.inference_mode()
    def _capture_graphs(self) -> DecodeGraphs | None:
        sizes = self._graph_sizes
        if not sizes or self._kv.tensor.device.type != "cuda":
            return None
        return DecodeGraphs(self._model, self._kv, sizes, self._max_blocks, CudaCapture())

    # --- sleep ---------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Give up weights, KV pool and prefix cache until ``wake``.

        Raises:
            ConflictError: requests or reservations are here, or the weights are nowhere else.
        """
        if self._seqs or self._reservations.sequences() or self._pending:
            raise ConflictError("an engine with requests cannot sleep")
        if self._image is None:
            raise ConflictError("this engine cannot sleep: its weights are not shared")
        if self.asleep:
            return
        self.asleep = True
        self._blocks.forget_cached()
        self._kv.release()
        self._graphs = None
        self._workspace = ops.Workspace(self._dense_nbytes)
        del self._model
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Take weights and an empty KV pool back; on failure the engine sleeps on."""
        if not self.asleep:
            return
        assert self._image is not None
        try:
            self._model = self._image.load()
            self._kv.allocate()
            self._graphs = self._capture_graphs()
        except BaseException:
            self._kv.release()
            raise
        self.asleep = False

    def step(self) -> StepOutput:
        """Run one ragged batch and return what is new.

        A request that cannot go on ends with finish_reason "error". An exception of the forward
        itself propagates; no request has advanced then, and ``step`` may be called again.
        """
        start = time.perf_counter()
        plan = self._planner.plan()
        resident = num_decode = num_prefill = 0
        deltas: list[TokenDelta] = []
        if plan.chunks:
            for seq, count in plan.chunks:
                if count == 1 and seq.num_output > 0:
                    num_decode += 1
                else:
                    num_prefill += count
            batch = self._builder.build(self._in_order(plan.chunks))
            resident = batch.num_resident_tokens
            seqs, draw = self._run(batch, len(plan.chunks))
            # A GPU is still computing; what needs no token is done meanwhile.
            late = []
            if len(seqs) < len(batch.sampled):
                late = [seq for seq in batch.sampled if seq not in seqs]
            for seq, count in plan.chunks:
                # Where nothing could be sampled, the last token is computed again to do so.
                seq.num_computed += count - (seq in late)
                self._planner.register(seq)
            results = [] if draw is None else draw.results()
            deltas += [self._accept(seq, each) for seq, each in zip(seqs, results, strict=True)]
        return StepOutput(
            deltas=[*self._take_pending(), *deltas],
            num_decode_tokens=num_decode,
            num_prefill_tokens=num_prefill,
            num_resident_tokens=resident,
            num_preempted=plan.num_preempted,
            seconds=time.perf_counter() - start,
        )

    def _in_order(self, chunks: list[Chunk]) -> list[Chunk]:
        """Decodes first, as their dense copies lie."""
        place_of = self._workspace.dense.place_of
        return sorted(chunks, key=lambda chunk: (chunk[1] > 1, place_of(chunk[0].kv_owner)))

    @torch.inference_mode()
    def _run(self, batch: RaggedBatch, num_seqs: int) -> tuple[list[Sequence], Draw | None]:
        """Start a step: what it samples for, and the draw. A row whose grammar's mask is late is
        left out."""
        constrained = [seq for seq in batch.sampled if seq.constraint is not None]
        for seq in constrained:
            seq.constraint.begin(seq.state.output_token_ids)
        seqs = batch.sampled
        if wants_likeliest(seqs):
            tokens = self._forward(batch, likeliest=True)
            return seqs, chosen(tokens, seqs) if seqs else None
        logits = self._forward(batch)
        if constrained:
            late = wait_for_masks(constrained, alone=len(constrained) == num_seqs)
            rows = [i for i, seq in enumerate(seqs) if seq not in late]
            seqs = [seqs[i] for i in rows]
            logits = logits[to_device(torch.tensor(rows, dtype=torch.int64), logits.device)]
        return seqs, start_draw(logits, seqs, self.eos_token_ids) if seqs else None

    def _forward(self, batch: RaggedBatch, likeliest: bool = False) -> torch.Tensor:
        """Logits, or what ``ops.likeliest`` says of them."""
        logits = None if self._graphs is None else self._graphs.run(batch)
        if logits is not None:
            return ops.likeliest(logits) if likeliest else logits
        ops.prepare(self._kv.cache, batch.attention, self._workspace)
        context = PagedKV(self._kv.cache, batch.attention)
        return self._model.forward(
            batch.input_ids, batch.position_ids, batch.logits_rows, context, likeliest
        )

    def _accept(self, seq: Sequence, result: Sampled) -> TokenDelta:
        if result.error is not None:
            self._forget(seq.request_id)
            return self._delta(seq, "error", result.error)
        seq.append(result.token_id)
        if result.logprobs is not None:
            seq.state.output_logprobs.append(result.logprobs)
        reason = finish_reason(seq.state, self.eos_token_ids)
        if reason is not None:
            self._forget(seq.request_id)
        return self._delta(seq, reason)


def _dense_nbytes(kv: KVPool, config: EngineConfig) -> int:
    """What dense copies of the KV of running decodes may take. Of int8 there are none."""
    if kv.tensor.device.type != "cpu" or kv.tensor is not kv.cache:
        return 0
    return int(min(config.dense_kv_share * kv.tensor.nbytes, _MOST_DENSE * free_bytes()))


def _capacity(model: LoadedModel, shape: KVShape, config: EngineConfig) -> int:
    if model.device.type == "cuda":
        return gpu_capacity(model, shape, config)
    return capacity_blocks(shape, config, config.kv_cache_memory_bytes)
