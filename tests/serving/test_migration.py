"""Requests that move, and replicas that die or are emptied, while clients read their streams."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import httpx
import pytest
import ray
from ray import serve

from mell_ray.builtin import MODEL_ID
from tests.serving.conftest import TIMEOUT_S, App, outlasting

MODES = ["kv", "token", "hybrid", "token", "kv"]


@pytest.fixture(scope="module")
def app(deploy) -> App:
    # Three slots, so that one more may open; the policy leaves the moves to the tests.
    mell = {"policy": {"name": "worst-fit"}, "fleet": {"replica_lease_s": 120}}
    app = deploy("move", replicas=(2, 3), mell=mell)
    app.wait_ready(2)
    return app


def body(prompt: str, temperature: float, length: int) -> dict:
    return {
        "model": MODEL_ID,
        "prompt": prompt,
        "max_tokens": length,
        "temperature": temperature,
        "seed": 17,
        "ignore_eos": True,
        "stream": True,
    }


class Stream:
    """One streamed completion: its id, and its text as it comes."""

    def __init__(self, response: httpx.Response) -> None:
        self.request_id = response.headers["x-request-id"]
        self._lines = response.aiter_lines()
        self.chunks: list[str] = []
        self.done = False

    async def __aiter__(self) -> AsyncIterator[str]:
        async for line in self._lines:
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                self.done = True
            elif data:
                event = json.loads(data)
                assert "error" not in event, event
                self.chunks.append(event["choices"][0]["text"])
                yield self.chunks[-1]

    @property
    def text(self) -> str:
        return "".join(self.chunks)


async def read(client: httpx.AsyncClient, app: App, request: dict) -> str:
    async with client.stream("POST", f"{app.url}/v1/completions", json=request) as response:
        stream = Stream(response)
        async for _ in stream:
            pass
        assert stream.done
        return stream.text


async def read_all(app: App, requests: list[dict]) -> list[str]:
    async with http() as client:
        return await asyncio.gather(*(read(client, app, request) for request in requests))


async def migrate(client: httpx.AsyncClient, app: App, request_id: str, mode: str) -> dict | None:
    """None: the request has ended."""
    url = f"{app.url}/mell/v1/requests/{request_id}/migrate"
    response = await client.post(url, json={"to": None, "mode": mode})
    if response.status_code == 404:
        return None
    assert response.status_code == 200, response.text
    return None if response.json()["outcome"] == "gone" else response.json()


def http() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=64))


def stalls_told(app: App, ids: set[str]) -> dict:
    """What the application knows of migrations, once the ingress has told how these stalled."""

    def complete(_: dict) -> dict | None:
        told = httpx.get(f"{app.url}/mell/v1/migrations", timeout=TIMEOUT_S).json()
        known = {r["id"] for r in told["migrations"] if r["stall_seconds"] is not None}
        return told if ids <= known else None

    return app.wait(complete, "no stall is told")


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "seeded"])
def test_five_migrations_change_no_byte(app: App, temperature: float) -> None:
    """Back and forth, KV and token mode mixed, with 8 other streams running."""
    others = [body(f"Chapter {i}. She had", temperature, 200) for i in range(8)]

    async def moved(main: dict) -> tuple[str, list[dict | None], list[str]]:
        results: list[dict | None] = []
        async with (
            http() as client,
            client.stream("POST", f"{app.url}/v1/completions", json=main) as response,
        ):
            stream = Stream(response)
            background = [asyncio.create_task(read(client, app, o)) for o in others]
            async for _ in stream:
                if len(results) < len(MODES):
                    mode = MODES[len(results)]
                    results.append(await migrate(client, app, stream.request_id, mode))
            texts = await asyncio.gather(*background)
            assert stream.done
            return stream.text, results, texts

    def attempt(length: int) -> tuple[dict, str, list[dict], list[str]] | None:
        main = body("It is a truth universally acknowledged", temperature, length)
        text, results, texts = asyncio.run(moved(main))
        whole = [result for result in results if result is not None]
        return (main, text, whole, texts) if len(whole) == len(MODES) else None

    main, text, results, texts = outlasting(attempt)
    assert [result["outcome"] for result in results] == ["committed"] * 5, results
    assert [result["mode"] for result in results] == MODES
    assert results[-1]["generation"] == 6
    assert len({result["to"] for result in results}) == 2
    told = stalls_told(app, {result["id"] for result in results})
    by_id = {record["id"]: record for record in told["migrations"]}
    for result in results:
        record = by_id[result["id"]]
        assert record["stall_seconds"] > 0
        assert record["stall_gaps"] > 0
    # A short tail goes with the hand-over itself; longer moves name their transport.
    assert {by_id[result["id"]]["transport"] for result in results} <= {None, "objects"}
    assert all(told["totals"][mode]["committed"] > 0 for mode in MODES)
    expected = asyncio.run(read_all(app, [main, *others]))
    assert text == expected[0]
    assert texts == expected[1:]
    assert app.state()["exactly_once_violations"] == 0
    app.wait_idle()


def test_evacuated_replica_is_emptied_and_released(app: App) -> None:

    async def drained(victim: str, requests: list[dict]) -> list[str]:
        async with http() as client:
            tasks = [asyncio.create_task(read(client, app, request)) for request in requests]
            while not any(task.done() for task in tasks):
                state = (await client.get(f"{app.url}/mell/v1/state")).json()
                busy = [r["id"] for r in state["replicas"] if r["running"] > 0]
                if victim in busy and sum(r["running"] for r in state["replicas"]) == 6:
                    break
                await asyncio.sleep(0.02)
            answer = await client.post(f"{app.url}/mell/v1/replicas/{victim}/evacuate")
            assert answer.json()["state"] == "draining"
            return await asyncio.gather(*tasks)

    def attempt(length: int) -> tuple[list[dict], list[str]] | None:
        """None: nothing ran there any more when the replica was to be emptied."""
        victim = app.post("replicas").json()["id"]
        app.wait_ready(3)
        requests = [body(f"Chapter {i}. He was", 0.0, length) for i in range(6)]
        texts = asyncio.run(drained(victim, requests))
        app.wait(
            lambda s: victim not in [r["id"] for r in s["replicas"]], "the replica was not released"
        )
        with pytest.raises(ValueError, match="Failed to look up actor"):
            app.actor(victim)
        moves = [m for m in app.migrations() if m["from"] == victim and m["reason"] == "evacuate"]
        return (requests, texts) if moves else None

    requests, texts = outlasting(attempt, (300, 600, 1200))
    assert texts == asyncio.run(read_all(app, requests))
    app.wait_idle()


def test_killed_replica_s_streams_complete_elsewhere(app: App) -> None:

    async def interrupted(requests: list[dict]) -> list[str] | None:
        async with http() as client:
            tasks = [asyncio.create_task(read(client, app, request)) for request in requests]
            killed = False
            while not (killed or any(task.done() for task in tasks)):
                state = (await client.get(f"{app.url}/mell/v1/state")).json()
                busy = {r["id"]: r for r in state["replicas"] if r["running"] > 0}
                begun = [r for r in state["requests"] if r["tokens"] > 20]
                if len(busy) == 2 and len(begun) == 6:
                    os.kill(next(iter(busy.values()))["pid"], signal.SIGKILL)
                    killed = True
                await asyncio.sleep(0.02)
            texts = await asyncio.gather(*tasks)
            return texts if killed else None

    def attempt(length: int) -> tuple[list[dict], list[str]] | None:
        requests = [body(f"Chapter {i}. It was", 0.0, length) for i in range(6)]
        texts = asyncio.run(interrupted(requests))
        return None if texts is None else (requests, texts)

    requests, texts = outlasting(attempt, (200, 600, 1200))
    assert texts == asyncio.run(read_all(app, requests))
    app.wait_ready(2)  # the minimum is restored
    app.wait_idle()


def test_greedy_equals_transformers_generate(app: App) -> None:
    """20 prompts of different lengths at once, chunked prefill, through the whole system."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mell_ray.builtin import model_path
    from mell_ray.serving.client import connect

    torch.set_num_threads(1)  # several would wait for each other beside the cluster's processes
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    reference = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    words = tokenizer.encode("She had been walking for an hour and a half when " * 60)
    prompts = [words[i : i + 3 + 29 * i] for i in range(20)]
    handle = connect(app.name)._handle
    pending = [handle.generate.remote(prompt=p, max_tokens=24, temperature=0) for p in prompts]
    for prompt, response in zip(prompts, pending, strict=True):
        output = reference.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, use_cache=True
        )
        expected = output[0, len(prompt) :].tolist()
        assert response.result()["choices"][0]["token_ids"] == expected


