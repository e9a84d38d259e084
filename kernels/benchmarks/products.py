"""The matrix products of a workload and nothing else: what no engine with these products can beat.

They are called as the engine calls them, in its fastest layouts: those of each prompt at once,
without the logits of tokens that are not sampled, and those of steps that decode for everybody.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from mell_kernels.linear import Linear, padded_rows
from transformers import AutoModelForCausalLM

from mell_ray.engine.fused import fuse

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
        *self._layers, self._head = fused.linears()
        self._widths = {id(linear): linear.plain()[0].shape[1] for linear in fused.linears()}

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
        layers = [(linear, self._input(linear, rows)) for linear in self._layers]
        head = self._head, self._input(self._head, sampled)

        def products() -> None:
            for linear, x in (*layers, head):
                linear(x)

        return _median_s(products)

    def _input(self, linear: Linear, rows: int) -> torch.Tensor:
        rows = padded_rows(rows) if linear.is_compiled(rows) else rows
        return torch.ones(rows, self._widths[id(linear)], dtype=linear.input_dtype(rows))


def _median_s(run: Callable[[], None]) -> float:
    times = []
    for _ in range(_TIMES):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
