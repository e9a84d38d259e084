"""What the server says of itself in ``/openapi.json``: bodies, answers and errors of its routes.

The routes take raw requests, so that their errors have OpenAI's shape; what FastAPI cannot see in
them stands here. The bodies come from the models that validate them.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp

from mell_ray.openai.body import CACHE_HINTS
from mell_ray.openai.limits import MAX_INT32, MAX_STOP_CHARS, MAX_STOP_STRINGS
from mell_ray.openai.protocol import ChatCompletionRequest, CompletionRequest
from mell_ray.serving.cross_origin import CrossOrigin

Schema = dict[str, Any]

ERRORS = {
    400: "The request is wrong; `param` names the field.",
    401: "An API key is needed, and the header has no good one.",
    404: "There is no such thing.",
    409: "Not possible in the present state.",
    413: "The body is too long.",
    429: "The API key has as many requests running as it may.",
    500: "The server failed to answer.",
    503: "Overloaded or not ready; try again after `Retry-After` seconds.",
}
COMMON = (401, 413, 500, 503)  # 413: whatever the route, a body is measured

_TEXT: Schema = {"type": "string"}
_TOKENS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_STOP_STRING: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_HEADERS: list[Schema] = [
    {
        "name": "x-mell-priority",
        "in": "header",
        "description": "In place of the body's `priority`.",
        "schema": {"type": "integer", "minimum": -MAX_INT32, "maximum": MAX_INT32},
    },
    {
        "name": "x-mell-trace",
        "in": "header",
        "description": "1: the answer tells in `mell_trace` where its time went.",
        "schema": {"enum": ["0", "1"]},
    },
]
# What validators take in more than one form.
_FORMS: dict[str, Schema] = {
    "content": {
        "anyOf": [
            _TEXT,
            {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "properties": {
                        "type": {"const": "text"},
                        "text": _TEXT,
                        **{hint: {"description": "Ignored."} for hint in sorted(CACHE_HINTS)},
                    },
                    "required": ["type", "text"],
                    "additionalProperties": False,
                },
            },
        ]
    },
    "prompt": {
        "anyOf": [
            _TEXT,
            _TOKENS,
            {"type": "array", "items": {"anyOf": [_TEXT, _TOKENS]}, "minItems": 1},
        ]
    },
    "stop": {
        "anyOf": [
            _STOP_STRING,
            {"type": "array", "items": _STOP_STRING, "maxItems": MAX_STOP_STRINGS},
        ]
    },
    "model": {"type": "string", "minLength": 1, "description": "As GET /v1/models lists it."},
}


class Api(FastAPI):
    """FastAPI whose document names the schemas below and no answer that never comes."""

    def build_middleware_stack(self) -> ASGIApp:
        """Middleware that is added goes inside of what answers unexpected errors; this must not."""
        return CrossOrigin(super().build_middleware_stack())

    def openapi(self) -> Schema:
        if self.openapi_schema is None:
            document = super().openapi()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(_components())
            document["components"]["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer"}
            }
            for operations in document["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)  # wrong bodies are answered 400
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            self.openapi_schema = document
        return self.openapi_schema


def route(
    *errors: int,
    status: int = 200,
    answer: Schema | None = None,
    body: Schema | None = None,
    body_required: bool = False,
    content_type: str = "application/json",
    needs_key: bool = True,
) -> dict[str, Any]:
    """Keywords for a route's decorator."""
    contents: Schema = {content_type: {"schema": answer or {"type": "object"}}}
    if answer is not None and answer.get("x-streams"):
        contents["text/event-stream"] = {"schema": _TEXT}
    responses: dict[int | str, Schema] = {status: {"description": "OK", "content": contents}}
    for code in sorted({*errors, *(COMMON if needs_key else (413, 500, 503))}):
        responses[code] = {
            "description": ERRORS[code],
            "content": {"application/json": {"schema": _ref("Error")}},
        }
    extra: Schema = {"security": [{}, {"key": []}]} if needs_key else {}
    if body is not None:
        extra["requestBody"] = {
            "required": body_required,
            "content": {"application/json": {"schema": body}},
        }
    return {"status_code": status, "responses": responses, "openapi_extra": extra}


def generation(kind: str) -> dict[str, Any]:
    """A route that generates; ``kind`` is the name of its body's model."""
    answer = {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {
            "id": _TEXT,
            "object": {"enum": ["chat.completion", "text_completion"]},
            "created": {"type": "integer"},
            "model": _TEXT,
            "choices": {"type": "array", "items": {"type": "object"}, "minItems": 1},
            "usage": {"type": "object"},
        },
        "x-streams": True,
    }
    made = route(400, 404, 409, 429, answer=answer, body=_ref(kind), body_required=True)
    made["openapi_extra"]["parameters"] = _HEADERS
    return made


def fields(**properties: Schema) -> Schema:
    """A small body, none of whose fields must be given."""
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _components() -> dict[str, Schema]:
    components: dict[str, Schema] = {"Error": _error()}
    for model in (ChatCompletionRequest, CompletionRequest):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        for name, nested in {**schema.pop("$defs", {}), model.__name__: schema}.items():
            properties = nested.get("properties", {})
            properties.update({key: _FORMS[key] for key in _FORMS if key in properties})
            components[name] = nested
    return components


def _error() -> Schema:
    optional = {"type": ["string", "null"]}
    return {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": _TEXT,
                    "type": _TEXT,
                    "param": optional,
                    "code": optional,
                },
            }
        },
    }
