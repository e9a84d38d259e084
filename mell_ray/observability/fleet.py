"""The metrics of the Router: the fleet, its requests, the scheduler and its migrations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mell_ray.migration.types import MigrationResult
from mell_ray.observability.recorder import Recorder

GPU_STATES = ("starting", "active", "idle", "cordoned", "draining", "asleep", "lent")
NOT_HELD = ("starting", "asleep", "lent")
REQUEST_STATES = ("queued", "waiting", "running", "migrating")


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One GPU at one moment."""

    model: str
    state: str  # one of GPU_STATES
    running: int = 0
    waiting: int = 0


class FleetMeter:
    """Records samples that the Router takes once a second, and migrations as they end."""

    def __init__(self, recorder: Recorder, models: Iterable[str]) -> None:
        self._recorder = recorder
        self._models = tuple(models)

    def epoch(self, seconds: float) -> None:
        """One planning epoch has been carried out."""
        self._recorder.observe("mell_scheduler_epoch_seconds", seconds)

    def sample(
        self,
        gpus: Iterable[GpuSample],
        lower_bound: int,
        queued: Mapping[str, int],
        migrating: Mapping[str, int],
    ) -> None:
        """``queued`` and ``migrating``: requests by model."""
        states: Counter[tuple[str, str]] = Counter()
        running: Counter[str] = Counter()
        waiting: Counter[str] = Counter()
        for gpu in gpus:
            states[gpu.model, gpu.state] += 1
            running[gpu.model] += gpu.running
            waiting[gpu.model] += gpu.waiting
        self._recorder.set("mell_gpus_lower_bound", lower_bound)
        for model in self._models:
            for state in GPU_STATES:
                self._recorder.set("mell_gpus", states[model, state], model=model, state=state)
            moving = migrating.get(model, 0)
            counts = (
                queued.get(model, 0),
                waiting[model],
                max(0, running[model] - moving),
                moving,
            )
            for state, count in zip(REQUEST_STATES, counts, strict=True):
                self._recorder.set("mell_requests", count, model=model, state=state)

    def migrated(self, result: MigrationResult) -> None:
        """A migration has ended."""
        record, order = self._recorder, result.order
        record.add(
            "mell_migrations_total",
            1,
            mode=order.mode,
            reason=order.reason,
            outcome=result.outcome,
        )
        record.add("mell_migration_bytes_total", result.bytes, mode=order.mode)
        if result.outcome != "committed":
            return
        record.observe("mell_migration_stall_seconds", result.freeze_s, mode=order.mode)
        record.observe("mell_migration_seconds", result.seconds, mode=order.mode)
        reserve_s = max(0.0, result.seconds - result.copy_s - result.freeze_s)
        phases = {"reserve": reserve_s, "copy": result.copy_s, "hand-over": result.freeze_s}
        for phase, seconds in phases.items():
            record.observe("mell_migration_phase_seconds", seconds, mode=order.mode, phase=phase)
        record.observe("mell_migration_stages", result.stages, mode=order.mode)
        record.observe("mell_migration_size_bytes", result.bytes, mode=order.mode)
