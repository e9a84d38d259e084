"""The status page's data as an ingress serves it."""

from __future__ import annotations

import asyncio
import time

from mell_ray.serving.router_client import RouterClient

KEEP_S = 0.9


class PageData:
    """However many look at the page, the Router is asked once a second."""

    def __init__(self, router: RouterClient) -> None:
        self._router = router
        self._asking = asyncio.Lock()
        self._known: tuple[float, bytes] = (0.0, b"")

    async def get(self) -> bytes:
        """JSON, at most two seconds old."""
        async with self._asking:
            if time.monotonic() - self._known[0] >= KEEP_S:
                data = await self._router.call("page_data")
                self._known = (time.monotonic(), data)
        return self._known[1]
