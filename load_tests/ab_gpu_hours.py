"""The same traffic on a live fleet twice: our default policy against Ray Serve's own autoscaling.

    python load_tests/ab_gpu_hours.py [TRACE] --seconds 1800 --time-compression 15 --json OUT

Serves the built-in model on this machine, once as (a) mell-ray with its default policy, once as (b)
``serve_baseline.py``: the same engine as a plain Serve deployment, load-balanced and autoscaled by
Serve itself, both between the same minimum and maximum of replicas and behind the same HTTP. Each
time it replays the same window of the trace and counts replicas twice a second from
``GET /mell/v1/state``, whatever their state: starting, draining and stopping ones are paid for too.
Counting starts with the first request and ends with the last answer.

Serve aims at ``--target-ongoing`` requests a replica. It counts requests and knows nothing of
their size, so the default is 80 % of as many as overflow the KV pool of a replica 1 % of the time
only: more would cost its tail latency. Its delays (30 s up, 600 s down, looking back 30 s) are its
defaults divided by the time compression, like the traffic; our idle grace is not, as it is there
for the time that a replica takes to start. Replicas open in the time their processes take, in both.
``--pool-mib`` is small on purpose: it, not the machine's memory, decides how many requests a
replica holds. ``--every N`` thins the traffic to what the machine can bear. ``--step-ms`` lets
every step of an engine take at least that long, in both, as it would on a GPU with a large model:
otherwise replicas share so few cores that one more makes all others slower.

Then the simulator runs the same requests with what was measured of (a): the pool, the speed of
decoding, the time to start; its replica-seconds stand beside the live ones. Without TRACE, bursts
are generated. Exit code 1 if a request failed in either.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import yaml

from mell_ray.errors import ConfigError
from mell_ray.replay.client import Endpoint
from mell_ray.replay.plan import plan
from mell_ray.replay.session import replay
from mell_ray.replay.types import Job, ReplayOptions
from mell_ray.simulation.cli import load_trace
from mell_ray.simulation.loop import simulate
from mell_ray.simulation.types import SimOptions, TraceRow

SYNTHETIC = "synthetic:gamma,rate=2,cv=3,duration=1800,prompt_median=1000,output_median=200"
MODEL = "mell-tiny"
SAMPLE_S = 0.5
START_S = 300.0
STOP_S = 90.0
MIB = 1 << 20
BLOCK_SIZE = 16
TOKEN_BYTES = 2560  # of KV of the built-in model in float32
EPOCH_S = 0.25  # the Router's planning tick
HERE = Path(__file__).resolve().parent

SIDES = ("ours", "baseline")
BUILDERS = {"ours": "mell_ray.serving:build_openai_app", "baseline": "serve_baseline:build"}
#: Defaults of Serve's autoscaling, in seconds of the trace.
UPSCALE_DELAY_S, DOWNSCALE_DELAY_S, LOOK_BACK_S, PUSH_S = 30.0, 600.0, 30.0, 10.0
TARGET_SHARE = 0.8
QUANTILE_99 = 2.33  # of the normal distribution, in standard deviations


@dataclass(frozen=True, slots=True)
class Sample:
    at_s: float
    replicas: int
    ready: int = 0  # of them, those that take requests


@dataclass(slots=True)
class Meter:
    """Counts replicas while a replay runs."""

    samples: list[Sample] = field(default_factory=list)
    missed: int = 0  # samples that the server did not answer; the one before stands for them
    capacity_tokens: int = 0  # of a replica's KV pool, where the server tells
    _born: dict[str, float] = field(default_factory=dict)  # when a starting replica was first seen
    _startups: list[float] = field(default_factory=list)

    async def run(self, url: str) -> None:
        """Sample until cancelled."""
        async with httpx.AsyncClient(base_url=url, timeout=10.0) as http:
            while True:
                try:
                    answer = await http.get("/mell/v1/state")
                    answer.raise_for_status()
                    self._look(answer.json()["replicas"], time.monotonic())
                except httpx.HTTPError:
                    self.missed += 1
                await asyncio.sleep(SAMPLE_S)

    def _look(self, replicas: list[dict[str, Any]], now: float) -> None:
        ready = sum(replica["state"] == "ready" for replica in replicas)
        self.samples.append(Sample(now, len(replicas), ready))
        for replica in replicas:
            if replica["state"] == "starting":
                self._born.setdefault(replica["id"], now)
                continue
            born = self._born.pop(replica["id"], None)
            if born is not None:
                self._startups.append(now - born)
            blocks = replica.get("capacity_blocks", 0)
            self.capacity_tokens = max(self.capacity_tokens, blocks * BLOCK_SIZE)

    def startup_s(self) -> float | None:
        """Mean time from asking for a replica until it took requests; None: none was opened."""
        return sum(self._startups) / len(self._startups) if self._startups else None


def replica_seconds(samples: Sequence[Sample], until_s: float) -> float:
    """The area under the samples, each of which holds until the next one."""
    ends = [*samples, Sample(until_s, 0)]
    return sum(a.replicas * max(0.0, b.at_s - a.at_s) for a, b in pairwise(ends))


def config(side: str, args: argparse.Namespace, port: int) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "min_replicas": args.min_replicas,
        "max_replicas": args.max_replicas,
    }
    llm = {
        "model_loading_config": {"model_id": MODEL, "model_source": "builtin"},
        "accelerator_type": "CPU",
        "deployment_config": {"autoscaling_config": scaling},
        "engine_kwargs": {
            "max_num_seqs": args.max_num_seqs,
            "kv_cache_memory_bytes": int(args.pool_mib * MIB),
        },
    }
    settings: dict[str, Any] = {"llm_configs": [llm]}
    if side == "ours":
        settings["mell"] = {"fleet": {"idle_grace_s": args.idle_grace_s}}
    else:
        settings["autoscaling"] = {
            **scaling,
            "target_ongoing_requests": args.target_ongoing,
            "upscale_delay_s": UPSCALE_DELAY_S / args.time_compression,
            "downscale_delay_s": args.downscale_delay_s / args.time_compression,
            "look_back_period_s": LOOK_BACK_S / args.time_compression,
            "metrics_interval_s": PUSH_S / args.time_compression,
        }
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {
                "name": "mell",
                "route_prefix": "/",
                "import_path": BUILDERS[side],
                "args": settings,
            }
        ],
    }


@contextmanager
def served(
    settings: dict[str, Any], folder: Path, haproxy: bool, environment: dict[str, str]
) -> Iterator[str]:
    """The url of a server with these settings; it is stopped, and gone, afterwards.

    Raises:
        SystemExit: it does not come up; its log is told.
    """
    file, log = folder / "serve.yaml", folder / "serve.log"
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-c", "from mell_ray.cli import main; main()", "serve", str(file)]
    with log.open("w") as stream:
        child = subprocess.Popen(
            command if haproxy else [*command, "--no-haproxy"],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
        )
    try:
        url = f"http://127.0.0.1:{settings['http_options']['port']}"
        _await_ready(child, url, log)
        yield url
    finally:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _await_ready(child: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until the minimum of replicas takes requests."""
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up and child.poll() is None:
        with suppress(httpx.HTTPError, KeyError, ValueError):
            replicas = httpx.get(f"{url}/mell/v1/state", timeout=5.0).json()["replicas"]
            if replicas and all(replica["state"] == "ready" for replica in replicas):
                return
        time.sleep(0.5)
    raise SystemExit(f"the server did not come up; the end of its log:\n{log.read_text()[-3000:]}")


