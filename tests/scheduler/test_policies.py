"""What each policy does, and the bounds that their docstrings promise."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mell_ray.errors import ConfigError
from mell_ray.scheduler import policy_names
from mell_ray.scheduler.events import Adopt, Arrive, GpuReady, Migrate, Tick
from mell_ray.scheduler.policies.mell import LARGE, MEDIUM, SMALL, TINY, Mell, size_class
from mell_ray.scheduler.policies.tide import Tide
from tests.scheduler.world import CAPACITY, World, make_world


def fleet(policy: str, loads: dict[str, list[int]], params: dict | None = None, **more) -> World:
    """GPUs with requests of these sizes; the n-th on GPU ``x`` is called ``xn``."""
    world = make_world(policy, params, growth_per_tick=0, idle_grace_s=1e9, **more)
    for gpu, sizes in loads.items():
        world.capacity[gpu] = CAPACITY
        world.send(GpuReady(gpu, "m", CAPACITY))
        for n, size in enumerate(sizes):
            request = f"{gpu}{n}"
            world.size[request], world.where[request] = size, gpu
            world.send(Adopt(request, "m", gpu, size, CAPACITY))
    return world


def policy_of(world: World):
    return world.scheduler._ledgers["m"].policy


# --- registry --------------------------------------------------------------------------------


def test_six_policies_and_helpful_errors() -> None:
    names = ["tide", "mell", "best-fit", "first-fit", "worst-fit", "llumnix"]
    assert policy_names() == names
    with pytest.raises(ConfigError, match="no policy 'bestfit'; there are: tide, mell, best-fit"):
        make_world("bestfit")
    with pytest.raises(ConfigError, match="'tide' has no setting 'headrom'; it has: headroom"):
        make_world("tide", {"headrom": 0.1})
    with pytest.raises(ConfigError, match="headroom must be a share"):
        make_world("tide", {"headroom": 2})
    with pytest.raises(ConfigError, match="has no setting 'x'; it has: none"):
        make_world("first-fit", {"x": 1})


def test_policy_changes_live_without_moving_anybody() -> None:
    world = fleet("worst-fit", {"a": [30], "b": [60]})
    world.arrive("r1", 10)
    assert world.where["r1"] == "a"
    world.scheduler.set_policy("best-fit", {"consolidate": False})
    world.arrive("r2", 10)
    assert world.where["r2"] == "b"
    with pytest.raises(ConfigError):
        world.scheduler.set_policy("nonsense", {})
    assert world.scheduler.policy_name == "best-fit"


# --- baselines -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [("best-fit", "c"), ("first-fit", "a"), ("worst-fit", "b"), ("tide", "c"), ("mell", "c")],
)
def test_where_an_arrival_goes(policy: str, chosen: str) -> None:
    world = fleet(policy, {"a": [50], "b": [20], "c": [80], "d": [95]})
    world.arrive("r", 15)
    assert world.where["r"] == chosen


def test_best_fit_drains_the_emptiest_gpu_only_when_patient_and_told_to() -> None:
    for consolidate in (True, False):
        params = {"consolidate": consolidate, "patience_s": 3.0}
        world = fleet("best-fit", {"a": [60, 10], "b": [10, 10], "c": [70]}, params)
        for _ in range(3):
            world.tick(1)
        assert world.where["b0"] == "b"
        world.tick(1)
        assert (world.where["b0"] != "b") == consolidate
        assert (world.where["b1"] != "b") == consolidate


def test_best_fit_does_not_start_a_drain_that_cannot_end() -> None:
    world = fleet("best-fit", {"a": [95], "b": [20, 4]}, {"patience_s": 0.0})
    world.tick(1)
    world.tick(1)
    assert not any(isinstance(d, Migrate) for d in world.log)


def test_llumnix_evens_out_and_shrinks() -> None:
    world = fleet("llumnix", {"a": [50, 25, 23], "b": [40]}, {"utilization": 0.5})
    world.tick()
    assert world.where["a1"] == "b"
    world = fleet("llumnix", {"a": [40], "b": [20, 10]})
    world.tick()
    assert set(world.where.values()) == {"a"}


def test_size_classes_are_shares_of_the_capacity() -> None:
    classes = [size_class(size, 120) for size in (61, 60, 41, 40, 31, 30, 1)]
    assert classes == [LARGE, MEDIUM, MEDIUM, SMALL, SMALL, TINY, TINY]


def test_mell_fills_gpus_of_larger_requests_from_those_of_smaller() -> None:
    world = fleet("mell", {"large": [60], "tiny": [10, 10, 10, 5]})
    world.tick()
    assert set(world.where.values()) == {"large"}


def test_mell_fills_with_the_largest_single_request_that_fits() -> None:
    world = fleet("mell", {"large": [60], "small": [26, 30, 34]})
    world.tick()
    assert world.where["small2"] == "large"
    assert world.where["small0"] == world.where["small1"] == "small"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(0, 1000))
def test_mell_moves_a_constant_number_of_items_per_operation(sizes: list[int], seed: int) -> None:
    rng = Random(seed)
    world = make_world("mell", {"moves_per_operation": 2}, max_gpus=64)
    policy = policy_of(world)
    assert isinstance(policy, Mell)
    for i, size in enumerate(sizes):
        world.arrive(f"r{i}", size)
        if world.where and rng.random() < 0.4:
            world.finish(rng.choice(sorted(world.where)))
        if rng.random() < 0.5:
            moved = policy.moves, policy.operations
            world.tick()
            assert policy.moves - moved[0] <= 2 * (policy.operations - moved[1])
    assert policy.operations <= 3 * len(sizes)  # arrivals, departures, no change of class


# --- tide ------------------------------------------------------------------------------------


def test_tide_makes_room_rather_than_open_a_gpu() -> None:
    world = fleet("tide", {"a": [60, 15], "b": [70, 10], "c": [85]}, migration_price=1e-3)
    world.arrive("r", 35)  # fits nowhere; a0 + 35 does once the 15 is on c
    assert world.where["a1"] == "c"
    assert world.where["r"] == "a"
    assert len(world.capacity) == 3


def test_tide_finds_a_chain_of_two() -> None:
    loads = {"a": [60, 32], "b": [68, 20], "c": [80]}
    world = fleet("tide", loads, migration_price=1e-3)
    world.arrive("r", 40)  # a's 32 makes way by going to b, whose 20 goes to c
    assert world.where == {
        "a0": "a", "r": "a", "a1": "b", "b0": "b", "b1": "c", "c0": "c",
    }  # fmt: skip


def test_tide_opens_a_gpu_where_making_room_costs_more() -> None:
    world = fleet("tide", {"a": [60, 15], "b": [70, 10], "c": [85]}, migration_price=1.0)
    world.arrive("r", 35)
    assert len(world.capacity) == 4
    assert not any(isinstance(d, Migrate) for d in world.log)


def test_tide_empties_a_gpu_once_idling_has_cost_as_much() -> None:
    world = fleet("tide", {"a": [60], "b": [30], "c": [50]}, migration_price=0.1)
    moved_at = None
    for second in range(1, 20):
        world.tick(1)
        if world.where["b0"] != "b":
            moved_at = second
            break
    assert moved_at == 4  # one superfluous GPU for 3 s pays 30 units at 0.1; the first tick is 0 s
    policy = policy_of(world)
    assert policy.spent == pytest.approx(3.0)


def test_tide_leaves_requests_on_gpus_that_are_kept_anyway() -> None:
    world = fleet("tide", {"a": [30], "b": [30]}, migration_price=0.0, min_gpus=2)
    for _ in range(3):
        world.tick(1)
    assert world.where == {"a0": "a", "b0": "b"}
    world = fleet("tide", {"a": [60, 15], "b": [85], "c": []}, migration_price=1e-3, min_gpus=3)
    world.arrive("r", 40)  # fits on neither; c costs nothing more
    assert world.where["r"] == "c"
    assert not any(isinstance(d, Migrate) for d in world.log)


def test_tide_never_starts_an_evacuation_that_cannot_end() -> None:
    world = fleet("tide", {"a": [70], "b": [70], "c": [35, 10]}, migration_price=0.0)
    for _ in range(5):
        world.tick(1)
    assert not any(isinstance(d, Migrate) for d in world.log)


def drive(world: World, rng: Random, steps: int, first: int = 0) -> None:
    """A random service: bursts, growth, ends."""
    for step in range(first, first + steps):
        for n in range(rng.choice([0, 0, 1, 2, 6])):
            world.arrive(f"r{step}-{n}", rng.choice([rng.randint(1, 12), rng.randint(5, 70)]))
        for request in [r for r in sorted(world.where) if rng.random() < 0.12]:
            world.finish(request)
        world.grow(1)
        world.tick(rng.choice([0.5, 1.0, 4.0]))


@pytest.mark.parametrize("price", [0.0, 1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_tide_consolidates_within_its_budget(price: float, seed: int) -> None:
    world = make_world("tide", migration_price=price, max_gpus=64)
    drive(world, Random(seed), 150)
    policy = policy_of(world)
    assert isinstance(policy, Tide)
    started = [d for d in world.log if isinstance(d, Migrate) and d.reason == "consolidate"]
    assert policy.spent <= policy.earned + 1e-9
    assert started or price > 1e-2
    world.check()


def recorded_superfluous(world: World) -> int:
    """The most GPUs whose load fits, as liquid, into the others' room; counted independently."""
    loads = sorted(v.booked for v in world.scheduler.gpus() if v.requests)
    best = 0
    for k in range(1, len(loads)):
        if sum(loads[:k]) <= sum(CAPACITY - load for load in loads[k:]):
            best = k
    return best


