"""Faults on purpose, for tests: what happens to a message of the protocol is decided by a file.

Where the environment variable ``MELL_RAY_FAULTS`` names a directory when a process starts, each
message looks there for a file with its own name (say ``target.commit``, or ``target.commit.done``
for the answer), takes it away and does what it says: ``kill`` this process, ``lose`` the message,
``delay SECONDS``, ``fail`` with an error, ``break`` the transport. Without the variable nothing is
ever looked up. What is lost ends after ``LOST_S``, when nobody waits for it any more: its arguments
are not to be held for ever.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from mell_ray.errors import MigrationError
from mell_ray.migration.transports.base import TransportError

VARIABLE = "MELL_RAY_FAULTS"
LOST_S = 30.0

P = ParamSpec("P")
T = TypeVar("T")


class Faults:
    """The faults that may strike one process. ``directory``: None: none, ever."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    @classmethod
    def from_environment(cls) -> Faults:
        named = os.environ.get(VARIABLE)
        return cls(Path(named) if named else None)

    async def at(self, point: str) -> None:
        """Let the fault armed for ``point`` strike, once.

        Raises:
            MigrationError: the fault is ``fail``, or ``break`` (a ``TransportError``).
        """
        if self._directory is None:
            return
        action = self._take(point)
        match action.split():
            case []:
                return
            case ["kill"]:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["lose"]:
                await asyncio.sleep(LOST_S)
                raise MigrationError(f"lost at {point}")
            case ["delay", seconds]:
                await asyncio.sleep(float(seconds))
            case ["fail"]:
                raise MigrationError(f"injected at {point}")
            case ["break"]:
                raise TransportError(f"injected at {point}")
            case _:
                raise ValueError(f"{VARIABLE}: {point}: unknown fault {action!r}")

    def _take(self, point: str) -> str:
        assert self._directory is not None
        armed = self._directory / point
        taken = self._directory / f".{point}.{os.getpid()}"
        try:
            armed.rename(taken)  # of two processes only one succeeds
        except FileNotFoundError:
            return ""
        action = taken.read_text()
        taken.unlink()
        return action


class Faulty(Protocol):
    faults: Faults


S = TypeVar("S", bound=Faulty)


def fault_point(
    name: str,
) -> Callable[
    [Callable[Concatenate[S, P], Coroutine[Any, Any, T]]],
    Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
]:
    """Let faults strike when a message arrives (``name``) and before its answer leaves
    (``name.done``)."""

    def wrap(
        method: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
    ) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
        @functools.wraps(method)
        async def run(self: S, *args: P.args, **kwargs: P.kwargs) -> Any:
            await self.faults.at(name)
            answer = await method(self, *args, **kwargs)
            await self.faults.at(f"{name}.done")
            return answer

        return run

    return wrap
