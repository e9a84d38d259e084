"""What clients that are turned away are told."""

from __future__ import annotations

from mell_ray.serving.turnover import LONGEST_S, UNKNOWN_S, WINDOW_S, Turnover


def test_wait_follows_how_fast_the_line_moves() -> None:
    slow, fast = Turnover(), Turnover()
    for second in range(20):
        slow.left(float(second))
        for part in range(10):
            fast.left(second + part / 10)
    assert slow.wait_s(10, 20.0) == 10
    assert fast.wait_s(10, 20.0) == 1
    assert fast.wait_s(100, 20.0) == 10


def test_wait_is_bounded_and_old_departures_do_not_count() -> None:
    line = Turnover()
    assert line.wait_s(10, 0.0) == UNKNOWN_S
    line.left(0.0)
    assert line.wait_s(10_000, 50.0) == LONGEST_S
    assert line.wait_s(10, WINDOW_S + 1) == UNKNOWN_S
