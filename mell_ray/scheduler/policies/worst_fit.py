"""Worst fit: load balance. Each request goes to the GPU with the most room.

What most routers do. It keeps GPUs evenly filled and step times even, and uses about 1.6 times the
GPUs that are needed; worst fit is 2-competitive for arrivals only, without a bound on GPU-seconds
when requests leave. Moves only what overflows, one request per excess.
"""

from __future__ import annotations

from mell_ray.scheduler.policies.base import Policy
from mell_ray.scheduler.state import Gpu, Request


class WorstFit(Policy):
    name = "worst-fit"

    def place(self, request: Request) -> Gpu | None:
        pool = self.pool
        for key in reversed(pool.keys):
            gpu = pool.at(key)
            if gpu.room() < request.need:
                return None
            if gpu is not request.plan and gpu.id not in request.exclude:
                return gpu
        return None
