"""GPUs come when needed, go when superfluous, and operators get their way."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from random import Random

import pytest

from mell_ray.scheduler import ModelLimits, Scheduler, SchedulerConfig
from mell_ray.scheduler.events import (
    AcquireGpu,
    Adopt,
    Arrive,
    Cordon,
    Evacuate,
    Event,
    Finish,
    GpuReady,
    Grow,
    Migrate,
    MigrateRequest,
    MigrationDone,
    Outdate,
    Place,
    Queue,
    Reject,
    ReleaseGpu,
)
from tests.scheduler.world import make_world


def test_request_gets_a_gpu_and_the_gpu_is_given_back() -> None:
    world = make_world()
    world.arrive("a", 30)
    assert world.where == {"a": "g0"}
    world.finish("a")
    world.tick()
    assert world.capacity == {}
    world.check()


def test_minimum_is_kept_and_the_maximum_is_not_passed() -> None:
    world = make_world(min_gpus=2, max_gpus=3)
    world.tick()
    assert len(world.capacity) == 2
    for i in range(4):
        world.arrive(f"r{i}", 80)
    assert len(world.capacity) == 3
    assert world.waiting == {"r3": None}
    for i in range(3):
        world.finish(f"r{i}")
    assert world.where.keys() == {"r3"}
    world.tick()
    assert len(world.capacity) == 2
    world.check()


def test_one_start_serves_several_waiting_requests() -> None:
    world = make_world(instant_gpus=False)
    for name in "abc":
        world.arrive(name, 30)
    assert world.starting == ["m"]
    world.arrive("d", 30)
    assert world.starting == ["m", "m"]
    world.start_gpu()
    assert world.where == dict.fromkeys("abc", "g0")
    world.start_gpu()
    assert world.where["d"] == "g1"


def test_a_gpu_that_reports_again_that_it_is_overfull_does_not_ask_for_another() -> None:
    world = make_world(instant_gpus=False, growth_per_tick=4)
    world.arrive("a", 40)
    world.start_gpu()
    world.arrive("b", 40)
    for size in (47, 47, 48, 48):
        world.send(Grow({"a": size, "b": size}))
    assert world.starting == ["m"]
    world.start_gpu()
    assert set(world.where.values()) == {"g0", "g1"}
    world.check()


def test_a_gpu_that_is_not_needed_any_more_does_not_come() -> None:
    world = make_world(instant_gpus=False, idle_grace_s=5.0)
    for name in "ab":
        world.arrive(name, 80)
    assert world.starting == ["m", "m"]
    world.finish("b")
    world.tick()
    world.tick(4.0)
    assert world.starting == ["m", "m"]
    world.tick(2.0)
    assert world.starting == ["m"]
    world.tick(20.0)
    assert world.starting == ["m"], "one that a request waits for was withdrawn"
    world.start_gpu()
    assert world.where == {"a": "g0"}
    world.check()


def test_the_minimum_is_never_withdrawn() -> None:
    world = make_world(min_gpus=1, instant_gpus=False, idle_grace_s=5.0)
    for _ in range(3):
        world.tick(10.0)
    assert world.starting == ["m"]


def test_gpus_that_hold_few_requests_are_asked_for_all_at_once() -> None:
    world = make_world(instant_gpus=False)
    world.send(GpuReady("x", "m", 100, max_requests=2))
    world.capacity["x"] = 100
    for name in "abcdefg":
        world.arrive(name, 1)
    world.tick()
    assert len(world.where) == 2
    assert len(world.starting) == 3
    world.check()


def test_no_more_gpus_are_asked_for_while_many_start() -> None:
    world = make_world(instant_gpus=False, max_gpus=500)
    for i in range(60):
        world.arrive(f"r{i}", 70)
    assert len(world.starting) == 60
    for _ in range(5):
        world.tick(1)
    assert len(world.starting) == 60
    for _ in range(60):
        world.start_gpu()
    assert len(world.where) == 60
    assert world.starting == []
    world.check()


def test_a_burst_of_thousands_is_placed() -> None:
    """Many wait for room that moves under way will free; the others must not wait for them."""
    limits = ModelLimits(0, 1 << 20, 60_000)
    config = SchedulerConfig({"m": limits}, growth_per_tick=16, tokens_per_unit=1, idle_grace_s=0)
    scheduler = Scheduler(dataclasses.replace(config, migration_price=1e-5))
    rng = Random(7)
    sizes = [min(int(rng.lognormvariate(6.6, 0.9)) + 16, 20_000) for _ in range(20_000)]
    events: list[Event] = [Arrive(f"r{i}", "m", size, 60_000) for i, size in enumerate(sizes)]
    gpus, placed = 0, 0
    while events:
        decisions = [d for event in events for d in scheduler.handle(event, 0.0)]
        events = []
        for decision in decisions:
            placed += isinstance(decision, Place)
            if isinstance(decision, AcquireGpu):
                gpus += 1
                events.append(GpuReady(f"g{gpus}", "m", 60_000))
            elif isinstance(decision, Migrate):
                d = decision
                events.append(MigrationDone(d.request, d.src, d.dst, d.mode, 1, 1, 0.1))
    assert placed == len(sizes)
    assert gpus <= 1.02 * sum(size + 16 for size in sizes) / 60_000 + 1
    scheduler.check()


def test_idle_grace_keeps_a_gpu_for_the_next_request() -> None:
    world = make_world(idle_grace_s=5.0)
    world.arrive("a", 30)
    world.finish("a")
    world.tick(1)
    world.tick(4)
    assert list(world.capacity) == ["g0"]
    world.tick(1)
    assert world.capacity == {}


def test_spare_gpus_are_kept_ready() -> None:
    world = make_world(spare_gpus=1)
    world.tick()
    world.arrive("a", 90)
    world.tick()
    assert len(world.capacity) == 2
    world.finish("a")
    world.tick()
    assert len(world.capacity) == 1


def test_failed_start_is_tried_again_later_and_less_often() -> None:
    world = make_world(instant_gpus=False)
    world.arrive("a", 30)
    starts = []
    for second in range(40):
        if world.starting:
            starts.append(second)
            world.start_gpu(fails=True)
        world.tick(1)
    assert starts[0] == 0
    pauses = [b - a for a, b in pairwise(starts)]
    assert pauses == sorted(pauses)
    assert pauses[-1] > pauses[0]
    while not world.starting:
        world.tick(1)
    world.start_gpu()
    assert world.where == {"a": "g0"}


def test_oversized_request_is_rejected_with_both_sizes() -> None:
    world = make_world()
    (reject,) = world.scheduler.handle(Arrive("a", "m", 10, 101), 0.0)
    assert isinstance(reject, Reject)
    assert "101" in reject.reason
    assert "100" in reject.reason
    assert world.scheduler.queue_length() == 0


def test_cordoned_gpu_gets_nothing_new_until_it_is_uncordoned() -> None:
    world = make_world(max_gpus=1)
    world.arrive("a", 10)
    world.send(Cordon("g0"))
    world.arrive("b", 10)
    assert world.waiting == {"b": None}
    world.send(Cordon("g0", cordoned=False))
    assert world.where == {"a": "g0", "b": "g0"}
    world.check()


def test_evacuated_gpu_is_emptied_and_released() -> None:
    world = make_world(instant_moves=False, max_gpus=2, idle_grace_s=9)
    world.arrive("a", 60)
    world.arrive("b", 60)
    world.arrive("c", 20)
    assert world.where == {"a": "g0", "b": "g1", "c": "g0"}
    world.finish("b")
    world.send(Evacuate("g0"))
    assert world.moving.keys() == {"a", "c"}
    world.check()
    world.finish_move("a")
    world.tick()
    assert "g0" in world.capacity
    world.finish_move("c")
    world.tick()
    assert list(world.capacity) == ["g1"]
    assert world.where == {"a": "g1", "c": "g1"}


def test_evacuation_without_room_waits_for_a_gpu() -> None:
    world = make_world(instant_gpus=False)
    world.arrive("a", 60)
    world.start_gpu()
    world.send(Evacuate("g0"))
    world.tick()
    assert world.starting == ["m"]
    world.start_gpu()
    world.tick()
    assert world.where == {"a": "g1"}
    world.tick()
    assert list(world.capacity) == ["g1"]


def test_urgent_moves_do_not_wait_for_each_other() -> None:
    world = make_world(instant_moves=False, max_gpus=2, max_migrations_in_flight=1)
    for name in "abcd":
        world.arrive(name, 20)
    world.send(GpuReady("x", "m", 100))
    world.capacity["x"] = 100
    world.send(Evacuate("g0"))
    assert world.moving.keys() == set("abcd")
    assert all(move.urgent for move in world.moving.values())
    world.check()


@pytest.mark.parametrize(("least", "most"), [(1, 1), (0, 1), (1, 2)])
def test_a_gpu_comes_in_the_place_of_one_that_is_emptied(least: int, most: int) -> None:
    world = make_world(instant_gpus=False, min_gpus=least, max_gpus=most)
    world.arrive("a", 60)
    world.start_gpu()
    world.send(Evacuate("g0"))
    world.tick()
    assert world.starting == ["m"], "one more than the maximum while one goes"
    world.tick()
    assert world.starting == ["m"]
    world.start_gpu()
    world.tick()
    assert world.where == {"a": "g1"}
    world.tick()
    assert list(world.capacity) == ["g1"]
    assert not world.starting
    world.check()


def test_what_leaves_goes_to_a_newer_gpu_if_one_has_room() -> None:
    world = make_world(max_gpus=9, idle_grace_s=9)
    world.arrive("a", 60)
    world.arrive("b", 60)
    world.send(GpuReady("new", "m", 100))
    world.capacity["new"] = 100
    world.send(Outdate("g0"))
    world.send(Outdate("g1"))
    world.arrive("c", 30)
    assert world.where == {"a": "g0", "b": "g1", "c": "g0"}, "old ones serve on"
    world.tick()
    assert world.where == {"a": "g0", "b": "g1", "c": "g0"}
    world.send(Evacuate("g0"))
    assert world.where["a"] == "new"
    assert world.where["c"] == "new"
    world.send(Evacuate("g1"))
    world.tick()
    assert "g0" not in world.capacity
    assert world.where["b"] not in ("g0", "g1")
    world.check()


def test_operator_moves_one_request() -> None:
    world = make_world(instant_moves=False)
    world.arrive("a", 60)
    world.arrive("b", 60)
    world.arrive("c", 20)
    (move,) = world.send(MigrateRequest("c", "g1", "token"))
    assert move == Migrate("c", "g0", "g1", "token", "operator")
    assert world.send(MigrateRequest("c", "g1")) == []  # on its way already
    world.finish_move("c", fails=True)
    assert world.where["c"] == "g0"
    world.check()
    assert world.send(MigrateRequest("a", "g1")) == []  # no room there
    assert world.send(MigrateRequest("nobody")) == []


def test_reservation_counts_at_both_ends_until_the_move_ends() -> None:
    world = make_world(instant_moves=False, max_gpus=2, growth_per_tick=0)
    world.arrive("a", 60)
    world.arrive("b", 60)
    world.arrive("c", 40)
    world.send(MigrateRequest("c", "g1"))
    views = {v.id: v.booked for v in world.scheduler.gpus()}
    assert views == {"g0": 100, "g1": 100}
    world.arrive("d", 40)  # planned to where c leaves, but must wait for it
    assert world.waiting == {"d": None}
    world.finish_move("c")
    assert world.where["d"] == "g0"
    world.check()


def test_late_end_of_a_move_is_harmless() -> None:
    world = make_world(instant_moves=False)
    world.arrive("a", 60)
    world.arrive("b", 60)
    world.send(MigrateRequest("b", "g0"))
    world.arrive("c", 20)
    world.send(MigrateRequest("c", "g1"))
    world.finish("c")
    done = MigrationDone("c", "g0", "g1", "kv", 20, 1000, 0.1)
    assert world.scheduler.handle(done, world.now) == []
    world.check()


def test_unknown_names_are_ignored_and_counted() -> None:
    world = make_world()
    for event in (Finish("x"), Grow({"x": 5}), Cordon("x"), Adopt("r", "m", "x", 1, 2)):
        assert world.scheduler.handle(event, 0.0) == []
    assert world.scheduler.ignored == 4


def test_lost_gpu_forgets_its_requests_and_keeps_those_on_their_way_to_it() -> None:
    world = make_world(instant_moves=False, min_gpus=2)
    world.tick()
    world.arrive("a", 60)
    world.arrive("b", 60)
    world.arrive("c", 20)
    world.send(MigrateRequest("c", "g1"))
    assert world.lose("g1") == ["b"]
    assert world.where == {"a": "g0", "c": "g0"}
    world.check()
    world.arrive("b", 60, exclude=("g0",))
    assert world.where["b"] != "g0"
    world.tick()
    world.check()


def test_adopted_requests_are_booked_where_they_run() -> None:
    world = make_world(min_gpus=1)
    world.tick()
    world.size["a"] = 90
    world.where["a"] = "g0"
    world.send(Adopt("a", "m", "g0", 90, 100))
    world.arrive("b", 20)
    assert world.where["b"] == "g1"
    world.check()


def test_waiting_request_can_leave_the_queue() -> None:
    world = make_world(max_gpus=1)
    world.arrive("a", 80)
    world.arrive("b", 80)
    world.arrive("c", 80)
    world.finish("b")
    world.finish("a")
    assert world.where == {"c": "g0"}


def test_large_request_is_not_overtaken_for_ever() -> None:
    world = make_world(max_gpus=1, growth_per_tick=0)
    world.arrive("a", 50)
    world.arrive("large", 90)
    running = ["a"]
    for i in range(400):
        world.arrive(f"s{i}", 40)
        running = [r for r in world.where if r != "large"]
        if "large" in world.where:
            break
        if running:
            world.finish(running[0])
    assert "large" in world.where
    world.check()


def test_models_do_not_share_gpus() -> None:
    world = make_world(
        models={"m": ModelLimits(0, 1, 100), "n": ModelLimits(0, 1, 100)}, tokens_per_unit=1
    )
    world.arrive("a", 10)
    world.arrive("b", 10, model="n")
    world.arrive("c", 95, model="n")
    assert world.where == {"a": "g0", "b": "g1"}
    assert [world.model_of[world.where[r]] for r in "ab"] == ["m", "n"]
    assert world.waiting == {"c": None}
    (rejected,) = world.scheduler.handle(Arrive("x", "o", 1, 1), 0.0)
    assert isinstance(rejected, Reject)


def test_decisions_of_an_arrival() -> None:
    world = make_world(max_gpus=1)
    assert [type(d) for d in world.send(Arrive("a", "m", 60, 100))] == [AcquireGpu, Queue]
    assert world.send(Arrive("b", "m", 30, 100)) == [Place("b", "g0")]
    assert [type(d) for d in world.send(Arrive("c", "m", 30, 100))] == [Queue]


def test_gpus_of_different_capacity() -> None:
    world = make_world(max_gpus=2, min_gpus=2)
    for name, capacity in (("small", 50), ("large", 100)):
        world.capacity[name] = capacity
        world.send(GpuReady(name, "m", capacity))
    world.arrive("a", 40)
    world.arrive("b", 80)
    world.arrive("c", 60)
    assert world.where == {"a": "small", "b": "large"}
    assert world.waiting == {"c": None}


def test_gpu_is_not_released_while_a_move_to_it_is_in_flight() -> None:
    world = make_world(instant_moves=False)
    world.arrive("a", 60)
    world.arrive("b", 60)
    world.arrive("c", 20)
    world.send(MigrateRequest("c", "g1"))
    world.finish("b")
    world.tick()
    assert "g1" in world.capacity
    world.finish_move("c")
    assert not any(isinstance(d, ReleaseGpu) for d in world.log)


@pytest.mark.parametrize("limit", [1, 2])
def test_at_most_so_many_migrations_at_once(limit: int) -> None:
    world = make_world(
        instant_moves=False, max_gpus=2, max_migrations_in_flight=limit, idle_grace_s=9
    )
    world.send(GpuReady("x", "m", 100))
    world.capacity["x"] = 100
    for name in "abcd":
        world.arrive(name, 20)
    world.arrive("e", 10)
    world.arrive("f", 90)
    world.finish("f")
    source = world.where["a"]
    world.send(Evacuate(source, urgent=False))
    while world.moving:
        assert len(world.moving) <= limit
        world.finish_move(next(iter(world.moving)))
    world.tick()
    assert source not in world.capacity
    world.check()
