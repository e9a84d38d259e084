"""Deltas from several replicas, in any interleaving, reach the client exactly once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mell_ray.serving.track import Track


def delta(generation: int, index: int, tokens: list[int], finish: str | None = None):
    return ("r", generation, index, tokens, None, finish, None)


@st.composite
def runs(draw):
    """A request that moves several times: each owner's stream of deltas, hand-over first."""
    total = draw(st.integers(1, 40))
    tokens = list(range(100, 100 + total))
    cuts = sorted(draw(st.lists(st.integers(0, total), max_size=4)))
    streams, start = [], 0
    for generation, end in enumerate([*cuts, total], start=1):
        stream = []
        if generation > 1:
            stream.append(delta(generation, 0, tokens[:start]))
        at = start
        while at < end:
            step = draw(st.integers(1, end - at))
            stream.append(delta(generation, at, tokens[at : at + step]))
            at += step
        streams.append(stream)
        start = end
    last = streams[-1]
    if last:
        last[-1] = (*last[-1][:5], "length", None)
    else:
        last.append(delta(1, total, [], "length"))
    return tokens, streams


@given(runs(), st.randoms(use_true_random=False))
def test_every_token_exactly_once_in_order(run, random) -> None:
    """Each replica's stream keeps its order; the streams interleave freely, but an owner's first
    delta exists only once its predecessor has produced everything."""
    tokens, streams = run
    track = Track("r", "replica-1", 1)
    received: list[int] = []
    queues = [list(stream) for stream in streams]
    while any(queues):
        which = random.choice([i for i, queue in enumerate(queues) if queue])
        accepted = track.accept(f"replica-{which + 1}", queues[which].pop(0))
        if accepted is not None:
            received += accepted.token_ids
    assert received == tokens
    assert track.token_ids == tokens
    assert track.finished
    assert track.violations == 0


def test_stale_owner_is_refused_and_told_apart_from_a_late_one() -> None:
    track = Track("r", "a", 1)
    track.accept("a", delta(1, 0, [1, 2]))
    track.take_over("b", 2)
    late, ahead = delta(1, 1, [2]), delta(1, 2, [3])
    assert track.accept("a", late) is None
    assert not track.is_ahead(late)
    assert track.accept("a", ahead) is None
    assert track.is_ahead(ahead)
    assert track.token_ids == [1, 2]
    assert track.violations == 0


def test_two_replicas_with_one_generation_are_a_violation() -> None:
    track = Track("r", "a", 1)
    track.accept("a", delta(1, 0, [1]))
    assert track.accept("b", delta(1, 1, [2])) is None
    assert track.violations == 1
    assert track.token_ids == [1]


def test_gap_is_a_violation() -> None:
    track = Track("r", "a", 1)
    assert track.accept("a", delta(1, 3, [4])) is None
    assert track.violations == 1


def test_logprobs_stay_beside_their_tokens_across_a_hand_over() -> None:
    track = Track("r", "a", 1)
    track.accept("a", ("r", 1, 0, [1, 2], [(-1.0, ()), (-2.0, ())], None, None))
    accepted = track.accept(
        "b", ("r", 2, 0, [1, 2, 3], [(-1.0, ()), (-2.0, ()), (-3.0, ())], None, None)
    )
    assert accepted is not None
    assert accepted.token_ids == [3]
    assert accepted.logprobs is not None
    assert [item.logprob for item in accepted.logprobs] == [-3.0]
    assert [item.logprob for item in track.logprobs] == [-1.0, -2.0, -3.0]
