"""The last minutes of an application: what the status page draws over time. Pure."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

from mell_ray.observability.pulse import Pulse

RATE_WINDOW_S = 10.0
SAMPLE_WINDOW_S = 60.0
HISTORY_POINTS = 300


class Activity:
    """Pulses of all ingresses and one point of history a second; memory is bounded."""

    def __init__(self) -> None:
        self._pulses: collections.deque[tuple[float, Pulse]] = collections.deque()
        self._points: collections.deque[tuple[float, int, int, int, float]] = collections.deque(
            maxlen=HISTORY_POINTS
        )

    def heard(self, pulse: Pulse, now: float) -> None:
        """An ingress has served this in the second before ``now``."""
        self._pulses.append((now, pulse))
        while self._pulses[0][0] < now - SAMPLE_WINDOW_S:
            self._pulses.popleft()

    def point(self, now: float, *, open_gpus: int, used: int, lower_bound: int) -> None:
        """The fleet at ``now``: GPUs held, GPUs with requests, and the bound for them."""
        self._points.append((now, open_gpus, used, lower_bound, self._tokens_per_s(now)))

    def rates(self, now: float) -> dict[str, Any]:
        """Tokens per second over the last ten seconds; latencies in ms over the last minute, None
        where nothing was served."""
        recent = [pulse for at, pulse in self._pulses if at >= now - SAMPLE_WINDOW_S]
        ttft = sorted(value for pulse in recent for value in pulse.ttft_s)
        tpot = sorted(value for pulse in recent for value in pulse.tpot_s)
        stall = sorted(value for pulse in recent for value in pulse.stall_s)
        return {
            "tokens_per_s": round(self._tokens_per_s(now), 1),
            "ttft_p50_ms": _quantile_ms(ttft, 0.5),
            "ttft_p95_ms": _quantile_ms(ttft, 0.95),
            "tpot_p50_ms": _quantile_ms(tpot, 0.5),
            "stall_p50_ms": _quantile_ms(stall, 0.5),
            "stall_max_ms": _quantile_ms(stall, 1.0),
        }

    def history(self, now: float) -> dict[str, list[float]]:
        """Columns, oldest first. ``age_s`` counts back from ``now``."""
        points = list(self._points)
        return {
            "age_s": [round(now - point[0], 1) for point in points],
            "open": [point[1] for point in points],
            "used": [point[2] for point in points],
            "bound": [point[3] for point in points],
            "tokens_per_s": [round(point[4], 1) for point in points],
        }

    def _tokens_per_s(self, now: float) -> float:
        start = now - RATE_WINDOW_S
        return sum(pulse.tokens for at, pulse in self._pulses if at > start) / RATE_WINDOW_S


def _quantile_ms(ordered: Iterable[float], q: float) -> float | None:
    values = list(ordered)
    if not values:
        return None
    return round(values[min(len(values) - 1, int(q * len(values)))] * 1e3, 2)
