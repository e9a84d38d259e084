"""Llumnix (Sun et al., OSDI 2024): freest GPU first, and pairwise rebalancing.

Freeness of a GPU is its free memory per request. Arrivals go to the freest GPU. Once per epoch GPUs
too full are paired with the freest ones and hand over one request each, if that evens them out.
The fleet shrinks when what runs would fill the rest to less than ``utilization``: the emptiest GPU
gets nothing more and its requests go to the freest others; it grows when nothing fits.

Guarantees: none on the number of GPUs; it seeks even load, not full GPUs. At most one move per
pair and epoch, beside those that empty a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mell_ray.scheduler.policies.base import Context, Policy
from mell_ray.scheduler.state import Gpu, Request


@dataclass(frozen=True)
class LlumnixParams:
    utilization: float = 0.95  # of the remaining GPUs, up to which one is taken out
    full: float = 0.95  # load from which a GPU hands requests over
    difference: float = 0.2  # of the loads of a pair, from which that is worth it

    def __post_init__(self) -> None:
        for name in ("utilization", "full", "difference"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share above 0, not {getattr(self, name)}")


class Llumnix(Policy):
    name = "llumnix"
    Params = LlumnixParams
    params: LlumnixParams

    def __init__(self, context: Context, params: Mapping[str, Any]) -> None:
        super().__init__(context, params)
        self._leaving: Gpu | None = None

    @staticmethod
    def _freeness(gpu: Gpu) -> float:
        return gpu.room() / (len(gpu.requests) + 1)

    def place(self, request: Request) -> Gpu | None:
        best: Gpu | None = None
        for gpu in self.pool.emptiest(len(self.pool.keys)):
            if gpu.room() < request.need:
                break
            usable = gpu is not request.plan and gpu is not self._leaving
            if (
                usable
                and gpu.id not in request.exclude
                and (best is None or self._freeness(gpu) > self._freeness(best))
            ):
                best = gpu
        return best if best is not None else self.pool.best_fit(request)

    def tick(self, elapsed_s: float) -> None:
        del elapsed_s
        if self.context.may_move:
            self._shrink()
            self._rebalance()

    def _shrink(self) -> None:
        used = self.pool.used()
        if self._leaving not in used:
            self._leaving = None
        load = sum(gpu.load for gpu in used)
        rest = sum(gpu.capacity for gpu in used[:-1])
        if len(used) < 2 or load > self.params.utilization * rest:
            self._leaving = None
            return
        self._leaving = used[-1] if self._leaving is None else self._leaving
        for request in list(reversed(self._leaving.movable())):
            target = self.place(request)
            if target is not None and target.requests:
                self.pool.assign(request, target, "consolidate")

    def _rebalance(self) -> None:
        used = [gpu for gpu in self.pool.used() if gpu is not self._leaving]
        full = [gpu for gpu in used if gpu.load > self.params.full * gpu.capacity]
        free = [gpu for gpu in reversed(used) if gpu not in full]
        for source, target in zip(full, free, strict=False):
            gap = source.load - target.load
            if gap < self.params.difference * source.capacity:
                return
            fitting = [r for r in source.movable() if 2 * r.need <= gap]
            if fitting:
                self.pool.assign(fitting[-1], target, "balance")
