"""Write the Llama that the CPU benchmarks run: random weights, about 50 M parameters, bfloat16.

    python kernels/benchmarks/make_model.py /tmp/llama-50m

Without a tokenizer: the benchmarks send token ids. Same seed, same weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mell_ray.bench.random_llama import write_random_llama


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    count = write_random_llama(args.out, max_position_embeddings=2048, seed=args.seed)
    print(f"{args.out}: {count / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
