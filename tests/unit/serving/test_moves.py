"""Moves: what the Router asks the Migrator for."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from mell_ray.migration.types import MigrationOrder, MigrationResult
from mell_ray.scheduler.events import Migrate
from mell_ray.serving import moves
from mell_ray.serving.moves import Moves

FORMATS = {"bf16": "bf16, blocks of 16", "int8": "int8, blocks of 16"}


def replica(kv: str, weights: str = "w") -> SimpleNamespace:
    return SimpleNamespace(info=SimpleNamespace(kv_format=FORMATS[kv], weights=weights))


class Router:
    """As much of the Router's core as a move touches, and the Migrator it asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **replicas: SimpleNamespace) -> None:
        self.fleet = SimpleNamespace(replicas=replicas, namespace="n")
        self.books: dict[str, Any] = {"m": {}}
        self.request = SimpleNamespace(model_id="m", replica_id="a", migrating_to=None)
        self.asked: list[MigrationOrder] = []
        self.handled: list[Any] = []
        actor = SimpleNamespace(migrate=SimpleNamespace(remote=self._migrate))
        monkeypatch.setattr(moves.serve, "get_deployment_actor", lambda _: actor)

    async def _migrate(self, order: MigrationOrder, *_: Any) -> MigrationResult:
        self.asked.append(order)
        return MigrationResult(order, "committed")

    def entry(self, _: str) -> SimpleNamespace:
        return self.request

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        return asyncio.ensure_future(work)

    def handle(self, event: Any) -> None:
        self.handled.append(event)

    def on_migrated(self, result: MigrationResult) -> None:
        pass

    async def move(self, mode: Any) -> MigrationResult:
        subject = Moves(self)  # type: ignore[arg-type]
        subject.start(Migrate("r", "a", "b", mode, "balance"))
        task = subject.running("r")
        assert task is not None
        return await task


@pytest.mark.parametrize("mode", ["kv", "hybrid", "token"])
def test_between_caches_of_different_types_tokens_move(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    router = Router(monkeypatch, a=replica("bf16"), b=replica("int8"))
    result = asyncio.run(router.move(mode))
    assert [order.mode for order in router.asked] == ["token"]
    assert result.order.mode == "token"
    same = Router(monkeypatch, a=replica("int8"), b=replica("int8"))
    asyncio.run(same.move(mode))
    assert [order.mode for order in same.asked] == [mode]


def test_nothing_moves_to_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router(monkeypatch, a=replica("bf16"), b=replica("bf16", weights="v"))
    result = asyncio.run(router.move("kv"))
    assert result.outcome == "aborted"
    assert "weights" in result.detail
    assert router.asked == []
