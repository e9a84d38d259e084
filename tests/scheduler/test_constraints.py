"""What a real cluster adds: step time, prefixes, priorities, nodes, more size than room."""

from __future__ import annotations

from collections import Counter

import pytest

from mell_ray.scheduler import CostConfig
from mell_ray.scheduler.events import (
    Adopt,
    Arrive,
    GpuReady,
    Grow,
    Migrate,
    MigrateRequest,
    MigrationDone,
    Place,
    Preempt,
    ReleaseGpu,
    StepTime,
    Tick,
)
from mell_ray.scheduler.forecast import Forecast
from mell_ray.scheduler.policies.headroom import Headroom
from mell_ray.scheduler.prefixes import PrefixIndex
from mell_ray.scheduler.steptime import StepTimeModel
from tests.scheduler.world import CAPACITY, World, make_world

# --- step time -------------------------------------------------------------------------------


def fitted(limit_s: float) -> StepTimeModel:
    model = StepTimeModel(limit_s, tokens_per_unit=1)
    for i in range(200):
        sequences, tokens = i % 17, (37 * i) % 30_000
        model.observe(sequences, tokens, 0.01 + 0.001 * sequences + 1e-6 * tokens)
    return model


def test_step_time_coefficients_are_found() -> None:
    a, b, c = fitted(0.05).coefficients()
    assert a == pytest.approx(0.01, rel=0.05)
    assert b == pytest.approx(0.001, rel=0.05)
    assert c == pytest.approx(1e-6, rel=0.05)


def test_room_ends_where_the_predicted_step_reaches_the_limit() -> None:
    model = fitted(0.05)
    room = model.room(10, 5_000)
    assert model.predict(10, 5_000 + room) == pytest.approx(0.05, rel=0.01)
    assert model.room(60, 0) == 0
    assert StepTimeModel(0.05, 1).room(1000, 1000) > 1 << 30  # nothing is known yet


def test_slow_gpu_is_full_before_its_memory_is() -> None:
    world = make_world(tpot_limit_s=0.035, max_gpus=2)
    world.arrive("a", 10)
    for i in range(64):
        sequences = 1 + i % 5
        world.send(StepTime("g0", sequences, i % 90, 0.01 + 0.01 * sequences))
    world.arrive("b", 10)
    world.arrive("c", 10)
    assert world.where == {"a": "g0", "b": "g0", "c": "g1"}


def learn(world: World, gpu: str) -> None:
    """Each sequence makes a step of this GPU 10 ms longer."""
    for i in range(64):
        sequences = 1 + i % 5
        world.send(StepTime(gpu, sequences, i % 90, 0.01 + 0.01 * sequences))


@pytest.mark.parametrize("policy", ["tide", "best-fit", "worst-fit"])
def test_gpu_over_its_target_gives_requests_away_until_it_is_not(policy: str) -> None:
    world = make_world(policy, tpot_limit_s=0.035, max_gpus=3, idle_grace_s=1e9)
    for name in "abcde":  # packed before anything is known of the step time
        world.arrive(name, 10)
    if policy != "worst-fit":
        assert set(world.where.values()) == {"g0"}
    for _ in range(8):
        for gpu in list(world.capacity):
            learn(world, gpu)
        world.tick()
    assert max(Counter(world.where.values()).values()) <= 2
    assert len(world.where) == 5
    if policy != "worst-fit":
        assert "balance" in {d.reason for d in world.log if isinstance(d, Migrate)}
    before = world.moved
    for _ in range(20):
        world.tick()
    assert world.moved == before, "requests go back and forth"
    world.check()


def test_gpu_a_little_over_its_target_is_left_alone() -> None:
    world = make_world(tpot_limit_s=0.0395, max_gpus=2)
    for name in "abc":
        world.arrive(name, 10)
    learn(world, "g0")
    for _ in range(5):
        world.tick()
    assert set(world.where.values()) == {"g0"}


def test_slow_gpu_keeps_its_requests_where_none_may_move() -> None:
    world = make_world(tpot_limit_s=0.035, max_gpus=2, migration_enabled=False)
    for name in "abcde":
        world.arrive(name, 10)
    learn(world, "g0")
    world.tick()
    assert set(world.where.values()) == {"g0"}


def test_gpu_takes_no_more_requests_than_it_may() -> None:
    world = make_world(max_gpus=1)
    world.capacity["x"] = 100
    world.send(GpuReady("x", "m", 100, max_requests=2))
    for name in "abc":
        world.arrive(name, 5)
    assert world.where == {"a": "x", "b": "x"}
    world.finish("a")
    assert world.where == {"b": "x", "c": "x"}


