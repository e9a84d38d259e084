"""Ray's exceptions, translated.

An error raised in an actor arrives as a class that is both ``RayTaskError`` and the original's;
what the original was is what callers want to see.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
)

from mell_ray.errors import MellError

T = TypeVar("T")

DEAD = (ActorDiedError,)
UNREACHABLE = (RayActorError, ActorUnavailableError, ObjectLostError)


def unwrap(error: BaseException) -> BaseException:
    """The exception that was raised in the actor, where ``error`` wraps one of ours."""
    seen: BaseException | None = error
    while isinstance(seen, RayTaskError):
        cause = seen.cause
        if isinstance(cause, MellError):
            return cause
        if cause is seen or not isinstance(cause, BaseException):
            break
        seen = cause
    return error


async def plain(call: Awaitable[T]) -> T:
    """Await an actor call; a MellError raised over there is raised here as itself."""
    try:
        return await call
    except RayTaskError as error:
        raise unwrap(error) from None