async def measure(
    url: str, jobs: list[Job], options: ReplayOptions, timeout_s: float
) -> dict[str, Any]:
    """One side of the result: the replay's figures and what its replicas cost."""
    meter = Meter()
    async with Endpoint(url, timeout_s=timeout_s) as endpoint:
        await endpoint.model(MODEL)
        sampling = asyncio.create_task(meter.run(url))
        try:
            begin = time.monotonic()
            done = await replay(jobs, endpoint, options, model=MODEL)
            until = time.monotonic()
        finally:
            sampling.cancel()
    if not meter.samples:
        raise SystemExit(f"{url}/mell/v1/state did not answer while the replay ran")
    return {
        "replica_seconds": replica_seconds(meter.samples, until),
        "startup_s": meter.startup_s(),
        "capacity_tokens": meter.capacity_tokens,
        "peak_replicas": max(sample.replicas for sample in meter.samples),
        "missed_samples": meter.missed,
        "timeline": [[round(s.at_s - begin, 1), s.replicas, s.ready] for s in meter.samples],
        **asdict(done.summary),
    }


def run_side(
    side: str, jobs: list[Job], options: ReplayOptions, args: argparse.Namespace
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="mell-ab-") as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        push_s = str(PUSH_S / args.time_compression)
        environment = {
            "MELL_RAY_STEP_S": str(args.step_ms / 1e3),
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
            "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": push_s,
            "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": push_s,
        }
        with served(config(side, args, port), Path(folder), args.haproxy, environment) as url:
            result = asyncio.run(measure(url, jobs, options, args.timeout_s))
    print(
        f"{side}: {result['replica_seconds']:.0f} replica-seconds in {result['duration_s']:.0f} s, "
        f"at most {result['peak_replicas']}; p99 of TTFT {result['ttft_ms']['p99']} ms, of TPOT "
        f"{result['tpot_ms']['p99']} ms; {result['failed']} of {result['requests']} failed",
        flush=True,
    )
    return result


