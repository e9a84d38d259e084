"""Web pages of other origins: what their browsers ask before they let a page call (CORS)."""

from __future__ import annotations

from collections.abc import Sequence

from ray import serve
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

METHODS = ("GET", "POST")
READABLE_HEADERS = ("x-request-id", "retry-after")  # beside those that any page may read


class CrossOrigin:
    """Goes around the whole application: a preflight carries no API key, and a page must be able
    to read every error. Without allowed origins the application stands as it is.

    Credentials in the sense of CORS (cookies) are never allowed; a key in a header is none.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._asked: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._asked is None:  # the application is there before the replica knows its settings
            origins: Sequence[str] = serve.get_replica_context().servable_object.allowed_origins
            self._asked = self._app if not origins else _allowing(self._app, origins)
        await self._asked(scope, receive, send)


def _allowing(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=METHODS,
        allow_headers=("*",),
        expose_headers=READABLE_HEADERS,
    )
