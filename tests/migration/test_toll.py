"""What migrations take from others is paid off by resting, and only that."""

from __future__ import annotations

import pytest

from mell_ray.migration.toll import Toll

STEP_S = 0.02


def calm(toll: Toll, num_decoding: int = 4, steps: int = 200) -> None:
    for _ in range(steps):
        toll.stepped(num_decoding, STEP_S, moving=False, others=True)


def test_held_time_is_paid_off_at_the_share() -> None:
    toll = Toll(0.05, now=0.0)
    toll.held(0.010)
    assert toll.rest_s(0.0) == pytest.approx(0.2)
    assert toll.rest_s(0.15) == pytest.approx(0.05)
    assert toll.rest_s(1.0) == 0.0
    toll.held(0.010)
    assert toll.rest_s(1.0) == pytest.approx(0.2), "time without a debt is no credit"


def test_steps_that_take_longer_beside_a_migration_count() -> None:
    toll = Toll(0.05, now=0.0)
    calm(toll)
    for seconds in (0.024, 0.018, 0.026):
        toll.stepped(4, seconds, moving=True, others=True)
    assert toll.rest_s(0.0) == pytest.approx(0.008 / 0.05)
    calm(toll)
    assert toll.rest_s(0.0) == pytest.approx(0.008 / 0.05), "still owed once the migration is over"


def test_steps_of_another_size_are_not_compared() -> None:
    toll = Toll(0.05, now=0.0)
    calm(toll, num_decoding=3)
    toll.stepped(4, 10 * STEP_S, moving=True, others=True)
    assert toll.rest_s(0.0) == 0.0


def test_a_request_that_decodes_alone_disturbs_nobody() -> None:
    toll = Toll(0.05, now=0.0)
    calm(toll, num_decoding=1)
    toll.stepped(1, 2 * STEP_S, moving=True, others=False)
    assert toll.rest_s(0.0) == 0.0


def test_a_fast_migration_earns_nothing() -> None:
    toll = Toll(0.05, now=0.0)
    calm(toll)
    toll.stepped(4, STEP_S / 2, moving=True, others=True)
    calm(toll, steps=1)
    toll.held(0.001)
    assert toll.rest_s(0.0) == pytest.approx(0.02)


def test_without_limit_nobody_rests() -> None:
    toll = Toll(1.0, now=0.0)
    toll.held(1.0)
    assert toll.rest_s(0.0) == 0.0
