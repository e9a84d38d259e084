"""``response_format``: what is accepted; the rest is refused before it costs anybody anything."""

from __future__ import annotations

import asyncio
import re
import threading
from typing import Any

import pytest
from pydantic import ValidationError

from mell_ray.errors import InvalidRequestError, OverloadedError
from mell_ray.openai import limits, structured
from mell_ray.openai.errors import from_validation_error
from mell_ray.openai.plan import plan_chat
from mell_ray.openai.protocol import ChatCompletionRequest, CompletionRequest
from mell_ray.openai.structured import SCHEMA_PARAM, GrammarCheck, json_grammar

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}
END = [0]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def asked(**json_schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, **json_schema}}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("value", "path", "says"),
    [
        ("json_object", "response_format", "JSON object"),
        ({}, "response_format.type", "required"),
        ({"type": "xml"}, "response_format.type", "'json_schema'"),
        ({"type": "json_object", "schema": {}}, "response_format.schema", "unknown field"),
        ({"type": "json_schema"}, "response_format.json_schema", "is required"),
        ({"type": "json_object", "json_schema": asked()["json_schema"]}, None, "only allowed"),
        (asked(name=None), "response_format.json_schema.name", "required"),
        (asked(name="a b"), "response_format.json_schema.name", "letters, digits"),
        (asked(name="a" * 65), "response_format.json_schema.name", "1 to 64"),
        (asked(schema=None), SCHEMA_PARAM, "required"),
        (asked(schema=[1]), SCHEMA_PARAM, "must be a JSON object"),
        (asked(strict="yes"), "response_format.json_schema.strict", "boolean"),
        (asked(schemas={}), "response_format.json_schema.schemas", "did you mean 'schema'"),
    ],
)
def test_a_malformed_response_format_is_named_by_its_path(
    value: Any, path: str | None, says: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate({**CHAT, "response_format": value})
    error = from_validation_error(caught.value)
    assert error.param == (path or "response_format.json_schema")
    assert says in error.message


@pytest.mark.parametrize("body", [CHAT, TEXT])
def test_json_comes_to_an_end(body: dict[str, Any]) -> None:
    kind = ChatCompletionRequest if body is CHAT else CompletionRequest
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({**body, "ignore_eos": True, "response_format": asked()})
    assert "ignore_eos" in from_validation_error(caught.value).message


@pytest.mark.parametrize("value", [None, {"type": "text"}, {"type": "text", "json_schema": None}])
def test_text_is_what_comes_anyway(value: Any) -> None:
    request = ChatCompletionRequest.model_validate({**CHAT, "response_format": value})
    assert request == ChatCompletionRequest.model_validate(CHAT)


@pytest.mark.parametrize(
    "value", [{"type": "json_object"}, asked(), asked(strict=True), asked(description="d")]
)
def test_all_choices_get_the_grammar(byte_level: Any, value: Any) -> None:
    request = ChatCompletionRequest.model_validate({**CHAT, "n": 3, "response_format": value})
    limits_ = {"max_model_len": 4096, "default_max_tokens": 16, "request_seed": 1}
    choices = plan_chat(request, byte_level, **limits_)
    wanted = json_grammar({"type": "object"} if value["type"] == "json_object" else SCHEMA)
    assert [choice.sampling.grammar for choice in choices] == [wanted] * 3


def test_a_schema_cannot_loosen_the_rules() -> None:
    free = {"x-guidance": {"lenient": True, "whitespace_flexible": False}}
    check(json_grammar({**SCHEMA, **free}))
    with pytest.raises(InvalidRequestError, match="uniqueItems"):
        check(json_grammar({"type": "array", "uniqueItems": True, **free}))


def check(grammar: str, tokenizer: Any = None) -> None:
    from tests.unit.openai.conftest import make_byte_level

    subject = GrammarCheck(tokenizer or make_byte_level(), END)
    asyncio.run(subject.check(grammar, SCHEMA_PARAM))


HOSTILE: dict[str, dict[str, Any]] = {
    "no type": {"type": "objekt"},
    "nonsense": {"type": "object", "properties": []},
    "unsupported": {"type": "array", "uniqueItems": True},
    "contradiction": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "remote": {"$ref": "http://127.0.0.1:1/schema.json"},
    "file": {"$ref": "file:///etc/passwd"},
    "dangling": {"$ref": "#/$defs/nothing"},
    "regex": {"type": "string", "pattern": "("},
    "deep": deep(300),
    "product": {
        "allOf": [
            {"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}} for j in range(9)]}
            for i in range(12)
        ]
    },
    "heavy regex": {"type": "string", "pattern": "^(.*a.{20}|.*b.{21})$", "minLength": 10_000},
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_a_schema_that_cannot_be_followed_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check(json_grammar(HOSTILE[name]))
    assert caught.value.param == SCHEMA_PARAM
    assert SCHEMA_PARAM in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"enum": ["x" * limits.MAX_SCHEMA_CHARS]}, str(limits.MAX_SCHEMA_CHARS)),
        (deep(100_000), "nested too deep"),
        ({"type": "integer", "maximum": 10**30}, "10"),
    ],
    ids=["long", "deep", "huge number"],
)
def test_a_schema_beyond_all_bounds_is_refused_unread(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says) as caught:
        json_grammar(schema)
    assert caught.value.param == SCHEMA_PARAM


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "string", "pattern": "(?=x)y"}, "regex parse error: look-around"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "not supported. use anyOf"),
        ({"$ref": "#"}, "only refers to itself"),
    ],
)
def test_the_reason_is_one_that_a_client_can_do_something_about(
    schema: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(says)):
        check(json_grammar(schema))


def test_a_tokenizer_without_a_backend_is_told() -> None:
    with pytest.raises(InvalidRequestError, match="tokenizer"):
        check(json_grammar(SCHEMA), tokenizer=object())


def test_a_compilation_without_end_is_given_up(
    monkeypatch: pytest.MonkeyPatch, byte_level: Any
) -> None:
    """The request that compiles is at fault; those that wait for it are not."""
    forever = threading.Event()
    monkeypatch.setattr(structured, "COMPILE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(structured, "_COMPILE_THREADS", 1)
    subject = GrammarCheck(byte_level, END)
    monkeypatch.setattr(subject._compiler, "matcher", lambda _: forever.wait(60))

    async def both() -> list[Any]:
        return await asyncio.gather(
            subject.check("first", "f"), subject.check("second", "f"), return_exceptions=True
        )

    first, second = asyncio.run(both())
    forever.set()
    assert isinstance(first, InvalidRequestError)
    assert isinstance(second, OverloadedError)
