"""``mell-ray bench throughput``: one engine in this process, without Ray and HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mell_ray.bench.closed_loop import run_closed_loop
from mell_ray.bench.machine import machine, seconds_since_process_start, versions
from mell_ray.bench.summary import summarise
from mell_ray.bench.workload import BenchRequest, LengthRange, random_requests
from mell_ray.config import EngineConfig, parse_config
from mell_ray.errors import ConfigError

_WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class ThroughputOptions:
    model: str
    concurrency: int
    threads: int
    dtype: str = "auto"  # of the weights; 'auto': the faster one on this CPU
    max_num_batched_tokens: int = 512
    seed: int = 0


def measure(
    options: ThroughputOptions,
    make_requests: Callable[[int], list[BenchRequest]],
    on_phase: Callable[[str, int], Callable[[int], None]],
) -> dict[str, Any]:
    """Load the model, warm up, run the requests.

    Args:
        make_requests: the requests, given the size of the vocabulary.
        on_phase: called with the name of the phase that begins and its number of output tokens (0
            if it has none); returns what to call with tokens done.

    Returns:
        What ``--json`` writes.

    Raises:
        ConfigError: the model cannot be loaded, or a request does not fit into its context.
    """
    on_phase("Loading the model", 0)
    from transformers.utils.logging import disable_progress_bar

    from mell_ray.engine import Engine, load_model

    disable_progress_bar()
    started = time.perf_counter()
    dtype = _dtype(options.dtype)
    settings = {
        "dtype": dtype,
        "num_threads": options.threads,
        "max_num_seqs": options.concurrency,
        "max_num_batched_tokens": max(options.max_num_batched_tokens, options.concurrency),
    }
    base = parse_config(EngineConfig, settings)
    model = load_model(options.model, base)
    load_s = time.perf_counter() - started
    requests = make_requests(model.vocab_size)
    _refuse_too_long(requests, model.max_model_len)
    config = base.model_copy(
        update={"num_gpu_blocks_override": _blocks(requests, options.concurrency, base.block_size)}
    )
    engine = Engine(model, config)
    warm_up = _warm_up_requests(requests, options, model.vocab_size)
    first_token_s = _cold_start(engine, warm_up[0])
    run_closed_loop(engine, warm_up, options.concurrency)
    before = engine.stats()
    advance = on_phase("Generating", sum(request.output_len for request in requests))
    times, duration = run_closed_loop(engine, requests, options.concurrency, advance)
    stats = engine.stats()
    return {
        "model": options.model,
        "num_parameters": model.num_parameters,
        "settings": {
            "concurrency": options.concurrency,
            "threads": options.threads,
            "dtype": dtype,
            "kernels": engine.kernels,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "block_size": config.block_size,
            "kv_blocks": config.num_gpu_blocks_override,
            "seed": options.seed,
        },
        "cold_start_s": first_token_s,
        "load_s": load_s,
        "prompt_tokens": sum(len(request.prompt_token_ids) for request in requests),
        **summarise(times, duration),
        "preemptions": stats.preemptions - before.preemptions,
        "prefix_hit_tokens": stats.prefix_hit_tokens - before.prefix_hit_tokens,
        "machine": machine(),
        "versions": versions(),
    }


def _dtype(wanted: str) -> str:
    from mell_kernels.cpu_features import has_fast_bf16

    if wanted != "auto":
        return wanted
    return "bfloat16" if has_fast_bf16() else "float32"


def _refuse_too_long(requests: Sequence[BenchRequest], max_model_len: int) -> None:
    longest = max(request.num_tokens for request in requests)
    if longest > max_model_len:
        raise ConfigError(
            f"a request of {longest} tokens does not fit into the model's {max_model_len}; lower "
            "--input-len or --output-len",
            param="--input-len",
        )


def _blocks(requests: Sequence[BenchRequest], concurrency: int, block_size: int) -> int:
    """Room for the ``concurrency`` longest requests at once, so that nobody is preempted."""
    sizes = sorted((-(-request.num_tokens // block_size) for request in requests), reverse=True)
    return sum(sizes[:concurrency]) + concurrency


def _warm_up_requests(
    requests: Sequence[BenchRequest], options: ThroughputOptions, vocab_size: int
) -> list[BenchRequest]:
    """As many as run at once, with prompts of their own: the prefix cache must not help later."""
    lengths = [len(request.prompt_token_ids) for request in requests]
    inputs = LengthRange(min(lengths), max(lengths))
    outputs = LengthRange(_WARM_UP_TOKENS, _WARM_UP_TOKENS)
    count = min(options.concurrency, len(requests))
    return random_requests(count, inputs, outputs, vocab_size, options.seed + 1)


def _cold_start(engine: Any, request: BenchRequest) -> float:
    """Seconds from the start of this process to a first token."""
    run_closed_loop(engine, [BenchRequest(request.prompt_token_ids, 1)], 1)
    return seconds_since_process_start()
