"""API keys and limits over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from mell_ray.builtin import MODEL_ID
from tests.serving.conftest import TIMEOUT_S, App, wait_for

LIMIT = 4096


@pytest.fixture(scope="module")
def app(deploy, tmp_path_factory: pytest.TempPathFactory) -> App:
    secret = tmp_path_factory.mktemp("secret")
    (secret / "clients").write_text("client-one\nclient-two\n")
    (secret / "operators").write_text("operator\n")
    return deploy(
        "keys",
        replicas=(1, 1),
        mell={
            "fleet": {"replica_lease_s": 120},
            "ingress": {"drain_s": 0.5, "max_body_bytes": LIMIT, "max_concurrent_per_key": 1},
            "auth": {
                "clients": {"files": [str(secret / "clients")]},
                "operators": {"files": [str(secret / "operators")]},
            },
        },
    )


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL_ID, "prompt": "It was", "max_tokens": 3, **fields}


def test_health_needs_no_key(app: App) -> None:
    assert httpx.get(f"{app.url}/health", timeout=TIMEOUT_S).status_code == 200


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("v1/models", None, 401),
        ("v1/models", "guess", 401),
        ("v1/models", "client-two", 200),
        ("v1/models", "operator", 200),
        ("mell/v1/state", "client-one", 401),
        ("mell/v1/state", "operator", 200),
        ("no/such/path", None, 401),
        ("no/such/path", "client-one", 404),
    ],
)
def test_keys_open_what_they_should(app: App, path: str, key: str | None, status: int) -> None:
    answer = httpx.get(f"{app.url}/{path}", headers=bearer(key) if key else {}, timeout=TIMEOUT_S)
    assert answer.status_code == status
    if status == 401:
        error = answer.json()["error"]
        assert error["code"] == "invalid_api_key"
        assert "Authorization" in error["message"]
        assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_openai_client(app: App) -> None:
    def client(key: str) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{app.url}/v1", api_key=key, max_retries=0, timeout=TIMEOUT_S
        )

    answer = client("client-one").completions.create(**body())
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    with pytest.raises(openai.AuthenticationError):
        client("none").completions.create(**body())


def test_a_long_body_is_answered_413_told_or_counted(app: App) -> None:
    text = json.dumps(body(prompt="x" * LIMIT)).encode()

    def chunks() -> Iterator[bytes]:
        yield text[: LIMIT // 2]
        yield text[LIMIT // 2 :]

    for content in (text, chunks()):
        answer = httpx.post(
            f"{app.url}/v1/completions",
            content=content,
            headers=bearer("client-one"),
            timeout=TIMEOUT_S,
        )
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"


def test_requests_above_the_keys_limit_are_answered_429(app: App) -> None:
    url = f"{app.url}/v1/completions"
    long = body(max_tokens=4000, ignore_eos=True, stream=True)

    async def run() -> tuple[httpx.Response, httpx.Response]:
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
            stream = client.stream("POST", url, json=long, headers=bearer("client-one"))
            async with stream as running:
                lines = running.aiter_lines()  # kept: its end would close the stream
                await anext(lines)
                same = await client.post(url, json=body(), headers=bearer("client-one"))
                other = await client.post(url, json=body(), headers=bearer("client-two"))
                return same, other

    same, other = asyncio.run(run())
    assert same.status_code == 429
    assert int(same.headers["Retry-After"]) >= 1
    assert same.json()["error"]["code"] == "rate_limit_exceeded"
    assert other.status_code == 200

    def free(_: Any) -> bool:
        answer = httpx.post(url, json=body(), headers=bearer("client-one"), timeout=TIMEOUT_S)
        return answer.status_code == 200

    wait_for(free, lambda: None, "the slot of a request whose client left stays taken")
