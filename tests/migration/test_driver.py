"""One migration at a time between two engines: the same tokens, whatever happens on the way."""

from __future__ import annotations

import asyncio
import gc
import time
import uuid
import weakref

import pytest

from mell_ray.config import EngineConfig
from mell_ray.engine import Engine, load_model
from mell_ray.errors import MigrationError
from mell_ray.migration.driver import DriverLimits, migrate
from mell_ray.migration.types import MigrationOrder
from tests.migration.inprocess import (
    DeadEnd,
    Faults,
    Node,
    SourceEnd,
    TargetEnd,
    Tracks,
    request,
    tiny_llama,
)

PROMPT = [3 + i % 97 for i in range(70)]
LENGTH = 240
KEPT = 40  # tokens that a request does not get before the test has done with it


def undisturbed(temperature: float) -> list[int]:
    config = EngineConfig()
    engine = Engine(load_model(tiny_llama(), config), config)
    engine.add(request("r", PROMPT, LENGTH, temperature))
    tokens: list[int] = []
    while engine.has_work():
        for delta in engine.step().deltas:
            tokens += delta.token_ids
    return tokens


@pytest.fixture(scope="module", params=[0.0, 1.0], ids=["greedy", "seeded"])
def expected(request: pytest.FixtureRequest) -> tuple[float, list[int]]:
    return request.param, undisturbed(request.param)


@pytest.fixture
def pair():
    tracks = Tracks()
    nodes = Node("a", tracks), Node("b", tracks)
    yield nodes
    for node in nodes:
        node.stop()


def order(src: str, dst: str, mode: str) -> MigrationOrder:
    return MigrationOrder(uuid.uuid4().hex, "r", src, dst, mode, "test")


async def move(source, target, which: MigrationOrder, **limits):
    return await migrate(
        which,
        source,
        target,
        block_size=16,
        block_nbytes=source._node.engine.block_nbytes,
        limits=DriverLimits(**{"timeout_s": 120.0, "settle_timeout_s": 60.0, **limits}),
    )


