"""Token streams over sockets: one line of JSON per item, from a replica to an ingress."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

from mell_ray.serving.listener import Address, Listener, connect, next_line
from mell_ray.serving.wire import StreamItem, decode_item, encode_item

Items = Callable[[str], AsyncGenerator[StreamItem, None]]


def token_listener(items: Items) -> Listener:
    """The replica's end. ``items(ingress_id)`` gives all that an ingress must be told."""

    async def talk(ingress_id: str, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with contextlib.aclosing(items(ingress_id)) as told:
            async for item in told:
                if writer.is_closing():  # the ingress has gone; uvloop refuses to write then
                    return
                writer.write(encode_item(item))
                await writer.drain()

    return Listener(talk)


async def read_items(address: Address, ingress_id: str) -> AsyncGenerator[StreamItem, None]:
    """The ingress's end: items until the replica ends the stream or dies.

    Raises:
        OSError: the replica cannot be reached; nothing has been read then.
    """
    reader, writer = await connect(address, ingress_id)
    try:
        while line := await next_line(reader):
            yield decode_item(line)
    finally:
        writer.close()
