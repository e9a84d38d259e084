"""Chaos: migrations with random faults under load; every client's text is compared.

    python load_tests/migration_chaos.py --migrations 1000 --minutes 10 --out chaos.json

Starts Ray and Serve on this machine, keeps streams of the built-in model running, moves them at
random, and arms a random fault for every second migration: processes killed, messages lost, late
or refused, at any message of the protocol. Ends when so many migrations have ended, or the time is
over. Each prompt is generated once undisturbed, before anything happens; a stream whose text
differs from that, or that fails, is counted. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SCRATCH = Path(tempfile.mkdtemp(prefix="mc", dir="/tmp"))
FAULTS = SCRATCH / "faults"
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_SERVE_LOG_TO_STDERR="0",
    RAY_SERVE_CONTROL_LOOP_INTERVAL_S="0.02",
    MELL_RAY_FAULTS=str(FAULTS),
)

import httpx  # noqa: E402
import ray  # noqa: E402
from left_over import left_over  # noqa: E402
from live_app import served  # noqa: E402
from ray._private.internal_api import memory_summary, node_stats  # noqa: E402

from mell_ray.builtin import MODEL_ID  # noqa: E402
from mell_ray.migration.faults import LOST_S  # noqa: E402

APP = "chaos"
OBJECTS_PATIENCE_S = 2 * LOST_S
TIMEOUT_S = 2.0
LENGTH = 400
PROMPTS = [f"Chapter {i}. It was a truth that" for i in range(1, 25)]
MODES = ("kv", "token", "hybrid")
SOURCE = ("begin", "stage", "tokens", "freeze", "release", "thaw")
TARGET = ("reserve", "receive", "extend", "wait_progress", "commit", "settle")
MIGRATOR = ("begin", "reserve", "stage", "receive", "freeze", "commit", "release")
ACTIONS = ("lose", "delay 0.3", f"delay {1.5 * TIMEOUT_S}", "fail", "break")


class Chaos:
    def __init__(self, url: str, options: argparse.Namespace) -> None:
        self._url = url
        self._options = options
        self._random = random.Random(options.seed)
        self._client = httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=128))
        self._expected: dict[str, str] = {}
        self._live: dict[str, None] = {}
        self._armed: dict[str, str] = {}
        self._stop = False
        self.streams = 0
        self.wrong: list[dict[str, Any]] = []
        self.wrong_moves: list[str] = []
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.struck: collections.Counter[str] = collections.Counter()

    async def run(self) -> dict[str, Any]:
        for prompt in PROMPTS:
            self._expected[prompt] = await self._generate(prompt)
        objects, _ = _num_objects()
        started = time.monotonic()
        deadline = started + 60 * self._options.minutes
        clients = [asyncio.create_task(self._client_loop()) for _ in range(self._options.streams)]
        movers = [asyncio.create_task(self._move_loop(deadline)) for _ in range(4)]
        await asyncio.gather(*movers)
        self._disarm()
        self._stop = True
        await asyncio.gather(*clients)
        left = await left_over(self._client, self._url, APP)
        await self._client.aclose()
        return {
            "migrations": sum(self.outcomes.values()),
            "outcomes": dict(self.outcomes),
            "faults": dict(sorted(self.struck.items())),
            "streams": self.streams,
            "wrong_streams": self.wrong,
            "moves_without_an_answer": self.wrong_moves,
            "seconds": round(time.monotonic() - started, 1),
            **left,
            **await _leaked_objects(objects),
        }

    async def _client_loop(self) -> None:
        while not self._stop:
            prompt = self._random.choice(PROMPTS)
            try:
                text = await self._generate(prompt)
            except (httpx.HTTPError, ValueError) as error:
                self.wrong.append({"prompt": prompt, "error": f"{type(error).__name__}: {error}"})
            else:
                if text != self._expected[prompt]:
                    self.wrong.append({"prompt": prompt, "error": "another text"})
            self.streams += 1

    async def _generate(self, prompt: str) -> str:
        body = {
            "model": MODEL_ID,
            "prompt": prompt,
            "max_tokens": LENGTH,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        parts, done = [], False
        async with self._client.stream("POST", f"{self._url}/v1/completions", json=body) as stream:
            stream.raise_for_status()
            request_id = stream.headers["x-request-id"]
            self._live[request_id] = None
            try:
                async for line in stream.aiter_lines():
                    data = line.removeprefix("data: ")
                    if data == "[DONE]":
                        done = True
                    elif data:
                        event = json.loads(data)
                        if "error" in event:
                            raise ValueError(event["error"]["message"])
                        parts.append(event["choices"][0]["text"])
            finally:
                del self._live[request_id]
        if not done:
            raise ValueError("the stream broke off")
        return "".join(parts)

    async def _move_loop(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if sum(self.outcomes.values()) >= self._options.migrations:
                return
            await asyncio.sleep(self._random.uniform(0.0, 0.2))
            if not self._live:
                continue
            if self._random.random() < 0.5:
                self._arm()
            request_id = self._random.choice(list(self._live))
            url = f"{self._url}/mell/v1/requests/{request_id}/migrate"
            wanted = {"to": None, "mode": self._random.choice(MODES)}
            try:
                answer = await self._client.post(url, json=wanted)
            except httpx.HTTPError as error:
                self.wrong_moves.append(f"{wanted['mode']} of {request_id}: {error!r}")
                continue
            if answer.status_code == 200:
                self.outcomes[answer.json()["outcome"]] += 1

    def _arm(self) -> None:
        role, names = self._random.choice(
            [("source", SOURCE), ("target", TARGET), ("migrator", MIGRATOR)]
        )
        point = f"{role}.{self._random.choice(names)}{self._random.choice(['', '.done'])}"
        kill = self._random.random() < self._options.kills
        action = "kill" if kill else self._random.choice(ACTIONS)
        self._count_struck()
        FAULTS.joinpath(point).write_text(action)
        self._armed[point] = action.split()[0]

    def _count_struck(self) -> None:
        """What was armed and is no longer there has struck."""
        for point in [point for point in self._armed if not FAULTS.joinpath(point).exists()]:
            self.struck[f"{self._armed.pop(point)} {point}"] += 1

    def _disarm(self) -> None:
        self._count_struck()
        for left in FAULTS.iterdir():
            left.unlink()


async def _leaked_objects(before: int) -> dict[str, Any]:
    """How many objects more than ``before`` Ray holds on to though nobody migrates any more (it
    frees them a little later), and what it knows of those there. Not among them: what nobody holds
    and Ray gives up as soon as it needs the room, such as what a killed Migrator had asked for."""
    deadline = time.monotonic() + OBJECTS_PATIENCE_S
    while True:
        held, evictable = await asyncio.to_thread(_num_objects)
        leaked = max(0, held - before)
        if not leaked or time.monotonic() > deadline:
            known = await asyncio.to_thread(memory_summary) if leaked else ""
            return {
                "leaked_objects": leaked,
                "evictable_objects": evictable,
                "objects": known.splitlines(),
            }
        await asyncio.sleep(0.2)


def _num_objects() -> tuple[int, int]:
    """In Ray's store: those it must keep, and the others."""
    [node] = ray.nodes()
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False).store_stats
    held = int(stats.num_object_store_primary_copies)
    return held, int(stats.num_local_objects) - held


