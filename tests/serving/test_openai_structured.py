"""Structured answers through the real client, also while replicas come and go."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import ray
from pydantic import BaseModel

from mell_ray.builtin import MODEL_ID
from tests.serving.conftest import TIMEOUT_S, App, outlasting

CHAT = [{"role": "user", "content": "Tell me of Emma."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "rank": {"enum": ["low", "high"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "rank", "age"],
    "additionalProperties": False,
}


class Person(BaseModel):
    name: str
    age: int
    married: bool


def wanted(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


def many(count: int) -> dict[str, Any]:
    """Eight of them are more than a hundred tokens: mostly enough to be moved on the way."""
    return {"type": "array", "items": SCHEMA, "minItems": count, "maxItems": count}


def long_body(count: int) -> dict[str, Any]:
    return {
        "model": MODEL_ID,
        "messages": CHAT,
        "response_format": wanted(many(count)),
        "temperature": 0,
        "max_tokens": 3600,
        "stream": True,
    }


@pytest.fixture(scope="module")
def app(deploy) -> App:
    return deploy("structured")


def test_choices_follow_the_schema_and_streams_say_the_same(app: App) -> None:
    options = {
        "model": MODEL_ID,
        "messages": CHAT,
        "max_tokens": 200,
        "n": 3,
        "seed": 9,
        "response_format": wanted(SCHEMA),
    }
    answer = app.client.chat.completions.create(**options)
    texts = [choice.message.content for choice in answer.choices]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    streamed = ["", "", ""]
    for chunk in app.client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_json_object_and_text_completion(app: App) -> None:
    body = {
        "model": MODEL_ID,
        "prompt": "{",
        "max_tokens": 60,
        "response_format": {"type": "json_object"},
    }
    answer = httpx.post(f"{app.url}/v1/completions", json=body, timeout=TIMEOUT_S)
    choice = answer.json()["choices"][0]
    assert choice["text"].startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["text"]), dict)


def test_parse_gives_a_pydantic_object(app: App) -> None:
    class Bounded(Person):
        model_config = {"json_schema_extra": {"additionalProperties": False}}

    for seed in range(4):
        answer = app.client.chat.completions.parse(
            model=MODEL_ID,
            messages=CHAT,
            response_format=Bounded,
            seed=seed,
            max_tokens=300,
            temperature=0.7,
            stop=["\n\n"],
        )
        parsed = answer.choices[0].message.parsed
        assert isinstance(parsed, Person)


def test_cut_by_max_tokens_is_length(app: App) -> None:
    answer = app.client.chat.completions.create(
        model=MODEL_ID, messages=CHAT, max_tokens=5, response_format=wanted(SCHEMA)
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content.startswith("{")


@pytest.mark.parametrize("schema", [{"type": "objekt"}, {"type": "array", "uniqueItems": True}])
def test_what_cannot_be_followed_is_refused_before_it_is_placed(app: App, schema: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        app.client.chat.completions.create(
            model=MODEL_ID, messages=CHAT, response_format=wanted(schema)
        )
    assert caught.value.param == "response_format.json_schema.schema"
    assert not app.state()["requests"]


@pytest.mark.parametrize("disturbance", ["kv", "token", "death"])
def test_an_answer_in_the_middle_of_a_move_or_a_death_is_the_same(
    app: App, disturbance: str
) -> None:
    def attempt(count: int) -> tuple[int, str] | None:
        replicas = app.wait_ready(2)
        got, disturbed = "", False
        url = f"{app.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=long_body(count), timeout=TIMEOUT_S) as response:
            request_id = response.headers["x-request-id"]
            for number, text in enumerate(contents(response)):
                got += text
                if number == 12:
                    disturbed = disturb(app, request_id, disturbance, replicas)
        return (count, got) if disturbed else None

    count, got = outlasting(attempt, (8, 24, 64))
    expected = "".join(texts(app, long_body(count)))
    jsonschema.validate(json.loads(expected), many(count))
    assert got == expected


def disturb(app: App, request_id: str, disturbance: str, replicas: list[str]) -> bool:
    """False: the request has ended."""
    where = [r["replica"] for r in app.state()["requests"] if r["id"] == request_id]
    if not where:
        return False
    if disturbance == "death":
        ray.kill(app.actor(where[0]))
        return True
    (there,) = set(replicas) - set(where)
    moved = app.post(f"requests/{request_id}/migrate", {"to": there, "mode": disturbance})
    if moved.status_code == 404 or moved.json()["outcome"] == "gone":
        return False
    assert moved.json()["outcome"] == "committed", moved.text
    return True


def texts(app: App, body: dict[str, Any]) -> list[str]:
    url = f"{app.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=TIMEOUT_S) as response:
        return list(contents(response))


def contents(response: httpx.Response) -> Any:
    for line in response.iter_lines():
        data = line.removeprefix("data: ")
        if data and data != "[DONE]":
            for choice in json.loads(data)["choices"]:
                if choice["delta"].get("content"):
                    yield choice["delta"]["content"]
