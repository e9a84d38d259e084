"""A request that moves between engines gives the tokens it would have given had it stayed."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mell_ray.engine import Engine
from mell_ray.engine.types import RequestState
from mell_ray.errors import ConflictError, InvalidRequestError, OutOfBlocksError
from tests.engine.support import EOS, Client, drain, engine, prompts, request, step

PROMPTS = prompts(10, seed=4)
LENGTH = 30
SAMPLING = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.0, "seed": 11, "top_p": 0.95, "frequency_penalty": 0.3},
}


def states(kind: str) -> list[RequestState]:
    return [
        request(f"r{i}", prompt, LENGTH, arrival_s=i, ignore_eos=True, logprobs=1, **SAMPLING[kind])
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module", params=sorted(SAMPLING))
def undisturbed(request: pytest.FixtureRequest) -> tuple[str, Client]:
    subject = engine(num_gpu_blocks_override=300)
    for state in states(request.param):
        subject.add(state)
    return request.param, drain(subject)


def same_logprobs(a: Client, b: Client) -> bool:
    return all(
        [x.logprob for x in a.logprobs[name]]
        == pytest.approx([x.logprob for x in b.logprobs[name]], abs=1e-4)
        for name in a.logprobs
    )


def move_kv(src: Engine, dst: Engine, name: str, client: Client, stages: int) -> None:
    """The protocol's happy path: copy full blocks while decoding, freeze, copy the rest, commit."""
    key = f"m-{name}-{src.peek_state(name).generation}"
    reservation = dst.reserve(key, src.peek_state(name), prefill=False)
    sent = reservation.num_cached_tokens // src.block_size
    for _ in range(stages):
        ready = src.progress(name)[1] // src.block_size
        if ready > sent:
            dst.import_blocks(key, sent, src.export_blocks(name, sent, ready - sent))
            sent = ready
        step([src, dst], client)
        if src.generation_of(name) is None:
            assert dst.cancel_reservation(key)
            return
    frozen = src.freeze(name)
    last = -(-frozen.num_computed // src.block_size)
    if last > sent:
        dst.import_blocks(key, sent, src.export_blocks(name, sent, last - sent))
    commit(src, dst, key, frozen)


def move_tokens(src: Engine, dst: Engine, name: str, client: Client, stages: int) -> None:
    key = f"m-{name}-{src.peek_state(name).generation}"
    state = src.peek_state(name)
    dst.reserve(key, state, prefill=True)
    known = state.num_tokens
    for _ in range(stages):
        step([src, dst], client)
        if src.generation_of(name) is None:
            assert dst.cancel_reservation(key)
            return
        fresh = src.tokens_of(name, known)
        dst.extend(key, fresh)
        known += len(fresh)
    commit(src, dst, key, src.freeze(name))


def commit(src: Engine, dst: Engine, key: str, frozen: RequestState) -> None:
    dst.activate(key, frozen)
    assert src.release(frozen.request_id)
    assert dst.generation_of(frozen.request_id) == frozen.generation
    for each in (src, dst):
        each.check()


@pytest.mark.parametrize("mode", ["kv", "token"])
def test_random_moves_change_no_token(undisturbed: tuple[str, Client], mode: str) -> None:
    """Any request, waiting, mid-prefill or mid-decode, under preemption on both sides."""
    kind, expected = undisturbed
    rng = random.Random(7)
    engines = [engine(num_gpu_blocks_override=70, max_num_batched_tokens=16) for _ in range(2)]
    client, moved = Client(), 0
    for state in states(kind):
        engines[0].add(state)
    while any(each.has_work() for each in engines):
        step(engines, client)
        src, dst = rng.sample(engines, 2)
        candidates = [info.request_id for info in src.sequences() if info.status != "reserved"]
        if not candidates:
            continue
        move = move_kv if mode == "kv" else move_tokens
        try:
            move(src, dst, rng.choice(candidates), client, rng.randrange(4))
            moved += 1
        except OutOfBlocksError:
            undo(engines)
    assert moved > 10
    assert client.tokens == expected.tokens
    assert client.finished == expected.finished
    assert same_logprobs(client, expected)
    assert all(each.stats().used_blocks == 0 for each in engines)


def undo(engines: list[Engine]) -> None:
    """What the protocol does when a target cannot take a request after all."""
    for each in engines:
        for info in each.sequences():
            if info.status == "frozen":
                each.thaw(info.request_id)
            if info.status == "reserved":
                for generation in range(50):
                    each.cancel_reservation(f"m-{info.request_id}-{generation}")
        each.check()


@pytest.mark.parametrize("mode", ["kv", "token"])
@pytest.mark.parametrize("steps", [0, 1, 2, 12])
def test_first_delta_tells_everything_from_the_start(mode: str, steps: int) -> None:
    """steps: 0 waiting, 1 mid-prefill, 2 the first token is out, 12 mid-decode."""
    # The first chunk ends within a block.
    src, dst = engine(max_num_batched_tokens=22), engine()
    client, seen = Client(), Client()
    prompt = PROMPTS[0][:1] * 30
    src.add(request("r", prompt, LENGTH, ignore_eos=True))
    for _ in range(steps):
        step([src], client)
    frozen = src.freeze("r")
    assert (frozen.generation, frozen.migrations) == (1, 1)
    assert not src.has_work()
    dst.reserve("m", frozen, prefill=mode == "token")
    if mode == "kv" and frozen.num_computed:
        dst.import_blocks("m", 0, src.export_blocks("r", 0, -(-frozen.num_computed // 4)))
    dst.activate("m", frozen)
    src.release("r")
    first = dst.step().deltas[0]
    assert (first.generation, first.index) == (1, 0)
    assert first.token_ids[: len(frozen.output_token_ids)] == frozen.output_token_ids
    if mode == "kv" and steps == 12:
        assert len(first.token_ids) == len(frozen.output_token_ids) + 1, "nothing is recomputed"
    seen.read([first])
    drain(dst, seen)
    alone = engine()
    alone.add(request("r", prompt, LENGTH, ignore_eos=True))
    assert seen.tokens == drain(alone).tokens


def test_thaw_goes_on_as_if_nothing_had_been() -> None:
    expected = engine()
    expected.add(request("r", PROMPTS[0], LENGTH))
    tokens = drain(expected).tokens["r"]
    subject, client = engine(), Client()
    subject.add(request("r", PROMPTS[0], LENGTH))
    for _ in range(6):
        step([subject], client)
    assert subject.freeze("r").generation == 1
    assert not subject.has_work()
    assert subject.step().deltas == []
    assert subject.generation_of("r") == 0
    subject.thaw("r")
    assert drain(subject, client).tokens["r"] == tokens


def test_freeze_and_thaw_while_waiting() -> None:
    subject = engine(max_num_seqs=1)
    subject.add(request("a", PROMPTS[0], 5))
    subject.add(request("b", PROMPTS[1], 5, arrival_s=1))
    client = Client()
    step([subject], client)
    subject.freeze("b")
    drain(subject, client)
    assert set(client.finished) == {"a"}
    subject.thaw("b")
    assert set(drain(subject, client).finished) == {"a", "b"}


def test_what_the_target_has_cached_need_not_be_sent() -> None:
    src, dst = engine(), engine()
    prompt = (PROMPTS[0] * 4)[:41]
    dst.add(request("warm", prompt, 3, ignore_eos=True))
    drain(dst)
    src.add(request("r", prompt, LENGTH, ignore_eos=True))
    client = Client()
    for _ in range(5):
        step([src], client)
    reservation = dst.reserve("m", src.peek_state("r"), prefill=False)
    assert reservation.num_cached_tokens == 40
    assert dst.reservation_progress("m") == 40
    frozen = src.freeze("r")
    last = -(-frozen.num_computed // 4)
    # Sending them all the same overwrites nothing that others share.
    dst.import_blocks("m", 0, np.zeros(10 * dst.block_nbytes, dtype=np.uint8))
    dst.import_blocks("m", 10, src.export_blocks("r", 10, last - 10))
    commit(src, dst, "m", frozen)
    expected = engine()
    expected.add(request("r", prompt, LENGTH, ignore_eos=True))
    assert drain(dst, client).tokens["r"] == drain(expected).tokens["r"]


def test_released_blocks_stay_in_the_prefix_cache() -> None:
    src, dst = engine(), engine()
    src.add(request("r", PROMPTS[0][:1] * 20, LENGTH))
    client = Client()
    for _ in range(4):
        step([src], client)
    dst.reserve("m", src.peek_state("r"), prefill=True)
    commit(src, dst, "m", src.freeze("r"))
    assert src.stats().used_blocks == 0
    assert src.stats().cached_blocks >= 5


def test_imports_may_come_in_any_order() -> None:
    src, dst = engine(), engine()
    src.add(request("r", PROMPTS[0][:1] * 22, LENGTH, ignore_eos=True))
    client = Client()
    for _ in range(3):
        step([src], client)
    dst.reserve("m", src.peek_state("r"), prefill=False)
    dst.import_blocks("m", 2, src.export_blocks("r", 2, 2))
    assert dst.reservation_progress("m") == 0
    dst.import_blocks("m", 0, src.export_blocks("r", 0, 1))
    assert dst.reservation_progress("m") == 4
    dst.import_blocks("m", 1, src.export_blocks("r", 1, 1))
    assert dst.reservation_progress("m") == 16
    assert not dst.has_work()
    # The rest never comes: it is recomputed.
    commit(src, dst, "m", src.freeze("r"))
    expected = engine()
    expected.add(request("r", PROMPTS[0][:1] * 22, LENGTH, ignore_eos=True))
    assert drain(dst, client).tokens["r"] == drain(expected).tokens["r"]


def test_a_read_only_buffer_can_be_imported() -> None:
    """Ray lends arrays out of shared memory read-only."""
    src, dst = engine(), engine()
    src.add(request("r", PROMPTS[0][:1] * 9, LENGTH))
    src.step()
    data = src.export_blocks("r", 0, 2)
    data.flags.writeable = False
    dst.reserve("m", src.peek_state("r"), prefill=False)
    dst.import_blocks("m", 0, data)
    src.freeze("r")
    dst.activate("m", src.peek_state("r"))
    assert np.array_equal(dst.export_blocks("r", 0, 2), data)


def test_blocks_lent_are_those_exported_and_stay_while_the_request_decodes_on() -> None:
    src = engine()
    src.add(request("r", PROMPTS[0][:1] * 22, LENGTH, ignore_eos=True))
    src.step()
    lent = src.lend_blocks("r", 1, 4, max_pieces=4)
    assert lent is not None
    before = src.export_blocks("r", 1, 4)
    for _ in range(5):
        src.step()
    assert np.array_equal(np.concatenate(lent), before)
    assert not any(piece.flags.writeable for piece in lent)


def test_blocks_too_scattered_to_lend_are_refused() -> None:
    src = engine(num_gpu_blocks_override=20, enable_prefix_caching=False)
    for name in ("a", "b"):
        src.add(request(name, PROMPTS[0][:1] * 4, LENGTH, ignore_eos=True))
    for _ in range(20):  # both take blocks in turn
        src.step()
    count = src.progress("a")[1] // src.block_size
    assert src.lend_blocks("a", 0, count, max_pieces=1) is None
    lent = src.lend_blocks("a", 0, count, max_pieces=count)
    assert lent is not None
    assert np.array_equal(np.concatenate(lent), src.export_blocks("a", 0, count))


def test_losing_its_blocks_is_counted() -> None:
    """What was read from lent blocks is worthless after that, even if it has as many again."""
    src = engine(num_gpu_blocks_override=12, enable_prefix_caching=False)
    for i in range(2):
        src.add(request(f"r{i}", PROMPTS[0][:1] * 6, LENGTH, arrival_s=i, ignore_eos=True))
    while not src.stats().preemptions:
        src.step()
    assert src.times_dropped("r0") == 0
    assert src.times_dropped("r1") == 1


def test_a_reservation_never_preempts() -> None:
    dst = engine(num_gpu_blocks_override=12)
    dst.add(request("a", PROMPTS[0][:1] * 37, 4, ignore_eos=True))
    client = Client()
    step([dst], client)
    with pytest.raises(OutOfBlocksError, match="needed"):
        dst.reserve("m", request("r", PROMPTS[1][:1] * 30, 5), prefill=False)
    dst.reserve("m", request("r", PROMPTS[1][:1] * 7, 5), prefill=False)
    with pytest.raises(OutOfBlocksError):
        dst.import_blocks("m", 0, np.zeros(3 * dst.block_nbytes, dtype=np.uint8))
    dst.check()
    drain(dst, client)
    assert client.finished == {"a": "length"}
    assert dst.stats().preemptions == 0


def test_a_running_request_waits_for_a_reservation_instead_of_losing_its_blocks() -> None:
    dst = engine(num_gpu_blocks_override=10)
    dst.add(request("a", PROMPTS[0][:1] * 14, 20, ignore_eos=True))
    client = Client()
    step([dst], client)
    dst.reserve("m", request("r", PROMPTS[1][:1] * 19, 5), prefill=False)
    drain(dst, client)
    assert "a" not in client.finished
    assert dst.stats().preemptions == 0
    assert dst.cancel_reservation("m")
    assert drain(dst, client).finished == {"a": "length"}


def test_reservations_count_towards_max_num_seqs() -> None:
    dst = engine(max_num_seqs=2)
    for i in range(2):
        dst.reserve(f"m{i}", request(f"r{i}", [5, 6, 7], 5), prefill=False)
    with pytest.raises(OutOfBlocksError, match="max_num_seqs"):
        dst.reserve("m2", request("r2", [5, 6, 7], 5), prefill=True)
    dst.add(request("a", [5, 6], 5))
    assert drain(dst).finished == {}
    assert dst.cancel_reservation("m0")
    assert not dst.cancel_reservation("m0")
    assert list(drain(dst).finished) == ["a"]


def test_conflicts_are_named() -> None:
    dst = engine()
    dst.add(request("a", [5, 6], 5))
    with pytest.raises(ConflictError, match="already here"):
        dst.reserve("m", request("a", [5, 6], 5), prefill=False)
    dst.reserve("m", request("r", [5, 6], 5), prefill=True)
    with pytest.raises(ConflictError, match="already has a reservation"):
        dst.reserve("m", request("other", [5, 6], 5), prefill=True)
    with pytest.raises(ConflictError, match="already here"):
        dst.add(request("r", [5, 6], 5))
    with pytest.raises(ConflictError, match="prefills"):
        dst.import_blocks("m", 0, np.zeros(dst.block_nbytes, dtype=np.uint8))
    dst.reserve("k", request("s", [5, 6], 5), prefill=False)
    with pytest.raises(ConflictError, match="whole blocks"):
        dst.import_blocks("k", 0, np.zeros(dst.block_nbytes - 1, dtype=np.uint8))
    with pytest.raises(ConflictError, match="never has"):
        dst.import_blocks("k", 9, np.zeros(dst.block_nbytes, dtype=np.uint8))
    with pytest.raises(ConflictError, match="is for s"):
        dst.activate("k", request("t", [5, 6], 5))
    with pytest.raises(ConflictError, match="tokens differ"):
        dst.activate("k", request("s", [5, 7], 5))
    with pytest.raises(InvalidRequestError):
        dst.activate("k", request("s", [5, 6], 5000))
    dst.check()
    with pytest.raises(KeyError):
        dst.progress("s")
    for call in (dst.freeze, dst.thaw, dst.progress, dst.peek_state, dst.reservation_progress):
        with pytest.raises(KeyError):
            call("nobody")


def test_export_refuses_blocks_that_are_not_held() -> None:
    src = engine()
    src.add(request("r", [5] * 9, 5))
    src.step()
    with pytest.raises(ConflictError, match="it holds 3"):
        src.export_blocks("r", 2, 2)


def test_a_request_that_was_complete_ends_on_arrival() -> None:
    dst = engine()
    state = request("r", [5, 6, 7], 9)
    state.output_token_ids = [8, EOS]
    state.generation = 3
    dst.reserve("m", request("r", [5, 6, 7], 9), prefill=False)
    dst.activate("m", state)
    (delta,) = dst.step().deltas
    assert (delta.generation, delta.index, delta.token_ids) == (3, 0, [8, EOS])
    assert delta.finish_reason == "stop"
    assert dst.stats().used_blocks == 0
    dst.check()


def test_a_commit_with_fewer_tokens_than_reserved_recomputes_outside_shared_blocks() -> None:
    dst = engine()
    known = request("r", [5, 6, 7, 8, 9, 10, 11, 12, 13], 9, ignore_eos=True)
    longer = request("r", known.prompt_token_ids[:], 9, ignore_eos=True)
    longer.output_token_ids = [20, 21, 22, 23, 24]
    dst.reserve("m", longer, prefill=True)
    drain(dst)
    assert dst.reservation_progress("m") == 13
    known.output_token_ids = [20, 21, 22]
    dst.activate("m", known)
    dst.check()
    alone = engine()
    alone.add(known)
    assert drain(dst).tokens["r"][3:] == drain_new(alone)
    dst.check()


def drain_new(subject: Engine) -> list[int]:
    tokens: list[int] = []
    while subject.has_work():
        for delta in subject.step().deltas:
            tokens += delta.token_ids
    return tokens
