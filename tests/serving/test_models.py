"""Several models in one application: each has its own replicas, capacity and block size."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from ray import serve

from mell_ray.serving import build_openai_app
from tests.serving.conftest import TIMEOUT_S, App, delete, outlasting, settings

NAME = "models"
SMALL_BLOCKS, LARGE_BLOCKS = 12, 60


@pytest.fixture(scope="module")
def app(cluster: str) -> Iterator[App]:
    args = settings(replicas=(1, 1))
    (first,) = args["llm_configs"]

    def model(name: str, engine: dict[str, Any]) -> dict[str, Any]:
        loading = {"model_id": name, "model_source": "builtin"}
        return {**first, "model_loading_config": loading, "engine_kwargs": engine}

    args["llm_configs"] = [
        model("small", {"num_gpu_blocks_override": SMALL_BLOCKS, "block_size": 8}),
        model("large", {"num_gpu_blocks_override": LARGE_BLOCKS, "block_size": 16}),
    ]
    serve.run(build_openai_app(args), name=NAME, route_prefix=f"/{NAME}")
    yield App(NAME, f"{cluster}/{NAME}")
    delete(NAME)


def body(model: str, max_tokens: int, **fields: Any) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": "It was",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        **fields,
    }


def replicas(app: App) -> dict[str, dict[str, Any]]:
    return {replica["model"]: replica for replica in app.state()["replicas"]}


def test_each_model_has_replicas_of_its_own_size(app: App) -> None:
    found = replicas(app)
    assert found["small"]["capacity_blocks"] == SMALL_BLOCKS
    assert found["large"]["capacity_blocks"] == LARGE_BLOCKS


def test_requests_run_on_replicas_of_the_model_they_name(app: App) -> None:
    """At once, so that whatever mixed them up would show."""
    where = {name: replica["id"] for name, replica in replicas(app).items()}

    async def run() -> list[tuple[str, dict[str, Any]]]:
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
            url, headers = f"{app.url}/v1/completions", {"x-mell-trace": "1"}
            names = ["small", "large"] * 6
            calls = [client.post(url, json=body(name, 40), headers=headers) for name in names]
            answers = await asyncio.gather(*calls)
            return [(n, a.raise_for_status().json()) for n, a in zip(names, answers, strict=True)]

    for name, answer in asyncio.run(run()):
        assert answer["model"] == name
        (choice,) = answer["mell_trace"]["choices"]
        assert {place["id"] for place in choice["replicas"]} == {where[name]}
        assert answer["usage"]["completion_tokens"] == 40
    app.wait_idle()


def test_a_request_must_fit_its_own_model(app: App) -> None:
    wanted = SMALL_BLOCKS * 8 + 1
    refused = httpx.post(f"{app.url}/v1/completions", json=body("small", wanted), timeout=TIMEOUT_S)
    assert refused.status_code == 400
    assert str(SMALL_BLOCKS * 8) in refused.json()["error"]["message"]
    served = httpx.post(f"{app.url}/v1/completions", json=body("large", wanted), timeout=TIMEOUT_S)
    assert served.json()["usage"]["completion_tokens"] == wanted


def test_a_full_model_does_not_hold_up_the_other(app: App) -> None:
    async def run(count: int) -> list[str] | None:
        """Models in the order in which their requests end. None: too soon."""
        ended: list[str] = []
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:

            async def call(name: str, tokens: int) -> None:
                url = f"{app.url}/v1/completions"
                (await client.post(url, json=body(name, tokens))).raise_for_status()
                ended.append(name)

            tasks = [asyncio.create_task(call("small", 80)) for _ in range(count)]
            while not (await client.get(f"{app.url}/mell/v1/state")).json()["queued"]:
                if len(ended) == count:
                    return None
                await asyncio.sleep(0.01)
            tasks.append(asyncio.create_task(call("large", 5)))
            await asyncio.gather(*tasks)
        return ended if ended[-1] == "small" else None

    assert outlasting(lambda count: asyncio.run(run(count)), (6, 12, 36))


def test_an_unknown_model_is_told_what_there_is(app: App) -> None:
    answer = httpx.post(f"{app.url}/v1/completions", json=body("none", 2), timeout=TIMEOUT_S)
    assert answer.status_code == 404
    assert "'small', 'large'" in answer.json()["error"]["message"]
    assert json.loads(answer.text)["error"]["code"] == "model_not_found"