def compare(ours: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """The figures that count. A ratio is None where nothing was answered."""

    def ratio(name: str) -> float | None:
        own, other = ours[name]["p99"], baseline[name]["p99"]
        return own / other if own is not None and other else None

    paid = baseline["replica_seconds"]
    return {
        "replica_seconds": {"ours": ours["replica_seconds"], "baseline": paid},
        "saving": 1 - ours["replica_seconds"] / paid if paid else None,
        "p99_ttft_ratio": ratio("ttft_ms"),
        "p99_tpot_ratio": ratio("tpot_ms"),
        "failed": ours["failed"] + baseline["failed"],
        "ours": ours,
        "baseline": baseline,
    }


def simulated(jobs: list[Job], ours: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Replica-seconds that ``mell-ray simulate`` finds for the same requests."""
    tpot_ms = ours["tpot_ms"]["mean"]
    if not tpot_ms or not ours["capacity_tokens"]:
        return {}
    rate = 1e3 / tpot_ms
    # A request takes whole blocks, so half of one is empty on average.
    rows = [
        TraceRow(job.number, job.at_s, job.prompt_tokens + BLOCK_SIZE // 2, job.output_tokens)
        for job in jobs
    ]
    options = SimOptions(
        gpu_tokens=ours["capacity_tokens"],
        decode_tokens_per_s=rate,
        epoch_tokens=max(1, round(EPOCH_S * rate)),
        report_tokens=BLOCK_SIZE,
        startup_s=ours["startup_s"] or 0.0,
        idle_grace_s=args.idle_grace_s,
        initial_gpus=args.min_replicas,
        min_gpus=args.min_replicas,
        max_gpus=args.max_replicas,
        max_requests_per_gpu=args.max_num_seqs,
        seed=args.seed,
    )
    paid = simulate(rows, options).billed_gpu_seconds
    return {"replica_seconds": paid, "difference": paid / ours["replica_seconds"] - 1}


def target_ongoing(jobs: list[Job], args: argparse.Namespace) -> float:
    """Requests that Serve should aim at per replica: ``TARGET_SHARE`` of as many as fit into its
    pool 99 % of the time. A request holds its prompt and what it has decoded so far."""
    steps = sum(job.output_tokens for job in jobs)
    mean, square = 0.0, 0.0  # of what a running request holds, over time
    for job in jobs:
        prompt, output = job.prompt_tokens + BLOCK_SIZE / 2, job.output_tokens
        mean += output / steps * (prompt + output / 2)
        square += output / steps * (prompt**2 + prompt * output + output**2 / 3)
    deviation = math.sqrt(max(0.0, square - mean**2))
    pool = args.pool_mib * MIB / TOKEN_BYTES
    # n requests need n x mean + QUANTILE_99 x deviation x sqrt(n).
    spread = QUANTILE_99 * deviation
    root = (math.sqrt(spread**2 + 4 * mean * pool) - spread) / (2 * mean)
    return round(max(1.0, TARGET_SHARE * min(root**2, args.max_num_seqs)), 1)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", nargs="?", default=SYNTHETIC, help="CSV, or a synthetic: one")
    parser.add_argument("--seconds", type=float, default=1800.0, help="of the trace")
    parser.add_argument("--time-compression", type=float, default=15.0)
    parser.add_argument("--scale-prompt", type=float, default=0.1)
    parser.add_argument("--scale-output", type=float, default=0.5)
    parser.add_argument("--max-prompt", type=int, default=400)
    parser.add_argument("--max-output", type=int, default=400)
    parser.add_argument("--every", type=int, default=1, help="send each so-manieth request only")
    parser.add_argument("--min-replicas", type=int, default=1)
    parser.add_argument("--max-replicas", type=int, default=4)
    parser.add_argument("--target-ongoing", type=float, help="of Serve, per replica")
    parser.add_argument(
        "--downscale-delay-s", type=float, default=DOWNSCALE_DELAY_S, help="of Serve, in the trace"
    )
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--idle-grace-s", type=float, default=10.0, help="of mell-ray")
    parser.add_argument("--pool-mib", type=float, default=16, help="KV pool of a replica")
    parser.add_argument("--step-ms", type=float, default=30.0, help="least time of an engine step")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="of a request")
    parser.add_argument("--haproxy", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    options = ReplayOptions(
        time_compression=args.time_compression,
        seconds=args.seconds,
        scale_prompt=args.scale_prompt,
        scale_output=args.scale_output,
        max_prompt=args.max_prompt,
        max_output=args.max_output,
        seed=args.seed,
    )
    try:
        jobs = plan(load_trace(args.trace), options)[:: args.every]
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    args.target_ongoing = args.target_ongoing or target_ongoing(jobs, args)
    print(
        f"{len(jobs)} requests in {jobs[-1].at_s:.0f} s, twice; Serve's target is "
        f"{args.target_ongoing} ongoing requests a replica",
        flush=True,
    )
    results = {side: run_side(side, jobs, options, args) for side in SIDES}
    told = compare(results["ours"], results["baseline"])
    told["simulated"] = simulated(jobs, results["ours"], args)
    shown = {name: value for name, value in told.items() if name not in SIDES}
    print(json.dumps(shown, indent=1))
    if args.json is not None:
        settings = {**vars(args), "json": str(args.json)}
        args.json.write_text(json.dumps({**told, "settings": settings}, indent=1) + "\n")
    if told["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
