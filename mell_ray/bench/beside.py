"""What other requests see of migrations beside them, and what a migration costs the machine."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil

from mell_ray.bench.load import Load
from mell_ray.bench.processes import difference, processes
from mell_ray.bench.rig import Watched

WARM_UP_S = 4.0  # for the load, and for the replicas to know their steps


@dataclass(slots=True)
class Windows:
    """All windows with, or all without migrations."""

    rates: list[float] = field(default_factory=list)  # tokens a second of the other requests
    moved_rates: list[float] = field(default_factory=list)  # and of the one that moves
    ttft_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    migrations: int = 0
    cpu_s: dict[str, float] = field(default_factory=lambda: collections.defaultdict(float))

    def told(self) -> dict[str, Any]:
        return {
            "tokens_per_s": self.rates,
            "moved_tokens_per_s": self.moved_rates,
            "p99_ttft_s": self.p99_ttft_s,
            "migrations": self.migrations,
            "migrations_per_s": self.migrations / self.seconds,
        }

    @property
    def p99_ttft_s(self) -> float:
        return float(np.percentile(self.ttft_s, 99))


async def measure_beside(
    load: Load,
    moved: Watched,
    move: Callable[[Watched, bool], Awaitable[Any]],
    rounds: int,
    window_s: float,
) -> dict[str, Any]:
    """One migration after the other, first as moves come that can wait, within
    ``mell.migration.slowdown``; then, half as long, without that limit. ``moved`` also runs while
    nothing moves.

    Args:
        move: moves a request once; True: as a move that can wait.
    """
    await asyncio.sleep(WARM_UP_S)

    async def limited() -> None:
        await move(moved, True)

    async def unlimited() -> None:
        await move(moved, False)

    still, paced = await _compare(load, moved, limited, rounds, window_s)
    still_again, fast = await _compare(load, moved, unlimited, max(1, rounds // 2), window_s)
    return {
        "throughput_ratio": sum(paced.rates) / sum(still.rates),
        "p99_ttft_ratio": paced.p99_ttft_s / still.p99_ttft_s,
        "migrations_per_s": paced.migrations / paced.seconds,
        "throughput_ratio_unlimited": sum(fast.rates) / sum(still_again.rates),
        "migrations_per_s_unlimited": fast.migrations / fast.seconds,
        "cpu_ms_per_migration": _cpu_ms_per_migration(fast, still_again),
        "limited": {"without": still.told(), "with": paced.told()},
        "unlimited": {"without": still_again.told(), "with": fast.told()},
    }


async def _compare(
    load: Load,
    moved: Watched,
    move: Callable[[], Awaitable[None]],
    rounds: int,
    window_s: float,
) -> tuple[Windows, Windows]:
    """Pairs of windows without and with migrations, every other pair the other way round: what
    changes with time (the moved request becomes longer) meets both alike."""
    still, moving = Windows(), Windows()
    for turn in range(rounds):
        for migrating in (turn % 2 == 1, turn % 2 == 0):
            into = moving if migrating else still
            await _window(into, load, moved, move if migrating else None, window_s)
    return still, moving


async def _window(
    into: Windows,
    load: Load,
    moved: Watched,
    move: Callable[[], Awaitable[None]] | None,
    window_s: float,
) -> None:
    stop, migrations = False, 0

    async def go_on(move: Callable[[], Awaitable[None]]) -> None:
        nonlocal migrations
        while not stop:
            await move()
            migrations += 1

    before, tokens, mark = _cpu_s(), moved.num_tokens, load.mark()
    mover = None if move is None else asyncio.create_task(go_on(move))
    await asyncio.sleep(window_s)
    others, ttft_s = load.since(mark)
    elapsed = time.monotonic() - mark
    into.rates.append(others / elapsed)
    into.moved_rates.append((moved.num_tokens - tokens) / elapsed)
    into.ttft_s += ttft_s
    into.seconds += elapsed
    into.migrations += migrations
    for role, seconds in difference(_cpu_s(), before).items():
        into.cpu_s[role] += seconds
    stop = True
    if mover is not None:
        await mover


def _cpu_s() -> dict[str, float]:
    """CPU time so far by role. This process is Migrator and ingress in one; of a replica the
    busiest thread is its engine."""
    mine = psutil.Process().cpu_times()
    spent: dict[str, float] = collections.defaultdict(float)
    spent["Migrator and ingress"] = mine.user + mine.system
    for role, process in processes():
        try:
            threads = [each.user_time + each.system_time for each in process.threads()]
        except psutil.Error:
            continue
        if role == "replica":
            spent["engines"] += max(threads)
            spent["replicas beside engines"] += sum(threads) - max(threads)
        else:
            spent[role] += sum(threads)
    return dict(spent)


def _cpu_ms_per_migration(moving: Windows, still: Windows) -> dict[str, float]:
    """What each role used more while one migration followed another. Engines are left out: the
    machine is full without migrations, so they use less."""
    rate = moving.migrations / moving.seconds
    return {
        role: 1e3 * (seconds / moving.seconds - still.cpu_s[role] / still.seconds) / rate
        for role, seconds in moving.cpu_s.items()
        if role != "engines"
    }
