"""What the Router knows, for Prometheus and for the status page.

Everything is at hand already: no replica is asked for anything, and however many look at the page,
its data is put together once a second.
"""

from __future__ import annotations

import collections
import json
import time
from collections.abc import Callable, Iterable
from typing import Any

from mell_ray.migration.types import MigrationResult
from mell_ray.observability.activity import Activity
from mell_ray.observability.fleet import NOT_HELD, FleetMeter, GpuSample
from mell_ray.observability.pulse import Pulse
from mell_ray.observability.recorder import Recorder
from mell_ray.observability.spans import record_migration
from mell_ray.observability.tracing import make_tracer
from mell_ray.observability.view import gpu_views, shown_id
from mell_ray.serving.core import Core
from mell_ray.serving.snapshot import state_snapshot

SAMPLE_S = 1.0
MOVES_SHOWN = 40


class Observer:
    """Watches one Router. ``waiting`` gives the ids of requests that have no place yet."""

    def __init__(
        self, core: Core, recorder: Recorder, waiting: Callable[[], Iterable[str]]
    ) -> None:
        self._core = core
        self._tracer = make_tracer(core.settings.observability.tracing, "router")
        self._waiting = waiting
        self._meter = FleetMeter(recorder, core.llms)
        self._activity = Activity()
        self._moves: collections.deque[dict[str, Any]] = collections.deque(maxlen=MOVES_SHOWN)
        self._sampled = 0.0
        self._page: tuple[float, bytes] = (0.0, b"")

    def epoch(self, seconds: float) -> None:
        """A planning epoch took ``seconds``; every second the fleet is looked at, too."""
        self._meter.epoch(seconds)
        if time.monotonic() - self._sampled >= SAMPLE_S:
            self._sampled = time.monotonic()
            self._sample()

    def migrated(self, result: MigrationResult) -> None:
        """A migration has ended."""
        self._meter.migrated(result)
        order = result.order
        entry = self._core.entry(order.request_id)
        if entry is not None:
            record_migration(self._tracer, entry.traceparent, result)
        self._moves.append(
            {
                "at": time.time(),
                "request": shown_id(order.request_id),
                "from": order.src,
                "to": order.dst,
                "mode": order.mode,
                "reason": order.reason,
                "outcome": result.outcome,
                "ms": round(result.seconds * 1e3, 1),
                "stall_ms": round(result.freeze_s * 1e3, 1),
                "bytes": result.bytes,
            }
        )

    def heard(self, pulse: Pulse) -> None:
        """An ingress has told what it served in the last second."""
        self._activity.heard(pulse, time.monotonic())

    def page_data(self) -> bytes:
        """JSON for the status page, at most a second old."""
        now = time.monotonic()
        if now - self._page[0] >= SAMPLE_S:
            data = json.dumps(self._view(now), separators=(",", ":"))
            self._page = (now, data.encode())
        return self._page[1]

    def _view(self, now: float) -> dict[str, Any]:
        core = self._core
        state = state_snapshot(core.fleet.replicas.values(), self._waiting())
        migrating = {
            entry.request_id
            for book in core.books.values()
            for entry in book.entries()
            if entry.migrating_to is not None
        }
        return {
            "time": time.time(),
            "policy": core.scheduler.policy_name,
            "models": list(core.llms),
            "lower_bound": core.scheduler.lower_bound(),
            "queued": len(state["queued"]),
            "gpus": gpu_views(state, migrating),
            "rates": self._activity.rates(now),
            "history": self._activity.history(now),
            "moves": list(self._moves),
        }

    def _sample(self) -> None:
        queued: collections.Counter[str] = collections.Counter()
        migrating: collections.Counter[str] = collections.Counter()
        for model, book in self._core.books.items():
            for entry in book.entries():
                queued[model] += entry.replica_id is None
                migrating[model] += entry.migrating_to is not None
        bound = self._core.scheduler.lower_bound()
        gpus = self._gpus()
        self._meter.sample(gpus, bound, queued, migrating)
        self._activity.point(
            time.monotonic(),
            open_gpus=sum(gpu.state not in NOT_HELD for gpu in gpus),
            used=sum(gpu.running + gpu.waiting > 0 for gpu in gpus),
            lower_bound=bound,
        )

    def _gpus(self) -> list[GpuSample]:
        states = {gpu.id: gpu.state for gpu in self._core.scheduler.gpus()}
        samples = []
        for replica in self._core.fleet.replicas.values():
            stats = replica.report.stats if replica.report else None
            running, waiting = (stats.running, stats.waiting) if stats else (0, 0)
            state: str = replica.state
            if state == "ready":
                state = "active" if running + waiting else "idle"
                if states.get(replica.replica_id) == "cordoned":
                    state = "cordoned"
            samples.append(GpuSample(replica.model_id, state, running, waiting))
        return samples
