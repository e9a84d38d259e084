"""What a policy is asked, and what it may use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from mell_ray.errors import ConfigError
from mell_ray.scheduler.state import Gpu, Pool, Request


@dataclass(frozen=True)
class Context:
    """What a policy knows beside the books."""

    pool: Pool
    price: Callable[[], float]  # GPU-seconds that moving one unit costs now
    growth: int  # what one running request may grow until the next tick
    kept: Callable[[], int]  # GPUs that are not given back, whether they are used or not
    may_move: bool  # migration is enabled
    rng: Random

    def pays(self, units: int, gpu_seconds: float) -> bool:
        """Whether moving ``units`` costs no more than that many GPU-seconds."""
        return units * self.price() <= gpu_seconds


@dataclass(frozen=True)
class NoParams:
    """A policy without settings."""


class Policy:
    """Decides where requests go. It changes plans only: ``pool.assign`` is a place for a request
    that waits and a move for one that runs; the scheduler carries plans out as room allows."""

    name: ClassVar[str]
    Params: ClassVar[type] = NoParams
    eager: ClassVar[bool] = False  # ``tick`` also at reports after requests have ended

    def __init__(self, context: Context, params: Mapping[str, Any]) -> None:
        self.context = context
        self.pool = context.pool
        self.params = parse_params(self.name, self.Params, params)

    def place(self, request: Request) -> Gpu | None:
        """The GPU for a request that waits, with planned room for it; None: there is none.

        The caller assigns the request. The policy may plan moves that make the room.
        """
        raise NotImplementedError

    def shed(self, gpu: Gpu) -> int:
        """Plan moves away from an overfull GPU until it fits.

        Returns 0, or the need of the first request that fits nowhere: the caller sees to a new
        GPU and asks again when it is there.
        """
        while gpu.room() < 0 and len(gpu.requests) > 1:
            victim = self.victim(gpu)
            if victim is None:
                return 0
            target = self.target(victim)
            if target is None:
                return victim.need
            self.pool.assign(victim, target, "overflow")
        return 0

    def victim(self, gpu: Gpu) -> Request | None:
        """Whom to move off an overfull GPU: the smallest request that suffices, else the
        largest."""
        excess = -gpu.room()
        movable = gpu.movable()
        for request in movable:
            if request.need >= excess:
                return request
        return movable[-1] if movable else None

    def target(self, request: Request) -> Gpu | None:
        """Where a victim goes."""
        return self.place(request)

    def tick(self, elapsed_s: float) -> None:
        """Voluntary moves, once per planning epoch, ``elapsed_s`` after the last time. The default
        makes none."""


def parse_params(name: str, kind: type, params: Mapping[str, Any]) -> Any:
    """Build a policy's settings.

    Raises:
        ConfigError: an unknown setting or a wrong value, by name.
    """
    known: Mapping[str, Any] = getattr(kind, "__dataclass_fields__", {})
    for key in params:
        if key not in known:
            listing = ", ".join(known) or "none"
            raise ConfigError(f"policy {name!r} has no setting {key!r}; it has: {listing}")
        _check_type(name, key, known[key].type, params[key])
    try:
        return kind(**params)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"policy {name!r}: {error}") from None


def _check_type(policy: str, key: str, annotation: str, value: object) -> None:
    """Whether ``value`` is what a field annotated so holds; fields of other kinds may hold all."""
    kinds = set(annotation.split(" | "))
    if kinds == {"bool"} and type(value) is not bool:
        raise ConfigError(f"policy {policy!r}: {key} must be true or false, not {value!r}")
    if not kinds <= {"int", "float", "None"} or (value is None and "None" in kinds):
        return
    number = "a whole number" if "float" not in kinds else "a number"
    allowed = (int, float) if "float" in kinds else (int,)
    if type(value) not in allowed or value != value:  # the last: not a number (NaN)
        raise ConfigError(f"policy {policy!r}: {key} must be {number}, not {value!r}")
