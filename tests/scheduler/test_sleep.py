"""GPUs that sleep, and models that take turns on too few of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

from mell_ray.scheduler import ModelLimits, Scheduler, SchedulerConfig
from mell_ray.scheduler.events import (
    AcquireFailed,
    AcquireGpu,
    Arrive,
    Contended,
    Decision,
    Evacuate,
    Event,
    Finish,
    GpuAsleep,
    GpuLost,
    GpuReady,
    Outdate,
    Place,
    Preempt,
    ReleaseGpu,
    Tick,
)

START_S, WAKE_S = 5.0, 0.5


@dataclass
class Slots:
    """A driver with so many slots: GPUs that are asked for wait for one, and then take their time
    to start or to wake. Sleeping ones have none."""

    scheduler: Scheduler
    slots: int = 1
    now: float = 0.0
    waiting: list[AcquireGpu] = field(default_factory=list)
    coming: list[tuple[float, float, AcquireGpu, str]] = field(default_factory=list)
    awake: dict[str, str] = field(default_factory=dict)  # GPU: model
    asleep: dict[str, str] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)  # request: GPU
    log: list[Decision] = field(default_factory=list)
    opened: int = 0

    def send(self, event: Event) -> None:
        for decision in self.scheduler.handle(event, self.now):
            self._carry_out(decision)
        self.scheduler.check()

    def _carry_out(self, decision: Decision) -> None:
        self.log.append(decision)
        match decision:
            case AcquireGpu():
                self.waiting.append(decision)
            case ReleaseGpu(gpu, sleep):
                assert gpu not in self.where.values(), "released with requests on it"
                model = self.awake.pop(gpu)
                if sleep:
                    self.asleep[gpu] = model
            case Place(request, gpu):
                assert gpu in self.awake
                self.where[request] = gpu
            case Preempt(request, gpu):
                assert self.where.pop(request) == gpu

    def finish(self, request: str) -> None:
        self.where.pop(request, None)
        self.send(Finish(request))

    def run(self, seconds: float) -> None:
        """Tick four times a second."""
        for _ in range(round(4 * seconds)):
            self.now += 0.25
            used = len(self.awake) + len(self.coming)
            for _ in range(min(self.slots - used, len(self.waiting))):
                self._give_slot(self.waiting.pop(0))
            for entry in [e for e in self.coming if e[0] <= self.now]:
                self.coming.remove(entry)
                self._arrive(*entry)
            counts: dict[str, int] = {}
            for wanted in self.waiting:
                counts[wanted.model] = counts.get(wanted.model, 0) + 1
            self.send(Contended(counts))
            self.send(Tick())

    def _give_slot(self, wanted: AcquireGpu) -> None:
        gpu = wanted.wake or f"g{self.opened}"
        self.opened += wanted.wake is None
        takes = START_S if wanted.wake is None else WAKE_S
        self.coming.append((self.now + takes, self.now, wanted, gpu))

    def _arrive(self, _: float, given: float, wanted: AcquireGpu, gpu: str) -> None:
        woken = wanted.wake is not None
        if woken:
            assert self.asleep.pop(gpu) == wanted.model
        self.awake[gpu] = wanted.model
        self.send(GpuReady(gpu, wanted.model, 100, woken=woken, took_s=self.now - given))


def make(models: Iterable[str] = "ab", slots: int = 1, **settings: object) -> Slots:
    limits = {model: ModelLimits(0, 2, 100) for model in models}
    config = SchedulerConfig(
        models=limits,
        policy="best-fit",
        **{"max_asleep": 2, "idle_grace_s": 60.0, "turn_s": 2.0, **settings},  # type: ignore[arg-type]
    )
    return Slots(Scheduler(config), slots)


def ask(fleet: Slots, request: str, model: str, size: int = 10) -> None:
    fleet.send(Arrive(request, model, size, size))


def test_a_superfluous_gpu_sleeps_and_is_woken_rather_than_replaced() -> None:
    fleet = make(idle_grace_s=1.0)
    ask(fleet, "r", "a")
    fleet.run(6)
    assert fleet.where == {"r": "g0"}
    fleet.finish("r")
    fleet.run(2)
    assert fleet.asleep == {"g0": "a"}
    ask(fleet, "s", "a")
    assert fleet.log[-2:][0] == AcquireGpu("a", "demand", "g0")
    fleet.run(2)
    assert fleet.where == {"s": "g0"}
    assert fleet.opened == 1
    learnt = fleet.scheduler.transitions()["a"]
    assert learnt["wake_s"] == pytest.approx(WAKE_S)
    assert learnt["start_s"] is not None
    assert learnt["start_s"] > learnt["wake_s"]
    assert fleet.scheduler.transitions()["b"] == {"start_s": None, "wake_s": None}


def test_no_more_sleep_than_may() -> None:
    fleet = make(slots=4, max_asleep=1, idle_grace_s=1.0)
    ask(fleet, "r", "a", 90)
    ask(fleet, "s", "a", 90)
    fleet.run(6)
    fleet.finish("r")
    fleet.finish("s")
    fleet.run(3)
    assert len(fleet.asleep) == 1
    assert fleet.awake == {}


def test_a_gpu_that_is_emptied_or_replaced_ends() -> None:
    fleet = make(slots=2, idle_grace_s=1.0)
    ask(fleet, "r", "a")
    fleet.run(6)
    fleet.send(Evacuate("g0"))
    fleet.finish("r")
    fleet.run(1)
    ask(fleet, "s", "a")
    fleet.run(6)
    fleet.send(Outdate(fleet.where["s"]))
    fleet.finish("s")
    fleet.run(3)
    assert fleet.awake == fleet.asleep == {}


def test_an_empty_gpu_is_given_up_at_once_for_another_model() -> None:
    fleet = make(idle_grace_s=3600.0)
    ask(fleet, "r", "a")
    fleet.run(6)
    fleet.finish("r")
    fleet.run(1)
    assert fleet.awake == {"g0": "a"}
    ask(fleet, "s", "b")
    fleet.run(6)
    assert fleet.where == {"s": "g1"}
    assert fleet.asleep == {"g0": "a"}


def test_nothing_is_given_up_while_nobody_waits() -> None:
    fleet = make(slots=2, idle_grace_s=3600.0)
    ask(fleet, "r", "a")
    ask(fleet, "s", "b")
    fleet.run(6)
    fleet.finish("r")
    fleet.finish("s")
    fleet.run(60)
    assert len(fleet.awake) == 2


def test_models_that_are_both_busy_take_turns() -> None:
    fleet = make()
    number = 0
    served = {"a": 0, "b": 0}
    running: dict[str, tuple[str, float]] = {}
    gaps = {"a": 0.0, "b": 0.0}
    for _ in range(400):
        for model in "ab":
            if sum(m == model for m, _ in running.values()) < 3:
                number += 1
                running[f"r{number}"] = (model, 0.0)
                ask(fleet, f"r{number}", model)
        fleet.run(0.25)
        for model in "ab":
            gaps[model] += 0.25
        for request, (model, age) in list(running.items()):
            if request in fleet.where:
                running[request] = (model, age + 0.25)
                gaps[model] = 0.0
            if age >= 1.0:
                del running[request]
                fleet.finish(request)
                served[model] += 1
        assert max(gaps.values()) < START_S + 10
    assert min(served.values()) > 20
    assert fleet.opened == 2


def test_what_never_ends_waits_for_its_next_turn() -> None:
    fleet = make()
    ask(fleet, "endless", "a")
    fleet.run(6)
    assert fleet.where == {"endless": "g0"}
    ask(fleet, "other", "b")
    fleet.run(9)
    assert fleet.where == {"other": "g1"}
    fleet.finish("other")
    fleet.run(3)
    assert fleet.where == {"endless": "g0"}


def test_a_turn_ends_when_nobody_waits_any_more() -> None:
    fleet = make()
    ask(fleet, "r", "a")
    fleet.run(6)
    ask(fleet, "s", "b")
    fleet.run(2.5)
    assert [gpu.state for gpu in fleet.scheduler.gpus()] == ["yielding"]
    fleet.finish("s")
    fleet.waiting.clear()
    fleet.send(AcquireFailed("b"))
    fleet.run(0.5)
    assert [gpu.state for gpu in fleet.scheduler.gpus()] == ["ready"]
    ask(fleet, "t", "a")
    assert fleet.where == {"r": "g0", "t": "g0"}


def test_a_minimum_is_not_given_up() -> None:
    config = SchedulerConfig(
        models={"a": ModelLimits(1, 1, 100), "b": ModelLimits(0, 1, 100)}, turn_s=1.0
    )
    fleet = Slots(Scheduler(config))
    fleet.run(6)
    assert fleet.awake == {"g0": "a"}
    ask(fleet, "r", "b")
    fleet.run(20)
    assert fleet.awake == {"g0": "a"}


def test_a_sleeper_that_died_is_not_woken() -> None:
    fleet = make(idle_grace_s=0.0)
    fleet.send(GpuAsleep("old", "a"))
    fleet.send(GpuLost("old"))
    ask(fleet, "r", "a")
    assert AcquireGpu("a", "demand") in fleet.log


def test_sleepers_of_an_earlier_router_are_woken() -> None:
    fleet = make()
    fleet.send(GpuAsleep("old", "a"))
    fleet.asleep["old"] = "a"
    ask(fleet, "r", "a")
    fleet.run(2)
    assert fleet.where == {"r": "old"}


def test_a_gpu_that_could_not_fall_asleep_goes_on() -> None:
    fleet = make(idle_grace_s=0.5)
    ask(fleet, "r", "a")
    fleet.run(6)
    fleet.finish("r")
    fleet.run(1)
    assert fleet.asleep == {"g0": "a"}
    fleet.awake["g0"] = fleet.asleep.pop("g0")
    fleet.send(GpuReady("g0", "a", 100))
    ask(fleet, "s", "a")
    assert fleet.where == {"s": "g0"}
    assert fleet.opened == 1


def test_what_is_only_kept_ready_takes_nothing_from_others() -> None:
    fleet = make(idle_grace_s=3600.0)
    ask(fleet, "r", "a")
    fleet.run(6)
    fleet.finish("r")
    for _ in range(20):
        fleet.send(Contended({"b": 1}))
        fleet.send(Tick())
    assert fleet.awake == {"g0": "a"}
