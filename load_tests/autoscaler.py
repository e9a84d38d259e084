"""Nodes that go after their requests have been moved off, and come back under load.

    python load_tests/autoscaler.py --json OUT

Starts Ray's own fake multi-node autoscaler on this machine: a head, and up to two nodes of two
replicas each of the built-in model, of which Ray starts one when a replica has no place and takes
one back when it has been idle for six seconds. A replica holds two requests at once. Eight streams
need both nodes; six of them are short. When those have ended, the two long ones are moved together,
the other replicas are released, and Ray takes back the node that has none while both streams go on.
Then eight more requests come, and so does a node.

Every stream is compared with the same prompt undisturbed. Exit code 1 if one differs or fails, if
no node goes while streams run on the other, or if none comes back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_SERVE_LOG_TO_STDERR="0",
    RAY_SERVE_CONTROL_LOOP_INTERVAL_S="0.02",
)

import httpx
import psutil
import ray
from ray import serve
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from mell_ray.builtin import MODEL_ID
from mell_ray.serving import build_openai_app

APP = "autoscaler"
CONTROL = "mell_control"
SHORT, LONG = 1200, 3900  # tokens
IDLE_S = 6.0
POLL_S = 0.2
PATIENCE_S = 120.0


def head(scratch: str, port: int) -> subprocess.Popen[bytes]:
    """A Ray head whose autoscaler brings nodes on this machine."""
    config = {
        "cluster_name": "fake_multinode",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"127.0.0.1:{port}",
            "disable_node_updaters": True,
            "use_node_id_as_ip": True,  # all nodes are on this machine
        },
        "auth": {},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "pair": {
                "resources": {"CPU": 0, "mell_cpu": 2, "object_store_memory": 100 << 20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }
    file = Path(scratch, "autoscaler.json")
    file.write_text(json.dumps(config))
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        f"--autoscaling-config={file}",
        "--include-dashboard=false",
        "--dashboard-agent-listen-port=0",
        "--num-cpus=4",
        f"--resources={json.dumps({CONTROL: 1})}",
        f"--object-store-memory={100 << 20}",
    ]
    with Path(scratch, "head.log").open("w") as log:
        return subprocess.Popen(
            command,
            env=os.environ
            | {
                "RAY_FAKE_CLUSTER": "1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            },
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def settings() -> dict[str, Any]:
    return {
        "llm_configs": [
            {
                "model_loading_config": {"model_id": MODEL_ID, "model_source": "builtin"},
                "accelerator_type": "CPU",
                "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 4}},
                "engine_kwargs": {"max_num_seqs": 2, "num_gpu_blocks_override": 520},
            }
        ],
        "mell": {
            "control_resource": CONTROL,
            "fleet": {"require_cpu_resource": True, "idle_grace_s": 1.0},
        },
    }


class Show:
    """The demonstration, and what was seen of the cluster meanwhile."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._started = time.monotonic()
        self.seen: list[dict[str, Any]] = []

    async def run(self) -> dict[str, Any]:
        watching = asyncio.create_task(self._watch())
        prompts = [f"Chapter {i + 1}. It was a truth that" for i in range(8)]
        lengths = [SHORT, LONG, SHORT, SHORT, SHORT, SHORT, LONG, SHORT]
        work = [
            asyncio.create_task(self._generate(prompt, length))
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        await self._until(lambda now: now["replicas"] == 4 and now["running"] >= 4)
        full = self.seen[-1]
        await self._until(lambda now: len(now["nodes"]) == 1)
        one_left = self.seen[-1]
        texts = await asyncio.gather(*work)
        again = [asyncio.create_task(self._generate(prompt, LONG // 4)) for prompt in prompts]
        await self._until(lambda now: len(now["nodes"]) == 2)
        back = self.seen[-1]
        texts_again = await asyncio.gather(*again)
        await self._until(lambda now: len(now["nodes"]) == 1)
        watching.cancel()
        moves = (await self._http.get("/mell/v1/migrations")).json()["migrations"]
        expected = [
            await self._generate(prompt, length)
            for prompt, length in [*zip(prompts, lengths, strict=True)]
        ]
        expected_again = [await self._generate(prompt, LONG // 4) for prompt in prompts]
        return {
            "two_nodes": full,
            "one_node": one_left,
            "two_nodes_again": back,
            "nodes_at_the_end": len(self.seen[-1]["nodes"]),
            "moved": sum(move["outcome"] == "committed" for move in moves),
            "wrong_streams": sum(
                a != b for a, b in zip(texts + texts_again, expected + expected_again, strict=True)
            ),
            "seconds": round(time.monotonic() - self._started, 1),
        }

    async def _generate(self, prompt: str, tokens: int) -> str:
        body = {
            "model": MODEL_ID,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        answer = await self._http.post("/v1/completions", json=body)
        if answer.is_error:
            return f"error: {answer.text}"
        return answer.json()["choices"][0]["text"]

    async def _watch(self) -> None:
        """What changes, told as it does."""
        while True:
            state = (await self._http.get("/mell/v1/state")).json()
            alive = await asyncio.to_thread(_worker_nodes)
            names = {node: f"node {i + 1}" for i, node in enumerate(sorted(alive))}
            now = {
                "nodes": {
                    name: sum(replica["node"] == node for replica in state["replicas"])
                    for node, name in names.items()
                },
                "replicas": len(state["replicas"]),
                "running": len(state["requests"]),
            }
            if not self.seen or now != {k: self.seen[-1][k] for k in now}:
                now["at_s"] = round(time.monotonic() - self._started, 1)
                self.seen.append(now)
                print(json.dumps(now), flush=True)
            await asyncio.sleep(POLL_S)

    async def _until(self, condition: Any) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not (self.seen and condition(self.seen[-1])):
            if time.monotonic() > deadline:
                raise SystemExit(f"nothing more happens: {self.seen[-1:]}")
            await asyncio.sleep(POLL_S)


def _worker_nodes() -> list[str]:
    nodes = ray.nodes()
    return [n["NodeID"] for n in nodes if n["Alive"] and "mell_cpu" in n["Resources"]]


async def measure(url: str) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        return await Show(http).run()


def end(child: subprocess.Popen[bytes], scratch: str) -> None:
    """Stop the head and what it has started; fake nodes outlive it otherwise."""
    child.send_signal(signal.SIGTERM)
    for process in psutil.process_iter(["cmdline"]):
        if any(scratch in part for part in process.info["cmdline"] or ()):
            with suppress(psutil.Error):
                process.kill()
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    scratch = tempfile.mkdtemp(prefix="as", dir="/tmp")
    os.environ["RAY_TMPDIR"] = scratch
    with socket.socket() as gcs, socket.socket() as http:
        gcs.bind(("127.0.0.1", 0))
        http.bind(("127.0.0.1", 0))
        ports = gcs.getsockname()[1], http.getsockname()[1]
    child = head(scratch, ports[0])
    try:
        _connect(f"127.0.0.1:{ports[0]}", scratch)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": ports[1]})
        serve.run(build_openai_app(settings()), name=APP, route_prefix="/")
        report = asyncio.run(measure(f"http://127.0.0.1:{ports[1]}"))
    finally:
        with suppress(Exception):  # the head may not have come up
            serve.shutdown()
        ray.shutdown()  # while there is a head to say goodbye to
        end(child, scratch)
        shutil.rmtree(scratch, ignore_errors=True)
    print(json.dumps(report, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    good = report["one_node"]["running"] and report["moved"]
    return 0 if good and not report["wrong_streams"] else 1


def _connect(address: str, scratch: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except ConnectionError:
            if time.monotonic() > deadline:
                raise SystemExit(Path(scratch, "head.log").read_text()[-3000:]) from None
            time.sleep(0.5)
        else:
            return


if __name__ == "__main__":
    sys.exit(main())
