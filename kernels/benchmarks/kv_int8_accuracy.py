"""What the int8 KV cache costs the built-in model in accuracy, on text it was not trained on.

    apt-get download r-cran-janeaustenr=1.0.0-1
    dpkg -x r-cran-janeaustenr_1.0.0-1_all.deb corpus
    python kernels/benchmarks/kv_int8_accuracy.py corpus

The held-out passages of the built-in model's own training run through it twice, token by known
token, in float32: once with KV in float32, once in int8. Both give logits at every position, which
are compared: perplexity, Kullback-Leibler divergence, and how often the likeliest token is the
same. The same inputs give the same figures on one machine; another rounds differently.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from mell_kernels import ops
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoTokenizer

from mell_ray.builtin import model_path
from mell_ray.builtin.training.corpus import load_novels
from mell_ray.builtin.training.documents import held_out_documents
from mell_ray.config import EngineConfig
from mell_ray.engine import LoadedModel, load_model
from mell_ray.engine.batch import BatchBuilder
from mell_ray.engine.kv_pool import KVPool
from mell_ray.engine.model import PagedKV
from mell_ray.engine.sequence import Sequence
from mell_ray.engine.types import RequestState, SamplingParams

CHUNK = 256


@dataclass(slots=True)
class Loss:
    """Sums over all predicted tokens."""

    tokens: int = 0
    nats_float: float = 0.0
    nats_int8: float = 0.0
    divergence: float = 0.0
    agreements: int = 0
    largest_divergence: float = 0.0

    def add(self, exact: torch.Tensor, coded: torch.Tensor, targets: torch.Tensor) -> None:
        """Logits ``[T, V]`` of both kinds, and the tokens that came next."""
        p, q = log_softmax(exact, dim=-1), log_softmax(coded, dim=-1)
        divergence = kl_div(q, p, log_target=True, reduction="none").sum(dim=-1)
        self.tokens += len(targets)
        self.nats_float += cross_entropy(exact, targets, reduction="sum").item()
        self.nats_int8 += cross_entropy(coded, targets, reduction="sum").item()
        self.divergence += divergence.sum().item()
        self.largest_divergence = max(self.largest_divergence, divergence.max().item())
        self.agreements += int((exact.argmax(dim=-1) == coded.argmax(dim=-1)).sum())


def logits(
    model: LoadedModel, tokens: list[int], kv_cache_dtype: str, block_size: int
) -> Iterator[torch.Tensor]:
    """``[<= CHUNK, V]`` at a time, of every position of ``tokens``."""
    num_blocks = -(-len(tokens) // block_size)
    pool = KVPool(model.kv_shape.stored_as(kv_cache_dtype), block_size, num_blocks, model.device)
    builder = BatchBuilder(1, num_blocks, block_size, model.device)
    state = RequestState("text", tokens, SamplingParams(max_tokens=1))
    seq = Sequence(state, block_size, 0, status="running")
    seq.row, seq.blocks = 0, list(range(1, num_blocks + 1))
    workspace = ops.Workspace()
    while seq.num_to_compute > 0:
        count = min(CHUNK, seq.num_to_compute)
        batch = builder.build([(seq, count)])
        ops.prepare(pool.cache, batch.attention, workspace)
        context = PagedKV(pool.cache, batch.attention)
        rows = torch.arange(count, device=model.device)
        yield model.forward(batch.input_ids, batch.position_ids, rows, context)
        seq.num_computed += count


@torch.inference_mode()
def measure(model: LoadedModel, documents: list[list[int]], block_size: int) -> Loss:
    loss = Loss()
    for tokens in documents:
        targets = torch.tensor(tokens[1:]).split(CHUNK)
        inputs = tokens[:-1]
        pairs = zip(
            logits(model, inputs, "auto", block_size),
            logits(model, inputs, "int8", block_size),
            targets,
            strict=True,
        )
        for exact, coded, target in pairs:
            loss.add(exact, coded, target)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="directory that dpkg -x extracted to")
    parser.add_argument("--max-tokens", type=int, default=40_000, help="stop after about as many")
    args = parser.parse_args()
    config = EngineConfig(dtype="float32")
    torch.set_num_threads(config.num_threads)
    model = load_model("builtin", config)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    documents, total = [], 0
    for document in held_out_documents(load_novels(args.corpus), tokenizer):
        if total < args.max_tokens:
            documents.append(document.ids)
            total += len(document.ids)
    loss = measure(model, documents, config.block_size)
    report(model, loss, len(documents), config.block_size)


def report(model: LoadedModel, loss: Loss, passages: int, block_size: int) -> None:
    count, shape = loss.tokens, model.kv_shape
    exact, coded = math.exp(loss.nats_float / count), math.exp(loss.nats_int8 / count)
    more = (loss.nats_int8 - loss.nats_float) / count
    mean, most = loss.divergence / count, loss.largest_divergence
    plain, small = (
        kind.block_nbytes(block_size) // block_size for kind in (shape, shape.stored_as("int8"))
    )
    print(f"{count} tokens in {passages} passages")
    print(f"KV bytes per token   {plain} in float32, {small} in int8")
    print(f"perplexity           {exact:.4f} in float32, {coded:.4f} in int8")
    print(f"nats per token       {more:+.6f}")
    print(f"KL divergence, nats  {mean:.2e} mean, {most:.2e} most")
    print(f"same likeliest token {100 * loss.agreements / count:.3f} %")


if __name__ == "__main__":
    main()
