"""A small pool, a short queue: requests wait, are preempted, are refused, but never lost."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from mell_ray.builtin import MODEL_ID
from tests.serving.conftest import App

BLOCKS = 24


@pytest.fixture(scope="module")
def app(deploy) -> App:
    return deploy(
        "small",
        replicas=(1, 1),
        engine={"num_gpu_blocks_override": BLOCKS, "max_num_seqs": 8},
        mell={"max_queued_requests": 6},
    )


def body(i: int, max_tokens: int) -> dict:
    return {
        "model": MODEL_ID,
        "prompt": f"Chapter {i}. It was",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


async def post_all(app: App, bodies: list[dict]) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=len(bodies))
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        calls = [client.post(f"{app.url}/v1/completions", json=body) for body in bodies]
        return await asyncio.gather(*calls)


def test_requests_queue_and_none_is_lost(app: App) -> None:
    """Six requests of up to 13 blocks on 24: they take turns, with or without preemption."""
    responses = asyncio.run(post_all(app, [body(i, 200) for i in range(6)]))
    assert [r.status_code for r in responses] == [200] * 6
    assert [r.json()["usage"]["completion_tokens"] for r in responses] == [200] * 6
    alone = httpx.post(f"{app.url}/v1/completions", json=body(5, 200), timeout=60)
    assert responses[5].json()["choices"][0]["text"] == alone.json()["choices"][0]["text"]
    app.wait_idle()


def test_full_queue_answers_503_with_retry_after(app: App) -> None:
    responses = asyncio.run(post_all(app, [body(i, 150) for i in range(40)]))
    refused = [r for r in responses if r.status_code == 503]
    answered = [r for r in responses if r.status_code == 200]
    assert len(refused) + len(answered) == 40
    assert refused
    assert len(answered) >= 6
    for response in refused:
        assert int(response.headers["Retry-After"]) >= 1
        assert response.json()["error"]["type"] == "overloaded_error"
    for response in answered:
        assert response.json()["usage"]["completion_tokens"] == 150
    app.wait_idle()


def test_request_larger_than_the_pool_is_refused(app: App) -> None:
    response = httpx.post(f"{app.url}/v1/completions", json=body(0, BLOCKS * 16 + 1), timeout=30)
    assert response.status_code == 400
    error = response.json()["error"]
    assert str(BLOCKS * 16) in error["message"]
    assert error["param"] == "max_tokens"
