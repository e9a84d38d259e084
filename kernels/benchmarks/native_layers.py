"""Steps of the engine on compiled layers (``kernels/native``) and on torch, taking turns.

python kernels/benchmarks/native_layers.py --model /tmp/llama-50m --threads 2
"""

from __future__ import annotations

import argparse
import random
import statistics
from unittest import mock

from dense_kv import decode_ms
from mell_kernels import native

from mell_ray.config import EngineConfig
from mell_ray.engine.engine import Engine
from mell_ray.engine.model import load_model
from mell_ray.engine.types import RequestState, SamplingParams

CASES = ((1, 128), (8, 128), (32, 128), (8, 1500))  # requests at once, tokens of prompt
PROMPTS = (128, 512)
PROMPTS_A_ROUND = 5
ROUNDS = 4


def prompt_ms(engine: Engine, tokens: int, random_: random.Random) -> list[float]:
    """Of the one step of a request with one token of output, some times."""
    took = []
    for _ in range(PROMPTS_A_ROUND):
        ids = [random_.randrange(3, engine.vocab_size) for _ in range(tokens)]
        engine.add(RequestState("request", ids, SamplingParams(max_tokens=1, temperature=0.0)))
        took.append(engine.step().seconds * 1e3)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    config = EngineConfig(
        dtype="bfloat16",
        num_threads=args.threads,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=False,
        max_num_seqs=max(requests for requests, _ in CASES),
    )
    if native.library() is None:
        raise SystemExit("nothing has been compiled for this CPU: see kernels/README.md")
    engines = {"compiled": Engine(load_model(args.model, config), config)}
    with mock.patch.object(native, "library", return_value=None):
        engines["torch"] = Engine(load_model(args.model, config), config)
    random_ = random.Random(0)
    print("| | torch, ms: best (median) | compiled | x |\n|---|---|---|---|")
    cases = [
        *((f"{n} decode after {k} tokens", decode_ms, (n, k)) for n, k in CASES),
        *((f"a prompt of {k} tokens", prompt_ms, (k,)) for k in PROMPTS),
    ]
    for name, run, options in cases:
        took: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(ROUNDS + 1):
            for each, engine in engines.items():
                steps = run(engine, *options, random_)
                took[each] += steps if turn else []  # the first one warms up
        median = {name: statistics.median(steps) for name, steps in took.items()}
        cells = [f"{min(took[each]):.2f} ({median[each]:.2f})" for each in ("torch", "compiled")]
        ratio = median["torch"] / median["compiled"]
        print(f"| {name} | {cells[0]} | {cells[1]} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
