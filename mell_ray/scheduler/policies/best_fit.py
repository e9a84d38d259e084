"""Best fit; with ``consolidate`` its consolidating form (best fit + drain).

Places each request on the GPU with the least room that suffices. An overfull GPU gives up the
smallest request that suffices. With ``consolidate`` the emptiest GPU is emptied as a whole when it
is less full than ``below`` and has been so for ``patience_s`` and for as long as the moves cost, if
all its requests fit elsewhere.

Guarantees (literature): without moves best fit uses at most 1.7 x OPT + 2 GPUs while requests only
arrive; with departures its GPU-seconds have no bound (MinUsageTime dynamic bin packing, Li, Tang
and Cai), as it keeps stragglers. Consolidation removes stragglers and adds no worst-case bound.
Per operation: at most one placement; a drained GPU is drained whole, once per tick at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mell_ray.scheduler.policies.base import Context, Policy
from mell_ray.scheduler.policies.draft import Draft
from mell_ray.scheduler.state import Gpu, Request


@dataclass(frozen=True)
class BestFitParams:
    consolidate: bool = False
    below: float = 0.5  # share of its capacity under which a GPU is drained
    patience_s: float = 10.0  # how long it must have been emptier than that

    def __post_init__(self) -> None:
        if not 0 <= self.below <= 1:
            raise ValueError(f"below must lie between 0 and 1, not {self.below}")
        if self.patience_s < 0:
            raise ValueError(f"patience_s must be at least 0, not {self.patience_s}")


class BestFit(Policy):
    name = "best-fit"
    Params = BestFitParams
    params: BestFitParams

    def __init__(self, context: Context, params: Mapping[str, Any]) -> None:
        super().__init__(context, params)
        self._low_s: dict[Gpu, float] = {}  # how long a GPU has been emptier than `below`

    def place(self, request: Request) -> Gpu | None:
        return self.pool.best_fit(request)

    def tick(self, elapsed_s: float) -> None:
        if not self.params.consolidate or not self.context.may_move:
            return
        patience: dict[Gpu, float] = {}
        for gpu in self.pool.used():
            if gpu.load < self.params.below * gpu.capacity:
                patience[gpu] = self._low_s.get(gpu, 0.0) + elapsed_s
        self._low_s = patience
        patient = [
            gpu
            for gpu, low_s in patience.items()
            if low_s >= self.params.patience_s and self.context.pays(gpu.load, low_s)
        ]
        nodes = self.pool.by_node
        for gpu in sorted(patient, key=lambda g: (nodes.get(g.node, 0), g.load, g.slot)):
            if drain(self, gpu):
                del patience[gpu]
                return


def drain(policy: Policy, gpu: Gpu) -> bool:
    """Plan every request of ``gpu`` onto other used GPUs, best fit decreasing; all or none."""
    movable = gpu.movable()
    if not movable or len(movable) < len(gpu.requests):
        return False
    draft = Draft(policy.pool, leaving=gpu)
    for request in reversed(movable):
        target = draft.best_fit(request, 0)
        if target is None:
            return False
        draft.move(request, target)
    draft.commit("consolidate")
    return True
