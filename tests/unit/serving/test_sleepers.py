"""What the Router does with replicas that are to sleep or to wake, with stand-ins for Ray."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from mell_ray.errors import ServerError
from mell_ray.scheduler.events import AcquireFailed, Contended, GpuAsleep, GpuLost
from mell_ray.serving import sleepers
from mell_ray.serving.fleet import Replica
from mell_ray.serving.sleepers import Sleepers
from mell_ray.serving.slots import Supply
from mell_ray.serving.wire import ReplicaInfo, Slot

HOME = Slot("node")


class Method:
    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def remote(self, *_: Any) -> Any:
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer


@dataclass
class Holder:
    held: list[Any] = field(default_factory=list)

    @property
    def hold(self) -> Any:
        return self

    def remote(self, actor: Any) -> None:
        self.held.append(actor)


@dataclass
class Actor:
    sleeps: Any = "asleep"
    wakes: Any = None

    @property
    def sleep(self) -> Method:
        return Method(self.sleeps)

    @property
    def wake(self) -> Method:
        return Method(self.wakes)


@dataclass
class World:
    """Core, fleet and watch in one."""

    replicas: dict[str, Replica] = field(default_factory=dict)
    slot: Slot | ServerError | None = HOME
    told: list[Any] = field(default_factory=list)
    incarnation: int = 1
    holder: Holder = field(default_factory=Holder)

    @property
    def fleet(self) -> World:
        return self

    @property
    def llms(self) -> dict[str, None]:
        return {"m": None, "n": None}

    def handle(self, event: Any) -> None:
        self.told.append(event)

    def resource(self, model_id: str) -> str:
        return f"slot of {model_id}"

    async def find_slot(self, replica: Replica) -> Slot | None:
        if isinstance(self.slot, ServerError):
            raise self.slot
        if self.slot is not None:
            replica.holder, replica.placed_s = self.holder, 0.0
        return self.slot

    def move_in(self, model_id: str, holder: Any) -> Replica:
        return Replica("new", model_id, None, holder=holder)

    def kill(self, replica_id: str) -> None:
        self.replicas.pop(replica_id)
        self.told.append(("kill", replica_id))

    def join(self, replica: Replica, *, woken: bool = False, took_s: float | None = None) -> None:
        del took_s
        self.told.append(("join", replica.replica_id, woken))

    def open(self, model_id: str) -> None:
        self.told.append(("open", model_id))

    def start(self, replica: Replica) -> None:
        self.told.append(("start", replica.replica_id))

    async def release(self, replica_id: str) -> None:
        self.told.append(("release", replica_id))

    def add(self, actor: Actor, state: Any = "ready", name: str = "r", **more: Any) -> Replica:
        info = ReplicaInfo(
            name, "m", "node", 1, "cpu", "torch", 8, 16, 64, 128, 4, "hash", "w", "kv", lends=True
        )
        replica = Replica(name, "m", actor, state, info, **more)
        self.replicas[name] = replica
        return replica


def make(world: World) -> Sleepers:
    return Sleepers(world, world)  # type: ignore[arg-type]


async def test_a_superfluous_replica_sleeps() -> None:
    world = World()
    replica = world.add(Actor())
    await make(world).put_to_sleep("r")
    assert replica.state == "asleep"
    assert world.told == []


async def test_one_with_a_request_goes_on() -> None:
    world = World()
    world.add(Actor("busy"))
    await make(world).put_to_sleep("r")
    assert world.told == [("join", "r", False)]


@pytest.mark.parametrize("answer", ["unable", ActorDiedError()])
async def test_one_that_cannot_sleep_ends(answer: Any) -> None:
    world = World()
    world.add(Actor(answer))
    await make(world).put_to_sleep("r")
    assert world.told == [GpuLost("r"), ("release", "r")]


@pytest.mark.parametrize("state", ["asleep", "lent"])
async def test_a_sleeper_wakes_with_its_slot(state: str) -> None:
    world = World()
    replica = world.add(Actor(), state)
    await make(world).wake("r", "m")
    assert replica.state == "ready"
    assert world.told == [("join", "r", True)]
    assert world.holder.held == [replica.actor]


@pytest.mark.parametrize("slot", [Slot("elsewhere"), Slot("node", "another GPU")])
async def test_where_only_another_slot_is_free_a_new_replica_takes_it(slot: Slot) -> None:
    world = World(slot=slot)
    replica = world.add(Actor(), "lent")
    await make(world).wake("r", "m")
    assert replica.state == "lent"
    assert world.told == [GpuAsleep("r", "m"), ("start", "new")]
    assert world.holder.held == []


@pytest.mark.parametrize("slot", [HOME, ServerError("no slot")])
async def test_one_that_does_not_wake_is_ended(slot: Any) -> None:
    world = World(slot=slot)
    world.add(Actor(wakes=ActorDiedError()), "asleep")
    await make(world).wake("r", "m")
    assert world.told[0] == ("kill", "r")
    assert isinstance(world.told[1], AcquireFailed)
    assert world.told[1].model == "m"


async def test_for_one_that_died_asleep_another_is_started() -> None:
    world = World()
    await make(world).wake("gone", "m")
    assert world.told == [("open", "m")]


async def test_waking_waits_until_it_sleeps() -> None:
    world = World()
    replica = world.add(Actor())
    subject = make(world)
    await asyncio.gather(subject.put_to_sleep("r"), subject.wake("r", "m"))
    assert replica.state == "ready"
    assert world.told == [("join", "r", True)]


async def test_it_is_told_who_waits_and_what_is_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"slot of m": Supply({"node": 0.0}, 1.0), "slot of n": Supply({"node": 0.0}, 1.0)}
    monkeypatch.setattr(sleepers, "supply", lambda resource: found[resource])
    world = World()
    sleeper = world.add(Actor(), "asleep", "sleeper")
    waiter = world.add(Actor(), "starting", "waiter", holder=Holder(), asked_s=0.0)
    waiter.model_id = "n"
    subject = make(world)
    await subject._look()
    assert world.told == [Contended({"n": 1})]
    assert sleeper.state == "lent"
    await subject._look()
    assert world.told == [Contended({"n": 1})]
    found["slot of n"] = found["slot of m"] = Supply({"node": 1.0}, 0.0)
    await subject._look()
    assert world.told == [Contended({"n": 1}), Contended({})]
    assert sleeper.state == "asleep"


@pytest.mark.parametrize(("taken", "contended"), [(1.0, True), (2.0, False)])
async def test_a_slot_that_is_just_coming_is_not_waited_for_in_vain(
    monkeypatch: pytest.MonkeyPatch, taken: float, contended: bool
) -> None:
    """One slot is known to be used; a second one that is taken may be the waiting replica's."""
    monkeypatch.setattr(sleepers, "supply", lambda _: Supply({"node": 0.0}, taken))
    monkeypatch.setattr(sleepers, "PATIENCE_S", -1.0)
    monkeypatch.setattr(sleepers, "STARTING_S", 3600.0)
    world = World()
    world.add(Actor(), "ready", "user")
    world.add(Actor(), "starting", "waiter", holder=Holder())
    await make(world)._look()
    assert world.told == ([Contended({"m": 1})] if contended else [])
