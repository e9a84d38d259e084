"""JSON bodies of HTTP requests, and what is wrong with them."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Request

from mell_ray.errors import InvalidRequestError


async def json_body(request: Request) -> Any:
    raw = await request.body()
    try:
        return json.loads(raw)
    except json.JSONDecodeError as error:
        reason = f": {error.msg} at line {error.lineno}, column {error.colno}" if raw else ""
        state = "not valid JSON" if raw else "empty; send a JSON object"
        raise InvalidRequestError(f"the request body is {state}{reason}") from None
    except (ValueError, RecursionError):
        raise InvalidRequestError("the request body is not valid JSON") from None


async def json_object(request: Request) -> dict[str, Any]:
    """The body of an operator call; an empty one means no settings."""
    body = await json_body(request) if await request.body() else {}
    if not isinstance(body, dict):
        raise InvalidRequestError("the request body must be a JSON object")
    return body


def flag(body: dict[str, Any], name: str) -> bool:
    """The only field that the body may have; true unless it says otherwise."""
    refuse_unknown(body, {name})
    value = body.get(name, True)
    if not isinstance(value, bool):
        raise InvalidRequestError(f"'{name}': must be true or false", param=name)
    return value


def refuse_unknown(body: dict[str, Any], known: set[str]) -> None:
    for name in body:
        if name not in known:
            raise InvalidRequestError(f"'{name}': unknown field; remove it", param=name)