# --- prefixes --------------------------------------------------------------------------------


def test_longest_common_prefix_is_found_per_gpu() -> None:
    index: PrefixIndex[str] = PrefixIndex(2)
    index.record("x", [b"1", b"2", b"3"], 100)
    index.record("y", [b"1", b"9"], 100)
    assert index.matches([b"1", b"2", b"7"]) == {"x": 4, "y": 2}
    assert index.match("y", [b"1", b"2"]) == 2
    assert index.matches([b"2"]) == {"x": 2}
    index.forget("x")
    assert index.matches([b"1", b"2"]) == {"y": 2}
    assert len(index) == 2


def test_a_cache_holds_no_more_than_the_gpu() -> None:
    index: PrefixIndex[str] = PrefixIndex(10)
    for i in range(50):
        index.record("x", [b"%d" % i], 100)
    assert len(index) == 10
    assert index.matches([b"0"]) == {}
    assert index.matches([b"49"]) == {"x": 10}


def prefix_world(price: float) -> World:
    world = make_world(
        min_gpus=2,
        migration_price=price,
        cost=CostConfig(prefill_tokens_per_s=100.0),
    )
    world.tick()
    world.arrive("a", 30, prefix=(b"s1", b"s2"))
    world.arrive("full", 90)
    world.arrive("other", 50)
    return world


def test_request_goes_where_its_prefix_is_cached() -> None:
    world = prefix_world(price=1e-6)
    world.arrive("tight", 8)  # best fit: the fullest GPU
    assert world.where["tight"] == world.where["full"]
    world.finish("tight")
    world.arrive("b", 8, prefix=(b"s1", b"s2", b"own"))
    assert world.where["b"] == world.where["a"]


def test_prefix_is_not_worth_any_price() -> None:
    world = prefix_world(price=1.0)
    world.arrive("b", 8, prefix=(b"s1", b"s2", b"own"))
    assert world.where["b"] == world.where["full"]


# --- priorities ------------------------------------------------------------------------------


def test_important_request_preempts_the_youngest_unimportant_one() -> None:
    world = make_world(max_gpus=1)
    world.arrive("old", 40)
    world.arrive("young", 40)
    world.arrive("vip", 50, priority=1)
    assert world.where == {"old": "g0", "vip": "g0"}
    assert [d for d in world.log if isinstance(d, Preempt)] == [Preempt("young", "g0")]
    world.finish("vip")
    assert world.where == {"old": "g0", "young": "g0"}


def test_equals_do_not_preempt_each_other() -> None:
    world = make_world(max_gpus=1)
    world.arrive("a", 60, priority=1)
    world.arrive("b", 60, priority=1)
    assert world.where == {"a": "g0"}


def test_important_request_waits_ahead() -> None:
    world = make_world(max_gpus=1)
    world.arrive("a", 90, priority=2)
    world.arrive("b", 60)
    world.arrive("c", 60, priority=1)
    world.finish("a")
    assert world.where == {"c": "g0"}


def test_growth_at_the_largest_fleet_preempts_the_youngest() -> None:
    world = make_world(max_gpus=1, growth_per_tick=5)
    world.arrive("a", 40)
    world.arrive("b", 45)
    world.grow(5)
    world.tick()
    assert world.where == {"a": "g0"}
    assert world.waiting == {"b": None}
    world.check()


# --- nodes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["best-fit", "tide"])
def test_gpu_whose_node_empties_first_is_evacuated(policy: str) -> None:
    params = {"consolidate": True, "patience_s": 0.0} if policy == "best-fit" else {}
    world = make_world(policy, params, min_gpus=0, migration_price=0.0, idle_grace_s=1e9)
    for name, node in (("n1a", "n1"), ("n1b", "n1"), ("n2a", "n2")):
        world.capacity[name] = CAPACITY
        world.send(GpuReady(name, "m", CAPACITY, node))
    for request, gpu, size in (("a", "n1a", 60), ("b", "n1b", 30), ("c", "n2a", 35)):
        world.size[request] = size
        world.where[request] = gpu
        world.send(Adopt(request, "m", gpu, size, CAPACITY))
    world.tick(1)
    world.tick(1)
    moves = [d for d in world.log if isinstance(d, Migrate)]
    assert moves[0].request == "c"  # n1b is emptier, but n1 stays on for n1a


