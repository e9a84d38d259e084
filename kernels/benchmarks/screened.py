"""Closed loops with and without the int8 screen of the logits (``mell_kernels/screen.py``), taking
turns on one model.

python kernels/benchmarks/screened.py --model /tmp/llama-50m --threads 2
"""

from __future__ import annotations

import argparse
import statistics

from mell_kernels import native

from mell_ray.bench.closed_loop import run_closed_loop
from mell_ray.bench.workload import LengthRange, random_requests
from mell_ray.config import EngineConfig
from mell_ray.engine.engine import Engine
from mell_ray.engine.model import load_model

CASES = ((1, 3), (8, 32), (32, 64))  # requests at once, and in all
INPUT, OUTPUT = LengthRange(128, 128), LengthRange(64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    native.library = lambda: None  # compiled layers have their own
    config = EngineConfig(
        dtype=args.dtype,
        num_threads=args.threads,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=False,
        max_num_seqs=max(at_once for at_once, _ in CASES),
    )
    model = load_model(args.model, config)
    if model.fused is None or model.fused._screen is None:
        raise SystemExit(f"{args.model} gets no screen on this machine")
    screens = {"all logits": None, "screened": model.fused._screen}
    engine = Engine(model, config)
    print("| requests | all logits, tokens/s | screened | x (each round) |\n|---|---|---|---|")
    for at_once, count in CASES:
        rates: dict[str, list[float]] = {name: [] for name in screens}
        for turn in range(args.rounds + 1):
            requests = random_requests(count, INPUT, OUTPUT, model.vocab_size, turn)
            # Who goes first changes from turn to turn; the first turn warms up.
            for name in sorted(screens, reverse=bool(turn % 2)):
                model.fused._screen = screens[name]
                _, seconds = run_closed_loop(engine, requests, at_once)
                tokens = sum(request.output_len for request in requests)
                rates[name] += [tokens / seconds] if turn else []
        pairs = zip(rates["screened"], rates["all logits"], strict=True)
        ratios = [screened / plain for screened, plain in pairs]
        means = [f"{statistics.mean(rates[name]):.0f}" for name in screens]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        total = statistics.geometric_mean(ratios)
        print(f"| {at_once} | {means[0]} | {means[1]} | {total:.2f} ({each}) |", flush=True)


if __name__ == "__main__":
    main()
