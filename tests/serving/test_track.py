"""Exactly-once at the ingress: forged deltas are refused and counted."""

from __future__ import annotations

import pytest

from mell_ray.serving.track import Track


def delta(generation: int, index: int, tokens: list[int], finish: str | None = None):
    return ("r", generation, index, tokens, None, finish, None)


@pytest.fixture
def track() -> Track:
    track = Track("r", "a", 1)
    assert track.accept("a", delta(1, 0, [1, 2])) is not None
    assert track.accept("a", delta(1, 2, [3])) is not None
    return track


def test_hand_over_repeats_everything_and_nothing_is_counted(track: Track) -> None:
    accepted = track.accept("b", delta(2, 0, [1, 2, 3, 4]))
    assert accepted is not None
    assert accepted.token_ids == [4]
    assert track.accept("a", delta(1, 2, [3])) is None  # late, and the same
    assert track.accept("b", delta(2, 4, [5], "length")) is not None
    assert track.accept("a", delta(1, 2, [3])) is None  # later still
    assert track.token_ids == [1, 2, 3, 4, 5]
    assert track.violations == 0


@pytest.mark.parametrize(
    ("sender", "forged", "kind"),
    [
        ("b", delta(1, 3, [4]), "second-emitter"),
        ("a", delta(1, 5, [9]), "gap"),
        ("a", delta(1, 1, [2, 3]), "regression"),
        ("a", delta(1, 2, [7]), "regression"),
        ("a", delta(0, 1, [8]), "divergence"),
    ],
)
def test_forged_delta_is_counted_and_changes_nothing(track, sender, forged, kind) -> None:
    track.accept(sender, forged)
    assert track.token_ids == [1, 2, 3]
    assert (track.violations, track.last_violation) == (1, kind)


def test_old_owner_that_goes_on_with_other_tokens_is_counted(track: Track) -> None:
    track.accept("b", delta(2, 0, [1, 2, 3, 4]))
    assert track.accept("a", delta(1, 3, [9])) is None
    assert track.token_ids == [1, 2, 3, 4]
    assert (track.violations, track.last_violation) == (1, "divergence")


def test_recovery_goes_on_where_the_client_stands(track: Track) -> None:
    track.take_over("c", 2)
    accepted = track.accept("c", delta(2, 3, [4]))
    assert accepted is not None
    assert accepted.token_ids == [4]
    assert track.violations == 0


def test_stall_is_the_gap_around_the_hand_over(track: Track) -> None:
    assert track.came(10.0) is None
    for at in (10.1, 10.2, 10.3):
        assert track.came(at) is None
    track.accept("b", delta(2, 0, [1, 2, 3, 4]))
    stall = track.came(10.55)
    assert stall is not None
    assert (stall.request_id, stall.generation) == ("r", 2)
    assert stall.seconds == pytest.approx(0.25)
    assert stall.median_gap_s == pytest.approx(0.1)
    assert track.came(10.6) is None
