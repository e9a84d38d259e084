"""A client that costs next to nothing beside the server that it measures: it counts events and
looks for the end, and parses nothing else."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from mell_ray.errors import ServerError

_EVENT = b"data: {"
_END = b"data: [DONE]"
_READ = 1 << 16


async def stream(
    host: str,
    port: int,
    body: dict[str, Any],
    on_events: Callable[[int], None] = lambda _: None,
) -> float:
    """Send one completion and read its stream to the end. Returns the seconds to its first event.

    Raises:
        ServerError: the answer is not a whole stream.
    """
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
        "Connection: close\r\n\r\n"
    )
    started, first = time.perf_counter(), None
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(head.encode() + payload)
        rest, ended = b"", False
        while data := await reader.read(_READ):
            if first is None and not data.startswith(b"HTTP/1.1 200") and not rest:
                raise ServerError(data.decode(errors="replace"))
            data = rest + data
            events = data.count(_EVENT) - rest.count(_EVENT)
            if events and first is None:
                first = time.perf_counter() - started
            if events:
                on_events(events)
            ended = ended or _END in data
            rest = data[-(len(_END) - 1) :]  # what is looked for may have been cut in two
    finally:
        writer.close()
    if first is None or not ended:
        raise ServerError("the stream ended without [DONE]")
    return first
