"""The thread that owns an engine."""

from __future__ import annotations

import functools
import gc
import threading
import weakref

import pytest

from mell_ray.engine import Engine
from mell_ray.engine.loop import EngineLoop


class Busy:
    """An engine that always has work; a step yields how many there have been."""

    def __init__(self) -> None:
        self.steps = 0

    def has_work(self) -> bool:
        return True

    def step(self) -> int:
        self.steps += 1
        return self.steps


def run(engine: Busy) -> tuple[EngineLoop, threading.Event]:
    stepped = threading.Event()
    loop = EngineLoop(engine, lambda _: stepped.set(), lambda: None)  # type: ignore[arg-type]
    loop.start()
    assert stepped.wait(120)
    return loop, stepped


def test_engine_steps_on_while_there_is_work() -> None:
    engine = Busy()
    loop, stepped = run(engine)
    stepped.clear()
    assert stepped.wait(120)
    loop.stop()
    steps = engine.steps
    assert steps > 1
    with pytest.raises(RuntimeError, match="stopped"):
        loop.call(lambda _: None).result()


def test_paced_engine_answers_between_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MELL_RAY_STEP_S", "3600")
    engine = Busy()
    loop, _ = run(engine)
    assert [loop.call(lambda _: engine.steps).result(120) for _ in range(3)] == [1, 1, 1]
    loop.stop()
    assert engine.steps == 1


def test_what_a_failed_call_held_goes_with_its_error() -> None:
    """Blocks of a migration would else stay in Ray's store until the garbage collector comes, and
    in a process that has nothing more to do it does not come."""

    class Payload:
        pass

    def fail(_: Engine, payload: Payload) -> None:
        raise ValueError(f"no {type(payload).__name__}")

    loop, stepped = run(Busy())
    gc.disable()
    try:
        payload = Payload()
        held = weakref.ref(payload)
        call = loop.call(functools.partial(fail, payload=payload))
        del payload
        with pytest.raises(ValueError, match="no Payload"):
            call.result(120)
        del call
        stepped.clear()
        assert stepped.wait(120)
        assert held() is None
    finally:
        gc.enable()
        loop.stop()
