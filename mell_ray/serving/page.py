"""The status page as an ingress serves it: a file of the package, and its data once a second."""

from __future__ import annotations

import asyncio
import time
from functools import cache
from importlib import resources

from mell_ray.serving.router_client import RouterClient

KEEP_S = 0.9
# Styles, scripts and requests of the page itself, and nothing from anywhere else.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}


@cache
def status_page() -> bytes:
    """The page, HTML in UTF-8."""
    return resources.files("mell_ray").joinpath("observability/static/status.html").read_bytes()


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
