"""What both conformance tests do: in one process, and against a live server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


def narrowed(document: dict[str, Any], model: str) -> dict[str, Any]:
    """The server's own document, with what its authors cannot know: the model that is served."""
    for name in ("ChatCompletionRequest", "CompletionRequest"):
        properties = document["components"]["schemas"][name]["properties"]
        properties["model"] = {"enum": [model]}
        # Few and short choices: this is no load test.
        properties["max_tokens"] = {"type": "integer", "minimum": 1, "maximum": 3}
        properties.pop("max_completion_tokens", None)
        properties["n"] = {"type": "integer", "minimum": 1, "maximum": 2}
    return document


def exercise(operation: Any, call: Callable[[Any], Any], examples: int) -> int:
    """Send ``examples`` requests, the same ones each time, and check each answer against the
    document. Returns how many were sent."""
    sent = 0

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def send(case: Any) -> None:
        nonlocal sent
        response = call(case)
        sent += 1
        case.validate_response(response, checks=CHECKS)

    send()
    return sent
