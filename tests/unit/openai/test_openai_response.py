"""Responses as OpenAI's own client reads them, and golden shapes."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from mell_ray.errors import InvalidRequestError, OverloadedError, ServerError
from mell_ray.openai.errors import error_body
from mell_ray.openai.response import (
    SSE_DONE,
    ChatChunker,
    Choice,
    CompletionChunker,
    chat_response,
    completion_response,
    finish_reason,
    model_card,
    model_list,
    sse,
    sse_error,
    system_fingerprint,
)
from mell_ray.openai.text import LogprobEntry, TextPiece, TokenText

AWKWARD = 'é "quoted" \\ \n\r\t \u2028\u2029\x85\x00 😀 data: [DONE]\n\n</s>'


def entry(text, logprob, *others, offset=0):
    def token(text, logprob):
        return TokenText(text, text.encode(), logprob)

    return LogprobEntry(token(text, logprob), tuple(token(*o) for o in others), offset)


ENTRIES = [
    entry("a", -1.0, ("b", -0.5), ("a", -1.0)),
    entry("é", float("-inf"), ("b", -0.5), offset=1),
]


def chat_events(include_usage=False, text=AWKWARD):
    chunker = ChatChunker("chatcmpl-1", 5, "m", include_usage=include_usage, fingerprint="fp_1")
    events = [chunker.role(i) for i in range(2)]
    events += [chunker.delta(i, TextPiece(text, [1], ENTRIES)) for i in range(2)]
    events += [chunker.delta(0, TextPiece("", [2])), chunker.finish(0, "stop")]
    events += [chunker.delta(1, TextPiece("tail")), chunker.finish(1, "length")]
    return [*events, *([chunker.usage(7, 3)] if include_usage else []), SSE_DONE]


def completion_events(include_usage=False):
    chunker = CompletionChunker("cmpl-1", 5, "m", include_usage=include_usage)
    events = [chunker.echo(0, "prompt "), chunker.delta(0, TextPiece(AWKWARD, [1], ENTRIES))]
    events += [chunker.delta(0, TextPiece("", [2])), chunker.finish(0, "length")]
    return [*events, *([chunker.usage(7, 3)] if include_usage else []), SSE_DONE]


def client(body: bytes, kind="text/event-stream", status=200, piece=7) -> openai.OpenAI:
    """OpenAI's client on a canned answer, which arrives cut into pieces of any size."""

    def answer(_: httpx.Request) -> httpx.Response:
        pieces = (body[i : i + piece] for i in range(0, len(body), piece))
        return httpx.Response(status, headers={"content-type": kind}, content=pieces)

    http = httpx.Client(transport=httpx.MockTransport(answer))
    return openai.OpenAI(api_key="k", base_url="http://test/v1", http_client=http, max_retries=0)


def objects(events: list[bytes]) -> list[dict]:
    sent = [event for event in events if event]
    assert all(event.startswith(b"data: ") and event.endswith(b"\n\n") for event in sent)
    assert all(event.count(b"\n") == 2 for event in sent)
    assert sent[-1] == b"data: [DONE]\n\n"
    return [json.loads(event[6:]) for event in sent[:-1]]


