"""The streamed response: bytes in order, errors inside the stream, clients that leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from mell_ray.errors import ServerError
from mell_ray.serving.event_stream import EventStream


async def answered(
    chunks: AsyncGenerator[bytes, None],
    receive: Callable[[], Any] | None = None,
    on_send: Callable[[dict[str, Any]], None] = lambda _: None,
) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)
        on_send(message)

    async def stays() -> None:
        await asyncio.Event().wait()

    await EventStream(b"first", chunks)({}, receive or stays, send)  # type: ignore[arg-type]
    return sent


async def test_chunks_come_in_order_and_the_body_ends() -> None:
    async def chunks() -> AsyncGenerator[bytes, None]:
        for number in range(3):
            yield str(number).encode()

    start, *bodies = await answered(chunks())
    headers = dict(start["headers"])
    assert start["status"] == 200
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert b"content-length" not in headers
    assert [body["body"] for body in bodies] == [b"first", b"0", b"1", b"2", b""]
    assert [body["more_body"] for body in bodies] == [True] * 4 + [False]


async def test_an_error_is_told_in_the_stream() -> None:
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield b"one"
        raise ServerError("it broke")

    *_, error, end = await answered(chunks())
    assert b"it broke" in error["body"]
    assert not end["more_body"]


async def test_a_client_that_leaves_closes_the_chunks() -> None:
    closed, begun = asyncio.Event(), asyncio.Event()

    async def chunks() -> AsyncGenerator[bytes, None]:
        try:
            yield b"one"
            begun.set()
            await asyncio.Event().wait()
        finally:
            closed.set()

    async def leaves() -> dict[str, str]:
        await begun.wait()
        return {"type": "http.disconnect"}

    sent = await answered(chunks(), leaves)
    assert closed.is_set()
    assert sent[-1]["body"] == b"one"
