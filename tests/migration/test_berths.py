"""Chunks that land in memory of their target: every byte as it was sent, and never where somebody
else's may be."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mell_ray.migration.transports import TransportError, berths
from mell_ray.migration.transports.berths import MIN_BYTES, Berth, Landed
from mell_ray.migration.transports.objects import ObjectTransport

CHUNK = MIN_BYTES + 100
MAX_BYTES = 8 << 20


class Memory:
    """Shared by all who have the same; its areas live as long as somebody holds them."""

    def __init__(self, *, full: bool = False) -> None:
        self.full = full
        self.areas: list[weakref.ref[Any]] = []

    async def create(self, nbytes: int) -> tuple[Any, np.ndarray] | None:
        if self.full:
            return None
        data = np.zeros(nbytes, np.uint8)
        self.areas.append(weakref.ref(data))
        return len(self.areas) - 1, data

    async def open(self, ticket: int) -> Any:
        return Opened(self.areas[ticket]())


class Opened:
    def __init__(self, data: Any) -> None:
        self.data = data


class OtherNode(Memory):
    async def open(self, _: int) -> None:
        return None


class Copied(Memory):
    """Opens a copy, as a store of another node would have one."""

    async def open(self, ticket: int) -> Any:
        return Opened(np.array(self.areas[ticket]()))


def chunk(seed: int, nbytes: int = CHUNK) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


class Ends:
    """A target, and sources by name."""

    def __init__(self, memory: Memory, sources: dict[str, Memory] | None = None) -> None:
        self.target = ObjectTransport(memory, MAX_BYTES)
        self.sources = {
            name: ObjectTransport(at, MAX_BYTES)
            for name, at in (sources or {"a": memory, "b": memory}).items()
        }
        self.landed = 0

    async def send(self, source: str, pieces: list[np.ndarray], berth: Berth | None) -> Any:
        parcel = await self.sources[source].send_blocks("target", pieces, 60.0, berth)
        self.landed += isinstance(parcel, Landed)
        return parcel

    async def move(self, source: str, *pieces: np.ndarray) -> np.ndarray:
        await asyncio.sleep(0)  # an area is made beside the chunks
        with self.target.berth(source, sum(map(len, pieces))) as berth:
            parcel = await self.send(source, list(pieces), berth)
            return np.concatenate(await self.target.recv_blocks(source, parcel, 60.0, berth))

    async def warm(self) -> None:
        """Until chunks land."""
        async with asyncio.timeout(60):
            while not self.landed:
                await self.move("a", chunk(0))


async def test_what_lands_is_what_was_sent() -> None:
    ends = Ends(Memory())
    await ends.warm()
    for seed in range(5):
        pieces = [chunk(seed, 3), chunk(seed + 10, 0), chunk(seed + 20, CHUNK - 50)]
        got = await ends.move("ab"[seed % 2], *pieces)
        assert np.array_equal(got, np.concatenate(pieces))
    assert ends.landed == 6


@pytest.mark.parametrize("nbytes", [MIN_BYTES, 600 << 10, 3 << 20, (4 << 20) - 1, 4 << 20])
async def test_every_size(nbytes: int) -> None:
    ends = Ends(Memory())
    for seed in range(4):
        cut = nbytes // 3 + seed
        sent = chunk(seed, nbytes)
        got = await ends.move("a", sent[:cut], sent[cut:])
        assert np.array_equal(got, sent)
    assert ends.landed


async def test_one_chunk_alone_takes_no_memory() -> None:
    memory = Memory()
    ends = Ends(memory)
    await ends.move("a", chunk(1))
    await ends.move("a", chunk(1, MIN_BYTES - 1))
    await asyncio.sleep(0)
    assert not memory.areas


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3)), max_size=30))
def test_chunks_at_the_same_time_keep_apart(steps: list[tuple[str, int]]) -> None:
    """Each step lends a berth and lets one of those lent before end, well or badly, some of which
    are written to only then."""

    async def run() -> None:
        ends = Ends(Memory())
        await ends.warm()
        held: list[tuple[ExitStack, str, Berth | None, np.ndarray, Any]] = []
        late: list[tuple[str, Berth, np.ndarray]] = []
        for number, (source, act) in enumerate(steps):
            stack = ExitStack()
            berth = stack.enter_context(ends.target.berth(source, CHUNK))
            data = chunk(number)
            parcel = await ends.send(source, [data], berth) if act % 2 else None
            held.append((stack, source, berth, data, parcel))
            if act < 2 and len(held) < 3:
                continue
            stack, source, berth, data, parcel = held.pop(act % len(held))
            if parcel is None:
                with suppress(TimeoutError):
                    raise_in(stack)
                if berth is not None:
                    late.append((source, berth, data))
                continue
            for who, where, what in late:  # those who were given up write in the end
                await ends.send(who, [what], where)
            late.clear()
            with stack:
                got = np.concatenate(await ends.target.recv_blocks(source, parcel, 60.0, berth))
                assert np.array_equal(got, data)
        for stack, source, berth, data, parcel in held:
            with stack:
                if parcel is not None:
                    got = np.concatenate(await ends.target.recv_blocks(source, parcel, 60.0, berth))
                    assert np.array_equal(got, data)

    asyncio.run(run())


def raise_in(stack: ExitStack) -> None:
    with stack:
        raise TimeoutError


async def test_who_answers_too_late_writes_into_nobodys_chunk() -> None:
    ends = Ends(Memory())
    await ends.warm()
    with suppress(TimeoutError), ends.target.berth("a", CHUNK) as given_up:
        raise TimeoutError
    assert given_up is not None
    ends.landed = 0
    await ends.warm()  # in a new area
    with ends.target.berth("b", CHUNK) as berth:
        assert berth is not None
        parcel = await ends.send("b", [chunk(1)], berth)
        await ends.send("a", [chunk(2)], given_up)
        [got] = await ends.target.recv_blocks("b", parcel, 60.0, berth)
        assert np.array_equal(got, chunk(1))


async def test_a_source_on_another_node_sends_objects_and_is_asked_once() -> None:
    memory = Memory()
    ends = Ends(memory, {"a": memory, "far": OtherNode()})
    await ends.warm()
    offered = []
    for seed in range(3):
        with ends.target.berth("far", CHUNK) as berth:
            offered.append(berth is not None)
            parcel = await ends.send("far", [chunk(seed)], berth)
            [got] = await ends.target.recv_blocks("far", parcel, 60.0, berth)
            assert np.array_equal(got, chunk(seed))
    assert offered == [True, False, False]


async def test_a_source_that_wrote_elsewhere_is_found_out() -> None:
    memory, other = Memory(), Copied()
    other.areas = memory.areas
    ends = Ends(memory, {"a": memory, "c": other})
    await ends.warm()
    with pytest.raises(TransportError, match="not in the memory"):
        await ends.move("c", chunk(1))
    assert np.array_equal(await ends.move("c", chunk(1)), chunk(1))


async def test_who_has_closed_the_area_opens_it_again() -> None:
    ends = Ends(Memory())
    await ends.warm()
    ends.sources["a"] = ObjectTransport(ends.target._berths._memory, MAX_BYTES)  # type: ignore[union-attr]
    before = ends.landed
    for seed in range(3):
        assert np.array_equal(await ends.move("a", chunk(seed)), chunk(seed))
    assert ends.landed == before + 2


async def test_unused_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    ends = Ends(memory)
    monkeypatch.setattr(berths, "IDLE_S", 5.0)
    await ends.warm()
    monkeypatch.setattr(berths, "IDLE_S", 0.01)
    await ends.move("a", chunk(1))
    async with asyncio.timeout(60):
        while any(area() is not None for area in memory.areas):
            gc.collect()
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("memory", [Memory(full=True), Memory()])
async def test_without_room_chunks_come_as_objects(memory: Memory) -> None:
    ends = Ends(memory)
    nbytes = CHUNK if memory.full else MAX_BYTES  # two of these are too many
    for seed in range(4):
        assert np.array_equal(await ends.move("a", chunk(seed, nbytes)), chunk(seed, nbytes))
    assert not ends.landed
    assert not memory.areas
