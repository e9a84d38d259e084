"""How fast a node empties: running streams are moved off it, and every client's text is compared.

    python load_tests/drain.py --streams 16 --tokens 400 --json OUT

Starts a Ray cluster of a head and two nodes on this machine, each node with one replica of the
built-in model, puts all streams on one of them, and calls ``POST /mell/v1/nodes/{id}/drain`` once
each has got ``--begun`` tokens and still has at least ``--tokens`` to go. Each prompt is generated
once undisturbed before; decoding is greedy, so a stream that lost, doubled or changed a token
differs. Prefix caching is off, so that every block has to move. Exit code 1 if a stream differs or
fails, or if the replica is not empty within ``--within`` seconds.

``--by evacuate`` empties the replica instead of the node; ``--by ray`` lets Ray drain the node, as
it does by itself when ``ray start --block`` is told to stop: nobody asks mell-ray for anything.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_SERVE_LOG_TO_STDERR="0",
    RAY_SERVE_CONTROL_LOOP_INTERVAL_S="0.02",
)

import itertools

import httpx
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from mell_ray.builtin import MODEL_ID
from mell_ray.serving import build_openai_app

# For the processes of the cluster, not for this one.
os.environ.update(
    RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD="0",
    RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP="0",
)

APP = "drain"
CONTROL = "mell_control"
POLL_S = 0.02
PATIENCE_S = 60.0


class Stream:
    """One client's answer, as it comes. ``at`` holds when each piece came."""

    def __init__(self, prompt: str, tokens: int) -> None:
        self.prompt = prompt
        self.tokens = tokens
        self.parts: list[str] = []
        self.at: list[float] = []
        self.error = ""

    async def run(self, http: httpx.AsyncClient) -> str:
        """Read to the end. What goes wrong is in ``error``."""
        try:
            async for part in _pieces(http, self.prompt, self.tokens):
                self.parts.append(part)
                self.at.append(time.monotonic())
        except (httpx.HTTPError, ValueError) as error:
            self.error = f"{type(error).__name__}: {error}"
        return "".join(self.parts)

    def gap_s(self, since: float) -> float:
        """The longest wait for a piece from ``since`` on."""
        times = [since, *(at for at in self.at if at > since)]
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


