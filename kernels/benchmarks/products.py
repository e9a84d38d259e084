"""The matrix products of a workload and nothing else: what no engine with these products can beat.

They are called as the engine calls them, in its fastest layouts: those of each prompt at once,
without the logits of tokens that are not sampled, and those of steps that decode for everybody. All
logits are computed, which the engine's screen saves where it can: so it can be faster.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from mell_kernels.linear import Linear, padded_rows
from mell_kernels.native import Packed
from transformers import AutoModelForCausalLM

from mell_ray.engine.fused import MixedDecoder, fuse

_TIMES = 20


class Products:
    """Times each kind of step, and adds up."""

    def __init__(self, model: str, dtype: str, threads: int) -> None:
        self.versions = {"torch": version("torch")}
        self._threads = threads
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        fused = fuse(loaded.requires_grad_(False), copies_share=0.25)
        if fused is None:
            raise SystemExit(f"{model} is not made of Llama's block: its products are not known")
        self._few = fused.few if isinstance(fused, MixedDecoder) else fused
        self._many = fused.many if isinstance(fused, MixedDecoder) else fused

    @torch.inference_mode()
    def run(self, requests: list[dict[str, Any]], concurrency: int) -> dict[str, float]:
        torch.set_num_threads(self._threads)
        prompts = [len(request["prompt_token_ids"]) for request in requests]
        tokens = sum(request["output_len"] for request in requests)
        prefill_s = {length: self._step_s(length, 1) for length in set(prompts)}
        decode_s = self._step_s(concurrency, concurrency)
        steps = (tokens - len(requests)) / concurrency
        total_s = sum(prefill_s[length] for length in prompts) + steps * decode_s
        return {
            "output_tokens_per_s": tokens / total_s,
            "ttft_p50_ms": statistics.median(prefill_s.values()) * 1e3,
            "itl_p50_ms": decode_s * 1e3,
            "itl_p99_ms": decode_s * 1e3,
        }

    def _step_s(self, rows: int, sampled: int) -> float:
        """Of a step of ``rows`` tokens, ``sampled`` of which are followed by another."""
        decoder = self._few if rows <= MixedDecoder.FEW else self._many
        *layers, head = decoder.matrices()
        inputs = [_input(matrix, rows) for matrix in layers]

        def products() -> None:
            for matrix, x in zip((*layers, head), (*inputs, _input(head, sampled)), strict=True):
                matrix(x)

        return _median_s(products)


def _input(matrix: Linear | Packed, rows: int) -> torch.Tensor:
    if isinstance(matrix, Packed):
        return torch.ones(rows, matrix.k)
    rows = padded_rows(rows) if matrix.is_compiled(rows) else rows
    return torch.ones(rows, matrix.plain()[0].shape[1], dtype=matrix.input_dtype(rows))


def _median_s(run: Callable[[], None]) -> float:
    times = []
    for _ in range(_TIMES):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
