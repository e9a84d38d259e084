"""The thread that owns an engine.

The engine is not thread-safe and must not wait for anybody, so one thread runs it and everything
else reaches it through ``call``: the function is executed between two steps, where every structure
of the engine is consistent. That gap is also the only place where ownership of a request can
change hands.

With ``MELL_RAY_STEP_S`` in the environment steps begin at least so many seconds apart, idle between
them: a CPU then keeps the time of a slower accelerator, and several replicas fit onto few cores.
"""

from __future__ import annotations

import collections
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from mell_ray.engine.types import StepOutput

if TYPE_CHECKING:
    from mell_ray.engine import Engine

logger = logging.getLogger(__name__)

T = TypeVar("T")


class EngineLoop:
    """Runs ``engine.step`` while there is work and ``call``s in between.

    ``on_step`` is called in the engine thread after each step and must return quickly.
    ``on_fatal`` is called once if the engine itself fails; the loop has then stopped.
    """

    def __init__(
        self,
        engine: Engine,
        on_step: Callable[[StepOutput], None],
        on_fatal: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._on_step = on_step
        self._on_fatal = on_fatal
        self._wake = threading.Condition()
        self._calls: collections.deque[tuple[Callable[[Engine], object], Future[object]]] = (
            collections.deque()
        )
        self._stopping = False
        self._pace_s = float(os.environ.get("MELL_RAY_STEP_S", "0"))
        self._next_step = 0.0  # monotonic, not earlier
        self._thread = threading.Thread(target=self._run, name="mell-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Let the running step end and stop. Calls still waiting fail."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Run ``function(engine)`` between two steps; its result or exception is the future's."""
        future: Future[T] = Future()
        with self._wake:
            if self._stopping:
                future.set_exception(RuntimeError("the engine has stopped"))
                return future
            self._calls.append((function, future))  # type: ignore[arg-type]
            self._wake.notify()
        return future

    def _run(self) -> None:
        try:
            while self._serve_calls():
                if self._engine.has_work():
                    self._next_step = time.monotonic() + self._pace_s
                    self._on_step(self._engine.step())
        except BaseException:
            logger.exception("the engine failed; this replica cannot go on")
            with self._wake:
                self._stopping = True
            self._on_fatal()
        finally:
            self._fail_waiting_calls()

    def _serve_calls(self) -> bool:
        """Execute what is queued; wait if there is nothing to do. False: stop."""
        while True:
            with self._wake:
                while not (self._calls or self._stopping):
                    early = self._next_step - time.monotonic() if self._pace_s else 0.0
                    if self._engine.has_work() and early <= 0:
                        break
                    self._wake.wait(early if self._engine.has_work() else None)
                if self._stopping:
                    return False
                if not self._calls:
                    return True
            self._answer(*self._calls.popleft())

    def _answer(self, function: Callable[[Engine], object], future: Future[object]) -> None:
        try:
            if future.set_running_or_notify_cancel():
                future.set_result(function(self._engine))
        except BaseException as error:
            future.set_exception(error)
        finally:
            # An error holds this frame, and would hold itself: what the call was made of, blocks of
            # a migration say, would stay until the garbage collector comes.
            del function, future

    def _fail_waiting_calls(self) -> None:
        with self._wake:
            waiting, self._calls = list(self._calls), collections.deque()
        for _, future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(RuntimeError("the engine has stopped"))
