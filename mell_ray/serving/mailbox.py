"""A queue with one reader in one event loop: ``asyncio.Queue`` without what several of either
would need, as each token passes through one."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """To be made inside the event loop that reads and writes it."""

    __slots__ = ("_items", "_loop", "_waiter")

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> None:
        self._items.append(item)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def first(self) -> T:
        """The oldest item, which stays. There must be one."""
        return self._items[0]

    def pop(self) -> T:
        """The oldest item. There must be one."""
        return self._items.popleft()

    async def get(self) -> T:
        """The oldest item, once there is one. Only one reader at a time."""
        while not self._items:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._items.popleft()
