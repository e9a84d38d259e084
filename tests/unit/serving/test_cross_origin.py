"""Web pages that call the API: preflights, and headers on every kind of answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ray import serve
from starlette.testclient import TestClient

from mell_ray.builtin import MODEL_ID
from mell_ray.config import MellConfig
from mell_ray.errors import ConfigError
from tests.unit.serving import inprocess_api
from tests.unit.serving.inprocess_api import build_engine, make_api

PAGE, OTHER = "https://chat.example.com", "https://elsewhere.example.com"
KEY = {"Authorization": "Bearer sesame"}
LLM = {
    "model_loading_config": {"model_id": MODEL_ID, "model_source": "builtin"},
    "accelerator_type": "CPU",
}
BODY = {"model": MODEL_ID, "prompt": "It was", "max_tokens": 3}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def engine() -> Any:
    return build_engine(
        MellConfig.parse({"llm_configs": [LLM]}).llm_configs[0], "cpu", share_weights=False
    )


@pytest.fixture
def served(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], TestClient]:
    monkeypatch.setattr(inprocess_api, "build_engine", lambda *_, **__: engine)
    monkeypatch.setenv("PAGE_KEYS", "sesame")

    def serving(origins: list[str]) -> TestClient:
        settings = {"ingress": {"allowed_origins": origins}}
        api = make_api(
            monkeypatch,
            {
                "llm_configs": [LLM],
                "mell": settings | {"auth": {"clients": {"env": ["PAGE_KEYS"]}}},
            },
        )
        return TestClient(api, raise_server_exceptions=False)

    return serving


def preflight(client: TestClient, origin: str, path: str = CHAT, method: str = "POST") -> Any:
    """What a browser asks, without a key, before a page may send JSON and a key."""
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    return client.options(path, headers=headers)


def allowed(answer: Any) -> str | None:
    assert "access-control-allow-credentials" not in answer.headers
    origin: str | None = answer.headers.get("access-control-allow-origin")
    return origin


@pytest.mark.parametrize(("origins", "told"), [([OTHER, PAGE], PAGE), (["*"], "*")])
def test_an_allowed_page_may_ask_and_read_every_answer(
    served: Callable[[list[str]], TestClient],
    monkeypatch: pytest.MonkeyPatch,
    origins: list[str],
    told: str,
) -> None:
    client = served(origins)
    asked = preflight(client, PAGE)
    assert (asked.status_code, allowed(asked)) == (200, told)
    assert asked.headers["access-control-allow-headers"].split(",") == [
        "authorization",
        "content-type",
        "x-stainless-os",
    ]
    assert "POST" in asked.headers["access-control-allow-methods"]

    page = {"Origin": PAGE}

    def post(body: Any, **headers: str) -> Any:
        return client.post("/v1/completions", json=body, headers={**page, **headers})

    whole = post(BODY, **KEY)
    assert (whole.status_code, allowed(whole)) == (200, told)
    assert "x-request-id" in whole.headers["access-control-expose-headers"]
    stream = post(BODY | {"stream": True}, **KEY)
    assert (stream.status_code, allowed(stream)) == (200, told)
    assert stream.text.endswith("data: [DONE]\n\n")
    assert stream.headers["content-type"].startswith("text/event-stream")

    errors = {
        400: post(BODY | {"n": 0}, **KEY),
        401: post(BODY),
        404: client.get("/nowhere", headers=page | KEY),
        405: client.delete(CHAT, headers=page | KEY),
    }
    service = serve.get_replica_context().servable_object._service  # type: ignore[attr-defined]
    monkeypatch.setattr(service, "prepare", None)  # nobody expects that
    errors[500] = post(BODY, **KEY)
    for status, answer in errors.items():
        assert (answer.status_code, allowed(answer)) == (status, told)
        assert answer.json()["error"]["message"]


def test_other_pages_may_not_and_programs_are_not_asked(
    served: Callable[[list[str]], TestClient],
) -> None:
    client = served([PAGE])
    asked = preflight(client, OTHER)
    assert (asked.status_code, allowed(asked)) == (400, None)
    answer = client.post("/v1/completions", json=BODY, headers={"Origin": OTHER, **KEY})
    assert allowed(answer) is None
    assert answer.headers["vary"] == "Origin"  # or a cache would give one page the other's answer
    assert preflight(client, PAGE, method="DELETE").status_code == 400
    plain = client.post("/v1/completions", json=BODY, headers=KEY)
    assert (plain.status_code, allowed(plain)) == (200, None)


def test_no_page_is_allowed_by_default(served: Callable[[list[str]], TestClient]) -> None:
    client = served([])
    asked = preflight(client, PAGE)
    assert (asked.status_code, allowed(asked)) == (401, None)
    answer = client.post("/v1/completions", json=BODY, headers={"Origin": PAGE, **KEY})
    assert (answer.status_code, allowed(answer)) == (200, None)
    assert "vary" not in answer.headers


@pytest.mark.parametrize(
    ("origins", "message"),
    [
        (["chat.example.com"], "scheme://host"),
        (["https://chat.example.com/"], "scheme://host"),
        (["https://chat.example.com/page"], "scheme://host"),
        (["https://*.example.com"], "scheme://host"),
        (["https://Chat.example.com"], "https://chat.example.com"),
        (["https://chat.example.com:443"], "https://chat.example.com"),
        (["http://localhost:80"], "http://localhost"),
        (["null"], "scheme://host"),
        ([""], "scheme://host"),
        (["*", PAGE], "every origin"),
    ],
)
def test_what_no_browser_sends_is_refused(origins: list[str], message: str) -> None:
    args = {"llm_configs": [LLM], "mell": {"ingress": {"allowed_origins": origins}}}
    with pytest.raises(ConfigError, match=r"mell\.ingress\.allowed_origins") as error:
        MellConfig.parse(args)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "origin",
    [
        PAGE,
        "http://localhost:3000",
        "http://127.0.0.1:8080",
        "http://[::1]:8080",
        "chrome-extension://abcdefghijklmnop",
        "tauri://localhost",
    ],
)
def test_what_browsers_send_is_taken(origin: str) -> None:
    args = {"llm_configs": [LLM], "mell": {"ingress": {"allowed_origins": [origin]}}}
    assert MellConfig.parse(args).mell.ingress.allowed_origins == [origin]