@pytest.mark.parametrize("piece", [1, 64, 10**6])
def test_the_client_reads_a_chat_stream(piece):
    stream = client(b"".join(chat_events(True)), piece=piece).chat.completions.create(
        model="m", messages=[{"role": "user", "content": "x"}], stream=True
    )
    chunks = list(stream)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""

    assert texts == {0: AWKWARD, 1: AWKWARD + "tail"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.id for chunk in chunks} == {"chatcmpl-1"}
    reasons = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert reasons == ["stop", "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 10


def test_the_client_reads_a_completion_stream():
    stream = client(b"".join(completion_events(True))).completions.create(
        model="m", prompt="x", stream=True
    )
    chunks = list(stream)

    assert "".join(c.text for chunk in chunks for c in chunk.choices) == "prompt " + AWKWARD
    assert chunks[-1].usage.completion_tokens == 3
    assert chunks[-2].choices[0].finish_reason == "length"


@pytest.mark.parametrize("include_usage", [False, True])
def test_chunks_have_the_strict_types_of_the_client(include_usage):
    for body in objects(chat_events(include_usage)):
        ChatCompletionChunk.model_validate(body, strict=True)
    for body in objects(completion_events(include_usage)):
        for choice in body["choices"]:  # the client's type knows no chunk before the last
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        Completion.model_validate(body, strict=True)


def test_usage_is_null_on_all_chunks_but_the_last_and_absent_if_not_asked_for():
    for events in (chat_events, completion_events):
        *chunks, last = objects(events(True))
        assert all(chunk["usage"] is None for chunk in chunks)
        assert last["choices"] == []
        assert last["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        assert not any("usage" in chunk for chunk in objects(events(False)))


def test_golden_chat_chunks():
    head = (
        b'data: {"id":"i","object":"chat.completion.chunk","created":5,"model":"m",'
        b'"system_fingerprint":null,"choices":[{"index":0,"delta":'
    )
    chunker = ChatChunker("i", 5, "m")

    assert chunker.role(0) == head + (
        b'{"role":"assistant","content":"","refusal":null},"logprobs":null,'
        b'"finish_reason":null}]}\n\n'
    )
    assert chunker.delta(0, TextPiece("hi")) == head + (
        b'{"content":"hi"},"logprobs":null,"finish_reason":null}]}\n\n'
    )
    assert chunker.finish(0, "stop") == head + (b'{},"logprobs":null,"finish_reason":"stop"}]}\n\n')
    assert chunker.delta(0, TextPiece("", [1])) == b""


def test_model_names_are_escaped():
    name = 'a"b\\{c}é'

    assert objects([ChatChunker("i", 5, name).role(0), SSE_DONE])[0]["model"] == name


def test_events_are_ascii_so_that_no_separator_splits_them():
    for event in [*chat_events(), *completion_events()]:
        assert event.decode("ascii").splitlines() == event.decode("ascii").split("\n")[:-1]


def answered(index=0, *, echo="", logprobs=False, reason="stop"):
    choice = Choice(index, echo=echo, logprobs=logprobs)
    choice.add(TextPiece("a", [1], [ENTRIES[0]] if logprobs else []))
    choice.add(TextPiece("", [2]))
    choice.add(TextPiece("é", [3, 4], [ENTRIES[1]] if logprobs else []))
    choice.finish_reason = reason
    return choice


def test_chat_response():
    body = chat_response("i", 5, "m", [answered(), answered(1, logprobs=True)], 7, fingerprint="f")
    parsed = ChatCompletion.model_validate(json.loads(json.dumps(body)), strict=True)

    assert [c.message.content for c in parsed.choices] == ["aé", "aé"]
    assert parsed.choices[0].logprobs is None
    assert body["choices"][1]["logprobs"] == {
        "content": [
            {
                "token": "a",
                "logprob": -1.0,
                "bytes": [97],
                "top_logprobs": [
                    {"token": "b", "logprob": -0.5, "bytes": [98]},
                    {"token": "a", "logprob": -1.0, "bytes": [97]},
                ],
            },
            {
                "token": "é",
                "logprob": -9999.0,
                "bytes": [195, 169],
                "top_logprobs": [{"token": "b", "logprob": -0.5, "bytes": [98]}],
            },
        ],
        "refusal": None,
    }
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 8, "total_tokens": 15}


def test_completion_response():
    choice = answered(echo="p", logprobs=True, reason="length")
    body = completion_response("i", 5, "m", [choice], 7)
    parsed = Completion.model_validate(json.loads(json.dumps(body)), strict=True)

    assert parsed.choices[0].text == "paé"
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["a", "é"],
        "token_logprobs": [-1.0, -9999.0],
        "top_logprobs": [{"b": -0.5, "a": -1.0}, {"b": -0.5, "é": -9999.0}],
        "text_offset": [0, 1],
    }
    assert body["system_fingerprint"] is None


def test_logprobs_asked_for_are_a_list_even_if_there_are_none():
    body = chat_response("i", 5, "m", [Choice(0, logprobs=True)], 7)

    assert body["choices"][0]["logprobs"] == {"content": [], "refusal": None}


def test_an_error_after_the_headers_raises_in_the_client():
    events = [*chat_events()[:3], sse_error(ServerError("the replica is gone")), SSE_DONE]
    stream = client(b"".join(events)).chat.completions.create(
        model="m", messages=[{"role": "user", "content": "x"}], stream=True
    )
    with pytest.raises(openai.APIError, match="the replica is gone"):
        list(stream)


def test_an_error_before_the_headers_raises_with_its_field():
    body = json.dumps(error_body(InvalidRequestError("bad n", param="n"))).encode()
    with pytest.raises(openai.BadRequestError, match="bad n") as caught:
        client(body, "application/json", 400).completions.create(model="m", prompt="x")
    assert caught.value.param == "n"


def test_an_overload_has_its_code():
    body = json.loads(sse_error(OverloadedError("full"))[6:])

    assert body["error"]["code"] == "overloaded"


def test_models():
    body = model_list([model_card("m", 5), model_card("o", 6, max_model_len=64)])

    assert [Model.model_validate(card).id for card in body["data"]] == ["m", "o"]
    assert body["data"][1]["max_model_len"] == 64
    assert "max_model_len" not in body["data"][0]
    assert [m.id for m in client(json.dumps(body).encode(), "application/json").models.list()] == [
        "m",
        "o",
    ]


def test_finish_reasons():
    assert finish_reason("stop") == "stop"
    assert finish_reason("length") == "length"
    with pytest.raises(ServerError, match="aborted") as caught:
        finish_reason("abort")
    assert caught.value.code == "aborted"
    with pytest.raises(ServerError, match="out of luck"):
        finish_reason("error", "out of luck")


def test_fingerprint_is_stable_and_tells_parts_apart():
    assert system_fingerprint("a", "bc") == system_fingerprint("a", "bc") == "fp_6215f44f92"
    assert system_fingerprint("a", "bc") != system_fingerprint("ab", "c")


def test_sse_refuses_numbers_that_are_not_json():
    with pytest.raises(ValueError):
        sse({"x": float("nan")})
