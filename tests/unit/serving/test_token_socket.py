"""Token streams over sockets: what goes in comes out, the secret is needed, ends are seen."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from mell_ray.engine.types import TokenDelta, TokenLogprobs
from mell_ray.serving.listener import Address
from mell_ray.serving.mailbox import Mailbox
from mell_ray.serving.token_socket import read_items, token_listener
from mell_ray.serving.wire import (
    Evicted,
    Migrating,
    Moved,
    StreamItem,
    decode_item,
    decode_logprobs,
    encode_delta,
    encode_item,
)

LOGPROBS = [TokenLogprobs(-0.5, ((7, -0.5), (9, -math.inf)))]
DELTA = TokenDelta("a", 2, 5, [7], LOGPROBS, "stop", None)
ITEM = StreamItem(
    [encode_delta(DELTA), encode_delta(TokenDelta("b\u2028\ud800", 1, 0, [], None, "error", "no"))],
    [Migrating("a", "there"), Moved("a", "there"), Evicted("a", 3)],
)


def test_an_item_survives_its_line() -> None:
    line = encode_item(ITEM)
    assert line.count(b"\n") == 1
    read = decode_item(line)
    assert [tuple(delta) for delta in read.deltas] == [
        (*delta[:4], delta[4] and [[-0.5, [[7, -0.5], [9, -math.inf]]]], *delta[5:])
        for delta in ITEM.deltas
    ]
    assert decode_logprobs(read.deltas[0][4]) == LOGPROBS
    assert read.notices == ITEM.notices


class Source:
    """Gives each ingress its own items, and notes when a stream is closed."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.closed = asyncio.Event()

    async def items(self, ingress_id: str) -> AsyncGenerator[StreamItem, None]:
        try:
            for number in range(self.count):
                yield StreamItem([(ingress_id, 1, number, [number], None, None, None)])
        finally:
            self.closed.set()


async def opened(source: Source) -> Address:
    address = await token_listener(source.items).address("127.0.0.1")
    assert address is not None
    return address


async def read(address: Address, ingress_id: str) -> list[list]:
    return [list(delta) async for item in read_items(address, ingress_id) for delta in item.deltas]


async def test_each_ingress_reads_its_own_stream_to_its_end() -> None:
    address = await opened(Source(500))
    both = await asyncio.gather(read(address, "one"), read(address, "two"))
    for name, deltas in zip(("one", "two"), both, strict=True):
        assert [delta[0] for delta in deltas] == [name] * 500
        assert [delta[2] for delta in deltas] == list(range(500))


async def test_without_the_secret_nothing_is_told() -> None:
    source = Source(5)
    address = await opened(source)
    assert await read(replace(address, secret="guess"), "one") == []
    assert not source.closed.is_set(), "the stream was opened"


async def test_nobody_listens() -> None:
    address = await opened(Source(1))
    with pytest.raises(OSError):
        await read(replace(address, port=1), "one")


async def test_a_reader_that_leaves_ends_the_stream() -> None:
    source = Source(1_000_000)
    items = read_items(await opened(source), "one")
    await anext(items)
    await items.aclose()
    async with asyncio.timeout(120):
        await source.closed.wait()


async def test_encrypted_clusters_keep_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    assert await token_listener(Source(1).items).address("127.0.0.1") is None


async def test_mailbox_keeps_order_and_wakes_its_reader() -> None:
    box: Mailbox[int] = Mailbox()
    box.put(0)
    waiting = asyncio.create_task(_take(box, 4))
    await asyncio.sleep(0)
    for number in (1, 2, 3):
        box.put(number)
    assert await waiting == [0, 1, 2, 3]
    assert not len(box)


async def test_mailbox_loses_nothing_when_its_reader_is_cancelled() -> None:
    box: Mailbox[int] = Mailbox()
    waiting = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    box.put(1)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert await box.get() == 1


async def _take(box: Mailbox[int], count: int) -> list[int]:
    return [await box.get() for _ in range(count)]