def _settings(replicas: int) -> dict[str, Any]:
    return {
        "llm_configs": [
            {
                "model_loading_config": {"model_id": MODEL_ID, "model_source": "builtin"},
                "accelerator_type": "CPU",
                "deployment_config": {
                    "autoscaling_config": {"min_replicas": replicas, "max_replicas": replicas}
                },
                "engine_kwargs": {"enable_prefix_caching": False},
            }
        ],
        "mell": {
            "policy": {"name": "worst-fit"},
            "fleet": {"replica_lease_s": 120},
            "migration": {"timeout_s": TIMEOUT_S, "freeze_limit_s": 0.5, "tail_bytes": 0},
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--migrations", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--kills", type=float, default=0.05, help="Share of faults that kill.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    FAULTS.mkdir()
    application = served(
        _settings(options.replicas),
        APP,
        replicas=options.replicas,
        scratch=SCRATCH,
    )
    with application as url:
        report = asyncio.run(Chaos(url, options).run())
    print(json.dumps(report, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    bad = (
        "wrong_streams",
        "moves_without_an_answer",
        "leaked_blocks",
        "leaked_requests",
        "leaked_objects",
        "broken_books",
        "violations",
    )
    return 1 if any(report[key] for key in bad) else 0


if __name__ == "__main__":
    sys.exit(main())
