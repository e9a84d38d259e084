"""Chaos: processes killed at random under saturating load; what every client received is compared.

    python load_tests/chaos.py --minutes 10 --every 20 --out chaos.json

Starts Ray and Serve on this machine with the built-in model on small KV pools, keeps more streams
open than the replicas hold, and kills one process every so many seconds: a replica, the Router, the
Migrator, an ingress, Serve's controller. Every prompt is generated once undisturbed, before
anything happens. Each request must end with that text, or with an HTTP error that says what is
wrong before its first token. Streams that run through a killed ingress end with it, as their
connections do: these are counted apart, and only while an ingress has just been killed.

Memory is private memory (resident, not shared) of every process, sampled all along; its growth is
the slope of a line through the samples of the second half of each process's life.

Exits with 1 if a request went wrong, an ownership rule was broken, or a block or request is left.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRATCH = Path(tempfile.mkdtemp(prefix="ch", dir="/tmp"))
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_SERVE_LOG_TO_STDERR="0",
    RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD="0",
    RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP="0",
)

import httpx  # noqa: E402
import numpy as np  # noqa: E402
from left_over import left_over  # noqa: E402
from live_app import served  # noqa: E402

from mell_ray.bench.processes import APP, private_bytes, processes  # noqa: E402
from mell_ray.builtin import MODEL_ID  # noqa: E402

VICTIMS = ("replica", "router", "migrator", "ingress", "controller")
PROMPTS = [f"Chapter {i}. It was a truth that" for i in range(1, 25)]
LENGTHS = (40, 120, 240)
MEMORY_EVERY_S = 2.0
STEADY_S = 60.0  # a process must live that long for its memory to say something
INGRESS_GRACE_S = 10.0
MIB = 1 << 20


class BrokenError(Exception):
    """The connection ended in the middle of an answer."""


class RefusedError(Exception):
    """An HTTP error with a message, before the first token."""


@dataclass(slots=True)
class Samples:
    """Private memory of one process."""

    at: list[float] = field(default_factory=list)
    size: list[int] = field(default_factory=list)

    def told(self) -> dict[str, float] | None:
        """None: it has not lived long enough."""
        if not self.at or self.at[-1] - self.at[0] < STEADY_S:
            return None
        half = len(self.at) // 2
        slope = float(np.polyfit(self.at[half:], self.size[half:], 1)[0])
        return {
            "lived_s": round(self.at[-1] - self.at[0]),
            "mib_at_half": round(self.size[half] / MIB, 1),
            "mib_at_end": round(self.size[-1] / MIB, 1),
            "mib_per_minute": round(60 * slope / MIB, 2),
        }


class Chaos:
    def __init__(self, url: str, options: argparse.Namespace) -> None:
        self._url = url
        self._options = options
        self._random = random.Random(options.seed)
        self._client = httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=256))
        self._expected: dict[tuple[str, int], str] = {}
        self._memory: dict[tuple[str, int], Samples] = collections.defaultdict(Samples)
        self._ingress_killed = float("-inf")
        self._stop = False
        self.kills: collections.Counter[str] = collections.Counter()
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.refusals: collections.Counter[str] = collections.Counter()
        self.wrong: list[dict[str, Any]] = []

    async def run(self) -> dict[str, Any]:
        wanted = [(prompt, length) for prompt in PROMPTS for length in LENGTHS]
        texts = await asyncio.gather(*(self._generate(*each) for each in wanted))
        self._expected = dict(zip(wanted, texts, strict=True))
        started = time.monotonic()
        clients = [asyncio.create_task(self._client_loop()) for _ in range(self._options.streams)]
        watch = asyncio.create_task(self._watch_memory())
        await self._kill_until(started + 60 * self._options.minutes)
        self._stop = True
        await asyncio.gather(*clients)
        watch.cancel()
        left = await left_over(self._client, self._url, APP)
        await self._client.aclose()
        memory = self._memory_told()
        return {
            "seconds": round(time.monotonic() - started, 1),
            "kills": dict(self.kills),
            "requests": dict(self.outcomes),
            "refusals": dict(self.refusals),
            "wrong": self.wrong,
            **left,
            "worst_mib_per_minute": max((m["mib_per_minute"] for m in memory), default=None),
            "memory": memory,
        }

    # --- load ------------------------------------------------------------------------------

    async def _client_loop(self) -> None:
        while not self._stop:
            prompt, length = self._random.choice(PROMPTS), self._random.choice(LENGTHS)
            try:
                text = await self._generate(prompt, length)
            except RefusedError as error:
                self.outcomes["refused"] += 1
                self.refusals[str(error)] += 1
                await asyncio.sleep(self._random.uniform(0.1, 0.5))
            except BrokenError as error:
                await self._broken(prompt, length, error)
            else:
                if text == self._expected[prompt, length]:
                    self.outcomes["right"] += 1
                else:
                    self._wrong(prompt, length, f"another text: {text!r}")

    async def _broken(self, prompt: str, length: int, error: BrokenError) -> None:
        if time.monotonic() - self._ingress_killed < INGRESS_GRACE_S:
            self.outcomes["ended_with_their_ingress"] += 1
        else:
            self._wrong(prompt, length, str(error))
        await asyncio.sleep(0.2)

    def _wrong(self, prompt: str, length: int, what: str) -> None:
        self.outcomes["wrong"] += 1
        self.wrong.append({"prompt": prompt, "length": length, "what": what})

    async def _generate(self, prompt: str, length: int) -> str:
        """The text of one streamed completion.

        Raises:
            RefusedError: an HTTP error that names its reason, before the first token.
            BrokenError: anything else that is not a whole answer.
        """
        body = {
            "model": MODEL_ID,
            "prompt": prompt,
            "max_tokens": length,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        parts: list[str] = []
        try:
            async with self._client.stream(
                "POST", f"{self._url}/v1/completions", json=body
            ) as stream:
                if stream.status_code != 200:
                    raise RefusedError(_reason(stream.status_code, await stream.aread()))
                async for line in stream.aiter_lines():
                    data = line.removeprefix("data: ")
                    if data == "[DONE]":
                        return "".join(parts)
                    if data:
                        event = json.loads(data)
                        if "error" in event:
                            raise BrokenError(f"error in the stream: {event['error']['message']}")
                        parts.append(event["choices"][0]["text"])
        except httpx.HTTPError as error:
            raise BrokenError(f"{type(error).__name__} after {len(parts)} pieces") from None
        raise BrokenError(f"no [DONE] after {len(parts)} pieces")

    # --- kills -----------------------------------------------------------------------------

    async def _kill_until(self, deadline: float) -> None:
        roles = [role for role in VICTIMS if role in self._options.victims]
        while True:
            wait_s = min(self._options.every, deadline - time.monotonic())
            await asyncio.sleep(max(0.0, wait_s))
            if time.monotonic() >= deadline:
                return
            role = self._random.choice(roles)
            found = [process for name, process in processes(str(SCRATCH)) if name == role]
            if not found:
                continue
            if role == "ingress":
                self._ingress_killed = time.monotonic()
            self._random.choice(found).kill()
            self.kills[role] += 1
            print(f"killed: {role}", file=sys.stderr, flush=True)

    # --- what is left ----------------------------------------------------------------------

    async def _watch_memory(self) -> None:
        while True:
            now = time.monotonic()
            for key, size in private_bytes(str(SCRATCH)).items():
                self._memory[key].at.append(now)
                self._memory[key].size.append(size)
            await asyncio.sleep(MEMORY_EVERY_S)

    def _memory_told(self) -> list[dict[str, Any]]:
        """Of each process that lived long enough, fastest growth first."""
        told = [
            {"role": role, **summary}
            for (role, _), samples in self._memory.items()
            if (summary := samples.told()) is not None
        ]
        return sorted(told, key=lambda entry: -entry["mib_per_minute"])


def _reason(status: int, body: bytes) -> str:
    """Raises BrokenError: the error does not say what is wrong."""
    try:
        return f"{status} {json.loads(body)['error']['type']}"
    except (ValueError, KeyError, TypeError):
        raise BrokenError(f"HTTP {status} without a reason: {body[:200]!r}") from None


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    scaling = {"min_replicas": options.replicas, "max_replicas": options.replicas}
    return {
        "llm_configs": [
            {
                "model_loading_config": {"model_id": MODEL_ID, "model_source": "builtin"},
                "accelerator_type": "CPU",
                "deployment_config": {"autoscaling_config": scaling},
                "engine_kwargs": {"num_gpu_blocks_override": options.blocks, "max_num_seqs": 16},
            }
        ],
        "mell": {"fleet": {"replica_lease_s": 120}, "ingress": {"num_replicas": 2}},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=20.0, help="Seconds between kills.")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=96, help="KV blocks of a replica.")
    parser.add_argument(
        "--victims", nargs="+", choices=VICTIMS, default=VICTIMS, help="What may be killed."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    application = served(
        _settings(options),
        APP,
        replicas=options.replicas,
        scratch=SCRATCH,
        logging_config={"log_level": "ERROR", "enable_access_log": False},
    )
    with application as url:
        report = asyncio.run(Chaos(url, options).run())
    print(json.dumps(report, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    bad = ("wrong", "leaked_blocks", "leaked_requests", "broken_books", "violations")
    return 1 if any(report[key] for key in bad) else 0


if __name__ == "__main__":
    sys.exit(main())
