"""The server does what its own OpenAPI document says, whatever it is sent.

schemathesis makes requests from the document, right ones and wrong ones. A bounded number of them,
the same ones each time.
"""

from __future__ import annotations

import copy
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from mell_ray.builtin import MODEL_ID
from mell_ray.serving.ingress import app as asgi
from tests.serving.conftest import App

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
EXAMPLES = 25
OPERATIONS = sorted(
    (method.upper(), path)
    for path, operations in asgi.openapi()["paths"].items()
    for method in operations
)


@pytest.fixture(scope="module")
def app(deploy) -> App:
    return deploy("conformance", replicas=(1, 2), engine={"max_num_seqs": 8})


@pytest.fixture(scope="module")
def document(app: App) -> dict[str, Any]:
    """The live document, with what its authors cannot know: the model that is served here."""
    document = httpx.get(f"{app.url}/openapi.json").raise_for_status().json()
    # Served under a prefix, which the document tells.
    assert document["paths"].keys() == asgi.openapi()["paths"].keys()
    document = copy.deepcopy(document)
    for name in ("ChatCompletionRequest", "CompletionRequest"):
        properties = document["components"]["schemas"][name]["properties"]
        properties["model"] = {"enum": [MODEL_ID]}
        # Few and short choices: this is no load test.
        properties["max_tokens"] = {"type": "integer", "minimum": 1, "maximum": 3}
        properties.pop("max_completion_tokens", None)
        properties["n"] = {"type": "integer", "minimum": 1, "maximum": 2}
    return document


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_operation(app: App, document: dict[str, Any], method: str, path: str) -> None:
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=app.url)
    operation = schema[path][method]
    statuses: list[int] = []

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def send(case: Any) -> None:
        response = case.call()
        statuses.append(response.status_code)
        case.validate_response(response, checks=CHECKS)

    send()
    assert statuses


def test_right_bodies_are_answered(app: App, document: dict[str, Any]) -> None:
    """The requests above are not all refused: a document of refusals would conform too."""
    for path in ("/v1/completions", "/v1/chat/completions"):
        name = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        required = document["components"]["schemas"][name["schema"]["$ref"].split("/")[-1]]
        fields = {"model": MODEL_ID, "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
        body = {key: fields[key] for key in required["required"]}
        answer = httpx.post(f"{app.url}{path}", json=body | {"max_tokens": 2}, timeout=60)
        assert answer.status_code == 200


@pytest.mark.parametrize("path", ["v1/completions", "v1/chat/completions", "mell/v1/replicas"])
@pytest.mark.parametrize(
    "body", [b"", b"\xff\xfe", b"{", b"[]", b"null", b"[" * 100_000, b'{"a": 1}', b'"\\ud800"']
)
def test_bodies_that_are_no_requests(app: App, path: str, body: bytes) -> None:
    if path.startswith("mell") and body == b"":
        pytest.skip("an empty body is none, and none is needed here")
    answer = httpx.post(f"{app.url}/{path}", content=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_every_route_is_documented() -> None:
    routes = {
        (method, route.path)
        for route in asgi.routes
        for method in getattr(route, "methods", ()) or ()
        if method != "HEAD" and not route.path.startswith(("/docs", "/openapi"))
    }
    documented = {
        (method, path.replace("{model_id}", "{model_id:path}")) for method, path in OPERATIONS
    }
    assert routes == documented


def test_document_holds_no_answer_that_never_comes() -> None:
    document = asgi.openapi()
    for operations in document["paths"].values():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            assert "500" in operation["responses"]
    assert "HTTPValidationError" not in document["components"]["schemas"]
