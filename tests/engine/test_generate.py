"""Token-for-token equality with transformers' own generate, under everything that may disturb."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from mell_ray.config import EngineConfig
from mell_ray.engine import Engine, load_model
from mell_ray.engine.types import RequestState, SamplingParams
from mell_ray.errors import ConflictError
from tests.engine.support import (
    EOS,
    TINY,
    Client,
    build,
    drain,
    engine,
    generate,
    prompts,
    reference,
    request,
    small_config,
    step,
    tiny,
)

PROMPTS = prompts(24)
LENGTH = 30


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [generate(reference(), prompt, LENGTH) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"num_gpu_blocks_override": 400, "max_num_seqs": 24}, id="roomy"),
        pytest.param({"num_gpu_blocks_override": 34}, id="preemption"),
        pytest.param(
            {"num_gpu_blocks_override": 34, "enable_prefix_caching": False}, id="no-cache"
        ),
        pytest.param({"max_num_batched_tokens": 8}, id="tiny-chunks"),
        pytest.param({"block_size": 16, "num_gpu_blocks_override": 12}, id="block-16"),
    ],
)
def test_greedy_equals_generate(settings: dict, expected: list[list[int]]) -> None:
    subject = engine(**settings)
    for i, prompt in enumerate(PROMPTS):
        subject.add(request(f"r{i}", prompt, LENGTH, arrival_s=i))
    client = drain(subject)
    assert [client.tokens[f"r{i}"] for i in range(len(PROMPTS))] == expected
    assert all(reason in ("stop", "length") for reason in client.finished.values())
    stats = subject.stats()
    assert stats.used_blocks == 0
    assert stats.running == stats.waiting == 0
    if settings.get("num_gpu_blocks_override") == 34:
        assert stats.preemptions > 0


def test_abort_in_between_disturbs_nobody(expected: list[list[int]]) -> None:
    subject = engine(num_gpu_blocks_override=34)
    client = Client()
    for i, prompt in enumerate(PROMPTS):
        subject.add(request(f"r{i}", prompt, LENGTH, arrival_s=i))
    for i in (0, 3, 9, 23):
        for _ in range(4):
            step([subject], client)
        held_before = subject.stats().used_blocks
        emitted = len(client.tokens.get(f"r{i}", []))
        assert subject.abort(f"r{i}") is (f"r{i}" not in client.finished)
        assert not subject.abort(f"r{i}")
        assert subject.stats().used_blocks <= held_before
        subject.check()
        if f"r{i}" not in client.finished:
            step([subject], client)
            assert len(client.tokens.get(f"r{i}", [])) == emitted
    drain(subject, client)
    for i, tokens in enumerate(expected):
        if f"r{i}" in client.finished:
            assert client.tokens[f"r{i}"] == tokens


def test_prefix_cache_hits_and_changes_nothing() -> None:
    shared = PROMPTS[0] * 3
    tails = [[5], [6, 7, 8, 9, 10], [7], []]
    subject = engine(num_gpu_blocks_override=300)
    first = drain_one(subject, "warm", shared + tails[0])
    assert first == generate(reference(), shared + tails[0], LENGTH)
    for i, tail in enumerate(tails):
        before = subject.stats().prefix_hit_tokens
        tokens = drain_one(subject, f"t{i}", shared + tail)
        assert tokens == generate(reference(), shared + tail, LENGTH)
        hit = subject.stats().prefix_hit_tokens - before
        assert hit >= min(len(shared), len(shared + tail) - 1) // 4 * 4


def test_a_whole_cached_prompt_still_computes_its_last_token() -> None:
    prompt = PROMPTS[0][:8] + PROMPTS[1][:8]
    prompt = prompt[: len(prompt) // 4 * 4]
    subject = engine()
    once = drain_one(subject, "a", prompt)
    before = subject.stats().prefix_hit_tokens
    assert drain_one(subject, "b", prompt) == once
    assert subject.stats().prefix_hit_tokens - before == len(prompt) - 4


def test_cache_metrics_tell_what_was_looked_up_found_and_lost() -> None:
    prompt = (PROMPTS[0] * 12)[:12]
    subject = engine(num_gpu_blocks_override=8)
    for name in ("a", "b"):
        subject.add(request(name, prompt, 1))
        drain(subject)
    stats = subject.stats()
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (24, 8)
    assert stats.prefix_evictions == 0
    # Every block is needed: the three that were cached give way, and are not found again.
    subject.add(request("c", [9] * 32, 1))
    drain(subject)
    assert subject.stats().prefix_evictions == 3
    subject.add(request("d", prompt, 1))
    drain(subject)
    stats = subject.stats()
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (68, 8)


def test_without_a_cache_nothing_is_looked_up() -> None:
    subject = engine(enable_prefix_caching=False)
    for name in ("a", "b"):
        subject.add(request(name, [5] * 12, 1))
        drain(subject)
    assert subject.stats().prefix_query_tokens == 0
    assert subject.stats().cached_blocks == 0


def test_output_blocks_serve_the_next_turn() -> None:
    subject = engine()
    prompt = PROMPTS[2][:10]
    answer = drain_one(subject, "a", prompt)
    before = subject.stats().prefix_hit_tokens
    follow_up = [*prompt, *answer, 9, 9, 9]
    assert drain_one(subject, "b", follow_up) == generate(reference(), follow_up, LENGTH)
    # The last token of the answer was sampled, but never computed.
    assert subject.stats().prefix_hit_tokens - before == (len(prompt + answer) - 1) // 4 * 4


def drain_one(subject: Engine, name: str, prompt: list[int]) -> list[int]:
    subject.add(request(name, prompt, LENGTH))
    return drain(subject).tokens[name]


def test_decodes_are_never_held_up_by_prefills() -> None:
    subject = engine(max_num_batched_tokens=8, num_gpu_blocks_override=200)
    client = Client()
    subject.add(request("old", PROMPTS[0][:4], 40, ignore_eos=True))
    step([subject], client)
    for i in range(5):
        subject.add(request(f"new{i}", PROMPTS[1] * 2, 4, arrival_s=1 + i))
    for _ in range(20):
        had = len(client.tokens["old"])
        output = subject.step()
        client.read(output.deltas)
        assert len(client.tokens["old"]) == had + 1
        assert output.num_decode_tokens + output.num_prefill_tokens <= 8
    assert client.tokens["new0"], "the prefills progress beside the decode"


def test_higher_priority_is_admitted_first() -> None:
    subject = engine(max_num_seqs=1, max_num_batched_tokens=64)
    states = [
        request(n, PROMPTS[0][:5], 3, arrival_s=i, ignore_eos=True) for i, n in enumerate("abc")
    ]
    states[2].priority = 5
    for state in states:
        subject.add(state)
    assert list(drain(subject).finished) == ["c", "a", "b"]


def test_recovered_request_emits_only_what_is_new(expected: list[list[int]]) -> None:
    index = next(i for i, tokens in enumerate(expected) if len(tokens) == LENGTH)
    state = request("r", PROMPTS[index], LENGTH)
    state.output_token_ids = expected[index][:7]
    state.num_computed = 20  # what another engine had computed means nothing here
    subject = engine()
    subject.add(state)
    deltas = [delta for _ in range(100) if subject.has_work() for delta in subject.step().deltas]
    assert deltas[0].index == 7
    assert [token for delta in deltas for token in delta.token_ids] == expected[index][7:]


def test_recovered_request_that_was_complete_ends_at_once() -> None:
    subject = engine()
    full = request("full", [5, 6], 3)
    full.output_token_ids = [7, 8, 9]
    ended = request("ended", [5, 6], 9)
    ended.output_token_ids = [7, EOS]
    for state in (full, ended):
        subject.add(state)
    assert subject.has_work()
    deltas = subject.step().deltas
    assert [(d.request_id, d.index, d.token_ids, d.finish_reason) for d in deltas] == [
        ("full", 3, [], "length"),
        ("ended", 2, [], "stop"),
    ]
    assert not subject.has_work()


def test_the_engine_does_not_keep_the_callers_lists() -> None:
    subject = engine()
    state = request("r", [5, 6, 7], 4)
    subject.add(state)
    drain(subject)
    assert state.prompt_token_ids == [5, 6, 7]
    assert state.output_token_ids == []


def test_an_id_that_lives_is_refused_and_one_that_ended_is_not() -> None:
    subject = engine()
    subject.add(request("r", [5, 6, 7], 4))
    with pytest.raises(ConflictError, match="already here"):
        subject.add(request("r", [5], 4))
    drain(subject)
    subject.add(request("r", [5], 4))


def test_a_failing_forward_loses_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = engine()
    subject.add(request("r", PROMPTS[0], LENGTH))
    client = Client()
    step([subject], client)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(subject, "_forward", broken)
        with pytest.raises(RuntimeError, match="device lost"):
            subject.step()
    subject.check()
    drain(subject, client)
    assert client.tokens["r"] == generate(reference(), PROMPTS[0], LENGTH)


def test_a_request_whose_logits_are_nan_ends_alone() -> None:
    model = build(LlamaConfig(**TINY))
    poisoned = 17
    loaded = load_model(model, small_config())
    model.get_input_embeddings().weight.data[poisoned] = float("nan")
    subject = Engine(loaded, small_config())
    healthy = [token for token in PROMPTS[0] if token != poisoned]
    subject.add(request("bad", [5, poisoned], 5))
    subject.add(request("good", healthy, 5))
    client = drain(subject)
    assert client.finished["bad"] == "error"
    assert "finite" in (client.errors["bad"] or "")
    assert client.tokens["good"] == generate(reference(), healthy, 5)
    assert subject.stats().used_blocks == 0


def test_stats_and_sequences_tell_what_is_where() -> None:
    subject = engine(max_num_seqs=1)
    subject.add(request("a", PROMPTS[0][:9], 5, ignore_eos=True))
    subject.add(request("b", PROMPTS[1][:9], 5, arrival_s=1))
    subject.step()
    a, b = subject.sequences()
    assert (a.request_id, a.status, a.num_tokens, a.num_computed, a.num_blocks) == (
        "a",
        "running",
        10,
        9,
        3,
    )
    assert (b.request_id, b.status, b.num_blocks) == ("b", "waiting", 0)
    stats = subject.stats()
    assert (stats.running, stats.waiting, stats.used_blocks, stats.capacity_blocks) == (1, 1, 3, 64)
    assert subject.generation_of("a") == 0
    assert subject.generation_of("nobody") is None


def test_capacity_comes_from_the_memory_setting() -> None:
    config = EngineConfig(block_size=16, kv_cache_memory_bytes=1 << 20)
    subject = Engine(tiny(), config)
    assert (
        subject.block_nbytes == 2 * 2 * 16 * 2 * 8 * 4
    )  # K and V, layers, tokens, heads, dim, fp32
    assert (subject.capacity_blocks + 1) * subject.block_nbytes == 1 << 20


def test_sampled_at_temperature_is_the_same_alone_and_in_a_crowd() -> None:
    params = {"temperature": 1.0, "seed": 7, "ignore_eos": True}
    alone = engine()
    alone.add(request("r", PROMPTS[3], LENGTH, **params))
    expected = drain(alone).tokens["r"]
    crowd = engine(num_gpu_blocks_override=34)
    for i, prompt in enumerate(PROMPTS[:8]):
        crowd.add(request(f"n{i}", prompt, LENGTH, temperature=1.3, seed=i))
    crowd.add(
        RequestState(
            "r", list(PROMPTS[3]), SamplingParams(max_tokens=LENGTH, **params), arrival_s=9.0
        )
    )
    assert drain(crowd).tokens["r"] == expected
