"""Models that share one slot by sleeping, and what a slot is lent to meanwhile."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from mell_ray.serving import build_openai_app
from tests.serving.conftest import TIMEOUT_S, App, delete

SLOT = "mell_one"
FIRST, SECOND = "first", "second"


def model(name: str, **engine: Any) -> dict[str, Any]:
    return {
        "model_loading_config": {"model_id": name, "model_source": "builtin"},
        "accelerator_type": "CPU",
        "deployment_config": {"autoscaling_config": {"min_replicas": 0, "max_replicas": 1}},
        "engine_kwargs": {"num_gpu_blocks_override": 64, **engine},
    }


@pytest.fixture(scope="module")
def app(cluster: str) -> Iterator[App]:
    """Two models of the same weights and one slot."""
    args = {
        "llm_configs": [model(FIRST), model(SECOND)],
        "mell": {
            "fleet": {
                "cpu_resource": SLOT,
                "idle_grace_s": 3600,
                "replica_lease_s": 120,
                "turn_s": 1,
                "sleep": True,
            },
            "ingress": {"drain_s": 0.5},
        },
    }
    serve.run(build_openai_app(args), name="sleep", route_prefix="/sleep")
    yield App("sleep", f"{cluster}/sleep")
    delete("sleep")


def states(app: App) -> dict[str, str]:
    return {replica["model"]: replica["state"] for replica in app.state()["replicas"]}


async def complete(client: httpx.AsyncClient, app: App, name: str, prompt: str, count: int) -> str:
    body = {
        "model": name,
        "prompt": prompt,
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
    }
    response = await client.post(f"{app.url}/v1/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == count
    return response.json()["choices"][0]["text"]


def ask(app: App, *questions: tuple[str, str], count: int = 16) -> list[str]:
    async def run() -> list[str]:
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
            return await asyncio.gather(
                *(complete(client, app, name, prompt, count) for name, prompt in questions)
            )

    return asyncio.run(run())


def weights(pid: int) -> set[str]:
    """The files in memory with weights that a process maps, by inode."""
    found = re.findall(r" (\d+) +/memfd:mell-weights", Path(f"/proc/{pid}/maps").read_text())
    return set(found)


def test_models_take_turns_on_one_slot(app: App) -> None:
    answers = {FIRST: ask(app, (FIRST, "Emma was"))}
    born = {r["model"]: r["pid"] for r in app.state()["replicas"]}
    answers[SECOND] = ask(app, (SECOND, "Emma was"))
    assert answers[FIRST] == answers[SECOND]  # the same weights
    app.wait(lambda _: states(app) == {FIRST: "lent", SECOND: "ready"}, "wrong states")
    for name in (FIRST, SECOND, FIRST):
        assert ask(app, (name, "Emma was")) == answers[name]
        pids = {r["model"]: r["pid"] for r in app.state()["replicas"]}
        born.setdefault(SECOND, pids[SECOND])
        assert pids == born, "a replica was started anew rather than woken"
    learnt = app.state()["transitions"][FIRST]
    assert 0 < learnt["wake_s"] < learnt["start_s"]


def test_replicas_of_a_node_run_from_the_same_memory(app: App) -> None:
    ask(app, (FIRST, "It was"))
    app.wait(lambda _: states(app) == {FIRST: "ready", SECOND: "lent"}, "wrong states")
    awake, asleep = sorted(app.state()["replicas"], key=lambda replica: replica["model"])
    assert len(weights(awake["pid"])) == 1
    assert weights(asleep["pid"]) == set()


def test_both_answer_while_both_are_busy(app: App) -> None:
    prompts = [f"Chapter {i}." for i in range(4)]
    expected = ask(app, *((FIRST, prompt) for prompt in prompts), count=100)
    mixed = [(name, prompt) for prompt in prompts for name in (FIRST, SECOND)]
    answers = ask(app, *mixed, count=100)
    assert answers[::2] == expected
    assert answers[1::2] == expected


def test_a_holder_that_comes_when_the_replica_sleeps_already_lets_go(app: App) -> None:
    """Or the slot would be taken until the replica has woken, on another, and slept again."""
    ask(app, (FIRST, "One."))
    ask(app, (SECOND, "Two."))
    (name,) = (r["id"] for r in app.state()["replicas"] if r["model"] == FIRST)
    sleeper = ray.get_actor(name, namespace="mell.sleep")
    ray.get(sleeper.keep_slot.remote(), timeout=TIMEOUT_S)


def test_a_slot_is_lent_to_any_task_and_taken_back(app: App) -> None:
    before = ask(app, (FIRST, "She had"))
    sleeper = next(r for r in app.state()["replicas"] if r["state"] == "ready")
    actor = app.actor(sleeper["id"])

    @ray.remote(num_cpus=0, resources={SLOT: 1})
    class Borrower:
        def ready(self) -> bool:
            return True

    # Nobody of the application asks for the slot, so it is another model's turn that frees it.
    ask(app, (SECOND, "She had"))
    borrower = Borrower.remote()
    app.post(f"replicas/{app.state()['replicas'][-1]['id']}/evacuate")
    assert ray.get(borrower.ready.remote(), timeout=TIMEOUT_S)
    app.wait(lambda _: states(app).get(FIRST) == "lent", "the slot is not shown as lent")

    async def wait_for_it() -> list[str]:
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
            answer = asyncio.create_task(complete(client, app, FIRST, "She had", 16))
            while not (await client.get(f"{app.url}/mell/v1/state")).json()["queued"]:
                await asyncio.sleep(0.02)
            ray.kill(borrower)
            return [await answer]

    assert asyncio.run(wait_for_it()) == before
    assert ray.get(actor.info.remote()).pid == sleeper["pid"]
