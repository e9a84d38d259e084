"""Tool calls through the real client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

from mell_ray.builtin import MODEL_ID
from mell_ray.openai.limits import MAX_TOOL_CALLS
from tests.serving.conftest import App

CHAT = [{"role": "user", "content": "What is the weather in Bath?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 10},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}


def options(**changes: Any) -> dict[str, Any]:
    return {
        "model": MODEL_ID,
        "messages": CHAT,
        "tools": [WEATHER, NOW],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 100,
        "seed": 4,
        **changes,
    }


@pytest.fixture(scope="module")
def app(deploy) -> App:
    return deploy("tools", replicas=(1, 1))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "now"}}])
def test_what_must_be_called_is_called(app: App, choice: Any) -> None:
    answer = app.client.chat.completions.create(**options(tool_choice=choice, n=3))
    for each in answer.choices:
        assert each.finish_reason == "tool_calls"
        assert each.message.content is None
        (call,) = each.message.tool_calls or []
        arguments = json.loads(call.function.arguments)
        if call.function.name == "now":
            assert arguments == {}
        else:
            assert choice == "required"
            assert 1 <= arguments["days"] <= 9
    ids = [call.id for each in answer.choices for call in each.message.tool_calls or []]
    assert len(set(ids)) == 3


def test_several_calls_may_come_where_they_are_wanted(app: App) -> None:
    """The end token is made unlikely, so that the model goes on while it may."""
    answer = app.client.chat.completions.create(
        **options(parallel_tool_calls=True, tools=[NOW], logit_bias={"2": -100}, max_tokens=500)
    )
    calls = answer.choices[0].message.tool_calls or []
    assert len(calls) == MAX_TOOL_CALLS
    assert len({call.id for call in calls}) == MAX_TOOL_CALLS
    assert answer.choices[0].finish_reason == "tool_calls"


def test_a_stream_says_the_same(app: App) -> None:
    whole = app.client.chat.completions.create(**options(n=2))
    chunks = list(
        app.client.chat.completions.create(
            **options(n=2), stream=True, stream_options={"include_usage": True}
        )
    )
    calls: list[list[dict[str, str]]] = [[], []]
    fragments, reasons = 0, {}
    for chunk in chunks:
        for choice in chunk.choices:
            assert not choice.delta.content
            for part in choice.delta.tool_calls or []:
                if part.id:
                    assert part.index == len(calls[choice.index])
                    calls[choice.index].append({"id": "", "name": "", "arguments": ""})
                seen = calls[choice.index][part.index]
                seen["id"] += part.id or ""
                seen["name"] += part.function.name or ""
                seen["arguments"] += part.function.arguments or ""
                fragments += 1
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    expected = [
        [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
        for choice in whole.choices
    ]
    assert [[(c["name"], c["arguments"]) for c in each] for each in calls] == expected
    assert fragments > sum(map(len, calls))
    assert reasons == {0: "tool_calls", 1: "tool_calls"}
    assert chunks[-1].usage == whole.usage


def test_the_result_of_a_call_can_be_sent_back(app: App) -> None:
    first = app.client.chat.completions.create(**options())
    message = first.choices[0].message
    assert message.tool_calls
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    for choice in ("auto", "none"):
        answer = app.client.chat.completions.create(
            **options(messages=[*CHAT, message, result], tool_choice=choice, max_tokens=20)
        )
        assert answer.choices[0].message.content
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].finish_reason in ("stop", "length")


def test_a_call_that_is_cut_says_so(app: App) -> None:
    answer = app.client.chat.completions.create(
        **options(tool_choice={"type": "function", "function": {"name": "weather"}}, max_tokens=12)
    )
    assert answer.choices[0].finish_reason == "length"


def test_parse_gives_typed_arguments(app: App) -> None:
    class Add(BaseModel):
        """Adds."""

        first: int = Field(ge=0, le=99)
        second: int = Field(ge=0, le=99)

    answer = app.client.chat.completions.parse(
        **options(tools=[openai.pydantic_function_tool(Add)])
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Add)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "then"}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]},
         "tools.0.function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}]},
         "tools.0.function.parameters"),
    ],
)  # fmt: skip
def test_malformed_tools_are_refused_by_name(app: App, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        app.client.chat.completions.create(**options(**fields))
    assert caught.value.param == param
    assert not app.state()["requests"]
