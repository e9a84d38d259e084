"""First fit: each request goes to the GPU that was opened first and has room.

Guarantee: without moves its GPU-seconds are at most (mu + 3) x OPT, mu the ratio of the longest to
the shortest life of a request (MinUsageTime dynamic bin packing); the old GPUs stay full, the young
ones empty by themselves. Moves only what overflows.
"""

from __future__ import annotations

from mell_ray.scheduler.policies.base import Policy
from mell_ray.scheduler.state import Gpu, Request


class FirstFit(Policy):
    name = "first-fit"

    def place(self, request: Request) -> Gpu | None:
        need = request.need
        for gpu in self.pool.gpus.values():  # in the order in which they came
            if (
                gpu.state == "ready"
                and gpu is not request.plan
                and gpu.room() >= need
                and gpu.id not in request.exclude
            ):
                return gpu
        return None
