"""A small OpenAI-compatible server whose answers tests decide, in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from mell_ray.openai.response import SSE_DONE, CompletionChunker
from mell_ray.openai.text import TextPiece

Send = Callable[[dict[str, Any]], Awaitable[None]]


class FakeServer:
    """Answers by the number of prompt tokens, see ``PLAN``; remembers what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.running = 0
        self.peak = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["path"] == "/v1/models":
            card = {"id": "fake", "max_model_len": 1000}
            await _json(send, 200, {"data": [card]})
            return
        raw, more = b"", True
        while more:
            message = await receive()
            raw += message.get("body", b"")
            more = message.get("more_body", False)
        self.headers.append(dict(scope["headers"]))
        self.bodies.append(json.loads(raw))
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await PLAN.get(len(self.bodies[-1]["prompt"]), whole)(self.bodies[-1], send)
        finally:
            self.running -= 1


async def whole(body: dict[str, Any], send: Send) -> None:
    await _stream(send, body["max_tokens"], body["max_tokens"])


async def in_one_piece(body: dict[str, Any], send: Send) -> None:
    """All tokens in a single event, as a server does that caught up with itself."""
    await _stream(send, 1, body["max_tokens"])


async def as_mell_ray(body: dict[str, Any], send: Send) -> None:
    """The bytes that the ingress of this project sends."""
    chunker = CompletionChunker("cmpl-1", 0, "fake", include_usage=True)
    tokens = body["max_tokens"]
    stream = b"".join(chunker.delta(0, TextPiece("é", [7])) for _ in range(tokens))
    stream += chunker.finish(0, "length") + chunker.usage(len(body["prompt"]), tokens) + SSE_DONE
    await _open(send)
    await send({"type": "http.response.body", "body": stream})


async def overloaded(body: dict[str, Any], send: Send) -> None:
    await _json(send, 503, {"error": {"message": f"{len(body['prompt'])} requests wait"}})


async def no_json(body: dict[str, Any], send: Send) -> None:
    del body
    await send({"type": "http.response.start", "status": 502, "headers": []})
    await send({"type": "http.response.body", "body": b"<html>bad gateway"})


async def error_inside(body: dict[str, Any], send: Send) -> None:
    del body
    await _open(send)
    await _event(send, _piece("a"))
    await _event(send, {"error": {"message": "the engine failed"}}, more=False)


async def cut_short(body: dict[str, Any], send: Send) -> None:
    del body
    await _open(send)
    await _event(send, _piece("a"), more=False)


async def one_token_less(body: dict[str, Any], send: Send) -> None:
    await _stream(send, body["max_tokens"] - 1, body["max_tokens"] - 1)


async def without_usage(body: dict[str, Any], send: Send) -> None:
    await _stream(send, body["max_tokens"], None)


async def refused(body: dict[str, Any], send: Send) -> None:
    del body
    await _json(send, 400, {"object": "error", "message": "too long for me", "code": 400})


async def never(body: dict[str, Any], send: Send) -> None:
    del body
    await _open(send)
    await _event(send, _piece("a"))
    await asyncio.sleep(3600)  # until the client gives up and uvicorn cancels this


PLAN = {
    101: overloaded,
    102: no_json,
    103: error_inside,
    104: cut_short,
    105: one_token_less,
    106: never,
    107: in_one_piece,
    108: as_mell_ray,
    109: without_usage,
    110: refused,
}


async def _stream(send: Send, pieces: int, tokens: int | None) -> None:
    await _open(send)
    for _ in range(pieces):
        await _event(send, _piece("x"))
    end = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}], "usage": None}
    await _event(send, end)
    if tokens is not None:
        await _event(send, {"choices": [], "usage": {"completion_tokens": tokens}})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def _piece(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": None}], "usage": None}


async def _open(send: Send) -> None:
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _event(send: Send, event: dict[str, Any], *, more: bool = True) -> None:
    body = f"data: {json.dumps(event)}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _json(send: Send, status: int, body: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


@contextmanager
def serving() -> Iterator[FakeServer]:
    app = FakeServer()
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        port=0,
        log_level="critical",
        timeout_graceful_shutdown=0,
    )
    server = uvicorn.Server(config)
    ready = threading.Event()

    async def serve() -> None:
        config.load()
        server.lifespan = config.lifespan_class(config)
        await server.startup()
        app.url = "http://{}:{}".format(*server.servers[0].sockets[0].getsockname())
        ready.set()
        await server.main_loop()
        await server.shutdown()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(120)
    try:
        yield app
    finally:
        server.should_exit = True
        thread.join(120)
