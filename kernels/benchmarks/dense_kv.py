"""Decode steps with and without dense copies of the KV (``mell_kernels/dense.py``), taking turns.

python kernels/benchmarks/dense_kv.py --model /tmp/llama-50m --threads 2
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from mell_kernels import native

from mell_ray.config import EngineConfig
from mell_ray.engine.engine import Engine
from mell_ray.engine.model import load_model
from mell_ray.engine.types import RequestState, SamplingParams

CASES = ((1, 128), (8, 128), (32, 128), (8, 380))  # requests at once, tokens of prompt
STEPS = 100
ROUNDS = 6


def decode_ms(engine: Engine, requests: int, prompt: int, random_: random.Random) -> list[float]:
    """Of each step in which all of them decode."""
    sampling = SamplingParams(max_tokens=STEPS, temperature=0.0, ignore_eos=True)
    for i in range(requests):
        tokens = [random_.randrange(3, engine.vocab_size) for _ in range(prompt)]
        engine.add(RequestState(f"request-{i}", tokens, sampling))
    took = []
    while engine.has_work():
        started = time.perf_counter()
        step = engine.step()
        if step.num_decode_tokens == requests and not step.num_prefill_tokens:
            took.append((time.perf_counter() - started) * 1e3)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    native.library = lambda: None  # compiled layers have their own
    configs = {
        name: EngineConfig(
            dtype=args.dtype,
            num_threads=args.threads,
            kv_cache_memory_bytes=256 << 20,
            enable_prefix_caching=False,
            max_num_seqs=max(requests for requests, _ in CASES),
            dense_kv_share=share,
        )
        for name, share in (("blocks", 0.0), ("dense", 1.0))
    }
    model = load_model(args.model, configs["dense"])
    engines = {name: Engine(model, config) for name, config in configs.items()}
    random_ = random.Random(0)
    print("| requests | prompt | blocks, ms: best (median) | dense | x |\n|---|---|---|---|---|")
    for requests, prompt in CASES:
        took: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(ROUNDS + 1):
            for name, engine in engines.items():
                steps = decode_ms(engine, requests, prompt, random_)
                took[name] += steps if turn else []  # the first one warms up
        median = {name: statistics.median(steps) for name, steps in took.items()}
        cells = [f"{min(took[name]):.2f} ({median[name]:.2f})" for name in engines]
        ratio = median["blocks"] / median["dense"]
        print(f"| {requests} | {prompt} | {cells[0]} | {cells[1]} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
