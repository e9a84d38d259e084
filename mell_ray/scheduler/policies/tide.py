"""TIDE, the default: pack tightly, pay for voluntary moves out of what idle GPUs have cost.

Placement is best fit with headroom, or even where GPUs hold many small requests; a request that
fits nowhere may displace smaller ones before a GPU is opened. Growth that no longer fits sheds the
smallest sufficient request. Once an epoch, and at each report after requests have ended, whole GPUs
are emptied, best fit decreasing with up to two chains of ejections, paid out of a *bank*: the
GPU-seconds that superfluous GPUs have cost so far, divided by the price of a moved unit (ski
rental). The headroom that growth needs is found by feedback.

Guarantees:

* Migration budget: price x units moved by consolidation <= integral of superfluous GPUs over time,
  by construction (``Tide.spent <= Tide.earned``). Superfluous are the most GPUs whose load fits
  into the room of the others, but no GPU that is kept anyway. So consolidation never spends more
  than idling has already cost.
* At price 0 and with requests of at most e x C each: if the emptiest GPU cannot be emptied, every
  other has less than e x C free under its headroom H, so GPUs < sum / ((1 - e) C - H) + 1.
* Per operation: an arrival, or a shed request, displaces at most ``chain`` (2) requests. An emptied
  GPU moves all of its own requests and at most 2 x ``chain`` others, and none at all if any of its
  requests has no place.
* Headroom settles where more of it would cost as much as it saves in moves, under the law stated in
  ``headroom``.

Sources: best fit decreasing; ski rental; size-cost recourse as in Feldkord et al. (ICALP 2018), by
which (1 + e) x OPT needs of the order of 1/e moved units per inserted or deleted one. No worst-case
ratio is claimed for requests larger than C/4. Cost: O(log B) a placement, O(log n + log B) a shed,
O(B log B) a tick, O(n log B) per GPU considered for emptying, n its requests and B the GPUs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mell_ray.scheduler.policies.base import Context, Policy
from mell_ray.scheduler.policies.draft import Draft
from mell_ray.scheduler.policies.eject import Search, make_way
from mell_ray.scheduler.policies.headroom import Headroom
from mell_ray.scheduler.state import Gpu, Request

_FINE = 16  # a small request needs less than a GPU's capacity over that
_CHUNKY = 12  # a request of a GPU's capacity over that or more is worth a search for a way
_MAX_WAYS = 2  # chains of ejections per emptied GPU


@dataclass(frozen=True)
class TideParams:
    headroom: float | None = None  # share of the capacity kept free for growth; None: found
    price: float | None = None  # GPU-seconds per moved unit; None: from the cost model
    level_from: float = 64.0  # requests per GPU from which small ones are spread evenly
    candidates: int = 8  # emptiest GPUs considered for emptying or for making room
    eject_candidates: int = 32  # emptiest GPUs considered for an ejection
    chain: int = 2  # longest chain of ejections
    make_room_s: float = 1.0  # GPU-seconds that a displacement for an arrival may cost

    def __post_init__(self) -> None:
        if self.headroom is not None and not 0 <= self.headroom < 1:
            raise ValueError(f"headroom must be a share from 0 to 1, not {self.headroom}")
        if self.price is not None and self.price < 0:
            raise ValueError(f"price must be at least 0, not {self.price}")
        if self.candidates < 1 or self.eject_candidates < 0:
            raise ValueError("candidates must be at least 1, eject_candidates at least 0")


class Tide(Policy):
    name = "tide"
    Params = TideParams
    eager = True
    params: TideParams

    def __init__(self, context: Context, params: Mapping[str, Any]) -> None:
        super().__init__(context, params)
        self.bank = 0.0  # GPU-seconds that may be spent on emptying GPUs
        self.earned = 0.0  # integral of superfluous GPUs
        self.spent = 0.0  # price x units moved by consolidation
        self.headroom = Headroom(self.params.headroom)
        self._superfluous_now = 0  # at the last tick
        self._fine_grained = False  # whether GPUs hold many requests, at the last tick
        self._hopeless = -1, 0  # (state of the pool, need) for which no way was found

    def price(self) -> float:
        """GPU-seconds per moved unit."""
        return self.context.price() if self.params.price is None else self.params.price

    # --- placement -------------------------------------------------------------------------

    def place(self, request: Request) -> Gpu | None:
        pool = self.pool
        some_room = pool.most_room() >= request.need
        gpu = self._fit(request) if some_room else None
        if gpu is None and some_room and self.headroom.units:
            gpu = pool.best_fit(request, used=True)
        if gpu is None and self.context.may_move and not self._idle_for_free():
            gpu = self._make_room(request, "make-room")
        if gpu is None and some_room:
            gpu = pool.best_fit(request)
        return gpu

    def _fit(self, request: Request) -> Gpu | None:
        """Best fit with headroom; where requests are many and small, the emptiest GPU but the last
        few instead.

        Small requests leave no gaps wherever they are. Filling one GPU to the brim with them
        would only make growth overflow there; filling all alike but those that are to be emptied
        next does not.
        """
        if self._fine_grained and request.need * _FINE < self.pool.capacity:
            gpu = self.pool.roomiest(request, self._superfluous_now + 1, self.headroom.units)
            if gpu is not None:
                return gpu
        return self.pool.best_fit(request, self.headroom.units, used=True)

    def _idle_for_free(self) -> bool:
        """Whether GPUs stand idle that are paid for anyway: filling one costs nothing."""
        return self.pool.num_used < min(self.context.kept(), len(self.pool.keys))

    def _make_room(self, request: Request, reason: str) -> Gpu | None:
        """Displace smaller requests if that is worth a GPU not opened; returns where there is
        room then."""
        pool = self.pool
        frees, need = self._hopeless
        if frees == pool.frees and request.need >= need:
            return None  # less has been tried in vain, and no room has been freed since
        price = self.price()
        budget = self.params.make_room_s / price if price > 0 else float("inf")
        if request.need * _CHUNKY < pool.capacity:  # small: one of the emptiest has room, or none
            search = Search(self.params.candidates, 1, 0)
        else:
            search = Search(self.params.eject_candidates, self.params.chain, 0)
        way = make_way(Draft(pool), request, search, budget)
        if way is None:
            self._hopeless = pool.frees, request.need
            return None
        draft, gpu = way
        draft.commit(reason)
        return gpu

    # --- overflow --------------------------------------------------------------------------

    def shed(self, gpu: Gpu) -> int:
        while gpu.room() < 0 and len(gpu.requests) > 1:
            if not gpu.movable():
                return 0
            victim, target = self._victim(gpu)
            if target is None:
                return victim.need
            self.headroom.shed(victim.need)
            self.pool.assign(victim, target, "overflow")
        return 0

    def _victim(self, gpu: Gpu) -> tuple[Request, Gpu | None]:
        """Whom to shed, and where to: of the six smallest that suffice, the first that fits
        elsewhere with headroom; else the smallest."""
        movable = gpu.movable()
        first = bisect_left(gpu.movable_needs(), -gpu.room())
        enough = movable[first : first + 6] or movable[-1:]
        for victim in enough:
            target = self._fit(victim)
            if target is not None:
                return victim, target
        victim = enough[0]
        target = self.pool.best_fit(victim, used=True)
        if target is None:
            target = self._make_room(victim, "overflow")
        return victim, target or self.pool.best_fit(victim)

    # --- consolidation ---------------------------------------------------------------------

    def tick(self, elapsed_s: float) -> None:
        used = self.pool.used()
        capacity = self.pool.capacity
        self.headroom.tick(elapsed_s, len(used), capacity, self.price())
        requests = sum(len(gpu.requests) for gpu in used)
        self._fine_grained = requests >= self.params.level_from * max(1, len(used))
        superfluous = min(self._superfluous(used), max(0, len(used) - self.context.kept()))
        self._superfluous_now = superfluous
        if not superfluous:
            self.bank = 0.0
            return
        self.bank += superfluous * elapsed_s
        self.earned += superfluous * elapsed_s
        price = self.price()
        while superfluous > 0:
            draft = self._cheapest_evacuation(price)
            if draft is None:
                break
            draft.commit("consolidate")
            self.bank -= price * draft.moved
            self.spent += price * draft.moved
            superfluous -= 1
        self.bank = min(self.bank, 2 * price * capacity + elapsed_s)

    def _superfluous(self, used: list[Gpu]) -> int:
        """The most GPUs whose whole load fits, as if it were liquid, into the others' room."""
        reserve = self.headroom.units
        rest = sum(gpu.capacity - reserve - gpu.load for gpu in used)
        count, liquid = 0, 0
        for gpu in reversed(used):
            liquid += gpu.load
            rest -= gpu.capacity - reserve - gpu.load
            if liquid > rest:
                break
            count += 1
        return min(count, max(0, len(used) - 1))

    def _cheapest_evacuation(self, price: float) -> Draft | None:
        """The plan that empties a GPU for the fewest moved units, if the bank can pay it."""
        best: tuple[int, Draft] | None = None
        budget = self.bank / price if price > 0 else float("inf")
        for node_load, gpu in self._candidates():
            if gpu.load > budget:
                continue
            if best is not None and (node_load, gpu.load) >= (best[0], best[1].moved):
                continue
            draft = self._evacuation(gpu, budget)
            if draft is None or draft.moved > budget:
                continue
            if best is None or (node_load, draft.moved) < (best[0], best[1].moved):
                best = node_load, draft
        return best[1] if best is not None else None

    def _candidates(self) -> list[tuple[int, Gpu]]:
        """(requests on the rest of its node, GPU): first those whose node empties first."""
        pool = self.pool
        if not pool.by_node:
            return [(0, gpu) for gpu in pool.emptiest(self.params.candidates)]
        rated = [(pool.by_node[g.node] - len(g.requests), g) for g in pool.used()]
        rated.sort(key=lambda entry: (entry[0], entry[1].load, entry[1].slot))
        return rated[: self.params.candidates]

    def _evacuation(self, gpu: Gpu, budget: float) -> Draft | None:
        """A plan that empties ``gpu`` into the others, largest request first; None: there is
        none."""
        movable = gpu.movable()
        if len(movable) < len(gpu.requests):
            return None
        draft = Draft(self.pool, leaving=gpu)
        search = Search(self.params.eject_candidates, self.params.chain, self.headroom.units)
        ways = 0
        for request in reversed(movable):
            target = draft.best_fit(request, search.reserve)
            if target is None:
                ways += 1
                if ways > _MAX_WAYS or request.need * _CHUNKY < self.pool.capacity:
                    return None
                way = make_way(draft, request, search, budget - draft.moved)
                if way is None:
                    return None
                draft, target = way
            draft.move(request, target)
        return draft