@pytest.mark.parametrize("seed", range(3))
def test_what_tide_earns_is_what_superfluous_gpus_cost(seed: int) -> None:
    world = make_world("tide", {"headroom": 0.0}, migration_price=1e9, max_gpus=64)
    rng, cost = Random(seed), 0.0
    for step in range(60):
        drive(world, rng, 1, step)
        cost += recorded_superfluous(world)
        world.tick(1.0)
    policy = policy_of(world)
    assert policy.spent == 0.0
    assert policy.earned >= cost


@pytest.mark.parametrize("seed", range(4))
def test_moves_of_one_operation_are_bounded(seed: int) -> None:
    """An arrival displaces at most two requests; an emptied GPU takes at most four others along."""
    world = make_world("tide", migration_price=1e-4, max_gpus=64)
    rng = Random(seed)
    for step in range(150):
        for n in range(rng.choice([0, 1, 3])):
            first = len(world.log)
            world.arrive(f"r{step}-{n}", rng.choice([rng.randint(1, 12), rng.randint(5, 70)]))
            assert sum(isinstance(d, Migrate) for d in world.log[first:]) <= 2
        for request in [r for r in sorted(world.where) if rng.random() < 0.12]:
            world.finish(request)
        before, first = dict(world.where), len(world.log)
        world.tick(1.0)
        moved = {d.request for d in world.log[first:] if isinstance(d, Migrate)}
        emptied = set(before.values()) - set(world.where.values())
        along = [r for r in moved if before[r] not in emptied]
        assert len(along) <= 4 * len(emptied)
        assert not moved or emptied


# --- determinism -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", policy_names())
def test_same_events_and_seed_give_the_same_decisions(policy: str) -> None:
    logs = []
    for _ in range(2):
        world = make_world(policy, migration_price=1e-3, max_gpus=32, seed=3)
        drive(world, Random(5), 60)
        logs.append(world.log)
    assert logs[0] == logs[1]
    assert len(logs[0]) > 100


@pytest.mark.parametrize("policy", policy_names())
def test_without_migration_nobody_moves(policy: str) -> None:
    world = make_world(policy, migration_price=0.0, max_gpus=6, migration_enabled=False)
    drive(world, Random(2), 80)
    assert not any(isinstance(d, Migrate) for d in world.log)
    world.check()


def test_arrival_is_answered_at_once_whatever_the_epoch() -> None:
    world = make_world("tide", min_gpus=1)
    world.send(Tick())
    (answer,) = world.send(Arrive("a", "m", 5, 50))
    assert answer.gpu == "g0"
