"""Choosing, limiting and surviving transports; all without Ray."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mell_ray.migration import budget as budget_module
from mell_ray.migration.budget import Budgets, ReplicaBudget, Slots
from mell_ray.migration.pacing import Pacer
from mell_ray.migration.staging import BUFFERS_PER_MIGRATION, Staging
from mell_ray.migration.transports import Endpoint, LinkTable, TransportError, reachable
from mell_ray.migration.transports.links import FIRST_PAUSE_S, LONGEST_PAUSE_S, REMEMBERED
from mell_ray.migration.transports.objects import ObjectTransport

ALL = ("cuda_ipc", "nccl", "objects")


def gpu(name: str, node: str, uuid: str, transports=ALL) -> Endpoint:
    return Endpoint(name, node, "cuda", uuid, transports)


def cpu(name: str) -> Endpoint:
    return Endpoint(name, "n1", "cpu")


@pytest.mark.parametrize(
    ("src", "dst", "ways"),
    [
        (cpu("a"), cpu("b"), {"objects"}),
        (gpu("a", "n1", "g1"), cpu("b"), {"objects"}),
        (gpu("a", "n1", "g1"), gpu("b", "n1", "g2"), {"objects", "cuda_ipc", "nccl"}),
        (gpu("a", "n1", "g1"), gpu("b", "n2", "g2"), {"objects", "nccl"}),
        # NCCL refuses two ranks on one physical GPU.
        (gpu("a", "n1", "g1"), gpu("b", "n1", "g1"), {"objects", "cuda_ipc"}),
        (gpu("a", "n1", "g1"), gpu("b", "n1", "g2", ("objects", "nccl")), {"objects", "nccl"}),
        (gpu("a", "n1", ""), gpu("b", "n2", ""), {"objects"}),
    ],
)
def test_reachability(src: Endpoint, dst: Endpoint, ways: set[str]) -> None:
    assert {name for name in ALL if reachable(name, src, dst)} == ways


def test_fastest_link_first_as_measured() -> None:
    table, a, b = LinkTable(ALL), gpu("a", "n1", "g1"), gpu("b", "n1", "g2")
    assert table.ranked(a, b, 0.0) == ["cuda_ipc", "nccl", "objects"]
    for _ in range(30):
        table.worked(a, b, "cuda_ipc", 1 << 30, 1.0)  # 1 GB/s, below what is assumed of the rest
    assert table.ranked(a, b, 0.0) == ["nccl", "objects", "cuda_ipc"]
    assert table.ranked(b, a, 0.0)[0] == "cuda_ipc"  # the other direction was not measured


def test_small_transfers_do_not_change_the_measured_bandwidth() -> None:
    table, a, b = LinkTable(ALL), gpu("a", "n1", "g1"), gpu("b", "n1", "g2")
    table.worked(a, b, "cuda_ipc", 1000, 1.0)
    assert table.ranked(a, b, 0.0)[0] == "cuda_ipc"


def test_broken_link_is_probed_again_later_and_later() -> None:
    table, a, b = LinkTable(ALL), gpu("a", "n1", "g1"), gpu("b", "n2", "g2")
    now = 100.0
    assert table.failed(a, b, "nccl", now) == FIRST_PAUSE_S
    assert table.ranked(a, b, now + FIRST_PAUSE_S - 0.1) == ["objects"]
    assert table.ranked(a, b, now + FIRST_PAUSE_S) == ["nccl", "objects"]
    pauses = [table.failed(a, b, "nccl", now) for _ in range(12)]
    assert pauses[0] == 2 * FIRST_PAUSE_S
    assert pauses[-1] == LONGEST_PAUSE_S
    table.worked(a, b, "nccl", 1 << 24, 0.01)
    assert table.failed(a, b, "nccl", now) == FIRST_PAUSE_S


def test_objects_are_there_even_if_not_named_and_after_a_failure() -> None:
    table, a, b = LinkTable(("nccl",)), gpu("a", "n1", "g1"), gpu("b", "n1", "g2")
    table.failed(a, b, "nccl", 0.0)
    table.failed(a, b, "objects", 0.0)
    assert table.ranked(a, b, 0.0) == ["objects"]


def test_memory_of_links_is_bounded() -> None:
    table, a, b = LinkTable(ALL), gpu("a", "n1", "g1"), gpu("b", "n1", "g2")
    table.failed(a, b, "nccl", 0.0)
    for i in range(REMEMBERED):
        table.worked(a, gpu(f"r{i}", "n1", "g3"), "objects", 1 << 20, 1.0)
    assert "nccl" in table.ranked(a, b, 0.0)


@given(
    share=st.floats(0.01, 1.0),
    step_s=st.floats(1e-4, 1.0),
    num_blocks=st.integers(1, 300),
    speed=st.floats(1e6, 1e10),
)
def test_slices_cover_every_block_once_and_keep_to_the_share(
    share: float, step_s: float, num_blocks: int, speed: float
) -> None:
    nbytes = 1 << 16
    pacer = Pacer(share)
    for _ in range(60):
        pacer.stepped(step_s)
        pacer.copied(nbytes, nbytes / speed)
    slices = list(pacer.slices(num_blocks, nbytes, busy=True))
    assert [i for part in slices for i in part] == list(range(num_blocks))
    if share < 1:
        for part in slices:
            took = len(part) * nbytes / speed
            assert len(part) == 1 or took <= share * step_s * 1.01
            assert took / (took + pacer.pause_s(took, busy=True)) == pytest.approx(share)


def test_an_engine_without_other_work_is_not_spared() -> None:
    pacer = Pacer(0.1)
    pacer.stepped(0.01)
    assert list(pacer.slices(1000, 1 << 20, busy=False)) == [range(1000)]
    assert pacer.pause_s(1.0, busy=False) == 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50), st.booleans())))
def test_staging_never_lends_memory_twice(steps: list[tuple[str, int, bool]]) -> None:
    staging = Staging()
    lent: dict[str, list[np.ndarray]] = {}
    for name, nbytes, release in steps:
        if release:
            staging.release(name)
            lent.pop(name, None)
            continue
        buffer = staging.take(name, nbytes)
        assert buffer.size == nbytes
        mine = [*lent.get(name, []), buffer][-BUFFERS_PER_MIGRATION:]
        lent[name] = mine
        live = [held for buffers in lent.values() for held in buffers]
        assert not any(np.shares_memory(x, y) for i, x in enumerate(live) for y in live[i + 1 :])
    for name in lent:
        staging.release(name)
    staging.trim(0)
    assert staging.nbytes == 0


async def test_chunks_wait_for_room_at_both_ends() -> None:
    budgets = Budgets(buffer_bytes=100, bytes_per_s=None)
    running: list[str] = []
    release = asyncio.Event()

    async def send(name: str, src: str, dst: str, nbytes: int) -> None:
        async with budgets.chunk(src, dst, nbytes):
            running.append(name)
            await release.wait()

    tasks = [
        asyncio.create_task(send("first", "a", "b", 60)),
        asyncio.create_task(send("same target", "c", "b", 60)),
        asyncio.create_task(send("elsewhere", "d", "e", 60)),
        asyncio.create_task(send("opposite", "b", "a", 60)),
    ]
    for _ in range(10):
        await asyncio.sleep(0)
    assert running == ["first", "elsewhere"]
    release.set()
    await asyncio.gather(*tasks)
    assert sorted(running) == ["elsewhere", "first", "opposite", "same target"]
    assert all(budgets.of(name).in_flight == 0 for name in "abcde")


async def test_a_chunk_larger_than_the_buffer_passes_alone() -> None:
    budgets = Budgets(buffer_bytes=10, bytes_per_s=None)
    async with budgets.chunk("a", "b", 1000):
        assert budgets.of("a").in_flight == 1000


async def test_cancelled_chunk_gives_its_room_back() -> None:
    budgets = Budgets(buffer_bytes=10, bytes_per_s=None)

    async def hold() -> None:
        async with budgets.chunk("a", "b", 10):
            await asyncio.Event().wait()

    tasks = [asyncio.create_task(hold()) for _ in range(2)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert budgets.of("a").in_flight == budgets.of("b").in_flight == 0


def test_bandwidth_limit_spaces_chunks_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module, "time", SimpleNamespace(monotonic=lambda: 100.0))
    budget = ReplicaBudget(1 << 30, bytes_per_s=1000.0)
    delays = [budget.delay_s(500) for _ in range(4)]
    assert delays == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert ReplicaBudget(1, None).delay_s(1 << 40) == 0


async def test_urgent_chunks_and_migrations_wait_for_memory_only() -> None:
    budgets = Budgets(1000, bytes_per_s=1e-3)
    async with asyncio.timeout(60), budgets.chunk("a", "b", 900, urgent=True):
        waiting = asyncio.create_task(_hold(budgets.chunk("a", "c", 900, urgent=True)))
        await _a_while()
        assert not waiting.done()
    await asyncio.wait_for(waiting, 60)
    slots = Slots(total=1, per_replica=1)
    async with AsyncExitStack() as held:
        for peer in "bcde":
            await held.enter_async_context(slots.between("a", peer, urgent=True))
        later = asyncio.create_task(_hold(slots.between("a", "f", urgent=True)))
        plain = asyncio.create_task(_hold(slots.between("a", "f")))
        await _a_while()
        assert not later.done()
        assert not plain.done()
    await asyncio.wait_for(asyncio.gather(later, plain), 60)


async def _a_while() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def _hold(context: AbstractAsyncContextManager[None]) -> None:
    async with context:
        pass


async def test_slots_are_counted_per_replica() -> None:
    slots, running, release = Slots(total=3, per_replica=1), [], asyncio.Event()

    async def run(src: str, dst: str) -> None:
        async with slots.between(src, dst):
            running.append((src, dst))
            await release.wait()

    pairs = [("a", "b"), ("b", "c"), ("d", "e"), ("f", "g"), ("h", "i")]
    tasks = [asyncio.create_task(run(*pair)) for pair in pairs]
    for _ in range(10):
        await asyncio.sleep(0)
    assert running == [("a", "b"), ("d", "e"), ("f", "g")]
    release.set()
    await asyncio.gather(*tasks)
    assert sorted(running) == sorted(pairs)


async def test_patient_migrations_wait_until_a_replica_has_rested() -> None:
    slots = Slots(total=4, per_replica=4)
    slots.rest("a", 3600)
    patient = asyncio.create_task(_hold(slots.between("b", "a", patient=True)))
    await asyncio.wait_for(_hold(slots.between("a", "b")), 60)
    await asyncio.wait_for(_hold(slots.between("b", "c", patient=True)), 60)
    assert not patient.done()
    patient.cancel()
    slots.rest("a", 0.0)
    await asyncio.wait_for(_hold(slots.between("b", "a", patient=True)), 60)


async def test_objects_pass_the_very_array_on() -> None:
    transport, data = ObjectTransport(), np.arange(5, dtype=np.uint8)
    parcel = await transport.send_blocks("b", data, 1.0)
    assert await transport.recv_blocks("a", parcel, 1.0) is data


def test_a_transport_error_is_told_apart_after_pickling() -> None:
    import pickle

    assert isinstance(pickle.loads(pickle.dumps(TransportError("x"))), TransportError)
