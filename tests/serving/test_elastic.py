"""Replicas come with the load and go with it."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from mell_ray.builtin import MODEL_ID
from tests.serving.conftest import TIMEOUT_S, App, outlasting

TICKS_A_SECOND = 4


@pytest.fixture(scope="module")
def app(deploy) -> App:
    return deploy(
        "elastic",
        replicas=(0, 2),
        engine={"num_gpu_blocks_override": 24, "max_num_seqs": 8},
        mell={"fleet": {"idle_grace_s": 0.5, "replica_lease_s": 120}},
    )


def test_fleet_grows_from_nothing_to_its_maximum_and_back(app: App) -> None:
    assert app.state()["replicas"] == []
    body = {
        "model": MODEL_ID,
        "max_tokens": 250,
        "temperature": 0,
        "ignore_eos": True,
    }

    async def load() -> tuple[list[httpx.Response], int]:
        most = 0
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
            tasks = [
                asyncio.create_task(
                    client.post(
                        f"{app.url}/v1/completions", json={**body, "prompt": f"Chapter {i}."}
                    )
                )
                for i in range(8)
            ]
            while not all(task.done() for task in tasks):
                state = (await client.get(f"{app.url}/mell/v1/state")).json()
                most = max(most, len(state["replicas"]))
                await asyncio.sleep(0.05)
            return [task.result() for task in tasks], most

    responses, most = asyncio.run(load())
    assert [r.status_code for r in responses] == [200] * 8
    assert [r.json()["usage"]["completion_tokens"] for r in responses] == [250] * 8
    assert most == 2
    app.wait(lambda s: s["replicas"] == [], "idle replicas were not released")


def test_a_replica_that_waits_for_a_node_in_vain_is_withdrawn_when_its_client_goes(deploy) -> None:
    fleet = {"idle_grace_s": 0.2, "cpu_resource": "of_no_node", "require_cpu_resource": True}
    app = deploy("unplaceable", replicas=(0, 1), mell={"fleet": fleet})
    body = {"model": MODEL_ID, "prompt": "Once", "max_tokens": 4, "stream": True}

    async def leave_early() -> None:
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
            url = f"{app.url}/v1/completions"
            request = asyncio.create_task(client.post(url, json=body))
            while [r["state"] for r in app.state()["replicas"]] != ["starting"]:
                await asyncio.sleep(0.02)
            request.cancel()

    asyncio.run(leave_early())
    app.wait(lambda s: s["replicas"] == [], "the replica was not withdrawn")


def test_spare_replicas_are_there_before_the_load(deploy) -> None:
    app = deploy(
        "spare",
        replicas=(0, 3),
        engine={"num_gpu_blocks_override": 40},
        mell={"fleet": {"spare_gpus": 1, "idle_grace_s": 0}},
    )

    async def seen_in_use(length: int) -> dict | None:
        """The state with two replicas, while the request runs."""
        body = {"model": MODEL_ID, "prompt": "It was", "max_tokens": length, "ignore_eos": True}
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
            task = asyncio.create_task(client.post(f"{app.url}/v1/completions", json=body))
            seen = None
            while not (seen or task.done()):
                state = (await client.get(f"{app.url}/mell/v1/state")).json()
                if len(state["replicas"]) == 2 and state["requests"]:
                    seen = state
                await asyncio.sleep(0.02)
            assert (await task).status_code == 200
            return seen

    def opened(length: int) -> bool | None:
        (first,) = app.wait_ready(1)
        assert not app.state()["requests"]
        state = asyncio.run(seen_in_use(length))
        app.wait(lambda s: len(s["replicas"]) == 1, "the second spare was not released")
        return None if state is None else state["requests"][0]["replica"] == first

    assert outlasting(opened, (500, 600, 600))


def test_with_a_forecast_a_replica_outlives_the_lull(deploy) -> None:
    """Demand has just been there; without a forecast the empty replica would go at once."""
    app = deploy(
        "foreseen",
        replicas=(0, 2),
        mell={"fleet": {"forecast": True, "idle_grace_s": 0}},
    )
    client = app.client
    assert client.completions.create(model=MODEL_ID, prompt="It was", max_tokens=4).choices
    app.wait_idle()
    (kept,) = app.wait_ready(1)
    for _ in range(3 * TICKS_A_SECOND):
        assert [r["id"] for r in app.state()["replicas"]] == [kept]
    assert client.completions.create(model=MODEL_ID, prompt="It was", max_tokens=4).choices
    assert [r["id"] for r in app.state()["replicas"]] == [kept]
