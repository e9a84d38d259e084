"""What a replica does by itself goes on, whatever the others answer."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from ray.exceptions import GetTimeoutError, RayTaskError

from mell_ray.errors import MigrationError
from mell_ray.migration.types import MigrationOrder
from mell_ray.serving import housekeeping

ORDER = MigrationOrder("m", "r", "a", "b", "kv", "test")


class Replica:
    """Has one frozen request, until it has been told how its migration ended."""

    def __init__(self) -> None:
        self.concluded: list[str] = []
        self.done = threading.Event()

    def expire(self) -> None:
        if self.concluded:
            self.done.set()
            raise RuntimeError("the engine has stopped")

    def overdue(self, _freeze_s: float) -> list[MigrationOrder]:
        return [] if self.concluded else [ORDER]

    def conclude(self, order: MigrationOrder, settlement: str) -> None:
        assert order is ORDER
        self.concluded.append(settlement)

    def busy(self) -> bool:
        return True


@pytest.mark.parametrize(
    "error",
    [
        RayTaskError("mig_settle", "", MigrationError("injected")).as_instanceof_cause(),
        GetTimeoutError("late"),
    ],
    ids=["fails", "late"],
)
def test_a_target_that_does_not_say_is_asked_again(monkeypatch, error: Exception) -> None:
    answers = [error, error, "committed"]

    def get(_call: object, timeout: float) -> object:
        assert timeout > 0
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    target = SimpleNamespace(mig_settle=SimpleNamespace(remote=lambda _: None))
    fake = SimpleNamespace(get_actor=lambda *_, **__: target, get=get)
    monkeypatch.setattr(housekeeping, "ray", fake)
    monkeypatch.setattr(housekeeping, "PERIOD_S", 0.001)
    replica = Replica()
    housekeeping.Housekeeping(replica, "ns", lease_s=3600, freeze_limit_s=0).start()  # type: ignore[arg-type]
    assert replica.done.wait(120), "it has stopped asking"
    assert replica.concluded == ["committed"]
