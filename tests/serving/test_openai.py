"""The real client package against a running server."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest

from mell_ray.builtin import MODEL_ID
from tests.serving.conftest import TIMEOUT_S, App

CHAT = [{"role": "user", "content": "Tell me of Emma."}]


@pytest.fixture(scope="module")
def app(deploy) -> App:
    return deploy("api")


def test_models(app: App) -> None:
    assert [model.id for model in app.client.models.list()] == [MODEL_ID]
    assert app.client.models.retrieve(MODEL_ID).id == MODEL_ID


def test_chat(app: App) -> None:
    answer = app.client.chat.completions.create(
        model=MODEL_ID, messages=CHAT, max_tokens=40, temperature=0
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 40


def test_streamed_chat_is_the_same_text(app: App) -> None:
    options = {"model": MODEL_ID, "messages": CHAT, "max_tokens": 40, "temperature": 0}
    whole = app.client.chat.completions.create(**options)
    chunks = list(
        app.client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason


def test_completion_streamed_and_not(app: App) -> None:
    options = {"model": MODEL_ID, "prompt": "It was a truth", "max_tokens": 30, "temperature": 0}
    whole = app.client.completions.create(**options)
    streamed = app.client.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text


def test_n_choices_are_different_and_reproducible(app: App) -> None:
    options = {"model": MODEL_ID, "messages": CHAT, "max_tokens": 20, "n": 2, "seed": 5}
    first = app.client.chat.completions.create(**options)
    second = app.client.chat.completions.create(**options)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1]
    assert texts[0] != texts[1]
    assert texts == [choice.message.content for choice in second.choices]


def test_n_choices_streamed(app: App) -> None:
    options = {"model": MODEL_ID, "messages": CHAT, "max_tokens": 20, "n": 3, "seed": 5}
    whole = app.client.chat.completions.create(**options)
    texts = ["", "", ""]
    for chunk in app.client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_stop_string_ends_the_answer_and_frees_the_request(app: App) -> None:
    options = {
        "model": MODEL_ID,
        "prompt": "It was a truth",
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    text = app.client.completions.create(**options, max_tokens=60).choices[0].text
    stop = text[len(text) // 2 :][:4]
    answer = app.client.completions.create(**options, max_tokens=2000, stop=stop)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.usage is not None
    assert answer.usage.completion_tokens < 60
    app.wait_idle()


def test_logprobs(app: App) -> None:
    answer = app.client.chat.completions.create(
        model=MODEL_ID, messages=CHAT, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
        assert entry.logprob <= 0


def test_wrong_model(app: App) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        app.client.chat.completions.create(model="gpt-9", messages=CHAT)


def test_too_long_prompt_says_both_lengths(app: App) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        app.client.completions.create(model=MODEL_ID, prompt=[5] * 5000, max_tokens=1)
    assert "5000" in str(caught.value)
    assert "4096" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("n", 0), ("max_tokens", 0), ("top_p", 2), ("stopp", "x"), ("stop", 3)],
)
def test_bad_field_is_named(app: App, field: str, value: object) -> None:
    response = httpx.post(
        f"{app.url}/v1/completions",
        json={"model": MODEL_ID, "prompt": "a", field: value},
        timeout=TIMEOUT_S,
    )
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == field
    assert field in error["message"]
    assert error["type"] == "invalid_request_error"


def test_malformed_json(app: App) -> None:
    response = httpx.post(
        f"{app.url}/v1/chat/completions", content=b'{"model": ', timeout=TIMEOUT_S
    )
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


def test_unknown_path_and_method_have_openai_errors(app: App) -> None:
    assert httpx.get(f"{app.url}/v1/nothing", timeout=TIMEOUT_S).json()["error"]["message"]
    response = httpx.get(f"{app.url}/v1/chat/completions", timeout=TIMEOUT_S)
    assert response.status_code == 405
    assert response.json()["error"]["message"]


def test_health(app: App) -> None:
    assert httpx.get(f"{app.url}/health", timeout=TIMEOUT_S).status_code == 200


def test_request_id_is_the_operator_api_s(app: App) -> None:
    body = {"model": MODEL_ID, "prompt": "a", "max_tokens": 3500, "ignore_eos": True, "n": 2}
    with httpx.stream(
        "POST", f"{app.url}/v1/completions", json={**body, "stream": True}, timeout=TIMEOUT_S
    ) as response:
        request_id = response.headers["x-request-id"]
        lines = response.iter_lines()
        next(lines)
        found = app.wait(
            lambda s: [r["id"] for r in s["requests"] if r["id"].startswith(request_id)],
            "the request is not in the state",
        )
        assert set(found) <= {f"{request_id}-0", f"{request_id}-1"}
    app.wait_idle()  # the client has gone: its blocks are free


def test_operator_s_moves_are_not_undone_by_the_policy(app: App) -> None:
    """The default policy would pack everything onto one replica at once."""
    replicas = app.wait_ready(2)
    body = {"model": MODEL_ID, "prompt": "a", "max_tokens": 4000, "ignore_eos": True}
    with httpx.stream(
        "POST", f"{app.url}/v1/completions", json={**body, "stream": True}, timeout=TIMEOUT_S
    ) as response:
        request_id = response.headers["x-request-id"]
        lines = response.iter_lines()
        next(lines)
        (here,) = [r["replica"] for r in app.state()["requests"] if r["id"] == request_id]
        for _ in range(5):
            (there,) = set(replicas) - {here}
            answer = app.post(f"requests/{request_id}/migrate", {"to": there, "mode": "auto"})
            assert answer.status_code == 200, answer.text
            assert answer.json()["outcome"] == "committed"
            (here,) = [r["replica"] for r in app.state()["requests"] if r["id"] == request_id]
            assert here == there
    app.wait_idle()


def test_client_that_waits_for_a_whole_answer_and_leaves_frees_its_blocks(app: App) -> None:
    body = {"model": MODEL_ID, "prompt": "a", "max_tokens": 4000, "ignore_eos": True}

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
            task = asyncio.create_task(client.post(f"{app.url}/v1/completions", json=body))
            while not (await client.get(f"{app.url}/mell/v1/state")).json()["requests"]:
                await asyncio.sleep(0.02)
            task.cancel()

    asyncio.run(leave())
    app.wait_idle()


def test_64_concurrent_streams(app: App) -> None:
    """None lost, none duplicated, the accounting back at zero."""

    async def one(client: openai.AsyncOpenAI, i: int) -> tuple[str, int]:
        text, tokens = "", 0
        stream = await client.completions.create(
            model=MODEL_ID,
            prompt=f"Chapter {i}. It was",
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                text += choice.text
        return text, tokens

    async def many() -> list[tuple[str, int]]:
        async with app.async_client as client:
            return await asyncio.gather(*(one(client, i) for i in range(64)))

    results = asyncio.run(many())
    assert [tokens for _, tokens in results] == [24] * 64
    alone = app.client.completions.create(
        model=MODEL_ID,
        prompt="Chapter 63. It was",
        max_tokens=24,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert results[63][0] == alone.choices[0].text
    app.wait_idle()


def test_sse_ends_with_done(app: App) -> None:
    body = {"model": MODEL_ID, "prompt": "a", "max_tokens": 2, "stream": True}
    lines = (
        httpx.post(f"{app.url}/v1/completions", json=body, timeout=TIMEOUT_S)
        .text.strip()
        .split("\n\n")
    )
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: ")) for line in lines[:-1])
