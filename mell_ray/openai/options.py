"""What an answer must look like: ``response_format``, ``tools`` and ``tool_choice``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BeforeValidator, Field, StrictBool, ValidationInfo, field_validator

from mell_ray.openai.body import CACHE_HINTS, Body, check_text, identifier
from mell_ray.openai.limits import MAX_TOOLS


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return check_text(value)


class JsonSchema(Body):
    """``strict`` makes no difference: the answer always follows the schema."""

    ignored: ClassVar[frozenset[str]] = frozenset({"description"})

    name: Annotated[str, BeforeValidator(identifier)]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: StrictBool = False


class ResponseFormat(Body):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[JsonSchema | None, Field(validate_default=True)] = None

    @field_validator("json_schema")
    @classmethod
    def _with_its_type(cls, value: JsonSchema | None, info: ValidationInfo) -> JsonSchema | None:
        kind = info.data.get("type")
        if kind == "json_schema" and value is None:
            raise ValueError("is required with type 'json_schema'")
        if kind != "json_schema" and kind is not None and value is not None:
            raise ValueError("is only allowed with type 'json_schema'")
        return value


class FunctionDefinition(Body):
    """The arguments of a call that must be made always follow ``parameters``; those of a call that
    the model may make do so if ``strict``, and are the model's own else."""

    name: Annotated[str, BeforeValidator(identifier)]
    description: Annotated[str, BeforeValidator(_text)] | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool = False

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value.get("type", "object") != "object":
            raise ValueError("must be a schema of type 'object', as arguments have names")
        return value


class Tool(Body):
    ignored: ClassVar[frozenset[str]] = CACHE_HINTS

    type: Literal["function"]
    function: FunctionDefinition


@dataclass(frozen=True, slots=True)
class NamedTool:
    """``tool_choice`` of one function."""

    name: str


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def check_tool_choice(value: Any) -> ToolChoice:
    """Whether tools may or must be called; for pydantic.

    :raises ValueError: it is none of the four forms.
    """
    if isinstance(value, str) and value in ("none", "auto", "required"):
        return cast(ToolChoice, value)
    function = value.get("function") if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if isinstance(name, str) and value == {"type": "function", "function": {"name": name}}:
        return NamedTool(name)
    raise ValueError(
        'must be "none", "auto", "required" or {"type": "function", "function": {"name": "..."}}'
    )


def check_tools(value: Any) -> Any:
    """Bounds on ``tools``; for pydantic."""
    if not isinstance(value, list | tuple) or len(value) > MAX_TOOLS:
        raise ValueError(f"must be a list of at most {MAX_TOOLS} tools")
    return list(value)


def check_distinct(tools: list[Tool]) -> list[Tool]:
    """Refuse two tools of one name; for pydantic."""
    names = [tool.function.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"has two functions named '{name}'")
    return tools
