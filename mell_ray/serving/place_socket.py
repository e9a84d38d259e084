"""Asking the Router for places over a socket: a fraction of what a call through Serve costs.

Only leases, and that there are too many requests, are answered this way. For anything else (an
error, a Router that is being replaced) the ingress asks again through Serve, which it may, and
hears of it there.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from mell_ray.errors import MellError, OverloadedError
from mell_ray.serving.listener import Address, Listener, connect, next_line
from mell_ray.serving.wire import Lease, PlaceRequest, Share

logger = logging.getLogger(__name__)

Place = Callable[[PlaceRequest], Awaitable[Lease]]


def place_listener(place: Place) -> Listener:
    """The Router's end."""

    async def talk(_: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering: set[asyncio.Task[None]] = set()
        try:
            while line := await next_line(reader):
                number, fields = json.loads(line)
                task = asyncio.create_task(answer(writer, number, _decoded(fields)))
                answering.add(task)
                task.add_done_callback(answering.discard)
        finally:
            for task in answering:
                task.cancel()

    async def answer(writer: asyncio.StreamWriter, number: int, request: PlaceRequest) -> None:
        lease = refusal = None
        try:
            lease = asdict(await place(request))
        except OverloadedError as error:
            refusal = {"message": str(error), "retry_after_s": error.retry_after_s}
        except Exception as error:
            logger.warning("left to Serve: %s: %s", type(error).__name__, error)
        if not writer.is_closing():
            writer.write(json.dumps((number, lease, refusal)).encode() + b"\n")

    return Listener(talk)


class PlaceLine:
    """The ingress's end. ``find`` asks through Serve where the Router listens."""

    def __init__(self, find: Callable[[], Awaitable[Address | None]]) -> None:
        self._find = find
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Lease | None]] = {}

    async def place(self, request: PlaceRequest) -> Lease | None:
        """A lease, or None: ask through Serve.

        Raises:
            OverloadedError: too many requests wait.
        """
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        if self._writer is None or self._writer.is_closing():
            return None  # this time
        number = next(self._numbers)
        self._asked[number] = future = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(_encoded(number, request))
            return await future
        finally:
            self._asked.pop(number, None)

    async def _read(self) -> None:
        """Connect, and read answers until the Router is gone."""
        writer = None
        try:
            address = await self._find()
            if address is None:
                return
            reader, writer = await connect(address, "ingress")
            self._writer = writer
            while line := await next_line(reader):
                number, lease, refusal = json.loads(line)
                future = self._asked.get(number)
                if future is None or future.done():
                    continue
                if refusal is not None:
                    future.set_exception(OverloadedError(**refusal))
                else:
                    future.set_result(lease and Lease(**lease))
        except (OSError, MellError) as error:
            logger.info("the Router is asked through Serve: %s", error)
        finally:
            self._writer = None
            if writer is not None:
                writer.close()
            for future in self._asked.values():
                if not future.done():
                    future.set_result(None)


def _encoded(number: int, request: PlaceRequest) -> bytes:
    fields: dict[str, Any] = asdict(request)
    fields["prefix"] = [part.hex() for part in request.prefix]
    return json.dumps((number, fields)).encode() + b"\n"


def _decoded(fields: dict[str, Any]) -> PlaceRequest:
    share = fields["share"] and Share(**fields["share"])
    prefix = tuple(bytes.fromhex(part) for part in fields["prefix"])
    return PlaceRequest(**{**fields, "prefix": prefix, "share": share})
