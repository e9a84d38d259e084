"""The same traffic on a live fleet twice: our default policy against plain autoscaled balancing.

    python load_tests/ab_gpu_hours.py [TRACE] --seconds 1800 --time-compression 15 --json OUT

Starts ``mell-ray serve`` on this machine with the built-in model, once as (a) the default policy
with migration, once as (b) worst-fit without migration, both between the same minimum and maximum
of replicas, with the same idle grace. Each time it replays the same window of the trace and counts
replicas once a second from ``GET /mell/v1/state``, whatever their state: starting and draining ones
are paid for too. Counting starts with the first request and ends with the last answer.

Replicas open in the time their processes take, the same way in both. ``--pool-mib`` is small on
purpose: it, not the machine's memory, decides how many requests a replica holds. Without TRACE,
bursts are generated. Exit code 1 if a request failed in either.
"""

from __future__ import annotations

import argparse
import asyncio
import json
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

from mell_ray.replay.client import Endpoint
from mell_ray.replay.plan import plan
from mell_ray.replay.session import replay
from mell_ray.replay.types import Job, ReplayOptions
from mell_ray.simulation.cli import load_trace

SYNTHETIC = "synthetic:gamma,rate=2,cv=3,duration=1800,prompt_median=1000,output_median=200"
MODEL = "mell-tiny"
SAMPLE_S = 1.0
START_S = 300.0
STOP_S = 90.0
MIB = 1 << 20

#: What differs between the two; the rest of the configuration is the same.
SIDES: dict[str, dict[str, Any]] = {
    "ours": {"policy": {"name": "tide"}, "migration": {"enabled": True}},
    "baseline": {"policy": {"name": "worst-fit"}, "migration": {"enabled": False}},
}


@dataclass(frozen=True, slots=True)
class Sample:
    at_s: float
    replicas: int


@dataclass(slots=True)
class Meter:
    """Counts replicas while a replay runs."""

    samples: list[Sample] = field(default_factory=list)
    missed: int = 0  # samples that the server did not answer; the one before stands for them

    async def run(self, url: str) -> None:
        """Sample until cancelled."""
        async with httpx.AsyncClient(base_url=url, timeout=10.0) as http:
            while True:
                try:
                    answer = await http.get("/mell/v1/state")
                    answer.raise_for_status()
                    count = len(answer.json()["replicas"])
                    self.samples.append(Sample(time.monotonic(), count))
                except httpx.HTTPError:
                    self.missed += 1
                await asyncio.sleep(SAMPLE_S)


def replica_seconds(samples: Sequence[Sample], until_s: float) -> float:
    """The area under the samples, each of which holds until the next one."""
    ends = [*samples, Sample(until_s, 0)]
    return sum(a.replicas * max(0.0, b.at_s - a.at_s) for a, b in pairwise(ends))


def config(side: str, args: argparse.Namespace, port: int) -> dict[str, Any]:
    scaling = {"min_replicas": args.min_replicas, "max_replicas": args.max_replicas}
    llm = {
        "model_loading_config": {"model_id": MODEL, "model_source": "builtin"},
        "accelerator_type": "CPU",
        "deployment_config": {"autoscaling_config": scaling},
        "engine_kwargs": {
            "max_num_seqs": args.max_num_seqs,
            "kv_cache_memory_bytes": args.pool_mib * MIB,
        },
    }
    mell = {**SIDES[side], "fleet": {"idle_grace_s": args.idle_grace_s}}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {
                "name": "mell",
                "route_prefix": "/",
                "import_path": "mell_ray.serving:build_openai_app",
                "args": {"llm_configs": [llm], "mell": mell},
            }
        ],
    }


@contextmanager
def served(settings: dict[str, Any], folder: Path, haproxy: bool) -> Iterator[str]:
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
            done = await replay(jobs, endpoint, options, model=MODEL)
            until = time.monotonic()
        finally:
            sampling.cancel()
    if not meter.samples:
        raise SystemExit(f"{url}/mell/v1/state did not answer while the replay ran")
    return {
        "replica_seconds": replica_seconds(meter.samples, until),
        "peak_replicas": max(sample.replicas for sample in meter.samples),
        "missed_samples": meter.missed,
        **asdict(done.summary),
    }


def run_side(
    side: str, jobs: list[Job], options: ReplayOptions, args: argparse.Namespace
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="mell-ab-") as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        with served(config(side, args, port), Path(folder), args.haproxy) as url:
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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", nargs="?", default=SYNTHETIC, help="CSV, or a synthetic: one")
    parser.add_argument("--seconds", type=float, default=1800.0, help="of the trace")
    parser.add_argument("--time-compression", type=float, default=15.0)
    parser.add_argument("--scale-prompt", type=float, default=0.1)
    parser.add_argument("--scale-output", type=float, default=0.5)
    parser.add_argument("--max-prompt", type=int, default=400)
    parser.add_argument("--max-output", type=int, default=400)
    parser.add_argument("--min-replicas", type=int, default=1)
    parser.add_argument("--max-replicas", type=int, default=4)
    parser.add_argument("--idle-grace-s", type=float, default=2.0)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--pool-mib", type=int, default=16, help="KV pool of a replica")
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
    jobs = plan(load_trace(args.trace), options)
    print(f"{len(jobs)} requests in {jobs[-1].at_s:.0f} s, twice", flush=True)
    results = {side: run_side(side, jobs, options, args) for side in SIDES}
    told = compare(results["ours"], results["baseline"])
    shown = {name: value for name, value in told.items() if name not in SIDES}
    print(json.dumps(shown, indent=1))
    if args.json is not None:
        settings = {**vars(args), "json": str(args.json)}
        args.json.write_text(json.dumps({**told, "settings": settings}, indent=1) + "\n")
    if told["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
