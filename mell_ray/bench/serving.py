"""``mell-ray bench serving``: what a token costs besides the model.

Ray, Serve, its proxy, the ingress and one replica run as they do under ``mell-ray serve``; only
the model is left out (see ``null_replica``). CPU time is the processes' own, from the system.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from mell_ray.bench.local_ray import start_ray
from mell_ray.bench.machine import machine, versions
from mell_ray.bench.processes import APP, SERVING, cpu_seconds, difference
from mell_ray.bench.sse_client import stream
from mell_ray.bench.summary import percentiles_ms

MODEL = "mell-tiny"
PROMPT = "It is a truth universally acknowledged, that a single man in possession of"
WARM_UP_S = 3.0
OBJECT_STORE_BYTES = 200 << 20

OnPhase = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ServingBenchOptions:
    """``output_len``: tokens of each of the ``streams`` that run at any time, for ``seconds``."""

    streams: int = 64
    output_len: int = 400
    seconds: float = 20.0
    ttft_requests: int = 100
    haproxy: bool = True


def measure(options: ServingBenchOptions, on_phase: OnPhase) -> dict[str, Any]:
    """Start Ray and Serve on this machine, measure, stop them."""
    from mell_ray.serving.cli import ray_environment

    with tempfile.TemporaryDirectory(prefix="mb", dir="/tmp") as scratch:
        settings = _settings(options)
        # Ray reads them when it is imported.
        os.environ.update(ray_environment(settings, options.haproxy, scratch))
        import ray
        from ray import serve

        from mell_ray.bench.null_replica import NullRouter
        from mell_ray.config import MellConfig
        from mell_ray.serving.app import application

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        on_phase("starting Ray and Serve")
        start_ray(scratch, OBJECT_STORE_BYTES)
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": "127.0.0.1", "port": port},
                logging_config={"log_level": "WARNING", "enable_access_log": False},
            )
            config = MellConfig.parse(settings["applications"][0]["args"])
            serve.run(application(config, NullRouter), name=APP, route_prefix="/")
            return asyncio.run(_Bench(options, port, scratch, on_phase).run())
        finally:
            serve.shutdown()
            _end_replicas()
            ray.shutdown()


class _Bench:
    def __init__(
        self, options: ServingBenchOptions, port: int, scratch: str, on_phase: OnPhase
    ) -> None:
        self._options = options
        self._port = port
        self._scratch = scratch
        self._on_phase = on_phase
        self._events = 0

    async def run(self) -> dict[str, Any]:
        self._on_phase("one request at a time, through HTTP")
        await self._ttft(5)
        served = await self._ttft(self._options.ttft_requests)
        self._on_phase("one request at a time, at the engine")
        direct = await asyncio.to_thread(_direct_ttft, self._options.ttft_requests)
        self._on_phase(f"{self._options.streams} streams for {self._options.seconds:g} s")
        load = await self._load()
        return {
            "cpu_us_per_token": load["cpu_us_per_token"],
            "tokens_per_s_per_core": 1e6 / load["cpu_us_per_token"],
            "added_ttft_ms": 1e3 * (median(served) - median(direct)),
            "details": {
                **load,
                "ttft_ms": percentiles_ms(served),
                "direct_ttft_ms": percentiles_ms(direct),
            },
            "settings": {
                "streams": self._options.streams,
                "output_len": self._options.output_len,
                "seconds": self._options.seconds,
                "ttft_requests": self._options.ttft_requests,
                "haproxy": self._options.haproxy,
            },
            "machine": machine(),
            "versions": versions(),
        }

    async def _ttft(self, count: int) -> list[float]:
        return [await self._request(4) for _ in range(count)]

    async def _load(self) -> dict[str, Any]:
        """CPU per token while so many streams run, over a window within the load."""
        stop = asyncio.Event()
        clients = [asyncio.create_task(self._client(stop)) for _ in range(self._options.streams)]
        await asyncio.sleep(WARM_UP_S)
        before, events, started = await self._spent(), self._events, time.perf_counter()
        await asyncio.sleep(self._options.seconds)
        after, elapsed = await self._spent(), time.perf_counter() - started
        events = self._events - events
        stop.set()
        await asyncio.gather(*clients)
        tokens = int(after["tokens"] - before["tokens"])
        spent = difference(after, before)
        engine = spent.pop("engine")
        spent.pop("tokens")
        spent["replica"] -= engine
        by_role = {role: 1e6 * seconds / tokens for role, seconds in spent.items()}
        serving = {role: by_role.pop(role) for role in SERVING if role in by_role}
        return {
            "cpu_us_per_token": sum(serving.values()),
            "cpu_us_per_token_by_process": serving,
            "engine_us_per_token": 1e6 * engine / tokens,
            "ray_background_us_per_token": sum(by_role.values()),
            "tokens_per_s": tokens / elapsed,
            "tokens_per_event": tokens / max(1, events),
        }

    async def _client(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self._request(self._options.output_len)

    async def _request(self, num_tokens: int) -> float:
        body = {
            "model": MODEL,
            "prompt": PROMPT,
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        return await stream("127.0.0.1", self._port, body, self._count)

    def _count(self, events: int) -> None:
        self._events += events

    async def _spent(self) -> dict[str, float]:
        tokens, engine_s = await _replica().counters.remote()
        return {**cpu_seconds(self._scratch), "tokens": tokens, "engine": engine_s}


def _replica() -> Any:
    """The one replica of the application."""
    import ray

    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] == f"mell.{APP}":
            return ray.get_actor(entry["name"], namespace=entry["namespace"])
    raise RuntimeError("the application has no replica")


def _end_replicas() -> None:
    import ray

    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] == f"mell.{APP}":
            ray.kill(ray.get_actor(entry["name"], namespace=entry["namespace"]))


def _direct_ttft(count: int) -> list[float]:
    """Seconds from handing an engine in this process a request to its first token."""
    import threading

    from mell_ray.bench.null_replica import make_null_engine
    from mell_ray.config import MellConfig
    from mell_ray.engine.loop import EngineLoop
    from mell_ray.engine.types import RequestState, SamplingParams
    from mell_ray.serving.model_source import load_tokenizer

    llm = MellConfig.parse(_settings(ServingBenchOptions())["applications"][0]["args"]).llm_configs[
        0
    ]
    prompt = load_tokenizer(llm).encode(PROMPT)
    first, last = threading.Event(), threading.Event()

    def on_step(output: Any) -> None:
        for delta in output.deltas:
            (last if delta.finish_reason else first).set()

    loop = EngineLoop(make_null_engine(llm, "cpu"), on_step, lambda: None)
    loop.start()
    seconds = []
    for number in range(count):
        first.clear()
        last.clear()
        state = RequestState(str(number), prompt, SamplingParams(max_tokens=4, ignore_eos=True))
        started = time.perf_counter()
        loop.call(partial(_add, state)).result()
        first.wait()
        seconds.append(time.perf_counter() - started)
        last.wait()
    loop.stop()
    return seconds


def _add(state: Any, engine: Any) -> None:
    engine.add(state)


def _settings(options: ServingBenchOptions) -> dict[str, Any]:
    """A Serve config, as ``mell-ray serve`` reads it."""
    return {
        "applications": [
            {
                "args": {
                    "llm_configs": [
                        {
                            "model_loading_config": {"model_id": MODEL, "model_source": "builtin"},
                            "accelerator_type": "CPU",
                            "engine_kwargs": {"max_num_seqs": max(64, options.streams)},
                        }
                    ],
                    "mell": {"fleet": {"replica_lease_s": 120}},
                }
            }
        ]
    }
