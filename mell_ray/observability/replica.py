"""The metrics of one replica, recorded from the engine's own counts every half second."""

from __future__ import annotations

import time
from collections.abc import Callable

from mell_ray.engine.types import EngineStats
from mell_ray.observability.recorder import Recorder

_COUNTERS = {
    "mell_prefix_cache_query_tokens_total": "prefix_query_tokens",
    "mell_prefix_cache_hit_tokens_total": "prefix_hit_tokens",
    "mell_prefix_cache_evicted_blocks_total": "prefix_evictions",
    "mell_preemptions_total": "preemptions",
}


class ReplicaMeter:
    """Turns totals since the start of the engine into increases. ``since``: when this process took
    its GPU (``time.monotonic``)."""

    def __init__(
        self,
        recorder: Recorder,
        model: str,
        replica_id: str,
        since: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._recorder = recorder
        self._model = model
        self._replica_id = replica_id
        self._billed_until = since
        self._now = now
        self._totals = dict.fromkeys(_COUNTERS, 0)

    def sample(self, stats: EngineStats) -> None:
        """Record what has changed since the last call."""
        now = self._now()
        self._recorder.add("mell_gpu_seconds_total", now - self._billed_until, model=self._model)
        self._billed_until = now
        for name, field in _COUNTERS.items():
            total = getattr(stats, field)
            self._recorder.add(name, total - self._totals[name], model=self._model)
            self._totals[name] = total
        free = stats.capacity_blocks - stats.used_blocks - stats.cached_blocks
        blocks = {"used": stats.used_blocks, "cached": stats.cached_blocks, "free": free}
        for state, count in blocks.items():
            self._recorder.set(
                "mell_kv_blocks",
                count,
                model=self._model,
                replica=self._replica_id,
                state=state,
            )
