"""The failure table: whatever dies, is lost or comes late while a request moves, its client reads
the same text as if nothing had happened, and nothing is left behind.

Each row lets one fault strike real processes of a running application, at one message of the
protocol. Names of messages are those of ``mell_ray.migration.faults``.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import ray
from ray.util import list_named_actors

from mell_ray.engine.types import RequestState, SamplingParams
from mell_ray.migration.faults import VARIABLE
from mell_ray.migration.types import MigrationOrder
from tests.serving.conftest import App
from tests.serving.test_migration import Stream, body, http, read

pytestmark = pytest.mark.skipif(
    not os.environ.get("MELL_RAY_FAULT_TABLE"),
    reason="kills processes for minutes; set MELL_RAY_FAULT_TABLE=1 to run it",
)

LENGTH = 160
PROMPT = "It is a truth universally acknowledged, that a single man in possession of a fortune"
# Longer than ``timeout_s`` of the application.
LATE = "delay 3"
TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Row:
    """``at``: the message; ``fault``: what happens to it."""

    at: str
    fault: str
    mode: str = "kv"

    def __str__(self) -> str:
        return f"{self.fault.split()[0]}-{self.at}-{self.mode}"


def rows(fault: str, mode: str, *points: str) -> list[Row]:
    return [Row(point, fault, mode) for point in points]


TABLE = [
    *rows("kill", "kv", "source.begin", "source.begin.done", "source.stage", "source.stage.done"),
    *rows("kill", "kv", "source.freeze", "source.freeze.done", "source.release"),
    *rows("kill", "token", "source.tokens"),
    *rows("kill", "kv", "target.reserve", "target.reserve.done", "target.receive"),
    *rows("kill", "kv", "target.stage.done", "target.receive.done"),
    *rows("kill", "kv", "target.commit", "target.commit.done"),
    *rows("kill", "token", "target.wait_progress", "target.extend"),
    *rows("kill", "hybrid", "source.stage.done", "target.wait_progress"),
    *rows("kill", "kv", "migrator.begin", "migrator.begin.done", "migrator.reserve.done"),
    *rows("kill", "kv", "migrator.receive", "migrator.receive.done", "migrator.freeze.done"),
    *rows("kill", "kv", "migrator.commit.done", "migrator.release"),
    *rows("kill", "token", "migrator.extend"),
    *rows("lose", "kv", "source.begin", "target.reserve", "source.stage", "target.receive.done"),
    *rows("lose", "kv", "source.freeze", "source.freeze.done", "target.commit"),
    *rows("lose", "kv", "target.commit.done", "source.release"),
    *rows(LATE, "kv", "source.stage", "source.freeze", "target.commit", "target.commit.done"),
    *rows(LATE, "token", "target.extend"),
    *rows("fail", "kv", "target.reserve", "target.receive", "target.commit"),
]


@pytest.fixture(scope="module")
def app(deploy) -> App:
    mell = {
        "policy": {"name": "worst-fit"},
        "fleet": {"replica_lease_s": 120},
        # Without anything left to the end, each message of the protocol is there to be struck.
        "migration": {"timeout_s": TIMEOUT_S, "freeze_limit_s": 0.5, "tail_bytes": 0},
    }
    # Without a prefix cache each migration has blocks to send.
    return deploy("faults", replicas=(3, 3), engine={"enable_prefix_caching": False}, mell=mell)


@pytest.fixture(scope="module")
def expected(app: App) -> str:
    ready(app)

    async def still() -> str:
        async with http() as client:
            return await read(client, app, body(PROMPT, 0.0, LENGTH))

    return asyncio.run(still())


@pytest.fixture(autouse=True)
def nothing_armed():
    yield
    for left in Path(os.environ[VARIABLE]).iterdir():
        left.unlink()


def ready(app: App) -> None:
    """All replicas and the Migrator, also those in the place of killed ones."""
    app.wait_ready(3)
    prefix = f"SERVE_DEPLOYMENT_ACTOR::{app.name}::"

    def migrator_answers(_: dict) -> bool:
        for entry in list_named_actors(all_namespaces=True):
            if entry["name"].startswith(prefix):
                with suppress(ValueError, ray.exceptions.RayActorError):
                    ray.get(ray.get_actor(**entry).__ray_ready__.remote())
                    return True
        return False

    app.wait(migrator_answers, "no Migrator")


def arm(row: Row) -> Path:
    point = Path(os.environ[VARIABLE]) / row.at
    point.write_text(row.fault)
    return point


def settled(app: App) -> None:
    """No request, block or reservation is anywhere, all books agree, nobody spoke out of turn."""
    app.wait_idle()
    state = app.state()
    assert state["exactly_once_violations"] == 0
    for replica in state["replicas"]:
        if replica["state"] == "ready":
            ray.get(app.actor(replica["id"]).check.remote())


async def attempt(client: httpx.AsyncClient, app: App, request_id: str, mode: str) -> dict | None:
    """A migration that may fail. None: refused before it began."""
    url = f"{app.url}/mell/v1/requests/{request_id}/migrate"
    response = await client.post(url, json={"to": None, "mode": mode})
    assert response.status_code in (200, 404, 409), response.text
    return response.json() if response.status_code == 200 else None


async def moved(app: App, row: Row | None, mode: str) -> tuple[str, dict | None]:
    """Text and result of a request that is migrated, with the fault of ``row``."""
    async with (
        http() as client,
        client.stream(
            "POST", f"{app.url}/v1/completions", json=body(PROMPT, 0.0, LENGTH)
        ) as response,
    ):
        stream, moving, armed = Stream(response), None, None
        async for _ in stream:
            if moving is None and len(stream.chunks) >= 20:
                armed = arm(row) if row else None
                moving = asyncio.create_task(attempt(client, app, stream.request_id, mode))
        assert stream.done
        assert moving is not None
        result = await moving
        assert armed is None or not armed.exists(), f"{row} did not strike: {result}"
        return stream.text, result


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_row(app: App, expected: str, row: Row) -> None:
    ready(app)
    text, _ = asyncio.run(moved(app, row, row.mode))
    assert text == expected
    settled(app)


def test_broken_transport_does_not_end_the_migration_of_others(app: App, expected: str) -> None:
    """The only transport between CPU replicas breaks once: that migration fails, the next works."""
    ready(app)
    text, result = asyncio.run(moved(app, Row("target.receive", "break"), "kv"))
    assert text == expected
    assert result is not None
    assert result["outcome"] == "aborted"
    assert result["fallbacks"] == 1
    text, result = asyncio.run(moved(app, None, "kv"))
    assert text == expected
    assert result is not None
    assert result["outcome"] == "committed"
    settled(app)


def test_two_migrations_race_for_one_request(app: App, expected: str) -> None:
    ready(app)

    async def race() -> tuple[str, list[dict | None]]:
        request = body(PROMPT, 0.0, LENGTH)
        async with (
            http() as client,
            client.stream("POST", f"{app.url}/v1/completions", json=request) as response,
        ):
            stream, racing = Stream(response), None
            async for _ in stream:
                if racing is None and len(stream.chunks) >= 20:
                    racing = asyncio.gather(
                        *(
                            attempt(client, app, stream.request_id, mode)
                            for mode in ("kv", "token", "hybrid")
                        )
                    )
            assert racing is not None
            return stream.text, await racing

    text, results = asyncio.run(race())
    assert text == expected
    assert any(result is not None for result in results)
    settled(app)


def test_target_whose_room_is_taken_declines(app: App, expected: str) -> None:
    ready(app)
    fillers = {}
    for replica in app.state()["replicas"]:
        if replica["state"] != "ready":
            continue
        actor, state = (
            app.actor(replica["id"]),
            RequestState(
                request_id=uuid.uuid4().hex,
                prompt_token_ids=[7] * 900,
                sampling=SamplingParams(max_tokens=2),
                generation=1,
            ),
        )
        fillers[replica["id"]] = (actor, state, replica["capacity_blocks"])

    async def fill() -> tuple[str, dict | None]:
        """Take the other replicas' rooms behind the Router's back, while the request runs."""
        request = body(PROMPT, 0.0, LENGTH)
        async with (
            http() as client,
            client.stream("POST", f"{app.url}/v1/completions", json=request) as response,
        ):
            stream, moving = Stream(response), None
            async for _ in stream:
                if moving is None and len(stream.chunks) >= 20:
                    moving = asyncio.create_task(self_full(client, stream.request_id))
            assert moving is not None
            return stream.text, await moving

    held: list[tuple[object, str]] = []

    async def self_full(client: httpx.AsyncClient, request_id: str) -> dict | None:
        for actor, state, capacity in fillers.values():
            if await actor.generation_of.remote(request_id) is not None:
                continue
            # Large ones, then ever smaller ones into what is left.
            lengths = [900] * (capacity // 57) + [512, 256, 128, 64, 32, 16, 1, 1]
            for i, length in enumerate(lengths):
                filler = RequestState(
                    f"{state.request_id}-{i}",
                    state.prompt_token_ids[:length],
                    state.sampling,
                    generation=1,
                )
                order = MigrationOrder(
                    uuid.uuid4().hex, filler.request_id, "x", "y", "kv", "filler"
                )
                try:
                    await actor.mig_reserve.remote(order, filler)
                except ray.exceptions.RayTaskError:
                    continue
                held.append((actor, order.migration_id))
        return await attempt(client, app, request_id, "kv")

    text, result = asyncio.run(fill())
    assert text == expected
    assert result is not None
    assert result["outcome"] == "aborted"
    assert "OutOfBlocksError" in result["detail"]
    for actor, migration_id in held:
        assert ray.get(actor.mig_settle.remote(migration_id)) == "aborted"
    settled(app)


@pytest.mark.parametrize("at", ["source.stage", "source.freeze", "target.commit"])
def test_client_leaves_while_its_request_moves(app: App, at: str) -> None:
    ready(app)
    point = arm(Row(at, "delay 0.3"))

    async def leave() -> None:
        request = body(PROMPT, 0.0, 600)
        async with http() as client:
            async with client.stream("POST", f"{app.url}/v1/completions", json=request) as response:
                stream = Stream(response)
                async for _ in stream:
                    if len(stream.chunks) >= 20:
                        break
                moving = asyncio.create_task(attempt(client, app, stream.request_id, "kv"))
                deadline = time.monotonic() + 30
                while point.exists():
                    assert time.monotonic() < deadline, "the migration did not get there"
                    await asyncio.sleep(0.01)
            await moving

    asyncio.run(leave())
    settled(app)


@pytest.mark.parametrize("at", ["source.stage", "target.commit"])
def test_request_ends_while_it_moves(app: App, expected: str, at: str) -> None:
    """Its last tokens come while a message of its migration is on its way."""
    ready(app)
    short = body(PROMPT, 0.0, 30)

    async def ends() -> str:
        async with (
            http() as client,
            client.stream("POST", f"{app.url}/v1/completions", json=short) as response,
        ):
            stream, moving = Stream(response), None
            async for _ in stream:
                if moving is None and len(stream.chunks) >= 10:
                    arm(Row(at, "delay 0.5"))
                    moving = asyncio.create_task(attempt(client, app, stream.request_id, "kv"))
            assert moving is not None
            await moving
            return stream.text

    text = asyncio.run(ends())
    assert text
    assert expected.startswith(text)
    settled(app)


def test_a_migration_after_all_that_still_works(app: App, expected: str) -> None:
    ready(app)
    for mode in ("kv", "token", "hybrid"):
        text, result = asyncio.run(moved(app, None, mode))
        assert text == expected
        assert result is not None
        assert result["outcome"] == "committed", result
    settled(app)
