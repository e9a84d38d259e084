"""Making room for a request by sending smaller ones elsewhere: ejection chains.

A chain is: the request goes to a GPU from which a smaller one goes to a GPU from which a still
smaller one goes ... to a GPU that has room for it.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from mell_ray.scheduler.policies.draft import Draft
from mell_ray.scheduler.state import Gpu, Request

_BRANCHES = 4  # GPUs tried at each link of a chain but the last


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
    if depth < 2:
        return None
    best: tuple[Draft, Gpu] | None = None
    rooms = [room - search.reserve for room, _ in draft.emptiest(depth + 1)]
    if request.need > sum(rooms):
        return None  # each link adds at most one GPU's room
    for room, gpu in draft.emptiest(_BRANCHES):
        ejected = _smallest_that_helps(draft, request, room - search.reserve, gpu, budget)
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


def _last_link(
    draft: Draft, request: Request, search: Search, budget: float
) -> tuple[Request, Gpu] | None:
    """The smallest request that can leave for a GPU with room and suffices: (it, that GPU)."""
    best: tuple[Request, Gpu] | None = None
    emptiest = draft.emptiest(search.width)
    if len(emptiest) < 2:
        return None
    most, second = emptiest[0][0] - search.reserve, emptiest[1][0] - search.reserve
    for index, (room, gpu) in enumerate(emptiest):
        if request.need - room + search.reserve > (most if index else second):
            if index:
                break  # whoever has to leave here, or from a fuller GPU, fits nowhere
            continue
        ejected = _smallest_that_helps(draft, request, room - search.reserve, gpu, budget)
        if ejected is None:
            continue
        target = draft.best_fit(ejected, search.reserve)
        if target is not None:
            best = ejected, target
            budget = ejected.need - 1
    return best


def _smallest_that_helps(
    draft: Draft, request: Request, room: int, gpu: Gpu, budget: float
) -> Request | None:
    """The smallest request of the GPU, smaller than ``request``, whose leaving makes ``room``
    suffice."""
    missing = request.need - room
    if missing <= 0 or missing > budget or missing >= request.need:
        return None
    needs = gpu.movable_needs()
    for index in range(bisect_left(needs, missing), len(needs)):
        if needs[index] >= request.need or needs[index] > budget:
            return None
        ejected = gpu.movable()[index]
        if ejected not in draft.moves:
            break
    else:
        return None
    return None if gpu is request.plan or gpu.id in request.exclude else ejected
