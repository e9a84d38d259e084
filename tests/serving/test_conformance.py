"""A live server does what its own OpenAPI document says: Serve's proxy, Router, real replicas.

``tests/unit/serving/test_conformance.py`` sends more of the same requests without a cluster.
"""

from __future__ import annotations

import httpx
import pytest
import schemathesis

from mell_ray.builtin import MODEL_ID
from mell_ray.serving.ingress import app as asgi
from tests.conformance import exercise, narrowed
from tests.serving.conftest import TIMEOUT_S, App

EXAMPLES = 5
OPERATIONS = sorted(
    (method.upper(), path)
    for path, operations in asgi.openapi()["paths"].items()
    for method in operations
)


@pytest.fixture(scope="module")
def app(deploy) -> App:
    return deploy("conformance", replicas=(1, 1))


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_operation(app: App, method: str, path: str) -> None:
    document = httpx.get(f"{app.url}/openapi.json", timeout=TIMEOUT_S).raise_for_status().json()
    schema = schemathesis.openapi.from_dict(narrowed(document, MODEL_ID))
    operation = schema[path][method]
    assert exercise(
        operation, lambda case: case.call(base_url=app.url, timeout=TIMEOUT_S), EXAMPLES
    )


def test_the_server_is_as_it_was(app: App) -> None:
    app.wait_ready(1)
    app.wait_idle()
