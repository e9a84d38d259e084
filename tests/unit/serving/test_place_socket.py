"""Places asked for by socket: leases come back to who asked; all else is left to Serve."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from mell_ray.errors import OverloadedError, ServerError
from mell_ray.serving.listener import Address
from mell_ray.serving.place_socket import PlaceLine, place_listener
from mell_ray.serving.wire import Lease, PlaceRequest, Share

REQUEST = PlaceRequest(
    "r", "ingress", "m", 10, 20, priority=-3, prefix=(b"\x00\xff", b"x"), share=Share("key", 2.5)
)


class Router:
    """Gives leases that tell which request they are for; ``gate`` holds the answers back."""

    def __init__(self) -> None:
        self.asked: list[PlaceRequest] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.address: Address | None = None

    async def listen(self) -> Address | None:
        self.address = self.address or await place_listener(self.place).address("127.0.0.1")
        return self.address

    async def place(self, request: PlaceRequest) -> Lease:
        self.asked.append(request)
        await self.gate.wait()
        if request.request_id == "refused":
            raise OverloadedError("full", retry_after_s=7)
        if request.request_id == "failed":
            raise ServerError("no replica")
        return Lease(f"replica-of-{request.request_id}", 3, 1.5, existing=True)


async def connected(router: Router) -> PlaceLine:
    """A line that has found its Router, which takes one request."""
    line = PlaceLine(router.listen)
    async with asyncio.timeout(120):
        while await line.place(REQUEST) is None:
            await asyncio.sleep(0)
    router.asked.clear()
    return line


async def test_the_request_arrives_as_it_was_and_so_does_its_lease() -> None:
    router = Router()
    line = await connected(router)
    assert await line.place(REQUEST) == Lease("replica-of-r", 3, 1.5, existing=True)
    assert router.asked == [REQUEST]


async def test_answers_find_those_who_asked() -> None:
    router = Router()
    line = await connected(router)
    names = [f"r{i}" for i in range(50)]
    leases = await asyncio.gather(
        *(line.place(replace(REQUEST, request_id=name, share=None)) for name in names)
    )
    assert [lease and lease.replica_id for lease in leases] == [f"replica-of-{n}" for n in names]


async def test_refusals_come_back_and_failures_are_left_to_serve() -> None:
    line = await connected(Router())
    with pytest.raises(OverloadedError, match="full") as refused:
        await line.place(replace(REQUEST, request_id="refused"))
    assert refused.value.retry_after_s == 7
    assert await line.place(replace(REQUEST, request_id="failed")) is None
    assert await line.place(REQUEST) is not None


async def test_who_waits_when_the_router_goes_is_told() -> None:
    router = Router()
    line = await connected(router)
    router.gate.clear()
    waiting = [asyncio.create_task(line.place(REQUEST)) for _ in range(3)]
    async with asyncio.timeout(120):
        while len(router.asked) < 3:
            await asyncio.sleep(0)
        assert line._writer is not None
        line._writer.transport.abort()
        assert await asyncio.gather(*waiting) == [None] * 3


async def test_no_router_to_be_found() -> None:
    async def nowhere() -> Address | None:
        return None

    line = PlaceLine(nowhere)
    for _ in range(3):
        assert await line.place(REQUEST) is None
        await asyncio.sleep(0)
