"""Making room for a request by sending smaller ones elsewhere: ejection chains.

A chain is: the request goes to a GPU from which a smaller one goes to a GPU from which a still
smaller one goes ... to a GPU that has room for it.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from operator import attrgetter

from mell_ray.scheduler.policies.draft import Draft
from mell_ray.scheduler.state import Gpu, Request

_need = attrgetter("need")
_BRANCHES = 6  # GPUs tried at each link of a chain but the last


@dataclass(frozen=True, slots=True)
class Search:
    """Limits of a search for a chain."""

    width: int  # emptiest GPUs looked at for the last link
    depth: int  # longest chain
    reserve: int  # stays free on every GPU that takes something


def make_way(
    draft: Draft, request: Request, search: Search, budget: float, depth: int | None = None
) -> tuple[Draft, Gpu] | None:
    """The cheapest chain found that moves at most ``budget`` units and makes room for ``request``.

    Returns a draft with its moves added, and the GPU that then has the room; ``draft`` itself
    stays as it is. None: no such chain was found.
    """
    depth = search.depth if depth is None else depth
    if depth < 1 or budget < 1:
        return None
    last = _last_link(draft, request, search, budget)
    if last is not None:
        leaving, target = last
        assert leaving.plan is not None
        found = draft.copy()
        found.move(leaving, target)
        return found, leaving.plan
    best: tuple[Draft, Gpu] | None = None
    if depth < 2:
        return None
    for gpu in draft.emptiest(_BRANCHES):
        ejected = _smallest_that_helps(draft, request, gpu, search, budget)
        if ejected is None:
            continue
        trial = draft.copy()
        trial.hold(gpu, request.need)
        way = make_way(trial, ejected, search, budget - ejected.need, depth - 1)
        if way is None:
            continue
        trial, target = way
        trial.move(ejected, target)
        trial.hold(gpu, -request.need)
        if best is None or trial.moved < best[0].moved:
            best = trial, gpu
            budget = trial.moved - draft.moved - 1
    return best


def _candidates(
    draft: Draft, request: Request, gpu: Gpu, search: Search, budget: float
) -> tuple[list[Request], int]:
    """(requests of the GPU by size, position of the first whose leaving suffices)."""
    missing = request.need + search.reserve - draft.room(gpu)
    movable = gpu.movable()
    if missing <= 0 or missing > budget or gpu is request.plan or gpu.id in request.exclude:
        return movable, len(movable)
    return movable, bisect_left(movable, missing, key=_need)


def _smallest_that_helps(
    draft: Draft, request: Request, gpu: Gpu, search: Search, budget: float
) -> Request | None:
    movable, first = _candidates(draft, request, gpu, search, budget)
    for index in range(first, len(movable)):
        ejected = movable[index]
        if ejected.need >= request.need or ejected.need > budget:
            return None
        if not draft.touched(ejected):
            return ejected
    return None


def _last_link(
    draft: Draft, request: Request, search: Search, budget: float
) -> tuple[Request, Gpu] | None:
    """The smallest request that can leave for a GPU with room and suffices: (it, that GPU)."""
    best: tuple[Request, Gpu] | None = None
    for gpu in draft.emptiest(search.width):
        limit = budget if best is None else min(budget, best[0].need - 1)
        ejected = _smallest_that_helps(draft, request, gpu, search, limit)
        if ejected is None:
            continue
        target = draft.best_fit(ejected, search.reserve)
        if target is not None:
            best = ejected, target
    return best
