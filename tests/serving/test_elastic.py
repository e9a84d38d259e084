"""Replicas come with the load and go with it."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from mell_ray.builtin import MODEL_ID
from tests.serving.conftest import App


@pytest.fixture(scope="module")
def app(deploy) -> App:
    return deploy(
        "elastic",
        replicas=(0, 2),
        engine={"num_gpu_blocks_override": 24, "max_num_seqs": 8},
        mell={"fleet": {"idle_grace_s": 0.5, "replica_lease_s": 5}},
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
        async with httpx.AsyncClient(timeout=120) as client:
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
