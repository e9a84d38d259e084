"""Planning with a fake runner: whatever happens, the books agree, the budget holds, all finish."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mell_ray.engine.block_pool import BlockPool
from mell_ray.engine.planner import Plan, Planner
from mell_ray.engine.sequence import Sequence
from mell_ray.engine.types import RequestState, SamplingParams
from mell_ray.errors import OutOfBlocksError

BLOCK = 4
CAPACITY = 12
MAX_SEQS = 4
BUDGET = 10


def make_planner(**changes: object) -> Planner:
    values = {"capacity": CAPACITY, "max_num_seqs": MAX_SEQS, "budget": BUDGET, **changes}
    return Planner(
        BlockPool(values["capacity"]),
        block_size=BLOCK,
        max_num_seqs=values["max_num_seqs"],
        max_num_batched_tokens=values["budget"],
        prefix_root=b"root",
    )


def make_sequence(
    order: int, prompt_len: int, max_tokens: int = 1, priority: int = 0, flavour: int = 0
) -> Sequence:
    """``flavour``: prompts of one flavour share their prefix."""
    prompt = [flavour * 1000 + i for i in range(prompt_len)]
    sampling = SamplingParams(max_tokens=max_tokens)
    state = RequestState(f"r{order}", prompt, sampling, arrival_s=order, priority=priority)
    return Sequence(state, BLOCK, order)


def run(planner: Planner, plan: Plan) -> list[Sequence]:
    """What the engine does with a plan, with every sampled token 7. Returns those that ended."""
    ended = []
    for seq, count in plan.chunks:
        samples = seq.status == "running" and seq.num_to_compute == count
        seq.num_computed += count
        planner.register(seq)
        if samples:
            seq.append(7)
            if seq.num_output >= seq.state.sampling.max_tokens:
                planner.remove(seq)
                ended.append(seq)
    return ended


class PlannerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.planner = make_planner()
        self.live: list[Sequence] = []
        self.frozen: list[Sequence] = []
        self.reserved: list[Sequence] = []
        self.count = 0

    def everything(self) -> list[Sequence]:
        return self.live + self.frozen + self.reserved

    def new(self, prompt_len: int, max_tokens: int, priority: int, flavour: int) -> Sequence:
        self.count += 1
        max_tokens = min(max_tokens, CAPACITY * BLOCK - prompt_len + 1)  # what validate ensures
        return make_sequence(self.count, prompt_len, max_tokens, priority, flavour)

    @rule(
        prompt_len=st.integers(1, 40),
        max_tokens=st.integers(1, 20),
        priority=st.integers(0, 2),
        flavour=st.integers(0, 2),
    )
    def add(self, prompt_len: int, max_tokens: int, priority: int, flavour: int) -> None:
        seq = self.new(prompt_len, max_tokens, priority, flavour)
        self.live.append(seq)
        self.planner.enqueue(seq)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.live), "aborted")
        self.live.remove(seq)
        self.planner.remove(seq)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def freeze(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.live), "frozen")
        held = list(seq.blocks)
        self.live.remove(seq)
        self.frozen.append(seq)
        self.planner.park(seq)
        seq.status = "frozen"
        assert seq.blocks == held

    @precondition(lambda self: self.frozen)
    @rule(back=st.booleans())
    def unfreeze(self, back: bool) -> None:
        seq = self.frozen.pop(0)
        if not back:
            self.planner.remove(seq)
        elif seq.row is None:
            self.live.append(seq)
            self.planner.enqueue(seq)
        else:
            self.live.append(seq)
            seq.status = "running"
            self.planner.run(seq)

    @rule(prompt_len=st.integers(1, 30), flavour=st.integers(0, 2), prefill=st.booleans())
    def reserve(self, prompt_len: int, flavour: int, prefill: bool) -> None:
        seq = self.new(prompt_len, 5, 0, flavour)
        seq.status = "reserved"
        free = self.planner.pool.num_free
        try:
            self.planner.take_room(seq, min(prompt_len + 1, seq.max_kv_tokens))
        except OutOfBlocksError:
            assert self.planner.pool.num_free == free
            return
        self.reserved.append(seq)
        if prefill:
            self.planner.run(seq)

    @precondition(lambda self: self.reserved)
    @rule(commit=st.booleans())
    def end_reservation(self, commit: bool) -> None:
        seq = self.reserved.pop(0)
        if commit:
            self.planner.park(seq)
            seq.status = "running"
            self.live.append(seq)
            self.planner.run(seq)
        else:
            self.planner.remove(seq)

    @rule(times=st.integers(1, 5))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.one_step()

    def one_step(self) -> None:
        held = {seq.request_id: list(seq.blocks) for seq in self.frozen + self.reserved}
        had_work = self.planner.has_work()
        plan = self.planner.plan()
        planned = [seq.request_id for seq, _ in plan.chunks]
        assert len(planned) == len(set(planned))
        assert sum(count for _, count in plan.chunks) <= BUDGET
        assert had_work or not plan.chunks, "has_work said there was nothing to do"
        for seq, count in plan.chunks:
            assert 1 <= count <= seq.num_to_compute
            assert len(seq.blocks) * BLOCK >= seq.num_computed + count
            assert seq.status in ("running", "reserved")
        for seq in self.frozen + self.reserved:
            assert seq.blocks == held[seq.request_id], "a migration lost or got blocks"
        for seq in run(self.planner, plan):
            self.live.remove(seq)

    @invariant()
    def books_agree(self) -> None:
        seqs = self.everything()
        self.planner.check(seqs)
        self.planner.pool.check([seq.blocks for seq in seqs])
        assert sum(seq.row is not None for seq in seqs) <= MAX_SEQS

    def teardown(self) -> None:
        """When every migration has ended, everyone who is left finishes."""
        for seq in self.reserved:
            self.planner.remove(seq)
        self.reserved = []
        while self.frozen:
            self.unfreeze(True)
        limit = 50 + 10 * sum(seq.num_tokens + seq.max_kv_tokens for seq in self.live)
        for _ in range(limit):
            if not self.live:
                break
            assert self.planner.has_work()
            self.one_step()
            self.books_agree()
        assert not self.live, "a request never finishes"
        assert self.planner.pool.num_used == 0


PlannerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestPlanner = PlannerMachine.TestCase


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=12),
    budget=st.integers(MAX_SEQS, 30),
)
@settings(max_examples=60, deadline=None)
def test_requests_are_admitted_in_order_and_all_finish(
    lengths: list[tuple[int, int]], budget: int
) -> None:
    planner = make_planner(budget=budget)
    seqs = [make_sequence(i, n, m, flavour=i) for i, (n, m) in enumerate(lengths)]
    for seq in reversed(seqs):
        planner.enqueue(seq)
    ended: list[Sequence] = []
    seen: list[int] = []
    for _ in range(3000):
        plan = planner.plan()
        seen += [seq.order for seq, _ in plan.chunks if seq.order not in seen]
        ended += run(planner, plan)
        if len(ended) == len(seqs):
            break
    assert len(ended) == len(seqs)
    assert seen == sorted(seen), "someone was overtaken"


def test_decodes_come_first_and_prefills_share_the_rest() -> None:
    planner = make_planner(capacity=40)
    old = make_sequence(0, 3, 9)
    planner.enqueue(old)
    run(planner, planner.plan())
    planner.enqueue(make_sequence(1, 12, flavour=1))
    planner.enqueue(make_sequence(2, 12, flavour=2))
    assert [(seq.order, count) for seq, count in planner.plan().chunks] == [(0, 1), (1, 9)]


def test_the_lowest_priority_then_the_youngest_is_preempted() -> None:
    planner = make_planner(capacity=4, budget=20)
    for order, priority in ((0, 0), (1, 1), (2, 1), (3, 0)):
        planner.enqueue(make_sequence(order, 4, 9, priority, flavour=order))
    run(planner, planner.plan())
    plan = planner.plan()
    assert plan.num_preempted == 2
    assert [seq.order for seq, _ in plan.chunks] == [1, 2]
    assert [seq.order for seq in planner.waiting] == [0, 3]
    assert all(seq.num_computed == 0 and seq.num_tokens == 5 for seq in planner.waiting)


def test_nobody_is_admitted_only_to_be_preempted_in_the_next_step() -> None:
    planner = make_planner(capacity=3, budget=20)
    planner.enqueue(make_sequence(0, 7, 9))
    run(planner, planner.plan())
    planner.enqueue(make_sequence(1, 2, 1, flavour=1))
    assert planner.pool.num_free == 1
    # Request 0 fills its second block in this step, and needs a third in the next.
    assert [seq.order for seq, _ in planner.plan().chunks] == [0]


def test_a_stalled_planner_has_no_work_until_something_changes() -> None:
    planner = make_planner(capacity=3)
    holder = make_sequence(0, 9)
    holder.status = "reserved"
    planner.take_room(holder, 9)
    planner.enqueue(make_sequence(1, 5, flavour=1))
    assert planner.has_work()
    assert planner.plan().chunks == []
    assert not planner.has_work()
    planner.remove(holder)
    assert planner.has_work()
    assert len(planner.plan().chunks) == 1


@pytest.mark.parametrize("prefill", [True, False])
def test_what_belongs_to_a_migration_is_never_preempted(prefill: bool) -> None:
    planner = make_planner(capacity=4)
    owner = make_sequence(0, 8, 9)
    planner.enqueue(owner)
    run(planner, planner.plan())
    arriving = make_sequence(1, 7, 9, flavour=1)
    arriving.status = "reserved"
    planner.take_room(arriving, 8)
    if prefill:
        planner.run(arriving)
    for _ in range(3):
        run(planner, planner.plan())
    assert owner.num_tokens == 9, "it waits"
    assert len(owner.blocks) == len(arriving.blocks) == 2
    assert arriving.num_computed == (6 if prefill else 0)
    assert planner.preemptions == 0
    planner.remove(arriving)
    run(planner, planner.plan())
    assert owner.num_tokens == 10


def test_choices_for_one_prompt_compute_it_once() -> None:
    planner = make_planner(capacity=40, budget=30)
    for order in range(3):
        planner.enqueue(make_sequence(order, 14, 3))
    planner.enqueue(make_sequence(3, 2, 1, flavour=1))
    steps = []
    while planner.has_work():
        plan = planner.plan()
        steps.append([(seq.order, count) for seq, count in plan.chunks])
        run(planner, plan)
    # Three blocks are shared; two tokens of the fourth are each one's own.
    assert steps[:2] == [[(0, 14)], [(0, 1), (1, 2), (2, 2), (3, 2)]]
    assert planner.prefix_hit_tokens == 24


def test_recomputation_after_preemption_hits_the_cache() -> None:
    planner = make_planner(capacity=5, budget=20)
    planner.enqueue(make_sequence(0, 8, 9))
    planner.enqueue(make_sequence(1, 8, 9, flavour=1))
    run(planner, planner.plan())
    plan = planner.plan()
    assert plan.num_preempted == 1
    ended = run(planner, plan)
    while not ended:
        ended = run(planner, planner.plan())
    (chunk,) = planner.plan().chunks
    assert chunk[0].order == 1
    assert chunk[0].num_computed in (4, 8), "its own blocks were still there"


def test_check_sees_a_shared_block_that_may_be_written() -> None:
    planner = make_planner()
    one, two = make_sequence(0, 6), make_sequence(1, 6, flavour=1)
    for seq in (one, two):
        seq.status = "reserved"
        planner.take_room(seq, 6)
    planner.pool.share(one.blocks[:1])
    two.blocks.append(one.blocks[0])
    planner.pool.check([one.blocks, two.blocks])
    with pytest.raises(AssertionError, match="shared"):
        planner.check([one, two])
