"""From a request to what the engine gets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mell_ray.engine.types import SamplingParams
from mell_ray.errors import InvalidRequestError
from mell_ray.openai.plan import (
    choice_request_id,
    choice_seed,
    count_prompt_tokens,
    plan_chat,
    plan_completion,
)
from mell_ray.openai.protocol import ChatCompletionRequest, CompletionRequest
from mell_ray.openai.sampling import model_defaults
from tests.unit.openai.conftest import make_byte_level, make_sentencepiece

LIMITS = {"max_model_len": 64, "default_max_tokens": 16, "request_seed": 99}


def chat(tokenizer, messages=None, **fields):
    messages = messages or [{"role": "user", "content": "hi"}]
    body = {"model": "m", "messages": messages, **fields}
    return plan_chat(ChatCompletionRequest.model_validate(body), tokenizer, **LIMITS)


def complete(tokenizer, prompt="hi", **fields):
    body = {"model": "m", "prompt": prompt, **fields}
    return plan_completion(CompletionRequest.model_validate(body), tokenizer, **LIMITS)


def refused(call, *args, **fields) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        call(*args, **fields)
    return caught.value


def test_chat_goes_through_the_template(byte_level):
    [generation] = chat(
        byte_level,
        [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ],
    )
    text = byte_level.decode(generation.prompt_token_ids)

    assert text == "<|system|>be brief\n<|user|>hi\n<|assistant|>"


def test_every_sampling_field_reaches_the_engine(byte_level):
    [generation] = chat(
        byte_level,
        max_completion_tokens=7,
        min_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        seed=3,
        frequency_penalty=0.1,
        presence_penalty=0.2,
        repetition_penalty=1.1,
        logit_bias={"7": -1, "3": 2},
        ignore_eos=True,
        stop_token_ids=[9, 4],
        logprobs=True,
        top_logprobs=2,
        stop=["x", "y"],
    )
    assert generation.sampling == SamplingParams(
        max_tokens=7,
        min_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        seed=3,
        frequency_penalty=0.1,
        presence_penalty=0.2,
        repetition_penalty=1.1,
        logit_bias=((3, 2.0), (7, -1.0)),
        ignore_eos=True,
        stop_token_ids=(4, 9),
        logprobs=2,
    )
    assert generation.stop == ("x", "y")


def test_defaults(byte_level):
    [generation] = complete(byte_level)

    assert generation.sampling == SamplingParams(max_tokens=16, seed=99)
    assert generation.stop == ()


OF_MODEL = {
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "max_new_tokens": 30,
}
ASKED = {
    "temperature": 0,
    "top_p": 1,
    "top_k": -1,
    "min_p": 0,
    "repetition_penalty": 1,
    "max_tokens": 40,
}


def planned(tokenizer, **fields):
    """With a model that has defaults of its own: the sampling of every choice."""
    sampling, wrong = model_defaults({"do_sample": False, "eos_token_id": 2, **OF_MODEL})
    assert not wrong
    body = {"model": "m", "prompt": ["hi", "you"], "n": 2, **fields}
    request = CompletionRequest.model_validate(body)
    plans = plan_completion(request, tokenizer, **LIMITS, sampling=sampling)
    return [replace(plan.sampling, seed=0) for plan in plans]


def test_a_model_s_defaults_reach_every_choice(byte_level):
    wanted = {name: value for name, value in OF_MODEL.items() if name != "max_new_tokens"}
    assert planned(byte_level) == [SamplingParams(max_tokens=30, seed=0, **wanted)] * 4


@pytest.mark.parametrize("name", ASKED)
def test_what_a_request_names_wins_over_the_model(byte_level, name):
    """Also a value that is OpenAI's default."""
    changed = {"top_k": 0}.get(name, ASKED[name])
    default = planned(byte_level)
    assert planned(byte_level, **{name: ASKED[name]}) == [
        replace(sampling, **{name: changed}) for sampling in default
    ]
    assert planned(byte_level, **{name: None}) == default


def test_a_chat_s_newer_limit_wins_over_the_model(byte_level):
    sampling, _ = model_defaults(OF_MODEL)
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    for fields, wanted in (({}, 30), ({"max_completion_tokens": 40}, 40)):
        request = ChatCompletionRequest.model_validate({**body, **fields})
        [plan] = plan_chat(request, byte_level, **LIMITS, sampling=sampling)
        assert plan.sampling.max_tokens == wanted


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [({}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 4}, 4)],
)
def test_chat_logprobs(byte_level, fields, wanted):
    assert chat(byte_level, **fields)[0].sampling.logprobs == wanted


@pytest.mark.parametrize("wanted", [None, 0, 3])
def test_completion_logprobs(byte_level, wanted):
    assert complete(byte_level, logprobs=wanted)[0].sampling.logprobs == wanted


def test_top_k_minus_one_means_off(byte_level):
    assert complete(byte_level, top_k=-1)[0].sampling.top_k == 0


def test_choices_are_numbered_over_prompts(byte_level):
    generations = complete(byte_level, ["a", "bc"], n=2)

    assert [(g.prompt_index, g.choice_index) for g in generations] == [
        (0, 0),
        (0, 1),
        (1, 2),
        (1, 3),
    ]
    assert generations[2].prompt_token_ids == byte_level.encode("bc")
    tokens = [len(byte_level.encode(text)) for text in ("a", "bc")]
    assert count_prompt_tokens(generations) == sum(tokens)


def test_request_ids():
    assert choice_request_id("r", 0, 1) == "r"
    assert [choice_request_id("r", i, 2) for i in range(2)] == ["r-0", "r-1"]


