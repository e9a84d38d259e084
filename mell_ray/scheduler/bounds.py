"""Lower bounds of bin packing: no scheduler can hold these sizes on fewer GPUs. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from itertools import accumulate


def volume_bound(sizes: Iterable[int], capacity: int) -> int:
    """ceil(sum of sizes / capacity)."""
    return -(-sum(sizes) // capacity)


def martello_toth_l2(sizes: Iterable[int], capacity: int) -> int:
    """Bound L2 of Martello and Toth (1990), never below the volume bound; O(n log n).

    For a threshold a <= C/2 the items above C - a share a GPU with none of at least a; those of
    (C/2, C - a] take one GPU each; what of [a, C/2] their free space cannot hold needs more. The
    bound for a set of items above C - a is best at the smallest threshold that gives it, so only
    a = 0 and a = C - s + 1 of each s > C/2 are tried.
    """
    ordered = sorted(sizes)
    if not ordered or ordered[-1] <= 0:
        return 0
    sums = [0, *accumulate(ordered)]
    half = bisect_right(ordered, capacity // 2)  # first item above C/2
    count = len(ordered)
    best = -(-sums[-1] // capacity)
    top = sums[-1] - sums[half]
    for index in range(half, count):
        threshold = capacity - ordered[index] + 1
        if threshold > capacity // 2:
            continue
        small = sums[half] - sums[bisect_left(ordered, threshold)]
        alone = bisect_left(ordered, ordered[index])  # first item above C - threshold
        middle = alone - half
        free = middle * capacity - (top - (sums[-1] - sums[alone]))
        best = max(best, count - half + max(0, -(-(small - free) // capacity)))
    return max(best, count - half)


def lower_bound(sizes: Iterable[int], capacity: int) -> int:
    """The better of the volume bound and L2 (which contains it)."""
    return martello_toth_l2(sizes, capacity)
