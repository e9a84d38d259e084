"""A tiny first-fit simulation without the package's scheduler: writes logs that are right by
construction, for tests of what reads logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mell_ray.simulation.types import TraceRow


def first_fit_log(rows: Sequence[TraceRow], capacity: int) -> list[dict[str, Any]]:
    """Each request lives for ``output_tokens`` seconds and reserves its final size throughout.

    It grows once, at half of its life, and the log has one migration wherever a request could move
    to another open GPU at that moment.
    """
    moments = [(row.arrival_s, 2, row.request) for row in rows]
    moments += [(row.arrival_s + row.output_tokens / 2, 1, row.request) for row in rows]
    moments += [(row.arrival_s + row.output_tokens, 0, row.request) for row in rows]
    by_number = {row.request: row for row in rows}
    free: dict[str, int] = {}
    where: dict[int, str] = {}
    opened = 0
    log: list[dict[str, Any]] = []
    for t, kind, number in sorted(moments):
        row = by_number[number]
        total = row.prompt_tokens + row.output_tokens
        if total > capacity:
            continue
        if kind == 2:
            gpu = next((name for name, room in free.items() if room >= total), None)
            if gpu is None:
                gpu = f"gpu-{opened}"
                opened += 1
                free[gpu] = capacity
                log.append({"t": t, "event": "gpu_open", "gpu": gpu, "capacity_tokens": capacity})
            free[gpu] -= total
            where[number] = gpu
            log.append(
                {
                    "t": t,
                    "event": "place",
                    "request": number,
                    "gpu": gpu,
                    "tokens": row.prompt_tokens,
                }
            )
            continue
        gpu = where[number]
        if kind == 1:
            tokens = row.prompt_tokens + row.output_tokens // 2
            log.append({"t": t, "event": "grow", "request": number, "gpu": gpu, "tokens": tokens})
            target = next((n for n, room in free.items() if n != gpu and room >= total), None)
            if target is not None:
                free[gpu] += total
                free[target] -= total
                where[number] = target
                log.append(
                    {
                        "t": t,
                        "event": "migrate",
                        "request": number,
                        "src": gpu,
                        "dst": target,
                        "tokens": tokens,
                        "mode": "kv",
                    }
                )
        else:
            log.append({"t": t, "event": "finish", "request": number, "gpu": gpu, "tokens": total})
            free[gpu] += total
        for name in [name for name, room in free.items() if room == capacity]:
            del free[name]
            log.append({"t": t, "event": "gpu_close", "gpu": name})
    return log
