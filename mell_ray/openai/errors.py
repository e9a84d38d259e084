"""Errors as OpenAI clients expect them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from mell_ray.errors import (
    AuthenticationError,
    InvalidRequestError,
    MellError,
    OverloadedError,
    RateLimitError,
    ServerError,
)

_MAX_SHOWN = 10**20
_SHOWN = 3  # faults named in one message; clients fix them one by one anyway


class ValidationErrors(Protocol):
    """pydantic's ``ValidationError`` and FastAPI's ``RequestValidationError``."""

    def errors(self) -> Iterable[Any]: ...


def error_body(error: BaseException) -> dict[str, Any]:
    """The JSON body of an error response.

    The text of an error that is not ours may hold anything, so it is not shown to the client.
    """
    if not isinstance(error, MellError):
        error = ServerError("the server failed to answer this request")
    return {
        "error": {
            "message": error.message,
            "type": error.error_type,
            "param": error.param,
            "code": error.code,
        }
    }


def error_headers(error: BaseException) -> dict[str, str]:
    """Headers that tell the client what to do about an error."""
    if isinstance(error, OverloadedError | RateLimitError):
        return {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, AuthenticationError):
        return {"WWW-Authenticate": "Bearer"}
    return {}


def from_validation_error(error: ValidationErrors) -> InvalidRequestError:
    """Name the field and say what is expected of it; ``param`` is the first faulty field's path."""
    faults = [_fault(details) for details in error.errors()]
    shown = [message for _, message in faults[:_SHOWN]]
    if len(faults) > _SHOWN:
        shown.append(f"and {len(faults) - _SHOWN} more")
    return InvalidRequestError("; ".join(shown), param=faults[0][0], code="invalid_value")


def _fault(details: Mapping[str, Any]) -> tuple[str | None, str]:
    """Path of the field (``messages.0.role``) and a message that begins with it."""
    path = [str(part) for part in details["loc"]]
    if path[:1] == ["body"]:  # FastAPI's prefix
        path = path[1:]
    name = ".".join(path)
    message = _reason(details)
    return name or None, f"'{name}': {message}" if name else message


def _reason(details: Mapping[str, Any]) -> str:
    kind = details["type"]
    if kind == "missing":
        return "is required"
    if kind == "json_invalid":
        return "the body is not valid JSON"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a JSON object"
    message = str(details["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given = details.get("input")
    # Only numbers are repeated: anything else may hold the user's text.
    if kind != "unsupported_field" and _is_short_number(given):
        return f"{message}, got {given}"
    return message


def _is_short_number(value: Any) -> bool:
    """Python refuses to print integers of thousands of digits."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < _MAX_SHOWN)
