"""The server does what its own OpenAPI document says, whatever it is sent.

schemathesis makes requests from the document, right ones and wrong ones. A bounded number of them,
the same ones each time. They reach the ingress' own routes and a real engine in one process; the
Router and the way to a replica are stand-ins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from starlette.testclient import TestClient

from mell_ray.builtin import MODEL_ID
from mell_ray.serving.ingress import app as asgi
from tests.conformance import exercise, narrowed
from tests.unit.serving.inprocess_api import WithRequestId, make_api

EXAMPLES = 12
OPERATIONS = sorted(
    (method.upper(), path)
    for path, operations in asgi.openapi()["paths"].items()
    for method in operations
)


@pytest.fixture(scope="module")
def api() -> Iterator[WithRequestId]:
    llm = {
        "model_loading_config": {"model_id": MODEL_ID, "model_source": "builtin"},
        "accelerator_type": "CPU",
        "engine_kwargs": {"max_num_seqs": 256},
    }
    with pytest.MonkeyPatch.context() as patch:
        yield make_api(
            patch, {"llm_configs": [llm], "mell": {"ingress": {"default_max_tokens": 3}}}
        )


@pytest.fixture(scope="module")
def client(api: WithRequestId) -> TestClient:
    return TestClient(api, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def document(client: TestClient) -> dict[str, Any]:
    document = client.get("/openapi.json").raise_for_status().json()
    assert document["paths"].keys() == asgi.openapi()["paths"].keys()
    return narrowed(document, MODEL_ID)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_operation(api: WithRequestId, document: dict[str, Any], method: str, path: str) -> None:
    schema = schemathesis.openapi.from_dict(document)
    schema.app = api
    assert exercise(schema[path][method], lambda case: case.call(app=api, timeout=120), EXAMPLES)


def test_right_bodies_are_answered(client: TestClient, document: dict[str, Any]) -> None:
    """The requests above are not all refused: a document of refusals would conform too."""
    for path in ("/v1/completions", "/v1/chat/completions"):
        name = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        required = document["components"]["schemas"][name["schema"]["$ref"].split("/")[-1]]
        fields = {"model": MODEL_ID, "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
        body = {key: fields[key] for key in required["required"]} | {"max_tokens": 2}
        answer = client.post(path, json=body)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] <= 2
        stream = client.post(path, json=body | {"stream": True})
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/mell/v1/replicas"])
@pytest.mark.parametrize(
    "body", [b"\xff\xfe", b"{", b"[]", b"null", b"[" * 100_000, b'{"a": 1}', b'"\\ud800"']
)
def test_bodies_that_are_no_requests(client: TestClient, path: str, body: bytes) -> None:
    answer = client.post(path, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_what_is_wrong_with_a_body_is_told(client: TestClient) -> None:
    path = "/v1/completions"
    broken = client.post(path, content=b'{"model": "m",\n "n" 2}').json()["error"]["message"]
    assert "line 2, column 6" in broken
    assert "empty" in client.post(path).json()["error"]["message"]


def test_a_path_or_method_that_is_not_there_is_named(client: TestClient) -> None:
    missing = client.post("/v1/responses", json={})
    assert missing.status_code == 404
    assert "POST /v1/responses" in missing.json()["error"]["message"]
    wrong = client.get("/v1/completions")
    assert wrong.status_code == 405
    assert wrong.json()["error"]["message"] == "/v1/completions does not take GET; use POST"


def test_document_holds_no_answer_that_never_comes() -> None:
    document = asgi.openapi()
    for operations in document["paths"].values():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            assert "500" in operation["responses"]
    assert "HTTPValidationError" not in document["components"]["schemas"]
