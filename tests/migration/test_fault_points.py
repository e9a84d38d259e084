"""Fault points strike once, where they were armed, and never where nobody asked for them."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
from pathlib import Path

import pytest

from mell_ray.errors import MigrationError
from mell_ray.migration.faults import VARIABLE, Faults, fault_point
from mell_ray.migration.transports import TransportError


class Server:
    def __init__(self, directory: Path | None) -> None:
        self.faults = Faults(directory)
        self.handled = 0

    @fault_point("target.commit")
    async def commit(self, number: int) -> int:
        self.handled += 1
        return number + 1


@pytest.mark.parametrize(("action", "error"), [("fail", MigrationError), ("break", TransportError)])
async def test_strikes_once(tmp_path: Path, action: str, error: type[Exception]) -> None:
    server = Server(tmp_path)
    (tmp_path / "target.commit").write_text(action)
    with pytest.raises(error, match=r"target\.commit"):
        await server.commit(1)
    assert server.handled == 0
    assert await server.commit(1) == 2
    assert list(tmp_path.iterdir()) == []


async def test_answer_is_lost_after_the_work_is_done(tmp_path: Path) -> None:
    server = Server(tmp_path)
    (tmp_path / "target.commit.done").write_text("lose")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await server.commit(1)
    assert server.handled == 1


async def test_without_the_variable_nothing_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "target.commit").write_text("fail")
    server = Server(None)
    server.faults = Faults.from_environment()
    assert await server.commit(1) == 2


async def test_unknown_action_names_itself(tmp_path: Path) -> None:
    (tmp_path / "target.commit").write_text("explode")
    with pytest.raises(ValueError, match="explode"):
        await Server(tmp_path).commit(1)


def _die(directory: Path) -> None:
    asyncio.run(Server(directory).commit(1))


def test_kill_is_a_real_one(tmp_path: Path) -> None:
    (tmp_path / "target.commit").write_text("kill")
    process = multiprocessing.get_context("fork").Process(target=_die, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
