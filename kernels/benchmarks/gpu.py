"""The Triton kernels and the engine on a CUDA device, each as a ratio to what it should be near.

    python kernels/benchmarks/gpu.py decode   # decode attention : bandwidth of a plain copy
    python kernels/benchmarks/gpu.py blocks   # gather, scatter : bandwidth of a plain copy
    python kernels/benchmarks/gpu.py engine   # tokens/s : transformers' continuous batching

``--json FILE`` writes the figures, the device and the versions.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Figures = dict[str, Any]


def seconds(function: Callable[[], object], repeats: int = 20) -> float:
    """Median device time of one call, after warming up."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return sorted(times)[len(times) // 2]


def copy_bandwidth(nbytes: int) -> float:
    """Bytes read and written per second by a plain device copy of ``nbytes``."""
    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * nbytes / seconds(lambda: target.copy_(source))


def decode(args: argparse.Namespace) -> Figures:
    from mell_kernels import ops
    from mell_kernels.metadata import AttentionMetadata

    batch, context, block = args.batch, args.context, args.block_size
    per_seq = -(-context // block)
    shape = (batch * per_seq + 1, 1, 2, block, args.kv_heads, args.head_dim)
    pool = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    tables = torch.randperm(batch * per_seq, device="cuda").int().view(batch, per_seq) + 1
    meta = AttentionMetadata(
        cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32, device="cuda"),
        seq_lens=torch.full((batch,), context, dtype=torch.int32, device="cuda"),
        block_tables=tables,
        slot_mapping=torch.zeros(batch, dtype=torch.int64, device="cuda"),
        max_seqlen_q=1,
        max_seqlen_k=context,
        num_decodes=batch,
    )
    ops.prepare(pool, meta, ops.Workspace())
    query = torch.randn(
        batch, args.heads, args.head_dim, dtype=torch.bfloat16, device="cuda"
    )  # fmt: skip
    took = seconds(lambda: ops.paged_attention(query, pool, 0, meta, scale=args.head_dim**-0.5))
    nbytes = batch * context * 2 * args.kv_heads * args.head_dim * pool.itemsize
    copied = copy_bandwidth(nbytes)
    return {
        "bytes_per_s": nbytes / took,
        "copy_bytes_per_s": copied,
        "ratio": nbytes / took / copied,
    }


def blocks(args: argparse.Namespace) -> Figures:
    """Block size and shape as in a model of 32 layers."""
    from mell_kernels import ops

    count = args.blocks
    shape = (2 * count, 32, 2, args.block_size, args.kv_heads, args.head_dim)
    pool = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    ids = torch.randperm(2 * count, device="cuda")[:count]
    data = ops.gather_blocks(pool, ids)
    copied = copy_bandwidth(data.numel())
    gather = 2 * data.numel() / seconds(lambda: ops.gather_blocks(pool, ids))
    scatter = 2 * data.numel() / seconds(lambda: ops.scatter_blocks(pool, ids, data))
    return {
        "gather_bytes_per_s": gather,
        "scatter_bytes_per_s": scatter,
        "copy_bytes_per_s": copied,
        "ratio": min(gather, scatter) / copied,
    }


def _model() -> Any:
    """About 1.2 billion random parameters in bfloat16, of Llama-3.2-1B's sizes."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def _ours(prompts: list[list[int]], output_len: int) -> float:
    from mell_ray.config import EngineConfig
    from mell_ray.engine import Engine, load_model
    from mell_ray.engine.types import RequestState, SamplingParams

    config = EngineConfig(max_num_batched_tokens=2048, max_model_len=4096)
    engine = Engine(load_model(_model(), config, "cuda"), config, "cuda")

    def run(asked: list[list[int]]) -> float:
        params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        for i, prompt in enumerate(asked):
            engine.add(RequestState(str(i), prompt, params, arrival_s=float(i)))
        while engine.has_work():
            engine.step()
        return len(asked) * output_len / (time.perf_counter() - start)

    run([prompt[::-1] for prompt in prompts])  # compiles kernels; shares no prefix with the rest
    return run(prompts)


def _theirs(prompts: list[list[int]], output_len: int) -> float:
    from transformers import GenerationConfig

    model = _model()
    settings = GenerationConfig(
        max_new_tokens=output_len, do_sample=False, eos_token_id=-1, pad_token_id=0
    )

    def run(asked: list[list[int]]) -> float:
        start = time.perf_counter()
        results = model.generate_batch(inputs=asked, generation_config=settings)
        took = time.perf_counter() - start
        return sum(len(result.generated_tokens) for result in results.values()) / took

    run([prompt[::-1] for prompt in prompts])
    return run(prompts)


def engine(args: argparse.Namespace) -> Figures:
    generator = torch.Generator().manual_seed(0)
    size = (args.requests, args.input_len)
    prompts = torch.randint(3, 128_000, size, generator=generator).tolist()
    ours = _ours(prompts, args.output_len)
    torch.cuda.empty_cache()
    theirs = _theirs(prompts, args.output_len)
    return {
        "output_tokens_per_s": ours,
        "transformers_output_tokens_per_s": theirs,
        "ratio": ours / theirs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmarks of mell_kernels on a CUDA device.")
    parser.add_argument("what", choices=["decode", "blocks", "engine"])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--batch", type=int, default=64, help="sequences (decode)")
    parser.add_argument("--context", type=int, default=4096, help="tokens of each (decode)")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=512, help="blocks moved at once (blocks)")
    parser.add_argument("--requests", type=int, default=64, help="all at once (engine)")
    parser.add_argument("--input-len", type=int, default=512, help="tokens (engine)")
    parser.add_argument("--output-len", type=int, default=128, help="tokens (engine)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here, and figures from elsewhere mean nothing")
    figures = {"decode": decode, "blocks": blocks, "engine": engine}[args.what](args)
    import transformers
    import triton

    figures |= {
        "benchmark": args.what,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }
    for name, value in figures.items():
        print(f"{name}: {value:,.3f}" if isinstance(value, float) else f"{name}: {value}")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
