"""Fair shares: proportional while several wait, nobody starves, nobody saves up."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mell_ray.scheduler.events import Arrive
from mell_ray.scheduler.fairness import FairShares
from tests.scheduler.world import World, make_world

SIZES = st.integers(1, 20)


class Line:
    """A server that takes one request at a time, lowest tag first."""

    def __init__(self) -> None:
        self.shares = FairShares()
        self.waiting: list[tuple[float, int, str, int]] = []
        self.served: Counter[str] = Counter()
        self.order: list[int] = []
        self._count = 0

    def arrive(self, tenant: str, weight: float, cost: int) -> int:
        self._count += 1
        tag = self.shares.arrived(tenant, weight, cost)
        self.waiting.append((tag, self._count, tenant, cost))
        return self._count

    def serve(self) -> None:
        entry = min(self.waiting)
        self.waiting.remove(entry)
        tag, number, tenant, cost = entry
        self.shares.placed(tag)
        self.served[tenant] += cost
        self.order.append(number)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=2, max_size=4),
    st.lists(SIZES, min_size=1, max_size=12),
    st.integers(0, 3),
)
def test_while_all_wait_service_is_in_proportion_to_weights(
    weights: list[float], costs: list[int], lead: int
) -> None:
    """At any moment two tenants differ by at most two requests each in service over weight."""
    line = Line()
    names = [str(i) for i in range(len(weights))]
    number = 0
    for _ in range(400):
        for name, weight in zip(names, weights, strict=True):
            while sum(entry[2] == name for entry in line.waiting) < 2 + lead:
                line.arrive(name, weight, costs[number % len(costs)])
                number += 1
        line.serve()
        normal = [line.served[name] / weight for name, weight in zip(names, weights, strict=True)]
        assert max(normal) - min(normal) <= 2 * max(costs) / min(weights) + 1e-6


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), SIZES), min_size=1, max_size=80), st.integers(1, 30))
def test_a_flood_delays_others_by_a_bounded_amount(
    mixed: list[tuple[int, int]], flood: int
) -> None:
    """A newcomer is served before all but the first of a flood that came before it."""
    line = Line()
    for _ in range(flood):
        line.arrive("flood", 1.0, 20)
    line.serve()
    newcomer = line.arrive("new", 1.0, 20)
    for tenant, cost in mixed:
        line.arrive("flood" if tenant else "other", 1.0, cost)
    while newcomer not in line.order:
        line.serve()
    assert line.served["flood"] <= 2 * 20


def test_nobody_saves_up_while_away() -> None:
    line = Line()
    for _ in range(50):
        line.arrive("busy", 1.0, 10)
        line.serve()
    for _ in range(20):
        line.arrive("back", 1.0, 10)
        line.arrive("busy", 1.0, 10)
    line.served.clear()
    for _ in range(20):
        line.serve()
    assert abs(line.served["back"] - line.served["busy"]) <= 20


def test_what_was_not_used_is_given_back() -> None:
    shares = FairShares()
    shares.arrived("a", 1.0, 100)
    shares.ended("a", 1.0, 90)
    assert shares.arrived("a", 1.0, 100) == 10


def test_many_tenants_are_not_remembered_for_ever() -> None:
    shares = FairShares()
    for number in range(20_000):
        shares.placed(shares.arrived(f"t{number}", 1.0, 1) + 2)
    assert len(shares._next) < 5_000


# --- in the scheduler ------------------------------------------------------------------------


def saturated(weights: dict[str, float], ends: int, size: int = 10) -> Counter[str]:
    """Units served of tenants that always have five requests waiting for one GPU."""
    world = make_world(max_gpus=1)
    served: Counter[str] = Counter()
    number = 0
    for _ in range(ends):
        for tenant, weight in weights.items():
            while sum(name.startswith(tenant) for name in world.waiting) < 5:
                name = f"{tenant}-{number}"
                number += 1
                world.send(Arrive(name, "m", size, size, tenant=tenant, weight=weight))
        oldest = next(iter(world.where))
        served[oldest.split("-")[0]] += size
        world.finish(oldest)
        world.scheduler.check()
    return served


@pytest.mark.parametrize("ratio", [1.0, 3.0])
def test_saturated_gpu_is_shared_by_weight(ratio: float) -> None:
    served = saturated({"small": 1.0, "large": ratio}, 800)
    assert served["large"] / served["small"] == pytest.approx(ratio, rel=0.05)


def full_world() -> World:
    """One GPU, taken by something that nobody displaces."""
    world = make_world(max_gpus=1)
    world.arrive("running", 95, priority=9)
    return world


def test_priority_comes_before_shares_and_shares_before_arrival() -> None:
    world = full_world()
    for name, tenant, priority in (("a1", "a", 0), ("a2", "a", 0), ("b1", "b", 0), ("vip", "a", 1)):
        world.send(Arrive(name, "m", 90, 90, priority, tenant=tenant))
    order = []
    while world.where:
        (name,) = world.where
        order.append(name)
        world.finish(name)
    assert order == ["running", "vip", "a1", "b1", "a2"]


def test_last_in_line_is_the_flooder_s() -> None:
    world = full_world()
    for i in range(4):
        world.send(Arrive(f"flood{i}", "m", 50, 50, tenant="flood"))
    world.send(Arrive("late", "m", 50, 50, tenant="other"))
    assert next(world.scheduler.last_in_line("m")) == "flood3"
