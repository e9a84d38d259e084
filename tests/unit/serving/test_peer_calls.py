"""What a target makes of a source that is silent, dead, unknown, or fails."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError

from mell_ray.errors import MigrationError
from mell_ray.migration.faults import Faults
from mell_ray.migration.transports import TransportError
from mell_ray.migration.types import ChunkMeta, MigrationOrder
from mell_ray.serving.peer_calls import Sources

ORDER = MigrationOrder("m", "r", "a", "b", "kv", "test")
META = ChunkMeta(0, 2, 5, 64)


class Actor:
    """A source whose answer is ``meta`` and ``parcel``; exceptions are raised."""

    def __init__(self, meta: Any = META, parcel: Any = "blocks") -> None:
        self.mig_stage = self
        self._answers = meta, parcel
        self.asked: list[tuple] = []

    def remote(self, *args: Any) -> tuple[asyncio.Future[Any], ...]:
        self.asked.append(args)
        futures = []
        for answer in self._answers:
            futures.append(future := asyncio.get_running_loop().create_future())
            if isinstance(answer, Exception):
                future.set_exception(answer)
                future.exception()  # as Ray: no noise where nobody asks
            elif answer is not None:
                future.set_result(answer)
        return tuple(futures)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, Actor]:
    """Actors by name."""
    actors: dict[str, Actor] = {}

    def get_actor(name: str, namespace: str) -> Actor:
        assert namespace == "here"
        if name not in actors:
            raise ValueError(name)
        return actors[name]

    monkeypatch.setattr(ray, "get_actor", get_actor)
    return actors


async def stage(sources: Sources, timeout_s: float = 30.0) -> Any:
    return await sources.stage(ORDER, 0, 2, "objects", timeout_s)


async def test_blocks_and_what_they_are(cluster: dict[str, Actor]) -> None:
    cluster["a"] = Actor()
    assert await stage(Sources("here", Faults(None))) == (META, "blocks")
    assert cluster["a"].asked == [("m", 0, 2, "objects", None)]


@pytest.mark.parametrize("answers", [(None, None), (META, None)])
async def test_silence_is_a_failure_of_the_transport(
    cluster: dict[str, Actor], answers: tuple
) -> None:
    cluster["a"] = Actor(*answers)
    with pytest.raises(TransportError, match="in time"):
        await stage(Sources("here", Faults(None)), timeout_s=0.01)


async def test_a_broken_transport_there_is_one_here(cluster: dict[str, Actor]) -> None:
    broken = TransportError("the link broke")
    cluster["a"] = Actor(broken, broken)
    with pytest.raises(TransportError, match="the link broke"):
        await stage(Sources("here", Faults(None)))


async def test_a_dead_source_ends_the_migration_and_is_not_asked_again(
    cluster: dict[str, Actor],
) -> None:
    sources = Sources("here", Faults(None))
    cluster["a"] = Actor(ActorDiedError(), ActorDiedError())
    with pytest.raises(MigrationError, match="source a has died") as died:
        await stage(sources)
    assert not isinstance(died.value, TransportError)  # no other transport would reach it
    del cluster["a"]
    with pytest.raises(MigrationError, match="no source a"):
        await stage(sources)
