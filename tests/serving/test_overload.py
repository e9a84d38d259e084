"""A small pool, a short queue: requests wait, are preempted, are refused, but never lost; who waits
is placed by priority and by the share of its API key."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx
import pytest

from mell_ray.builtin import MODEL_ID
from tests.serving.conftest import TIMEOUT_S, App

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
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits) as client:
        calls = [client.post(f"{app.url}/v1/completions", json=body) for body in bodies]
        return await asyncio.gather(*calls)


def test_requests_queue_and_none_is_lost(app: App) -> None:
    """Six requests of up to 13 blocks on 24: they take turns, with or without preemption."""
    responses = asyncio.run(post_all(app, [body(i, 200) for i in range(6)]))
    assert [r.status_code for r in responses] == [200] * 6
    assert [r.json()["usage"]["completion_tokens"] for r in responses] == [200] * 6
    alone = httpx.post(f"{app.url}/v1/completions", json=body(5, 200), timeout=TIMEOUT_S)
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
    response = httpx.post(
        f"{app.url}/v1/completions", json=body(0, BLOCKS * 16 + 1), timeout=TIMEOUT_S
    )
    assert response.status_code == 400
    error = response.json()["error"]
    assert str(BLOCKS * 16) in error["message"]
    assert error["param"] == "max_tokens"


# --- priorities and shares -------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(deploy, tmp_path_factory: pytest.TempPathFactory) -> App:
    keys = tmp_path_factory.mktemp("keys") / "clients"
    keys.write_text("large weight=3\nsmall\n")
    return deploy(
        "shared",
        replicas=(1, 1),
        engine={"num_gpu_blocks_override": BLOCKS, "max_num_seqs": 2},
        mell={"auth": {"clients": {"files": [str(keys)]}, "fair_share": True}},
    )


def bearer(key: str, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", **more}


async def at_the_router(client: httpx.AsyncClient, app: App) -> tuple[int, int]:
    """How many requests wait there, and how many run."""
    answer = await client.get(f"{app.url}/mell/v1/state", headers=bearer("large"))
    state = answer.raise_for_status().json()
    return len(state["queued"]), len(state["requests"])


async def first_ends(app: App, calls: list[tuple[str, dict[str, str]]], count: int) -> list[str]:
    """Names of the first ``count`` calls that are answered once all are there. The last call is
    sent when all others wait or run."""
    ended: list[str] = []
    async with httpx.AsyncClient(
        timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=64)
    ) as client:

        async def call(number: int, name: str, headers: dict[str, str]) -> None:
            url = f"{app.url}/v1/completions"
            answer = await client.post(url, json=body(number, 60), headers=headers)
            assert answer.status_code == 200, answer.text
            ended.append(name)

        tasks = [asyncio.create_task(call(i, *arguments)) for i, arguments in enumerate(calls[:-1])]
        while sum(await at_the_router(client, app)) + len(ended) < len(tasks):
            await asyncio.sleep(0.01)
            for task in tasks:
                if task.done():
                    task.result()
        before = len(ended)
        tasks.append(asyncio.create_task(call(len(tasks), *calls[-1])))
        await asyncio.gather(*tasks)
    return ended[before : before + count]


def test_waiting_requests_are_placed_by_the_weight_of_their_key(shared: App) -> None:
    """The small key's requests come first, and about a third as many of them are answered."""
    calls = [("small", bearer("small"))] * 12 + [("large", bearer("large"))] * 18
    ended = Counter(asyncio.run(first_ends(shared, calls, 12)))
    assert ended["large"] >= 7, ended
    assert ended["small"] >= 1, ended


def test_priority_header_lets_a_request_pass(shared: App) -> None:
    calls = [("usual", bearer("small"))] * 12
    urgent = bearer("small", **{"x-mell-priority": "5"})
    ended = asyncio.run(first_ends(shared, [*calls, ("urgent", urgent)], 6))
    assert "urgent" in ended


@pytest.mark.parametrize("value", ["high", "1.5", "99999999999", ""])
def test_wrong_priority_header_is_refused(shared: App, value: str) -> None:
    answer = httpx.post(
        f"{shared.url}/v1/completions",
        json=body(0, 2),
        headers=bearer("small", **{"x-mell-priority": value}),
        timeout=TIMEOUT_S,
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-mell-priority"
