"""Random events: capacity holds, nobody is lost or doubled, bookings return to zero."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mell_ray.scheduler import policy_names
from mell_ray.scheduler.events import Cordon, Evacuate, MigrateRequest, Outdate, StepTime
from tests.scheduler.world import CAPACITY, World, make_world

SIZES = st.one_of(st.integers(1, 100), st.integers(1, 12), st.integers(28, 60))


class Machine(RuleBasedStateMachine):
    """Drives a `World` at random; the world asserts that every decision can be carried out."""

    policy = "best-fit"
    world: World
    count = 0

    @initialize(
        instant_gpus=st.booleans(),
        instant_moves=st.booleans(),
        max_gpus=st.integers(1, 6),
        limit=st.sampled_from([1, 3, 1 << 30]),
        moves=st.sampled_from([True, True, True, False]),
        spare=st.integers(0, 1),
        tpot=st.sampled_from([None, 0.05]),
        growth=st.integers(1, 4),
        seed=st.integers(0, 3),
    )
    def start(
        self,
        instant_gpus: bool,
        instant_moves: bool,
        max_gpus: int,
        limit: int,
        moves: bool,
        spare: int,
        tpot: float | None,
        growth: int,
        seed: int,
    ) -> None:
        self.growth = growth
        self.world = make_world(
            self.policy,
            max_gpus=max_gpus,
            instant_gpus=instant_gpus,
            instant_moves=instant_moves,
            growth_per_tick=growth,
            spare_gpus=spare,
            max_migrations_in_flight=limit,
            migration_enabled=moves,
            migration_price=1e-3,
            tpot_limit_s=tpot,
            seed=seed,
        )

    def pick(self, data: st.DataObject, names: object) -> str:
        return data.draw(st.sampled_from(sorted(names)))  # type: ignore[call-overload, no-any-return]

    @rule(size=SIZES, priority=st.sampled_from([0, 0, 0, 1]))
    def arrive(self, size: int, priority: int) -> None:
        self.world.arrive(f"r{self.count:04}", size, priority=priority)
        self.count += 1

    @rule(sizes=st.lists(SIZES, min_size=5, max_size=20))
    def burst(self, sizes: list[int]) -> None:
        for size in sizes:
            self.arrive(size, 0)

    @precondition(lambda self: self.world.size)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.world.finish(self.pick(data, self.world.size))

    @rule(seconds=st.sampled_from([0.1, 1.0, 20.0]))
    def epoch(self, seconds: float) -> None:
        """What runs grows by one tick's growth, then the scheduler plans."""
        self.world.grow(self.growth)
        self.world.tick(seconds)
        for decision in self.world.scheduler.relieve(self.world.now):
            self.world._carry_out(decision)

    @precondition(lambda self: self.world.moving)
    @rule(data=st.data(), fails=st.booleans())
    def move_ends(self, data: st.DataObject, fails: bool) -> None:
        self.world.finish_move(self.pick(data, self.world.moving), fails=fails)

    @precondition(lambda self: self.world.starting)
    @rule(fails=st.sampled_from([False, False, True]), capacity=st.sampled_from([100, 100, 140]))
    def gpu_comes(self, fails: bool, capacity: int) -> None:
        self.world.next_capacity = capacity
        self.world.start_gpu(fails=fails)
        self.world.next_capacity = CAPACITY

    @precondition(lambda self: self.world.capacity)
    @rule(data=st.data())
    def gpu_dies(self, data: st.DataObject) -> None:
        self.world.lose(self.pick(data, self.world.capacity))

    @precondition(lambda self: self.world.capacity)
    @rule(data=st.data(), what=st.sampled_from(["cordon", "uncordon", "evacuate", "outdate"]))
    def operator(self, data: st.DataObject, what: str) -> None:
        gpu = self.pick(data, self.world.capacity)
        if what == "evacuate":
            self.world.send(Evacuate(gpu, urgent=data.draw(st.booleans())))
        elif what == "outdate":
            self.world.send(Outdate(gpu))
        else:
            self.world.send(Cordon(gpu, what == "cordon"))

    @precondition(lambda self: self.world.where)
    @rule(data=st.data())
    def operator_moves(self, data: st.DataObject) -> None:
        request = self.pick(data, self.world.where)
        self.world.send(MigrateRequest(request))

    @precondition(lambda self: self.world.capacity)
    @rule(data=st.data(), a=st.floats(0.001, 0.02))
    def steps(self, data: st.DataObject, a: float) -> None:
        gpu = self.pick(data, self.world.capacity)
        for i in range(40):
            event = StepTime(gpu, i % 7, 10 * i, a + 0.002 * (i % 7) + 0.0001 * i)
            self.world.send(event)

    @rule()
    def unknown_names(self) -> None:
        before = self.world.scheduler.ignored
        self.world.send(Cordon("nobody"))
        self.world.send(MigrateRequest("nobody"))
        assert self.world.scheduler.ignored == before + 2

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        """When everything ends, nothing is left booked and the fleet goes home."""
        if not hasattr(self, "world"):
            return
        world = self.world
        for request in sorted(world.size):
            world.finish(request)
        assert all(view.booked == 0 for view in world.scheduler.gpus())
        assert world.scheduler.in_flight() == 0
        assert world.scheduler.queue_length() == 0
        world.check()


@pytest.mark.parametrize("policy", policy_names())
def test_any_sequence_of_events(policy: str) -> None:
    machine = type(f"Machine_{policy}", (Machine,), {"policy": policy})
    case = machine.TestCase
    case.settings = settings(
        max_examples=40,
        stateful_step_count=40,
        deadline=None,
        phases=[Phase.generate],
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    case("runTest").runTest()
