"""The messages of a chat: what was said, which tools were called, and what they answered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from mell_ray.openai.body import CACHE_HINTS, Body, check_text, identifier
from mell_ray.openai.limits import MAX_NAME_CHARS, MAX_TOOLS

# What clients (OpenAI's, which parses; LiteLLM) add to answers, which people append to the history.
CLIENT_NOTES = frozenset({"parsed", "parsed_arguments", "provider_specific_fields"})

UNSUPPORTED_MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": (),
    "refusal": ("",),
}


def _content(value: Any) -> str:
    if isinstance(value, str):
        return check_text(value)
    if not isinstance(value, list | tuple) or not value:
        raise ValueError('must be a string or a non-empty list of {"type": "text"} parts')
    return "\n".join(_text_part(part) for part in value)


def _participant(value: Any) -> str:
    if not isinstance(value, str) or not 1 <= len(check_text(value)) <= MAX_NAME_CHARS:
        raise ValueError(f"must be a string of 1 to {MAX_NAME_CHARS} characters")
    return value


def _text_part(part: Any) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        raise ValueError('only content parts of {"type": "text"} are supported')
    if not isinstance(part.get("text"), str) or part.keys() - CACHE_HINTS != {"type", "text"}:
        raise ValueError('a text part must be {"type": "text", "text": "..."}')
    return check_text(part["text"])


def _tool_calls(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) > MAX_TOOLS:
        raise ValueError(f"must be a list of at most {MAX_TOOLS} tool calls")
    return list(value)


def _arguments(value: Any) -> Any:
    """As chat templates want them: a JSON object, which clients write as a string."""
    if isinstance(value, str):
        try:
            decoded = json.loads(check_text(value) or "{}")
        except (ValueError, RecursionError):
            decoded = None
        if isinstance(decoded, dict):
            return decoded
    raise ValueError("must be a JSON object, written as a string")


class FunctionCall(Body):
    ignored: ClassVar[frozenset[str]] = CLIENT_NOTES

    name: Annotated[str, BeforeValidator(identifier)]
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments)]


class ToolCall(Body):
    """A call in the history of a chat; ``arguments`` is decoded, as chat templates want it."""

    ignored: ClassVar[frozenset[str]] = CLIENT_NOTES | {"index"}

    id: Annotated[str, BeforeValidator(_participant)]
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One message of a chat. ``content`` parts of type text are joined by line breaks.

    ``name`` goes to the chat template, which may or may not make use of it. Only an assistant's
    message with tool calls may have no content; it then is empty.
    """

    ignored: ClassVar[frozenset[str]] = CACHE_HINTS | CLIENT_NOTES | {"annotations"}
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED_MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: Annotated[list[ToolCall], BeforeValidator(_tool_calls)] = Field(
        default_factory=list
    )
    tool_call_id: Annotated[
        Annotated[str, BeforeValidator(_participant)] | None, Field(validate_default=True)
    ] = None
    content: Annotated[str, BeforeValidator(_content)]
    name: Annotated[str, BeforeValidator(_participant)] | None = None

    @field_validator("tool_calls")
    @classmethod
    def _by_the_assistant(cls, value: list[ToolCall], info: ValidationInfo) -> list[ToolCall]:
        if value and info.data.get("role", "assistant") != "assistant":
            raise ValueError("is only allowed in a message of the assistant")
        return value

    @field_validator("tool_call_id")
    @classmethod
    def _of_a_result(cls, value: str | None, info: ValidationInfo) -> str | None:
        role = info.data.get("role", "")
        if role == "tool" and value is None:
            raise ValueError("is required in a message of a tool")
        if role and role != "tool" and value is not None:
            raise ValueError("is only allowed in a message of a tool")
        return value

    @model_validator(mode="before")
    @classmethod
    def _calls_say_enough(cls, data: Any) -> Any:
        is_call = isinstance(data, Mapping) and data.get("role") == "assistant"
        if is_call and data.get("tool_calls") and data.get("content") is None:
            return {**data, "content": ""}
        return data
