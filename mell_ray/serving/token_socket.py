"""Token streams over plain sockets, from a replica to an ingress.

A Ray stream costs several thread wake-ups for each item at both ends, which at one item per engine
step is most of what a token costs outside the model. So the items go over a TCP connection of
their own: the ingress asks the replica through Ray for an address and a secret, connects, and
reads one line of JSON per item. What cannot be reached like that is read through Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import secrets
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from mell_ray.serving.wire import StreamItem, decode_item, encode_item

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
LONGEST_LINE = 256 << 20  # a request that moved with all its logprobs is told at once

Items = Callable[[str], AsyncGenerator[StreamItem, None]]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a replica's streams are, and what opens them."""

    host: str
    port: int
    secret: str


class TokenServer:
    """The replica's end. ``items(ingress_id)`` gives all that an ingress must be told."""

    def __init__(self, items: Items) -> None:
        self._items = items
        self._secret = secrets.token_hex(16)
        self._address: Address | None = None
        self._opening = asyncio.Lock()

    async def address(self, host: str) -> Address | None:
        """Listen on ``host``, if that is not done yet. None: this replica is to be read through
        Ray, because Ray encrypts what it sends, or because it cannot listen."""
        if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
            return None
        async with self._opening:
            if self._address is None:
                try:
                    server = await asyncio.start_server(self._serve, host, 0)
                except OSError as error:
                    logger.warning("no token socket on %s: %s", host, error)
                    return None
                port = server.sockets[0].getsockname()[1]
                self._address = Address(host, port, self._secret)
        return self._address

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                secret, _, ingress_id = (await reader.readline()).strip().partition(b" ")
            if not hmac.compare_digest(secret, self._secret.encode()):
                logger.warning("somebody without the secret has connected to the token socket")
                return
            async with contextlib.aclosing(self._items(ingress_id.decode())) as items:
                async for item in items:
                    writer.write(encode_item(item))
                    await writer.drain()
        except (OSError, TimeoutError, ValueError) as error:
            logger.info("a token socket ended: %s", error)
        finally:
            writer.close()


async def read_items(address: Address, ingress_id: str) -> AsyncGenerator[StreamItem, None]:
    """The ingress's end: items until the replica ends the stream or dies.

    Raises:
        OSError: the replica cannot be reached; nothing has been read then.
    """
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(
            address.host, address.port, limit=LONGEST_LINE
        )
    try:
        writer.write(f"{address.secret} {ingress_id}\n".encode())
        while line := await _line(reader):
            yield decode_item(line)
    finally:
        writer.close()


async def _line(reader: asyncio.StreamReader) -> bytes:
    """The next whole line; empty at the end, however it came about."""
    try:
        line = await reader.readline()
    except ConnectionError:
        return b""
    return line if line.endswith(b"\n") else b""
