"""Moves away from GPUs whose steps take longer than their target.

Packing stops at the target by itself (``Gpu.room``), but requests grow, and what is known of the
step time changes. A GPU that is over its target by more than a margin then gives requests to
others that stay within theirs.
"""

from __future__ import annotations

from mell_ray.scheduler.state import Gpu, Pool

MARGIN = 1.1  # of the target; below that a GPU is left as it is
MOVES = 4  # away from one GPU, in one epoch


def spread(pool: Pool) -> int:
    """Plan moves; the smallest requests go first, as they cost least and each makes a step
    shorter. Returns 0, or what a request needs for which no GPU has room within its target."""
    stuck = 0
    for gpu in list(pool.gpus.values()):
        if _seconds_over(gpu, MARGIN) > 0:
            stuck = max(stuck, _relieve(pool, gpu))
    return stuck


def _relieve(pool: Pool, gpu: Gpu) -> int:
    for request in list(gpu.movable())[:MOVES]:
        if len(gpu.requests) < 2 or _seconds_over(gpu, 1.0) <= 0:
            return 0
        target = pool.best_fit(request)
        if target is None:
            return request.need
        pool.assign(request, target, "balance")
    return 0


def _seconds_over(gpu: Gpu, margin: float) -> float:
    """By how much the predicted step exceeds ``margin`` times the target; negative: it does not."""
    steps = gpu.steps
    if steps is None or not steps.ready or gpu.state != "ready":
        return -1.0
    return steps.predict(len(gpu.requests), gpu.load) - margin * steps.limit_s
