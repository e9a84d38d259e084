"""What is known of a migration once it has ended, and of all of them together. Pure."""

from __future__ import annotations

import collections
from dataclasses import asdict, dataclass, field
from typing import Any

from mell_ray.migration.types import MigrationResult

REMEMBERED = 1000


@dataclass(slots=True)
class MigrationRecord:
    """One migration. ``stall_s`` and ``stall_gaps`` come later, from the request's ingress."""

    result: MigrationResult
    # Between the client's last token from the source and its first from the target, in seconds,
    # and as a multiple of the median gap between that request's tokens. None: not (yet) told.
    stall_s: float | None = None
    stall_gaps: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As the operator API shows it."""
        result, order = self.result, self.result.order
        return {
            "id": order.migration_id,
            "request": order.request_id,
            "from": order.src,
            "to": order.dst,
            "mode": order.mode,
            "transport": result.transport or None,
            "fallbacks": result.fallbacks,
            "reason": order.reason,
            "outcome": result.outcome,
            "detail": result.detail,
            "stages": result.stages,
            "bytes": result.bytes,
            "tokens": result.tokens,
            "cached_tokens": result.cached_tokens,
            "generation": result.generation,
            "seconds": round(result.seconds, 6),
            "freeze_seconds": round(result.freeze_s, 6),
            "stall_seconds": None if self.stall_s is None else round(self.stall_s, 6),
            "stall_gaps": None if self.stall_gaps is None else round(self.stall_gaps, 3),
            "finished_at": result.finished_at,
        }


@dataclass(slots=True)
class Totals:
    """Sums over migrations of one mode."""

    committed: int = 0
    aborted: int = 0
    gone: int = 0
    fallbacks: int = 0
    bytes: int = 0
    tokens: int = 0  # that were computed or sent; those the target had cached do not count
    stages: int = 0
    seconds: float = 0.0
    freeze_seconds: float = 0.0
    stall_seconds: float = 0.0
    stalls: int = 0  # migrations whose stall an ingress has told


@dataclass(slots=True)
class MigrationLog:
    """The most recent migrations, and totals by mode of all there have been."""

    totals: dict[str, Totals] = field(default_factory=dict)
    _recent: collections.deque[MigrationRecord] = field(
        default_factory=lambda: collections.deque(maxlen=REMEMBERED)
    )
    # The ingress may see a hand-over before the migration's result is in.
    _early: collections.OrderedDict[tuple[str, int], tuple[float, float]] = field(
        default_factory=collections.OrderedDict
    )

    def add(self, result: MigrationResult) -> None:
        self._recent.append(MigrationRecord(result))
        total = self.totals.setdefault(result.order.mode, Totals())
        setattr(total, result.outcome, getattr(total, result.outcome) + 1)
        total.fallbacks += result.fallbacks
        total.bytes += result.bytes
        total.tokens += max(0, result.tokens - result.cached_tokens)
        total.stages += result.stages
        total.seconds += result.seconds
        total.freeze_seconds += result.freeze_s
        early = self._early.pop((result.order.request_id, result.generation), None)
        if early is not None:
            self.stalled(result.order.request_id, result.generation, *early)

    def stalled(
        self, request_id: str, generation: int, seconds: float, median_gap_s: float
    ) -> MigrationRecord | None:
        """The ingress has seen the hand-over. None: that migration is not known, or not yet."""
        for record in reversed(self._recent):
            result = record.result
            if result.order.request_id == request_id and result.generation == generation:
                record.stall_s = seconds
                record.stall_gaps = seconds / median_gap_s if median_gap_s > 0 else None
                total = self.totals[result.order.mode]
                total.stall_seconds += seconds
                total.stalls += 1
                return record
        self._early[request_id, generation] = seconds, median_gap_s
        if len(self._early) > REMEMBERED:
            self._early.popitem(last=False)
        return None

    def recent(self) -> list[dict[str, Any]]:
        """Oldest first."""
        return [record.to_dict() for record in self._recent]

    def totals_dict(self) -> dict[str, dict[str, Any]]:
        return {mode: asdict(total) for mode, total in self.totals.items()}