async def until(condition, message: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, message
        await asyncio.sleep(0.002)


async def complete(nodes: tuple[Node, Node]) -> list[int]:
    """Let the request go and wait for its end."""
    track = nodes[0].tracks["r"]
    nodes[0].tracks.let_go()
    for node in nodes:
        await node.call(lambda _: None)  # looks again whether there is something to do
    await until(lambda: track.finished, "the request did not finish")
    return track.token_ids


async def finish(nodes: tuple[Node, Node], *others: str) -> list[int]:
    """Wait for the end, also of others; both pools must then be empty and all books agree."""
    await complete(nodes)
    for name in others:
        await until(lambda name=name: nodes[0].tracks[name].finished, f"{name} did not finish")
    for node in nodes:
        await node.call(lambda e: e.check())
        stats = await node.call(lambda e: e.stats())
        assert (stats.used_blocks, stats.running, stats.waiting) == (0, 0, 0)
    track = nodes[0].tracks["r"]
    assert track.violations == 0
    return track.token_ids


@pytest.mark.parametrize(
    "modes",
    [("kv",), ("token",), ("hybrid",), ("kv", "token", "hybrid", "kv", "hybrid", "token")],
    ids="-".join,
)
async def test_moving_back_and_forth_changes_no_token(pair, expected, modes) -> None:
    temperature, tokens = expected
    await pair[0].submit(request("r", PROMPT, LENGTH, temperature), KEPT)
    track, nodes = pair[0].tracks["r"], pair
    for i, mode in enumerate(modes):
        at = 30 * (i + 1)
        await until(lambda at=at: len(track.token_ids) >= at, "no progress")
        src, dst = nodes[i % 2], nodes[(i + 1) % 2]
        result = await move(SourceEnd(src), TargetEnd(dst), order(src.name, dst.name, mode))
        assert result.outcome == "committed", result.detail
        assert result.generation == i + 2
    assert await finish(pair) == tokens


@pytest.mark.parametrize("mode", ["kv", "token", "hybrid"])
async def test_logprobs_move_with_their_tokens(pair, mode) -> None:
    await pair[0].submit(request("still", PROMPT, 80, logprobs=2))
    await until(lambda: pair[0].tracks["still"].finished, "no progress")
    await pair[0].submit(request("r", PROMPT, 80, logprobs=2), KEPT)
    track = pair[0].tracks["r"]
    await until(lambda: len(track.token_ids) >= 20, "no progress")
    result = await move(SourceEnd(pair[0]), TargetEnd(pair[1]), order("a", "b", mode))
    assert result.outcome == "committed", result.detail
    tokens = await finish(pair)
    assert tokens == pair[0].tracks["still"].token_ids
    assert len(track.logprobs) == len(tokens)
    for moved, still in zip(track.logprobs, pair[0].tracks["still"].logprobs, strict=True):
        assert moved.logprob == pytest.approx(still.logprob, abs=1e-4)
        assert [token for token, _ in moved.top] == [token for token, _ in still.top]


async def test_kv_mode_sends_each_block_once_and_in_chunks(pair) -> None:
    await pair[0].submit(request("r", PROMPT, LENGTH), KEPT)
    track = pair[0].tracks["r"]
    await until(lambda: len(track.token_ids) >= 100, "no progress")
    nbytes = pair[0].engine.block_nbytes
    result = await move(
        SourceEnd(pair[0]), TargetEnd(pair[1]), order("a", "b", "kv"), chunk_bytes=2 * nbytes
    )
    assert result.outcome == "committed"
    # Every block once; the partial last one may be sent by the freeze only.
    assert result.bytes == -(-(result.tokens - 1) // 16) * nbytes
    await finish(pair)


async def test_few_blocks_go_with_the_hand_over(pair, expected) -> None:
    temperature, tokens = expected
    await pair[0].submit(request("r", PROMPT, LENGTH, temperature), KEPT)
    track = pair[0].tracks["r"]
    await until(lambda: len(track.token_ids) >= 30, "no progress")
    seen: list[str] = []
    source = SourceEnd(pair[0], Faults(before=seen.append))
    target = TargetEnd(pair[1], Faults(before=seen.append))
    every_block = (len(PROMPT) + LENGTH) // 16 * pair[0].engine.block_nbytes
    result = await move(source, target, order("a", "b", "kv"), tail_bytes=every_block)
    assert result.outcome == "committed", result.detail
    assert result.stages == 0
    assert result.bytes == -(-(result.tokens - 1) // 16) * pair[0].engine.block_nbytes
    assert seen == ["reserve", "freeze", "commit"]
    assert await finish(pair) == tokens


async def test_prefix_cached_at_the_target_is_not_sent(pair) -> None:
    await pair[1].submit(request("other", PROMPT, 1))
    await until(lambda: pair[1].tracks["other"].finished, "no progress")
    await pair[0].submit(request("r", PROMPT, LENGTH), KEPT)
    track = pair[0].tracks["r"]
    await until(lambda: len(track.token_ids) >= 20, "no progress")
    result = await move(SourceEnd(pair[0]), TargetEnd(pair[1]), order("a", "b", "kv"))
    assert result.cached_tokens == 64
    assert result.bytes == (-(-(result.tokens - 1) // 16) - 4) * pair[0].engine.block_nbytes
    await finish(pair)


@pytest.mark.parametrize("at", ["reserve", "receive", "commit"])
async def test_target_dies_and_the_source_goes_on(pair, expected, at) -> None:
    temperature, tokens = expected
    await pair[0].submit(request("r", PROMPT, LENGTH, temperature), KEPT)
    track = pair[0].tracks["r"]
    await until(lambda: len(track.token_ids) >= 30, "no progress")
    result = await move(SourceEnd(pair[0]), DeadEnd(pair[1], at), order("a", "b", "kv"))
    assert result.outcome == "aborted"
    assert await complete(pair) == tokens


async def test_lost_commit_answer_is_settled_not_guessed(pair, expected) -> None:
    """The target commits, its answer never arrives: the request must run on the target only."""
    temperature, tokens = expected

    def lose(name: str) -> None:
        if name == "commit":
            raise TimeoutError("answer lost")

    await pair[0].submit(request("r", PROMPT, LENGTH, temperature), KEPT)
    track = pair[0].tracks["r"]
    await until(lambda: len(track.token_ids) >= 30, "no progress")
    target = TargetEnd(pair[1], Faults(after=lose))
    result = await move(SourceEnd(pair[0]), target, order("a", "b", "kv"))
    assert result.outcome == "committed"
    assert await pair[0].call(lambda e: e.generation_of("r")) is None
    assert await finish(pair) == tokens


async def test_commit_that_never_arrives_is_refused_afterwards(pair, expected) -> None:
    temperature, tokens = expected

    def lose(name: str) -> None:
        if name == "commit":
            raise TimeoutError("message lost")

    await pair[0].submit(request("r", PROMPT, LENGTH, temperature), KEPT)
    track = pair[0].tracks["r"]
    await until(lambda: len(track.token_ids) >= 30, "no progress")
    which = order("a", "b", "kv")
    target = TargetEnd(pair[1], Faults(before=lose))
    result = await move(SourceEnd(pair[0]), target, which)
    assert result.outcome == "aborted"
    assert await pair[1].call(lambda e: pair[1].target.settle(e, which.migration_id)) == "aborted"
    assert await finish(pair) == tokens


async def test_source_that_does_not_answer_at_the_end_holds_nobody_up(pair, expected) -> None:
    """The target refuses; what the source is told then is lost. It decodes on by itself later."""
    temperature, tokens = expected

    class Deaf(SourceEnd):
        async def thaw(self, _order):
            await asyncio.Event().wait()

    def refuse(name: str) -> None:
        if name == "commit":
            raise MigrationError("refused")

    await pair[0].submit(request("r", PROMPT, LENGTH, temperature), KEPT)
    track = pair[0].tracks["r"]
    await until(lambda: len(track.token_ids) >= 30, "no progress")
    which = order("a", "b", "kv")
    target = TargetEnd(pair[1], Faults(before=refuse))
    result = await asyncio.wait_for(move(Deaf(pair[0]), target, which, settle_timeout_s=0.05), 120)
    assert result.outcome == "aborted"
    assert await pair[0].call(lambda _: pair[0].source.overdue(0.0)) == [which]
    assert await SourceEnd(pair[0]).thaw(which)
    assert await finish(pair) == tokens


@pytest.mark.parametrize("at", ["receive", "commit"])
async def test_what_failed_migrations_carried_is_let_go_at_once(pair, at) -> None:
    """Also where the garbage collector does not run: Ray keeps blocks as long as they are held."""
    await pair[0].submit(request("r", PROMPT, LENGTH), KEPT)
    await until(lambda: len(pair[0].tracks["r"].token_ids) >= 30, "no progress")
    carried: list[weakref.ref] = []

    class Recorded(SourceEnd):
        def stage(self, *args):
            meta, payload = super().stage(*args)
            carried.append(weakref.ref(payload))
            return meta, payload

        def freeze(self, *args):
            frozen, reference, payload = super().freeze(*args)
            carried.append(weakref.ref(payload))
            return frozen, reference, payload

    gc.disable()
    try:
        result = await move(Recorded(pair[0]), DeadEnd(pair[1], at), order("a", "b", "kv"))
        await until(lambda: all(each() is None for each in carried), "a payload is still held")
    finally:
        gc.enable()
    assert result.outcome == "aborted"
    assert carried
    await complete(pair)


async def test_request_recovered_where_room_is_held_for_it(pair) -> None:
    """Its source dies in the middle of a migration and the Router picks the target."""
    await pair[0].submit(request("r", PROMPT, LENGTH), KEPT)
    which, target = order("a", "b", "kv"), pair[1].target
    source, end = SourceEnd(pair[0]), TargetEnd(pair[1])
    await end.reserve(which, await source.begin(which))
    frozen, _, payload = source.freeze(which.migration_id, 0)
    await frozen
    recovered = request("r", PROMPT, LENGTH)
    recovered.generation = 9
    await pair[1].call(lambda e: target.give_way(e, "r"))
    await pair[1].submit(recovered)
    with pytest.raises(MigrationError, match="aborted"):
        await end.commit(which.migration_id, frozen, payload)
    assert await pair[1].call(lambda e: e.generation_of("r")) == 9
    await pair[0].call(lambda e: e.abort("r"))
    await finish(pair)


async def test_full_target_declines(expected) -> None:
    temperature, tokens = expected
    tracks = Tracks()
    small = EngineConfig(num_gpu_blocks_override=40)
    nodes = Node("a", tracks), Node("b", tracks, small)
    try:
        await nodes[1].submit(request("hog", PROMPT, 500))
        await until(lambda: len(tracks["hog"].token_ids) >= 400, "no progress")
        await nodes[0].submit(request("r", PROMPT, LENGTH, temperature), KEPT)
        await until(lambda: len(tracks["r"].token_ids) >= 150, "no progress")
        result = await move(SourceEnd(nodes[0]), TargetEnd(nodes[1]), order("a", "b", "kv"))
        assert result.outcome in ("aborted", "committed")
        assert await finish(nodes, "hog") == tokens
    finally:
        for node in nodes:
            node.stop()


async def test_request_that_ends_while_it_moves(pair) -> None:
    await pair[0].submit(request("r", PROMPT, LENGTH), KEPT)
    track = pair[0].tracks["r"]
    await until(lambda: len(track.token_ids) >= 30, "no progress")

    def abort(name: str) -> None:
        if name == "reserve":
            pair[0].loop.call(lambda e: e.abort("r")).result()

    result = await move(
        SourceEnd(pair[0]), TargetEnd(pair[1], Faults(after=abort)), order("a", "b", "kv")
    )
    assert result.outcome == "gone"
    for node in pair:
        stats = await node.call(lambda e: e.stats())
        assert stats.used_blocks == 0


async def test_second_migration_of_the_same_request_is_refused(pair) -> None:
    await pair[0].submit(request("r", PROMPT, LENGTH), KEPT)
    track = pair[0].tracks["r"]
    await until(lambda: len(track.token_ids) >= 30, "no progress")
    await SourceEnd(pair[0]).begin(order("a", "b", "kv"))
    result = await move(SourceEnd(pair[0]), TargetEnd(pair[1]), order("a", "b", "token"))
    assert result.outcome == "aborted"
    assert "already being migrated" in result.detail
    await finish(pair)


async def test_silent_driver_leaves_nothing_behind() -> None:
    tracks = Tracks()
    nodes = Node("a", tracks, timeout_s=0.05), Node("b", tracks, timeout_s=0.05)
    try:
        await nodes[0].submit(request("r", PROMPT, LENGTH), KEPT)
        await until(lambda: len(tracks["r"].token_ids) >= 30, "no progress")
        which = order("a", "b", "kv")
        state = await SourceEnd(nodes[0]).begin(which)
        await TargetEnd(nodes[1]).reserve(which, state)
        await asyncio.sleep(0.1)
        assert await nodes[1].call(lambda e: nodes[1].target.expire(e)) == 1
        await nodes[0].call(lambda _: nodes[0].source.expire())
        again = await move(SourceEnd(nodes[0]), TargetEnd(nodes[1]), order("a", "b", "kv"))
        assert again.outcome == "committed"
        await finish(nodes)
    finally:
        for node in nodes:
            node.stop()


async def test_request_preempted_while_it_moves(expected) -> None:
    """The source takes its blocks away in the middle: nothing half copied may be used."""
    temperature, tokens = expected
    tracks = Tracks()
    # Room for one of the two to the end, and some of the other.
    nodes = Node("a", tracks, EngineConfig(num_gpu_blocks_override=26)), Node("b", tracks)
    try:
        await nodes[0].submit(request("old", PROMPT, LENGTH))
        await nodes[0].submit(request("r", PROMPT, LENGTH, temperature), KEPT)
        await until(lambda: len(tracks["r"].token_ids) >= 30, "no progress")

        def wait_for_preemption(name: str) -> None:
            deadline = time.monotonic() + 120
            while (
                name == "stage" and not nodes[0].loop.call(lambda e: e.stats()).result().preemptions
            ):
                assert time.monotonic() < deadline, "no preemption"

        source = SourceEnd(nodes[0], Faults(after=wait_for_preemption))
        result = await move(source, TargetEnd(nodes[1]), order("a", "b", "kv"))
        assert result.outcome in ("aborted", "committed")
        assert await finish(nodes, "old") == tokens
    finally:
        for node in nodes:
            node.stop()
