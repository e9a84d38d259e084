"""Models that wait for each other's GPUs take turns.

A GPU on which nothing runs is given up at once when another model waits for a place. Where all are
in use, the one that is least so, of those that have been there for a turn, takes nothing new; what
still runs there a turn later waits until its model's own next turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mell_ray.scheduler.events import Decision
from mell_ray.scheduler.state import Gpu

if TYPE_CHECKING:
    from mell_ray.scheduler.ledger import Ledger


class Turns:
    """Of all models of a scheduler."""

    def __init__(self, ledgers: Mapping[str, Ledger], turn_s: float) -> None:
        self._ledgers = ledgers
        self._turn_s = turn_s
        self._told: dict[str, int] = {}
        self._waiting: dict[str, int] = {}  # of those, the ones with demand
        self._came: dict[Gpu, float] = {}  # when a GPU was first seen
        self._yielding: dict[Gpu, float] = {}  # since when

    def update(self, waiting: Mapping[str, int]) -> None:
        """How many GPUs of which model wait for a place."""
        self._told = dict(waiting)
        self._weigh()

    def _weigh(self) -> None:
        """A model for which no request waits, and that only keeps something ready, takes nothing
        from others."""
        self._waiting = {
            model: count
            for model, count in self._told.items()
            if count > 0 and len(self._ledgers[model].line)
        }
        for model, ledger in self._ledgers.items():
            ledger.fleet.contended = any(other != model for other in self._waiting)

    def tick(self, now: float, out: list[Decision]) -> None:
        """Once per planning epoch."""
        self._weigh()
        gpus = [gpu for ledger in self._ledgers.values() for gpu in ledger.pool.gpus.values()]
        self._came = {gpu: self._came.get(gpu, now) for gpu in gpus}
        self._yielding = {g: since for g, since in self._yielding.items() if g in self._came}
        for gpu, since in list(self._yielding.items()):
            ledger = self._ledgers[gpu.pool.model]
            if not ledger.fleet.contended:
                del self._yielding[gpu]
                ledger.set_state(gpu, "ready", now, out)
            elif now - since >= self._turn_s:
                for request in [r for r in gpu.residents if r.dst is None]:
                    ledger.preempt(request, now, out)
                ledger.settle(out)
        for model, count in self._waiting.items():
            coming = sum(gpu.pool.model != model for gpu in self._yielding)
            if coming < count:
                self._give(model, now, out)

    def _give(self, model: str, now: float, out: list[Decision]) -> None:
        """Let the least used GPU of another model that can spare one finish."""
        spared = [
            gpu
            for gpu, came in self._came.items()
            if gpu.pool.model != model
            and gpu.state == "ready"
            and now - came >= self._turn_s
            and self._can_spare(gpu.pool.model)
        ]
        if spared:
            gpu = min(spared, key=lambda g: (len(g.residents), g.load, g.slot))
            self._yielding[gpu] = now
            self._ledgers[gpu.pool.model].set_state(gpu, "yielding", now, out)

    def _can_spare(self, model: str) -> bool:
        ledger = self._ledgers[model]
        leaving = sum(gpu.pool is ledger.pool for gpu in self._yielding)
        return ledger.fleet.total() - leaving > ledger.pool.limits.min_gpus