def test_named_seed_is_kept_and_choices_differ_stably(byte_level):
    seeds = [g.sampling.seed for g in complete(byte_level, ["a", "b"], n=3, seed=5)]

    assert seeds[:3] == seeds[3:] == [5, choice_seed(5, 1), choice_seed(5, 2)]
    assert len(set(seeds)) == 3
    assert choice_seed(5, 1) == 2875910158461559956  # must never change: seeds are promises


def test_without_a_seed_equal_prompts_get_independent_samples(byte_level):
    seeds = [g.sampling.seed for g in complete(byte_level, ["a", "a"], n=2)]

    assert seeds[0] == 99
    assert len(set(seeds)) == 4


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_seeds_reach_the_engine_as_63_bits(byte_level, seed):
    seeds = [g.sampling.seed for g in complete(byte_level, n=3, seed=seed)]

    assert all(0 <= s < 2**63 for s in seeds)
    assert len(set(seeds)) == 3
    if seed >= 0:
        assert seeds[0] == seed


def test_output_limit_is_cut_to_the_room_if_the_client_named_none(byte_level):
    prompt = [byte_level.encode("a")[0]] * 60

    assert complete(byte_level, prompt)[0].sampling.max_tokens == 4
    assert complete(byte_level, prompt[:20])[0].sampling.max_tokens == 16
    assert complete(byte_level, prompt[:20], min_tokens=20)[0].sampling.max_tokens == 20


def test_exactly_full_context_is_allowed_and_one_more_is_not(byte_level):
    prompt = [1] * 60
    assert complete(byte_level, prompt, max_tokens=4)[0].sampling.max_tokens == 4

    error = refused(complete, byte_level, prompt, max_tokens=5)
    assert (error.param, error.code) == ("max_tokens", "context_length_exceeded")
    assert all(number in error.message for number in ("60", "5", "64", "at most 4"))


def test_the_limit_is_named_as_the_client_named_it(byte_level):
    assert refused(chat, byte_level, max_completion_tokens=64).param == "max_completion_tokens"
    assert refused(chat, byte_level, max_tokens=64).param == "max_tokens"


def test_a_prompt_that_fills_the_context_is_refused(byte_level):
    error = refused(complete, byte_level, [1] * 64)
    assert (error.param, error.code) == ("prompt", "context_length_exceeded")
    assert error.message.count("64") == 2

    error = refused(chat, byte_level, [{"role": "user", "content": "Q" * 100}])
    assert (error.param, error.code) == ("messages", "context_length_exceeded")


def test_min_tokens_must_fit(byte_level):
    assert refused(complete, byte_level, min_tokens=9, max_tokens=8).param == "min_tokens"
    assert refused(complete, byte_level, min_tokens=64).param == "min_tokens"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [1, 5000]},
        {"logit_bias": {"1": 1, "5000": 1}},
        {"stop_token_ids": [5000]},
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(byte_level, fields):
    error = refused(complete, byte_level, **fields)

    assert error.param in fields
    assert "5000" in error.message
    assert str(len(byte_level)) in error.message


def test_the_last_token_of_the_vocabulary_is_inside(byte_level):
    size = len(byte_level)

    assert complete(byte_level, [size - 1])[0].prompt_token_ids == [size - 1]
    assert refused(complete, byte_level, [size]).param == "prompt"


def test_an_empty_prompt_needs_a_token_to_start_from(byte_level, sentencepiece):
    error = refused(complete, byte_level, "")
    assert error.param == "prompt"
    assert "empty" in error.message

    assert complete(sentencepiece, "")[0].prompt_token_ids == [sentencepiece.bos_token_id]
    knows_bos = make_byte_level(bos_token="</s>")  # but does not begin texts with it
    assert complete(knows_bos, "")[0].prompt_token_ids == [knows_bos.bos_token_id]


def test_bos_is_the_tokenizers_for_text_and_the_templates_for_chat():
    tokenizer = make_sentencepiece(chat_template="{{ bos_token }}{{ messages[0].content }}")
    bos = tokenizer.bos_token_id

    assert complete(tokenizer)[0].prompt_token_ids.count(bos) == 1
    [generation] = chat(tokenizer)
    assert generation.prompt_token_ids[0] == bos
    assert generation.prompt_token_ids.count(bos) == 1


def test_echo(byte_level):
    ids = byte_level.encode("hello")

    assert [g.echo for g in complete(byte_level, ["a", "b"], echo=True, n=2)] == list("aabb")
    assert complete(byte_level, ids, echo=True)[0].echo == "hello"
    assert complete(byte_level, "a")[0].echo == ""


def test_chat_without_a_template_says_so(sentencepiece):
    error = refused(chat, sentencepiece)

    assert error.param == "messages"
    assert "no chat template" in error.message
    assert "/v1/completions" in error.message


def test_what_the_template_refuses_is_the_clients_fault(byte_level):
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    error = refused(chat, byte_level, messages)

    assert error.param == "messages"
    assert "the system message must come first" in error.message


def test_text_opens_with_the_generations_settings(byte_level):
    [newline] = byte_level.encode("\n")
    [generation] = chat(byte_level, stop="Q", stop_token_ids=[newline], min_tokens=2)
    stream = generation.open_text(byte_level)

    assert stream.push(byte_level.encode("QaQ\n")).text == "Qa"
    other = generation.open_text(byte_level)
    assert other.push(byte_level.encode("ab\n")).text == "ab"
