"""What an engine refuses at admission, and that it says which field is wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mell_ray.engine.types import RequestState, SamplingParams, TokenLogprobs
from mell_ray.errors import InvalidRequestError
from tests.engine.support import drain, engine, request


def refused(state: RequestState, **settings: Any) -> InvalidRequestError:
    subject = engine(**settings)
    with pytest.raises(InvalidRequestError) as caught:
        subject.add(state)
    with pytest.raises(InvalidRequestError):
        subject.validate(state)
    assert not subject.has_work()
    assert caught.value.status_code == 400
    return caught.value


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"frequency_penalty": math.inf}, "frequency_penalty"),
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logprobs": 129}, "logprobs"),
        ({"logit_bias": ((128, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((5, math.inf),)}, "logit_bias"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
    ],
)
def test_sampling_parameters(sampling: dict[str, Any], param: str) -> None:
    error = refused(request("r", [5, 6], **sampling))
    assert error.param == param
    assert param in error.message


def test_an_empty_prompt() -> None:
    assert refused(request("r", [])).param == "prompt"


@pytest.mark.parametrize("token", [-1, 128])
def test_tokens_outside_the_vocabulary(token: int) -> None:
    assert refused(request("r", [5, token])).param == "prompt"
    state = request("r", [5])
    state.output_token_ids = [token]
    assert refused(state).param == "output_token_ids"


def test_too_long_for_the_model_names_both_lengths() -> None:
    message = refused(request("r", [5] * 200, 57), num_gpu_blocks_override=400).message
    for number in ("200", "57", "257", "256"):
        assert number in message


def test_longer_than_the_pool_could_ever_hold() -> None:
    message = refused(request("r", [5] * 30, 12), num_gpu_blocks_override=10).message
    assert "40 tokens in all" in message


def test_exactly_as_long_as_the_pool_is_served() -> None:
    subject = engine(num_gpu_blocks_override=10)
    subject.add(request("r", [5] * 30, 11, ignore_eos=True))
    assert len(drain(subject).tokens["r"]) == 11


def test_recovered_output_needs_its_logprobs_where_they_are_asked_for() -> None:
    params = SamplingParams(max_tokens=5, logprobs=1, temperature=0.0)
    state = RequestState("r", [5, 6], params, output_token_ids=[7])
    assert refused(state).param == "output_logprobs"
    state.output_logprobs = [TokenLogprobs(-0.5)]
    subject = engine()
    subject.add(state)
    client = drain_from(subject)
    assert len(client) == 4


def drain_from(subject: Any) -> list[TokenLogprobs]:
    found: list[TokenLogprobs] = []
    while subject.has_work():
        for delta in subject.step().deltas:
            found += delta.logprobs or []
    return found


def test_ends_of_a_request() -> None:
    """min_tokens holds every end back, stop tokens end like EOS, ignore_eos does not stop those."""
    always = {"logit_bias": ((9, 1000.0),), "ignore_eos": True}
    subject = engine()
    subject.add(request("stop", [5], 8, stop_token_ids=(9,), **always))
    subject.add(request("length", [5], 8, **always))
    subject.add(request("held", [5], 8, stop_token_ids=(9,), min_tokens=3, **always))
    eos_always = {"logit_bias": ((1, 1000.0),)}
    subject.add(request("eos", [5], 8, **eos_always))
    subject.add(request("ignored", [5], 8, ignore_eos=True, **eos_always))
    client = drain(subject)
    assert client.tokens["stop"] == [9]
    assert client.tokens["length"] == [9] * 8
    assert 9 not in client.tokens["held"][:3]
    assert client.tokens["held"][3:] == [9]
    assert client.tokens["eos"] == [1]
    assert client.tokens["ignored"] == [1] * 8
    reasons = {"stop": "stop", "length": "length", "held": "stop", "eos": "stop"}
    assert client.finished == {**reasons, "ignored": "length"}