def test_operator_errors(app: App) -> None:
    missing = app.post("requests/nope/migrate", {"to": None, "mode": "auto"})
    assert missing.status_code == 404
    assert "nope" in missing.json()["error"]["message"]
    assert app.post("replicas/nope/evacuate").status_code == 404
    wrong = app.post("requests/nope/migrate", {"mode": "teleport"})
    assert wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "mode"


def long(length: int) -> dict:
    return body("It is a truth", 0.0, length)


def kill_serve_actor(prefix: str) -> None:
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["name"].startswith(prefix):
            ray.kill(ray.get_actor(entry["name"], namespace=entry["namespace"]))
            return
    raise AssertionError(f"no actor {prefix}")


def across(app: App, kill: Callable[[], None]) -> tuple[int, str, str]:
    """What comes of a long request when ``kill`` is called while it runs, and of one sent right
    after that. Before them the length of the long one."""

    async def orphaned(length: int) -> tuple[int, str, str] | None:
        async with http() as client:
            running = asyncio.create_task(read(client, app, long(length)))
            while not (await client.get(f"{app.url}/mell/v1/state")).json()["requests"]:
                if running.done():
                    return None
                await asyncio.sleep(0.02)
            kill()
            late = await read(client, app, body("Late.", 0.0, 20))
            return length, await running, late

    return outlasting(lambda length: asyncio.run(orphaned(length)), (600, 1200, 3600))


def undisturbed(app: App, length: int) -> str:
    (text,) = asyncio.run(read_all(app, [long(length)]))
    return text


def test_router_may_die(app: App) -> None:
    """Running streams go on; a new Router finds the replicas and places new requests."""
    before = {r["id"] for r in app.state()["replicas"]}
    length, text, late = across(app, lambda: kill_serve_actor(f"SERVE_REPLICA::{app.name}#Router"))
    assert late
    app.wait(lambda s: {r["id"] for r in s["replicas"]} == before, "not the same replicas")
    assert undisturbed(app, length) == text
    app.wait_idle()


def test_serve_controller_may_die(app: App) -> None:
    """Streams go on, new requests are served meanwhile, and nothing is placed twice."""

    def kill() -> None:
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        ray.kill(controller, no_restart=False)

    before = {r["id"] for r in app.state()["replicas"]}

    def runs(_: dict) -> bool:
        with suppress(KeyError, ray.exceptions.RayError):  # the new one is not there yet
            return serve.status().applications[app.name].status == "RUNNING"
        return False

    length, text, late = across(app, kill)
    assert late
    app.wait(runs, "the application does not run any more")
    state = app.state()
    assert {r["id"] for r in state["replicas"]} == before
    assert state["exactly_once_violations"] == 0
    assert undisturbed(app, length) == text
    app.wait_idle()