async def _pieces(http: httpx.AsyncClient, prompt: str, tokens: int) -> AsyncIterator[str]:
    body = {
        "model": MODEL_ID,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                return
            if data:
                event = json.loads(data)
                if "error" in event:
                    raise ValueError(event["error"]["message"])
                yield event["choices"][0]["text"]
    raise ValueError("the stream broke off")


class Drill:
    """One measurement against a running application."""

    def __init__(self, http: httpx.AsyncClient, options: argparse.Namespace) -> None:
        self._http = http
        self._options = options

    async def run(self) -> dict[str, Any]:
        options = self._options
        prompts = [f"Chapter {i + 1}. It was a truth that" for i in range(options.streams)]
        length = options.tokens + 2 * options.begun
        expected = await asyncio.gather(*(Stream(p, length).run(self._http) for p in prompts))
        full, *others = await self._ready(2)
        for other in others:
            await self._post(f"replicas/{other['id']}/cordon", {"cordoned": True})
        streams = [Stream(prompt, length) for prompt in prompts]
        running = [asyncio.create_task(stream.run(self._http)) for stream in streams]
        while min(len(stream.parts) for stream in streams) < options.begun:
            await asyncio.sleep(0.001)
        for other in others:
            await self._post(f"replicas/{other['id']}/cordon", {"cordoned": False})
        to_go = length - max(len(stream.parts) for stream in streams)
        started = time.monotonic()
        if options.by == "node":
            await self._post(f"nodes/{full['node']}/drain")
        elif options.by == "ray":
            await asyncio.to_thread(_ray_drains, full["node"])
        else:
            await self._post(f"replicas/{full['id']}/evacuate")
        answered_s = time.monotonic() - started
        late = asyncio.create_task(Stream("A late request.", 8).run(self._http))
        empty_s = await self._until_empty(full["id"], started)
        state = (await self._http.get("/mell/v1/state")).json()
        still = sum(not task.done() for task in running)
        texts = await asyncio.gather(*running)
        moves = (await self._http.get("/mell/v1/migrations")).json()["migrations"]
        moves = [move for move in moves if move["from"] == full["id"]]
        return {
            "seconds": round(empty_s, 3),
            "call_s": round(answered_s, 3),
            "streams": options.streams,
            "fewest_tokens_to_go": to_go,
            "still_running_when_empty": still,
            "wrong": sum(a != b for a, b in zip(texts, expected, strict=True)),
            "failed": [stream.error for stream in streams if stream.error],
            "longest_gap_s": round(max(stream.gap_s(started) for stream in streams), 3),
            "late_request_answered": bool(await late),
            "outcomes": sorted({move["outcome"] for move in moves}),
            "migrations": len(moves),
            "migrations_mb": round(sum(move["bytes"] for move in moves) / 1e6, 1),
            "migration_s": [move["seconds"] for move in moves],
            "nodes": state.get("nodes"),
        }

    async def _ready(self, count: int) -> list[dict[str, Any]]:
        """Replicas once ``count`` of them take requests."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            replicas = (await self._http.get("/mell/v1/state")).json()["replicas"]
            if sum(replica["state"] == "ready" for replica in replicas) >= count:
                return replicas
            await asyncio.sleep(0.1)
        raise SystemExit(f"no {count} replicas are ready")

    async def _until_empty(self, replica_id: str, started: float) -> float:
        """Seconds until nothing runs on the replica or it is gone."""
        while time.monotonic() < started + PATIENCE_S:
            state = (await self._http.get("/mell/v1/state")).json()
            if replica_id not in {r["id"] for r in state["replicas"] if r["running"]}:
                return time.monotonic() - started
            await asyncio.sleep(POLL_S)
        raise SystemExit(f"replica {replica_id} is not empty after {PATIENCE_S:.0f} s")

    async def _post(self, path: str, body: dict[str, Any] | None = None) -> None:
        answer = await self._http.post(f"/mell/v1/{path}", json=body or {})
        if answer.is_error:
            raise SystemExit(f"{path}: {answer.text}")


def _ray_drains(node_id: str) -> None:
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION
    client.drain_node(node_id, reason, "load test", int((time.time() + 120) * 1000))


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the application: two replicas, nothing moves by itself."""
    return {
        "llm_configs": [
            {
                "model_loading_config": {"model_id": MODEL_ID, "model_source": "builtin"},
                "accelerator_type": "CPU",
                "deployment_config": {"autoscaling_config": {"min_replicas": 2, "max_replicas": 2}},
                "engine_kwargs": {
                    "max_num_seqs": options.streams * 2,
                    "enable_prefix_caching": False,
                },
            }
        ],
        "mell": {"control_resource": CONTROL},
    }


async def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=4 * options.streams)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        return await Drill(http, options).run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=400, help="still to go at the drain")
    parser.add_argument("--begun", type=int, default=100, help="tokens of each before it")
    parser.add_argument("--by", choices=("node", "ray", "evacuate"), default="node")
    parser.add_argument("--within", type=float, default=3.0, help="seconds; more is a failure")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 4, "resources": {CONTROL: 1}, "object_store_memory": 100 << 20},
    )
    for _ in range(2):
        cluster.add_node(num_cpus=0, resources={"mell_cpu": 1}, object_store_memory=100 << 20)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_openai_app(settings(options)), name=APP, route_prefix="/")
        report = asyncio.run(measure(f"http://127.0.0.1:{port}", options))
    finally:
        serve.shutdown()
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] == f"mell.{APP}":
                ray.kill(ray.get_actor(entry["name"], namespace=entry["namespace"]))
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps(report, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    bad = report["wrong"] or report["failed"] or report["seconds"] > options.within
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
