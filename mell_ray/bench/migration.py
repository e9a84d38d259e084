"""``mell-ray bench migration``: what live migration costs, between real replica processes.

Token times are taken where an ingress reads a replica's token stream: after Ray, before HTTP.
Prefix caches are off, so that a request that comes back has everything to move again.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from mell_ray.bench.beside import measure_beside
from mell_ray.bench.load import Load
from mell_ray.bench.local_ray import OnPhase, random_model_on_local_ray
from mell_ray.bench.machine import machine, versions
from mell_ray.bench.rig import Rig, Watched
from mell_ray.bench.timed_replica import TimedReplica
from mell_ray.bench.transport import REQUESTS, SIZES_MIB, Transfers, measure_transport
from mell_ray.config import LLMConfig, MellSettings
from mell_ray.errors import ServerError
from mell_ray.migration.types import MigrationResult, Mode
from mell_ray.scheduler.cost import CostConfig, CostModel
from mell_ray.scheduler.events import MigrationDone
from mell_ray.scheduler.state import Gpu

VOCABULARY = 32000
STALL_CONTEXTS = (256, 1024, 4096)
TOKENS_BETWEEN_MOVES = 12
OTHERS = 3  # requests of 128 + 64 tokens kept running on each replica
PARTS = ("transport", "kv", "token", "hybrid", "others", "choice")
FIGURES = {  # which figure of which part stands for it
    "kv_stall_gaps_p50": ("kv", "gaps_p50"),
    "token_stall_gaps_p50": ("token", "gaps_p50"),
    "stall_flatness": ("kv", "flatness"),
    "throughput_ratio": ("others", "throughput_ratio"),
    "migrations_per_s": ("others", "migrations_per_s"),
    "p99_ttft_ratio": ("others", "p99_ttft_ratio"),
    "transport_memcpy_ratio": ("transport", "transport_ratio"),
    "pool_to_pool_memcpy_ratio": ("transport", "pool_to_pool_ratio"),
    "mode_choice_accuracy": ("choice", "accuracy"),
}
EQUAL_WITHIN = 1.05  # two modes whose times differ by less are equally fast


@dataclass(frozen=True, slots=True)
class MigrationBenchOptions:
    """``parts``: of ``PARTS``. ``kv_moves``: all contexts together. ``windows``: pairs of
    ``window_s``, see ``beside``. ``dtype``: as for engines."""

    parts: tuple[str, ...] = PARTS
    kv_moves: int = 51
    token_moves: int = 24
    windows: int = 12
    window_s: float = 4.0
    transfers: int = 15
    grid_contexts: tuple[int, ...] = (256, 1024, 3072)
    grid_bytes_per_s: tuple[float, ...] = (2e6, 10e6, 50e6, 1e9)
    grid_loads: tuple[int, ...] = (0, 3)
    dtype: str = "float32"
    seed: int = 0


def measure(options: MigrationBenchOptions, on_phase: OnPhase) -> dict[str, Any]:
    """Start Ray and two replicas on this machine, measure, stop them."""
    with random_model_on_local_ray(on_phase) as model:
        return asyncio.run(_measure(options, model, on_phase))


async def _measure(
    options: MigrationBenchOptions, model: Path, on_phase: OnPhase
) -> dict[str, Any]:
    rig = Rig(_llm(model, options.dtype), _settings(), TimedReplica)
    bench = _Bench(rig, options, on_phase)
    try:
        on_phase("starting two replicas")
        await rig.open(2)
        started = time.monotonic()
        run: dict[str, Callable[[], Awaitable[dict[str, Any]]]] = {
            "transport": bench.transport,
            "kv": lambda: bench.stalls("kv", STALL_CONTEXTS, options.kv_moves),
            "token": lambda: bench.stalls("token", STALL_CONTEXTS[:2], options.token_moves),
            "hybrid": lambda: bench.stalls("hybrid", STALL_CONTEXTS[:2], options.token_moves),
            "others": bench.others,
            "choice": bench.choice,
        }
        details = {part: await run[part]() for part in PARTS if part in options.parts}
        await rig.check()
    finally:
        rig.close()
    return {
        **{
            figure: details[part][key] for figure, (part, key) in FIGURES.items() if part in details
        },
        "details": details,
        "violations": bench.violations,
        "duration_s": time.monotonic() - started,
        "machine": machine(),
        "versions": versions(),
    }


class _Bench:
    def __init__(self, rig: Rig, options: MigrationBenchOptions, on_phase: OnPhase) -> None:
        self._rig = rig
        self._options = options
        self._on_phase = on_phase
        self._random = random.Random(options.seed)
        self.violations = 0

    def _prompt(self, num_tokens: int) -> list[int]:
        return [self._random.randrange(3, VOCABULARY) for _ in range(num_tokens)]

    async def _running(self, context: int) -> Watched:
        """A request that decodes until somebody ends it, or its context is full."""
        first = self._rig.replicas[0]
        assert first.info is not None
        room = first.info.max_model_len - context
        watched = await self._rig.submit(first, self._prompt(context), room)
        await watched.reached(2)
        return watched

    async def _end(self, watched: Watched) -> None:
        self.violations += watched.track.violations
        await self._rig.cancel(watched)

    async def _move(self, watched: Watched, mode: Mode, **how: Any) -> MigrationResult:
        result = await self._rig.move(watched, mode, **how)
        if result.outcome != "committed":
            raise ServerError(f"a {mode} migration failed: {result.detail}")
        return result

    # --- what the client of a moved request sees -------------------------------------------

    async def stalls(self, mode: Mode, contexts: tuple[int, ...], moves: int) -> dict[str, Any]:
        by_context: dict[int, list[float]] = {}
        seconds: dict[int, list[float]] = {}
        each = max(2, round(moves / len(contexts)))
        for context in contexts:
            self._on_phase(f"{mode} migrations of {context} tokens")
            watched = await self._running(context)
            for _ in range(each):
                await watched.reached(watched.num_tokens + TOKENS_BETWEEN_MOVES)
                await self._move(watched, mode)
            await watched.reached(watched.num_tokens + TOKENS_BETWEEN_MOVES)
            usual = median(watched.gaps_s())
            seconds[context] = list(watched.hand_over_s.values())
            by_context[context] = [stall / usual for stall in seconds[context]]
            await self._end(watched)
        medians = {context: median(gaps) for context, gaps in by_context.items()}
        every = [gap for gaps in by_context.values() for gap in gaps]
        return {
            "gaps_p50": median(every),
            "gaps_p99": float(np.percentile(every, 99)),
            "flatness": max(medians.values()) / min(medians.values()),
            "gaps_p50_by_context": medians,
            "seconds_p50_by_context": {c: median(values) for c, values in seconds.items()},
            "migrations": len(every),
        }

    # --- what other requests see ------------------------------------------------------------

    async def others(self) -> dict[str, Any]:
        self._on_phase("other requests, with and without migrations beside them")
        moved = await self._running(512)
        async with self._load((0, 1)) as load:
            found = await measure_beside(
                load, moved, self._move_on, self._options.windows, self._options.window_s
            )
        await self._end(moved)
        return found

    async def _move_on(self, watched: Watched, patient: bool) -> None:
        await self._move(watched, "kv", patient=patient)

    @contextlib.asynccontextmanager
    async def _load(self, replicas: tuple[int, ...], each: int = OTHERS) -> Any:
        load = Load(self._rig, self._prompt)
        tasks = [
            asyncio.create_task(load.keep(self._rig.replicas[index]))
            for index in replicas
            for _ in range(each)
        ]
        try:
            yield load
        finally:
            load.stop = True
            for running in await asyncio.gather(*tasks):
                self.violations += running

    # --- the transport ----------------------------------------------------------------------

    async def transport(self) -> dict[str, Any]:
        self._on_phase("Ray objects beside memcpy")
        info = self._rig.replicas[0].info
        assert info is not None
        blocks = (max(SIZES_MIB) << 20) // info.block_nbytes
        context = min(blocks * info.block_size, info.max_model_len - 64)
        moving, watched = Transfers(self._rig), []
        for _ in range(REQUESTS):
            watched.append(await self._running(context))
            await moving.add(watched[-1])
        found = await measure_transport(moving, self._options.transfers)
        await moving.close()
        for one in watched:
            await self._end(one)
        return found

    # --- the choice of a mode -----------------------------------------------------------------

    async def choice(self) -> dict[str, Any]:
        """For each bandwidth and load the cost model sees one finished migration of each mode, as
        it would in operation, and then chooses for each context; both modes are measured."""
        cases = []
        for load in self._options.grid_loads:
            for bytes_per_s in self._options.grid_bytes_per_s:
                self._on_phase(f"choice at {bytes_per_s / 1e6:.0f} MB/s beside {load} requests")
                async with self._load((0, 1), load):
                    cases += await self._cases(bytes_per_s, load)
        right = sum(case["right"] for case in cases)
        return {"accuracy": right / len(cases), "cases": cases}

    async def _cases(self, bytes_per_s: float, load: int) -> list[dict[str, Any]]:
        info = self._rig.replicas[0].info
        assert info is not None
        cost = CostModel(
            CostConfig(bytes_per_token=info.block_nbytes // info.block_size), tokens_per_unit=1
        )
        cost.set_attention(info.attention_doubles_at)
        gpus = [
            cast(Gpu, SimpleNamespace(id=replica.replica_id, node="here"))
            for replica in self._rig.replicas
        ]
        await self._both(512, bytes_per_s, cost, gpus)
        cases = []
        for context in self._options.grid_contexts:
            chosen = cost.choose(gpus[0], gpus[1], context).mode
            took = await self._both(context, bytes_per_s, cost, gpus)
            best = min(took.values())
            cases.append(
                {
                    "context": context,
                    "bytes_per_s": bytes_per_s,
                    "others": load,
                    "chosen": chosen,
                    "kv_s": took["kv"],
                    "token_s": took["token"],
                    "right": took[chosen] <= EQUAL_WITHIN * best,
                }
            )
        return cases

    async def _both(
        self, context: int, bytes_per_s: float, cost: CostModel, gpus: list[Gpu]
    ) -> dict[str, float]:
        """Seconds of each mode, back and forth, and let the cost model learn from them."""
        watched = await self._running(context)
        took: dict[str, list[float]] = {"kv": [], "token": []}
        modes: tuple[Mode, ...] = ("kv", "token", "kv", "token")
        for i, mode in enumerate(modes):
            result = await self._move(watched, mode, bytes_per_s=bytes_per_s)
            took[mode].append(result.seconds)
            src, dst = gpus[i % 2], gpus[(i + 1) % 2]
            cost.observe(
                src,
                dst,
                MigrationDone(
                    watched.track.request_id,
                    src.id,
                    dst.id,
                    mode,
                    result.tokens,
                    result.bytes - result.tail_bytes,
                    result.seconds,
                    result.copy_s,
                ),
            )
        await self._end(watched)
        return {mode: min(seconds) for mode, seconds in took.items()}


def _llm(model: Path, dtype: str) -> LLMConfig:
    return LLMConfig.model_validate(
        {
            "model_loading_config": {"model_id": "random-50m", "model_source": str(model)},
            "accelerator_type": "CPU",
            "engine_kwargs": {
                "dtype": dtype,
                "max_model_len": 8192,
                "max_num_seqs": 16,
                "enable_prefix_caching": False,
                "kv_cache_memory_bytes": 256 << 20,
            },
        }
    )


def _settings() -> MellSettings:
    return MellSettings.model_validate(
        {"fleet": {"replica_lease_s": 3600}, "migration": {"timeout_s": 600, "freeze_limit_s": 600}}
    )
