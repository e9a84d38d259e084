"""Lower bounds never exceed what an exhaustive search finds, and are sharp where they should be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mell_ray.scheduler.bounds import lower_bound, martello_toth_l2, volume_bound


def optimum(sizes: list[int], capacity: int) -> int:
    """Fewest bins, by branch and bound."""
    ordered = sorted(sizes, reverse=True)
    best = len(ordered)

    def place(index: int, bins: list[int]) -> None:
        nonlocal best
        if len(bins) >= best:
            return
        if index == len(ordered):
            best = len(bins)
            return
        tried = set()
        for position, load in enumerate(bins):
            if load + ordered[index] <= capacity and load not in tried:
                tried.add(load)
                bins[position] += ordered[index]
                place(index + 1, bins)
                bins[position] -= ordered[index]
        place(index + 1, [*bins, ordered[index]])

    place(0, [])
    return best


def brute_force_l2(sizes: list[int], capacity: int) -> int:
    """L2 by its definition, every threshold tried."""
    best = 0
    for threshold in range(capacity // 2 + 1):
        first = [s for s in sizes if s > capacity - threshold]
        second = [s for s in sizes if capacity / 2 < s <= capacity - threshold]
        third = [s for s in sizes if threshold <= s <= capacity / 2]
        rest = sum(third) - (len(second) * capacity - sum(second))
        best = max(best, len(first) + len(second) + max(0, -(-rest // capacity)))
    return best


@given(st.lists(st.integers(1, 30), max_size=9), st.integers(30, 45))
def test_bounds_are_bounds_and_l2_is_l2(sizes: list[int], capacity: int) -> None:
    bound = martello_toth_l2(sizes, capacity)
    assert volume_bound(sizes, capacity) <= bound <= optimum(sizes, capacity)
    assert bound == brute_force_l2(sizes, capacity)
    assert lower_bound(sizes, capacity) == bound


def test_l2_sees_what_volume_does_not() -> None:
    assert volume_bound([51] * 4, 100) == 3
    assert martello_toth_l2([51] * 4, 100) == 4
    assert martello_toth_l2([60, 60, 41, 41], 100) == 3
    assert martello_toth_l2([], 100) == 0
