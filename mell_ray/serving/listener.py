"""A TCP server inside a Ray process, for those who have asked through Ray where it is.

Ray's own messages wake several threads at both ends; what is sent for every token or every request
goes over a connection of its own instead. Nothing is unpickled from it.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
LONGEST_LINE = 256 << 20  # a request that moved with all its logprobs is told at once

Talk = Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a listener is, and what it lets in."""

    host: str
    port: int
    secret: str


class Listener:
    """``talk(name, reader, writer)`` serves one connection of a caller that has named itself."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk
        self._secret = secrets.token_hex(16)
        self._address: Address | None = None
        self._opening = asyncio.Lock()

    async def address(self, host: str) -> Address | None:
        """Listen on ``host``, if that is not done yet. None: callers must keep to Ray, because Ray
        encrypts what it sends, or because nothing can listen there."""
        if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
            return None
        async with self._opening:
            if self._address is None:
                try:
                    server = await asyncio.start_server(self._serve, host, 0, limit=LONGEST_LINE)
                except OSError as error:
                    logger.warning("no socket on %s: %s", host, error)
                    return None
                port = server.sockets[0].getsockname()[1]
                self._address = Address(host, port, self._secret)
        return self._address

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                secret, _, name = (await reader.readline()).strip().partition(b" ")
            if not hmac.compare_digest(secret, self._secret.encode()):
                logger.warning("somebody without the secret has connected to a socket")
                return
            await self._talk(name.decode(), reader, writer)
        except (OSError, TimeoutError, ValueError) as error:
            logger.info("a connection ended: %s", error)
        finally:
            writer.close()


async def connect(address: Address, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which the caller has named itself.

    Raises:
        OSError: the listener cannot be reached.
    """
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(
            address.host, address.port, limit=LONGEST_LINE
        )
    writer.write(f"{address.secret} {name}\n".encode())
    return reader, writer


async def next_line(reader: asyncio.StreamReader) -> bytes:
    """The next whole line; empty at the end, however it came about."""
    try:
        line = await reader.readline()
    except ConnectionError:
        return b""
    return line if line.endswith(b"\n") else b""