def test_empty_gpus_of_an_empty_node_are_released_first() -> None:
    world = make_world(min_gpus=2, max_gpus=3, idle_grace_s=0.0)
    for name, node in (("n1a", "n1"), ("n1b", "n1"), ("n2a", "n2")):
        world.capacity[name] = CAPACITY
        world.send(GpuReady(name, "m", CAPACITY, node))
    world.size["a"] = 50
    world.where["a"] = "n1a"
    world.send(Adopt("a", "m", "n1a", 50, CAPACITY))
    world.tick()
    assert [d for d in world.log if isinstance(d, ReleaseGpu)] == [ReleaseGpu("n2a")]


# --- migrations and the cost model -----------------------------------------------------------


def test_mode_follows_what_migrations_have_cost() -> None:
    world = make_world(min_gpus=2, cost=CostConfig(bytes_per_token=1000))
    world.tick()
    world.arrive("a", 60)
    world.arrive("b", 60)
    slow = 100_000 / 2_000  # bytes at 2 kB/s: slower than any prefill
    for _ in range(30):
        (move,) = world.scheduler.handle(MigrateRequest("a", None, "kv"), 0.0) or [None]
        if move is None:
            world.finish("b")
            continue
        done = MigrationDone("a", move.src, move.dst, "kv", 100, 100_000, slow)
        world.scheduler.handle(done, 0.0)
    (move,) = world.scheduler.handle(MigrateRequest("a"), 0.0)
    assert move.mode == "token"


def test_reported_sizes_beyond_capacity_are_survived() -> None:
    world = make_world(max_gpus=1)
    world.arrive("a", 40)
    world.arrive("b", 40)
    decisions = world.scheduler.handle(Grow({"a": 90, "b": 95}), 1.0)
    assert decisions == [Preempt("b", "g0")]
    world.scheduler.check()
    decisions = world.scheduler.handle(Grow({"a": 130}), 2.0)
    world.scheduler.check()
    assert world.scheduler.location("a") == "g0"


# --- forecast --------------------------------------------------------------------------------


def test_forecast_holds_a_steady_demand_and_follows_a_slow_one() -> None:
    steady = Forecast(0.005)
    for t in range(2000):
        steady.observe(t, 10.0, 0.0, 30.0)
    assert steady.target() == 10
    slow = Forecast(0.005)
    for t in range(2000):
        slow.observe(t, 10.0 + 5 * ((t // 500) % 2), 0.0, 5.0)
    assert slow.correlation() > 0.9
    assert slow.target() >= 14


def test_forecast_becomes_more_cautious_when_requests_wait() -> None:
    calm, short = Forecast(0.005), Forecast(0.005)
    for t in range(400):
        noise = 3.0 * ((7919 * t) % 11 - 5) / 5
        calm.observe(t, 20 + noise, 0.0, 30.0)
        short.observe(t, 20 + noise, 0.05, 30.0)
    assert short.z > calm.z
    assert short.target() > calm.target() > 15


def test_forecast_keeps_gpus_ready() -> None:
    world = make_world(max_gpus=8, forecast=True, startup_s=10.0)
    for second in range(120):
        busy = second % 2
        for i in range(4 * busy):
            world.arrive(f"r{second}-{i}", 90)
        world.tick(1)
        for request in list(world.where):
            world.finish(request)
    assert len(world.capacity) >= 2
    without = make_world(max_gpus=8)
    without.arrive("a", 90)
    without.finish("a")
    without.tick(1)
    assert without.capacity == {}


def test_headroom_rises_where_shedding_is_dear_and_falls_back() -> None:
    headroom = Headroom(None)
    for _ in range(64 * 20):
        headroom.shed(40)
        headroom.tick(1.0, 10, 1000, 0.1)
    assert 0 < headroom.units <= 100
    for _ in range(64 * 60):
        headroom.tick(1.0, 10, 1000, 0.1)
    assert headroom.units == 0
    fixed = Headroom(0.05)
    fixed.tick(1.0, 10, 1000, 0.1)
    assert fixed.units == 50


def test_place_is_the_answer_to_an_arrival() -> None:
    world = make_world(min_gpus=1)
    world.tick()
    assert world.scheduler.handle(Arrive("a", "m", 5, 50), 0.0) == [Place("a", "g0")]
    assert world.scheduler.handle(Tick(), 1.0) == []
    assert world.scheduler.lower_bound() == 1
