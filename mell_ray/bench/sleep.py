"""``mell-ray bench sleep``: how long a replica takes to wake, next to how long one takes to start.

Each time runs from the demand to the first token of a prompt, as a client would see it: Ray's
scheduling of the slot is in all of them.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mell_ray.bench.local_ray import OnPhase, random_model_on_local_ray
from mell_ray.bench.machine import machine, versions
from mell_ray.bench.rig import Rig
from mell_ray.config import LLMConfig, MellSettings
from mell_ray.serving.fleet import Replica

VOCABULARY = 32_000
RESOURCE = "mell_bench"


@dataclass(frozen=True, slots=True)
class SleepBenchOptions:
    dtype: str = "bfloat16"
    rounds: int = 3  # cold starts, each followed by a start from shared weights
    naps: int = 5  # sleeps in each round
    prompt_tokens: int = 128
    seed: int = 0


def measure(options: SleepBenchOptions, on_phase: OnPhase) -> dict[str, Any]:
    """Start Ray on this machine, measure, stop it."""
    with random_model_on_local_ray(on_phase, resources={RESOURCE: 2}) as model:
        return asyncio.run(_measure(options, model, on_phase))


async def _measure(options: SleepBenchOptions, model: Path, on_phase: OnPhase) -> dict[str, Any]:
    llm = LLMConfig.model_validate(
        {
            "model_loading_config": {"model_id": "bench", "model_source": str(model)},
            "accelerator_type": "CPU",
            "engine_kwargs": {"dtype": options.dtype, "num_threads": 2, "max_model_len": 4096},
        }
    )
    settings = MellSettings.model_validate({"fleet": {"sleep": True, "cpu_resource": RESOURCE}})
    rig = Rig(llm, settings)
    rng = random.Random(options.seed)
    cold: list[float] = []
    shared: list[float] = []
    wakes: list[float] = []
    sleeps: list[float] = []
    given_back: list[int] = []

    async def first_token(replica: Replica) -> None:
        prompt = [rng.randrange(3, VOCABULARY) for _ in range(options.prompt_tokens)]
        watched = await rig.submit(replica, prompt, 1)
        await watched.ended.wait()
        rig.forget(watched)

    try:
        for number in range(1, options.rounds + 1):
            on_phase(f"round {number} of {options.rounds}")
            began = time.monotonic()
            first = await rig.start()
            await first_token(first)
            cold.append(time.monotonic() - began)
            began = time.monotonic()
            second = await rig.start()
            await first_token(second)
            shared.append(time.monotonic() - began)
            for _ in range(options.naps):
                held = _held(first)
                began = time.monotonic()
                await rig.sleep(first)
                sleeps.append(time.monotonic() - began)
                given_back.append(held - _held(first))
                began = time.monotonic()
                await rig.wake(first)
                await first_token(first)
                wakes.append(time.monotonic() - began)
            await rig.check()
            for replica in (first, second):
                await rig.end(replica)
    finally:
        rig.close()
    start_s, wake_s = statistics.median(cold), statistics.median(wakes)
    return {
        "cold_start_s": start_s,
        "shared_start_s": statistics.median(shared),
        "wake_s": wake_s,
        "wake_to_cold_start": wake_s / start_s,
        "sleep_s": statistics.median(sleeps),
        "given_back_mib": statistics.median(given_back) / 2**20,
        "details": {"cold_s": cold, "shared_s": shared, "wake_s": wakes, "sleep_s": sleeps},
        "machine": machine(),
        "versions": versions(),
    }


def _held(replica: Replica) -> int:
    """Bytes of memory that a replica's process maps, shared or not."""
    assert replica.info is not None
    return int(psutil.Process(replica.info.pid).memory_info().rss)
