"""Making room for one request by sending a smaller one elsewhere."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from operator import attrgetter

from mell_ray.scheduler.policies.draft import Draft
from mell_ray.scheduler.state import Gpu, Request

_need = attrgetter("need")


def cheapest_ejection(
    draft: Draft,
    request: Request,
    candidates: Iterable[Gpu],
    reserve: int,
    largest: int,
    but: Gpu | None = None,
) -> tuple[Request, Gpu] | None:
    """The smallest request whose leaving one of ``candidates`` makes room there for ``request``.

    ``reserve`` stays free at both ends; nothing above ``largest`` units is ejected; ``but`` takes
    no part. Returns (ejected, where it goes); where ``request`` goes is the plan of the ejected.
    """
    best: tuple[Request, Gpu] | None = None
    for gpu in candidates:
        if gpu is but or gpu.id in request.exclude:
            continue
        missing = request.need + reserve - draft.room(gpu)
        if missing <= 0:
            continue
        movable = gpu.movable()
        for index in range(bisect_left(movable, missing, key=_need), len(movable)):
            ejected = movable[index]
            if ejected.need > largest or (best is not None and ejected.need >= best[0].need):
                break
            if draft.touched(ejected):
                continue
            target = draft.best_fit(ejected, reserve, but)
            if target is not None:
                best = ejected, target
            break
    return best
